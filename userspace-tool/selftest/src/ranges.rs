// SPDX-License-Identifier: GPL-2.0

//! Discard, write zeroes and secure erase of a guest that asks for more than anybody should wait for.
//! What an ordinary one asks for is in `vhost-blk exercise`.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Guest, Kind, Queue, Range, Request, Shape, Status};

use crate::check;
use crate::context::{Context, PATIENCE, Test, skip, test};
use crate::disk::{PATTERN, SCRATCH, SECTOR};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "ranges.flood",
        "requests for gigabytes of zeroes: reads pass them, and a stop ends them",
        flood
    ),
    test!(
        "ranges.zeroes_stopped",
        "a stop does not wait for long zeroes, which fail",
        zeroes_stopped
    ),
    test!(
        "ranges.discards_stopped",
        "a stop does not wait for long discards, which succeed",
        discards_stopped
    ),
    test!(
        "ranges.zeroes_logged",
        "long zeroes go on while switching the dirty log on waits for them",
        zeroes_logged
    ),
    test!(
        "ranges.logging_refused",
        "switching the dirty log on gives up on longer ones, and the guest notices nothing",
        120,
        logging_refused
    ),
    test!(
        "ranges.closed",
        "closing the device does not wait for long zeroes",
        closed
    ),
];

/// Segments of a request, as many as the device takes.
const SEGMENTS: usize = 256;
/// Requests at the same time.
const LONG: usize = 8;
/// For how long the device goes on with such requests after a stop.
const GRACE: Duration = Duration::from_secs(5);
/// What an emulated machine that does other things takes besides.
const SLACK: Duration = Duration::from_secs(10);

/// A request that a disk cannot be through with soon: the same range many times.
fn long(kind: Kind, sector: u64, sectors: u64) -> Result<Request> {
    let range = Range::new(sector, u32::try_from(sectors)?);
    Ok(Request::ranges(kind, &[range; SEGMENTS]))
}

/// A read that ends before the long requests of its queue. Returns how long it took.
fn passes(queue: &mut Queue) -> Result<Duration> {
    let begin = Instant::now();
    queue.submit(Request::read(8, 512), &Shape::default())?;
    queue.kick()?;
    let done = queue.wait(PATIENCE)?;
    ensure!(
        done.request.kind == Kind::In && done.status == Status::Ok,
        "{:?} ended before a read of its queue, {:?}",
        done.request.kind,
        done.status
    );
    Ok(begin.elapsed())
}

/// Stops, and returns how long that took.
fn stop(guest: &Guest) -> Result<Duration> {
    let begin = Instant::now();
    guest.stop()?;
    Ok(begin.elapsed())
}

fn flood(context: &Context) -> Result<()> {
    const REQUESTS: usize = 60;
    let mut guest = context.started(|options| options.queues = 2)?;
    let (sector, sectors) = SCRATCH;
    let request = long(Kind::WriteZeroes, sector, sectors as u64)?;
    for _ in 0..REQUESTS {
        guest.queue(0).submit(request.clone(), &Shape::default())?;
    }
    guest.queue(0).kick()?;
    let begin = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut served = 0;
    while begin.elapsed() < Duration::from_secs(3) {
        let submitted = Instant::now();
        check::read(
            "a read of another queue",
            guest.queue(1),
            8,
            8,
            &Shape::default(),
        )?;
        slowest = slowest.max(submitted.elapsed());
        served += 1;
    }
    for _ in 0..3 {
        passes(guest.queue(0))?;
    }
    context.note(format_args!(
        "{served} reads beside the zeroes, the slowest took {} ms",
        slowest.as_millis()
    ));
    ensure!(
        served > 3 && slowest < PATIENCE / 4,
        "{served} reads, the slowest took {} ms",
        slowest.as_millis()
    );
    let took = stop(&guest)?;
    ensure!(
        took < GRACE + SLACK,
        "the stop took {} ms",
        took.as_millis()
    );
    let done = guest.queue(0).wait_all(PATIENCE)?;
    ensure!(
        done.len() == REQUESTS,
        "{} requests are complete",
        done.len()
    );
    for done in done {
        ensure!(done.status == Status::IoErr, "zeroes: {:?}", done.status);
        ensure!(done.used_len == 1, "used.len {}", done.used_len);
    }
    // Nothing but what was asked for was zeroed.
    let found = context.direct()?.read(PATTERN.0, PATTERN.1)?;
    check::same(
        "the rest of the disk",
        &found,
        &crate::disk::pattern(PATTERN.0, PATTERN.1),
    )
}

