// SPDX-License-Identifier: GPL-2.0

//! Rings, memory and eventfds in unusual places, or moved while requests are in flight.
//!
//! All of it has to work the same whether the worker completes requests or whoever ends their bios,
//! which writes the used ring through a mapping of its own and has a call eventfd of its own.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{
    Buffer, Completion, Guest, GuestAddress, Kind, Memory, Options, Parts, Protection, Queue,
    Request, Ring, Segment, Shape, Status, Table,
};

use crate::check::{self, UsedLen, works};
use crate::context::{Context, PATIENCE, QUIET, Test, test};
use crate::disk::{self, Disk, SECTOR};
use crate::memory;

pub(crate) const TESTS: &[Test] = &[
    test!(
        "placement.rings_moved",
        "SET_VRING_ADDR and SET_MEM_TABLE to other memory with requests in flight",
        120,
        rings_moved
    ),
    test!(
        "placement.rings_moved_under_load",
        "SET_VRING_ADDR to other memory while requests complete",
        rings_moved_under_load
    ),
    test!(
        "placement.pages_replaced",
        "SET_MEM_TABLE after the rings' addresses got other pages, requests in flight",
        120,
        pages_replaced
    ),
    test!(
        "placement.late_call",
        "SET_VRING_CALL after requests have completed",
        late_call
    ),
    test!(
        "placement.rings_at_end",
        "rings without event indices that end where memory does",
        120,
        rings_at_end
    ),
    test!(
        "placement.file_memory",
        "memory that is a file's: what was read from the disk gets to the file",
        120,
        file_memory
    ),
];

/// Features, apart from event indices.
const FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::FLUSH;

/// Requests that are in flight at once.
const FLIGHT: u16 = 8;

/// How long what has to happen before the slow disk completes anything may take.
const SOON: Duration = Duration::from_millis(300);

/// Where requests write to, in sectors: within a slow disk.
const SCRATCH_START: u64 = 2048;

/// What a guest is made with.
fn options(context: &Context, event_idx: bool, size: u16) -> Options {
    Options {
        queue_size: size,
        features: FEATURES | if event_idx { feature::EVENT_IDX } else { 0 },
        memory: 16 << 20,
        ..context.options()
    }
}

/// Adds reads of the pattern, and writes.
fn submit(queue: &mut Queue, seed: u64) -> Result<()> {
    for n in 0..u64::from(FLIGHT) {
        let request = if n % 2 == 0 {
            Request::read(8 * n, 4096)
        } else {
            let sector = SCRATCH_START + 8 * n;
            Request::write(sector, disk::seeded(seed, sector, 8))
        };
        queue.submit(request, &Shape::default())?;
    }
    Ok(())
}

/// Checks a request that [`submit`] made.
fn finished(what: &str, done: &Completion) -> Result<()> {
    check::outcome(what, done, Status::Ok, UsedLen::Full)?;
    if done.request.kind == Kind::In {
        let count = done.data.len() / SECTOR;
        check::same(what, &done.data, &disk::pattern(done.request.sector, count))?;
    }
    Ok(())
}

/// All that is in flight completes, once.
fn all_finished(what: &str, queue: &mut Queue) -> Result<()> {
    let expected = queue.ring.next_avail();
    for done in queue.wait_all(PATIENCE).with_context(|| what.to_owned())? {
        finished(what, &done)?;
    }
    // A second entry for the same request would come at once, or with the next one.
    let used = queue.ring.used_idx()?;
    ensure!(
        used == expected,
        "{what}: the used index is {used}, expected {expected}"
    );
    Ok(())
}

