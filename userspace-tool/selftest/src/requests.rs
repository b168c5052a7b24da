// SPDX-License-Identifier: GPL-2.0

//! Requests that a good driver may make, however odd, and what has to come back.

use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{
    Cut, Descriptor, Guest, Kind, Options, Request, Segment, Shape, Status, Table, Workers,
};

use crate::check::{self, UsedLen};
use crate::context::{Context, PATIENCE, QUIET, Test, skip, test};
use crate::disk::{self, SCRATCH, SECTOR};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "request.read_sizes",
        "reads of 512 bytes to 4 MiB, used.len is data + 1",
        read_sizes
    ),
    test!(
        "request.write_sizes",
        "writes of 512 bytes to 4 MiB, used.len is 1",
        write_sizes
    ),
    test!(
        "request.header_in_pieces",
        "the header cut in pieces of 1 to 15 bytes",
        header_in_pieces
    ),
    test!(
        "request.any_layout",
        "header, data, status cut and joined in many ways",
        any_layout
    ),
    test!(
        "request.one_byte_segments",
        "every byte a segment of its own",
        one_byte_segments
    ),
    test!(
        "request.odd_addresses",
        "buffers at odd addresses, read and written",
        odd_addresses
    ),
    test!(
        "request.empty_segments",
        "descriptors of no bytes in between",
        empty_segments
    ),
    test!(
        "request.indirect",
        "direct, indirect, and both in one chain",
        indirect
    ),
    test!(
        "request.indirect_write_flag",
        "the write flag of an indirect descriptor is ignored",
        indirect_write_flag
    ),
    test!(
        "request.over_256_pages",
        "chains of more pages than a bio has",
        over_256_pages
    ),
    test!(
        "request.megabytes",
        "chains of megabytes: every block at its place",
        megabytes
    ),
    test!(
        "request.aliased",
        "one buffer in 1000 descriptors of a chain",
        aliased
    ),
    test!(
        "request.read_then_write_aliased",
        "one buffer written from many descriptors",
        aliased_write
    ),
    test!(
        "request.zero_length",
        "reads and writes of nothing complete",
        zero_length
    ),
    test!(
        "request.flush",
        "flush, with and without data that it ignores",
        flush
    ),
    test!(
        "request.get_id",
        "GET_ID with buffers of 0 to 512 bytes",
        get_id
    ),
    test!(
        "request.last_sectors",
        "the disk's last sectors are there",
        last_sectors
    ),
    test!(
        "request.legacy",
        "without VERSION_1, without EVENT_IDX, without any feature",
        legacy
    ),
    test!(
        "request.index_wrap",
        "ring indices go around 65535",
        index_wrap
    ),
    test!(
        "request.event_idx",
        "calls exactly when the event index says so",
        event_idx
    ),
    test!(
        "request.no_event_idx",
        "calls unless the driver's flag says no",
        no_event_idx
    ),
    test!(
        "request.kicks_for_nothing",
        "kicks without anything new do no harm",
        kicks_for_nothing
    ),
    test!(
        "request.kicks_wanted",
        "an idle device always wants the next kick",
        kicks_wanted
    ),
    test!(
        "request.no_lost_notification",
        "20,000 requests, none of them waits for ever",
        300,
        no_lost_notification
    ),
    test!(
        "request.full_ring",
        "rings of 1 to 1024 descriptors, full",
        full_ring
    ),
    test!(
        "request.all_queues",
        "all virtqueues at once",
        120,
        all_queues
    ),
    test!(
        "request.many_unaligned",
        "a ring full of unaligned and long requests, among good ones",
        120,
        many_unaligned
    ),
    test!(
        "request.fairness",
        "a flooded queue leaves another one its turn",
        fairness
    ),
    test!(
        "request.failing_disk",
        "IOERR from the disk: used.len, the other requests, the queue",
        failing_disk
    ),
    test!(
        "request.durability",
        "flushes and FUA reach the disk when they have to",
        durability
    ),
    test!(
        "request.second_bio",
        "every bio of a long request has the right sector",
        second_bio
    ),
    test!(
        "request.host_cache",
        "what the host had cached or not written is seen",
        host_cache
    ),
];

/// What data is before a device writes to it.
const FILL: u8 = 0x5a;

/// Sectors of the disk's logical block.
pub(crate) fn block_sectors(context: &Context) -> Result<usize> {
    Ok((usize::try_from(context.info()?.logical_block_size)? / SECTOR).max(1))
}

fn read_sizes(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let block = block_sectors(context)?;
    for count in [
        1, 2, 3, 7, 8, 9, 16, 64, 128, 255, 256, 1000, 2048, 2056, 4096, 8192,
    ] {
        let count = count * block / block.min(8).min(count);
        let count = count.next_multiple_of(block).min(8192);
        for sector in [0, 8, 1024 + 8 * 3] {
            check::read(
                format_args!("{count} sectors at {sector}"),
                guest.queue(0),
                sector,
                count,
                &Shape::default(),
            )?;
        }
    }
    Ok(())
}

/// Writes from `sector` on, and looks past the host's cache and through the device.
fn write_and_check(
    context: &Context,
    guest: &mut Guest,
    what: &str,
    sector: u64,
    count: usize,
    shape: &Shape,
    seed: u64,
) -> Result<()> {
    let data = disk::seeded(seed, sector, count);
    check::write(what, guest.queue(0), sector, data.clone(), shape)?;
    let on_disk = context.direct()?.read(sector, count)?;
    check::same(format_args!("{what}: on the disk"), &on_disk, &data)?;
    let done = check::request(
        what,
        guest.queue(0),
        Request::read(sector, count * SECTOR),
        shape,
        Status::Ok,
        UsedLen::Full,
    )?;
    check::same(format_args!("{what}: read back"), &done.data, &data)
}

