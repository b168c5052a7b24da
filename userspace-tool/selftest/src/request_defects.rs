// SPDX-License-Identifier: GPL-2.0

//! Requests that have to fail, and how.
//!
//! The queue goes on: they are no defects of the ring.

use std::time::Duration;

use anyhow::{Result, ensure};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{
    Cut, Guest, GuestAddress, Kind, Protection, Request, Segment, Shape, Status, Table,
};

use crate::check::{self, UsedLen};
use crate::context::{Context, PATIENCE, Test, skip, test};
use crate::disk::{self, SCRATCH, SECTOR};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "refused.unknown_types",
        "UNSUPP for types that are not on offer",
        unknown_types
    ),
    test!(
        "refused.short_header",
        "IOERR for a header of 0 to 15 bytes",
        short_header
    ),
    test!(
        "refused.lengths",
        "IOERR for lengths that are no multiple of a block",
        lengths
    ),
    test!(
        "refused.beyond_capacity",
        "IOERR beyond the end of the disk",
        beyond_capacity
    ),
    test!(
        "refused.sector_overflow",
        "IOERR for sectors whose byte offset overflows",
        sector_overflow
    ),
    test!(
        "refused.length_overflow",
        "IOERR for lengths of more than 4 GiB",
        length_overflow
    ),
    test!(
        "refused.sector_alignment",
        "IOERR for sectors within a logical block",
        sector_alignment
    ),
    test!(
        "refused.read_only_fd",
        "IOERR for writes to a disk opened read-only",
        read_only_fd
    ),
    test!(
        "refused.read_only_feature",
        "IOERR for writes with RO acknowledged",
        read_only_feature
    ),
    test!(
        "refused.data_inaccessible",
        "IOERR for data in a PROT_NONE page",
        data_inaccessible
    ),
    test!(
        "refused.data_unwritable",
        "IOERR for a read into a read-only page",
        data_unwritable
    ),
    test!(
        "refused.header_inaccessible",
        "IOERR for a header in a PROT_NONE page",
        header_inaccessible
    ),
    test!(
        "refused.partly_inaccessible",
        "IOERR, or what is before stays, for a page in between",
        partly_inaccessible
    ),
    test!(
        "refused.wrong_way",
        "a read with data to read from, a write with data to write to",
        wrong_way
    ),
    test!(
        "refused.in_a_batch",
        "refused requests among good ones",
        in_a_batch
    ),
];

/// Does a request that has to be refused: nothing is written but the status.
fn refused(what: &str, guest: &mut Guest, request: Request, status: Status) -> Result<()> {
    for table in [Table::Direct, Table::Indirect] {
        let done = check::request(
            what,
            guest.queue(0),
            request.clone(),
            &Shape::default().table(table),
            status,
            UsedLen::Failed,
        )?;
        ensure!(done.untouched, "{what}: data was written");
    }
    Ok(())
}

/// The queue goes on, and is not broken.
fn goes_on(guest: &mut Guest) -> Result<()> {
    check::healthy("afterwards", guest, 0)?;
    ensure!(
        !guest.queue(0).ring.wait_err(Duration::ZERO)?,
        "the error eventfd was signalled"
    );
    Ok(())
}

fn unknown_types(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let known = [0, 1, 4, 8, 11, 13, 14];
    let types = (2..64u32)
        .chain([
            255,
            256,
            0x7fff_ffff,
            0x8000_0000,
            0x8000_0001,
            u32::MAX - 1,
            u32::MAX,
        ])
        .chain((8..31).map(|bit| 1 << bit))
        // With the right number in the upper half, and legacy's barrier.
        .chain([0x0001_0000, 0x0100_0000, 0x8000_0004, 0x8000_0008])
        .filter(|number| !known.contains(number));
    for number in types {
        let what = format!("type {number:#x}");
        let data = vec![0; 512];
        refused(
            &what,
            &mut guest,
            Request::other(number, 0, Vec::new(), 0),
            Status::Unsupported,
        )?;
        refused(
            &what,
            &mut guest,
            Request::other(number, 0, data.clone(), 0),
            Status::Unsupported,
        )?;
        refused(
            &what,
            &mut guest,
            Request::other(number, 0, Vec::new(), 512),
            Status::Unsupported,
        )?;
        refused(
            &what,
            &mut guest,
            Request::other(number, u64::MAX, data, 7),
            Status::Unsupported,
        )?;
    }
    goes_on(&mut guest)
}

