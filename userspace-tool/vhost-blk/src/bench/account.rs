// SPDX-License-Identifier: GPL-2.0

//! Who used the processor, and how often it changed hands: what the kernel
//! counts for threads and for the whole machine.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::ClockId;
use nix::unistd::{Pid, SysconfVar, sysconf};

/// What the calling thread has used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ThreadUse {
    /// In all, to the nanosecond.
    pub(crate) cpu: Duration,
    /// In user space and in the kernel, as far as the kernel tells them apart:
    /// some do by looking at each tick of the clock.
    pub(crate) user: Duration,
    pub(crate) system: Duration,
    pub(crate) switches: Switches,
}

impl ThreadUse {
    /// Since the thread began.
    pub(crate) fn so_far() -> Result<Self> {
        let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
        let micros = |time: nix::sys::time::TimeVal| {
            Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or(0))
        };
        Ok(ThreadUse {
            cpu: ClockId::CLOCK_THREAD_CPUTIME_ID.now()?.into(),
            user: micros(usage.user_time()),
            system: micros(usage.system_time()),
            switches: Switches {
                voluntary: u64::try_from(usage.voluntary_context_switches())?,
                involuntary: u64::try_from(usage.involuntary_context_switches())?,
            },
        })
    }

    /// Since it was at `earlier`.
    pub(crate) fn since(self, earlier: ThreadUse) -> Self {
        ThreadUse {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
            switches: self.switches.since(earlier.switches),
        }
    }

    /// Of both.
    pub(crate) fn and(self, other: ThreadUse) -> Self {
        ThreadUse {
            cpu: self.cpu + other.cpu,
            user: self.user + other.user,
            system: self.system + other.system,
            switches: self.switches.and(other.switches),
        }
    }
}

/// Context switches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Switches {
    /// The thread had nothing to do.
    pub(crate) voluntary: u64,
    /// Another one's turn came.
    pub(crate) involuntary: u64,
}

impl Switches {
    fn since(self, earlier: Switches) -> Self {
        Switches {
            voluntary: self.voluntary.saturating_sub(earlier.voluntary),
            involuntary: self.involuntary.saturating_sub(earlier.involuntary),
        }
    }

    fn and(self, other: Switches) -> Self {
        Switches {
            voluntary: self.voluntary + other.voluntary,
            involuntary: self.involuntary + other.involuntary,
        }
    }
}

/// Whose threads serve the requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// The vhost core's: tasks of this process, or kernel threads named after it.
    Vhost,
    /// io_uring's, for what it cannot do at once.
    IoUring,
    /// All of a process.
    Process(i32),
}

/// What a thread has used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Task {
    nanos: u64,
    switches: Switches,
}

/// What the threads of a server have used, at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct ServerSample {
    /// By number of the thread and when it began: numbers are used again.
    tasks: HashMap<(i32, u64), Task>,
    /// Of the whole process, with threads that have ended.
    process: Option<Duration>,
}

/// What the threads of a server have used in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServerUse {
    pub(crate) cpu: Duration,
    pub(crate) switches: Switches,
    /// Threads at the end.
    pub(crate) threads: usize,
    /// Of them, those that were not there at first.
    pub(crate) appeared: usize,
    /// Threads that were there at first only. Their context switches are lost,
    /// and so is their CPU time unless all threads of a process are counted.
    pub(crate) disappeared: usize,
}

impl Server {
    /// Looks at its threads.
    pub(crate) fn sample(&self) -> Result<ServerSample> {
        let own = Path::new("/proc/self/task");
        match self {
            Server::Vhost => {
                let mut tasks = tasks_in(own, |name| name.starts_with("vhost-"))?;
                let kthread = format!("vhost-{}", process::id());
                // A kernel thread is a process with one thread.
                tasks.extend(tasks_in(Path::new("/proc"), |name| name == kthread)?);
                Ok(ServerSample {
                    tasks,
                    process: None,
                })
            }
            Server::IoUring => Ok(ServerSample {
                tasks: tasks_in(own, |name| name.starts_with("iou-"))?,
                process: None,
            }),
            Server::Process(pid) => {
                let folder = format!("/proc/{pid}/task");
                let tasks = tasks_in(Path::new(&folder), |_| true)
                    .with_context(|| format!("there is no process {pid} (--server-pid)"))?;
                let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(*pid))
                    .with_context(|| format!("the clock of process {pid}"))?;
                Ok(ServerSample {
                    tasks,
                    process: Some(clock.now()?.into()),
                })
            }
        }
    }
}

