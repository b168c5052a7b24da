// SPDX-License-Identifier: GPL-2.0

//! Features, reset, and the split virtqueue: chapters 2 and 6.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use vhost_blk_ring::request::{HEADER_LEN, Prepared};
use vhost_blk_ring::ring::{DESC_F_INDIRECT, DESC_F_WRITE, DESCRIPTOR_BYTES};
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Completion, Cut, Descriptor, Queue, Request, Segment, Shape, Status, Table};

use super::session::{SILENCE, Session, Subject, ended};
use crate::exercise::check::{Outcome, describe};
use crate::exercise::shapes;

/// Rings of sessions have so many descriptors.
const QUEUE_SIZE: u16 = 256;

fn passed(detail: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Passed(detail.into()))
}

fn skipped(reason: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Skipped(reason.into()))
}

/// Adds reads of the first block, and makes them visible.
fn publish(subject: &Subject<'_>, queue: &mut Queue, count: u16) -> Result<()> {
    for _ in 0..count {
        queue.submit(subject.a_read(), &Shape::default())?;
    }
    queue.ring.publish()?;
    Ok(())
}

/// The same, with a kick.
fn submit(subject: &Subject<'_>, queue: &mut Queue, count: u16) -> Result<()> {
    publish(subject, queue, count)?;
    Ok(queue.ring.kick()?)
}

