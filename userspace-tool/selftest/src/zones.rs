// SPDX-License-Identifier: GPL-2.0

//! Zoned disks: their requests, and what a guest can get wrong about them.
//!
//! The kernel stays silent throughout: what it knows of zones is checked before the block layer.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::uapi::{Info, feature};
use vhost_blk_ring::{
    Cut, Guest, Kind, Options, Range, Request, Shape, Status, Zone, report_zones,
};

use crate::check::{self, UsedLen};
use crate::context::{Context, PATIENCE, Test, test};
use crate::disk::{self, SECTOR};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "zones.report",
        "whole, in pieces, from any sector, into any memory",
        report
    ),
    test!(
        "zones.manage",
        "open, close, finish, reset, reset all, and the states that follow",
        manage
    ),
    test!(
        "zones.write",
        "writes at the write pointer; statuses of those that are not",
        write
    ),
    test!(
        "zones.queued",
        "many writes at once to an empty zone",
        queued
    ),
    test!(
        "zones.append",
        "appends return their sector, of any layout and length on offer",
        append
    ),
    test!(
        "zones.resources",
        "ZONE_OPEN_RESOURCE and ZONE_ACTIVE_RESOURCE",
        resources
    ),
    test!(
        "zones.hostile",
        "sectors, lengths and buffers that are wrong",
        hostile
    ),
    test!(
        "zones.unaware",
        "without ZONED nothing is written, and reads work",
        unaware
    ),
    test!(
        "zones.read_only",
        "nothing changes a disk that is opened read-only",
        read_only
    ),
    test!(
        "zones.many_reports",
        "reports beside reads and writes, more than are done at once, and a stop",
        many_reports
    ),
    test!(
        "zones.killed",
        "the process is killed with reports in flight",
        killed
    ),
];

/// `VIRTIO_BLK_ZT_CONV`
const CONVENTIONAL: u8 = 1;

/// `VIRTIO_BLK_ZS_*`
const EMPTY: u8 = 1;
const IMPLICITLY_OPEN: u8 = 2;
const EXPLICITLY_OPEN: u8 = 3;
const CLOSED: u8 = 4;
const FULL: u8 = 14;

/// A guest on the zoned disk, all of whose sequential zones are empty.
struct Zoned {
    guest: Guest,
    disk: File,
    info: Info,
    /// Start of the first sequential zone, in sectors.
    first: u64,
    /// Sectors that can be written in each sequential zone.
    capacity: u64,
}

impl Zoned {
    fn new(context: &Context, change: impl FnOnce(&mut Options)) -> Result<Self> {
        let disk = context.zoned_disk()?;
        let guest = context.guest(|options| {
            options.queue_size = 1024;
            change(options);
        })?;
        let info = guest.device().info(Some(disk.as_fd()))?;
        let zones = report_zones(&disk, 0)?;
        let sequential = zones.iter().filter(|zone| zone.kind != CONVENTIONAL);
        let first = sequential.clone().next().context("no sequential zone")?;
        ensure!(
            first.start >= 2 * u64::from(info.zone_sectors)
                && sequential.clone().count() >= 8
                && first.capacity < info.zone_sectors.into()
                && info.max_open_zones > 0
                && info.max_active_zones > info.max_open_zones,
            "the zoned disk is not as --help says"
        );
        guest.start(&disk)?;
        let (first, capacity) = (first.start, first.capacity);
        let mut zoned = Zoned {
            guest,
            disk,
            info,
            first,
            capacity,
        };
        if zoned.guest.features() & feature::ZONED != 0 {
            zoned.done("reset of all", Request::zone(Kind::ZoneResetAll, 0))?;
        }
        Ok(zoned)
    }

    /// Start of a sequential zone, in sectors.
    fn zone(&self, index: u64) -> u64 {
        self.first + index * u64::from(self.info.zone_sectors)
    }

    /// Does a request that has to succeed.
    fn done(&mut self, what: &str, request: Request) -> Result<vhost_blk_ring::Completion> {
        let shape = Shape::default();
        let queue = self.guest.queue(0);
        check::request(what, queue, request, &shape, Status::Ok, UsedLen::Full)
    }