/// Reads what is there at `sector`, and writes and checks as many at the same place of what may be
/// written to.
fn read_and_write(
    context: &Context,
    guest: &mut Guest,
    what: &str,
    sector: u64,
    count: usize,
    shape: &Shape,
    seed: u64,
) -> Result<()> {
    check::read(
        format_args!("read, {what}"),
        guest.queue(0),
        sector,
        count,
        shape,
    )?;
    write_and_check(
        context,
        guest,
        &format!("write, {what}"),
        SCRATCH.0 + sector,
        count,
        shape,
        seed,
    )
}

fn write_sizes(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let block = block_sectors(context)?;
    for (seed, count) in [1, 2, 8, 9, 64, 255, 256, 1000, 2048, 2056, 4096, 8192]
        .into_iter()
        .enumerate()
    {
        let count = count.max(block).next_multiple_of(block);
        let sector = SCRATCH.0 + 8 * seed as u64;
        let beyond = sector + count as u64;
        let before = context.direct()?.read(beyond, 8)?;
        write_and_check(
            context,
            &mut guest,
            &format!("{count} sectors at {sector}"),
            sector,
            count,
            &Shape::default(),
            seed as u64,
        )?;
        check::same(
            format_args!("behind {count} sectors at {sector}"),
            &context.direct()?.read(beyond, 8)?,
            &before,
        )?;
    }
    Ok(())
}

/// Reads 8 sectors of the pattern, writes 8 to the scratch area, flushes, asks for the serial
/// number, all in this shape.
fn all_kinds(context: &Context, guest: &mut Guest, what: &str, shape: &Shape) -> Result<()> {
    context.step(what);
    check::read(format_args!("{what}: read"), guest.queue(0), 16, 8, shape)?;
    write_and_check(
        context,
        guest,
        &format!("{what}: write"),
        SCRATCH.0 + 64,
        8,
        shape,
        what.len() as u64,
    )?;
    for request in [Request::flush(), Request::get_id(20)] {
        let kind = request.kind;
        check::request(
            format_args!("{what}: {kind:?}"),
            guest.queue(0),
            request,
            shape,
            Status::Ok,
            UsedLen::Full,
        )?;
    }
    Ok(())
}

fn header_in_pieces(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for size in 1..16 {
        for table in [Table::Direct, Table::Indirect] {
            let shape = Shape::cut(Cut::Header(size)).table(table);
            all_kinds(
                context,
                &mut guest,
                &format!("pieces of {size}, {table:?}"),
                &shape,
            )?;
        }
    }
    Ok(())
}

fn any_layout(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let exact = |readable: &[usize], writable: &[usize]| Cut::Exact {
        readable: readable.to_vec(),
        writable: writable.to_vec(),
    };
    let cuts = [
        Cut::Usual,
        Cut::Joined,
        Cut::Data(512),
        Cut::Data(511),
        Cut::Data(1),
        Cut::Data(4095),
        Cut::Every(16),
        Cut::Every(17),
        Cut::Every(100),
        Cut::Every(513),
        exact(&[1, 15], &[1]),
        exact(&[15, 2, 511], &[511, 2]),
        exact(&[16 + 100], &[4095]),
        exact(&[3, 13 + 7], &[4094, 1]),
        exact(&[8, 8], &[2048, 2048]),
    ];
    for cut in cuts {
        for (align, offset) in [(512, 0), (4096, 4000), (1, 0), (4096, 4095)] {
            // Thousands of segments would be more than a chain can have.
            if cut == Cut::Data(1) {
                continue;
            }
            let shape = Shape::cut(cut.clone())
                .table(Table::Indirect)
                .at(align, offset);
            let what = format!("{cut:?} at {offset} of {align}");
            all_kinds(context, &mut guest, &what, &shape)?;
        }
    }
    Ok(())
}

fn one_byte_segments(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    let block = block_sectors(context)?;
    if block > 1 {
        return skip("a logical block has more bytes than a chain has segments");
    }
    for table in [Table::Direct, Table::Indirect, Table::After(100)] {
        for (align, gap) in [(1, 1), (1, 16), (64, 0)] {
            let shape = Shape {
                cut: Cut::Every(1),
                table,
                align,
                offset: 0,
                gap,
            };
            let what = format!("{table:?}, {align}-byte aligned, {gap} apart");
            read_and_write(context, &mut guest, &what, 5, 1, &shape, gap as u64)?;
        }
    }
    Ok(())
}

fn odd_addresses(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for offset in [1, 2, 3, 4, 8, 255, 256, 511] {
        for count in [8, 24, 2048] {
            let shape = Shape::cut(Cut::Usual).at(512, offset);
            let what = format!("{count} sectors, {offset} bytes off");
            read_and_write(context, &mut guest, &what, 8, count, &shape, offset as u64)?;
        }
    }
    Ok(())
}

fn empty_segments(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for (readable, writable) in [
        (vec![0, 16], vec![0, 4096]),
        (vec![8, 0, 8], vec![2048, 0, 2048]),
        (vec![0, 0, 0, 16, 0], vec![0, 0, 4096, 0, 1, 0]),
        (vec![16, 0], vec![4097, 0]),
    ] {
        let what = format!("{readable:?} {writable:?}");
        for table in [Table::Direct, Table::Indirect] {
            let cut = Cut::Exact {
                readable: readable.clone(),
                writable: writable.clone(),
            };
            all_kinds(context, &mut guest, &what, &Shape::cut(cut).table(table))?;
        }
    }
    Ok(())
}

fn indirect(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for table in [
        Table::Direct,
        Table::Indirect,
        Table::After(1),
        Table::After(2),
        Table::After(5),
    ] {
        let shape = Shape::cut(Cut::Data(512)).table(table);
        let what = format!("{table:?}");
        check::read(&what, guest.queue(0), 16, 8, &shape)?;
        write_and_check(context, &mut guest, &what, SCRATCH.0, 8, &shape, 3)?;
    }
    Ok(())
}

