// SPDX-License-Identifier: GPL-2.0

//! The block device: section 5.2.

use anyhow::{Context as _, Result, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Completion, Request, Shape, Status};

use super::session::{SERIAL, Session, Subject, ended, sectors, segment};
use crate::exercise::check::{Outcome, describe, same};
use crate::exercise::shapes;

/// Request types that are not in the headers of all kernels by these names.
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECURE_ERASE: u32 = 14;
const LIFETIME: u32 = 10;
/// Zone append, report, open, close, finish, reset, reset all.
const ZONED: [u32; 7] = [15, 16, 18, 20, 22, 24, 26];

/// Flag of a range of write zeroes: it may be deallocated.
const UNMAP: u32 = 1;

/// Offsets in a `struct virtio_blk_config`.
const WRITEBACK: usize = 32;
const UNUSED0: usize = 33;
const MAX_DISCARD_SEG: std::ops::Range<usize> = 40..44;
const UNUSED1: std::ops::Range<usize> = 57..60;

fn passed(detail: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Passed(detail.into()))
}

fn skipped(reason: impl Into<String>) -> Result<Outcome> {
    Ok(Outcome::Skipped(reason.into()))
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    shapes::noise(&mut StdRng::seed_from_u64(seed), len)
}

/// Runs requests that have to end with `status`, and then one that has to succeed.
fn all_end(
    subject: &Subject<'_>,
    session: &mut Session,
    requests: &[Request],
    status: Status,
) -> Result<()> {
    for request in requests {
        let done = subject.run(session, request.clone(), &Shape::default())?;
        ended(&done, status).with_context(|| describe(request, &Shape::default()))?;
    }
    subject.read(session).context("the request after it")
}

// 5.2.5.2

pub(super) fn flush_is_offered(subject: &Subject<'_>) -> Result<Outcome> {
    ensure!(subject.offers(feature::FLUSH), "it is not offered");
    passed("it is offered")
}

pub(super) fn flush_with_wce(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::CONFIG_WCE) {
        return skipped("CONFIG_WCE is not offered");
    }
    flush_is_offered(subject)
}

pub(super) fn writeback_without_flush(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::CONFIG_WCE) {
        return skipped("CONFIG_WCE is not offered");
    }
    let config = subject.start(!feature::FLUSH)?.config()?;
    ensure!(config[WRITEBACK] == 0, "writeback is {}", config[WRITEBACK]);
    passed("writeback is 0")
}

pub(super) fn padding(subject: &Subject<'_>) -> Result<Outcome> {
    let config = subject.start(u64::MAX)?.config()?;
    let padding = [&config[UNUSED0..=UNUSED0], &config[UNUSED1]].concat();
    ensure!(padding.iter().all(|&byte| byte == 0), "{padding:?}");
    passed("4 bytes")
}

pub(super) fn not_zoned(subject: &Subject<'_>) -> Result<Outcome> {
    if subject.disk.is_zoned() {
        return skipped("the disk is zoned");
    }
    if subject.is_module() {
        return skipped("QEMU offers what the disk has");
    }
    ensure!(!subject.offers(feature::ZONED), "it is offered");
    passed("it is not offered")
}

// 5.2.6

pub(super) fn reads(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let disk = subject.disk;
    let last = disk.capacity() - disk.block_sectors();
    for sector in [
        0,
        disk.block_sectors(),
        last / 2 / disk.block_sectors() * disk.block_sectors(),
        last,
    ] {
        for blocks in [1, 2, 9] {
            let len = blocks * disk.block();
            if sector + u64::from(sectors(len)) > disk.capacity() {
                continue;
            }
            let request = Request::read(sector, len);
            let done = subject.run(&mut session, request.clone(), &Shape::default())?;
            subject
                .matches_disk(&done)
                .with_context(|| describe(&request, &Shape::default()))?;
        }
    }
    passed("4 places, in units of 512 bytes")
}

pub(super) fn writes(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let disk = subject.disk;
    let block = disk.block();
    for (seed, blocks) in (0..).zip([1, 2, 9]) {
        let sector = disk.block_sectors();
        let mut expected = disk.read(0, 12 * block)?;
        let data = noise(seed, blocks * block);
        expected[block..block + data.len()].copy_from_slice(&data);
        let done = subject.run(
            &mut session,
            Request::write(sector, data),
            &Shape::default(),
        )?;
        ended(&done, Status::Ok)?;
        same(&disk.read(0, 12 * block)?, &expected).context("on the disk")?;
    }
    passed("3 writes, and what is beside them")
}