    /// Does a request that has to be refused: nothing is written but the status.
    fn refused(&mut self, what: &str, request: Request, status: Status) -> Result<()> {
        let queue = self.guest.queue(0);
        let shape = Shape::default();
        let done = check::request(what, queue, request, &shape, status, UsedLen::Failed)?;
        ensure!(done.untouched, "{what}: data was written");
        Ok(())
    }

    /// The zone of a sector, as the guest sees it; the host has to see the same.
    fn state(&mut self, sector: u64) -> Result<Zone> {
        let done = self.done("report", Request::zone_report(sector, 1))?;
        let zones = done.zones().context("a report that is no report")?;
        let host = report_zones(&self.disk, sector)?;
        ensure!(
            zones.first() == host.first() && zones.len() == 1,
            "the guest sees {zones:?}, the host {:?}",
            host.first()
        );
        Ok(zones[0])
    }

    /// Checks the state and the write pointer of a zone.
    fn is(&mut self, what: &str, zone: u64, state: u8, written: u64) -> Result<()> {
        let now = self.state(zone)?;
        ensure!(
            now.state == state && (state == FULL || now.write_pointer == zone + written),
            "{what}: state {state} and {written} sectors written expected: {now:?}"
        );
        Ok(())
    }

    /// What is on the disk, past the host's cache.
    fn on_disk(&self, context: &Context, sector: u64, count: usize) -> Result<Vec<u8>> {
        disk::Disk::open(context.zoned_disk_path()?)?.read(sector, count)
    }
}

fn sectors(bytes: usize) -> u64 {
    (bytes / SECTOR) as u64
}

fn report(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    zoned.done("open", Request::zone(Kind::ZoneOpen, zoned.zone(1)))?;
    zoned.done("finish", Request::zone(Kind::ZoneFinish, zoned.zone(2)))?;
    zoned.done("write", Request::write(zoned.zone(0), vec![1; 8192]))?;
    let all = report_zones(&zoned.disk, 0)?;
    ensure!(
        all.len() == zoned.info.nr_zones as usize,
        "too many zones for this test"
    );
    let size = u64::from(zoned.info.zone_sectors);

    for from in 0..all.len() {
        for room in [1, 2, 3, all.len() - from, all.len() + 100] {
            for sector in [0, 1, size - 1] {
                let sector = from as u64 * size + sector;
                let queue = zoned.guest.queue(0);
                let done = queue.run(
                    Request::zone_report(sector, room),
                    &Shape::default(),
                    PATIENCE,
                )?;
                let expected = &all[from..all.len().min(from + room)];
                let len = u32::try_from(64 + 64 * expected.len())?;
                let full = expected.len() == room;
                let what = format!("report of {room} from {sector}");
                check::outcome(&what, &done, Status::Ok, UsedLen::Is(len + u32::from(full)))?;
                ensure!(
                    done.zones().as_deref() == Some(expected),
                    "{what}: {:?}",
                    done.zones()
                );
            }
        }
    }

    let capacity = zoned.info.capacity;
    let queue = zoned.guest.queue(0);
    let done = queue.run(
        Request::zone_report(capacity, 3),
        &Shape::default(),
        PATIENCE,
    )?;
    check::outcome("report from the end", &done, Status::Ok, UsedLen::Is(64))?;
    ensure!(done.zones() == Some(vec![]), "there is no zone at the end");

    for cut in [Cut::Every(1), Cut::Every(63), Cut::Data(64), Cut::Joined] {
        for (align, offset) in [(512, 0), (1, 0), (4096, 4090)] {
            // As many as fit the ring if each byte is a descriptor.
            let room = if cut == Cut::Every(1) { 3 } else { all.len() };
            let shape = Shape::cut(cut.clone()).at(align, offset);
            let what = format!("report with {shape:?}");
            let request = Request::zone_report(0, room);
            let queue = zoned.guest.queue(0);
            let done = check::request(&what, queue, request, &shape, Status::Ok, UsedLen::Full)?;
            ensure!(done.zones().as_deref() == Some(&all[..room]), "{what}");
        }
    }
    // More zones than the disk is asked for at once by such a request, and a tail of no whole one.
    for tail in [1, 63] {
        let len = 64 * (all.len() + 1) + tail;
        let request = Request::other(Kind::ZoneReport.number(), 0, Vec::new(), len);
        let done = zoned
            .guest
            .queue(0)
            .run(request, &Shape::default(), PATIENCE)?;
        ensure!(
            done.zones().as_deref() == Some(&all[..]),
            "report with a tail"
        );
    }
    Ok(())
}

