// SPDX-License-Identifier: GPL-2.0

//! The dirty log, by which live migration knows what the device wrote to the guest's memory.
//!
//! What is logged is compared with all of the guest's memory as it was before: every page that the device
//! changed has to be in the log, whatever became of a request; and no page but those that it may write.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::uapi::{VHOST_BLK_SERIAL_LEN, feature};
use vhost_blk_ring::{
    Buffer, Completion, Cut, Device, Guest, GuestAddress, Kind, Memory, Options, Parts, Protection,
    Queue, Region, Request, Segment, Shape, Status, Table, report_zones,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::check::{self, UsedLen, fails, works};
use crate::context::{Context, PATIENCE, QUIET, Test, skip, test};
use crate::disk::{self, SECTOR};
use crate::kicks;

pub(crate) const TESTS: &[Test] = &[
    test!(
        "dirty_log.requests",
        "what requests of all kinds write is logged, and nothing else",
        180,
        requests
    ),
    test!(
        "dirty_log.failing_disk",
        "what a disk that fails has written is logged",
        120,
        failing_disk
    ),
    test!(
        "dirty_log.zones",
        "of a report and an append, what they write is logged, and not all that they may",
        zones
    ),
    test!(
        "dirty_log.regions",
        "descriptors that go over a border of memory regions, and rings that are moved",
        regions
    ),
    test!(
        "dirty_log.drained",
        "switching it on waits for requests in flight, switching it off does not",
        drained
    ),
    test!(
        "dirty_log.coalesced",
        "switched on while the guest is asked to kick for several requests and has some in flight",
        coalesced
    ),
    test!(
        "dirty_log.switched_under_load",
        "switched on and off 100 times while requests complete",
        120,
        switched_under_load
    ),
    test!(
        "dirty_log.restarted",
        "a backend that is started with it logs, one without does not",
        restarted
    ),
    test!(
        "dirty_log.refused",
        "what SET_FEATURES and the log's ioctls refuse while a backend runs",
        refused
    ),
    test!(
        "dirty_log.broken",
        "a log that cannot be written breaks its virtqueue and nothing else",
        broken
    ),
];

/// Features without the log.
const FEATURES: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::FLUSH;

/// `VHOST_VRING_F_LOG` of `linux/vhost_types.h`: the used ring is logged.
const RING_LOG: u32 = 1 << 0;

/// `VIRTIO_BLK_ZT_CONV`
const CONVENTIONAL: u8 = 1;

/// Bytes of `struct virtio_blk_zone_descriptor`, and of what precedes them in a report.
const ZONE_LEN: usize = 64;

/// Pages of guest memory, by number.
type Pages = BTreeSet<u64>;

/// The pages that have a byte of these.
fn pages(addr: GuestAddress, len: usize) -> impl Iterator<Item = u64> {
    let page = PAGE_SIZE as u64;
    addr.0 / page..(addr.0 + len as u64).div_ceil(page)
}

/// A log: a bit for each page of guest memory. A page that nobody can access follows it.
struct Log(Memory);

impl Log {
    /// A log for guest addresses up to `end`.
    fn new(end: u64) -> Result<Self> {
        let bytes = usize::try_from(end)?.div_ceil(PAGE_SIZE * 8);
        let log = Memory::new(bytes.next_multiple_of(PAGE_SIZE) + PAGE_SIZE)?;
        let guard = GuestAddress(bytes.next_multiple_of(PAGE_SIZE) as u64);
        log.protect(guard, PAGE_SIZE, Protection::None)?;
        Ok(Log(log))
    }

    /// A log for all of `memory`.
    fn of(memory: &Memory) -> Result<Self> {
        let end = |region: &Region| region.guest_phys_addr + region.memory_size;
        Self::new(memory.regions().iter().map(end).max().unwrap_or(0))
    }

    fn base(&self) -> Result<u64> {
        Ok(self.0.host_address(GuestAddress(0))?)
    }

    fn len(&self) -> Result<usize> {
        Ok(usize::try_from(self.0.available())? - PAGE_SIZE)
    }

    /// The pages in it, which it forgets. Nothing may be in flight.
    fn take(&self) -> Result<Pages> {
        let mut bits = vec![0; self.len()?];
        self.0.read(GuestAddress(0), &mut bits)?;
        self.0.write(GuestAddress(0), &vec![0; bits.len()])?;
        Ok((0..)
            .zip(bits)
            .flat_map(|(byte, bits): (u64, u8)| {
                (0..8)
                    .filter(move |bit| bits & (1 << bit) != 0)
                    .map(move |bit| 8 * byte + bit)
            })
            .collect())
    }

    /// Whether all these pages are in it.
    fn has(&self, mut pages: impl Iterator<Item = u64>) -> Result<bool> {
        let mut bits = vec![0; self.len()?];
        self.0.read(GuestAddress(0), &mut bits)?;
        Ok(pages.all(|page| {
            let byte = usize::try_from(page / 8).ok().and_then(|at| bits.get(at));
            byte.is_some_and(|byte| byte & (1 << (page % 8)) != 0)
        }))
    }
}

/// Says whether the used ring of a queue is logged, at the guest's address.
fn log_ring(device: &Device, index: u32, queue: &Queue, on: bool) -> Result<()> {
    let mut addresses = queue.ring.user_addresses(index)?;
    if on {
        addresses.flags = RING_LOG;
        addresses.log_guest_addr = queue.ring.used_ring().addr().0;
    }
    works(
        format_args!("SET_VRING_ADDR, log {on}"),
        device.set_vring_user_addr(&addresses),
    )
}

/// Switches the log on or off, as a virtual machine monitor does when a migration starts or ends.
fn switch(device: &Device, queues: &[Queue], features: u64, on: bool) -> Result<()> {
    let features = features | if on { feature::LOG_ALL } else { 0 };
    works(
        format_args!("SET_FEATURES, log {on}"),
        device.set_features(features),
    )?;
    for (index, queue) in (0..).zip(queues) {
        log_ring(device, index, queue, on)?;
    }
    Ok(())
}

/// Sets a log, and switches it on.
fn start_log(guest: &mut Guest, log: &Log) -> Result<()> {
    let features = guest.features();
    let (device, queues) = guest.split();
    works("SET_LOG_BASE", device.set_log_base(log.base()?))?;
    switch(device, queues, features, true)
}

/// All of the guest's memory: the address of each region, and what is in it.
fn image(memory: &Memory) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut image = Vec::new();
    for region in memory.regions() {
        let mut bytes = vec![0; usize::try_from(region.memory_size)?];
        memory.read(GuestAddress(region.guest_phys_addr), &mut bytes)?;
        image.push((region.guest_phys_addr, bytes));
    }
    Ok(image)
}

