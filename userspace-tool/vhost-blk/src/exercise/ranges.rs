// SPDX-License-Identifier: GPL-2.0

//! Discard, write zeroes and secure erase: what is done to ranges of the disk.

use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result, ensure};
use rand::RngExt;
use rand::rngs::StdRng;
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Kind, Queue, Range, Request, Shape, Status, Table};

use super::check::{Check, Context, Outcome, describe, refused, same, succeeded};
use super::shapes;

/// Most ranges of a request that the device takes.
const MAX_RANGES: usize = 256;
/// What is overwritten before each request, bytes, where the region is as large.
const AREA: usize = 64 << 10;
/// Requests with random ranges.
const ROUNDS: usize = 40;

const KINDS: [Kind; 3] = [Kind::Discard, Kind::WriteZeroes, Kind::SecureErase];

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "zeroes-layout",
        title: "zeroes in every layout: cuts, tables, places",
        writes: true,
        run: zeroes_layout,
    },
    Check {
        name: "zeroes-ranges",
        title: "zeroes of any ranges, with and without unmap, and nothing beside them",
        writes: true,
        run: zeroes_ranges,
    },
    Check {
        name: "zeroes-long",
        title: "zeroes of megabytes, between reads that do not wait for them",
        writes: true,
        run: zeroes_long,
    },
    Check {
        name: "zeroes-through",
        title: "with and without a write cache, what was zeroed is on the disk",
        writes: true,
        run: zeroes_through,
    },
    Check {
        name: "discard",
        title: "discards reach the disk, and nothing beside them",
        writes: true,
        run: discard,
    },
    Check {
        name: "secure-erase",
        title: "erases reach the disk, and nothing beside them",
        writes: true,
        run: secure_erase,
    },
    Check {
        name: "ranges-refused",
        title: "ranges that are no ranges of the disk, and flags, are refused and change nothing",
        writes: true,
        run: ranges_refused,
    },
    Check {
        name: "ranges-features",
        title: "what was not negotiated is unsupported, what is read-only is refused",
        writes: true,
        run: ranges_features,
    },
];

/// A piece of the region, full of noise.
struct Area<'a> {
    context: &'a Context<'a>,
    data: Vec<u8>,
}

impl<'a> Area<'a> {
    fn new(context: &'a Context<'a>, rng: &mut StdRng, len: usize) -> Result<Self> {
        let data = shapes::noise(rng, len.min(context.region.len));
        context.disk.write(context.region.sector(), &data)?;
        Ok(Area { context, data })
    }

    /// The range of `len` bytes at byte `at` of it.
    fn range(&self, at: usize, len: usize) -> Result<Range> {
        let sector = self.context.region.sector() + (at / SECTOR_SIZE) as u64;
        Ok(Range::new(sector, u32::try_from(len / SECTOR_SIZE)?))
    }

    /// Random whole blocks of it.
    fn random(&self, rng: &mut StdRng, most: usize) -> Result<Range> {
        let block = self.context.disk.block();
        let blocks = self.data.len() / block;
        let start = rng.random_range(0..blocks);
        let len = rng.random_range(0..=(blocks - start).min(most));
        self.range(start * block, len * block)
    }

    /// Where a range of it is in its data, bytes.
    fn bytes(&self, range: &Range) -> Result<std::ops::Range<usize>> {
        let start = usize::try_from(range.sector - self.context.region.sector())? * SECTOR_SIZE;
        Ok(start..start + range.sectors as usize * SECTOR_SIZE)
    }

    fn on_disk(&self) -> Result<Vec<u8>> {
        let context = self.context;
        context.disk.read(context.region.sector(), self.data.len())
    }

    /// Fails unless the disk has zeroes in `ranges`, and elsewhere what it had.
    fn zeroed(&mut self, ranges: &[Range]) -> Result<()> {
        for range in ranges {
            let bytes = self.bytes(range)?;
            self.data[bytes].fill(0);
        }
        same(&self.on_disk()?, &self.data)
    }