impl ServerSample {
    /// How many threads there are.
    pub(crate) fn threads(&self) -> usize {
        self.tasks.len()
    }

    /// What was used since `earlier`.
    pub(crate) fn since(&self, earlier: &ServerSample) -> ServerUse {
        let mut used = ServerUse {
            threads: self.tasks.len(),
            ..ServerUse::default()
        };
        for (key, task) in &self.tasks {
            let before = earlier.tasks.get(key).copied();
            used.appeared += usize::from(before.is_none());
            let before = before.unwrap_or_default();
            used.cpu += Duration::from_nanos(task.nanos.saturating_sub(before.nanos));
            used.switches = used.switches.and(task.switches.since(before.switches));
        }
        used.disappeared = earlier
            .tasks
            .keys()
            .filter(|key| !self.tasks.contains_key(key))
            .count();
        if let (Some(now), Some(before)) = (self.process, earlier.process) {
            used.cpu = now.saturating_sub(before);
        }
        used
    }
}

/// The threads in a folder of `/proc` whose name is `wanted`.
fn tasks_in(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<HashMap<(i32, u64), Task>> {
    let mut tasks = HashMap::new();
    let shown = folder.display();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {shown}"))? {
        let entry = entry.with_context(|| format!("cannot read {shown}"))?;
        let Some(number) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        match task(&entry.path(), &wanted) {
            Ok(Some((began, task))) => {
                tasks.insert((number, began), task);
            }
            Ok(None) => {}
            // It has ended meanwhile.
            Err(error) if has_ended(&error) => {}
            Err(error) => return Err(error.context(format!("cannot read {shown}/{number}"))),
        }
    }
    Ok(tasks)
}

fn has_ended(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| {
        error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
    })
}

/// When a thread began, and what it has used, if its name is `wanted`.
fn task(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<(u64, Task)>> {
    let read = |name: &str| fs::read_to_string(folder.join(name));
    if !wanted(read("comm")?.trim_end()) {
        return Ok(None);
    }
    let began = begin_in_stat(&read("stat")?).context("stat without a start time")?;
    let schedstat = read("schedstat")?;
    let nanos = schedstat
        .split_ascii_whitespace()
        .next()
        .and_then(|field| field.parse().ok())
        .context("schedstat without a time: is CONFIG_SCHED_INFO off?")?;
    let switches = switches_in_status(&read("status")?).context("status without switches")?;
    Ok(Some((began, Task { nanos, switches })))
}

/// The start time in `/proc/PID/stat`, whose second field is a name in brackets
/// with anything in it.
fn begin_in_stat(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn switches_in_status(status: &str) -> Option<Switches> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    Some(Switches {
        voluntary: field("voluntary_ctxt_switches:")?,
        involuntary: field("nonvoluntary_ctxt_switches:")?,
    })
}

/// What the whole machine has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HostUse {
    /// Time in which its processors were busy with anything but guests, to the
    /// tick of the clock that `/proc/stat` counts.
    pub(crate) busy: Duration,
    pub(crate) interrupts: u64,
}