/// Waits for used entries without any notification.
fn watch_used(subject: &Subject<'_>, queue: &Queue, index: u16) -> Result<()> {
    let deadline = Instant::now() + subject.timeout;
    while queue.ring.used_idx()? != index {
        ensure!(
            Instant::now() < deadline,
            "requests are not completed: the used index does not reach {index}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn take_all(subject: &Subject<'_>, queue: &mut Queue) -> Result<()> {
    while let Some(done) = queue.poll()? {
        subject.matches_disk(&done)?;
    }
    ensure!(
        queue.in_flight() == 0,
        "{} requests are left",
        queue.in_flight()
    );
    Ok(())
}

/// Takes the notifications that are there.
fn quiet(queue: &Queue) -> Result<()> {
    while queue.ring.wait_call(SILENCE)? {}
    Ok(())
}

// 2.1.2

pub(super) fn before_driver_ok(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.connect(u64::MAX)?;
    let queue = session.queue();
    submit(subject, queue, 1)?;
    ensure!(
        !queue.ring.wait_call(SILENCE)?,
        "notified before it was started"
    );
    ensure!(
        queue.ring.used_idx()? == queue.ring.last_used(),
        "a buffer was used before it was started"
    );
    session.start(subject.disk)?;
    let done = session.queue().wait(subject.timeout)?;
    subject.matches_disk(&done)?;
    passed("it begins when it is started")
}

pub(super) fn broken_ring(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    subject.read(&mut session)?;
    let ring = &mut session.queue().ring;
    // A head beyond the table.
    ring.push_avail(ring.size())?;
    ring.publish()?;
    ring.kick()?;
    ensure!(
        ring.wait_err(subject.timeout)?,
        "the error eventfd stays silent"
    );
    passed("the error eventfd tells")
}

// 2.2.2

pub(super) fn requirements(subject: &Subject<'_>) -> Result<Outcome> {
    let pairs = [
        (feature::CONFIG_WCE, feature::FLUSH),
        (feature::ZONED, feature::VERSION_1),
        (feature::RING_PACKED, feature::VERSION_1),
        (feature::RING_RESET, feature::VERSION_1),
    ];
    for (one, other) in pairs {
        ensure!(
            !subject.offers(one) || subject.offers(other),
            "{:?} is offered without {:?}",
            feature::names(one),
            feature::names(other)
        );
    }
    passed(format!("{} pairs", pairs.len()))
}

pub(super) fn subsets(subject: &Subject<'_>) -> Result<Outcome> {
    let taken = subject.connect(u64::MAX)?.features();
    let mut masks = vec![feature::VERSION_1];
    for bit in (0..u64::BITS).map(|bit| 1u64 << bit) {
        if taken & bit != 0 && bit != feature::VERSION_1 {
            masks.push(!bit);
            masks.push(feature::VERSION_1 | bit);
        }
    }
    for &mask in &masks {
        // A feature without what it requires is no valid subset.
        let valid = mask & taken & feature::CONFIG_WCE == 0 || mask & feature::FLUSH != 0;
        if !valid && mask != !feature::FLUSH {
            continue;
        }
        let mut session = subject
            .start(mask)
            .and_then(|mut session| {
                subject.read(&mut session)?;
                Ok(session)
            })
            .with_context(|| format!("with {:?}", feature::names(taken & mask)))?;
        session.stop()?;
    }
    passed(format!("{} subsets", masks.len()))
}

pub(super) fn again(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let first = session.features();
    for _ in 0..3 {
        subject.read(&mut session)?;
        session.stop()?;
        if let Some(guest) = session.module() {
            guest.device().set_features(first)?;
            guest.queue(0).reset(0)?;
            guest.resume(subject.disk.backend(), &[0])?;
        } else {
            drop(session);
            session = subject.start(u64::MAX)?;
        }
        ensure!(
            session.features() == first,
            "{:?} after {:?}",
            feature::names(session.features()),
            feature::names(first)
        );
    }
    subject.read(&mut session)?;
    passed("3 resets")
}

pub(super) fn defined_bits(subject: &Subject<'_>) -> Result<Outcome> {
    let defined = feature::NAMES
        .iter()
        .fold(0, |bits, (number, _)| bits | (1u64 << number));
    let others = subject.offered & !defined;
    ensure!(others == 0, "{:?} are offered", feature::names(others));
    passed(feature::names(subject.offered).join(", "))
}

// 2.4.1

pub(super) fn after_reset(subject: &Subject<'_>) -> Result<Outcome> {
    for in_flight in [0, 8] {
        let mut session = subject.start(u64::MAX)?;
        subject.read(&mut session)?;
        submit(subject, session.queue(), in_flight)?;
        session.stop()?;
        let queue = session.queue();
        quiet(queue)?;
        submit(subject, queue, 4)?;
        let look = |queue: &Queue| -> Result<_> {
            let ring = &queue.ring;
            let used = ring.used_ring();
            let table = ring.descriptor_table();
            Ok((used.read(0, used.len())?, table.read(0, table.len())?))
        };
        let before = look(queue)?;
        ensure!(
            !queue.ring.wait_call(2 * SILENCE)?,
            "notified after a reset"
        );
        ensure!(
            look(queue)? == before,
            "the ring is written to after a reset"
        );
    }
    passed("idle, and with 8 requests in flight")
}

// 2.5.2

pub(super) fn config_before_features(subject: &Subject<'_>) -> Result<Outcome> {
    // A session of a server reads it before it sets features.
    let config = subject.connect(u64::MAX)?.config()?;
    passed(format!("{} bytes", config.len()))
}

// 2.7.4.1

pub(super) fn any_layout(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let block = subject.disk.block();
    let mut count = 0;
    let mut requests = vec![subject.a_read(), Request::get_id(20)];
    if subject.write {
        let data = shapes::noise(&mut StdRng::seed_from_u64(1), block);
        requests.push(Request::write(0, data));
    }
    let indirect = session.features() & feature::INDIRECT_DESC != 0;
    for request in requests {
        for shape in shapes::all(&request, QUEUE_SIZE) {
            // Chains that end in an indirect table have a statement of their own, and whether a
            // descriptor may be empty is not said.
            let table = match shape.table {
                Table::Direct => true,
                Table::Indirect => indirect,
                Table::After(_) => false,
            };
            let (readable, writable) = shape.cut.lengths(&request);
            if !table || readable.iter().chain(&writable).any(|&len| len == 0) {
                continue;
            }
            let done = subject.run(&mut session, request.clone(), &shape)?;
            let result = match request.kind.number() {
                0 => subject.matches_disk(&done),
                _ => ended(&done, Status::Ok),
            };
            result.with_context(|| describe(&request, &shape))?;
            count += 1;
        }
        if !request.out.is_empty() {
            let found = subject.disk.read(0, request.out.len())?;
            ensure!(found == request.out, "the disk has not what was written");
        }
    }
    passed(format!("{count} layouts"))
}

// 2.7.5.1

pub(super) fn readable_is_not_written(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let block = subject.disk.block();
    let mut requests = vec![
        subject.a_read(),
        Request::get_id(20),
        Request::flush(),
        Request::read(subject.disk.capacity(), block),
        Request::other(99, 0, vec![7; block], 0),
        Request::other(99, 0, vec![7; block], block),
    ];
    if subject.write {
        requests.push(Request::write(0, vec![1; block]));
        requests.push(Request::write(subject.disk.capacity(), vec![1; block]));
    }
    let mut count = 0;
    for request in &requests {
        for cut in [Cut::Usual, Cut::Joined, Cut::Header(4), Cut::Data(100)] {
            let shape = Shape::cut(cut);
            let done = subject.run(&mut session, request.clone(), &shape)?;
            ended(&done, done.status).with_context(|| describe(request, &shape))?;
            count += 1;
        }
    }
    passed(format!("{count} requests"))
}

pub(super) fn writable_is_not_read(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let queue = session.queue();
    let block = subject.disk.block();
    // What would be a good read, if its header were not in a writable buffer.
    let len = HEADER_LEN + block + 1;
    let buffer = queue.ring.memory().alloc(len, 4096)?;
    buffer.fill(0)?;
    buffer.write(len - 1, &[0xee])?;
    let chain = queue.ring.take(3)?;
    let pieces = [
        (0, HEADER_LEN),
        (HEADER_LEN, block),
        (HEADER_LEN + block, 1),
    ];
    for (place, (offset, len)) in pieces.into_iter().enumerate() {
        let next = chain.get(place + 1).copied();
        let flags = DESC_F_WRITE | u16::from(next.is_some());
        let descriptor = Descriptor::new(
            buffer.at(offset).0,
            u32::try_from(len)?,
            flags,
            next.unwrap_or(0),
        );
        queue.ring.write_descriptor(chain[place], descriptor)?;
    }
    queue.ring.add_written(chain)?;
    queue.ring.publish_and_kick()?;
    let deadline = Instant::now() + Duration::from_secs(1);
    while queue.ring.pop_used()?.is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    ensure!(
        buffer.read(len - 1, 1)? != [0],
        "a header in writable memory was taken as one"
    );
    passed("a header in writable memory is none")
}

// 2.7.5.3.2

/// Runs a read whose indirect descriptor has `flags` besides.
fn indirect_with(subject: &Subject<'_>, session: &mut Session, flags: u16) -> Result<Completion> {
    let timeout = subject.timeout;
    let queue = session.queue();
    let memory = queue.ring.memory().clone();
    let prepared = Prepared::new(&memory, subject.a_read(), &Shape::default())?;
    let segments: Vec<Segment> = prepared.segments()?;
    let table = queue.ring.indirect_table(&segments)?;
    let chain = queue.ring.take(1)?;
    let len = u32::try_from(DESCRIPTOR_BYTES * segments.len())?;
    let descriptor = Descriptor::new(table.addr().0, len, DESC_F_INDIRECT | flags, 0);
    queue.ring.write_descriptor(chain[0], descriptor)?;
    queue.ring.add_written(chain)?;
    queue.ring.publish_and_kick()?;
    let used = queue.ring.wait_used(timeout)?;
    Ok(prepared.complete(used)?)
}

pub(super) fn indirect_write_flag(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    if session.features() & feature::INDIRECT_DESC == 0 {
        return skipped("INDIRECT_DESC is not offered");
    }
    for flags in [0, DESC_F_WRITE] {
        let done = indirect_with(subject, &mut session, flags)?;
        subject
            .matches_disk(&done)
            .with_context(|| format!("flags {flags:#x}"))?;
    }
    passed("with and without the flag")
}

pub(super) fn chain_then_indirect(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    if session.features() & feature::INDIRECT_DESC == 0 {
        return skipped("INDIRECT_DESC is not offered");
    }
    let cuts = [Cut::Usual, Cut::Header(4), Cut::Data(100), Cut::Every(61)];
    let mut count = 0;
    for cut in cuts {
        let (readable, writable) = cut.lengths(&subject.a_read());
        let segments = readable.len() + writable.len();
        for direct in 0..segments {
            let shape = Shape::cut(cut.clone()).table(Table::After(direct));
            subject.read_as(&mut session, &shape)?;
            count += 1;
        }
    }
    passed(format!("{count} chains"))
}

// 2.7.7.2

/// A session that has completed a request, and whose notifications are taken.
///
/// The first may be one too many: after a start a device cannot know what the driver was told of
/// before.
fn settled(subject: &Subject<'_>, mask: u64) -> Result<Session> {
    let mut session = subject.start(mask)?;
    subject.read(&mut session)?;
    quiet(session.queue())?;
    Ok(session)
}

/// A session without event indices.
fn with_flags(subject: &Subject<'_>) -> Result<Session> {
    settled(subject, !feature::EVENT_IDX)
}

/// A session with event indices, if they are on offer.
fn with_events(subject: &Subject<'_>) -> Result<Option<Session>> {
    let session = settled(subject, u64::MAX)?;
    let there = session.features() & feature::EVENT_IDX != 0;
    Ok(there.then_some(session))
}

const NO_EVENTS: &str = "EVENT_IDX is not offered";

pub(super) fn used_event_is_ignored(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = with_flags(subject)?;
    let queue = session.queue();
    for distance in [0u16, 1, 2, 100, 0x8000, 0xffff] {
        queue.ring.set_avail_flags(0)?;
        queue
            .ring
            .set_used_event(queue.ring.last_used().wrapping_add(distance))?;
        submit(subject, queue, 1)?;
        ensure!(
            queue.ring.wait_call(subject.timeout)?,
            "no notification with used_event {distance} entries ahead"
        );
        watch_used(subject, queue, queue.ring.last_used().wrapping_add(1))?;
        take_all(subject, queue)?;
        quiet(queue)?;
    }
    passed("6 values")
}

pub(super) fn flags_suppress(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = with_flags(subject)?;
    let queue = session.queue();
    for _ in 0..5 {
        queue.ring.set_avail_flags(1)?;
        let end = queue.ring.last_used().wrapping_add(3);
        submit(subject, queue, 3)?;
        watch_used(subject, queue, end)?;
        ensure!(
            !queue.ring.wait_call(SILENCE)?,
            "notified although the driver asked for none"
        );
        take_all(subject, queue)?;
    }
    passed("15 requests")
}

pub(super) fn flags_ask(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = with_flags(subject)?;
    let queue = session.queue();
    for round in 0..10 {
        queue.ring.set_avail_flags(0)?;
        submit(subject, queue, 1)?;
        ensure!(
            queue.ring.wait_call(subject.timeout)?,
            "round {round}: no notification"
        );
        watch_used(subject, queue, queue.ring.last_used().wrapping_add(1))?;
        take_all(subject, queue)?;
        quiet(queue)?;
    }
    passed("10 notifications")
}

/// Asks for a notification at the last of `count` entries, with these flags.
fn event(subject: &Subject<'_>, queue: &mut Queue, count: u16, flags: u16) -> Result<()> {
    let last = queue.ring.last_used().wrapping_add(count);
    queue.ring.set_avail_flags(flags)?;
    queue.ring.set_used_event(last.wrapping_sub(1))?;
    submit(subject, queue, count)?;
    ensure!(
        queue.ring.wait_call(subject.timeout)?,
        "no notification for entry {count} of {count}"
    );
    watch_used(subject, queue, last)?;
    take_all(subject, queue)
}

pub(super) fn flags_are_ignored(subject: &Subject<'_>) -> Result<Outcome> {
    let Some(mut session) = with_events(subject)? else {
        return skipped(NO_EVENTS);
    };
    for round in 0..10 {
        event(subject, session.queue(), 1, 1).with_context(|| format!("round {round}"))?;
    }
    passed("10 notifications")
}

pub(super) fn event_is_met(subject: &Subject<'_>) -> Result<Outcome> {
    let Some(mut session) = with_events(subject)? else {
        return skipped(NO_EVENTS);
    };
    for round in 0..10 {
        for count in [1, 2, 5] {
            event(subject, session.queue(), count, 0).with_context(|| format!("round {round}"))?;
        }
    }
    passed("30 notifications")
}

pub(super) fn event_is_not_met(subject: &Subject<'_>) -> Result<Outcome> {
    let Some(mut session) = with_events(subject)? else {
        return skipped(NO_EVENTS);
    };
    let queue = session.queue();
    for distance in [3u16, 100, 0xffff] {
        let first = queue.ring.last_used();
        queue.ring.set_used_event(first.wrapping_add(distance))?;
        submit(subject, queue, 3)?;
        watch_used(subject, queue, first.wrapping_add(3))?;
        ensure!(
            !queue.ring.wait_call(SILENCE)?,
            "notified for 3 entries, with used_event {distance} ahead of them"
        );
        take_all(subject, queue)?;
    }
    passed("9 requests")
}

// 2.7.8.2

pub(super) fn len_before_index(subject: &Subject<'_>) -> Result<Outcome> {
    const ROUNDS: usize = 500;
    let mut session = subject.start(u64::MAX)?;
    let queue = session.queue();
    queue.ring.disable_notifications()?;
    for _ in 0..ROUNDS {
        // An entry that is seen before it is written has no chain that is in flight.
        let slot = usize::from(queue.ring.last_used() & (queue.ring.size() - 1));
        queue.ring.used_ring().write(4 + 8 * slot, &[0xff; 8])?;
        submit(subject, queue, 1)?;
        let deadline = Instant::now() + subject.timeout;
        let done = loop {
            if let Some(done) = queue.poll()? {
                break done;
            }
            ensure!(Instant::now() < deadline, "a request is not completed");
            std::hint::spin_loop();
        };
        ensure!(done.used_len != u32::MAX, "the index came before len");
        ended(&done, Status::Ok)?;
    }
    passed(format!("{ROUNDS} entries"))
}

/// Fails if `used.len` claims what was not written.
fn claims_no_more(done: &Completion) -> Result<()> {
    let claimed = done.used_len as usize;
    let all = done.request.writable_len();
    ensure!(
        claimed <= all,
        "used.len is {claimed}, of {all} writable bytes"
    );
    let unwritten = done.claimed_unwritten();
    ensure!(
        unwritten == 0,
        "used.len is {claimed}, and {unwritten} of these bytes were not written"
    );
    Ok(())
}

pub(super) fn len_is_written(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let (block, capacity) = (subject.disk.block(), subject.disk.capacity());
    let mut requests = vec![
        subject.a_read(),
        Request::read(0, 4 * block),
        Request::flush(),
        Request::get_id(20),
        Request::read(capacity, block),
        Request::read(capacity - subject.disk.block_sectors(), 4 * block),
        Request::other(99, 0, Vec::new(), 512),
        Request::other(99, 0, vec![0; 512], 0),
    ];
    if subject.write {
        requests.push(Request::write(0, vec![1; block]));
        requests.push(Request::write(capacity, vec![1; block]));
    }
    for request in &requests {
        for cut in [Cut::Usual, Cut::Joined] {
            let shape = Shape::cut(cut);
            let done = subject.run(&mut session, request.clone(), &shape)?;
            let result = if done.status == Status::Ok && request.kind.number() == 0 {
                // What was read may look as what was there before.
                subject.matches_disk(&done).and_then(|()| {
                    let (len, all) = (done.used_len as usize, request.writable_len());
                    ensure!(len <= all, "used.len is {len}, of {all} writable bytes");
                    Ok(())
                })
            } else {
                claims_no_more(&done)
            };
            result.with_context(|| describe(request, &shape))?;
        }
    }
    passed(format!("{} requests", 2 * requests.len()))
}

// 2.7.10.2

/// Runs requests, and looks at the flags of the used ring all the time.
fn watch_flags(subject: &Subject<'_>, session: &mut Session, allowed: u16) -> Result<Outcome> {
    let mut looks = 0u32;
    let queue = session.queue();
    for _ in 0..100 {
        submit(subject, queue, 4)?;
        let end = queue.ring.last_used().wrapping_add(4);
        let deadline = Instant::now() + subject.timeout;
        while queue.ring.used_idx()? != end {
            ensure!(Instant::now() < deadline, "requests are not completed");
            let bytes = queue.ring.used_ring().read(0, 2)?;
            let flags = u16::from_le_bytes([bytes[0], bytes[1]]);
            if flags & !allowed != 0 {
                bail!("flags {flags:#x} in the used ring");
            }
            looks += 1;
        }
        take_all(subject, queue)?;
    }
    ensure!(looks > 0, "no look at the flags");
    passed("400 requests")
}

pub(super) fn used_flags(subject: &Subject<'_>) -> Result<Outcome> {
    watch_flags(subject, &mut with_flags(subject)?, 1)
}

pub(super) fn used_flags_with_events(subject: &Subject<'_>) -> Result<Outcome> {
    match with_events(subject)? {
        Some(mut session) => watch_flags(subject, &mut session, 0),
        None => skipped(NO_EVENTS),
    }
}

pub(super) fn spurious_kicks(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    for _ in 0..1000 {
        session.queue().ring.kick()?;
    }
    let ring = &session.queue().ring;
    ensure!(
        ring.used_idx()? == ring.last_used(),
        "a used entry came for no request"
    );
    for _ in 0..20 {
        session.queue().ring.kick()?;
        subject.read(&mut session)?;
        session.queue().ring.kick()?;
    }
    ensure!(
        !session.queue().ring.wait_err(SILENCE)?,
        "the ring is said to be broken"
    );
    passed("1040 kicks")
}

// 6.2

pub(super) fn version_1(subject: &Subject<'_>) -> Result<Outcome> {
    ensure!(subject.offers(feature::VERSION_1), "it is not offered");
    passed("it is offered")
}

pub(super) fn no_sr_iov(subject: &Subject<'_>) -> Result<Outcome> {
    ensure!(!subject.offers(feature::SR_IOV), "it is offered");
    passed("it is not offered")
}

pub(super) fn in_order(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::IN_ORDER) {
        return skipped("IN_ORDER is not offered");
    }
    let mut session = subject.connect_exactly(feature::VERSION_1 | feature::IN_ORDER)?;
    session.start(subject.disk)?;
    let queue = session.queue();
    let mut heads = Vec::new();
    for _ in 0..32 {
        heads.push(queue.submit(subject.a_read(), &Shape::default())?);
    }
    queue.kick()?;
    for head in heads {
        let done = queue.wait(subject.timeout)?;
        ensure!(done.head == head, "a buffer was used out of order");
    }
    passed("32 requests")
}