fn manage(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let zone = zoned.zone(3);
    for round in 0..2 {
        zoned.is("after a reset", zone, EMPTY, 0)?;
        zoned.done("open", Request::zone(Kind::ZoneOpen, zone))?;
        zoned.is("opened", zone, EXPLICITLY_OPEN, 0)?;
        zoned.done("write", Request::write(zone, vec![7; 4096]))?;
        zoned.is("written", zone, EXPLICITLY_OPEN, 8)?;
        zoned.done("close", Request::zone(Kind::ZoneClose, zone))?;
        zoned.is("closed", zone, CLOSED, 8)?;
        zoned.done("write", Request::write(zone + 8, vec![8; 4096]))?;
        zoned.is("written again", zone, IMPLICITLY_OPEN, 16)?;
        zoned.done("finish", Request::zone(Kind::ZoneFinish, zone))?;
        zoned.is("finished", zone, FULL, 0)?;
        ensure!(
            zoned.on_disk(context, zone, 16)? == [vec![7; 4096], vec![8; 4096]].concat(),
            "the disk has other data"
        );
        let kind = [Kind::ZoneReset, Kind::ZoneResetAll][round];
        let sector = [zone, 12345][round];
        zoned.done("reset", Request::zone(kind, sector))?;
    }
    zoned.is("after the last reset", zone, EMPTY, 0)
}

