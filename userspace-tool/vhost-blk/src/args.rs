// SPDX-License-Identifier: GPL-2.0

//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as Group, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::{Iotlb, WorkerMode, Workers, uapi};

/// Check a host and its vhost-blk module, without a guest.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Args {
    /// The device node
    #[arg(long, global = true, default_value = uapi::DEVICE_PATH, value_name = "NODE")]
    pub(crate) device: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tell whether this host is ready, and what to do where it is not
    ///
    /// The exit status is 0 if it is ready, and 1 if it is not.
    Probe(ProbeArgs),
    /// Play the guest on a disk, and check what the module does
    ///
    /// Nothing is written to the disk unless --write is given. The exit status is 0 if every check
    /// passed or was skipped, and 1 otherwise.
    Exercise(ExerciseArgs),
    /// Test the module, or a vhost-user-blk server, against the virtio specification
    ///
    /// Nothing is written to the disk unless --write is given. The exit status is 0 if no test
    /// failed, and 1 otherwise.
    Conformance(ConformanceArgs),
    /// Play the guest on a disk, and measure how fast that is and what it costs
    ///
    /// Nothing is written to the disk unless --write is given. The exit status is 0 if every
    /// request was completed well.
    // Boxed: it has far more options than the others.
    Bench(Box<BenchArgs>),
}

#[derive(Debug, Group)]
pub(crate) struct ProbeArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The QEMU to look at
    #[arg(long, default_value = "qemu-system-x86_64", value_name = "PROGRAM")]
    pub(crate) qemu: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WorkersArg {
    /// One for all queues
    Shared,
    /// One for each queue
    PerQueue,
}

#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum WorkerModeArg {
    /// Threads of this process
    Task,
    /// Kernel threads
    Kthread,
}

#[derive(Debug, Group)]
pub(crate) struct ExerciseArgs {
    /// The block device or image file to exercise; it must not be mounted or in use
    #[arg(long, value_name = "DISK", required_unless_present = "list")]
    pub(crate) disk: Option<PathBuf>,
    /// Write too: overwrites --write-size at --write-at, and puts it back at the end
    #[arg(long, requires = "yes_destroy_data")]
    pub(crate) write: bool,
    /// Confirm that what --write overwrites may be lost, if this program is killed for instance
    #[arg(long)]
    pub(crate) yes_destroy_data: bool,
    /// Do not put back what --write has overwritten
    #[arg(long, requires = "write")]
    pub(crate) no_restore: bool,
    /// Where --write writes: byte offset
    #[arg(long, default_value_t = 0, value_name = "BYTES", requires = "write")]
    pub(crate) write_at: u64,
    /// How much --write writes to, MiB
    #[arg(long, default_value_t = 16, value_name = "MIB", requires = "write",
          value_parser = clap::value_parser!(u64).range(1..=1024))]
    pub(crate) write_size: u64,
    /// Queues, in the checks that use several
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) queues: u32,
    /// Size of each ring, descriptors
    #[arg(long, default_value_t = 256, value_parser = queue_size)]
    pub(crate) queue_size: u16,
    /// Where the random choices start; printed, to repeat a run
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// How many workers serve the queues
    #[arg(long, value_enum, default_value = "shared")]
    pub(crate) workers: WorkersArg,
    /// What the workers are [default: what the kernel makes them]
    #[arg(long, value_enum)]
    pub(crate) worker_mode: Option<WorkerModeArg>,
    /// For how long the workers may poll before they sleep; 0 for not at all
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    pub(crate) poll_us: u32,
    /// Keep the guest's memory pinned, rather than what each request needs
    #[arg(long)]
    pub(crate) pin_memory: bool,
    /// Have all addresses translated by a device IOTLB that is empty at first
    #[arg(long)]
    iotlb: bool,
    /// How often, at most, a translation is taken away at random
    #[arg(long, value_name = "MILLISECONDS", requires = "iotlb",
          value_parser = clap::value_parser!(u64).range(1..))]
    invalidate_ms: Option<u64>,
    /// How long a request may take, seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Run only checks whose name contains this; may be given more than once
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Vec<String>,
    /// List the checks and end
    #[arg(long)]
    pub(crate) list: bool,
    /// Print KTAP
    #[arg(long)]
    pub(crate) ktap: bool,
}