/// Waits until the device has fetched all that was added.
fn fetched(guest: &mut Guest) -> Result<()> {
    let expected = u32::from(guest.queue(0).ring.next_avail());
    let deadline = Instant::now() + PATIENCE;
    while guest.device().get_vring_base(0)? & 0xffff != expected {
        ensure!(Instant::now() < deadline, "requests are not fetched");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Has requests in flight on the slow disk, `then` done to them, and says whether that was before
/// the first of them completed.
fn in_flight(
    guest: &mut Guest,
    seed: u64,
    then: impl FnOnce(&mut Guest) -> Result<()>,
) -> Result<bool> {
    submit(guest.queue(0), seed)?;
    let begin = Instant::now();
    guest.queue(0).ring.publish()?;
    guest.queue(0).ring.kick()?;
    fetched(guest)?;
    then(guest)?;
    Ok(begin.elapsed() < SOON)
}

/// A guest that runs on the slow disk and has completed requests on it. From then on those can be
/// completed without the worker: where they complete is known, and their pages are dirty.
fn warm(context: &Context, guest: &mut Guest) -> Result<()> {
    guest.start(context.slow_disk()?)?;
    for seed in 0..2 {
        submit(guest.queue(0), seed)?;
        guest.queue(0).kick()?;
        all_finished("before anything is moved", guest.queue(0))?;
    }
    Ok(())
}

/// The slow disk, with the pattern where [`submit`] reads.
fn prepare_slow_disk(context: &Context) -> Result<()> {
    Disk::open(context.slow_disk_path()?)?.write(0, &disk::pattern(0, 128))
}

/// Moves ring 0, and checks at the end of `then` that nothing was written where it was.
fn moved(
    guest: &mut Guest,
    parts: Parts,
    then: impl FnOnce(&mut Guest) -> Result<()>,
) -> Result<Parts> {
    let (device, queues) = guest.split();
    let old = works("SET_VRING_ADDR", queues[0].ring.move_to(device, 0, parts))?;
    let left = old.used.read(0, old.used.len())?;
    queues[0].ring.kick()?;
    then(guest)?;
    check::same(
        "the used ring that was left",
        &old.used.read(0, old.used.len())?,
        &left,
    )?;
    Ok(old)
}

fn rings_moved(context: &Context) -> Result<()> {
    prepare_slow_disk(context)?;
    for event_idx in [true, false] {
        // Dropped after the device.
        let elsewhere = Memory::new(4 << 20)?;
        let mut guest = Guest::new(&options(context, event_idx, 64))?;
        warm(context, &mut guest)?;

        context.step(format_args!("event_idx {event_idx}: to the same memory"));
        let parts = Parts::new(guest.memory(), 64)?;
        in_flight(&mut guest, 2, |guest| {
            moved(guest, parts, |guest| {
                all_finished("moved within memory", guest.queue(0))
            })
            .map(drop)
        })?;

        context.step(format_args!("event_idx {event_idx}: to another table"));
        in_flight(&mut guest, 3, |guest| {
            // The rings' own addresses stay as they are.
            works(
                "SET_MEM_TABLE",
                guest.device().set_mem_table(&elsewhere.regions()),
            )?;
            let parts = Parts::new(&elsewhere, 64)?;
            moved(guest, parts, |guest| {
                all_finished("moved to other memory", guest.queue(0))
            })
            .map(drop)
        })?;
        // From here on requests are in the other memory, too.
        for seed in 4..7 {
            submit(guest.queue(0), seed)?;
            guest.queue(0).kick()?;
            all_finished("in other memory", guest.queue(0))?;
        }
        thread::sleep(QUIET);
        ensure!(guest.queue(0).poll()?.is_none(), "an entry too many");
    }
    Ok(())
}

fn rings_moved_under_load(context: &Context) -> Result<()> {
    for event_idx in [true, false] {
        let mut guest = Guest::new(&options(context, event_idx, 64))?;
        guest.start(context.disk()?)?;
        check::healthy("at first", &mut guest, 0)?;
        let mut spare = Some(Parts::new(guest.memory(), 64)?);
        let (mut rounds, mut between) = (0u32, 0u32);
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(3) {
            let what = format!("event_idx {event_idx}, round {rounds}");
            let queue = guest.queue(0);
            for n in 0..u64::from(FLIGHT) {
                queue.submit(Request::read(8 * n, 4096), &Shape::default())?;
            }
            queue.kick()?;
            let pause = Instant::now();
            while pause.elapsed() < Duration::from_micros(u64::from(rounds * 37 % 800)) {
                std::hint::spin_loop();
            }
            let parts = spare.take().context("no spare ring")?;
            let mut some = false;
            spare = Some(moved(&mut guest, parts, |guest| {
                let queue = guest.queue(0);
                let left = queue.ring.next_avail().wrapping_sub(queue.ring.used_idx()?);
                some = left > 0;
                all_finished(&what, queue)
            })?);
            rounds += 1;
            between += u32::from(some);
        }
        context.note(format_args!(
            "event_idx {event_idx}: {rounds} moves, {between} of them with requests in flight"
        ));
        check::healthy("afterwards", &mut guest, 0)?;
    }
    Ok(())
}

fn pages_replaced(context: &Context) -> Result<()> {
    prepare_slow_disk(context)?;
    for event_idx in [true, false] {
        context.step(format_args!("event_idx {event_idx}"));
        let memory = Memory::shared(16 << 20)?;
        let mut guest = Guest::with_memory(&options(context, event_idx, 64), &memory)?;
        warm(context, &mut guest)?;
        let mut soon = false;
        for round in 0..5 {
            soon = in_flight(&mut guest, 2 + round, |guest| {
                let ring = &guest.queue(0).ring;
                for part in [ring.avail_ring(), ring.used_ring()] {
                    let bytes = part.read(0, part.len())?;
                    memory.replace_pages(part.addr(), part.len())?;
                    part.write(0, &bytes)?;
                }
                works(
                    "SET_MEM_TABLE",
                    guest.device().set_mem_table(&memory.regions()),
                )
            })?;
            // What completes in between is written to pages that nobody sees any more.
            if soon {
                all_finished("in other pages", guest.queue(0))?;
                break;
            }
            let bases = guest.stop()?;
            guest.queue(0).abandon();
            guest.queue(0).reset(bases[0])?;
            guest.resume(context.slow_disk()?, &bases)?;
        }
        ensure!(soon, "this host is too slow for this test");
        for seed in 10..12 {
            submit(guest.queue(0), seed)?;
            guest.queue(0).kick()?;
            all_finished("in other pages", guest.queue(0))?;
        }
    }
    Ok(())
}

/// Does `count` reads one after the other, looking at the used ring only, and asks for nothing.
fn quiet_reads(queue: &mut Queue, count: u64) -> Result<()> {
    for n in 0..count {
        queue.submit(Request::read(8 * n, 4096), &Shape::default())?;
        queue.kick()?;
        let deadline = Instant::now() + PATIENCE;
        let done = loop {
            if let Some(done) = queue.poll()? {
                break done;
            }
            ensure!(Instant::now() < deadline, "a read does not complete");
            // So that the worker sleeps when the request completes.
            thread::sleep(Duration::from_micros(200));
        };
        finished("without a call eventfd", &done)?;
    }
    Ok(())
}

fn late_call(context: &Context) -> Result<()> {
    for event_idx in [true, false] {
        let mut guest = Guest::new(&options(context, event_idx, 64))?;
        let call = guest.queue(0).ring.call_event().as_raw_fd();
        // From its start on, then with one in between.
        works("SET_VRING_CALL", guest.device().set_vring_call(0, -1))?;
        guest.start(context.disk()?)?;
        for (round, count) in (0..).zip([1, 20, 3, 200, 64]) {
            let what = format!("event_idx {event_idx}, round {round}");
            context.step(&what);
            // The wish stays as it is until there is someone to call: entries go past it.
            guest.queue(0).ring.enable_notifications()?;
            quiet_reads(guest.queue(0), count)?;
            works("SET_VRING_CALL", guest.device().set_vring_call(0, call))?;
            // What is told at once is allowed, and is not what is waited for.
            guest.queue(0).ring.wait_call(Duration::ZERO)?;

            let queue = guest.queue(0);
            queue.submit(Request::read(0, 4096), &Shape::default())?;
            queue.kick()?;
            ensure!(
                queue.ring.wait_call(PATIENCE)?,
                "{what}: no call for a request after SET_VRING_CALL"
            );
            all_finished(&what, queue)?;
            check::healthy(&what, &mut guest, 0)?;
            works("SET_VRING_CALL", guest.device().set_vring_call(0, -1))?;
            guest.queue(0).ring.wait_call(Duration::ZERO)?;
        }
    }
    Ok(())
}

/// Starts the guest, and returns how many pages the device pins without any request, of rings that
/// are mapped.
fn ring_pages(context: &Context, guest: &Guest) -> Result<i64> {
    let before = memory::pinned_pages().context("the kernel does not count pinned pages")?;
    guest.start(context.disk()?)?;
    let now = memory::pinned_pages().context("the kernel does not count pinned pages")?;
    Ok(now - before)
}

fn rings_at_end(context: &Context) -> Result<()> {
    for size in [64u16, 1024] {
        context.step(format_args!("ring of {size}"));
        let usual = Guest::new(&options(context, false, size))?;
        let usually = ring_pages(context, &usual)?;
        drop(usual);

        // Each ring in a region of its own, with a page behind it that nobody can access and that
        // the device is not told of.
        let [_, avail_len, used_len] = Parts::lengths(size, false);
        let end = |len: usize| len.next_multiple_of(PAGE_SIZE);
        let (avail, used) = (GuestAddress(1 << 32), GuestAddress(2 << 32));
        let memory = Memory::with_regions(&[
            (GuestAddress(0), 16 << 20),
            (avail, end(avail_len) + PAGE_SIZE),
            (used, end(used_len) + PAGE_SIZE),
        ])?;
        let mut regions = memory.regions();
        for region in &mut regions[1..] {
            region.memory_size -= PAGE_SIZE as u64;
            let guard = GuestAddress(region.guest_phys_addr + region.memory_size);
            memory.protect(guard, PAGE_SIZE, Protection::None)?;
        }
        let at_end = |region: GuestAddress, len: usize| {
            memory.alloc_at(GuestAddress(region.0 + (end(len) - len) as u64), len)
        };
        let mut parts = Parts::new(&memory, size)?;
        parts.avail = at_end(avail, avail_len)?;
        parts.used = at_end(used, used_len)?;

        let mut guest = Guest::with_memory(&options(context, false, size), &memory)?;
        works("SET_MEM_TABLE", guest.device().set_mem_table(&regions))?;
        *guest.queue(0) = Queue::with_ring(Ring::with_parts(&memory, size, false, parts)?);
        let (device, queues) = guest.split();
        works("the ring", queues[0].ring.set_up(device, 0, 0))?;
        // If they were taken to be longer than they are, they could not be mapped.
        let pages = ring_pages(context, &guest)?;
        ensure!(
            pages == usually,
            "ring of {size}: {pages} of its pages are pinned, {usually} elsewhere"
        );

        let queue = guest.queue(0);
        let mut count = 0;
        // Every entry twice, so each ring's last bytes, too.
        while count < 2 * usize::from(size) {
            while queue.ring.free_descriptors() > 0 {
                let request = Request::read(count as u64 % 2048, SECTOR);
                queue.submit(request, &Shape::default().table(Table::Indirect))?;
                count += 1;
            }
            queue.kick()?;
            all_finished(&format!("ring of {size}"), queue)?;
        }
        for n in 0..2 * u64::from(size).min(64) {
            check::read(n, queue, 8 * n, 8, &Shape::default())?;
        }
    }
    Ok(())
}

/// A file of zeroes on a disk, as long as a region.
fn region_file(path: &Path) -> Result<File> {
    std::fs::write(path, vec![0; REGION])?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    file.sync_all()?;
    Ok(file)
}

/// Length of a region that is a file, bytes.
const REGION: usize = 1 << 20;

/// A read whose data and status are in memory of different files.
struct Read {
    sector: u64,
    data: Buffer,
    status: Buffer,
    _header: Buffer,
}

impl Read {
    const LEN: usize = 8192;

    /// Adds it to the ring.
    fn submit(ring: &mut Ring, sector: u64, data: Buffer, status: Buffer) -> Result<Self> {
        let header = ring.memory().alloc(16, 16)?;
        header.fill(0)?;
        header.write(8, &sector.to_le_bytes())?;
        data.fill(0xee)?;
        status.fill(0xff)?;
        let segments = [
            Segment::readable(header.addr(), 16),
            Segment::writable(data.addr(), u32::try_from(Self::LEN)?),
            Segment::writable(status.addr(), 1),
        ];
        ring.add(&segments, Table::Direct)?;
        Ok(Read {
            sector,
            data,
            status,
            _header: header,
        })
    }

    /// Checks what is in the files on their disk.
    fn check(&self, what: &str, files: &[(GuestAddress, &Path); 2]) -> Result<()> {
        let at = |buffer: &Buffer, n: usize, count: usize| {
            let offset = buffer.addr().0 - files[n].0.0;
            // Past the page cache: pages that are not marked dirty are not written back before.
            Disk::open(files[n].1)?.read(offset / SECTOR as u64, count)
        };
        let count = Self::LEN / SECTOR;
        check::same(
            format_args!("{what}: data of sector {} in the file", self.sector),
            &at(&self.data, 0, count)?,
            &disk::pattern(self.sector, count),
        )?;
        let status = at(&self.status, 1, 1)?[0];
        ensure!(
            status == 0,
            "{what}: the status of sector {} in the file is {status:#x}",
            self.sector
        );
        Ok(())
    }
}

fn file_memory(context: &Context) -> Result<()> {
    const SIZE: u16 = 64;
    prepare_slow_disk(context)?;
    let folder = context.folder()?;
    // A folio is dirty as a whole, so one's writes must not be what saves the other's.
    let (data_path, status_path) = (folder.join("data"), folder.join("status"));
    let (data_file, status_file) = (region_file(&data_path)?, region_file(&status_path)?);
    let (data_start, status_start) = (GuestAddress(1 << 32), GuestAddress(2 << 32));
    let files = [
        (data_start, data_path.as_path()),
        (status_start, status_path.as_path()),
    ];
    let synchronise = || data_file.sync_all().and_then(|()| status_file.sync_all());
    let memory = Memory::with_files(vec![
        (GuestAddress(0), 16 << 20, None),
        (data_start, REGION, Some(data_file.try_clone()?)),
        (status_start, REGION, Some(status_file.try_clone()?)),
    ])?;
    let mut guest = Guest::with_memory(&options(context, true, SIZE), &memory)?;
    warm(context, &mut guest)?;
    let mut last = Vec::new();
    for round in 0..4u64 {
        let what = format!("round {round}");
        context.step(&what);
        last.clear();
        let ring = &mut guest.queue(0).ring;
        for n in 0..4u64 {
            let data = memory.alloc_at(GuestAddress(data_start.0 + n * 16384), Read::LEN)?;
            let status = memory.alloc_at(GuestAddress(status_start.0 + n * 16384), 1)?;
            last.push(Read::submit(ring, 8 * (n + round), data, status)?);
        }
        ring.publish()?;
        ring.kick()?;
        fetched(&mut guest)?;
        // Now their pages are pinned, and become clean.
        synchronise()?;
        let ring = &mut guest.queue(0).ring;
        let early = ring.used_idx()? != ring.last_used();
        if early {
            context.note("requests had completed when the files were synchronised");
        }
        for _ in 0..4 {
            ring.wait_used(PATIENCE)?;
        }
        synchronise()?;
        for read in &last {
            read.check(&what, &files)?;
        }
    }

    // The rings go to a file, where they cannot be pinned for long, and back.
    context.step("rings in a file");
    let in_file = |len: usize, at: u64| {
        memory.alloc_at(
            GuestAddress(data_start.0 + at),
            len.next_multiple_of(PAGE_SIZE),
        )
    };
    let [desc, avail, used] = Parts::lengths(SIZE, true);
    let mut spare = Some(Parts {
        desc: in_file(desc, 0x80000)?,
        avail: in_file(avail, 0x90000)?,
        used: in_file(used, 0xa0000)?,
    });
    for seed in 1..5 {
        in_flight(&mut guest, seed, |guest| {
            let parts = spare.take().context("no spare ring")?;
            spare = Some(moved(guest, parts, |guest| {
                all_finished("rings to the file or back", guest.queue(0))
            })?);
            Ok(())
        })?;
    }

    drop((guest, spare, last, memory));
    std::fs::remove_file(&data_path)?;
    std::fs::remove_file(&status_path)?;
    Ok(())
}