    /// Fails unless the disk has what it had outside of `ranges`. Returns whether there are zeroes in
    /// all of them.
    fn kept(&self, ranges: &[Range]) -> Result<bool> {
        let mut found = self.on_disk()?;
        let places: Vec<_> = ranges
            .iter()
            .map(|range| self.bytes(range))
            .collect::<Result<_>>()?;
        let zeroes = places
            .iter()
            .all(|bytes| found[bytes.clone()].iter().all(|&byte| byte == 0));
        for bytes in places {
            found[bytes.clone()].copy_from_slice(&self.data[bytes]);
        }
        same(&found, &self.data)?;
        Ok(zeroes)
    }
}

/// Zeroes ranges of an area, and compares it with the disk.
fn zero(
    context: &Context<'_>,
    queue: &mut Queue,
    area: &mut Area<'_>,
    ranges: &[Range],
    shape: &Shape,
) -> Result<()> {
    let request = Request::ranges(Kind::WriteZeroes, ranges);
    let what = describe(&request, shape);
    let done = context.run(queue, request, shape)?;
    succeeded(&done).with_context(|| what.clone())?;
    area.zeroed(ranges)
        .with_context(|| format!("on the disk, after {what} with {ranges:x?}"))
}

fn zeroes_layout(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("zeroes-layout");
    let mut guest = context.guest()?;
    let block = context.disk.block();
    let any = Request::ranges(Kind::WriteZeroes, &[Range::default(); 3]);
    let mut count = 0;
    for shape in shapes::all(&any, context.args.queue_size) {
        let mut area = Area::new(context, &mut rng, 8 * block)?;
        let ranges = [
            area.range(block, 2 * block)?,
            area.range(7 * block, block)?.flags(Range::UNMAP),
            area.range(4 * block, block)?,
        ];
        zero(context, guest.queue(0), &mut area, &ranges, &shape)?;
        count += 1;
    }
    Ok(Outcome::Passed(format!("{count} layouts")))
}

fn zeroes_ranges(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("zeroes-ranges");
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    let block = context.disk.block();
    let flags = |number: usize| if number % 2 == 0 { 0 } else { Range::UNMAP };
    let mut count = 0;
    for round in 0..ROUNDS {
        let mut area = Area::new(context, &mut rng, AREA)?;
        let ranges = match round {
            // Nothing, all of it, the same twice, the last block, as many as can be.
            0 => vec![area.range(0, 0)?],
            1 => vec![area.range(0, area.data.len())?],
            2 => vec![area.range(block, block)?.flags(Range::UNMAP); 2],
            3 => vec![area.range(area.data.len() - block, block)?],
            4 | 5 => (0..MAX_RANGES)
                .map(|number| Ok(area.random(&mut rng, 2)?.flags(flags(number))))
                .collect::<Result<_>>()?,
            _ => (0..rng.random_range(1..6))
                .map(|number| Ok(area.random(&mut rng, usize::MAX)?.flags(flags(number))))
                .collect::<Result<_>>()?,
        };
        let request = Request::ranges(Kind::WriteZeroes, &ranges);
        let shape = shapes::random(&mut rng, &request, context.args.queue_size.into());
        zero(context, queue, &mut area, &ranges, &shape)?;
        count += ranges.len();
    }
    Ok(Outcome::Passed(format!(
        "{count} ranges in {ROUNDS} requests"
    )))
}

fn zeroes_long(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("zeroes-long");
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    let mut area = Area::new(context, &mut rng, context.region.len)?;
    let block = context.disk.block();
    let ranges = [area.range(block, area.data.len() - 2 * block)?];
    let shape = Shape::default();
    queue.submit(Request::ranges(Kind::WriteZeroes, &ranges), &shape)?;
    for _ in 0..16 {
        queue.submit(Request::read(context.region.sector(), block), &shape)?;
    }
    queue.kick()?;
    for done in queue.wait_all(context.timeout())? {
        succeeded(&done).with_context(|| describe(&done.request, &shape))?;
        if done.request.kind == Kind::In {
            same(&done.data, &area.data[..block])?;
        }
    }
    area.zeroed(&ranges)?;
    Ok(Outcome::Passed(format!("{} KiB", area.data.len() >> 10)))
}