fn indirect_write_flag(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let memory = guest.memory().clone();
    for flags in [DESC_F_INDIRECT, DESC_F_INDIRECT | DESC_F_WRITE] {
        let area = memory.alloc(3 * PAGE_SIZE, PAGE_SIZE)?;
        area.fill(0)?;
        area.write(2 * PAGE_SIZE, &[0xee])?;
        let ring = &mut guest.queue(0).ring;
        let table = ring.indirect_table(&[
            Segment::readable(area.at(0), 16),
            Segment::writable(area.at(PAGE_SIZE), 4096),
            Segment::writable(area.at(2 * PAGE_SIZE), 1),
        ])?;
        let taken = ring.take(1)?;
        ring.write_descriptor(taken[0], Descriptor::new(table.addr().0, 48, flags, 0))?;
        ring.add_written(taken)?;
        ring.publish_and_kick()?;
        let used = ring.wait_used(PATIENCE)?;
        ensure!(used.len == 4097, "flags {flags:#x}: used.len {}", used.len);
        let status = area.read(2 * PAGE_SIZE, 1)?;
        ensure!(status == [0], "flags {flags:#x}: status {status:?}");
        check::same(
            format_args!("flags {flags:#x}"),
            &area.read(PAGE_SIZE, 4096)?,
            &disk::pattern(0, 8),
        )?;
    }
    // The next of an indirect descriptor without the flag has no meaning either.
    ensure!(DESC_F_NEXT == 1, "flag values");
    Ok(())
}

fn over_256_pages(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    for pages in [255, 256, 257, 300, 511, 512, 513, 1000] {
        // Pages that do not touch each other, so that each is a vector of its own.
        let apart = Shape {
            cut: Cut::Data(PAGE_SIZE),
            align: 2 * PAGE_SIZE.min(2048),
            offset: 0,
            gap: 1,
            table: Table::Indirect,
        };
        // Data that starts within a page takes one page more.
        let within = Shape::default().at(PAGE_SIZE, 512);
        for (how, shape) in [("apart", apart), ("within", within)] {
            let what = format!("{pages} pages, {how}");
            context.step(&what);
            check::read(
                format_args!("read, {what}"),
                guest.queue(0),
                8,
                8 * pages,
                &shape,
            )?;
            write_and_check(
                context,
                &mut guest,
                &format!("write, {what}"),
                SCRATCH.0 + 24,
                8 * pages,
                &shape,
                pages as u64,
            )?;
        }
    }
    Ok(())
}

fn megabytes(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    for (mib, piece) in [
        (1, 4096),
        (3, 8192),
        (4, 4096),
        (8, 65536),
        (12, 1 << 20),
        (12, 12 << 20),
    ] {
        let count = mib << 11;
        let shape = Shape {
            cut: Cut::Data(piece),
            align: 512,
            gap: 16,
            offset: 0,
            table: Table::Indirect,
        };
        let what = format!("{mib} MiB in pieces of {piece}");
        context.step(&what);
        check::read(
            format_args!("read of {what}"),
            guest.queue(0),
            0,
            count,
            &shape,
        )?;
        write_and_check(
            context,
            &mut guest,
            &format!("write of {what}"),
            SCRATCH.0,
            count,
            &shape,
            mib as u64,
        )?;
    }
    Ok(())
}

fn aliased(context: &Context) -> Result<()> {
    let capacity = context.info()?.capacity;
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    let memory = guest.memory().clone();
    let header = memory.alloc(PAGE_SIZE, PAGE_SIZE)?;
    let piece = memory.alloc(1 << 20, PAGE_SIZE)?;
    let mib = usize::try_from(capacity >> 11)?.min(1000);
    for (count, good) in [
        (16, true),
        (mib, true),
        (1000, capacity >= 1000 << 11),
        (1021, capacity >= 1021 << 11),
    ] {
        context.step(format_args!("{count} times 1 MiB"));
        header.fill(0)?;
        header.write(16, &[0xee])?;
        piece.fill(0)?;
        let mut segments = vec![Segment::readable(header.addr(), 16)];
        segments.extend(vec![Segment::writable(piece.addr(), 1 << 20); count]);
        segments.push(Segment::writable(header.at(16), 1));
        let ring = &mut guest.queue(0).ring;
        ring.add(&segments, Table::Direct)?;
        ring.publish_and_kick()?;
        let used = ring.wait_used(PATIENCE * 2)?;
        let status = header.read(16, 1)?;
        let len = if good {
            (u32::try_from(count)? << 20) + 1
        } else {
            0
        };
        ensure!(
            status == [u8::from(!good)] && used.len == len,
            "{count} times 1 MiB of {} MiB: status {status:?}, used.len {} of {len}",
            capacity >> 11,
            used.len
        );
        if count == 16 {
            // Bios may complete in any order, but each byte comes from its place in some MiB.
            let got = piece.read(0, 1 << 20)?;
            let places: Vec<_> = (0..16u64)
                .map(|n| disk::pattern(n << 11, 1 << 11))
                .collect();
            for block in (0..1 << 20).step_by(4096) {
                let range = block..block + 4096;
                ensure!(
                    places
                        .iter()
                        .any(|place| place[range.clone()] == got[range.clone()]),
                    "the block at {block} is from no MiB that was read"
                );
            }
        }
    }
    check::healthy("afterwards", &mut guest, 0)
}

fn aliased_write(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    let memory = guest.memory().clone();
    let header = memory.alloc(PAGE_SIZE, PAGE_SIZE)?;
    let piece = memory.alloc(8192, PAGE_SIZE)?;
    let data = disk::seeded(77, 0, 16);
    piece.write(0, &data)?;
    let sector = SCRATCH.0;
    header.fill(0)?;
    header.write(0, &1u32.to_le_bytes())?;
    header.write(8, &sector.to_le_bytes())?;
    header.write(16, &[0xee])?;
    let count = 1000;
    let mut segments = vec![Segment::readable(header.addr(), 16)];
    segments.extend(vec![Segment::readable(piece.addr(), 8192); count]);
    segments.push(Segment::writable(header.at(16), 1));
    let ring = &mut guest.queue(0).ring;
    ring.add(&segments, Table::Direct)?;
    ring.publish_and_kick()?;
    let used = ring.wait_used(PATIENCE)?;
    let status = header.read(16, 1)?;
    ensure!(
        status == [0] && used.len == 1,
        "status {status:?}, used.len {}",
        used.len
    );
    let on_disk = context.direct()?.read(sector, 16 * count)?;
    for (n, block) in on_disk.chunks(8192).enumerate() {
        check::same(format_args!("copy {n}"), block, &data)?;
    }
    Ok(())
}

