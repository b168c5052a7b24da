// SPDX-License-Identifier: GPL-2.0

//! `vhost-blk bench`: plays the guest on a disk, and measures.
//!
//! Each queue has a thread that keeps so many requests in flight. All paths have
//! the same generator and the same loop; the engine below differs.

mod account;
mod engine;
mod generator;
mod load;
mod report;
mod target;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Driver, Guest, Memory, Options, Ring, Slots, Uring, VhostUserGuest};

use crate::args::{BenchArgs, CompletionArg, PathArg};
use account::{HostUse, Server};
use engine::{Engine, RingEngine, UringEngine};
use generator::{Generator, share};
use load::{Load, Outcome, Shared};
use report::Report;
use target::{Target, range};

/// Memory of a queue beside its requests, bytes: its rings, with room to spare.
const RING_MEMORY: usize = 1 << 20;
/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;
/// The size of the disk that the front end alone pretends to have, bytes.
const PRETENDED: u64 = 1 << 40;

/// Measures, prints the figures, and returns that all went well.
pub(crate) fn run(device: &Path, args: &BenchArgs) -> Result<bool> {
    args.check()?;
    let target = match &args.disk {
        Some(path) => Some(Target::open(path, args.overwrites())?),
        None => None,
    };
    if let Some(target) = &target {
        let block = target.block() as u64;
        ensure!(
            args.bs % block == 0,
            "--bs has to be a multiple of the disk's block size, {block}"
        );
    }
    let report = match args.path {
        PathArg::VhostBlk => on_vhost_blk(device, args, &disk(target)?)?,
        PathArg::VhostUserBlk => on_vhost_user(args, target.as_ref())?,
        PathArg::IoUring => on_io_uring(args, &disk(target)?)?,
        PathArg::FrontEnd => on_nothing(args, target.as_ref())?,
    };
    let text = if args.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report.to_string()
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(true)
}

fn disk(target: Option<Target>) -> Result<Target> {
    target.context("which disk? (--disk)")
}

fn on_vhost_blk(device: &Path, args: &BenchArgs, target: &Target) -> Result<Report> {
    let range = range_on(args, target.bytes())?;
    let options = options(args, device);
    let mut guest = Guest::with_memory(&options, &memory(args, options.memory)?)?;
    check_features(args, guest.features())?;
    guest.start(target.backend())?;
    let sources = guest
        .queues()
        .iter_mut()
        .map(|queue| Source::Ring(&mut queue.ring))
        .collect();
    measure(args, range, sources, Some(&Server::Vhost))
}

fn on_vhost_user(args: &BenchArgs, target: Option<&Target>) -> Result<Report> {
    let socket = args.socket.as_deref().context("which server? (--socket)")?;
    let options = options(args, socket);
    let memory = made_of(Memory::shared(whole_pages(options.memory))?, args);
    let mut guest = VhostUserGuest::with_memory(&options, &memory)
        .with_context(|| format!("the server at {}", socket.display()))?;
    check_features(args, guest.features())?;
    let bytes = guest.capacity() * SECTOR_SIZE as u64;
    if let Some(target) = target {
        let there = target.bytes() / SECTOR_SIZE as u64 * SECTOR_SIZE as u64;
        ensure!(
            there == bytes,
            "the server's disk has {bytes} bytes, and --disk has {there}: they are not the same"
        );
    }
    let range = range_on(args, bytes)?;
    guest.start()?;
    let server = args.server_pid.map(Server::Process);
    let sources = guest.rings().iter_mut().map(Source::Ring).collect();
    let report = measure(args, range, sources, server.as_ref())?;
    guest.stop()?;
    Ok(report)
}

fn on_io_uring(args: &BenchArgs, target: &Target) -> Result<Report> {
    let range = range_on(args, target.bytes())?;
    let sources = (0..args.queues)
        .map(|_| Source::File(target.direct()))
        .collect();
    measure(args, range, sources, Some(&Server::IoUring))
}