fn write(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let capacity = zoned.capacity;
    let (a, b) = (zoned.zone(0), zoned.zone(1));
    let unaligned = Status::ZoneUnalignedWritePointer;
    let invalid = Status::ZoneInvalidCommand;

    zoned.refused(
        "not at an empty zone's start",
        Request::write(a + 8, vec![0; 4096]),
        unaligned,
    )?;
    let data = disk::seeded(70, a, 2048);
    zoned.done("at its start", Request::write(a, data.clone()))?;
    zoned.refused("a second time", Request::write(a, vec![0; 4096]), unaligned)?;
    zoned.refused(
        "before its end",
        Request::write(a + 2040, vec![0; 4096]),
        unaligned,
    )?;
    ensure!(
        zoned.on_disk(context, a, 2048)? == data,
        "the disk has other data"
    );

    // What does not fit one bio is written in order: in pieces, and through the kernel's pages.
    let mut at = a + 2048;
    for (offset, align) in [(0, 512), (1, 512), (512, 4096)] {
        let len = usize::try_from((capacity - 2048) / 4 / 8 * 8)?;
        let data = disk::seeded(71, at, len);
        let shape = Shape::cut(Cut::Data(4096)).at(align, offset);
        let what = format!("{len} sectors at {at} with {shape:?}");
        check::write(&what, zoned.guest.queue(0), at, data.clone(), &shape)?;
        ensure!(
            zoned.on_disk(context, at, len)? == data,
            "{what}: other data on the disk"
        );
        let read = Request::read(at, len * SECTOR);
        let read = zoned.done("read", read)?;
        check::same(&what, &read.data, &data)?;
        at += len as u64;
    }
    zoned.is("after all", a, IMPLICITLY_OPEN, at - a)?;

    let left = usize::try_from(a + capacity - at)? * SECTOR;
    zoned.refused(
        "beyond the capacity",
        Request::write(at, vec![0; left + 4096]),
        invalid,
    )?;
    zoned.refused(
        "beyond the zone",
        Request::write(at, vec![0; left + (4 << 20)]),
        invalid,
    )?;
    zoned.done("up to the capacity", Request::write(at, vec![9; left]))?;
    zoned.is("full", a, FULL, 0)?;
    zoned.refused("to a full zone", Request::write(a, vec![0; 4096]), invalid)?;
    zoned.refused(
        "behind the capacity",
        Request::write(a + capacity, vec![0; 4096]),
        invalid,
    )?;
    zoned.is("the next zone", b, EMPTY, 0)?;

    // Conventional zones are like any other disk.
    let size = u64::from(zoned.info.zone_sectors);
    for sector in [size - 8, 8, size - 16] {
        let data = disk::seeded(72, sector, 16);
        zoned.done("conventional", Request::write(sector, data.clone()))?;
        ensure!(
            zoned.on_disk(context, sector, 16)? == data,
            "the disk has other data"
        );
    }
    zoned.refused(
        "into the first sequential one",
        Request::write(a - 8, vec![0; 8192]),
        invalid,
    )?;

    // Behind the write pointer: what is before may be in flight, so the block layer is asked.
    zoned.done("at its start", Request::write(b, vec![1; 4096]))?;
    zoned.refused(
        "behind the write pointer",
        Request::write(b + 16, vec![0; 4096]),
        unaligned,
    )?;
    zoned.is("as it was", b, IMPLICITLY_OPEN, 8)?;
    zoned.done("at the write pointer", Request::write(b + 8, vec![2; 4096]))?;

    // One after the other, before any is done.
    let queue = zoned.guest.queue(0);
    for n in 0..20 {
        queue.submit(
            Request::write(b + 16 + n * 8, vec![3; 4096]),
            &Shape::default(),
        )?;
    }
    queue.kick()?;
    for done in queue.wait_all(PATIENCE)? {
        check::outcome("a write of many", &done, Status::Ok, UsedLen::Full)?;
    }
    zoned.is("after many", b, IMPLICITLY_OPEN, 16 + 20 * 8)
}

fn queued(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    // All are there before the first of them has opened the zone.
    let empty = zoned.zone(0);
    let queue = zoned.guest.queue(0);
    for n in 0..20 {
        queue.submit(
            Request::write(empty + n * 8, vec![4; 4096]),
            &Shape::default(),
        )?;
    }
    queue.kick()?;
    for done in queue.wait_all(PATIENCE)? {
        check::outcome(
            "a write of many to an empty zone",
            &done,
            Status::Ok,
            UsedLen::Full,
        )?;
    }
    zoned.is("after many, once empty", empty, IMPLICITLY_OPEN, 20 * 8)
}