fn zero_length(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for request in [Request::read(0, 0), Request::write(SCRATCH.0, Vec::new())] {
        for table in [Table::Direct, Table::Indirect] {
            for _ in 0..3 {
                check::request(
                    format_args!("{:?} of nothing", request.kind),
                    guest.queue(0),
                    request.clone(),
                    &Shape::default().table(table),
                    Status::Ok,
                    UsedLen::Full,
                )?;
            }
        }
    }
    // A flush behind them does not wait for anything.
    check::request(
        "flush",
        guest.queue(0),
        Request::flush(),
        &Shape::default(),
        Status::Ok,
        UsedLen::Full,
    )?;
    guest.stop()?;
    Ok(())
}

fn flush(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let mut garbage = Request::flush();
    garbage.sector = u64::MAX;
    let mut with_out = Request::flush();
    with_out.out = vec![1; 1000];
    for (what, request) in [
        ("usual", Request::flush()),
        ("with a sector", garbage),
        ("with data that is read", with_out),
    ] {
        check::request(
            format_args!("flush {what}"),
            guest.queue(0),
            request,
            &Shape::default(),
            Status::Ok,
            UsedLen::Full,
        )?;
    }
    let mut with_in = Request::flush();
    with_in.in_len = 512;
    let done = check::request(
        "flush with data that is written",
        guest.queue(0),
        with_in,
        &Shape::default(),
        Status::Ok,
        UsedLen::Failed,
    )?;
    ensure!(done.untouched, "flush wrote to its data");
    // Between writes.
    let queue = guest.queue(0);
    for n in 0..20u64 {
        queue.submit(
            Request::write(SCRATCH.0 + 8 * n, disk::seeded(5, SCRATCH.0 + 8 * n, 8)),
            &Shape::default(),
        )?;
        queue.submit(Request::flush(), &Shape::default())?;
    }
    queue.kick()?;
    for done in queue.wait_all(PATIENCE)? {
        check::outcome("writes and flushes", &done, Status::Ok, UsedLen::Full)?;
    }
    check::same(
        "after writes and flushes",
        &context.direct()?.read(SCRATCH.0, 160)?,
        &disk::seeded(5, SCRATCH.0, 160),
    )
}

fn get_id(context: &Context) -> Result<()> {
    let serial = *b"0123456789abcdefghij";
    let mut guest = context.started(|options| options.serial = Some(serial))?;
    for len in [0usize, 1, 2, 19, 20, 21, 22, 512] {
        for table in [Table::Direct, Table::Indirect] {
            // The status counts only if nothing before it was left out.
            let used_len = if len <= 20 { len + 1 } else { 20 };
            let done = check::request(
                format_args!("GET_ID with {len} bytes"),
                guest.queue(0),
                Request::get_id(len),
                &Shape::default().table(table),
                Status::Ok,
                UsedLen::Is(u32::try_from(used_len)?),
            )?;
            let end = len.min(20);
            ensure!(
                done.data[..end] == serial[..end],
                "GET_ID with {len} bytes: {:?}",
                &done.data[..end]
            );
            ensure!(
                done.data[end..].iter().all(|&byte| byte == FILL),
                "GET_ID with {len} bytes wrote beyond 20"
            );
        }
    }
    for size in [1, 3, 7] {
        let done = check::request(
            format_args!("GET_ID in pieces of {size}"),
            guest.queue(0),
            Request::get_id(20),
            &Shape::cut(Cut::Every(size)).at(1, 0),
            Status::Ok,
            UsedLen::Full,
        )?;
        ensure!(done.data == serial, "GET_ID in pieces: {:?}", done.data);
    }
    Ok(())
}

fn last_sectors(context: &Context) -> Result<()> {
    let capacity = context.info()?.capacity;
    let mut guest = context.started(|_| {})?;
    for count in [8, 64, 2048] {
        let sector = (capacity - count as u64) / 8 * 8;
        let end = usize::try_from(capacity - sector)?;
        let block = block_sectors(context)?;
        for len in [count, end / block * block] {
            let what = format!("{len} sectors at {sector} of {capacity}");
            let done = check::request(
                &what,
                guest.queue(0),
                Request::read(sector, len * SECTOR),
                &Shape::default(),
                Status::Ok,
                UsedLen::Full,
            )?;
            check::same(
                what,
                &done.data[..count * SECTOR],
                &context.direct()?.read(sector, count)?,
            )?;
        }
    }
    Ok(())
}

fn legacy(context: &Context) -> Result<()> {
    let all = context.options().features;
    for (what, features) in [
        ("no VERSION_1", all & !feature::VERSION_1),
        ("no EVENT_IDX", all & !feature::EVENT_IDX),
        ("neither", all & !(feature::VERSION_1 | feature::EVENT_IDX)),
        ("no features", 0),
        ("VERSION_1 alone", feature::VERSION_1),
        ("NOTIFY_ON_EMPTY", feature::NOTIFY_ON_EMPTY),
        // Both ask more of user space than to be acknowledged.
        (
            "all but RO",
            !(feature::RO | feature::ACCESS_PLATFORM | feature::LOG_ALL),
        ),
    ] {
        let mut guest = context.started(|options| options.features = features)?;
        all_kinds(context, &mut guest, what, &Shape::default())?;
    }
    Ok(())
}