impl ExerciseArgs {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    /// The device IOTLB that was asked for.
    pub(crate) fn iotlb(&self) -> Option<Iotlb> {
        self.iotlb.then(|| Iotlb {
            invalidate_every: self.invalidate_ms.map(Duration::from_millis),
            ..Iotlb::default()
        })
    }

    /// Fails for what the command line's grammar lets through and the kernel
    /// does not: its vhost core makes only the first worker a kernel thread,
    /// and refuses others then.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        check_workers(self.workers, self.worker_mode)
    }
}

fn check_workers(workers: WorkersArg, mode: Option<WorkerModeArg>) -> anyhow::Result<()> {
    if let (WorkersArg::PerQueue, Some(WorkerModeArg::Kthread)) = (workers, mode) {
        anyhow::bail!("a device has only one worker that is a kernel thread");
    }
    Ok(())
}

/// What is tested against the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SubjectArg {
    /// The module, by its device node
    VhostBlk,
    /// A vhost-user-blk server, at --socket
    VhostUserBlk,
}

#[derive(Debug, Group)]
pub(crate) struct ConformanceArgs {
    /// What to test
    #[arg(long, value_enum, default_value = "vhost-blk")]
    pub(crate) path: SubjectArg,
    /// The socket of the vhost-user-blk server
    #[arg(long, required_if_eq("path", "vhost-user-blk"))]
    pub(crate) socket: Option<PathBuf>,
    /// The block device or image file, that of the server too; nobody else may use it
    #[arg(long, value_name = "DISK", required_unless_present_any = ["list", "markdown"])]
    pub(crate) disk: Option<PathBuf>,
    /// Write too: overwrites the first MiB, and puts it back at the end
    #[arg(long, requires = "yes_destroy_data")]
    pub(crate) write: bool,
    /// Confirm that what --write overwrites may be lost, if this program is killed for instance
    #[arg(long)]
    pub(crate) yes_destroy_data: bool,
    /// How long a request may take, seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) timeout: u64,
    /// Run only tests whose id begins with this; may be given more than once
    #[arg(long, value_name = "ID")]
    pub(crate) only: Vec<String>,
    /// List the statements, and where each is tested, and end
    #[arg(long)]
    pub(crate) list: bool,
    /// Print KTAP
    #[arg(long)]
    pub(crate) ktap: bool,
    /// What the table calls what is tested [default: the value of --path]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Keep the results in a file, for --markdown
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
    /// Test nothing, and print the table of what --save kept
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) markdown: Vec<PathBuf>,
}

/// What serves the requests of a benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub(crate) enum PathArg {
    /// The module, by its device node
    #[serde(rename = "vhost-blk")]
    VhostBlk,
    /// A vhost-user-blk server, at --socket
    #[serde(rename = "vhost-user-blk")]
    VhostUserBlk,
    /// The host's own io_uring: what the disk costs without a guest
    #[value(name = "io_uring")]
    #[serde(rename = "io_uring")]
    IoUring,
    /// Nothing: what this program itself costs
    #[serde(rename = "front-end")]
    FrontEnd,
}

/// What a benchmark does with the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum RwArg {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Random reads
    #[value(name = "randread")]
    RandRead,
    /// Random writes
    #[value(name = "randwrite")]
    RandWrite,
    /// Random reads and writes
    #[value(name = "randrw")]
    RandRw,
}

impl RwArg {
    pub(crate) fn writes(self) -> bool {
        !matches!(self, RwArg::Read | RwArg::RandRead)
    }

