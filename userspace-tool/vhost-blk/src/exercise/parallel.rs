// SPDX-License-Identifier: GPL-2.0

//! Many requests at a time, on one queue and on several.

use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use rand::RngExt;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Error, Guest, Request, Shape, Table};

use super::check::{Check, Context, Outcome};
use super::load::Load;

/// Requests of each queue.
const REQUESTS: usize = 600;
/// Requests at a time, if the ring has room for that.
const DEPTH: usize = 64;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "full-ring",
        title: "a ring filled to its last descriptor, with and without indirect tables",
        writes: false,
        run: full_ring,
    },
    Check {
        name: "wrap-around",
        title: "indices go past 65535",
        writes: false,
        run: wrap_around,
    },
    Check {
        name: "random",
        title: "a random load on one queue",
        writes: false,
        run: random,
    },
    Check {
        name: "queues",
        title: "a random load on several queues at once",
        writes: false,
        run: queues,
    },
    Check {
        name: "devices",
        title: "a random load on two open devices at once",
        writes: false,
        run: devices,
    },
];

fn full_ring(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("full-ring");
    let disk = context.disk;
    let blocks = disk.capacity() / disk.block_sectors();
    let mut count = 0;
    for event_idx in [true, false] {
        let mut options = context.options(1);
        if !event_idx {
            options.features &= !feature::EVENT_IDX;
        }
        let mut guest = context.start(&options)?;
        let queue = guest.queue(0);
        for round in 0..6 {
            let table = if round % 2 == 0 {
                Table::Indirect
            } else {
                Table::Direct
            };
            let shape = Shape::default().table(table);
            loop {
                let sector = rng.random_range(0..blocks) * disk.block_sectors();
                match queue.submit(Request::read(sector, disk.block()), &shape) {
                    Ok(_) => {}
                    Err(Error::RingFull { .. }) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            let submitted = queue.in_flight();
            let room = usize::from(options.queue_size) / if round % 2 == 0 { 1 } else { 3 };
            ensure!(submitted == room, "{submitted} requests instead of {room}");
            queue.kick()?;
            let all = queue
                .wait_all(context.timeout())
                .with_context(|| format!("{submitted} requests, {table:?}"))?;
            for done in &all {
                context.matches_disk(done)?;
            }
            count += all.len();
        }
    }
    Ok(Outcome::Passed(format!("{count} reads")))
}

fn wrap_around(context: &Context<'_>) -> Result<Outcome> {
    let mut count = 0;
    for event_idx in [true, false] {
        let mut options = context.options(1);
        options.base = 65535 - 100;
        if !event_idx {
            options.features &= !feature::EVENT_IDX;
        }
        let mut guest = context.start(&options)?;
        let queue = guest.queue(0);
        let mut load = Load::reads(context, context.rng("wrap-around"), DEPTH);
        load.run(queue, 400)?;
        ensure!(
            queue.ring.last_used() == options.base.wrapping_add(400),
            "used index {}",
            queue.ring.last_used()
        );
        let bases = guest.stop()?;
        ensure!(bases == [guest.queue(0).ring.last_used()], "base {bases:?}");
        count += load.completed();
    }
    Ok(Outcome::Passed(format!("{count} requests")))
}

fn random(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let mut load = Load::reads(context, context.rng("random"), DEPTH);
    load.run(guest.queue(0), 2 * REQUESTS)?;
    Ok(Outcome::Passed(format!("{} requests", load.completed())))
}

fn queues(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.start(&context.options(context.args.queues))?;
    let count = run(context, &mut guest, 0)?;
    Ok(Outcome::Passed(format!(
        "{count} requests, {} queues",
        context.args.queues
    )))
}

fn devices(context: &Context<'_>) -> Result<Outcome> {
    let mut first = context.guest()?;
    let mut second = context.guest()?;
    let counts = thread::scope(|scope| {
        let threads = [(&mut first, 1), (&mut second, 2)]
            .map(|(guest, salt)| scope.spawn(move || run(context, guest, salt)));
        threads.map(|thread| join(thread.join()))
    });
    let count: usize = counts.into_iter().sum::<Result<usize>>()?;
    Ok(Outcome::Passed(format!("{count} requests")))
}

/// Puts a load of reads on each queue from a thread of its own. `salt` makes its
/// choices others than those of another guest.
fn run(context: &Context<'_>, guest: &mut Guest, salt: usize) -> Result<usize> {
    thread::scope(|scope| {
        let threads: Vec<_> = guest
            .queues()
            .iter_mut()
            .enumerate()
            .map(|(index, queue)| {
                scope.spawn(move || {
                    let rng = context.rng(&format!("queues {salt} {index}"));
                    let mut load = Load::reads(context, rng, DEPTH);
                    load.run(queue, REQUESTS)
                        .with_context(|| format!("queue {index}"))?;
                    Ok(load.completed())
                })
            })
            .collect();
        // Every thread is joined before the first error is returned.
        let results: Vec<_> = threads.into_iter().map(|t| join(t.join())).collect();
        results.into_iter().sum()
    })
}

/// The result of a thread, a panic included.
pub(crate) fn join<T>(result: thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| Err(anyhow!("a thread of the check panicked")))
}
