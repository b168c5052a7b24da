// SPDX-License-Identifier: GPL-2.0

//! What happens to disks while they are in use: they fail, wait, become read-only, change their size.

use std::ops::AddAssign;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vhost_blk_ring::{Guest, Kind, Request, Shape, Status};

use crate::check::{self, UsedLen, works};
use crate::context::{Context, PATIENCE, QUIET, Test, test};
use crate::{disk, lifecycle};

/// What the names of [`TESTS`] begin with: they run if there is an event, and then nothing else does.
pub(crate) const PREFIX: &str = "event.";

pub(crate) const TESTS: &[Test] = &[
    test!(
        "event.fails",
        "a disk that fails or goes: errors, also after stop and start; with another descriptor it works",
        120,
        fails
    ),
    test!(
        "event.waits",
        "a disk that waits: so do requests and a stop, and then they go on",
        120,
        waits
    ),
    test!(
        "event.read_only",
        "a disk that becomes read-only: writes fail, reads do not",
        120,
        read_only
    ),
    test!(
        "event.resized",
        "a disk that grows and shrinks: its size now is what counts",
        120,
        resized
    ),
    test!(
        "event.flushes",
        "flushes that take long keep no read waiting",
        120,
        flushes
    ),
];

/// What happens to a disk: a shell makes it happen, and ends it.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// The disk, 32 MiB or more.
    pub(crate) disk: PathBuf,
    /// The command that makes it happen.
    pub(crate) begin: String,
    /// The command that ends it. What it prints is the disk's new path, if it has another.
    pub(crate) end: String,
}

impl Event {
    /// A guest with two queues on the disk, which holds the pattern.
    fn guest(&self, context: &Context) -> Result<Guest> {
        disk::prepare(&self.disk)?;
        let guest = context.guest(|options| {
            options.queues = 2;
            options.queue_size = 128;
        })?;
        guest.start(disk::open(&self.disk, true, true)?)?;
        Ok(guest)
    }

    /// Ends it, and returns where the disk is now.
    fn end(&self) -> Result<PathBuf> {
        let output = spawn(&self.end)?.wait_with_output()?;
        ensure!(output.status.success(), "{}: {}", self.end, output.status);
        let said = String::from_utf8(output.stdout)?;
        Ok(match said.trim() {
            "" => self.disk.clone(),
            path => Path::new(path).to_owned(),
        })
    }
}

fn spawn(command: &str) -> Result<Child> {
    Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command}"))
}

/// How many requests ended how.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    reads: u64,
    writes: u64,
    failed_reads: u64,
    failed_writes: u64,
}

impl Tally {
    fn is_good(&self) -> bool {
        self.failed_reads == 0 && self.failed_writes == 0
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.failed_reads += other.failed_reads;
        self.failed_writes += other.failed_writes;
    }
}

/// Requests that are enough to be called a load, of each direction.
const ENOUGH: u64 = 64;

fn enough_work(tally: &Tally) -> bool {
    tally.reads >= ENOUGH && tally.writes >= ENOUGH
}

/// Takes what is complete; a read that succeeded has to have read the pattern.
fn take(guest: &mut Guest) -> Result<Tally> {
    let mut tally = Tally::default();
    for queue in guest.queues() {
        while let Some(done) = queue.poll()? {
            match (done.request.kind, done.status) {
                (Kind::In, Status::Ok) => {
                    check::outcome("read", &done, Status::Ok, UsedLen::Full)?;
                    let sector = done.request.sector;
                    check::same("read", &done.data, &disk::pattern(sector, 8))?;
                    tally.reads += 1;
                }
                (_, Status::Ok) => tally.writes += 1,
                (kind, _) => {
                    check::outcome(format!("{kind:?}"), &done, Status::IoErr, UsedLen::Failed)?;
                    if kind == Kind::In {
                        tally.failed_reads += 1;
                    } else {
                        tally.failed_writes += 1;
                    }
                }
            }
        }
    }
    Ok(tally)
}

/// Fills the queues with reads of the pattern and writes beyond it.
fn fill(guest: &mut Guest) -> Result<()> {
    let (start, _) = disk::SCRATCH;
    for (number, queue) in (0u64..).zip(guest.queues()) {
        let mut n = 0;
        while queue.ring.free_descriptors() >= 3 {
            let place = 8 * (128 * number + n);
            let request = if n % 2 == 0 {
                Request::read(place, 4096)
            } else {
                Request::write(start + place, disk::seeded(n, start + place, 8))
            };
            queue.submit(request, &Shape::default())?;
            n += 1;
        }
        if n > 0 {
            queue.kick()?;
        }
    }
    Ok(())
}