    pub(crate) fn is_random(self) -> bool {
        !matches!(self, RwArg::Read | RwArg::Write)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum CompletionArg {
    /// Sleep until the call eventfd tells
    Event,
    /// Look at the used index all the time
    Poll,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

impl Switch {
    pub(crate) fn is_on(self) -> bool {
        self == Switch::On
    }
}

#[derive(Debug, Group)]
pub(crate) struct BenchArgs {
    /// What serves the requests
    #[arg(long, value_enum)]
    pub(crate) path: PathArg,
    /// The block device or image file; of front-end it is the size only
    #[arg(
        long,
        value_name = "DISK",
        required_if_eq("path", "vhost-blk"),
        required_if_eq("path", "io_uring")
    )]
    pub(crate) disk: Option<PathBuf>,
    /// The socket of the vhost-user-blk server
    #[arg(long, required_if_eq("path", "vhost-user-blk"))]
    pub(crate) socket: Option<PathBuf>,
    /// The process whose CPU time is that of the server, for vhost-user-blk
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) server_pid: Option<i32>,
    /// What to do
    #[arg(long, value_enum)]
    pub(crate) rw: RwArg,
    /// How many requests of randrw are reads, percent
    #[arg(long, default_value_t = 70, value_name = "PERCENT",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) rwmixread: u8,
    /// Size of each request; k and M may follow the number
    #[arg(long, default_value = "4k", value_name = "BYTES", value_parser = bytes)]
    pub(crate) bs: u64,
    /// Requests in flight in each queue
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) iodepth: u16,
    /// Queues, each driven by a thread of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) queues: u16,
    /// Size of each ring, descriptors
    #[arg(long, default_value_t = 256, value_parser = ring_size)]
    pub(crate) queue_size: u16,
    /// How to learn of completions
    #[arg(long, value_enum, default_value = "event")]
    pub(crate) completion: CompletionArg,
    /// How many requests to measure, in all queues together
    #[arg(long, value_name = "REQUESTS", required_unless_present = "runtime",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// How long to measure
    #[arg(long, value_name = "SECONDS", conflicts_with = "count", value_parser = seconds)]
    pub(crate) runtime: Option<Duration>,
    /// How many requests to make first, in all queues together, that no figure has
    #[arg(long, default_value_t = 0, value_name = "REQUESTS")]
    pub(crate) warmup: u64,
    /// Flush after each write; a request is complete when its flush is
    #[arg(long)]
    pub(crate) sync_every_write: bool,
    /// Negotiate event indices
    #[arg(long, value_enum, default_value = "on")]
    pub(crate) event_idx: Switch,
    /// Put the descriptors of a request into an indirect table
    #[arg(long, value_enum, default_value = "on")]
    pub(crate) indirect: Switch,
    /// How many workers serve the queues of vhost-blk
    #[arg(long, value_enum, default_value = "shared")]
    pub(crate) workers: WorkersArg,
    /// What the workers are [default: what the kernel makes them]
    #[arg(long, value_enum)]
    pub(crate) worker_mode: Option<WorkerModeArg>,
    /// For how long the workers of vhost-blk may poll before they sleep; 0 for not at all
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    pub(crate) poll_us: u32,
    /// Keep the guest's memory pinned, rather than what each request of vhost-blk needs
    #[arg(long)]
    pub(crate) pin_memory: bool,
    /// Ask for memory of huge pages, as QEMU does, if the host has transparent ones
    #[arg(long, value_enum, default_value = "on")]
    pub(crate) huge_pages: Switch,
    /// Have io_uring pin the memory of each request, rather than register all of it
    #[arg(long)]
    pub(crate) unregistered: bool,
    /// Use only the first BYTES of the disk; k, M and G may follow [default: all of it]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) range: Option<u64>,
    /// Where the random choices start
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Measure no latencies: it saves reading the clock
    #[arg(long)]
    pub(crate) no_latency: bool,
    /// How many requests are completed at once at most, for front-end [default: all]
    #[arg(long, value_name = "REQUESTS", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) batch: Option<u16>,
    /// Give up when nothing was completed for so long, seconds
    #[arg(long, default_value_t = 30, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Overwrite the disk, as every mode but read and randread does
    #[arg(long, requires = "yes_destroy_data")]
    pub(crate) write: bool,
    /// Confirm that what is on the disk may be lost
    #[arg(long)]
    pub(crate) yes_destroy_data: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl BenchArgs {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    /// Whether the disk is going to be written to.
    pub(crate) fn overwrites(&self) -> bool {
        self.rw.writes() && self.path != PathArg::FrontEnd
    }

    /// Fails for what the command line's grammar lets through and cannot be, or
    /// would not have the effect that it seems to have.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        use anyhow::ensure;
        check_workers(self.workers, self.worker_mode)?;
        let path = self.path;
        let rings = path != PathArg::IoUring;
        let module = path == PathArg::VhostBlk;
        ensure!(
            self.write || !self.overwrites(),
            "this mode overwrites the disk: add --write --yes-destroy-data"
        );
        ensure!(
            self.disk.is_some() || !self.overwrites(),
            "which disk does the server write to? (--disk; it has to be seen that nobody else has it)"
        );
        ensure!(
            path == PathArg::VhostUserBlk || (self.socket.is_none() && self.server_pid.is_none()),
            "--socket and --server-pid are for --path vhost-user-blk"
        );
        ensure!(
            module || (self.worker_mode.is_none() && matches!(self.workers, WorkersArg::Shared)),
            "--workers and --worker-mode are for --path vhost-blk"
        );
        ensure!(
            module || self.poll_us == 0,
            "--poll-us is for --path vhost-blk"
        );
        ensure!(
            module || !self.pin_memory,
            "--pin-memory is for --path vhost-blk"
        );
        ensure!(
            !rings || !self.unregistered,
            "--unregistered is for --path io_uring"
        );
        ensure!(
            path == PathArg::FrontEnd || self.batch.is_none(),
            "--batch is for --path front-end"
        );
        ensure!(
            !self.sync_every_write || self.rw.writes(),
            "--sync-every-write is for modes that write"
        );
        ensure!(
            self.bs > 0 && self.bs % SECTOR_SIZE as u64 == 0,
            "--bs has to be a multiple of {SECTOR_SIZE} bytes"
        );
        ensure!(
            self.bs * u64::from(self.iodepth) <= MAX_DATA,
            "--bs times --iodepth is more than {} MiB",
            MAX_DATA >> 20
        );
        let each = if self.indirect.is_on() { 1 } else { 3 };
        ensure!(
            !rings || u32::from(self.iodepth) * each <= u32::from(self.queue_size),
            "{} requests of {each} descriptors do not fit a ring of {}: a smaller --iodepth, {}",
            self.iodepth,
            self.queue_size,
            if each == 1 {
                "or a larger --queue-size"
            } else {
                "--indirect on, or a larger --queue-size"
            }
        );
        let queues = u64::from(self.queues);
        ensure!(
            self.count.is_none_or(|count| count >= queues),
            "--count is less than one request for each queue"
        );
        Ok(())
    }
}