fn append(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let most = zoned.info.max_zone_append_sectors as usize * SECTOR;
    let block = (zoned.info.logical_block_size as usize).max(SECTOR);
    ensure!(most >= 4096, "appends of {most} bytes");
    let zone = zoned.zone(0);
    let mut at = zone;
    let layouts = [
        (Cut::Usual, 512, 0),
        (Cut::Joined, 512, 0),
        (Cut::Data(512), 4096, 0),
        (Cut::Data(512), 4096, 3584),
        (Cut::Data(block), 1, 0),
        (Cut::Data(4096), 4096, 2048),
        (Cut::Every(1000), 1, 0),
        (Cut::Header(3), 1, 0),
    ];
    for len in [block, 4096, 8192, 65536, most] {
        for (cut, align, offset) in &layouts {
            let shape = Shape::cut(cut.clone()).at(*align, *offset);
            let what = format!("append of {len} bytes with {shape:?}");
            if let Cut::Data(size) = cut {
                if len / size > 900 {
                    continue;
                }
            }
            if at - zone + sectors(len) > zoned.capacity {
                zoned.done("reset", Request::zone(Kind::ZoneReset, zone))?;
                at = zone;
            }
            let data = disk::seeded(73, at, len / SECTOR);
            let request = Request::zone_append(zone, data.clone());
            let queue = zoned.guest.queue(0);
            let done = check::request(&what, queue, request, &shape, Status::Ok, UsedLen::Full)?;
            ensure!(
                done.appended_at() == Some(at),
                "{what}: at {:?}, expected {at}",
                done.appended_at()
            );
            let got = zoned.on_disk(context, at, len / SECTOR)?;
            check::same(&what, &got, &data)?;
            at += sectors(len);
        }
    }
    let invalid = Status::ZoneInvalidCommand;
    zoned.refused(
        "more than is on offer",
        Request::zone_append(zone, vec![0; most + block]),
        invalid,
    )?;
    zoned.refused(
        "to a conventional zone",
        Request::zone_append(0, vec![0; 4096]),
        invalid,
    )?;

    // Many at once: each has a place of its own.
    let zone = zoned.zone(1);
    let queue = zoned.guest.queue(0);
    for n in 0..100u8 {
        queue.submit(Request::zone_append(zone, vec![n; 4096]), &Shape::default())?;
    }
    queue.kick()?;
    let mut seen = vec![None; 100];
    for done in queue.wait_all(PATIENCE)? {
        check::outcome("an append of many", &done, Status::Ok, UsedLen::Full)?;
        let at = done.appended_at().context("no sector")?;
        let place = seen.get_mut(usize::try_from(at.wrapping_sub(zone) / 8)?);
        *place.with_context(|| format!("appended at {at}"))? = done.request.out.first().copied();
    }
    for (n, byte) in (0..).zip(&seen) {
        let byte = byte.with_context(|| format!("nothing was appended at {n}"))?;
        ensure!(
            zoned.on_disk(context, zone + n * 8, 8)? == vec![byte; 4096],
            "the disk has other data at {n}"
        );
    }
    zoned.is("after many", zone, IMPLICITLY_OPEN, 800)
}

fn resources(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let open = u64::from(zoned.info.max_open_zones);
    let active = u64::from(zoned.info.max_active_zones);
    for n in 0..open {
        zoned.done("open", Request::zone(Kind::ZoneOpen, zoned.zone(n)))?;
    }
    let next = zoned.zone(open);
    zoned.refused(
        "one more",
        Request::zone(Kind::ZoneOpen, next),
        Status::ZoneOpenResource,
    )?;
    zoned.refused(
        "a write to one more",
        Request::write(next, vec![0; 4096]),
        Status::ZoneOpenResource,
    )?;
    for n in 0..open {
        let zone = zoned.zone(n);
        zoned.done("write", Request::write(zone, vec![0; 4096]))?;
        zoned.done("close", Request::zone(Kind::ZoneClose, zone))?;
    }
    // The kernel lost count of the one whose write failed, and looks again.
    for n in open..active {
        zoned.done(
            "a write to a closed one",
            Request::write(zoned.zone(n), vec![0; 4096]),
        )?;
        zoned.done("close", Request::zone(Kind::ZoneClose, zoned.zone(n)))?;
    }
    let next = zoned.zone(active);
    zoned.refused(
        "too many",
        Request::zone(Kind::ZoneOpen, next),
        Status::ZoneActiveResource,
    )?;
    zoned.refused(
        "a write",
        Request::write(next, vec![0; 4096]),
        Status::ZoneActiveResource,
    )?;
    zoned.refused(
        "an append",
        Request::zone_append(next, vec![0; 4096]),
        Status::ZoneActiveResource,
    )?;
    zoned.done("reset", Request::zone(Kind::ZoneReset, zoned.zone(0)))?;
    zoned.done("a write in its place", Request::write(next, vec![0; 4096]))?;
    Ok(())
}