/// Keeps the queues full until `enough` says so of what was done, which it has to in time.
fn load(
    what: &str,
    guest: &mut Guest,
    mut enough: impl FnMut(&Tally) -> Result<bool>,
) -> Result<Tally> {
    let deadline = Instant::now() + PATIENCE;
    let mut tally = Tally::default();
    while !enough(&tally)? {
        ensure!(
            Instant::now() < deadline,
            "{what}: it did not come to that with {tally:?}, {} requests in flight",
            guest.queues().iter().map(|q| q.in_flight()).sum::<usize>()
        );
        fill(guest)?;
        tally += take(guest)?;
    }
    Ok(tally)
}

/// Waits until nothing is in flight.
fn drain(what: &str, guest: &mut Guest) -> Result<Tally> {
    let deadline = Instant::now() + PATIENCE;
    let mut tally = Tally::default();
    while guest.queues().iter().any(|queue| queue.in_flight() > 0) {
        ensure!(
            Instant::now() < deadline,
            "{what}: requests do not complete; {tally:?} did"
        );
        tally += take(guest)?;
    }
    Ok(tally)
}

/// A load on a disk that works.
fn works_well(what: &str, guest: &mut Guest) -> Result<()> {
    let mut tally = load(what, guest, |tally| Ok(enough_work(tally)))?;
    tally += drain(what, guest)?;
    ensure!(tally.is_good(), "{what}: {tally:?}");
    Ok(())
}

/// Makes it happen, under load.
fn happen(event: &Event, guest: &mut Guest) -> Result<Tally> {
    let mut child = spawn(&event.begin)?;
    let mut status = None;
    let tally = load("while it happens", guest, |_| {
        status = child.try_wait()?;
        Ok(status.is_some())
    });
    if tally.is_err() {
        child.kill()?;
    }
    match status {
        Some(status) if !status.success() => bail!("{}: {status}", event.begin),
        _ => tally,
    }
}

/// A load on a disk on which everything fails, in the end.
fn fails_all(what: &str, guest: &mut Guest) -> Result<Tally> {
    let mut tally = load(what, guest, |tally| {
        Ok(tally.failed_reads >= ENOUGH && tally.failed_writes >= ENOUGH)
    })?;
    tally += drain(what, guest)?;
    Ok(tally)
}

fn fails(context: &Context) -> Result<()> {
    let event = context.event()?;
    let mut guest = event.guest(context)?;
    works_well("before", &mut guest)?;
    let disk = disk::open(&event.disk, true, true)?;
    context.step("it happens");
    let mut tally = happen(event, &mut guest)?;
    context.step("it has happened");
    tally += fails_all("afterwards", &mut guest)?;
    context.note(format_args!("{tally:?}"));
    // It may succeed: nothing is left to make stable.
    guest
        .queue(0)
        .run(Request::flush(), &Shape::default(), PATIENCE)
        .context("a flush is not answered")?;
    let mut bases = works("stop", guest.stop())?;
    match guest.resume(disk, &bases) {
        Ok(()) => {
            fails_all("after a restart on what it was", &mut guest)?;
            bases = works("stop", guest.stop())?;
        }
        Err(error) => context.note(format_args!("it does not start again as it is: {error}")),
    }
    let path = event.end()?;
    context.step(format_args!("it is over, the disk is {}", path.display()));
    works(
        "start",
        guest.resume(disk::open(&path, true, true)?, &bases),
    )?;
    works_well("after the restart", &mut guest)
}

fn flushes(context: &Context) -> Result<()> {
    // More than anybody does at the same time.
    const FLUSHES: usize = 24;
    let event = context.event()?;
    let mut guest = event.guest(context)?;
    let status = spawn(&event.begin)?.wait()?;
    ensure!(status.success(), "{}: {status}", event.begin);

    let queue = guest.queue(0);
    for _ in 0..FLUSHES {
        queue.submit(Request::flush(), &Shape::default())?;
    }
    queue.kick()?;
    thread::sleep(QUIET);
    let read = guest
        .queue(1)
        .run(Request::read(0, 4096), &Shape::default(), PATIENCE)?;
    check::outcome("a read", &read, Status::Ok, UsedLen::Full)?;
    check::same("a read", &read.data, &disk::pattern(0, 8))?;

    let queue = guest.queue(0);
    ensure!(
        queue.poll()?.is_none(),
        "the read was not done before a flush"
    );
    for done in queue.wait_all(PATIENCE)? {
        check::outcome("a flush", &done, Status::Ok, UsedLen::Full)?;
    }
    event.end()?;
    works("stop", guest.stop())?;
    Ok(())
}