fn zeroes_through(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("zeroes-through");
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
        for _ in 0..10 {
            let mut area = Area::new(context, &mut rng, 16 * block)?;
            // The last one is empty: only a flush is left to do.
            for most in [16, 0] {
                let ranges = [area.random(&mut rng, most)?, area.random(&mut rng, most)?];
                zero(
                    context,
                    guest.queue(0),
                    &mut area,
                    &ranges,
                    &Shape::default(),
                )?;
            }
            count += 2;
        }
    }
    Ok(Outcome::Passed(format!("{count} requests")))
}

/// Sends ranges, whole units of `unit` sectors, whose contents do not matter afterwards, and sees
/// that the rest is left alone. Returns how many sectors were asked for in ranges that do not read as
/// zeroes now, and in all.
fn lose(context: &Context<'_>, kind: Kind, unit: u64) -> Result<(u64, u64)> {
    let mut rng = context.rng("discard");
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    let sectors = context.disk.block_sectors();
    let unit = unit.next_multiple_of(sectors);
    let (mut others, mut all) = (0, 0);
    for round in 0..ROUNDS {
        let area = Area::new(
            context,
            &mut rng,
            AREA.max(8 * usize::try_from(unit)? * SECTOR_SIZE),
        )?;
        // Some begin and end in the middle of a unit.
        let aligned = |sector: u64| sector.next_multiple_of(unit);
        let ranges = (0..[1, 3, 100][round % 3])
            .map(|_| {
                let mut range = area.random(&mut rng, usize::MAX)?;
                if round % 2 == 0 {
                    let (start, end) = (range.sector, range.sector + u64::from(range.sectors));
                    range.sector = aligned(start).min(end);
                    range.sectors = u32::try_from((end - range.sector) / unit * unit)?;
                }
                Ok(range)
            })
            .collect::<Result<Vec<_>>>()?;
        let request = Request::ranges(kind, &ranges);
        let shape = shapes::random(&mut rng, &request, context.args.queue_size.into());
        let what = describe(&request, &shape);
        let done = context.run(queue, request, &shape)?;
        succeeded(&done).with_context(|| what.clone())?;
        let zeroes = area
            .kept(&ranges)
            .with_context(|| format!("on the disk, after {what} with {ranges:x?}"))?;
        if round % 2 == 0 {
            let sum: u64 = ranges.iter().map(|range| u64::from(range.sectors)).sum();
            all += sum;
            others += if zeroes { 0 } else { sum };
        }
    }
    Ok((others, all))
}

/// A disk that cannot do it says so.
fn cannot(context: &Context<'_>, kind: Kind) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let mut rng = context.rng("cannot");
    let block = context.disk.block();
    let area = Area::new(context, &mut rng, block)?;
    let request = Request::ranges(kind, &[area.range(0, block)?]);
    let done = context.run(guest.queue(0), request, &Shape::default())?;
    refused(&done, Status::Unsupported)?;
    same(&area.on_disk()?, &area.data)?;
    Ok(Outcome::Passed("the disk cannot, and that is said".into()))
}

fn discard(context: &Context<'_>) -> Result<Outcome> {
    let unit = context.disk.discard_sectors()?;
    if unit == 0 {
        return cannot(context, Kind::Discard);
    }
    let before = context.disk.discarded()?;
    let (others, all) = lose(context, Kind::Discard, unit)?;
    let told = context.disk.discarded()? - before;
    ensure!(
        told >= all || others == 0,
        "of {all} sectors, {others} do not read as zeroes, and the disk has been told of {told}"
    );
    Ok(Outcome::Passed(format!(
        "{all} sectors, of which {} read as zeroes",
        all - others
    )))
}

fn secure_erase(context: &Context<'_>) -> Result<Outcome> {
    let guest = context.guest()?;
    let info = guest.device().info(Some(context.disk.backend().as_fd()))?;
    drop(guest);
    if info.max_secure_erase_sectors == 0 {
        return cannot(context, Kind::SecureErase);
    }
    let (others, all) = lose(context, Kind::SecureErase, 1)?;
    Ok(Outcome::Passed(format!(
        "{all} sectors, of which {} read as zeroes",
        all - others
    )))
}