pub(super) fn flushes(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    all_end(subject, &mut session, &[Request::flush()], Status::Ok)?;
    passed("1 flush")
}

pub(super) fn id_is_padded(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let done = subject.run(&mut session, Request::get_id(20), &Shape::default())?;
    ended(&done, Status::Ok)?;
    if subject.is_module() {
        same(&done.data, SERIAL)?;
    }
    let end = done.data.iter().position(|&byte| byte == 0).unwrap_or(20);
    let (text, rest) = done.data.split_at(end);
    ensure!(text.is_ascii(), "it is not ASCII");
    ensure!(
        rest.iter().all(|&byte| byte == 0),
        "it is not padded with NUL"
    );
    passed(format!("'{}'", String::from_utf8_lossy(text)))
}

pub(super) fn range_is_checked(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let disk = subject.disk;
    let (capacity, block, sectors) = (disk.capacity(), disk.block(), disk.block_sectors());
    let far = [
        capacity,
        1 << 54,
        (1 << 55) - sectors,
        1 << 63,
        u64::MAX - sectors + 1,
    ];
    let mut requests: Vec<_> = far.iter().map(|&at| Request::read(at, block)).collect();
    requests.push(Request::read(capacity - sectors, 2 * block));
    if subject.write {
        requests.extend(far.map(|at| Request::write(at, vec![0xbd; block])));
    }
    all_end(subject, &mut session, &requests, Status::IoErr)?;
    passed(format!("{} requests", requests.len()))
}

pub(super) fn length_is_checked(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let lengths = [1, 511, 513, 1000];
    let mut requests: Vec<_> = lengths.iter().map(|&len| Request::read(0, len)).collect();
    let before = subject.disk.read(0, 4096)?;
    if subject.write {
        requests.extend(lengths.map(|len| Request::write(0, vec![0xbd; len])));
    }
    all_end(subject, &mut session, &requests, Status::IoErr)?;
    same(&subject.disk.read(0, 4096)?, &before).context("on the disk")?;
    passed(format!("{} requests", requests.len()))
}

pub(super) fn unknown_types(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    // SCSI commands are for the legacy interface.
    let requests = [2, 3, 6, 7, 9, 12, 27, 99, u32::MAX]
        .map(|number| Request::other(number, 0, vec![0; 16], 0));
    all_end(subject, &mut session, &requests, Status::Unsupported)?;
    passed(format!("{} types", requests.len()))
}

pub(super) fn not_offered_types(subject: &Subject<'_>) -> Result<Outcome> {
    let types = [
        (feature::DISCARD, DISCARD),
        (feature::WRITE_ZEROES, WRITE_ZEROES),
        (feature::SECURE_ERASE, SECURE_ERASE),
    ];
    let mut session = subject.start(!types.iter().fold(0, |bits, (bit, _)| bits | bit))?;
    let before = subject.disk.read(0, subject.disk.block())?;
    let mut requests = vec![Request::other(LIFETIME, 0, Vec::new(), 6)];
    for (bit, number) in types {
        // What is negotiated is the driver's choice; only what the device does
        // not have has to be refused.
        if !subject.offers(bit) {
            let range = segment(0, sectors(subject.disk.block()), 0);
            requests.push(Request::other(number, 0, range, 0));
        }
    }
    all_end(subject, &mut session, &requests, Status::Unsupported)?;
    same(&subject.disk.read(0, subject.disk.block())?, &before).context("on the disk")?;
    passed(format!("{} types", requests.len()))
}

pub(super) fn status_is_written(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(u64::MAX)?;
    let requests = [
        Request::read(0, 512).with_header_len(0),
        Request::read(0, 512).with_header_len(15),
        Request::flush().with_header_len(8),
    ];
    all_end(subject, &mut session, &requests, Status::IoErr)?;
    passed(format!("{} short headers", requests.len()))
}