fn index_wrap(context: &Context) -> Result<()> {
    for (size, base) in [(16u16, 65535u16), (64, 65500), (1024, 65000), (2, 65534)] {
        for event_idx in [true, false] {
            let mut guest = context.started(|options| {
                options.queue_size = size;
                options.base = base;
                if !event_idx {
                    options.features &= !feature::EVENT_IDX;
                }
            })?;
            for n in 0..(2 * u64::from(size)).min(100) {
                check::read(
                    format_args!("ring of {size} from {base}, read {n}"),
                    guest.queue(0),
                    8 * n,
                    8,
                    &Shape::default().table(Table::Indirect),
                )?;
            }
            let bases = guest.stop()?;
            let used = guest.queue(0).ring.used_idx()?;
            ensure!(bases == [used], "stopped at {bases:?}, used index {used}");
            guest.resume(context.disk()?, &bases)?;
            for n in 0..u64::from(size).min(20) {
                check::read(
                    format_args!("ring of {size}, resumed at {used}, read {n}"),
                    guest.queue(0),
                    8 * n,
                    8,
                    &Shape::default().table(Table::Indirect),
                )?;
            }
        }
    }
    Ok(())
}

/// Publishes a read without any wish for a call, and waits until it is used.
fn quiet_read(guest: &mut Guest) -> Result<()> {
    let queue = guest.queue(0);
    let used = queue.ring.used_idx()?;
    queue.submit(Request::read(0, 4096), &Shape::default())?;
    queue.kick()?;
    let deadline = Instant::now() + PATIENCE;
    while queue.ring.used_idx()? == used {
        ensure!(Instant::now() < deadline, "no used entry");
        thread::sleep(Duration::from_micros(200));
    }
    ensure!(queue.poll()?.is_some(), "no used entry");
    Ok(())
}

fn event_idx(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    ensure!(guest.queue(0).ring.event_idx(), "EVENT_IDX is not on offer");
    check::healthy("before", &mut guest, 0)?;
    for ahead in [0u16, 1, 3, 10] {
        // From its used index on, the driver wants to hear of entry `ahead`.
        guest.queue(0).ring.wait_call(Duration::ZERO)?;
        let event = guest.queue(0).ring.last_used().wrapping_add(ahead);
        guest.queue(0).ring.set_used_event(event)?;
        // The other switch has no meaning here.
        guest.queue(0).ring.set_avail_flags(1)?;
        for n in 0..ahead {
            quiet_read(&mut guest)?;
            ensure!(
                !guest.queue(0).ring.wait_call(QUIET / 5)?,
                "a call for entry {n}, the event index is {ahead} ahead"
            );
        }
        quiet_read(&mut guest)?;
        ensure!(
            guest.queue(0).ring.wait_call(PATIENCE)?,
            "no call for entry {ahead}, which the event index asks for"
        );
        for _ in 0..3 {
            quiet_read(&mut guest)?;
        }
        ensure!(
            !guest.queue(0).ring.wait_call(QUIET)?,
            "calls after the event index was passed"
        );
        guest.queue(0).ring.set_avail_flags(0)?;
    }
    Ok(())
}

fn no_event_idx(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.features &= !feature::EVENT_IDX)?;
    for round in 0..3 {
        guest.queue(0).ring.set_avail_flags(1)?;
        guest.queue(0).ring.wait_call(Duration::ZERO)?;
        for _ in 0..5 {
            quiet_read(&mut guest)?;
        }
        ensure!(
            !guest.queue(0).ring.wait_call(QUIET)?,
            "round {round}: a call although the driver wants none"
        );
        guest.queue(0).ring.set_avail_flags(0)?;
        quiet_read(&mut guest)?;
        ensure!(
            guest.queue(0).ring.wait_call(PATIENCE)?,
            "round {round}: no call although the driver wants one"
        );
    }
    Ok(())
}

fn kicks_for_nothing(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queues = 2)?;
    for _ in 0..1000 {
        guest.queue(0).ring.kick()?;
    }
    check::healthy("after kicks for nothing", &mut guest, 0)?;
    for n in 0..100 {
        guest.queue(0).ring.kick()?;
        check::read(n, guest.queue(0), 8, 8, &Shape::default())?;
        guest.queue(0).ring.kick()?;
    }
    ensure!(
        !guest.queue(0).ring.wait_err(Duration::ZERO)?,
        "the error eventfd was signalled"
    );
    check::healthy("other queue", &mut guest, 1)
}

fn kicks_wanted(context: &Context) -> Result<()> {
    for event_idx in [true, false] {
        let mut guest = context.started(|options| {
            if !event_idx {
                options.features &= !feature::EVENT_IDX;
            }
        })?;
        for n in 0..200 {
            let queue = guest.queue(0);
            queue.submit(Request::read(0, 4096), &Shape::default())?;
            // It has to say so some time after it became idle.
            let mut wanted = queue.ring.publish()?;
            for _ in 0..100 {
                if wanted || queue.ring.used_idx()? != queue.ring.last_used() {
                    break;
                }
                thread::sleep(Duration::from_millis(1));
                wanted = queue.ring.publish()?;
            }
            if wanted {
                queue.ring.kick()?;
            }
            let done = queue
                .wait(PATIENCE)
                .with_context(|| format!("request {n}, kick wanted: {wanted}"))?;
            check::outcome(n, &done, Status::Ok, UsedLen::Full)?;
        }
    }
    Ok(())
}