/// Long requests in flight on the slow disk; how they end when the device is stopped.
fn stopped(context: &Context, kind: Kind, status: Status) -> Result<()> {
    let slow = context.slow_disk()?;
    let mut guest = context.guest(|_| {})?;
    let info = guest.device().info(Some(slow.as_fd()))?;
    if kind == Kind::Discard && info.max_discard_sectors == 0 {
        return skip("needs a --slow-disk that discards");
    }
    guest.start(&slow)?;
    let request = long(kind, 0, 8 << 11)?;
    for _ in 0..LONG {
        guest.queue(0).submit(request.clone(), &Shape::default())?;
    }
    guest.queue(0).kick()?;
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        slowest = slowest.max(passes(guest.queue(0))?);
    }
    let took = stop(&guest)?;
    context.note(format_args!(
        "a read took {} ms, the stop {} ms",
        slowest.as_millis(),
        took.as_millis()
    ));
    ensure!(
        took < GRACE + SLACK,
        "the stop took {} ms",
        took.as_millis()
    );
    let done = guest.queue(0).wait_all(PATIENCE)?;
    ensure!(done.len() == LONG, "{} requests are complete", done.len());
    for done in done {
        ensure!(done.status == status, "{kind:?}: {:?}", done.status);
        ensure!(done.used_len == 1, "used.len {}", done.used_len);
    }
    Ok(())
}

fn zeroes_stopped(context: &Context) -> Result<()> {
    stopped(context, Kind::WriteZeroes, Status::IoErr)
}

fn discards_stopped(context: &Context) -> Result<()> {
    stopped(context, Kind::Discard, Status::Ok)
}

fn zeroes_logged(context: &Context) -> Result<()> {
    let slow = context.slow_disk()?;
    let mut guest = context.guest(|_| {})?;
    guest.start(&slow)?;
    let info = guest.device().info(Some(slow.as_fd()))?;
    let sectors = u32::try_from(info.logical_block_size as usize / SECTOR)?;
    // As many rounds as take longer than a stop would wait for, and less than it takes to be refused.
    let round = passes(guest.queue(0))?;
    let rounds = (GRACE * 3 / 2).as_nanos().div_ceil(round.as_nanos().max(1));
    let segments = usize::try_from(4 * rounds)?.min(SEGMENTS);
    let range = Range::new(0, sectors);
    let request = Request::ranges(Kind::WriteZeroes, &vec![range; segments]);
    guest.queue(0).submit(request, &Shape::default())?;
    guest.queue(0).kick()?;
    passes(guest.queue(0))?;
    let begin = Instant::now();
    let features = guest.features();
    guest.device().set_features(features | feature::LOG_ALL)?;
    let took = begin.elapsed();
    context.note(format_args!("it waited for {} ms", took.as_millis()));
    ensure!(took > GRACE, "the zeroes were too short: {took:?}");
    let done = guest.queue(0).wait(PATIENCE)?;
    ensure!(done.status == Status::Ok, "zeroes: {:?}", done.status);
    Ok(())
}

fn logging_refused(context: &Context) -> Result<()> {
    let slow = context.slow_disk()?;
    let mut guest = context.guest(|_| {})?;
    guest.start(&slow)?;
    let request = long(Kind::WriteZeroes, 0, 8 << 11)?;
    guest.queue(0).submit(request, &Shape::default())?;
    guest.queue(0).kick()?;
    passes(guest.queue(0))?;
    let features = guest.features() | feature::LOG_ALL;
    check::fails(
        "SET_FEATURES with the log",
        guest.device().set_features(features),
        libc::EAGAIN,
    )?;
    // It goes on, and was not ended meanwhile.
    passes(guest.queue(0))?;
    stop(&guest)?;
    Ok(())
}

fn closed(context: &Context) -> Result<()> {
    let slow = context.slow_disk()?;
    let mut guest = context.guest(|_| {})?;
    guest.start(&slow)?;
    let request = long(Kind::WriteZeroes, 0, 8 << 11)?;
    guest.queue(0).submit(request, &Shape::default())?;
    guest.queue(0).kick()?;
    passes(guest.queue(0))?;
    let begin = Instant::now();
    drop(guest);
    let took = begin.elapsed();
    context.note(format_args!("closing took {} ms", took.as_millis()));
    // What is in flight, and no grace.
    ensure!(took < GRACE, "closing took {} ms", took.as_millis());
    Ok(())
}
