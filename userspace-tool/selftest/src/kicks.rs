// SPDX-License-Identifier: GPL-2.0

//! Kicks, whoever makes them, and whatever that task does next.
//!
//! All of it has to work the same whether the worker handles a kick or the task that kicks.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vhost_blk_ring::{
    Guest, Memory, Queue, Request, Shape, Status, event_descriptor, write_and_close,
};

use crate::check::{self, UsedLen};
use crate::context::{Context, PATIENCE, Test, skip, test};
use crate::disk::{self, Disk};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "kicks.do_not_wait",
        "the disk takes no more requests: a kick returns at once, and they complete",
        do_not_wait
    ),
    test!(
        "kicks.and_close",
        "the device is closed by the task that kicks, before it returns from its system call",
        and_close
    ),
    test!(
        "kicks.other_process",
        "a process with other memory kicks",
        other_process
    ),
    test!(
        "kicks.many_threads",
        "several threads kick the same ring, over stops and starts",
        120,
        many_threads
    ),
    test!(
        "kicks.sizes",
        "the task that kicks submits requests of up to 128 KiB, the worker larger ones",
        sizes
    ),
    test!(
        "kicks.coalesced",
        "a guest that goes on is asked to kick for several requests, and served if it adds fewer",
        coalesced
    ),
    test!(
        "kicks.coalesced_in_flight",
        "the same with requests in flight, and it stops before it has added as many",
        120,
        coalesced_in_flight
    ),
];

/// How long a kick may take: less than the narrow disk takes for a request.
const SOON: Duration = Duration::from_millis(500);

/// How long the disk gets to be busy.
const LATER: Duration = Duration::from_millis(200);

/// How often fewer requests are added than were asked for.
const ROUNDS: u32 = 24;

/// What a request may take where several are asked for: less than half of the longest that four of them may wait for.
const SOON_ENOUGH: Duration = Duration::from_micros(200);

/// The same with requests in flight: less than an eighth of the longest that four of them may wait.
const SOON_ENOUGH_IN_FLIGHT: Duration = Duration::from_millis(1);

/// Between two of those kicks.
const MEANWHILE: Duration = Duration::from_millis(1);

/// Requests that there has to be room for: more than the device asks for.
const MOST: usize = 32;

/// How many times that is tried: a slow host may take any time now and then, but one that waits does so each time.
const TRIES: usize = 3;

fn do_not_wait(context: &Context) -> Result<()> {
    let mut guest = context.guest(|options| options.queues = 2)?;
    Disk::open(context.narrow_disk_path()?)?.write(0, &disk::pattern(0, 64))?;
    guest.start(context.narrow_disk()?)?;

    let mut took = Vec::new();
    for _ in 0..TRIES {
        let begin = Instant::now();
        // More than it has a tag for.
        for n in 0..3 {
            guest
                .queue(0)
                .submit(Request::read(8 * n, 4096), &Shape::default())?;
        }
        guest.queue(0).kick()?;
        thread::sleep(LATER);
        guest
            .queue(1)
            .submit(Request::read(32, 4096), &Shape::default())?;
        let kick = Instant::now();
        guest.queue(1).kick()?;
        took.push(kick.elapsed());

        for queue in guest.queues() {
            for done in queue.wait_all(PATIENCE)? {
                check::outcome("a read", &done, Status::Ok, UsedLen::Full)?;
                let expected = disk::pattern(done.request.sector, 8);
                check::same("a read", &done.data, &expected)?;
            }
        }
        ensure!(
            begin.elapsed() > SOON + LATER,
            "the disk took all requests at once: nothing was to wait for"
        );
    }
    ensure!(
        took.iter().any(|time| *time < SOON),
        "each kick waited for the disk: {took:?}"
    );
    Ok(())
}

fn and_close(context: &Context) -> Result<()> {
    for round in 0..50 {
        context.step(format_args!("round {round}"));
        // Its rings stay where they are when the device is gone.
        let memory = Memory::new(4 << 20)?;
        let mut guest = Guest::with_memory(&context.options(), &memory)?;
        guest.start(context.disk()?)?;
        if round % 2 == 0 {
            guest
                .queue(0)
                .run(Request::read(0, 4096), &Shape::default(), PATIENCE)?;
        }
        guest
            .queue(0)
            .submit(Request::read(0, 4096), &Shape::default())?;
        guest.queue(0).ring.publish()?;
        let event = guest.queue(0).ring.kick_event().try_clone()?;
        let device: OwnedFd = guest.device().file().try_clone()?.into();
        drop(guest);
        write_and_close(&event, device)?;
    }
    Ok(())
}