pub(super) fn discards(subject: &Subject<'_>) -> Result<Outcome> {
    let Some(mut session) = ranges(subject, feature::DISCARD)? else {
        return skipped("DISCARD is not offered");
    };
    let block = sectors(subject.disk.block());
    let most = if subject.is_module() {
        2
    } else {
        let field = session.config()?[MAX_DISCARD_SEG].try_into()?;
        u32::from_le_bytes(field)
    };
    // Not all disks can deallocate so little, and the data is undefined now.
    for count in 1..=most.min(2) {
        let ranges = (0..count).map(|n| segment(u64::from(n * 2 * block), block, 0));
        let request = Request::other(DISCARD, 0, ranges.collect::<Vec<_>>().concat(), 0);
        let done = subject.run(&mut session, request, &Shape::default())?;
        ended(&done, Status::Ok).with_context(|| format!("{count} ranges"))?;
    }
    let beyond = Request::other(DISCARD, 0, segment(subject.disk.capacity(), block, 0), 0);
    all_end(subject, &mut session, &[beyond], Status::IoErr)?;
    passed("what is beyond the end is refused")
}

// 5.2.6.2

pub(super) fn read_only(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::RO) {
        return skipped("RO is not offered");
    }
    let mut session = subject.connect_exactly(feature::VERSION_1 | feature::RO)?;
    session.start(subject.disk)?;
    // What is there already: even a device that does write changes nothing.
    let data = subject.disk.read(0, subject.disk.block())?;
    let other = data.iter().map(|byte| !byte).collect();
    // Where this may write, it can use other data, and see that none arrives.
    let request = Request::write(0, if subject.write { other } else { data.clone() });
    all_end(subject, &mut session, &[request], Status::IoErr)?;
    same(&subject.disk.read(0, subject.disk.block())?, &data).context("on the disk")?;
    passed("1 write")
}

/// A session in which a request with ranges can be tried.
fn ranges(subject: &Subject<'_>, bit: u64) -> Result<Option<Session>> {
    if !subject.offers(bit) {
        return Ok(None);
    }
    let mut session = subject.start(u64::MAX)?;
    if let Some(guest) = session.module() {
        // The module offers what any disk may have; QEMU asks for this one.
        let info = guest.device().info(None)?;
        let most = match bit {
            feature::DISCARD => info.max_discard_sectors,
            feature::WRITE_ZEROES => u32::MAX,
            _ => info.max_secure_erase_sectors,
        };
        if most == 0 {
            return Ok(None);
        }
    }
    Ok(Some(session))
}

/// Ranges with each of these flags have to be refused as unsupported, and
/// change nothing.
fn flags_refused(subject: &Subject<'_>, bit: u64, number: u32, flags: &[u32]) -> Result<Outcome> {
    let Some(mut session) = ranges(subject, bit)? else {
        return skipped(format!("{} is not offered", feature::names(bit).join(" ")));
    };
    let disk = subject.disk;
    disk.write(0, &noise(9, disk.block()))?;
    let before = disk.read(0, disk.block())?;
    let one = sectors(disk.block());
    let requests: Vec<_> = flags
        .iter()
        .map(|&flags| Request::other(number, 0, segment(0, one, flags), 0))
        .collect();
    all_end(subject, &mut session, &requests, Status::Unsupported)?;
    same(&disk.read(0, disk.block())?, &before).context("on the disk")?;
    passed(format!("{} flags", flags.len()))
}

const UNKNOWN: [u32; 4] = [1 << 1, 1 << 16, 1 << 31, !UNMAP];

pub(super) fn discard_flags(subject: &Subject<'_>) -> Result<Outcome> {
    flags_refused(subject, feature::DISCARD, DISCARD, &UNKNOWN)
}

pub(super) fn discard_unmap(subject: &Subject<'_>) -> Result<Outcome> {
    flags_refused(subject, feature::DISCARD, DISCARD, &[UNMAP])
}

pub(super) fn erase_flags(subject: &Subject<'_>) -> Result<Outcome> {
    flags_refused(subject, feature::SECURE_ERASE, SECURE_ERASE, &UNKNOWN)
}

pub(super) fn zeroes_flags(subject: &Subject<'_>) -> Result<Outcome> {
    flags_refused(subject, feature::WRITE_ZEROES, WRITE_ZEROES, &UNKNOWN)
}