fn waits(context: &Context) -> Result<()> {
    let event = context.event()?;
    let mut guest = event.guest(context)?;
    for stops in [false, true] {
        context.step(format_args!("with a stop: {stops}"));
        works_well("before", &mut guest)?;
        let mut tally = happen(event, &mut guest)?;
        // What had passed the disk by then may still be on its way.
        thread::sleep(QUIET);
        tally += take(&mut guest)?;
        fill(&mut guest)?;
        thread::sleep(QUIET);
        let none = take(&mut guest)?;
        ensure!(
            none.reads + none.writes == 0 && none.is_good(),
            "it does not wait: {none:?}"
        );
        if stops {
            let bases = thread::scope(|scope| {
                let stop = scope.spawn(|| guest.stop());
                thread::sleep(QUIET);
                let waited = !stop.is_finished();
                let end = event.end();
                let bases = stop.join().map_err(|_| anyhow::anyhow!("panicked"))?;
                end?;
                ensure!(waited, "stopped with requests in flight");
                works("stop", bases)
            })?;
            tally += take(&mut guest)?;
            works(
                "start",
                guest.resume(disk::open(&event.disk, true, true)?, &bases),
            )?;
        } else {
            event.end()?;
        }
        tally += drain("when it is over", &mut guest)?;
        ensure!(tally.is_good(), "when it is over: {tally:?}");
    }
    works_well("afterwards", &mut guest)
}

fn read_only(context: &Context) -> Result<()> {
    let event = context.event()?;
    let mut guest = event.guest(context)?;
    works_well("before", &mut guest)?;
    let mut tally = happen(event, &mut guest)?;
    tally += drain("afterwards", &mut guest)?;
    ensure!(tally.failed_reads == 0, "while it happens: {tally:?}");
    let mut tally = load("afterwards", &mut guest, |tally| {
        Ok(tally.reads >= ENOUGH && tally.failed_writes >= ENOUGH)
    })?;
    tally += drain("afterwards", &mut guest)?;
    ensure!(
        tally.failed_reads == 0 && tally.writes == 0,
        "on a read-only disk: {tally:?}"
    );
    event.end()?;
    works_well("when it is over", &mut guest)
}

fn resized(context: &Context) -> Result<()> {
    let event = context.event()?;
    let mut guest = event.guest(context)?;
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let small = works("GET_INFO", guest.device().info(None))?.capacity;
    let (device, queues) = guest.split();
    let [busy, queue] = queues else {
        bail!("{} queues", queues.len());
    };
    let at_end = [Request::read(small - 8, 4096)];
    let beyond = [
        Request::read(small, 4096),
        Request::read(small - 8, 8192),
        Request::write(small, disk::seeded(1, small, 8)),
    ];
    let mut probe = |what: &str, requests: &[Request], status| -> Result<()> {
        let used_len = match status {
            Status::Ok => UsedLen::Full,
            _ => UsedLen::Failed,
        };
        for request in requests {
            let what = format!("{what}: {:?} at {}", request.kind, request.sector);
            let shape = Shape::default();
            check::request(what, queue, request.clone(), &shape, status, used_len)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let load = scope.spawn(|| lifecycle::busy(busy, &stop, &done));
        let result = (|| {
            probe("before", &at_end, Status::Ok)?;
            probe("before", &beyond, Status::IoErr)?;
            for round in 0..3 {
                context.step(format_args!("round {round}"));
                let mut child = spawn(&event.begin)?;
                ensure!(child.wait()?.success(), "{}", event.begin);
                let large = works("GET_INFO", device.info(None))?.capacity;
                ensure!(large > small, "it has {large} sectors, {small} before");
                probe("grown", &beyond, Status::Ok)?;
                probe("grown", &[Request::read(large - 8, 4096)], Status::Ok)?;
                probe("grown", &[Request::read(large, 4096)], Status::IoErr)?;
                event.end()?;
                probe("shrunk", &at_end, Status::Ok)?;
                probe("shrunk", &beyond, Status::IoErr)?;
            }
            Ok(())
        })();
        thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
        let outcome = load.join().map_err(|_| anyhow::anyhow!("panicked"))?;
        result.and(outcome)
    })?;
    let done = done.into_inner();
    ensure!(done > 100, "{done} requests are no load");
    Ok(())
}