fn other_process(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| ())?;
    for n in 0..4 {
        guest
            .queue(0)
            .submit(Request::read(8 * n, 4096), &Shape::default())?;
        guest.queue(0).ring.publish()?;
        let event = event_descriptor(guest.queue(0).ring.kick_event())?;
        context.other_process("kick", event.into())?;
        let done = guest.queue(0).wait(PATIENCE)?;
        check::outcome("a read", &done, Status::Ok, UsedLen::Full)?;
    }
    Ok(())
}

/// Kicks the ring whose kick eventfd this is.
pub(crate) fn kick(mut event: File) -> Result<()> {
    Ok(event.write_all(&1_u64.to_ne_bytes())?)
}

/// Tells other threads that it is over, whatever becomes of this one.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn many_threads(context: &Context) -> Result<()> {
    const THREADS: usize = 4;
    const STARTS: usize = 5;
    const REQUESTS: u64 = 100;
    let mut guest = context.guest(|options| options.queue_size = 64)?;
    guest.start(context.disk()?)?;
    let events = (0..THREADS).map(|_| guest.queue(0).ring.kick_event().try_clone());
    let events = events.collect::<std::io::Result<Vec<_>>>()?;
    let ended = AtomicBool::new(false);

    thread::scope(|scope| {
        let _end = End(&ended);
        for event in &events {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    event.write(1).expect("the counter has room");
                    thread::yield_now();
                }
            });
        }
        for start in 0..STARTS {
            context.step(format_args!("start {start}"));
            for n in 0..REQUESTS {
                let sector = 8 * (n % 64);
                let queue = guest.queue(0);
                let done = queue.run(Request::read(sector, 4096), &Shape::default(), PATIENCE)?;
                check::outcome("a read", &done, Status::Ok, UsedLen::Full)?;
            }
            let bases = guest.stop()?;
            guest.resume(context.disk()?, &bases)?;
        }
        Ok(())
    })
}

/// Bytes that this thread has had read from disks.
fn read_bytes() -> Result<u64> {
    let path = "/proc/thread-self/io";
    let Ok(text) = fs::read_to_string(path) else {
        return skip(format!(
            "{path} cannot be read: the kernel needs CONFIG_TASK_IO_ACCOUNTING"
        ));
    };
    let bytes = text
        .lines()
        .find_map(|line| line.strip_prefix("read_bytes: "));
    bytes
        .with_context(|| format!("no read_bytes in {path}"))?
        .parse()
        .context(path)
}

/// Reads `len` bytes of the pattern, `offset` bytes behind the start of a page. Returns how many of them this task, which
/// kicks, submitted.
fn read(context: &Context, disk: File, len: usize, offset: usize) -> Result<usize> {
    let shape = Shape {
        align: 4096,
        offset,
        ..Shape::default()
    };
    let mut guest = context.guest(|_| ())?;
    guest.start(disk)?;
    let before = read_bytes()?;
    let done = guest
        .queue(0)
        .run(Request::read(0, len), &shape, PATIENCE)?;
    let submitted = read_bytes()? - before;
    check::outcome("a read", &done, Status::Ok, UsedLen::Full)?;
    check::same("a read", &done.data, &disk::pattern(0, len / disk::SECTOR))?;
    Ok(submitted.try_into()?)
}