fn no_lost_notification(context: &Context) -> Result<()> {
    for event_idx in [true, false] {
        let mut guest = context.started(|options| {
            if !event_idx {
                options.features &= !feature::EVENT_IDX;
            }
        })?;
        let queue = guest.queue(0);
        let mut submitted = 0u64;
        let mut finished = 0;
        while finished < 10_000 {
            // From 1 to 32 at once, kicked in one or two goes, and not all are waited for.
            let batch = submitted * 7919 % 32 + 1;
            for n in 0..batch {
                queue.submit(
                    Request::read((submitted * 8) % 16384, 4096),
                    &Shape::default(),
                )?;
                submitted += 1;
                if n == batch / 2 {
                    queue.kick()?;
                }
            }
            queue.kick()?;
            while queue.in_flight() > 20 {
                let done = queue
                    .wait(PATIENCE)
                    .with_context(|| format!("{finished} requests done"))?;
                check::outcome(finished, &done, Status::Ok, UsedLen::Full)?;
                finished += 1;
            }
        }
        for done in queue.wait_all(PATIENCE)? {
            check::outcome("one of the last", &done, Status::Ok, UsedLen::Full)?;
        }
    }
    Ok(())
}

fn full_ring(context: &Context) -> Result<()> {
    for size in [1u16, 2, 8, 64, 256, 1024] {
        for table in [Table::Indirect, Table::Direct] {
            if table == Table::Direct && size < 4 {
                continue;
            }
            context.step(format_args!("ring of {size}, {table:?}"));
            let mut guest = context.started(|options| options.queue_size = size)?;
            for round in 0..3 {
                let queue = guest.queue(0);
                let mut count = 0u64;
                loop {
                    let request = Request::read(8 * (count % 2048), 4096);
                    match queue.submit(request, &Shape::default().table(table)) {
                        Ok(_) => count += 1,
                        Err(vhost_blk_ring::Error::RingFull { .. }) => break,
                        Err(e) => return Err(e.into()),
                    }
                }
                let expected = match table {
                    Table::Direct => u64::from(size / 3),
                    _ => u64::from(size),
                };
                ensure!(count == expected, "{count} requests fill a ring of {size}");
                queue.kick()?;
                for done in queue.wait_all(PATIENCE)? {
                    let what = format!("ring of {size}, {table:?}, round {round}");
                    check::outcome(&what, &done, Status::Ok, UsedLen::Full)?;
                    check::same(&what, &done.data, &disk::pattern(done.request.sector, 8))?;
                }
            }
        }
    }
    Ok(())
}

fn all_queues(context: &Context) -> Result<()> {
    let count = context.device()?.info(None)?.max_virtqueues;
    for workers in [Workers::Shared, Workers::PerQueue] {
        let options = Options {
            queues: count,
            queue_size: 16,
            workers,
            ..context.options()
        };
        let mut guest = Guest::new(&options)?;
        guest.start(context.disk()?)?;
        context.step(format_args!("{count} queues, {workers:?}"));
        for round in 0..10u64 {
            for (n, queue) in (0u64..).zip(guest.queues()) {
                for k in 0..4 {
                    queue.submit(
                        Request::read(8 * (n + 64 * k + round), 4096),
                        &Shape::default(),
                    )?;
                }
            }
            for queue in guest.queues() {
                queue.kick()?;
            }
            for (n, queue) in guest.queues().iter_mut().enumerate() {
                for done in queue.wait_all(PATIENCE)? {
                    let what = format!("queue {n} of {count}, {workers:?}");
                    check::outcome(&what, &done, Status::Ok, UsedLen::Full)?;
                    check::same(&what, &done.data, &disk::pattern(done.request.sector, 8))?;
                }
            }
        }
        guest.stop()?;
    }
    Ok(())
}

/// The bios that reach a disk, from the block layer's trace point.
struct Trace {
    instance: PathBuf,
}

impl Trace {
    /// Starts tracing the bios of a disk. Without tracefs, the test is skipped.
    fn start(context: &Context) -> Result<Self> {
        let instance = PathBuf::from(format!(
            "/sys/kernel/tracing/instances/vhost-blk-{}",
            std::process::id()
        ));
        if let Err(e) = fs::create_dir(&instance) {
            return skip(format!("no tracefs: {}: {e}", instance.display()));
        }
        let trace = Trace { instance };
        let event = trace.instance.join("events/block/block_bio_queue");
        let numbers = fs::read_to_string(disk::sysfs(context.disk_path())?.join("dev"))?;
        let (major, minor) = numbers.trim().split_once(':').context("no device number")?;
        let dev = (major.parse::<u32>()? << 20) | minor.parse::<u32>()?;
        fs::write(event.join("filter"), format!("dev == {dev}"))?;
        fs::write(event.join("enable"), "1")?;
        Ok(trace)
    }

    /// The bios since the last call: operation and flags, sector, and length in sectors.
    fn bios(&self) -> Result<Vec<(String, u64, u64)>> {
        let file = self.instance.join("trace");
        let text = fs::read_to_string(&file)?;
        fs::write(&file, "")?;
        let mut bios = Vec::new();
        for line in text.lines() {
            // … block_bio_queue: 252,0 WS 32768 + 8 [comm]
            let Some((_, rest)) = line.split_once("block_bio_queue: ") else {
                continue;
            };
            let words: Vec<_> = rest.split_whitespace().collect();
            let &[_, flags, sector, "+", count, ..] = words.as_slice() else {
                bail!("trace: {line}");
            };
            bios.push((flags.to_owned(), sector.parse()?, count.parse()?));
        }
        Ok(bios)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let enable = self.instance.join("events/block/block_bio_queue/enable");
        // What is left over is in the way of nobody, and a test has ended already.
        if fs::write(enable, "0").is_ok() {
            let _ = fs::remove_dir(&self.instance);
        }
    }
}