fn short_header(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for len in 0..16 {
        for request in [
            Request::read(0, 0),
            Request::read(0, 4096),
            Request::flush(),
            Request::get_id(20),
            Request::write(SCRATCH.0, Vec::new()),
        ] {
            let kind = request.kind;
            let what = format!("{kind:?} with a header of {len} bytes");
            refused(
                &what,
                &mut guest,
                request.with_header_len(len),
                Status::IoErr,
            )?;
        }
    }
    goes_on(&mut guest)
}

fn lengths(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let block = usize::try_from(context.info()?.logical_block_size)?;
    let before = context.direct()?.read(SCRATCH.0, 64)?;
    let mut bad = vec![
        1,
        2,
        17,
        256,
        511,
        513,
        1023,
        4095,
        4097,
        8191,
        65535,
        (1 << 20) + 1,
    ];
    if block > SECTOR {
        bad.extend([SECTOR, block - SECTOR, block + SECTOR]);
    }
    for len in bad {
        refused(
            &format!("read of {len} bytes"),
            &mut guest,
            Request::read(0, len),
            Status::IoErr,
        )?;
        refused(
            &format!("write of {len} bytes"),
            &mut guest,
            Request::write(SCRATCH.0, vec![0xab; len]),
            Status::IoErr,
        )?;
    }
    check::same(
        "the disk after refused writes",
        &context.direct()?.read(SCRATCH.0, 64)?,
        &before,
    )?;
    goes_on(&mut guest)
}

fn beyond_capacity(context: &Context) -> Result<()> {
    let capacity = context.info()?.capacity;
    let mut guest = context.started(|_| {})?;
    let tail = context.direct()?.read(capacity / 8 * 8 - 8, 8)?;
    for (sector, count) in [
        (capacity, 8),
        (capacity + 1, 8),
        (capacity + 8, 8),
        (capacity - 8, 16),
        (capacity - 8, 2048),
        (capacity / 8 * 8, 16),
        (capacity * 2, 8),
        (capacity << 9, 8),
        (1 << 40, 8),
        (0x1_0000_0000 + capacity, 8),
    ] {
        let what = format!("{count} sectors at {sector} of {capacity}");
        refused(
            &format!("read of {what}"),
            &mut guest,
            Request::read(sector, count * SECTOR),
            Status::IoErr,
        )?;
        refused(
            &format!("write of {what}"),
            &mut guest,
            Request::write(sector, vec![0xab; count * SECTOR]),
            Status::IoErr,
        )?;
    }
    check::same(
        "the end of the disk after refused writes",
        &context.direct()?.read(capacity / 8 * 8 - 8, 8)?,
        &tail,
    )?;
    goes_on(&mut guest)
}

fn sector_overflow(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let start = context.direct()?.read(0, 8)?;
    for sector in [
        u64::MAX,
        u64::MAX - 1,
        u64::MAX - 7,
        u64::MAX - 15,
        1 << 55,
        (1 << 55) + 8,
        (1 << 55) - 8,
        1 << 63,
        (1 << 63) - 1,
        (1 << 63) - 8,
        1 << 54,
        u64::MAX / SECTOR as u64,
    ] {
        for count in [8, 16] {
            refused(
                &format!("read at sector {sector:#x}"),
                &mut guest,
                Request::read(sector, count * SECTOR),
                Status::IoErr,
            )?;
            refused(
                &format!("write at sector {sector:#x}"),
                &mut guest,
                Request::write(sector, vec![0xab; count * SECTOR]),
                Status::IoErr,
            )?;
        }
    }
    check::same(
        "the disk's first sectors",
        &context.direct()?.read(0, 8)?,
        &start,
    )?;
    goes_on(&mut guest)
}