fn sizes(context: &Context) -> Result<()> {
    read_bytes()?;
    let narrow_path = context.narrow_disk_path()?;
    let most = fs::read_to_string(disk::queue_sysfs(narrow_path)?.join("max_sectors_kb"))?;
    let most = most.trim().parse::<usize>()? << 10;
    ensure!(most < 128 << 10, "the disk takes {most} bytes at once");
    Disk::open(narrow_path)?.write(0, &disk::pattern(0, most / disk::SECTOR + 8))?;
    // What the worker sees first, as it may when the ring starts, it does.
    let tried = |disk: &dyn Fn() -> Result<File>, len, offset| {
        context.step(format_args!("{len} bytes at offset {offset} of a page"));
        let mut most = 0;
        for _ in 0..TRIES {
            most = most.max(read(context, disk()?, len, offset)?);
            if most >= len {
                break;
            }
        }
        Ok::<_, anyhow::Error>(most)
    };
    let (usual, narrow) = (|| context.disk(), || context.narrow_disk());

    // Whether the task that kicks submits anything is for others to test.
    let direct = tried(&usual, 4096, 0)? != 0;
    let check = |disk: &dyn Fn() -> Result<File>, len, offset, small| {
        let submitted = tried(disk, len, offset)?;
        let expected = if direct && small { len } else { 0 };
        ensure!(
            submitted == expected,
            "of {len} bytes at offset {offset} the task that kicked submitted {submitted}, not {expected}"
        );
        Ok(())
    };
    check(&usual, 16 << 10, 512, true)?;
    check(&usual, 64 << 10, 0, true)?;
    check(&usual, 128 << 10, 0, true)?;
    check(&usual, 128 << 10, 512, true)?;
    check(&usual, 132 << 10, 0, false)?;
    // What the block layer would cut might have to wait.
    check(&narrow, most, 0, true)?;
    check(&narrow, most + 4096, 0, false)
}

/// Adds requests, two at once, until the device wants a kick for them, and waits for all. Returns how many there were.
fn one_kick(guest: &mut Guest) -> Result<usize> {
    let queue = guest.queue(0);
    for n in 0..32 {
        for sector in [16 * n, 16 * n + 8] {
            queue.submit(Request::read(sector, 4096), &Shape::default())?;
        }
        if queue.ring.publish()? {
            break;
        }
    }
    queue.ring.kick()?;
    let done = queue.wait_all(PATIENCE)?;
    for done in &done {
        check::outcome("a read", done, Status::Ok, UsedLen::Full)?;
    }
    Ok(done.len())
}

/// Goes on adding requests until the device asks for several more than two before it is kicked, which it may do
/// where they are complete at once, and there soon. Returns how many it asks for; `None` if they are not there soon.
fn asked(context: &Context, guest: &mut Guest) -> Result<Option<u16>> {
    let begin = Instant::now();
    let mut requests = 0;
    while begin.elapsed() < PATIENCE {
        requests += one_kick(guest)?;
        match guest.queue(0).ring.wanted()? {
            Some(wanted) if wanted > 2 => return Ok(Some(wanted)),
            _ => (),
        }
    }
    let each = begin.elapsed() / u32::try_from(requests)?;
    if each > SOON_ENOUGH {
        context.step(format_args!("{each:?} for a request"));
        return Ok(None);
    }
    if !context.disk_path().starts_with("/dev/ram0") {
        return skip("the disk may take its time");
    }
    bail!("{requests} requests, of {each:?} each, and each two of them kicked for")
}

/// Adds fewer requests than the device has asked for. Returns their heads, and whether it has not been kicked for them.
pub(crate) fn add_fewer(queue: &mut Queue, wanted: u16) -> Result<(Vec<u16>, bool)> {
    let mut heads = Vec::new();
    for n in 1..wanted {
        heads.push(queue.submit(Request::read(8 * u64::from(n), 4096), &Shape::default())?);
        if queue.ring.publish()? {
            // It looked at the ring meanwhile, and wants to be kicked again.
            queue.ring.kick()?;
            return Ok((heads, false));
        }
    }
    Ok((heads, true))
}

/// Waits for all requests, for some of which nobody may have kicked.
pub(crate) fn wait_unkicked(queue: &mut Queue) -> Result<()> {
    for done in queue.wait_all(PATIENCE).context("nobody kicked")? {
        check::outcome("not kicked for", &done, Status::Ok, UsedLen::Full)?;
    }
    Ok(())
}

