// SPDX-License-Identifier: GPL-2.0

//! Writes, and what must not be written.

use std::thread;

use anyhow::{Context as _, Result};
use rand::RngExt;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Queue, Request, Shape, Status, Table};

use super::check::{Check, Context, Outcome, describe, refused, same, succeeded};
use super::load::Load;
use super::parallel::join;
use super::shapes;
use super::stopping::stop_and_go;

/// The longest write, bytes: many bios.
const MAX_WRITE: usize = 8 << 20;
/// Requests of each queue.
const REQUESTS: usize = 600;
/// Requests at a time, per queue.
const DEPTH: usize = 32;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "write-refused",
        title: "writes to what is read-only are refused",
        writes: false,
        run: write_refused,
    },
    Check {
        name: "write-layout",
        title: "writes in every layout: cuts, tables, places",
        writes: true,
        run: write_layout,
    },
    Check {
        name: "write-sizes",
        title: "writes of any size, from one block to megabytes, and nothing beside them",
        writes: true,
        run: write_sizes,
    },
    Check {
        name: "write-bounds",
        title: "writes beyond the end, and of no whole blocks, are refused and write nothing",
        writes: true,
        run: write_bounds,
    },
    Check {
        name: "write-through",
        title: "with and without a write cache, completed writes are on the disk",
        writes: true,
        run: write_through,
    },
    Check {
        name: "write-random",
        title: "a random load of reads and writes on several queues at once",
        writes: true,
        run: write_random,
    },
    Check {
        name: "write-stop-loaded",
        title: "stop and restart under a load of writes lose none",
        writes: true,
        run: write_stop_loaded,
    },
];

fn write_refused(context: &Context<'_>) -> Result<Outcome> {
    let disk = context.disk;
    // What is there already: even a device that does write changes nothing.
    let data = disk.read(0, disk.block())?;
    let mut count = 0;
    let mut ways = Vec::new();
    let mut read_only = context.options(1);
    read_only.features |= feature::RO;
    ways.push(read_only);
    if !context.args.write {
        // The disk is open for reading only.
        ways.push(context.options(1));
    }
    for options in ways {
        let mut guest = context.start(&options)?;
        let queue = guest.queue(0);
        for table in [Table::Direct, Table::Indirect] {
            let shape = Shape::default().table(table);
            let request = Request::write(0, data.clone());
            let done = context.run(queue, request.clone(), &shape)?;
            refused(&done, Status::IoErr).with_context(|| describe(&request, &shape))?;
            context.read(queue, 0, disk.block(), &Shape::default())?;
            count += 1;
        }
    }
    Ok(Outcome::Passed(format!("{count} writes")))
}

/// Writes, and compares with the disk, one block around it included.
fn write(
    context: &Context<'_>,
    queue: &mut Queue,
    at: usize,
    data: Vec<u8>,
    shape: &Shape,
) -> Result<()> {
    let disk = context.disk;
    let block = disk.block();
    let from = at.saturating_sub(block);
    let to = (at + data.len() + block).min(context.region.len);
    let sector = |byte: usize| context.region.sector() + (byte / 512) as u64;
    let mut expected = disk.read(sector(from), to - from)?;
    expected[at - from..at - from + data.len()].copy_from_slice(&data);
    let request = Request::write(sector(at), data);
    let what = describe(&request, shape);
    let done = context.run(queue, request, shape)?;
    succeeded(&done).with_context(|| what.clone())?;
    same(&disk.read(sector(from), to - from)?, &expected)
        .with_context(|| format!("on the disk, after {what}"))
}

fn write_layout(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("write-layout");
    let mut guest = context.guest()?;
    let block = context.disk.block();
    let mut count = 0;
    for len in [block, 4 * block] {
        let request = Request::write(0, vec![0; len]);
        for shape in shapes::all(&request, context.args.queue_size) {
            let data = shapes::noise(&mut rng, len);
            write(context, guest.queue(0), block, data, &shape)?;
            count += 1;
        }
    }
    Ok(Outcome::Passed(format!("{count} layouts")))
}

fn write_sizes(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("write-sizes");
    let mut guest = context.guest()?;
    let block = context.disk.block();
    let most = MAX_WRITE.min(context.region.len);
    let mut sizes: Vec<_> = std::iter::successors(Some(block), |size| Some(2 * size))
        .take_while(|&size| size <= most)
        .flat_map(|size| [size, size + block])
        .chain([256 * 4096, 257 * 4096])
        .filter(|&size| size <= most)
        .collect();
    sizes.sort_unstable();
    sizes.dedup();
    for &len in &sizes {
        for table in [Table::Direct, Table::Indirect] {
            let room = (context.region.len - len) / block;
            let at = rng.random_range(0..=room) * block;
            let data = shapes::noise(&mut rng, len);
            let shape = Shape::default().table(table);
            write(context, guest.queue(0), at, data, &shape)?;
        }
    }
    Ok(Outcome::Passed(format!(
        "{} sizes up to {} KiB",
        sizes.len(),
        sizes.last().copied().unwrap_or(0) / 1024
    )))
}