/// Adds a chain of a header, `count` times the same data, and a status; returns status and
/// `used.len`.
fn repeated(
    guest: &mut Guest,
    kind: Kind,
    sector: u64,
    data: Segment,
    count: usize,
) -> Result<(u8, u32)> {
    let area = guest.memory().alloc(PAGE_SIZE, PAGE_SIZE)?;
    area.fill(0xee)?;
    let mut header = Request::read(sector, 0);
    header.kind = kind;
    area.write(0, &header.readable())?;
    let mut segments = vec![Segment::readable(area.addr(), 16)];
    segments.extend(vec![data; count]);
    segments.push(Segment::writable(area.at(16), 1));
    let ring = &mut guest.queue(0).ring;
    ring.add(&segments, Table::Indirect)?;
    ring.publish_and_kick()?;
    let used = ring.wait_used(PATIENCE)?;
    Ok((area.read(16, 1)?[0], used.len))
}

fn length_overflow(context: &Context) -> Result<()> {
    let capacity = context.info()?.capacity;
    let mut guest = context.started(|options| options.queue_size = 1024)?;
    // All memory again and again: 64 times 64 MiB are 4 GiB.
    let len = 64u32 << 20;
    for count in [64, 65, 128, 1000] {
        if capacity >= count as u64 * u64::from(len >> 9) {
            continue;
        }
        let read = repeated(
            &mut guest,
            Kind::In,
            0,
            Segment::writable(GuestAddress(0), len),
            count,
        )?;
        ensure!(
            read == (1, 0),
            "read of {count} times 64 MiB: status and used.len {read:?}"
        );
        let write = repeated(
            &mut guest,
            Kind::Out,
            0,
            Segment::readable(GuestAddress(0), len),
            count,
        )?;
        ensure!(
            write == (1, 1),
            "write of {count} times 64 MiB: status and used.len {write:?}"
        );
    }
    check::same(
        "the disk's first sectors",
        &context.direct()?.read(0, 64)?,
        &disk::pattern(0, 64),
    )?;
    goes_on(&mut guest)
}

fn sector_alignment(context: &Context) -> Result<()> {
    let block = crate::requests::block_sectors(context)?;
    if block == 1 {
        return skip("the disk's logical blocks are sectors");
    }
    let mut guest = context.started(|_| {})?;
    let before = context.direct()?.read(SCRATCH.0, 64)?;
    for offset in 1..block {
        let offset = offset as u64;
        refused(
            &format!("read at sector {offset} of a block"),
            &mut guest,
            Request::read(offset, block * SECTOR),
            Status::IoErr,
        )?;
        refused(
            &format!("write at sector {offset} of a block"),
            &mut guest,
            Request::write(SCRATCH.0 + offset, vec![0xab; block * SECTOR]),
            Status::IoErr,
        )?;
    }
    check::same("the disk", &context.direct()?.read(SCRATCH.0, 64)?, &before)?;
    goes_on(&mut guest)
}

/// Reads are good, writes are refused and change nothing.
fn read_only(context: &Context, guest: &mut Guest) -> Result<()> {
    let before = context.direct()?.read(SCRATCH.0, 2048)?;
    for count in [8, 16, 2048] {
        refused(
            &format!("write of {count} sectors"),
            guest,
            Request::write(SCRATCH.0, vec![0xab; count * SECTOR]),
            Status::IoErr,
        )?;
    }
    for request in [Request::flush(), Request::get_id(20)] {
        let kind = request.kind;
        check::request(
            format_args!("{kind:?} of a read-only disk"),
            guest.queue(0),
            request,
            &Shape::default(),
            Status::Ok,
            UsedLen::Full,
        )?;
    }
    check::same(
        "the disk after refused writes",
        &context.direct()?.read(SCRATCH.0, 2048)?,
        &before,
    )?;
    goes_on(guest)
}

fn read_only_fd(context: &Context) -> Result<()> {
    let mut guest = context.guest(|_| {})?;
    guest.start(context.disk_read_only()?)?;
    read_only(context, &mut guest)?;
    // Opened for writing, the same disk takes them.
    let bases = guest.stop()?;
    guest.resume(context.disk()?, &bases)?;
    let data = disk::seeded(1, SCRATCH.0, 8);
    check::write(
        "opened for writing",
        guest.queue(0),
        SCRATCH.0,
        data,
        &Shape::default(),
    )
}