/// Most memory for the data of a queue's requests, bytes: what io_uring takes as
/// one buffer.
const MAX_DATA: u64 = 1 << 30;

/// A number of bytes, with a suffix as fio has them.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err("a number, k, M, G or T after it".into()),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "a number of bytes is needed, such as 4096 or 4k".into())
}

/// A length of time in seconds, fractions included.
fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|time| !time.is_zero())
        .ok_or_else(|| "a number of seconds above 0 is needed".into())
}

/// The sizes that the module's rings can have.
fn ring_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && size <= 1024 => Ok(size),
        _ => Err("a power of two up to 1024 is needed".into()),
    }
}

impl From<WorkersArg> for Workers {
    fn from(arg: WorkersArg) -> Self {
        match arg {
            WorkersArg::Shared => Workers::Shared,
            WorkersArg::PerQueue => Workers::PerQueue,
        }
    }
}

impl From<WorkerModeArg> for WorkerMode {
    fn from(arg: WorkerModeArg) -> Self {
        match arg {
            WorkerModeArg::Task => WorkerMode::Task,
            WorkerModeArg::Kthread => WorkerMode::Kthread,
        }
    }
}

/// The sizes that every check can work with.
fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && (16..=1024).contains(&size) => Ok(size),
        _ => Err("a power of two from 16 to 1024 is needed".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn writing_needs_consent() {
        let parse = |words: &[&str]| Args::try_parse_from(words);
        let read = ["vhost-blk", "exercise", "--disk", "/dev/x"];
        assert!(parse(&read).is_ok());
        let write = [&read[..], &["--write"]].concat();
        assert!(parse(&write).is_err());
        let consent = [&write[..], &["--yes-destroy-data"]].concat();
        assert!(parse(&consent).is_ok());
        assert!(parse(&[&read[..], &["--write-at", "4096"]].concat()).is_err());
        assert!(parse(&["vhost-blk", "exercise"]).is_err());
        assert!(parse(&["vhost-blk", "exercise", "--list"]).is_ok());
    }

    #[test]
    fn kernel_threads_are_not_per_queue() {
        let check = |workers: &str, mode: &str| {
            let words = [
                "vhost-blk",
                "exercise",
                "--disk",
                "x",
                "--workers",
                workers,
                "--worker-mode",
                mode,
            ];
            match Args::try_parse_from(words).expect("correct words").command {
                Command::Exercise(args) => args.check(),
                _ => unreachable!("exercise was parsed"),
            }
        };
        assert!(check("per-queue", "task").is_ok());
        assert!(check("shared", "kthread").is_ok());
        assert!(check("per-queue", "kthread").is_err());
    }

    fn bench(words: &str) -> anyhow::Result<()> {
        let words = ["vhost-blk", "bench"].into_iter().chain(words.split(' '));
        match Args::try_parse_from(words)?.command {
            Command::Bench(args) => args.check(),
            _ => unreachable!("bench was parsed"),
        }
    }

    #[test]
    fn benchmarks_that_make_sense() {
        for words in [
            "--path vhost-blk --disk x --rw randread --bs 4096 --iodepth 32 --count 1000",
            "--path vhost-blk --disk x --rw read --runtime 0.5 --workers per-queue --queues 4",
            "--path vhost-user-blk --socket s --server-pid 7 --rw read --count 1 --indirect off",
            "--path vhost-user-blk --socket s --disk x --rw write --count 1 --write --yes-destroy-data",
            "--path io_uring --disk x --rw randread --count 1 --iodepth 1024 --queue-size 16",
            "--path front-end --disk x --rw write --count 1 --sync-every-write --batch 4",
        ] {
            assert!(bench(words).is_ok(), "{words}");
        }
    }

    #[test]
    fn benchmarks_that_do_not() {
        for (words, says) in [
            ("--path vhost-blk --rw read --count 1", "--disk"),
            ("--path io_uring --disk x --rw read", "--count"),
            (
                "--path io_uring --disk x --rw read --count 1 --runtime 1",
                "--runtime",
            ),
            ("--path io_uring --disk x --rw read --count 0", "--count"),
            (
                "--path io_uring --disk x --rw read --runtime 0",
                "--runtime",
            ),
            (
                "--path io_uring --disk x --rw read --count 1 --queues 2",
                "--count",
            ),
            ("--path io_uring --disk x --rw write --count 1", "--write"),
            (
                "--path io_uring --disk x --rw randrw --count 1 --write",
                "--yes-destroy-data",
            ),
            (
                "--path io_uring --disk x --rw read --count 1 --bs 1000",
                "512",
            ),
            ("--path io_uring --disk x --rw read --count 1 --bs 0", "512"),
            (
                "--path io_uring --disk x --rw read --count 1 --bs 1G --iodepth 2",
                "1024 MiB",
            ),
            (
                "--path io_uring --disk x --rw read --count 1 --sync-every-write",
                "that write",
            ),
            (
                "--path io_uring --disk x --rw read --count 1 --worker-mode task",
                "vhost-blk",
            ),
            (
                "--path front-end --rw read --count 1 --poll-us 50",
                "--poll-us is for",
            ),
            (
                "--path io_uring --disk x --rw read --count 1 --batch 1",
                "front-end",
            ),
            ("--path vhost-user-blk --rw read --count 1", "--socket"),
            (
                "--path vhost-blk --disk x --rw read --count 1 --socket s",
                "--socket",
            ),
            (
                "--path vhost-user-blk --socket s --rw write --count 1 --write --yes-destroy-data",
                "--disk",
            ),
            (
                "--path front-end --rw read --count 1 --iodepth 64 --queue-size 32",
                "--queue-size",
            ),
            (
                "--path front-end --rw read --count 1 --iodepth 128 --indirect off",
                "--indirect",
            ),
        ] {
            let error = bench(words).expect_err(words).to_string();
            assert!(error.contains(says), "{words}: {error}");
        }
    }

    #[test]
    fn numbers_of_bytes() {
        let good = [("512", 512), ("4k", 4096), ("1M", 1 << 20), ("2G", 2 << 30)];
        for (text, value) in good {
            assert_eq!(bytes(text), Ok(value));
        }
        for bad in ["", "k", "4x", "4kk", "-1", "1.5k", "18446744073709551615k"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for bad in ["0", "-1", "nan", "inf", "x"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn queue_sizes() {
        for good in ["16", "256", "1024"] {
            assert!(queue_size(good).is_ok(), "{good}");
        }
        for bad in ["0", "8", "17", "2048", "65536", "x"] {
            assert!(queue_size(bad).is_err(), "{bad}");
        }
    }
}