pub(super) fn zeroes_are_read(subject: &Subject<'_>) -> Result<Outcome> {
    let Some(mut session) = ranges(subject, feature::WRITE_ZEROES)? else {
        return skipped("WRITE_ZEROES is not offered");
    };
    let disk = subject.disk;
    let block = disk.block();
    for flags in [0, UNMAP] {
        for blocks in [1, 8] {
            let mut expected = noise(u64::from(flags), 12 * block);
            disk.write(0, &expected)?;
            let len = blocks * block;
            let range = segment(disk.block_sectors(), sectors(len), flags);
            let request = Request::other(WRITE_ZEROES, 0, range, 0);
            let done = subject.run(&mut session, request, &Shape::default())?;
            ended(&done, Status::Ok)?;
            expected[block..block + len].fill(0);
            let read = Request::read(0, 12 * block);
            let done = subject.run(&mut session, read, &Shape::default())?;
            same(&done.data, &expected)
                .with_context(|| format!("{blocks} blocks, unmap {flags}"))?;
        }
    }
    passed("2 ranges, with unmap and without")
}

/// How often the disk was flushed while `run` ran. None for one that has no
/// cache to flush, or writes of which the kernel does not say whether they went
/// through it.
fn flushed(subject: &Subject<'_>, run: impl FnOnce() -> Result<Completion>) -> Result<Option<u64>> {
    let Some(before) = subject.disk.flushes()? else {
        return Ok(None);
    };
    ended(&run()?, Status::Ok)?;
    Ok(subject.disk.flushes()?.map(|after| after - before))
}

const NO_CACHE: &str = "the disk has no cache whose flushes are counted";

/// A completed write has to have flushed the disk.
fn stable(subject: &Subject<'_>, session: &mut Session) -> Result<Outcome> {
    for seed in 0..5 {
        let request = Request::write(0, noise(seed, subject.disk.block()));
        let run = || subject.run(session, request, &Shape::default());
        match flushed(subject, run)? {
            None => return skipped(NO_CACHE),
            Some(count) => ensure!(count > 0, "a completed write is in the disk's cache"),
        }
    }
    passed("5 writes")
}

pub(super) fn stable_without_flush(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::FLUSH) {
        return skipped("FLUSH is not offered");
    }
    stable(
        subject,
        &mut subject.start(!(feature::FLUSH | feature::CONFIG_WCE))?,
    )
}

pub(super) fn stable_writethrough(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::CONFIG_WCE) {
        return skipped("CONFIG_WCE is not offered");
    }
    let mut session = subject.start(u64::MAX)?;
    session.set_writeback(false)?;
    stable(subject, &mut session)
}

pub(super) fn stable_when_flushed(subject: &Subject<'_>) -> Result<Outcome> {
    if !subject.offers(feature::FLUSH) {
        return skipped("FLUSH is not offered");
    }
    let mut session = subject.start(u64::MAX)?;
    if session.features() & feature::CONFIG_WCE != 0 {
        session.set_writeback(true)?;
    }
    for seed in 0..5 {
        let request = Request::write(0, noise(seed, subject.disk.block()));
        ended(
            &subject.run(&mut session, request, &Shape::default())?,
            Status::Ok,
        )?;
        let run = || subject.run(&mut session, Request::flush(), &Shape::default());
        match flushed(subject, run)? {
            None => return skipped(NO_CACHE),
            Some(count) => ensure!(count > 0, "the disk was not flushed"),
        }
    }
    passed("5 flushes")
}

pub(super) fn lifetime(subject: &Subject<'_>) -> Result<Outcome> {
    ensure!(
        !subject.offers(feature::LIFETIME),
        "it is offered, and the block layer has no such numbers"
    );
    passed("it is not offered")
}

pub(super) fn zoned_types(subject: &Subject<'_>) -> Result<Outcome> {
    let mut session = subject.start(!feature::ZONED)?;
    let before = subject.disk.read(0, subject.disk.block())?;
    let mut requests = Vec::new();
    for number in ZONED {
        requests.push(Request::other(number, 0, Vec::new(), 0));
        requests.push(Request::other(number, 0, Vec::new(), 8 * SECTOR_SIZE));
        requests.push(Request::other(number, 0, vec![0; SECTOR_SIZE], 8));
    }
    all_end(subject, &mut session, &requests, Status::Unsupported)?;
    same(&subject.disk.read(0, subject.disk.block())?, &before).context("on the disk")?;
    passed(format!("{} types", ZONED.len()))
}