fn read_only_feature(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.features |= feature::RO)?;
    ensure!(guest.features() & feature::RO != 0, "RO is not on offer");
    read_only(context, &mut guest)
}

/// Where the parts of a request stand whose pages are protected.
struct Pages {
    area: vhost_blk_ring::Buffer,
}

impl Pages {
    const HEADER: usize = 0;
    const STATUS: usize = PAGE_SIZE;
    const DATA: usize = 2 * PAGE_SIZE;

    fn new(guest: &Guest, kind: Kind, sector: u64) -> Result<Self> {
        let area = guest.memory().alloc(10 * PAGE_SIZE, PAGE_SIZE)?;
        area.fill(0x5a)?;
        let mut header = Request::read(sector, 0);
        header.kind = kind;
        area.write(Self::HEADER, &header.readable())?;
        area.write(Self::STATUS, &[0xee])?;
        Ok(Pages { area })
    }

    /// Does the request with a page protected, and returns status and `used.len`.
    fn run(
        &self,
        guest: &mut Guest,
        writable: bool,
        page: usize,
        protection: Protection,
    ) -> Result<(u8, u32)> {
        let memory = guest.memory().clone();
        memory.protect(self.area.at(page), PAGE_SIZE, protection)?;
        let data = Segment {
            addr: self.area.at(Self::DATA),
            len: 8 * 4096,
            writable,
        };
        let ring = &mut guest.queue(0).ring;
        ring.add(
            &[
                Segment::readable(self.area.at(Self::HEADER), 16),
                data,
                Segment::writable(self.area.at(Self::STATUS), 1),
            ],
            Table::Direct,
        )?;
        ring.publish_and_kick()?;
        let used = ring.wait_used(PATIENCE);
        memory.protect(self.area.at(page), PAGE_SIZE, Protection::ReadWrite)?;
        Ok((self.area.read(Self::STATUS, 1)?[0], used?.len))
    }
}

fn data_inaccessible(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let before = context.direct()?.read(SCRATCH.0, 64)?;
    for _ in 0..10 {
        let pages = Pages::new(&guest, Kind::In, 0)?;
        let read = pages.run(&mut guest, true, Pages::DATA, Protection::None)?;
        ensure!(read == (1, 0), "read: status and used.len {read:?}");
        let pages = Pages::new(&guest, Kind::Out, SCRATCH.0)?;
        let write = pages.run(&mut guest, false, Pages::DATA, Protection::None)?;
        ensure!(write == (1, 1), "write: status and used.len {write:?}");
    }
    check::same("the disk", &context.direct()?.read(SCRATCH.0, 64)?, &before)?;
    goes_on(&mut guest)
}

fn data_unwritable(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for page in [
        Pages::DATA,
        Pages::DATA + 3 * PAGE_SIZE,
        Pages::DATA + 7 * PAGE_SIZE,
    ] {
        let pages = Pages::new(&guest, Kind::In, 0)?;
        let read = pages.run(&mut guest, true, page, Protection::Read)?;
        ensure!(
            read.0 == 1 && read.1 <= u32::try_from(page - Pages::DATA)?,
            "read into a read-only page: status and used.len {read:?}"
        );
        let got = pages.area.read(page, PAGE_SIZE)?;
        ensure!(
            got.iter().all(|&byte| byte == 0x5a),
            "a read-only page was written"
        );
    }
    // A write may come from there.
    let pages = Pages::new(&guest, Kind::Out, SCRATCH.0)?;
    let write = pages.run(&mut guest, false, Pages::DATA, Protection::Read)?;
    ensure!(
        write == (0, 1),
        "write from a read-only page: status and used.len {write:?}"
    );
    check::same(
        "the disk",
        &context.direct()?.read(SCRATCH.0, 64)?,
        &[0x5a; 64 * SECTOR],
    )?;
    goes_on(&mut guest)
}