fn ranges_refused(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("ranges-refused");
    let mut guest = context.guest()?;
    let disk = context.disk;
    let (block, capacity, sectors) = (disk.block(), disk.capacity(), disk.block_sectors());
    let area = Area::new(context, &mut rng, 8 * block)?;
    let good = area.range(0, block)?;
    let blocks = u32::try_from(sectors)?;
    let last = capacity - sectors;
    let tail = disk.read(last, block)?;

    let mut ranges = vec![
        Range::new(capacity, blocks),
        Range::new(last, 2 * blocks),
        Range::new(last, u32::MAX / blocks * blocks),
        Range::new(1 << 40, blocks),
        Range::new(1 << 55, blocks),
        Range::new(1 << 63, blocks),
        Range::new(u64::MAX - sectors + 1, blocks),
        Range::new(u64::MAX - sectors + 1, 2 * blocks),
        Range::new(capacity + sectors, 0),
    ];
    ranges.retain(|range| range.sector >= last);
    if blocks > 1 {
        ranges.extend([
            Range::new(good.sector, 1),
            Range::new(good.sector + 1, blocks),
            Range::new(good.sector, blocks + 1),
        ]);
    }
    let mut requests = Vec::new();
    for kind in KINDS {
        for &range in &ranges {
            // First, last, and alone: nothing may be done before all is checked.
            for list in [vec![range], vec![range, good], vec![good, range]] {
                requests.push((Request::ranges(kind, &list), Status::IoErr));
            }
        }
        let whole = Request::ranges(kind, &[good, good]).out;
        for len in [0, 1, 15, 17, 31] {
            let request = Request::other(kind.number(), 0, whole[..len].to_vec(), 0);
            requests.push((request, Status::IoErr));
        }
        let many = Request::ranges(kind, &[good; MAX_RANGES + 1]);
        requests.push((many, Status::IoErr));
        let unmap = (kind != Kind::WriteZeroes).then_some(Range::UNMAP);
        for flags in unmap.into_iter().chain([2, 3, 0x8000_0000, u32::MAX]) {
            let bad = good.flags(flags);
            for list in [vec![bad], vec![good, bad]] {
                requests.push((Request::ranges(kind, &list), Status::Unsupported));
            }
        }
    }
    // What the disk cannot do is unsupported, whatever else is wrong with it.
    let info = guest.device().info(Some(disk.backend().as_fd()))?;
    let mut count = 0;
    for (request, status) in requests {
        let cannot = match request.kind.number() {
            11 => info.max_discard_sectors == 0,
            14 => info.max_secure_erase_sectors == 0,
            _ => false,
        };
        let readable = request.out.len();
        let array = readable > 0 && readable % Range::LEN == 0;
        let status = if cannot && array && readable <= MAX_RANGES * Range::LEN {
            Status::Unsupported
        } else {
            status
        };
        for table in [Table::Direct, Table::Indirect] {
            let shape = Shape::default().table(table);
            let what = describe(&request, &shape);
            let done = context.run(guest.queue(0), request.clone(), &shape)?;
            refused(&done, status).with_context(|| what.clone())?;
            count += 1;
        }
    }
    same(&area.on_disk()?, &area.data)?;
    same(&disk.read(last, block)?, &tail)?;
    Ok(Outcome::Passed(format!("{count} requests")))
}

fn ranges_features(context: &Context<'_>) -> Result<Outcome> {
    let mut rng = context.rng("ranges-features");
    let block = context.disk.block();
    let area = Area::new(context, &mut rng, block)?;
    let good = [area.range(0, block)?];
    let ways = [
        (feature::DISCARD, Kind::Discard),
        (feature::WRITE_ZEROES, Kind::WriteZeroes),
        (feature::SECURE_ERASE, Kind::SecureErase),
    ];
    for (bit, kind) in ways {
        let mut without = context.options(1);
        without.features &= !bit;
        let mut read_only = context.options(1);
        read_only.features |= feature::RO;
        for (options, status) in [(without, Status::Unsupported), (read_only, Status::IoErr)] {
            let mut guest = context.start(&options)?;
            let request = Request::ranges(kind, &good);
            let what = describe(&request, &Shape::default());
            let done = context.run(guest.queue(0), request, &Shape::default())?;
            refused(&done, status).with_context(|| what.clone())?;
            same(&area.on_disk()?, &area.data).context(what)?;
        }
    }
    Ok(Outcome::Passed("3 types".into()))
}
