// SPDX-License-Identifier: GPL-2.0

//! Kicks and notifications.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Queue, Request, Shape};

use super::check::{Check, Context, Outcome};

/// How long something is waited for that must not come.
const SILENCE: Duration = Duration::from_millis(30);

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "notify-event-idx",
        title: "with event indices, a notification comes at the entry that was asked for",
        writes: false,
        run: notify_event_idx,
    },
    Check {
        name: "notify-flags",
        title: "without event indices, notifications come unless the driver asked for none",
        writes: false,
        run: notify_flags,
    },
    Check {
        name: "kick-spurious",
        title: "kicks for nothing do no harm",
        writes: false,
        run: kick_spurious,
    },
];

fn submit(context: &Context<'_>, queue: &mut Queue, count: u16) -> Result<()> {
    for _ in 0..count {
        queue.submit(Request::read(0, context.disk.block()), &Shape::default())?;
    }
    Ok(queue.kick()?)
}

/// Waits for used entries without any notification.
fn watch_used(context: &Context<'_>, queue: &mut Queue, index: u16) -> Result<()> {
    let deadline = Instant::now() + context.timeout();
    while queue.ring.used_idx()? != index {
        ensure!(
            Instant::now() < deadline,
            "used index does not reach {index}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn take_all(context: &Context<'_>, queue: &mut Queue) -> Result<()> {
    while let Some(done) = queue.poll()? {
        context.matches_disk(&done)?;
    }
    ensure!(
        queue.in_flight() == 0,
        "{} requests are left",
        queue.in_flight()
    );
    Ok(())
}

fn notify_event_idx(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    if guest.features() & feature::EVENT_IDX == 0 {
        return Ok(Outcome::Skipped("EVENT_IDX is not offered".into()));
    }
    let queue = guest.queue(0);
    let counts = [1u16, 2, 5];
    for round in 0..20 {
        for count in counts {
            let first = queue.ring.last_used();
            let last = first.wrapping_add(count);
            // The entry before the index `last`.
            queue.ring.set_used_event(last.wrapping_sub(1))?;
            submit(context, queue, count)?;
            ensure!(
                queue.ring.wait_call(context.timeout())?,
                "round {round}: no notification for entry {count} of {count}"
            );
            let used = queue.ring.used_idx()?;
            ensure!(
                used == last,
                "round {round}: notified at used index {used} instead of {last}"
            );
            take_all(context, queue)?;
        }
    }
    // None is due before the entry that was asked for.
    let first = queue.ring.last_used();
    queue.ring.set_used_event(first.wrapping_add(4))?;
    submit(context, queue, 4)?;
    watch_used(context, queue, first.wrapping_add(4))?;
    ensure!(
        !queue.ring.wait_call(SILENCE)?,
        "notified before the entry that was asked for"
    );
    submit(context, queue, 1)?;
    ensure!(
        queue.ring.wait_call(context.timeout())?,
        "no notification for the entry that was asked for"
    );
    take_all(context, queue)?;
    Ok(Outcome::Passed("61 notifications".into()))
}

fn notify_flags(context: &Context<'_>) -> Result<Outcome> {
    let mut options = context.options(1);
    options.features &= !feature::EVENT_IDX;
    let mut guest = context.start(&options)?;
    let queue = guest.queue(0);
    for round in 0..10u16 {
        queue.ring.enable_notifications()?;
        submit(context, queue, 3)?;
        ensure!(
            queue.ring.wait_call(context.timeout())?,
            "round {round}: no notification"
        );
        let end = queue.ring.last_used().wrapping_add(3);
        watch_used(context, queue, end)?;
        take_all(context, queue)?;
        // One may have come for each entry.
        while queue.ring.wait_call(SILENCE)? {}

        queue.ring.disable_notifications()?;
        submit(context, queue, 3)?;
        watch_used(context, queue, end.wrapping_add(3))?;
        ensure!(
            !queue.ring.wait_call(SILENCE)?,
            "round {round}: notified although the driver asked for none"
        );
        take_all(context, queue)?;
    }
    Ok(Outcome::Passed("10 rounds".into()))
}

fn kick_spurious(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    for _ in 0..1000 {
        queue.ring.kick()?;
    }
    ensure!(
        queue.ring.used_idx()? == queue.ring.last_used(),
        "a used entry came for no request"
    );
    for _ in 0..20 {
        queue.ring.kick()?;
        context.read(queue, 0, context.disk.block(), &Shape::default())?;
        queue.ring.kick()?;
    }
    ensure!(
        !queue.ring.wait_err(SILENCE)?,
        "the ring is said to be broken"
    );
    Ok(Outcome::Passed("1040 kicks".into()))
}