fn durability(context: &Context) -> Result<()> {
    let trace = Trace::start(context)?;
    let cache = fs::read_to_string(disk::queue_sysfs(context.disk_path())?.join("write_cache"))?;
    if cache.trim() != "write back" {
        return skip("the disk has no write cache: the block layer drops flushes and FUA");
    }
    let flushless = context.options().features & !(feature::FLUSH | feature::CONFIG_WCE);
    let usual = context.options().features;
    for (what, features, writeback, stable) in [
        ("writeback", usual, None, false),
        ("writeback on", usual, Some(true), false),
        ("writeback off", usual, Some(false), true),
        ("no FLUSH", flushless, None, true),
        ("no FLUSH, writeback on", flushless, Some(true), true),
    ] {
        let mut guest = context.guest(|options| options.features = features)?;
        if let Some(writeback) = writeback {
            guest.device().set_writeback(writeback)?;
        }
        guest.start(context.disk()?)?;
        trace.bios()?;
        let data = disk::seeded(9, SCRATCH.0, 8);
        check::write(what, guest.queue(0), SCRATCH.0, data, &Shape::default())?;
        let bios = trace.bios()?;
        let write = bios
            .iter()
            .find(|(flags, sector, count)| {
                *sector == SCRATCH.0 && *count == 8 && flags.contains('W')
            })
            .with_context(|| format!("{what}: no write among {bios:?}"))?;
        // The letter after the operation is FUA, or else a flush has to follow before it is complete.
        let fua = write
            .0
            .split_once('W')
            .is_some_and(|(_, after)| after.contains('F'));
        let flushed = bios
            .iter()
            .any(|(flags, _, count)| flags.starts_with('F') && *count == 0);
        ensure!(
            (fua || flushed) == stable,
            "{what}: bios of a write: {bios:?}, stable when complete: {stable}"
        );
        check::request(
            what,
            guest.queue(0),
            Request::flush(),
            &Shape::default(),
            Status::Ok,
            UsedLen::Full,
        )?;
        let bios = trace.bios()?;
        ensure!(
            stable || bios.iter().any(|(flags, _, _)| flags.starts_with('F')),
            "{what}: bios of a flush: {bios:?}"
        );
        // The switch holds from the next request on.
        if features & feature::FLUSH != 0 {
            for writeback in [false, true, false] {
                guest.device().set_writeback(writeback)?;
                let data = disk::seeded(10, SCRATCH.0, 8);
                check::write(what, guest.queue(0), SCRATCH.0, data, &Shape::default())?;
                let bios = trace.bios()?;
                let stable = bios.iter().any(|(flags, _, _)| flags.contains('F'));
                ensure!(
                    stable != writeback,
                    "{what}, switched to {writeback}: bios of a write: {bios:?}"
                );
            }
        }
    }
    Ok(())
}

fn second_bio(context: &Context) -> Result<()> {
    let trace = Trace::start(context)?;
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    for (what, count, piece) in [
        ("600 pages apart", 8 * 600, 4096),
        ("2 MiB in one piece", 4096, 2 << 20),
        ("600 pages, not aligned", 8 * 600, 4096 - 512),
    ] {
        trace.bios()?;
        let shape = Shape {
            cut: Cut::Data(piece),
            table: Table::Indirect,
            align: 512,
            offset: 0,
            gap: 512,
        };
        check::read(what, guest.queue(0), 40, count, &shape)?;
        let mut bios = trace.bios()?;
        bios.retain(|(flags, _, _)| flags.starts_with('R'));
        bios.sort_by_key(|(_, sector, _)| *sector);
        let mut next = 40;
        for (flags, sector, len) in &bios {
            // Bios that the block layer splits are traced again, whole and in parts.
            ensure!(
                *sector <= next,
                "{what}: nothing reads sector {next}: {bios:?}"
            );
            ensure!(
                *len > 0 && !flags.is_empty(),
                "{what}: an empty read: {bios:?}"
            );
            next = next.max(sector + len);
        }
        ensure!(
            next == 40 + count as u64,
            "{what}: reads up to sector {next} of {}: {bios:?}",
            40 + count
        );
    }
    Ok(())
}

fn host_cache(context: &Context) -> Result<()> {
    use std::os::unix::fs::FileExt;
    // Through the host's cache, written but not on the disk, and read before.
    let host = context.disk()?;
    let sector = SCRATCH.0 + 2048;
    let at = sector * SECTOR as u64;
    let written = disk::seeded(20, sector, 64);
    host.write_all_at(&written, at)?;
    let mut guest = context.started(|_| {})?;
    let done = check::request(
        "read of what the host wrote",
        guest.queue(0),
        Request::read(sector, 64 * SECTOR),
        &Shape::default(),
        Status::Ok,
        UsedLen::Full,
    )?;
    check::same("what the host wrote", &done.data, &written)?;
    // The host's cache does not overwrite the guest's data later.
    let newer = disk::seeded(21, sector, 64);
    check::write(
        "write",
        guest.queue(0),
        sector,
        newer.clone(),
        &Shape::default(),
    )?;
    host.sync_all()?;
    check::same(
        "what the guest wrote, after a sync of the host",
        &context.direct()?.read(sector, 64)?,
        &newer,
    )
}

/// A request of a kind that needs more than one bio, or a copy, or both, by number; and its shape.
pub(crate) fn demanding(number: u64) -> (Request, Shape) {
    let count = [8, 16, 64, 520, 1032, 2048][usize::try_from(number % 6).unwrap_or(0)];
    let offset = [1, 0, 3, 511, 8][usize::try_from(number % 5).unwrap_or(0)];
    let sector = 2048 * (number % 4);
    let request = if number % 3 == 0 {
        let sector = 16384 + 2048 * (number % 8);
        Request::write(sector, disk::seeded(number, sector, count))
    } else {
        Request::read(sector, count * SECTOR)
    };
    (request, Shape::default().at(512, offset))
}