/// The front end alone: rings as for a device, and nothing behind them.
fn on_nothing(args: &BenchArgs, target: Option<&Target>) -> Result<Report> {
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_SEMAPHORE, EventFd};
    let range = range_on(args, target.map_or(PRETENDED, Target::bytes))?;
    let memory = memory(args, memory_needed(args))?;
    let mut rings = Vec::new();
    for _ in 0..args.queues {
        let mut ring = Ring::new(&memory, args.queue_size, args.event_idx.is_on())?;
        // Each wait is one system call, as with a device that has just called.
        let calls = EventFd::new(EFD_CLOEXEC | EFD_SEMAPHORE)?;
        calls.write(u64::MAX - 1)?;
        ring.set_call_event(calls);
        rings.push(ring);
    }
    let sources = rings.iter_mut().map(Source::Nothing).collect();
    measure(args, range, sources, None)
}

fn range_on(args: &BenchArgs, disk: u64) -> Result<u64> {
    // Sequential queues have a piece each.
    let parts = if args.rw.is_random() { 1 } else { args.queues };
    range(args.range, disk, args.bs, parts.into())
}

/// Memory of `len` bytes or more.
fn memory(args: &BenchArgs, len: usize) -> Result<Memory> {
    Ok(made_of(Memory::new(whole_pages(len))?, args))
}

/// Bytes of as many whole huge pages as hold `len` bytes.
fn whole_pages(len: usize) -> usize {
    len.next_multiple_of(HUGE_PAGE)
}

/// Memory, to be made of the pages that it is to be of.
fn made_of(memory: Memory, args: &BenchArgs) -> Memory {
    // A kernel that has no huge ones makes it of small ones.
    let _ = memory.advise_huge_pages(args.huge_pages.is_on());
    memory
}

/// Bytes of memory that a guest needs.
fn memory_needed(args: &BenchArgs) -> usize {
    let slots = Slots::memory_needed(args.iodepth, data_len(args));
    (slots + RING_MEMORY) * usize::from(args.queues)
}

fn data_len(args: &BenchArgs) -> u32 {
    // `BenchArgs::check` has seen to it.
    u32::try_from(args.bs).expect("a request is at most 1 GiB")
}

fn options(args: &BenchArgs, path: &Path) -> Options {
    let mut features = feature::VERSION_1 | feature::FLUSH | feature::MQ;
    for (switch, bit) in [
        (args.event_idx, feature::EVENT_IDX),
        (args.indirect, feature::INDIRECT_DESC),
    ] {
        if switch.is_on() {
            features |= bit;
        }
    }
    Options {
        path: path.to_owned(),
        queues: args.queues.into(),
        queue_size: args.queue_size,
        memory: memory_needed(args),
        features,
        workers: args.workers.into(),
        worker_mode: args.worker_mode.map(Into::into),
        busyloop_timeout: args.poll_us,
        pin_memory: args.pin_memory,
        blocking_calls: true,
        ..Options::default()
    }
}

/// Fails if the device has not what the options stand on.
fn check_features(args: &BenchArgs, features: u64) -> Result<()> {
    for (wanted, bit, advice) in [
        (true, feature::VERSION_1, "it is too old"),
        (
            args.event_idx.is_on(),
            feature::EVENT_IDX,
            "--event-idx off",
        ),
        (
            args.indirect.is_on(),
            feature::INDIRECT_DESC,
            "--indirect off",
        ),
        (
            args.sync_every_write,
            feature::FLUSH,
            "without it each write is stable: leave out --sync-every-write",
        ),
    ] {
        if wanted && features & bit == 0 {
            bail!(
                "the device has no {}: {advice}",
                feature::names(bit).join("")
            );
        }
    }
    Ok(())
}

