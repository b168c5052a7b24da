// SPDX-License-Identifier: GPL-2.0

//! Stop and restart, idle and under load.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::{Guest, Shape};

use super::check::{Check, Context, Outcome};
use super::load::Load;

/// How often the device is stopped under load.
const ROUNDS: usize = 20;
/// Requests at a time, per queue.
const DEPTH: usize = 32;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "stop-idle",
        title: "an idle device stops, twice, and starts again where it was",
        writes: false,
        run: stop_idle,
    },
    Check {
        name: "stop-loaded",
        title: "a stop under load drains what was fetched, and a restart goes on with the rest",
        writes: false,
        run: stop_loaded,
    },
    Check {
        name: "publish-stopped",
        title: "what is published while the device is stopped waits for the start",
        writes: false,
        run: publish_stopped,
    },
    Check {
        name: "reset-loaded",
        title: "a reset of the owner under load drains",
        writes: false,
        run: reset_loaded,
    },
    Check {
        name: "close-loaded",
        title: "the device may be closed under load",
        writes: false,
        run: close_loaded,
    },
];

fn stop_idle(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let mut done = 0u16;
    for round in 0..10 {
        context.read(guest.queue(0), 0, context.disk.block(), &Shape::default())?;
        done += 1;
        for again in [false, true] {
            let bases = guest.stop()?;
            ensure!(
                bases == [done],
                "round {round}, second stop: {again}: base {bases:?} after {done} requests"
            );
        }
        guest.resume(context.disk.backend(), &[done])?;
    }
    Ok(Outcome::Passed(format!("{done} restarts")))
}

/// Stops and restarts `guest` under `loads`, one for each of its queues.
pub(crate) fn stop_and_go(
    context: &Context<'_>,
    guest: &mut Guest,
    loads: &mut [Load<'_>],
) -> Result<usize> {
    let total = usize::MAX;
    let mut left_behind = 0;
    for round in 0..ROUNDS {
        for (index, load) in loads.iter_mut().enumerate() {
            load.fill(guest.queue(index), total)?;
            // Sometimes the device is found in the middle of its work, and
            // sometimes before it began.
            if round % 3 == 0 {
                load.wait(guest.queue(index))?;
            }
        }
        let bases = guest.stop().with_context(|| format!("round {round}"))?;
        for ((index, load), &base) in loads.iter_mut().enumerate().zip(&bases) {
            let queue = guest.queue(index);
            let used = queue.ring.used_idx()?;
            ensure!(
                base == used,
                "round {round}, queue {index}: base {base} but used index {used}"
            );
            load.poll(queue)?;
            let rest = queue.ring.next_avail().wrapping_sub(base);
            ensure!(
                usize::from(rest) == queue.in_flight(),
                "round {round}, queue {index}: {rest} entries left, {} requests in flight",
                queue.in_flight()
            );
            left_behind += usize::from(rest);
            // Nothing moves while it is stopped.
            queue.ring.kick()?;
        }
        if round % 10 == 0 {
            std::thread::sleep(Duration::from_millis(10));
        }
        for (index, &base) in bases.iter().enumerate() {
            let used = guest.queue(index).ring.used_idx()?;
            ensure!(
                used == base,
                "round {round}, queue {index}: used index went from {base} to {used} when stopped"
            );
        }
        guest.resume(context.disk.backend(), &bases)?;
    }
    for (index, load) in loads.iter_mut().enumerate() {
        let queue = guest.queue(index);
        while queue.in_flight() > 0 {
            load.wait(queue)
                .with_context(|| format!("after the last restart, queue {index}"))?;
        }
    }
    Ok(left_behind)
}

fn stop_loaded(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.start(&context.options(context.args.queues))?;
    let mut loads: Vec<_> = (0..context.args.queues)
        .map(|index| Load::reads(context, context.rng(&format!("stop-loaded {index}")), DEPTH))
        .collect();
    let left = stop_and_go(context, &mut guest, &mut loads)?;
    let count: usize = loads.iter().map(Load::completed).sum();
    Ok(Outcome::Passed(format!(
        "{ROUNDS} restarts, {count} requests, {left} left for the next start"
    )))
}

fn publish_stopped(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let mut load = Load::reads(context, context.rng("publish-stopped"), DEPTH);
    let mut total = 0;
    for _ in 0..10 {
        let bases = guest.stop()?;
        total += DEPTH;
        load.fill(guest.queue(0), total)?;
        guest.resume(context.disk.backend(), &bases)?;
        while guest.queue(0).in_flight() > 0 {
            load.wait(guest.queue(0))?;
        }
        total = load.completed();
    }
    Ok(Outcome::Passed(format!("{total} requests")))
}

fn reset_loaded(context: &Context<'_>) -> Result<Outcome> {
    const ROUNDS: usize = 6;
    for round in 0..ROUNDS {
        let mut guest = context.start(&context.options(context.args.queues))?;
        let mut loads: Vec<_> = (0..context.args.queues)
            .map(|i| Load::reads(context, context.rng(&format!("reset {round} {i}")), DEPTH))
            .collect();
        for (index, load) in loads.iter_mut().enumerate() {
            load.fill(guest.queue(index), usize::MAX)?;
        }
        guest.device().reset_owner()?;
        for (index, load) in loads.iter_mut().enumerate() {
            let queue = guest.queue(index);
            load.poll(queue)?;
            let used = queue.ring.used_idx()?;
            std::thread::sleep(Duration::from_millis(2));
            ensure!(
                queue.ring.used_idx()? == used,
                "round {round}, queue {index}: used entries come after the reset"
            );
        }
        // The device can be owned again, and the same guest goes on from there.
        guest.device().set_owner()?;
    }
    Ok(Outcome::Passed(format!("{ROUNDS} resets")))
}

fn close_loaded(context: &Context<'_>) -> Result<Outcome> {
    const ROUNDS: usize = 6;
    for round in 0..ROUNDS {
        let mut guest = context.start(&context.options(context.args.queues))?;
        for index in 0..context.args.queues {
            let rng = context.rng(&format!("close {round} {index}"));
            let mut load = Load::reads(context, rng, DEPTH);
            load.fill(guest.queue(index as usize), usize::MAX)?;
        }
        drop(guest);
    }
    let mut guest = context.guest()?;
    context.read(guest.queue(0), 0, context.disk.block(), &Shape::default())?;
    Ok(Outcome::Passed(format!("{ROUNDS} closes")))
}