fn hostile(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let invalid = Status::ZoneInvalidCommand;
    let capacity = zoned.info.capacity;
    let zone = zoned.zone(0);
    let manages = [
        Kind::ZoneOpen,
        Kind::ZoneClose,
        Kind::ZoneFinish,
        Kind::ZoneReset,
    ];
    for sector in [
        zone + 1,
        zone - 1,
        zone + 8,
        capacity,
        capacity + 1,
        capacity - 1,
        1 << 55,
        1 << 63,
        u64::MAX,
        u64::MAX - u64::from(zoned.info.zone_sectors) + 1,
    ] {
        for kind in manages {
            zoned.refused(
                &format!("{kind:?} at {sector}"),
                Request::zone(kind, sector),
                invalid,
            )?;
        }
        if sector > capacity {
            zoned.refused(
                &format!("report from {sector}"),
                Request::zone_report(sector, 4),
                invalid,
            )?;
        }
        let append = Request::zone_append(sector, vec![0; 4096]);
        let what = format!("append at {sector}");
        let aligned = sector % u64::from(zoned.info.zone_write_granularity / 512) == 0;
        let status = if aligned || sector >= capacity {
            invalid
        } else {
            Status::ZoneUnalignedWritePointer
        };
        zoned.refused(&what, append, status)?;
    }
    // Conventional zones have nothing to open.
    for kind in manages {
        zoned.refused(
            &format!("{kind:?} of a conventional zone"),
            Request::zone(kind, 0),
            invalid,
        )?;
    }
    zoned.refused(
        "close of an empty zone",
        Request::zone(Kind::ZoneClose, zone),
        invalid,
    )?;
    zoned.done("finish", Request::zone(Kind::ZoneFinish, zone))?;
    for kind in [Kind::ZoneOpen, Kind::ZoneClose] {
        zoned.refused(
            &format!("{kind:?} of a full zone"),
            Request::zone(kind, zone),
            invalid,
        )?;
    }
    zoned.refused(
        "append to a full zone",
        Request::zone_append(zone, vec![0; 4096]),
        invalid,
    )?;

    // Reports and appends without room for what is returned.
    for len in [0, 1, 63, 64, 127] {
        let short = Request::other(Kind::ZoneReport.number(), 0, Vec::new(), len);
        zoned.refused(&format!("report into {len} bytes"), short, invalid)?;
    }
    let zone = zoned.zone(1);
    for len in [0, 1, 7] {
        let short = Request::other(Kind::ZoneAppend.number(), zone, vec![0; 4096], len);
        zoned.refused(
            &format!("append with {len} bytes for the sector"),
            short,
            invalid,
        )?;
    }
    zoned.refused(
        "append of nothing",
        Request::zone_append(zone, Vec::new()),
        invalid,
    )?;
    for len in [1, 511, 513, 4095] {
        let append = Request::zone_append(zone, vec![0; len]);
        let what = format!("append of {len} bytes");
        zoned.refused(&what, append, Status::ZoneUnalignedWritePointer)?;
    }
    zoned.is("after all", zone, EMPTY, 0)?;

    // These are negotiated, but not for zoned disks: of a sequential zone, a conventional one, and the end of that.
    for kind in [Kind::Discard, Kind::WriteZeroes, Kind::SecureErase] {
        for sector in [zone, 0, zoned.zone(0) - 8] {
            let ranges = Request::ranges(kind, &[Range::new(sector, 16)]);
            zoned.refused(
                &format!("{kind:?} at {sector}"),
                ranges,
                Status::Unsupported,
            )?;
        }
    }
    let info = &zoned.info;
    ensure!(
        info.max_discard_sectors == 0
            && info.max_write_zeroes_sectors == 0
            && info.max_secure_erase_sectors == 0,
        "limits of what is unsupported: {info:?}"
    );
    zoned.is("after these", zone, EMPTY, 0)?;

    // Others of the numbers in between are no requests.
    for number in [17, 19, 21, 23, 25, 27, 28] {
        let request = Request::other(number, zone, Vec::new(), 128);
        zoned.refused(&format!("type {number}"), request, Status::Unsupported)?;
    }
    ensure!(
        !zoned.guest.queue(0).ring.wait_err(Duration::ZERO)?,
        "the error eventfd was signalled"
    );
    Ok(())
}