/// Where the requests of a queue go.
enum Source<'a> {
    /// To a device, by this ring.
    Ring(&'a mut Ring),
    /// Nowhere, by this ring.
    Nothing(&'a mut Ring),
    /// To this file, by io_uring.
    File(&'a File),
}

/// A queue's thread as the others see it.
struct Queue {
    /// How many requests to run next.
    work: Sender<u64>,
}

type Reply = (u16, Result<Option<Outcome>>);

/// Runs the load on all queues at once.
fn measure(
    args: &BenchArgs,
    range: u64,
    sources: Vec<Source<'_>>,
    server: Option<&Server>,
) -> Result<Report> {
    let shared: Vec<Shared> = sources.iter().map(|_| Shared::default()).collect();
    let (replies, replied) = channel();
    thread::scope(|scope| {
        let mut queues = Vec::new();
        for ((index, source), shared) in (0..).zip(sources).zip(&shared) {
            let (work, told) = channel();
            let replies = replies.clone();
            thread::Builder::new()
                .name(format!("bench-{index}"))
                .spawn_scoped(scope, move || {
                    let done = queue(args, range, index, source, shared, &told, &replies);
                    if let Err(error) = done {
                        // Whoever waits has gone if nobody takes it.
                        let _ = replies.send((index, Err(error)));
                    }
                })
                .context("cannot start a thread")?;
            queues.push(Queue { work });
        }
        drop(replies);
        let control = Control {
            args,
            queues,
            shared: &shared,
            replied,
        };
        control.gather(None)?;
        if args.warmup > 0 {
            control.run(args.warmup, None)?;
        }
        let server_before = server.map(Server::sample).transpose()?;
        if server == Some(&Server::Vhost) {
            ensure!(
                server_before.as_ref().is_some_and(|s| s.threads() > 0),
                "the device's workers are not to be found in /proc: is it another PID namespace's?"
            );
        }
        let host_before = HostUse::so_far()?;
        let outcomes = match args.runtime {
            Some(time) => control.run(u64::MAX, Some(time))?,
            None => control.run(args.count.context("--count or --runtime")?, None)?,
        };
        let host = HostUse::so_far()?.since(host_before);
        let server = match (server, &server_before) {
            (Some(server), Some(before)) => Some(server.sample()?.since(before)),
            _ => None,
        };
        Report::new(args, range, &outcomes, server, host)
    })
}

/// What a queue's thread does: runs as many requests as it is told to, again and
/// again.
fn queue(
    args: &BenchArgs,
    range: u64,
    index: u16,
    source: Source<'_>,
    shared: &Shared,
    work: &Receiver<u64>,
    replies: &Sender<Reply>,
) -> Result<()> {
    let poll = args.completion == CompletionArg::Poll;
    let slots_in = |memory: &Memory| -> Result<Slots> {
        let indirect = args.indirect.is_on();
        let slots = Slots::new(memory, args.iodepth, data_len(args), indirect)?;
        // Not zeroes: a disk may take those as holes.
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(args.seed ^ u64::from(index));
        let mut noise = vec![0; slots.data_len() as usize];
        for slot in 0..args.iodepth {
            rng.fill_bytes(&mut noise);
            slots.set_data(slot, &noise)?;
        }
        Ok(slots)
    };
    let at = (index, args.queues);
    match source {
        Source::Ring(ring) => {
            let slots = slots_in(ring.memory())?;
            let engine = RingEngine::new(Driver::new(ring, &slots)?, poll, None)?;
            serve(args, range, at, engine, shared, work, replies)
        }
        Source::Nothing(ring) => {
            let slots = slots_in(ring.memory())?;
            let batch = Some(args.batch.unwrap_or(u16::MAX));
            let engine = RingEngine::new(Driver::new(ring, &slots)?, poll, batch)?;
            serve(args, range, at, engine, shared, work, replies)
        }
        Source::File(file) => {
            let memory = memory(args, Slots::memory_needed(args.iodepth, data_len(args)))?;
            let slots = slots_in(&memory)?;
            let engine =
                UringEngine::new(Uring::new(file, &slots, !poll, !args.unregistered)?, poll);
            serve(args, range, at, engine, shared, work, replies)
        }
    }
}

fn serve(
    args: &BenchArgs,
    range: u64,
    at: (u16, u16),
    engine: impl Engine,
    shared: &Shared,
    work: &Receiver<u64>,
    replies: &Sender<Reply>,
) -> Result<()> {
    let generator = Generator::new(args.rw, args.rwmixread, args.bs, range, args.seed, at);
    let mut load = Load::new(
        engine,
        generator,
        args.iodepth,
        args.sync_every_write,
        !args.no_latency,
    )?;
    // If nobody takes a reply, nobody sends work either.
    let _ = replies.send((at.0, Ok(None)));
    for count in work {
        let outcome = load.run(count, shared)?;
        let _ = replies.send((at.0, Ok(Some(outcome))));
    }
    Ok(())
}

/// All queues' threads.
struct Control<'a> {
    args: &'a BenchArgs,
    queues: Vec<Queue>,
    shared: &'a [Shared],
    replied: Receiver<Reply>,
}

impl Control<'_> {
    /// Runs `count` requests in all, each queue its share, or as many as there
    /// are in that time.
    fn run(&self, count: u64, time: Option<Duration>) -> Result<Vec<Outcome>> {
        let parts = self.args.queues;
        for (index, queue) in (0..).zip(&self.queues) {
            let count = match time {
                Some(_) => u64::MAX,
                None => share(count, (index, parts)),
            };
            // If it has ended, it has said why.
            let _ = queue.work.send(count);
        }
        self.gather(time)
    }

    /// Waits until all queues have replied. It stops them after that time.
    fn gather(&self, time: Option<Duration>) -> Result<Vec<Outcome>> {
        let mut stop_at = time.map(|time| Instant::now() + time);
        let mut outcomes = Vec::with_capacity(self.queues.len());
        let mut first_error = None;
        let mut seen = self.progress();
        for _ in &self.queues {
            let (_, reply) = loop {
                let now = Instant::now();
                let left = stop_at.map(|at| at.saturating_duration_since(now));
                let wait = left.map_or(self.args.timeout(), |left| left.min(self.args.timeout()));
                match self.replied.recv_timeout(wait) {
                    Ok(reply) => break reply,
                    Err(RecvTimeoutError::Disconnected) => bail!("a queue's thread has died"),
                    Err(RecvTimeoutError::Timeout) if left.is_some_and(|left| left <= wait) => {
                        stop_at = None;
                        self.stop();
                        seen = Vec::new();
                    }
                    Err(RecvTimeoutError::Timeout) => {
                        let now = self.progress();
                        if now == seen {
                            self.give_up(first_error);
                        }
                        seen = now;
                    }
                }
            };
            match reply {
                Ok(outcome) => outcomes.extend(outcome),
                Err(error) => {
                    // The others end early too.
                    self.stop();
                    first_error = first_error.or(Some(error));
                }
            }
        }
        first_error.map_or(Ok(outcomes), Err)
    }

    fn stop(&self) {
        for shared in self.shared {
            shared.stop.store(true, Ordering::Relaxed);
        }
    }

    fn progress(&self) -> Vec<u64> {
        self.shared
            .iter()
            .map(|shared| shared.progress.load(Ordering::Relaxed))
            .collect()
    }

    /// Ends the program: a thread that sleeps until its device calls cannot be
    /// waited for.
    fn give_up(&self, first_error: Option<anyhow::Error>) -> ! {
        let error = first_error.unwrap_or_else(|| {
            anyhow!(
                "no request was completed for {} s (--timeout): see the kernel's or the server's log",
                self.args.timeout().as_secs()
            )
        });
        eprintln!("vhost-blk: {error:#}");
        process::exit(1);
    }
}