impl HostUse {
    /// Since it was booted.
    pub(crate) fn so_far() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("no length of a tick")?;
        Self::parse(&text, u64::try_from(ticks)?)
    }

    fn parse(stat: &str, ticks_per_second: u64) -> Result<Self> {
        let line = |name: &str| {
            stat.lines()
                .find_map(|line| line.strip_prefix(name))
                .map(|rest| {
                    rest.split_ascii_whitespace()
                        .map_while(|field| field.parse::<u64>().ok())
                })
                .with_context(|| format!("/proc/stat has no line '{name}'"))
        };
        let cpu: Vec<u64> = line("cpu ")?.collect();
        let &[
            user,
            nice,
            system,
            _idle,
            _iowait,
            irq,
            softirq,
            _steal,
            guest,
            guest_nice,
            ..,
        ] = cpu.as_slice()
        else {
            bail!("/proc/stat has {} columns", cpu.len());
        };
        // The time of guests is in the user time too.
        let busy = (user + nice + system + irq + softirq).saturating_sub(guest + guest_nice);
        Ok(HostUse {
            busy: Duration::from_nanos(busy * 1_000_000_000 / ticks_per_second),
            interrupts: line("intr ")?.next().context("/proc/stat: intr")?,
        })
    }

    /// Since it was at `earlier`.
    pub(crate) fn since(self, earlier: HostUse) -> Self {
        HostUse {
            busy: self.busy.saturating_sub(earlier.busy),
            interrupts: self.interrupts.saturating_sub(earlier.interrupts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    fn spin(time: Duration) {
        let begin = ThreadUse::so_far().expect("a thread");
        while ThreadUse::so_far().expect("a thread").since(begin).cpu < time {}
    }

    #[test]
    fn own_time_is_counted() {
        let begin = ThreadUse::so_far().expect("a thread");
        spin(Duration::from_millis(20));
        thread::sleep(Duration::from_millis(1));
        let used = ThreadUse::so_far().expect("a thread").since(begin);
        assert!(used.cpu >= Duration::from_millis(20));
        assert!(used.switches.voluntary >= 1);
        let twice = used.and(used);
        assert_eq!(twice.cpu, used.cpu * 2);
        assert_eq!(twice.switches.voluntary, used.switches.voluntary * 2);
    }

    #[test]
    fn threads_come_and_go() {
        let named = |name: &str, work: mpsc::Receiver<Duration>| {
            let (tell, told) = mpsc::channel();
            let thread = thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    tell.send(()).expect("someone listens");
                    while let Ok(time) = work.recv() {
                        spin(time);
                        tell.send(()).expect("someone listens");
                    }
                })
                .expect("a thread");
            told.recv().expect("it began");
            (thread, told)
        };
        let (stay, work) = mpsc::channel();
        let (_kept, stay_told) = named("vhost-stays", work);
        let (go, work) = mpsc::channel();
        let (gone, _told) = named("vhost-goes", work);
        let (_other, work) = mpsc::channel::<Duration>();
        let _other_thread = named("not-vhost", work);
        let before = Server::Vhost.sample().expect("a sample");
        assert_eq!(before.threads(), 2);
        drop(go);
        gone.join().expect("it ended");
        let (come, work) = mpsc::channel();
        let (_came, come_told) = named("vhost-comes", work);
        for (work, told) in [(&stay, &stay_told), (&come, &come_told)] {
            work.send(Duration::from_millis(20)).expect("it listens");
            told.recv().expect("it worked");
        }
        let after = Server::Vhost.sample().expect("a sample");
        let used = after.since(&before);
        assert_eq!((used.threads, used.appeared, used.disappeared), (2, 1, 1));
        // What is not in the other thread's own clock yet is a tick at most.
        assert!(used.cpu >= Duration::from_millis(25), "{used:?}");
        assert!(used.switches.voluntary >= 1);
    }

    #[test]
    fn processes_are_counted_with_threads_that_ended() {
        let own = Server::Process(i32::try_from(process::id()).expect("a number"));
        let before = own.sample().expect("this process");
        thread::spawn(|| spin(Duration::from_millis(20)))
            .join()
            .expect("it ends");
        let used = own.sample().expect("this process").since(&before);
        assert!(used.cpu >= Duration::from_millis(20), "{used:?}");
        let error = Server::Process(i32::MAX).sample().expect_err("none");
        assert!(error.to_string().contains("--server-pid"));
    }

    #[test]
    fn files_of_proc() {
        let stat = "12 (a) b) 3) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(begin_in_stat(stat), Some(4711));
        assert_eq!(begin_in_stat("12 (a) S 1"), None);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t7\nnonvoluntary_ctxt_switches:\t2\n";
        let switches = switches_in_status(status).expect("both");
        assert_eq!((switches.voluntary, switches.involuntary), (7, 2));
        assert_eq!(switches_in_status("Name:\tx\n"), None);
        let stat = "cpu  500 10 300 9999 77 5 15 66 400 10\ncpu0 1\nintr 1234 5 6\n";
        let host = HostUse::parse(stat, 100).expect("both lines");
        assert_eq!(host.busy, Duration::from_millis(4200));
        assert_eq!(host.interrupts, 1234);
        assert!(HostUse::parse("cpu  1 2 3\nintr 1\n", 100).is_err());
        assert!(HostUse::so_far().expect("/proc/stat").interrupts > 0);
    }
}