fn many_unaligned(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| {
        options.queues = 2;
        options.memory = 256 << 20;
    })?;
    for round in 0..4u64 {
        context.step(format_args!("round {round}"));
        for (number, queue) in (0u64..).zip(guest.queues()) {
            for n in 0..60 {
                // Each queue writes to its own half, and no two requests to one place.
                let (mut request, shape) = demanding(n + round);
                if request.kind == Kind::Out {
                    let count = request.out.len().min(64 * SECTOR);
                    request.sector = SCRATCH.0 + 64 * (n + 64 * number);
                    request.out = disk::seeded(round, request.sector, count / SECTOR);
                }
                queue.submit(request, &shape)?;
            }
            queue.kick()?;
        }
        for queue in guest.queues() {
            for done in queue.wait_all(PATIENCE)? {
                let what = format!(
                    "round {round}: {:?} at {}",
                    done.request.kind, done.request.sector
                );
                check::outcome(&what, &done, Status::Ok, UsedLen::Full)?;
                if done.request.kind == Kind::In {
                    let count = done.data.len() / SECTOR;
                    check::same(
                        &what,
                        &done.data,
                        &disk::pattern(done.request.sector, count),
                    )?;
                } else {
                    let count = done.request.out.len() / SECTOR;
                    let on_disk = context.direct()?.read(done.request.sector, count)?;
                    check::same(&what, &on_disk, &done.request.out)?;
                }
            }
        }
    }
    Ok(())
}

fn fairness(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queues = 2)?;
    let memory = guest.memory().clone();
    let (flood, other) = guest.queues().split_at_mut(1);
    let (flood, other) = (&mut flood[0], &mut other[0]);
    let stop = AtomicBool::new(false);
    let (slowest, served) = thread::scope(|scope| -> Result<(Duration, u32)> {
        let flooding = scope.spawn(|| -> Result<u64> {
            // All in the same memory: a MiB each, as many as the ring takes.
            let header = memory.alloc(PAGE_SIZE, PAGE_SIZE)?;
            header.fill(0)?;
            let data = memory.alloc(1 << 20, PAGE_SIZE)?;
            let chain = [
                Segment::readable(header.addr(), 16),
                Segment::writable(data.addr(), 1 << 20),
                Segment::writable(header.at(16), 1),
            ];
            let mut finished = 0;
            while !stop.load(Ordering::Relaxed) {
                while flood.ring.free_descriptors() >= chain.len() {
                    flood.ring.add(&chain, Table::Direct)?;
                }
                flood.ring.publish_and_kick()?;
                while flood.ring.pop_used()?.is_some() {
                    finished += 1;
                }
            }
            while flood.ring.in_flight() > 0 {
                flood.ring.wait_used(PATIENCE)?;
            }
            Ok(finished)
        });
        let begin = Instant::now();
        let mut slowest = Duration::ZERO;
        let mut served = 0;
        let mut result = Ok(());
        while result.is_ok() && begin.elapsed() < Duration::from_secs(4) {
            let submitted = Instant::now();
            result = check::read("a read beside a flood", other, 8, 8, &Shape::default());
            slowest = slowest.max(submitted.elapsed());
            served += 1;
        }
        stop.store(true, Ordering::Relaxed);
        let Ok(flooded) = flooding.join() else {
            bail!("a thread panicked");
        };
        let flooded = flooded?;
        result?;
        ensure!(flooded > 50, "{flooded} requests are no flood");
        Ok((slowest, served))
    })?;
    context.note(format_args!(
        "{served} reads beside the flood, the slowest took {} ms",
        slowest.as_millis()
    ));
    // A queue that is starved waits for as long as the flood lasts, which is until it is served.
    ensure!(
        served > 0 && slowest < PATIENCE / 2,
        "{served} reads in 4 s, the slowest took {} ms",
        slowest.as_millis()
    );
    Ok(())
}

fn failing_disk(context: &Context) -> Result<()> {
    let bad_disk = context.bad_disk()?;
    let mut guest = context.guest(|options| options.queue_size = 1024)?;
    let capacity = guest.device().info(Some(bad_disk.as_fd()))?.capacity;
    guest.start(&bad_disk)?;
    let half = capacity / 2;
    let data = disk::seeded(40, 0, 2048);
    check::write(
        "the good half",
        guest.queue(0),
        0,
        data.clone(),
        &Shape::default(),
    )?;
    for offset in [0, 1] {
        let shape = Shape::default().at(512, offset);
        for (what, sector, count) in [
            ("the bad half", half, 8),
            ("the bad half, long", half, 2048),
            ("the last sectors", capacity - 8, 8),
            ("both halves", half - 8, 16),
            ("both halves, long", half - 2048, 4096),
            ("the bad half's first block alone", half - 1016, 1024),
        ] {
            for request in [
                Request::read(sector, count * SECTOR),
                Request::write(sector, vec![1; count * SECTOR]),
            ] {
                let done = guest.queue(0).run(request, &shape, PATIENCE)?;
                let kind = done.request.kind;
                let what = format!("{kind:?} of {what}, {offset} bytes off");
                ensure!(
                    done.status == Status::IoErr,
                    "{what}: status {:?}",
                    done.status
                );
                // What was read before the failure may be told, never more.
                let limit = usize::try_from(half.saturating_sub(sector))? * SECTOR;
                let told = usize::try_from(done.used_len)?;
                if kind == Kind::In {
                    ensure!(
                        told <= limit,
                        "{what}: used.len {told}, {limit} can be read"
                    );
                } else {
                    ensure!(told == 1, "{what}: used.len {told}");
                }
                ensure!(done.stray_write.is_none(), "{what}: stray write");
            }
        }
    }
    // Among good ones, each gets its own status.
    let queue = guest.queue(0);
    for n in 0..60 {
        let sector = if n % 2 == 0 { 8 * n } else { half + 8 * n };
        queue.submit(Request::read(sector, 4096), &Shape::default())?;
    }
    queue.kick()?;
    for done in queue.wait_all(PATIENCE)? {
        let good = done.request.sector < half;
        let (status, used_len) = if good {
            (Status::Ok, UsedLen::Full)
        } else {
            (Status::IoErr, UsedLen::Failed)
        };
        check::outcome(
            format_args!("read at {}", done.request.sector),
            &done,
            status,
            used_len,
        )?;
    }
    let done = check::request(
        "the good half afterwards",
        guest.queue(0),
        Request::read(0, 1 << 20),
        &Shape::default(),
        Status::Ok,
        UsedLen::Full,
    )?;
    check::same("the good half afterwards", &done.data, &data)
}