/// The pages in which two images differ.
fn changed(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> Pages {
    let mut pages = Pages::new();
    for ((start, old), (_, new)) in before.iter().zip(after) {
        let first = start / PAGE_SIZE as u64;
        let pairs = old.chunks(PAGE_SIZE).zip(new.chunks(PAGE_SIZE));
        pages.extend(
            (first..)
                .zip(pairs)
                .filter(|(_, (a, b))| a != b)
                .map(|(page, _)| page),
        );
    }
    pages
}

/// Waits until the worker is done with a queue, whose requests are complete: it logs the used ring after
/// it wrote it.
fn at_rest(device: &Device) -> Result<()> {
    // It has the queue's lock while it works.
    device.get_vring_base(0)?;
    Ok(())
}

/// The pages of a buffer.
fn buffer_pages(buffer: &Buffer) -> Pages {
    pages(buffer.addr(), buffer.len()).collect()
}

/// Publishes what was added to queue 0, and waits for all of it. Then checks the log: every page that changed
/// is in it, and none but `writable` ones and the used ring's.
fn checked(what: &str, guest: &mut Guest, log: &Log, writable: &Pages) -> Result<()> {
    at_rest(guest.device())?;
    let memory = guest.memory().clone();
    let before = image(&memory)?;
    log.take()?;

    let queue = guest.queue(0);
    let expected = queue.ring.next_avail();
    queue.kick().with_context(|| what.to_owned())?;
    let deadline = Instant::now() + PATIENCE;
    while queue.ring.used_idx()? != expected {
        ensure!(Instant::now() < deadline, "{what}: does not complete");
        thread::sleep(Duration::from_millis(1));
    }
    at_rest(guest.device())?;
    let changed = changed(&before, &image(&memory)?);
    let logged = log.take()?;

    let ring = &guest.queue(0).ring;
    let driver = &buffer_pages(ring.avail_ring()) | &buffer_pages(ring.descriptor_table());
    let used = buffer_pages(ring.used_ring());
    let missing: Vec<_> = changed.difference(&(&logged | &driver)).copied().collect();
    ensure!(
        missing.is_empty(),
        "{what}: changed and not logged: pages {missing:?}"
    );
    let wrong: Vec<_> = logged.difference(&(writable | &used)).copied().collect();
    ensure!(
        wrong.is_empty(),
        "{what}: logged and not to be written: pages {wrong:?}"
    );
    ensure!(
        !logged.is_disjoint(&used),
        "{what}: the used ring is not logged"
    );
    Ok(())
}

/// The pages that the request at `head`, which was added to a queue, may write.
fn writable(queue: &Queue, head: u16) -> Result<Pages> {
    let segments = queue.segments(head)?;
    let writable = segments.iter().filter(|segment| segment.writable);
    Ok(writable
        .flat_map(|segment| pages(segment.addr, segment.len as usize))
        .collect())
}

/// The page of the status of the request at `head`.
fn status_page(queue: &Queue, head: u16) -> Result<Pages> {
    let segments = queue.segments(head)?;
    let last = segments.iter().rfind(|segment| segment.len > 0);
    let last = last.context("a request without memory")?;
    let end = GuestAddress(last.addr.0 + u64::from(last.len) - 1);
    Ok(pages(end, 1).collect())
}

/// Does a request on queue 0, and checks the log. Nothing but its status may be written if `only_status`.
fn one(
    what: &str,
    guest: &mut Guest,
    log: &Log,
    request: &Request,
    shape: &Shape,
    only_status: bool,
) -> Result<Completion> {
    let queue = guest.queue(0);
    let head = queue.submit(request.clone(), shape)?;
    let allowed = if only_status {
        status_page(queue, head)?
    } else {
        writable(queue, head)?
    };
    checked(what, guest, log, &allowed)?;
    let done = guest.queue(0).wait(PATIENCE)?;
    ensure!(done.stray_write.is_none(), "{what}: stray write");
    ensure!(
        !only_status || done.untouched,
        "{what}: its data was written"
    );
    Ok(done)
}

/// Requests, how each ends, and whether nothing but its status is written.
fn kinds() -> Vec<(&'static str, Request, Status, bool)> {
    let (scratch, _) = disk::SCRATCH;
    let data = |len: usize| disk::seeded(1, scratch, len / SECTOR);
    vec![
        ("read", Request::read(0, 4096), Status::Ok, false),
        ("read of a sector", Request::read(9, 512), Status::Ok, false),
        (
            "read of 64 KiB",
            Request::read(64, 64 << 10),
            Status::Ok,
            false,
        ),
        (
            "read of 1.25 MiB",
            Request::read(0, 5 << 18),
            Status::Ok,
            false,
        ),
        ("empty read", Request::read(0, 0), Status::Ok, true),
        (
            "write",
            Request::write(scratch, data(4096)),
            Status::Ok,
            true,
        ),
        (
            "write of 1.25 MiB",
            Request::write(scratch, data(5 << 18)),
            Status::Ok,
            true,
        ),
        ("flush", Request::flush(), Status::Ok, true),
        (
            "serial",
            Request::get_id(VHOST_BLK_SERIAL_LEN),
            Status::Ok,
            false,
        ),
        ("part of the serial", Request::get_id(5), Status::Ok, false),
        (
            "unknown",
            Request::other(77, 0, Vec::new(), 64 << 10),
            Status::Unsupported,
            true,
        ),
        (
            "read beyond the end",
            Request::read(u64::MAX / 512, 64 << 10),
            Status::IoErr,
            true,
        ),
        (
            "read of no whole sectors",
            Request::read(0, 5000),
            Status::IoErr,
            true,
        ),
        (
            "short header",
            Request::read(0, 64 << 10).with_header_len(7),
            Status::IoErr,
            true,
        ),
    ]
}

fn requests(context: &Context) -> Result<()> {
    let shapes = [
        ("usual", Shape::default()),
        ("indirect", Shape::default().table(Table::Indirect)),
        (
            "indirect, in pages",
            Shape::cut(Cut::Data(4096))
                .at(4096, 0)
                .table(Table::Indirect),
        ),
        ("joined", Shape::cut(Cut::Joined).table(Table::After(1))),
        (
            "in sectors",
            Shape::cut(Cut::Data(512)).table(Table::Indirect),
        ),
        (
            "off by 3",
            Shape::default().at(512, 3).table(Table::Indirect),
        ),
        (
            "off by 3, in pieces",
            Shape::cut(Cut::Every(6000))
                .at(512, 3)
                .table(Table::Indirect),
        ),
    ];
    for (event_idx, shapes) in [(true, &shapes[..]), (false, &shapes[..1])] {
        let mut guest = guest(context, |options| {
            options.features = FEATURES | if event_idx { feature::EVENT_IDX } else { 0 };
            options.base = 65530;
        })?;
        let log = Log::of(guest.memory())?;
        guest.start(context.disk()?)?;
        check::healthy("before", &mut guest, 0)?;
        ensure!(log.take()?.is_empty(), "logged before it was switched on");
        start_log(&mut guest, &log)?;

        for (how, shape) in shapes {
            for (kind, request, status, only_status) in kinds() {
                // As many pieces as the ring and the host take.
                if matches!(shape.cut, Cut::Data(512))
                    && request.in_len.max(request.out.len()) > 400 << 10
                {
                    continue;
                }
                let what = format!("{kind}, {how}, event_idx {event_idx}");
                context.step(&what);
                let done = one(&what, &mut guest, &log, &request, shape, only_status)?;
                ensure!(done.status == status, "{what}: status {:?}", done.status);
            }
        }
        // A serial goes to the first bytes, whatever else there is.
        let queue = guest.queue(0);
        let head = queue.submit(Request::get_id(1 << 20), &Shape::default())?;
        let data = queue.segments(head)?[1].addr;
        let allowed = &pages(data, VHOST_BLK_SERIAL_LEN).collect() | &status_page(queue, head)?;
        checked("a long serial", &mut guest, &log, &allowed)?;
        guest.queue(0).wait(PATIENCE)?;

        context.step("all at once");
        let queue = guest.queue(0);
        let mut allowed = Pages::new();
        for (_, request, _, _) in kinds().into_iter().chain(kinds()) {
            let head = queue.submit(request, &Shape::default())?;
            allowed.append(&mut writable(queue, head)?);
        }
        checked("all at once", &mut guest, &log, &allowed)?;
        guest.queue(0).wait_all(PATIENCE)?;

        let features = guest.features();
        let (device, queues) = guest.split();
        switch(device, queues, features, false)?;
        log.take()?;
        check::healthy("switched off", &mut guest, 0)?;
        at_rest(guest.device())?;
        ensure!(log.take()?.is_empty(), "logged after it was switched off");
    }
    Ok(())
}

/// A guest with little memory, since all of it is compared.
fn guest(context: &Context, change: impl FnOnce(&mut Options)) -> Result<Guest> {
    context.guest(|options| {
        options.memory = 8 << 20;
        options.features = FEATURES | feature::EVENT_IDX;
        change(options);
    })
}

fn failing_disk(context: &Context) -> Result<()> {
    let disk = context.bad_disk()?;
    let mut guest = guest(context, |_| {})?;
    let log = Log::of(guest.memory())?;
    let half = guest.device().info(Some(disk.as_fd()))?.capacity / 2;
    guest.start(&disk)?;
    check::write(
        "the good half",
        guest.queue(0),
        half - 2048,
        disk::seeded(41, 0, 2048),
        &Shape::default(),
    )?;
    start_log(&mut guest, &log)?;
    let in_pages = Shape::cut(Cut::Data(4096))
        .at(4096, 0)
        .table(Table::Indirect);
    let shapes = [Shape::default(), Shape::default().at(512, 1), in_pages];
    for (number, shape) in shapes.iter().enumerate() {
        for (what, sector, count) in [
            ("the bad half", half, 8),
            ("the bad half, long", half, 2048),
            ("both halves", half - 8, 16),
            ("both halves, long", half - 2048, 4096),
        ] {
            let what = format!("{what}, shape {number}");
            context.step(&what);
            let request = Request::read(sector, count * SECTOR);
            let done = one(&what, &mut guest, &log, &request, shape, false)?;
            ensure!(
                done.status == Status::IoErr,
                "{what}: status {:?}",
                done.status
            );
            let request = Request::write(sector, vec![1; count * SECTOR]);
            let done = one(&what, &mut guest, &log, &request, shape, true)?;
            ensure!(
                done.status == Status::IoErr,
                "{what}: status {:?}",
                done.status
            );
        }
    }
    Ok(())
}

fn regions(context: &Context) -> Result<()> {
    const BORDER: u64 = 8 << 20;
    let far = GuestAddress(1 << 32);
    let memory = Memory::with_regions(&[
        (GuestAddress(0), 8 << 20),
        (GuestAddress(BORDER), 1 << 20),
        (far, 1 << 20),
    ])?;
    let options = Options {
        queue_size: 64,
        features: FEATURES | feature::EVENT_IDX,
        ..context.options()
    };
    let mut guest = Guest::with_memory(&options, &memory)?;
    let log = Log::of(&memory)?;
    guest.start(context.disk()?)?;
    start_log(&mut guest, &log)?;

    let header = memory.alloc(16, PAGE_SIZE)?;
    header.fill(0)?;
    let status = memory.alloc_at(GuestAddress(far.0 + 7), 1)?;
    let end = memory.alloc_at(GuestAddress(BORDER - 2048), 2048)?;
    let start = memory.alloc_at(GuestAddress(BORDER), 2048)?;
    let elsewhere = memory.alloc_at(GuestAddress(far.0 + 5 * PAGE_SIZE as u64), 4096)?;
    for (what, table) in [("direct", Table::Direct), ("indirect", Table::Indirect)] {
        context.step(what);
        status.fill(0xee)?;
        for buffer in [&end, &start, &elsewhere] {
            buffer.fill(0xa5)?;
        }
        let segments = [
            Segment::readable(header.addr(), 16),
            Segment::writable(end.addr(), 4096),
            Segment::writable(elsewhere.addr(), 4096),
            Segment::writable(status.addr(), 1),
        ];
        let queue = guest.queue(0);
        queue.ring.add(&segments, table)?;
        let allowed = segments[1..]
            .iter()
            .flat_map(|segment| pages(segment.addr, segment.len as usize));
        checked(what, &mut guest, &log, &allowed.collect())?;
        guest.queue(0).ring.wait_used(PATIENCE)?;
        ensure!(status.read(0, 1)? == [0], "{what}: status");
        check::same(what, &end.read(0, 2048)?, &disk::pattern(0, 4))?;
        check::same(what, &start.read(0, 2048)?, &disk::pattern(4, 4))?;
        check::same(what, &elsewhere.read(0, 4096)?, &disk::pattern(8, 8))?;
    }

    context.step("a ring that is moved");
    let parts = Parts::new(&memory, 64)?;
    let (device, queues) = guest.split();
    let old = works("SET_VRING_ADDR", queues[0].ring.move_to(device, 0, parts))?;
    log_ring(device, 0, &queues[0], true)?;
    queues[0].ring.kick()?;
    one(
        "moved",
        &mut guest,
        &log,
        &Request::read(0, 8192),
        &Shape::default(),
        false,
    )?;
    drop(old);
    Ok(())
}

/// Requests that are in flight at once.
const FLIGHT: u64 = 8;

/// Adds reads to queue 0, and returns when they are in flight: the pages that they may write.
fn in_flight(guest: &mut Guest) -> Result<Pages> {
    let queue = guest.queue(0);
    let mut all = Pages::new();
    for n in 0..FLIGHT {
        let head = queue.submit(Request::read(8 * n, 4096), &Shape::default())?;
        all.append(&mut writable(queue, head)?);
    }
    queue.kick()?;
    let expected = u32::from(queue.ring.next_avail());
    let deadline = Instant::now() + PATIENCE;
    while guest.device().get_vring_base(0)? & 0xffff != expected {
        ensure!(Instant::now() < deadline, "requests are not fetched");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(all)
}

fn drained(context: &Context) -> Result<()> {
    let mut guest = guest(context, |_| {})?;
    let log = Log::of(guest.memory())?;
    let features = guest.features();
    guest.start(context.slow_disk()?)?;
    works("SET_LOG_BASE", guest.device().set_log_base(log.base()?))?;

    for round in 0..2 {
        context.step(format_args!("round {round}: on"));
        in_flight(&mut guest)?;
        let (device, queues) = guest.split();
        switch(device, queues, features, true)?;
        let (used, all) = (queues[0].ring.used_idx()?, queues[0].ring.next_avail());
        ensure!(
            used == all,
            "SET_FEATURES returned with requests in flight that are not logged: used index {used} of {all}"
        );
        guest.queue(0).wait_all(PATIENCE)?;

        context.step(format_args!("round {round}: off"));
        in_flight(&mut guest)?;
        let (device, queues) = guest.split();
        switch(device, queues, features, false)?;
        log.take()?;
        ensure!(
            queues[0].ring.used_idx()? != queues[0].ring.next_avail(),
            "SET_FEATURES waited for requests when it switched the log off"
        );
        queues[0].wait_all(PATIENCE)?;
        at_rest(device)?;
        ensure!(
            log.take()?.is_empty(),
            "requests in flight were logged after it was switched off"
        );

        context.step(format_args!(
            "round {round}: in flight when it is switched off and on"
        ));
        switch(device, queues, features, true)?;
        let all = in_flight(&mut guest)?;
        let (device, queues) = guest.split();
        switch(device, queues, features, false)?;
        switch(device, queues, features, true)?;
        let queue = guest.queue(0);
        ensure!(
            queue.ring.used_idx()? == queue.ring.next_avail(),
            "not drained"
        );
        queue.wait_all(PATIENCE)?;
        log.take()?;
        let again = in_flight(&mut guest)?;
        for done in guest.queue(0).wait_all(PATIENCE)? {
            check::outcome("logged", &done, Status::Ok, UsedLen::Full)?;
        }
        ensure!(
            log.has(again.iter().copied())?,
            "not logged: {all:?}, {again:?}"
        );
        let (device, queues) = guest.split();
        switch(device, queues, features, false)?;
    }
    Ok(())
}

fn coalesced(context: &Context) -> Result<()> {
    const ROUNDS: usize = 8;
    let mut logged = 0;
    for round in 0..ROUNDS {
        context.step(format_args!("round {round}"));
        // One that knows nothing yet of who adds fewer than it asks for.
        let mut guest = context.guest(|options| options.queue_size = 1024)?;
        let log = Log::of(guest.memory())?;
        guest.start(context.slow_disk()?)?;

        let queue = guest.queue(0);
        let Some(wanted) = kicks::asked_in_flight(context, queue)? else {
            return skip("too slow");
        };
        let fetched = queue.ring.next_avail();
        let (heads, unkicked) = kicks::add_fewer(queue, wanted)?;
        start_log(&mut guest, &log)?;
        let queue = guest.queue(0);
        let used = queue.ring.used_idx()?;
        ensure!(
            usize::from(used.wrapping_sub(fetched)) <= heads.len(),
            "SET_FEATURES returned with requests in flight that are not logged: used index {used} of {fetched}"
        );
        let mut all = Pages::new();
        for &head in &heads {
            all.append(&mut writable(queue, head)?);
        }
        kicks::wait_unkicked(queue)?;
        at_rest(guest.device())?;
        // What was fetched before need not be in it.
        if used == fetched {
            ensure!(log.has(all.iter().copied())?, "not logged: {all:?}");
            logged += usize::from(unkicked);
        }
        if logged == 2 {
            return Ok(());
        }
    }
    bail!("logged {logged} times: it was kicked, or looked before");
}

/// Reads the pattern and checks it until told to stop. Returns how many reads there were.
fn load(queue: &mut Queue, stop: &AtomicBool) -> Result<u64> {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        for n in 0..16 {
            let shape = Shape::default().at(512, if n % 4 == 0 { 1 } else { 0 });
            queue.submit(Request::read(8 * n, 4096 << (n % 4)), &shape)?;
        }
        queue.kick()?;
        for done in queue.wait_all(PATIENCE)? {
            check::outcome("load", &done, Status::Ok, UsedLen::Full)?;
            let expected = disk::pattern(done.request.sector, done.data.len() / SECTOR);
            check::same("load", &done.data, &expected)?;
            count += 1;
        }
    }
    Ok(count)
}

fn switched_under_load(context: &Context) -> Result<()> {
    const ROUNDS: u64 = 100;
    let mut guest = guest(context, |options| options.queues = 2)?;
    let log = Log::of(guest.memory())?;
    let features = guest.features();
    guest.start(context.disk()?)?;
    works("SET_LOG_BASE", guest.device().set_log_base(log.base()?))?;
    let (device, queues) = guest.split();
    // Its ring is not moved while a thread has it.
    let (first, second) = queues.split_at_mut(1);
    let queue = &mut first[0];
    let stop = AtomicBool::new(false);

    let count = thread::scope(|scope| -> Result<u64> {
        let other = scope.spawn(|| load(&mut second[0], &stop));
        let result = (0..ROUNDS).try_for_each(|round| -> Result<()> {
            let submit = |queue: &mut Queue| -> Result<Pages> {
                let mut all = Pages::new();
                for n in 0..16 {
                    let request = if (n + round) % 3 == 0 {
                        Request::write(disk::SCRATCH.0 + 8 * n, disk::seeded(n, 0, 8))
                    } else {
                        Request::read(8 * n, 4096)
                    };
                    let shape = Shape::default().at(512, usize::from(n == 5));
                    let head = queue.submit(request, &shape)?;
                    all.append(&mut writable(queue, head)?);
                }
                queue.kick()?;
                Ok(all)
            };
            let finish = |queue: &mut Queue| -> Result<()> {
                for done in queue.wait_all(PATIENCE)? {
                    check::outcome(round, &done, Status::Ok, UsedLen::Full)?;
                }
                Ok(())
            };
            submit(queue)?;
            works("on", device.set_features(features | feature::LOG_ALL))?;
            log_ring(device, 0, queue, true)?;
            finish(queue)?;
            log.take()?;
            let all = submit(queue)?;
            finish(queue)?;
            at_rest(device)?;
            ensure!(
                log.has(all.iter().copied())?,
                "round {round}: not all of {all:?} was logged"
            );
            ensure!(
                log.has(pages(queue.ring.used_ring().addr(), 2))?,
                "round {round}: the used ring was not logged"
            );
            // Some are in flight then.
            submit(queue)?;
            works("off", device.set_features(features))?;
            log_ring(device, 0, queue, false)?;
            log.take()?;
            finish(queue)?;
            at_rest(device)?;
            ensure!(
                log.take()?.is_empty(),
                "round {round}: logged after it was switched off"
            );
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let count = other.join().expect("a thread that does not panic")?;
        result.map(|()| count)
    })?;
    context.note(format_args!("{count} reads on the other queue meanwhile"));
    ensure!(count > 0, "the other queue did nothing");
    Ok(())
}

fn zones(context: &Context) -> Result<()> {
    let disk = context.zoned_disk()?;
    let mut guest = guest(context, |options| options.features |= feature::ZONED)?;
    let log = Log::of(guest.memory())?;
    guest.start(&disk)?;
    start_log(&mut guest, &log)?;
    let all = report_zones(&disk, 0)?;
    let sequential = all.iter().rfind(|zone| zone.kind != CONVENTIONAL);
    let zone = sequential.context("no sequential zone")?.start;
    let reset = Request::zone(Kind::ZoneReset, zone);
    let mut append = Request::zone_append(zone, vec![1; 4096]);
    append.in_len = 64 << 10;
    let report = Request::zone_report(0, 16 * PAGE_SIZE / ZONE_LEN);
    ensure!(
        (all.len() + 1) * ZONE_LEN < 8 * PAGE_SIZE,
        "too many zones for this test"
    );
    for (what, request, most) in [
        ("reset", reset, 0),
        ("append", append, 8),
        ("report", report, (all.len() + 1) * ZONE_LEN),
    ] {
        context.step(what);
        let queue = guest.queue(0);
        let head = queue.submit(request, &Shape::default())?;
        let segments = queue.segments(head)?;
        let first = segments.iter().find(|segment| segment.writable);
        let first = first.context("a request without a status")?.addr;
        let allowed = &pages(first, most).collect() | &status_page(queue, head)?;
        checked(what, &mut guest, &log, &allowed)?;
        let done = guest.queue(0).wait(PATIENCE)?;
        ensure!(done.status == Status::Ok, "{what}: {:?}", done.status);
    }
    Ok(())
}

fn restarted(context: &Context) -> Result<()> {
    let mut guest = guest(context, |_| {})?;
    let log = Log::of(guest.memory())?;
    let features = guest.features();
    let request = Request::read(0, 8192);
    let mut bases = vec![0];
    for on in [true, false, true, true, false] {
        context.step(format_args!("log {on}"));
        let (device, queues) = guest.split();
        works("SET_LOG_BASE", device.set_log_base(log.base()?))?;
        let wanted = features | if on { feature::LOG_ALL } else { 0 };
        works("SET_FEATURES", device.set_features(wanted))?;
        queues[0].ring.set_up(device, 0, bases[0])?;
        log_ring(device, 0, &queues[0], on)?;
        works("SET_BACKEND", device.set_backend(context.disk()?))?;
        if on {
            one(
                "started with it",
                &mut guest,
                &log,
                &request,
                &Shape::default(),
                false,
            )?;
        } else {
            log.take()?;
            check::healthy("started without", &mut guest, 0)?;
            at_rest(guest.device())?;
            ensure!(
                log.take()?.is_empty(),
                "logged without having been asked to"
            );
        }
        bases = guest.stop()?;
    }
    Ok(())
}

fn refused(context: &Context) -> Result<()> {
    let mut guest = guest(context, |_| {})?;
    let features = guest.features();
    let log = Log::of(guest.memory())?;
    ensure!(
        guest.device().get_features()? & feature::LOG_ALL != 0,
        "VHOST_F_LOG_ALL is not on offer"
    );
    // Nothing can be logged there; what runs goes on, and what was set stays.
    const KERNEL: u64 = 0xffff_8000_0000_0000;
    guest.start(context.disk()?)?;
    works(
        "SET_LOG_BASE without the feature",
        guest.device().set_log_base(KERNEL),
    )?;
    fails(
        "SET_FEATURES with a log at an address of the kernel",
        guest.device().set_features(features | feature::LOG_ALL),
        libc::EFAULT,
    )?;
    check::healthy("after a log that cannot be", &mut guest, 0)?;

    start_log(&mut guest, &log)?;
    for bit in [feature::FLUSH, feature::EVENT_IDX, feature::RO] {
        for log_all in [0, feature::LOG_ALL] {
            fails(
                format_args!("SET_FEATURES with {bit:#x} changed"),
                guest.device().set_features((features ^ bit) | log_all),
                libc::EBUSY,
            )?;
        }
    }
    fails(
        "SET_LOG_BASE at an address of the kernel",
        guest.device().set_log_base(KERNEL),
        libc::EFAULT,
    )?;
    fails(
        "SET_LOG_BASE at the end of all addresses",
        guest.device().set_log_base(u64::MAX - 4095),
        libc::EFAULT,
    )?;
    let mut addresses = guest.queue(0).ring.user_addresses(0)?;
    for (what, address, errno) in [
        ("at no multiple of 4", 2, libc::EINVAL),
        ("beyond all logs", u64::MAX - 4095, libc::EINVAL),
    ] {
        addresses.flags = RING_LOG;
        addresses.log_guest_addr = address;
        fails(
            format_args!("SET_VRING_ADDR, log {what}"),
            guest.device().set_vring_user_addr(&addresses),
            errno,
        )?;
    }
    let file = guest.device().file().try_clone()?;
    let said = context.other_process("log_of_another", file)?;
    ensure!(said.trim() == "done", "the other process said: {said}");

    // All of it left the log as it was.
    let request = Request::read(0, 8192);
    one(
        "after refusals",
        &mut guest,
        &log,
        &request,
        &Shape::default(),
        false,
    )?;

    context.step("SET_LOG_FD");
    let event = EventFd::new(EFD_NONBLOCK)?;
    works("SET_LOG_FD", guest.device().set_log_fd(event.as_raw_fd()))?;
    check::healthy("with an eventfd", &mut guest, 0)?;
    at_rest(guest.device())?;
    ensure!(event.read().is_ok(), "the log's eventfd was not signalled");
    works("SET_LOG_FD -1", guest.device().set_log_fd(-1))?;
    check::healthy("without an eventfd", &mut guest, 0)?;
    at_rest(guest.device())?;
    ensure!(
        event.read().is_err(),
        "an eventfd that was taken away was signalled"
    );
    Ok(())
}

/// The part of [`refused`] that another process plays: it may not switch the log of a device that runs.
pub(crate) fn of_another(device: File) -> Result<()> {
    let device = Device::from_file(device);
    fails(
        "SET_FEATURES",
        device.set_features(FEATURES | feature::EVENT_IDX),
        libc::EPERM,
    )?;
    fails("SET_LOG_BASE", device.set_log_base(0), libc::EPERM)?;
    println!("done");
    Ok(())
}

fn broken(context: &Context) -> Result<()> {
    let far = GuestAddress(1 << 32);
    let memory = Memory::with_regions(&[(GuestAddress(0), 4 << 20), (far, 1 << 20)])?;
    let options = Options {
        queues: 2,
        queue_size: 64,
        features: FEATURES | feature::EVENT_IDX,
        ..context.options()
    };
    let header = memory.alloc(16, 16)?;
    header.fill(0)?;
    let data = memory.alloc_at(far, 4096)?;
    let status = memory.alloc(1, 1)?;
    let chain = [
        Segment::readable(header.addr(), 16),
        Segment::writable(data.addr(), 4096),
        Segment::writable(status.addr(), 1),
    ];
    let log = Log::of(&memory)?;
    // What is for the far region begins in a page of its own, and all after it is left out.
    let cut = GuestAddress(far.0 / PAGE_SIZE as u64 / 8);
    for (how, from, protection) in [
        ("too short", cut, Protection::None),
        ("read-only", GuestAddress(0), Protection::Read),
    ] {
        context.step(how);
        let mut guest = Guest::with_memory(&options, &memory)?;
        let bad = Log::of(&memory)?;
        guest.start(context.disk()?)?;
        start_log(&mut guest, &bad)?;
        let len = bad.len()? - usize::try_from(from.0)?;
        bad.0.protect(from, len, protection)?;

        let queue = guest.queue(0);
        if protection == Protection::None {
            check::read("what fits", queue, 0, 8, &Shape::default())?;
        }
        queue.ring.add(&chain, Table::Direct)?;
        queue.kick()?;
        ensure!(
            queue.ring.wait_err(PATIENCE)?,
            "{how}: the error eventfd was not signalled"
        );
        // The request is done, but nothing more is.
        queue.ring.wait_used(PATIENCE)?;
        queue.submit(Request::read(0, 4096), &Shape::default())?;
        queue.kick()?;
        thread::sleep(QUIET);
        ensure!(queue.poll()?.is_none(), "{how}: the queue goes on");
        if protection == Protection::None {
            check::healthy(how, &mut guest, 1)?;
        }

        context.step(format_args!("{how}: a log that works, and a new start"));
        let bases = guest.stop()?;
        works("SET_LOG_BASE", guest.device().set_log_base(log.base()?))?;
        guest.resume(context.disk()?, &bases)?;
        guest.queue(0).wait_all(PATIENCE)?;
        let (device, queues) = guest.split();
        log_ring(device, 0, &queues[0], true)?;
        let request = Request::read(0, 4096);
        one(
            "restarted",
            &mut guest,
            &log,
            &request,
            &Shape::default(),
            false,
        )?;
        check::healthy("restarted", &mut guest, 1)?;
    }
    Ok(())
}
