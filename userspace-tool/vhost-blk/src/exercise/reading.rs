// SPDX-License-Identifier: GPL-2.0

//! Reads of all sizes, anywhere on the disk.

use anyhow::Result;
use rand::RngExt;
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::{Shape, Table};

use super::check::{Check, Context, Outcome};

/// The longest read, bytes: many bios.
const MAX_READ: usize = 8 << 20;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "read",
        title: "reads give what is on the disk, from its first block to its last",
        writes: false,
        run: read,
    },
    Check {
        name: "read-sizes",
        title: "reads of any size, from one block to megabytes",
        writes: false,
        run: read_sizes,
    },
];

fn read(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("read");
    let mut guest = context.guest()?;
    let disk = context.disk;
    let blocks = disk.capacity() / disk.block_sectors();
    let mut places = vec![0, blocks - 1];
    places.extend((0..62).map(|_| rng.random_range(0..blocks)));
    for &block in &places {
        let sector = block * disk.block_sectors();
        context.read(guest.queue(0), sector, disk.block(), &Shape::default())?;
    }
    Ok(Outcome::Passed(format!("{} reads", places.len())))
}

fn read_sizes(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("read-sizes");
    let mut guest = context.guest()?;
    let disk = context.disk;
    let most = MAX_READ.min(usize::try_from(disk.bytes()).unwrap_or(MAX_READ));
    let mut sizes = Vec::new();
    let mut size = disk.block();
    while size <= most {
        sizes.extend([size, size + disk.block(), size - disk.block()]);
        size *= 2;
    }
    // More pages than one bio has room for.
    sizes.extend([256 * 4096, 257 * 4096, 513 * 4096]);
    sizes.retain(|&size| size > 0 && size <= most);
    sizes.sort_unstable();
    sizes.dedup();
    let mut count = 0;
    for &len in &sizes {
        let room = (disk.bytes() - len as u64) / disk.block() as u64;
        let last = room * disk.block_sectors();
        let random = rng.random_range(0..=room) * disk.block_sectors();
        for (sector, table, align) in [
            (0, Table::Direct, 4096),
            // At addresses that take one page more.
            (last, Table::Direct, SECTOR_SIZE),
            (random, Table::Indirect, SECTOR_SIZE),
        ] {
            let shape = Shape::default().table(table).at(align, 0);
            context.read(guest.queue(0), sector, len, &shape)?;
            count += 1;
        }
    }
    Ok(Outcome::Passed(format!(
        "{count} reads, {} sizes up to {} KiB",
        sizes.len(),
        sizes.last().copied().unwrap_or(0) / 1024
    )))
}