fn header_inaccessible(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for (kind, writable, used_len) in [(Kind::In, true, 0), (Kind::Out, false, 1)] {
        let pages = Pages::new(&guest, kind, SCRATCH.0)?;
        let done = pages.run(&mut guest, writable, Pages::HEADER, Protection::None)?;
        ensure!(
            done == (1, used_len),
            "{kind:?}: status and used.len {done:?}"
        );
    }
    goes_on(&mut guest)
}

fn partly_inaccessible(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    for number in 1..8 {
        let page = Pages::DATA + number * PAGE_SIZE;
        let limit = u32::try_from(number * PAGE_SIZE)?;
        let pages = Pages::new(&guest, Kind::In, 0)?;
        let read = pages.run(&mut guest, true, page, Protection::None)?;
        ensure!(
            read.0 == 1 && read.1 <= limit,
            "read, page {number}: status and used.len {read:?}"
        );
        let got = pages.area.read(page, PAGE_SIZE)?;
        ensure!(
            got.iter().all(|&byte| byte == 0x5a),
            "a PROT_NONE page was written"
        );
        let pages = Pages::new(&guest, Kind::Out, SCRATCH.0)?;
        let write = pages.run(&mut guest, false, page, Protection::None)?;
        ensure!(
            write == (1, 1),
            "write, page {number}: status and used.len {write:?}"
        );
    }
    goes_on(&mut guest)
}

fn wrong_way(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    // Whatever it says, it writes neither to what it may only read nor more than it says.
    for (kind, sector, out, in_len) in [
        (Kind::In, 0, 512, 0),
        (Kind::In, 0, 512, 512),
        (Kind::Out, SCRATCH.0, 0, 512),
        (Kind::Out, SCRATCH.0, 512, 512),
        (Kind::GetId, 0, 20, 0),
        (Kind::GetId, 0, 512, 20),
    ] {
        let request = Request::other(kind.number(), sector, vec![0xab; out * 8], in_len * 8);
        let what = format!("{kind:?}, {} bytes out, {} in", out * 8, in_len * 8);
        let done = guest
            .queue(0)
            .run(request, &Shape::cut(Cut::Usual), PATIENCE)?;
        ensure!(
            matches!(done.status, Status::Ok | Status::IoErr),
            "{what}: status {:?}",
            done.status
        );
        ensure!(
            done.stray_write.is_none(),
            "{what}: it wrote at {:?}",
            done.stray_write
        );
        ensure!(
            kind != Kind::Out || done.untouched,
            "{what}: a write wrote to memory"
        );
        let written = done.data.iter().take_while(|&&byte| byte != 0x5a).count();
        ensure!(
            usize::try_from(done.used_len)? <= written.max(done.data.len()) + 1,
            "{what}: used.len {}",
            done.used_len
        );
        ensure!(
            !done.untouched || in_len == 0 || done.used_len == 0,
            "{what}: nothing was written, but used.len is {}",
            done.used_len
        );
    }
    goes_on(&mut guest)
}

fn in_a_batch(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let queue = guest.queue(0);
    for round in 0..20 {
        for n in 0..20u64 {
            let request = match n % 5 {
                0 => Request::read(u64::MAX, 4096),
                1 => Request::other(99, 0, Vec::new(), 512),
                2 => Request::read(0, 4096).with_header_len(9),
                3 => Request::read(0, 0),
                _ => Request::read(8 * n, 4096),
            };
            queue.submit(request, &Shape::default())?;
        }
        queue.kick()?;
        for done in queue.wait_all(PATIENCE)? {
            let what = format!(
                "round {round}: {:?} at {}",
                done.request.kind, done.request.sector
            );
            match (
                done.request.kind,
                done.request.header_len,
                done.request.sector,
            ) {
                (Kind::Other(_), ..) => {
                    check::outcome(&what, &done, Status::Unsupported, UsedLen::Failed)?;
                }
                (_, 9, _) | (_, _, u64::MAX) => {
                    check::outcome(&what, &done, Status::IoErr, UsedLen::Failed)?;
                }
                (_, _, sector) => {
                    check::outcome(&what, &done, Status::Ok, UsedLen::Full)?;
                    let count = done.data.len() / SECTOR;
                    check::same(&what, &done.data, &disk::pattern(sector, count))?;
                }
            }
        }
    }
    goes_on(&mut guest)
}