fn coalesced(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| ())?;
    ensure!(guest.queue(0).ring.event_idx(), "EVENT_IDX is not on offer");
    // A guest that waits for each request must not be asked.
    for n in 0..1000 {
        let queue = guest.queue(0);
        let done = queue.run(Request::read(0, 4096), &Shape::default(), PATIENCE)?;
        check::outcome(n, &done, Status::Ok, UsedLen::Full)?;
        let wanted = queue.ring.wanted()?;
        ensure!(
            wanted.is_none_or(|wanted| wanted == 1),
            "request {n}: {wanted:?} more wanted"
        );
    }

    // Nobody kicks: they are looked for all the same, whether or not the device is stopped meanwhile, which also has it
    // forget what it learned.
    let (mut served, mut stopped) = (0, 0);
    for round in 0..ROUNDS {
        context.step(format_args!("round {round}"));
        let Some(wanted) = asked(context, &mut guest)? else {
            return skip("too slow");
        };
        let (_, unkicked) = add_fewer(guest.queue(0), wanted)?;
        if round % 2 == 0 {
            let bases = guest.stop()?;
            let ring = &guest.queue(0).ring;
            let untouched = ring.used_idx()? == ring.last_used();
            guest.resume(context.disk()?, &bases)?;
            stopped += u32::from(unkicked && untouched);
        } else {
            served += u32::from(unkicked);
        }
        wait_unkicked(guest.queue(0))?;
    }
    ensure!(
        served > 0 && stopped > 0,
        "of {ROUNDS} rounds {served} without a kick, {stopped} stopped before anybody looked"
    );

    // Closed by who did not kick.
    for _ in 0..3 {
        let Some(wanted) = asked(context, &mut guest)? else {
            return skip("too slow");
        };
        add_fewer(guest.queue(0), wanted)?;
        drop(guest);
        guest = context.started(|_| ())?;
    }
    Ok(())
}

/// Adds requests to a slow disk, two at once, until the device asks for several more before it is kicked. None of them
/// is waited for. Returns how many it asks for; `None` if they are not there soon.
pub(crate) fn asked_in_flight(context: &Context, queue: &mut Queue) -> Result<Option<u16>> {
    let begin = Instant::now();
    let mut requests = 0;
    while queue.ring.free_descriptors() > 3 * MOST {
        for _ in 0..2 {
            queue.submit(Request::read(0, 4096), &Shape::default())?;
            requests += 1;
        }
        if queue.ring.publish()? {
            queue.ring.kick()?;
        }
        // The slower they come, the longer it waits for others.
        thread::sleep(MEANWHILE);
        // It has them when it wants to be kicked for others.
        let wanted = loop {
            match queue.ring.wanted()? {
                Some(wanted) => break wanted,
                None => thread::yield_now(),
            }
            ensure!(begin.elapsed() < PATIENCE, "requests are not fetched");
        };
        if wanted > 2 {
            return Ok(Some(wanted));
        }
    }
    let each = begin.elapsed() / requests;
    if each > SOON_ENOUGH_IN_FLIGHT {
        context.step(format_args!("{each:?} for a request"));
        return Ok(None);
    }
    bail!("{requests} requests, of {each:?} each, and each two of them kicked for")
}

fn coalesced_in_flight(context: &Context) -> Result<()> {
    let mut guest = context.guest(|options| options.queue_size = 1024)?;
    guest.start(context.slow_disk()?)?;
    let (mut served, mut stopped) = (0, 0);
    for round in 0..ROUNDS {
        context.step(format_args!("round {round}"));
        let Some(wanted) = asked_in_flight(context, guest.queue(0))? else {
            return skip("too slow");
        };
        let (heads, unkicked) = add_fewer(guest.queue(0), wanted)?;
        if round % 2 == 0 {
            let bases = guest.stop()?;
            let ring = &guest.queue(0).ring;
            ensure!(
                bases == [ring.used_idx()?],
                "it stopped at {bases:?} with requests in flight: used index {}",
                ring.used_idx()?
            );
            let left = ring.next_avail().wrapping_sub(ring.used_idx()?);
            guest.resume(context.slow_disk()?, &bases)?;
            stopped += u32::from(unkicked && usize::from(left) == heads.len());
        } else {
            served += u32::from(unkicked);
        }
        wait_unkicked(guest.queue(0))?;
        if served > 0 && stopped > 0 {
            return Ok(());
        }
    }
    bail!("{served} rounds without a kick, {stopped} stopped before anybody looked")
}