fn write_bounds(context: &Context<'_>) -> Result<Outcome> {
    let disk = context.disk;
    let (block, capacity, sectors) = (disk.block(), disk.capacity(), disk.block_sectors());
    let last = capacity - sectors;
    let region = context.region.sector();
    // What is there already, where a device that errs would write to the last
    // block of the disk.
    let tail = disk.read(last, block)?;
    let mut requests = vec![
        Request::write(capacity, vec![0xbd; block]),
        Request::write(1 << 55, vec![0xbd; block]),
        Request::write(u64::MAX, vec![0xbd; block]),
        Request::write(u64::MAX - sectors + 1, vec![0xbd; 2 * block]),
        Request::write(last, [tail.clone(), vec![0xbd; block]].concat()),
        Request::write(region, vec![0xbd; 1]),
        Request::write(region, vec![0xbd; block - 1]),
        Request::write(region, vec![0xbd; block + 1]),
    ];
    if block > 512 {
        requests.push(Request::write(region, vec![0xbd; 512]));
        requests.push(Request::write(region + 1, vec![0xbd; block]));
    }
    let mut guest = context.guest()?;
    let before = disk.read(region, 4 * block)?;
    for request in &requests {
        for table in [Table::Direct, Table::Indirect] {
            let shape = Shape::default().table(table);
            let what = describe(request, &shape);
            let done = context.run(guest.queue(0), request.clone(), &shape)?;
            refused(&done, Status::IoErr).with_context(|| what.clone())?;
            same(&disk.read(last, block)?, &tail)
                .and_then(|()| same(&disk.read(region, 4 * block)?, &before))
                .with_context(|| format!("on the disk, after {what}"))?;
        }
    }
    Ok(Outcome::Passed(format!("{} requests", 2 * requests.len())))
}

fn write_through(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("write-through");
    let block = context.disk.block();
    let mut count = 0;
    for (features, writeback) in [
        (u64::MAX, true),
        (u64::MAX, false),
        (!(feature::FLUSH | feature::CONFIG_WCE), true),
    ] {
        let mut options = context.options(1);
        options.features &= features;
        let mut guest = context.start(&options)?;
        guest.device().set_writeback(writeback)?;
        for at in 0..20 {
            let data = shapes::noise(&mut rng, block);
            let queue = guest.queue(0);
            write(context, queue, at * block, data, &Shape::default())?;
            succeeded(&context.run(queue, Request::flush(), &Shape::default())?)?;
            count += 1;
        }
    }
    Ok(Outcome::Passed(format!("{count} writes")))
}

fn write_random(context: &Context<'_>) -> Result<Outcome> {
    let queues = context.args.queues;
    let mut guest = context.start(&context.options(queues))?;
    let mut loads = write_loads(context, "write-random")?;
    let results: Vec<Result<()>> = thread::scope(|scope| {
        let threads: Vec<_> = guest
            .queues()
            .iter_mut()
            .zip(&mut loads)
            .enumerate()
            .map(|(index, (queue, load))| {
                scope.spawn(move || {
                    load.run(queue, REQUESTS)
                        .with_context(|| format!("queue {index}"))
                })
            })
            .collect();
        threads.into_iter().map(|t| join(t.join())).collect()
    });
    results.into_iter().collect::<Result<()>>()?;
    for load in &loads {
        load.compare()?;
    }
    let count: usize = loads.iter().map(Load::completed).sum();
    Ok(Outcome::Passed(format!(
        "{count} requests, {queues} queues"
    )))
}

fn write_stop_loaded(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.start(&context.options(context.args.queues))?;
    let mut loads = write_loads(context, "write-stop-loaded")?;
    let left = stop_and_go(context, &mut guest, &mut loads)?;
    for load in &loads {
        load.compare()?;
    }
    let count: usize = loads.iter().map(Load::completed).sum();
    Ok(Outcome::Passed(format!(
        "{count} requests, {left} left for the next start"
    )))
}

fn write_loads<'a>(context: &'a Context<'a>, name: &str) -> Result<Vec<Load<'a>>> {
    let queues = context.args.queues as usize;
    (0..queues)
        .map(|index| {
            let rng = context.rng(&format!("{name} {index}"));
            Load::writes(context, rng, DEPTH, index, queues)
        })
        .collect()
}
