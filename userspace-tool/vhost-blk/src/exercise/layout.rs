// SPDX-License-Identifier: GPL-2.0

//! Descriptor layouts and memory layouts, with reads.

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::request::Prepared;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Cut, Guest, GuestAddress, Memory, Options, Request, Segment, Shape, Table};

use super::check::{Check, Context, Outcome, same};
use super::shapes;

/// The vhost core takes no more pieces of a chain.
const MAX_SEGMENTS: usize = 1024;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "layout-read",
        title: "reads in every layout: cuts, tables, places",
        writes: false,
        run: layout_read,
    },
    Check {
        name: "layout-no-event-idx",
        title: "the same without event indices",
        writes: false,
        run: layout_no_event_idx,
    },
    Check {
        name: "layout-no-indirect",
        title: "the same without indirect tables",
        writes: false,
        run: layout_no_indirect,
    },
    Check {
        name: "layout-many",
        title: "reads of as many segments as the ring has descriptors",
        writes: false,
        run: layout_many,
    },
    Check {
        name: "layout-empty",
        title: "empty descriptors are passed over",
        writes: false,
        run: layout_empty,
    },
    Check {
        name: "layout-unaligned",
        title: "buffers at any address, with a start that no DMA can do too",
        writes: false,
        run: layout_unaligned,
    },
    Check {
        name: "layout-regions",
        title: "memory in pieces: a buffer across two regions, and beyond 4 GiB",
        writes: false,
        run: layout_regions,
    },
];

fn layouts(context: &Context<'_>, options: &Options, indirect: bool) -> Result<Outcome> {
    let mut guest = context.start(options)?;
    let disk = context.disk;
    let mut count = 0;
    for len in [disk.block(), 4 * disk.block()] {
        let request = Request::read(disk.block_sectors(), len);
        for shape in shapes::all(&request, options.queue_size) {
            if indirect || shape.table == Table::Direct {
                context.read(guest.queue(0), request.sector, len, &shape)?;
                count += 1;
            }
        }
    }
    Ok(Outcome::Passed(format!("{count} layouts")))
}

fn layout_read(context: &Context<'_>) -> Result<Outcome> {
    layouts(context, &context.options(1), true)
}

fn layout_no_event_idx(context: &Context<'_>) -> Result<Outcome> {
    let mut options = context.options(1);
    options.features &= !feature::EVENT_IDX;
    layouts(context, &options, true)
}

fn layout_no_indirect(context: &Context<'_>) -> Result<Outcome> {
    let mut options = context.options(1);
    options.features &= !feature::INDIRECT_DESC;
    layouts(context, &options, false)
}

fn layout_many(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let disk = context.disk;
    let most = usize::from(context.args.queue_size).min(MAX_SEGMENTS);
    let mut count = 0;
    // Header and status are two of them.
    for segments in [most - 2, most - 3, most / 2] {
        for size in [512, 4096, 508] {
            let len = (segments * size) / disk.block() * disk.block();
            if len == 0 || len as u64 > disk.bytes() {
                continue;
            }
            for table in [
                Table::Direct,
                Table::Indirect,
                Table::After(1),
                Table::After(5),
            ] {
                let shape = Shape::cut(Cut::Data(size)).table(table);
                context.read(guest.queue(0), 0, len, &shape)?;
                count += 1;
            }
        }
    }
    Ok(Outcome::Passed(format!(
        "{count} reads of up to {} segments",
        most - 2
    )))
}

fn layout_empty(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let len = context.disk.block();
    let half = len / 2;
    let cuts = [
        (vec![0, 16], vec![len, 1]),
        (vec![16, 0], vec![0, len, 1]),
        (vec![8, 0, 8], vec![half, 0, half, 1]),
        (vec![16], vec![len, 0, 0, 1]),
        // The last writable byte is not in the last descriptor.
        (vec![16], vec![len, 1, 0]),
    ];
    for (readable, writable) in &cuts {
        for table in [Table::Direct, Table::Indirect] {
            let cut = Cut::Exact {
                readable: readable.clone(),
                writable: writable.clone(),
            };
            context.read(guest.queue(0), 0, len, &Shape::cut(cut).table(table))?;
        }
    }
    Ok(Outcome::Passed(format!("{} layouts", 2 * cuts.len())))
}

fn layout_unaligned(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let disk = context.disk;
    let len = (3 * 4096).min(usize::try_from(disk.bytes())?);
    let offsets = [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 511, 513, 2048, 4094];
    for offset in offsets {
        for cut in [Cut::Usual, Cut::Joined, Cut::Data(1024)] {
            context.read(guest.queue(0), 0, len, &Shape::cut(cut).at(4096, offset))?;
        }
    }
    Ok(Outcome::Passed(format!("{} addresses", offsets.len())))
}

fn layout_regions(context: &Context<'_>) -> Result<Outcome> {
    const PIECE: usize = 64 << 10;
    // The first two touch in guest memory, but are mappings of their own.
    let memory = Memory::with_regions(&[
        (GuestAddress(0x10000), PIECE),
        (GuestAddress(0x20000), PIECE),
        (GuestAddress(5 << 30), 32 << 20),
    ])?;
    let left = memory.alloc(PIECE, 1)?;
    let right = memory.alloc(PIECE, 1)?;
    ensure!(left.at(PIECE) == right.addr(), "the regions do not touch");
    let options = context.options(1);
    let mut guest = Guest::with_memory(&options, &memory)?;
    guest.start(context.disk.backend())?;
    let queue = guest.queue(0);
    context.read(queue, 0, context.disk.block(), &Shape::default())?;

    let block = context.disk.block();
    let len = 2 * block;
    let mut count = 0;
    for before in [block, 1, 511, len - 1, block + 1] {
        let header = Prepared::new(&memory, Request::read(0, 0), &Shape::default())?;
        let [start, status] = header.segments()?[..] else {
            anyhow::bail!("header and status are not two segments");
        };
        left.fill(0x5a)?;
        right.fill(0x5a)?;
        let data = Segment::writable(left.at(PIECE - before), u32::try_from(len)?);
        for table in [Table::Direct, Table::Indirect] {
            let what = format!("{before} bytes before the border, {table:?}");
            queue.ring.add(&[start, data, status], table)?;
            queue.kick()?;
            let used = queue
                .ring
                .wait_used(context.timeout())
                .context(what.clone())?;
            ensure!(
                used.len as usize == len + 1,
                "{what}: used.len {}",
                used.len
            );
            let mut found = left.read(PIECE - before, before)?;
            found.extend(right.read(0, len - before)?);
            same(&found, &context.disk.read(0, len)?).context(what)?;
            count += 1;
        }
        ensure!(
            left.read(0, PIECE - before)?
                .iter()
                .all(|&byte| byte == 0x5a)
                && right
                    .read(len - before, PIECE - len + before)?
                    .iter()
                    .all(|&byte| byte == 0x5a),
            "bytes around the buffer were written"
        );
    }
    Ok(Outcome::Passed(format!("{count} reads across the border")))
}