fn unaware(context: &Context) -> Result<()> {
    // It leaves all zones empty.
    drop(Zoned::new(context, |_| {})?);
    let mut zoned = Zoned::new(context, |options| options.features &= !feature::ZONED)?;
    let zone = zoned.zone(0);
    for sector in [0, zone, zone + 8] {
        zoned.refused(
            "write",
            Request::write(sector, vec![1; 4096]),
            Status::IoErr,
        )?;
        let read = zoned.done("read", Request::read(sector, 4096))?;
        ensure!(
            read.data == zoned.on_disk(context, sector, 8)?,
            "other data"
        );
    }
    for request in [
        Request::zone_report(0, 1),
        Request::zone_append(zone, vec![1; 4096]),
        Request::zone(Kind::ZoneOpen, zone),
        Request::zone(Kind::ZoneReset, zone),
        Request::zone(Kind::ZoneResetAll, 0),
    ] {
        zoned.refused(&format!("{:?}", request.kind), request, Status::Unsupported)?;
    }
    let now = report_zones(&zoned.disk, zone)?;
    ensure!(
        now.iter().all(|zone| zone.state == EMPTY),
        "zones were changed"
    );
    Ok(())
}

fn read_only(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let zone = zoned.zone(0);
    zoned.guest.stop()?;
    zoned.guest = context.guest(|options| options.queue_size = 1024)?;
    zoned
        .guest
        .start(disk::open(context.zoned_disk_path()?, true, false)?)?;
    for request in [
        Request::write(zone, vec![1; 4096]),
        Request::zone_append(zone, vec![1; 4096]),
        Request::zone(Kind::ZoneOpen, zone),
        Request::zone(Kind::ZoneFinish, zone),
        Request::zone(Kind::ZoneResetAll, 0),
    ] {
        zoned.refused(&format!("{:?}", request.kind), request, Status::IoErr)?;
    }
    zoned.is("as it was", zone, EMPTY, 0)
}

fn many_reports(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let all = report_zones(&zoned.disk, 0)?;
    let zone = zoned.zone(0);
    for round in 0..10u64 {
        let queue = zoned.guest.queue(0);
        for n in 0..100u64 {
            let request = match n % 10 {
                0 => Request::read(0, 4096),
                // To a conventional zone, so that reports stay the same.
                5 => Request::write(8, vec![1; 4096]),
                _ => Request::zone_report(0, all.len()),
            };
            queue.submit(request, &Shape::default())?;
        }
        queue.kick()?;
        if round % 2 == 0 {
            let bases = zoned.guest.stop()?;
            zoned.guest.resume(&zoned.disk, &bases)?;
        }
        let queue = zoned.guest.queue(0);
        for done in queue.wait_all(PATIENCE)? {
            check::outcome("one of many", &done, Status::Ok, UsedLen::Full)?;
            if done.request.kind == Kind::ZoneReport {
                ensure!(done.zones().as_ref() == Some(&all), "another report");
            }
        }
    }
    zoned.is("afterwards", zone, EMPTY, 0)
}

fn killed(context: &Context) -> Result<()> {
    context.zoned_disk_path()?;
    for _ in 0..5 {
        let mut child = context
            .again()?
            .arg("--child")
            .arg("zones")
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child.stdout.take().context("no pipe")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        child.kill()?;
        child.wait()?;
        ensure!(line.trim() == "busy", "the other process said: {line}");
    }
    let mut zoned = Zoned::new(context, |_| {})?;
    let zone = zoned.zone(0);
    zoned.is("afterwards", zone, EMPTY, 0)
}

/// The part of [`killed`] that the other process plays.
pub(crate) fn report_until_killed(context: &Context) -> Result<()> {
    let mut zoned = Zoned::new(context, |_| {})?;
    let count = report_zones(&zoned.disk, 0)?.len();
    loop {
        let queue = zoned.guest.queue(0);
        while queue.in_flight() < 200 {
            queue.submit(Request::zone_report(0, count), &Shape::default())?;
        }
        queue.kick()?;
        println!("busy");
        std::io::stdout().flush()?;
        while queue.in_flight() > 100 {
            queue.wait(PATIENCE)?;
        }
    }
}
