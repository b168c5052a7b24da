// SPDX-License-Identifier: GPL-2.0

//! The device IOTLB: messages, misses, what is taken away, and what never comes.

use std::io::Read as _;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::iotlb::{Access, Format, Kind, MESSAGE_LEN, Message};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::request::Prepared;
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{
    Counts, Device, Guest, GuestAddress, Iotlb, Memory, Options, Request, Segment, Shape, Status,
    Table, Translator,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::check::{self, UsedLen, fails, works};
use crate::context::{Context, PATIENCE, QUIET, Test, test};
use crate::disk;

pub(crate) const TESTS: &[Test] = &[
    test!(
        "iotlb.messages",
        "messages that are right and wrong, before, with and after an IOTLB",
        messages
    ),
    test!(
        "iotlb.each_miss",
        "every miss of a request is told of, one after the other, and can be polled for",
        each_miss
    ),
    test!(
        "iotlb.invalidated",
        "translations are taken away under load, in both formats of messages",
        120,
        invalidated
    ),
    test!(
        "iotlb.read_only",
        "what the device may not write to breaks the ring, and only that",
        read_only
    ),
    test!(
        "iotlb.unanswered",
        "a miss that is never answered holds up no other queue, stop, reset or close",
        unanswered
    ),
    test!(
        "iotlb.late_ring",
        "requests that are done wait for the ring's translation",
        late_ring
    ),
    test!(
        "iotlb.lost_ring",
        "a stop that cannot write the ring drops what is done, and says so",
        lost_ring
    ),
    test!(
        "iotlb.bounded",
        "a guest that kicks on and on adds no messages",
        bounded
    ),
    test!(
        "iotlb.too_many",
        "a chain that needs more translations than there is room for breaks the ring",
        300,
        too_many
    ),
    test!(
        "iotlb.memory_table",
        "the memory table and the rings' addresses change while the device runs",
        memory_table
    ),
];

/// Nobody answers misses but the test.
const MANUAL: Iotlb = Iotlb {
    format: Format::V2,
    invalidate_every: None,
    manual: true,
};

const PAGE: u64 = PAGE_SIZE as u64;

/// Rounds after which the device has asked for most of what it needs.
const FIRST_ROUNDS: u64 = 1;

/// Translations that have to be taken away after these, at least, and be asked for again.
const ASKED_AGAIN: u64 = 20;

/// How long that is tried, and longer only if it was not so many.
const ENOUGH: Duration = Duration::from_secs(5);

/// How long a request may take, each of whose thousands of pages has to be asked for.
const LONG: Duration = Duration::from_secs(120);

/// A guest whose addresses are translated.
fn guest(context: &Context, how: Iotlb, change: impl FnOnce(&mut Options)) -> Result<Guest> {
    context.guest(|options| {
        options.iotlb = Some(how);
        options.memory = 16 << 20;
        options.queues = 2;
        options.queue_size = 64;
        change(options);
    })
}

fn translator(guest: &Guest) -> Result<&Translator> {
    guest.translator().context("nobody translates")
}

/// Whether a message can be read, or one comes in time.
fn readable(device: &Device, timeout: Duration) -> Result<bool> {
    let epoll = Epoll::new()?;
    epoll.ctl(
        ControlOperation::Add,
        device.as_raw_fd(),
        EpollEvent::new(EventSet::IN, 0),
    )?;
    let timeout = i32::try_from(timeout.as_millis())?;
    Ok(epoll.wait(timeout, &mut [EpollEvent::default()])? > 0)
}

/// The next miss, for which there has to be one.
fn miss(device: &Device) -> Result<Message> {
    ensure!(readable(device, PATIENCE)?, "no miss within {PATIENCE:?}");
    let (message, format) = device
        .receive_iotlb()?
        .context("poll() said that there is one")?;
    ensure!(
        message.kind == Kind::Miss && format == Format::V2,
        "{message:?}, {format:?}"
    );
    Ok(message)
}

fn messages(context: &Context) -> Result<()> {
    let device = context.device()?;
    device.set_owner()?;
    let memory = Memory::new(1 << 20)?;
    let uaddr = memory.host_address(GuestAddress(0))?;
    let update = |size| Message::update(0x10_0000, size, uaddr, Access::BOTH);
    let good = update(PAGE);
    fails(
        "an update without an IOTLB",
        device.send_iotlb(&good, Format::V1),
        libc::EFAULT,
    )?;

    for round in 0..3 {
        context.step(format_args!("round {round}"));
        let features = feature::VERSION_1 | feature::ACCESS_PLATFORM;
        works("SET_FEATURES", device.set_features(features))?;
        ensure!(!readable(&device, QUIET)?, "there is something to read");
        ensure!(device.receive_iotlb()?.is_none(), "there is a message");
        for format in [Format::V1, Format::V2] {
            works(
                "SET_BACKEND_FEATURES",
                device.set_backend_features(format.backend_features()),
            )?;
            for (what, message) in [
                ("an update", good),
                ("the same again", good),
                (
                    "one for reading",
                    Message {
                        access: Access::READ,
                        ..good
                    },
                ),
                (
                    "one of many pages",
                    Message {
                        iova: 0,
                        uaddr: PAGE,
                        ..update(1 << 40)
                    },
                ),
                ("an invalidation", Message::invalidate(0x10_0000, PAGE)),
                (
                    "one of what is not there",
                    Message::invalidate(1 << 40, PAGE),
                ),
                ("one of everything", Message::invalidate(0, u64::MAX)),
            ] {
                works(
                    format_args!("{what}, {format:?}"),
                    device.send_iotlb(&message, format),
                )?;
            }
            for (what, message, errno) in [
                ("an update of nothing", update(0), libc::EINVAL),
                (
                    "an update to the kernel",
                    Message {
                        uaddr: 1 << 63,
                        ..good
                    },
                    libc::EFAULT,
                ),
                (
                    "one beyond user space",
                    Message {
                        uaddr: (1 << 47) - PAGE,
                        ..update(1 << 20)
                    },
                    libc::EFAULT,
                ),
                (
                    "a miss",
                    Message {
                        kind: Kind::Miss,
                        ..good
                    },
                    libc::EFAULT,
                ),
                (
                    "a failure",
                    Message {
                        kind: Kind::Other(4),
                        ..good
                    },
                    libc::EFAULT,
                ),
                (
                    "message 0",
                    Message {
                        kind: Kind::Other(0),
                        ..good
                    },
                    libc::EFAULT,
                ),
                (
                    "message 255",
                    Message {
                        kind: Kind::Other(255),
                        ..good
                    },
                    libc::EFAULT,
                ),
            ] {
                fails(
                    format_args!("{what}, {format:?}"),
                    device.send_iotlb(&message, format),
                    errno,
                )?;
            }
            let bytes = good.to_bytes(format);
            for len in [0, 3, 4, 8, 39] {
                fails(
                    format_args!("{len} bytes of a message"),
                    device.send_iotlb_raw(&bytes[..len]),
                    libc::EINVAL,
                )?;
            }
            let mut long = bytes.to_vec();
            long.resize(4096, 0xff);
            works("a message and more", device.send_iotlb_raw(&long))?;
            // Address space identifiers are not there: the field says nothing.
            let mut other = bytes;
            other[4] = 7;
            works("an address space", device.send_iotlb_raw(&other))?;
        }
        for number in [0u32, 3, u32::MAX] {
            let mut bytes = good.to_bytes(Format::V1);
            bytes[..4].copy_from_slice(&number.to_ne_bytes());
            fails(
                format_args!("a message of type {number}"),
                device.send_iotlb_raw(&bytes),
                libc::EINVAL,
            )?;
        }
        // Far more than it has room for.
        for page in 0..5000 {
            let message = Message {
                iova: page * 2 * PAGE,
                ..good
            };
            works(
                "one of many updates",
                device.send_iotlb(&message, Format::V2),
            )?;
        }
        match round {
            0 => works(
                "SET_FEATURES without",
                device.set_features(feature::VERSION_1),
            )?,
            1 => {
                works("RESET_OWNER", device.reset_owner())?;
                works("SET_OWNER", device.set_owner())?;
            }
            _ => {
                let short = device.file().read(&mut [0; MESSAGE_LEN - 1]);
                ensure!(matches!(short, Ok(0)), "a short read: {short:?}");
                continue;
            }
        }
        fails(
            "an update without an IOTLB",
            device.send_iotlb(&good, Format::V1),
            libc::EFAULT,
        )?;
    }
    Ok(())
}

fn each_miss(context: &Context) -> Result<()> {
    let mut guest = guest(context, MANUAL, |options| options.queues = 1)?;
    let memory = guest.memory().clone();
    let desc = guest.queue(0).ring.parts().desc.addr();
    ensure!(
        desc.0 == 0,
        "the table is at {:#x}, not at an address of 0",
        desc.0
    );
    guest.start(context.disk()?)?;
    // Pages of which none is the neighbour of another.
    let buffers: Vec<_> = (0..14)
        .map(|_| memory.alloc(PAGE_SIZE, PAGE_SIZE))
        .collect::<Result<_, _>>()?;
    for (round, buffers) in buffers.chunks(7).enumerate() {
        context.step(format_args!("round {round}"));
        let [header, _, data, _, more, _, status] = buffers else {
            unreachable!("there are seven");
        };
        let request = Request::read(8, 2 * PAGE_SIZE);
        header.write(0, &request.readable())?;
        let len = u32::try_from(PAGE_SIZE)?;
        let segments = [
            Segment::readable(header.addr(), 16),
            Segment::writable(data.addr(), len),
            Segment::writable(more.addr(), len),
            Segment::writable(status.addr(), 1),
        ];
        let ring = &mut guest.queue(0).ring;
        ring.add(&segments, Table::Direct)?;
        ring.publish_and_kick()?;
        let parts = ring.parts();
        let mut expected = vec![
            (parts.desc.addr(), Access::READ),
            (parts.avail.addr(), Access::READ),
            (parts.used.addr(), Access::WRITE),
            (header.addr(), Access::READ),
            (data.addr(), Access::WRITE),
            (more.addr(), Access::WRITE),
            (status.addr(), Access::WRITE),
        ];
        if round > 0 {
            // It still has the ring.
            expected.drain(..3);
        }
        for (number, (addr, access)) in expected.into_iter().enumerate() {
            let device = guest.device();
            let message = miss(device)?;
            ensure!(
                message.iova == addr.0 && message.access == access,
                "miss {number}: {message:?}, expected {access:?} of {:#x}",
                addr.0
            );
            ensure!(!readable(device, QUIET)?, "miss {number}: another message");
            let uaddr = memory.host_address(addr)?;
            // No more than what was asked for.
            let update = Message::update(addr.0, PAGE, uaddr, access);
            works("an update", device.send_iotlb(&update, Format::V2))?;
        }
        guest.queue(0).ring.wait_used(PATIENCE)?;
        check::same(
            "the first page",
            &data.read(0, PAGE_SIZE)?,
            &disk::pattern(8, 8),
        )?;
        check::same(
            "the second page",
            &more.read(0, PAGE_SIZE)?,
            &disk::pattern(16, 8),
        )?;
        ensure!(status.read(0, 1)? == [0], "status {:?}", status.read(0, 1)?);
        ensure!(
            !readable(guest.device(), QUIET)?,
            "a message when all is done"
        );
    }
    Ok(())
}

fn invalidated(context: &Context) -> Result<()> {
    for (format, queue_size) in [(Format::V1, 64), (Format::V2, 1024)] {
        let how = Iotlb {
            format,
            invalidate_every: Some(Duration::from_millis(1)),
            ..Iotlb::default()
        };
        let mut guest = guest(context, how, |options| options.queue_size = queue_size)?;
        guest.start(context.disk()?)?;
        let begin = Instant::now();
        let (start, _) = disk::SCRATCH;
        let mut rounds = 0;
        let mut first = Counts::default();
        let tested = |rounds: u64, first: &Counts, counts: &Counts| {
            rounds > FIRST_ROUNDS
                && counts.invalidations > first.invalidations + ASKED_AGAIN
                && counts.misses > first.misses + ASKED_AGAIN
        };
        // A slow host may have done too little after the time that is enough for others.
        while begin.elapsed() < ENOUGH
            || (begin.elapsed() < PATIENCE
                && !tested(rounds, &first, &translator(&guest)?.counts()))
        {
            context.step(format_args!("{format:?}, round {rounds}"));
            if rounds == FIRST_ROUNDS {
                first = translator(&guest)?.counts();
            }
            rounds += 1;
            for (number, queue) in (0u64..).zip(guest.queues()) {
                for n in 0..8u64 {
                    let sector = start + 1024 * number + 64 * n;
                    let data = disk::seeded(rounds, sector, 64);
                    queue.submit(Request::write(sector, data), &Shape::default())?;
                    queue.submit(Request::read(64 * n, 32 << 10), &Shape::default())?;
                }
                queue.kick()?;
            }
            for (number, queue) in guest.queues().iter_mut().enumerate() {
                for done in queue.wait_all(PATIENCE)? {
                    let what = format!("{format:?}, round {rounds}, queue {number}");
                    check::outcome(&what, &done, Status::Ok, UsedLen::Full)?;
                    if !done.data.is_empty() {
                        check::same(&what, &done.data, &disk::pattern(done.request.sector, 64))?;
                    }
                }
            }
        }
        let direct = context.direct()?;
        for number in 0..2 {
            let sector = start + 1024 * number;
            check::same(
                "what was written",
                &direct.read(sector, 512)?,
                &disk::seeded(rounds, sector, 512),
            )?;
        }
        let translator = translator(&guest)?;
        translator.check()?;
        let counts = translator.counts();
        ensure!(
            tested(rounds, &first, &counts),
            "{counts:?} in {rounds} rounds, {first:?} of these in the first ones: nothing was tested"
        );
        context.step(format_args!("{format:?}: {counts:?} in {rounds} rounds"));
        for queue in guest.queues() {
            ensure!(!queue.ring.wait_err(Duration::ZERO)?, "a ring is broken");
        }
        guest.stop()?;
    }
    Ok(())
}

/// A stopped guest begins anew, and has to work.
fn begin_anew(context: &Context, what: &str, guest: &mut Guest) -> Result<()> {
    for queue in guest.queues() {
        queue.reset(0)?;
        while queue.ring.wait_err(Duration::ZERO)? {}
    }
    guest.resume(context.disk()?, &[0, 0])?;
    for index in [0, 1] {
        check::healthy(what, guest, index)?;
    }
    Ok(())
}

/// A read in pages of its own, published; and which pages.
fn read_in_pages(guest: &mut Guest) -> Result<(Prepared, std::ops::Range<u64>)> {
    let prepared = Prepared::new(guest.memory(), Request::read(8, 4096), &Shape::default())?;
    let buffer = prepared.buffer();
    let end = (buffer.addr().0 + buffer.len() as u64).next_multiple_of(PAGE);
    let pages = buffer.addr().0..end;
    let segments = prepared.segments()?;
    let ring = &mut guest.queue(0).ring;
    ring.add(&segments, Table::Direct)?;
    Ok((prepared, pages))
}

fn read_only(context: &Context) -> Result<()> {
    let mut guest = guest(context, Iotlb::default(), |_| {})?;
    guest.start(context.disk()?)?;
    for (what, part) in [
        ("a read-only buffer", None),
        ("a read-only used ring", Some(2)),
    ] {
        context.step(what);
        check::healthy("before", &mut guest, 0)?;
        let (prepared, pages) = read_in_pages(&mut guest)?;
        let pages = part.map_or(pages, |part: usize| {
            let buffer = guest.queue(0).ring.parts().all()[part];
            buffer.addr().0..buffer.addr().0 + buffer.len() as u64
        });
        let translator = translator(&guest)?;
        translator.set_read_only(pages.clone());
        translator.invalidate(pages.start, pages.end - pages.start)?;
        let ring = &mut guest.queue(0).ring;
        ring.publish()?;
        ring.kick()?;
        ensure!(
            ring.wait_err(PATIENCE)?,
            "{what}: the error eventfd stays silent"
        );
        for _ in 0..3 {
            check::healthy(what, &mut guest, 1)?;
        }
        let (buffer, used) = (prepared.buffer(), guest.queue(0).ring.used_idx()?);
        let places = prepared.segments()?;
        let data = &places[1];
        let offset = usize::try_from(data.addr.0 - buffer.addr().0)?;
        let now = buffer.read(offset, 4096)?;
        ensure!(
            now != disk::pattern(8, 8) && used == guest.queue(0).ring.last_used(),
            "{what}: it was read all the same; the used index is {used}"
        );
        guest.stop()?;
        self::translator(&guest)?.allow_all();
        self::translator(&guest)?.invalidate(0, u64::MAX)?;
        begin_anew(context, what, &mut guest)?;
    }
    Ok(())
}

fn unanswered(context: &Context) -> Result<()> {
    for (what, part) in [
        ("a buffer", None),
        ("the available ring", Some(1)),
        ("the used ring", Some(2)),
    ] {
        for end in ["stop", "reset", "close"] {
            context.step(format_args!("{what}, then {end}"));
            let mut guest = guest(context, Iotlb::default(), |_| {})?;
            guest.start(context.disk()?)?;
            check::healthy("before", &mut guest, 0)?;
            let (prepared, pages) = read_in_pages(&mut guest)?;
            let pages = part.map_or(pages, |part: usize| {
                let buffer = guest.queue(0).ring.parts().all()[part];
                buffer.addr().0..buffer.addr().0 + buffer.len() as u64
            });
            let before = guest.queue(0).ring.used_idx()?;
            let translator = translator(&guest)?;
            translator.add_hole(pages.clone());
            translator.invalidate(pages.start, pages.end - pages.start)?;
            let ring = &mut guest.queue(0).ring;
            ring.publish()?;
            ring.kick()?;
            for _ in 0..3 {
                check::healthy(what, &mut guest, 1)?;
            }
            let ring = &guest.queue(0).ring;
            ensure!(
                ring.used_idx()? == before,
                "{what}: it was done all the same"
            );
            ensure!(!ring.wait_err(QUIET)?, "{what}: the ring is broken");
            let begin = Instant::now();
            match end {
                "stop" => {
                    let bases = guest.stop()?;
                    ensure!(
                        bases[0] == before,
                        "{what}: stopped at {bases:?}, not at {before}"
                    );
                    // What was not answered then is asked again.
                    self::translator(&guest)?.allow_all();
                    guest.resume(context.disk()?, &bases)?;
                    let used = guest.queue(0).ring.wait_used(PATIENCE)?;
                    let done = prepared.complete(used)?;
                    check::outcome(what, &done, Status::Ok, UsedLen::Full)?;
                    check::same(what, &done.data, &disk::pattern(8, 8))?;
                }
                "reset" => works("RESET_OWNER", guest.device().reset_owner())?,
                _ => drop(guest),
            }
            let took = begin.elapsed();
            ensure!(took < PATIENCE / 2, "{what}: {end} took {took:?}");
        }
    }
    Ok(())
}

/// A guest with a request in flight on the slow disk, whose rings have no translation.
fn in_flight_without_ring(context: &Context) -> Result<(Guest, Prepared, std::ops::Range<u64>)> {
    let mut guest = guest(context, Iotlb::default(), |_| {})?;
    guest.start(context.slow_disk()?)?;
    // Reads are fast.
    check::answers("before", &mut guest, 0)?;
    let request = Request::write(2048, disk::seeded(3, 2048, 8));
    let prepared = Prepared::new(guest.memory(), request, &Shape::default())?;
    let segments = prepared.segments()?;
    let ring = &mut guest.queue(0).ring;
    ring.add(&segments, Table::Direct)?;
    ring.publish_and_kick()?;
    let deadline = Instant::now() + PATIENCE;
    while guest.device().get_vring_base(0)? != u32::from(guest.queue(0).ring.next_avail()) {
        ensure!(Instant::now() < deadline, "no request is fetched");
        thread::sleep(Duration::from_millis(1));
    }
    let buffer = &guest.queue(0).ring.parts().used;
    let pages = buffer.addr().0..buffer.addr().0 + buffer.len() as u64;
    let translator = translator(&guest)?;
    translator.add_hole(pages.clone());
    translator.invalidate(0, u64::MAX)?;
    let ring = &guest.queue(0).ring;
    ensure!(
        ring.used_idx()? == ring.last_used(),
        "the slow disk is too fast for this test"
    );
    Ok((guest, prepared, pages))
}

fn late_ring(context: &Context) -> Result<()> {
    let (mut guest, prepared, pages) = in_flight_without_ring(context)?;
    thread::sleep(Duration::from_millis(1500));
    let ring = &guest.queue(0).ring;
    ensure!(
        ring.used_idx()? == ring.last_used(),
        "it was completed without a translation"
    );
    // Nobody wants the worker again and again.
    let begin = cpu_time()?;
    thread::sleep(Duration::from_secs(1));
    let spent = cpu_time()? - begin;
    ensure!(
        spent < Duration::from_millis(500),
        "this process was busy for {spent:?} of a second"
    );
    let translator = translator(&guest)?;
    translator.allow_all();
    let uaddr = guest.memory().host_address(GuestAddress(pages.start))?;
    let size = (pages.end - pages.start).next_multiple_of(PAGE);
    let update = Message::update(pages.start, size, uaddr, Access::BOTH);
    guest.device().send_iotlb(&update, Format::V2)?;
    let used = guest.queue(0).ring.wait_used(PATIENCE)?;
    check::outcome(
        "after it came",
        &prepared.complete(used)?,
        Status::Ok,
        UsedLen::Full,
    )?;
    check::answers("and then", &mut guest, 0)
}

/// Processor time of this process, its threads that are the device's workers included.
fn cpu_time() -> Result<Duration> {
    let mut total = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        total += text
            .split(' ')
            .next()
            .context("no number")?
            .parse::<u64>()?;
    }
    Ok(Duration::from_nanos(total))
}

fn lost_ring(context: &Context) -> Result<()> {
    let (mut guest, prepared, _) = in_flight_without_ring(context)?;
    works("stop", guest.device().stop())?;
    let ring = &guest.queue(0).ring;
    ensure!(
        ring.used_idx()? == ring.last_used(),
        "it was completed without a translation"
    );
    ensure!(ring.wait_err(PATIENCE)?, "the error eventfd stays silent");
    // It was done all the same.
    let written = disk::Disk::open(context.slow_disk_path()?)?.read(2048, 8)?;
    check::same("what was written", &written, &disk::seeded(3, 2048, 8))?;
    translator(&guest)?.allow_all();
    drop(prepared);
    begin_anew_on(context, &mut guest)?;
    drop(guest);

    context.step("the stop of who translates the rings first");
    let (mut guest, prepared, _) = in_flight_without_ring(context)?;
    translator(&guest)?.allow_all();
    guest.stop()?;
    let used = guest
        .queue(0)
        .ring
        .pop_used()?
        .context("nothing was completed")?;
    check::outcome(
        "stopped",
        &prepared.complete(used)?,
        Status::Ok,
        UsedLen::Full,
    )?;
    ensure!(!guest.queue(0).ring.wait_err(QUIET)?, "the ring is broken");

    context.step("RESET_OWNER, and then close");
    let (guest, ..) = in_flight_without_ring(context)?;
    works("RESET_OWNER", guest.device().reset_owner())?;
    drop(guest);
    let (guest, ..) = in_flight_without_ring(context)?;
    drop(guest);
    Ok(())
}

/// As [`begin_anew`], on the slow disk, whatever is on it.
fn begin_anew_on(context: &Context, guest: &mut Guest) -> Result<()> {
    for queue in guest.queues() {
        queue.reset(0)?;
    }
    guest.resume(context.slow_disk()?, &[0, 0])?;
    check::answers("after it was lost", guest, 0)
}

fn bounded(context: &Context) -> Result<()> {
    let mut guest = guest(context, MANUAL, |_| {})?;
    let memory = guest.memory().clone();
    let uaddr = memory.host_address(GuestAddress(0))?;
    guest.start(context.disk()?)?;
    for (what, translated) in [("the rings", false), ("a buffer", true)] {
        context.step(what);
        if translated {
            let (device, queues) = guest.split();
            for part in queues.iter().flat_map(|queue| queue.ring.parts().all()) {
                let at = part.addr().0;
                let size = part.len() as u64;
                let update = Message::update(at, size, uaddr + at, Access::BOTH);
                device.send_iotlb(&update, Format::V2)?;
            }
        }
        for queue in guest.queues() {
            if !translated {
                queue.submit(Request::read(0, 4096), &Shape::default())?;
                queue.ring.publish()?;
            }
            for n in 0..2000 {
                queue.ring.kick()?;
                if n % 50 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
        thread::sleep(QUIET);
        let mut count = 0;
        while guest.device().receive_iotlb()?.is_some() {
            count += 1;
        }
        ensure!((1..=4).contains(&count), "{what}: {count} messages");
    }
    works("stop", guest.device().stop())
}

fn too_many(context: &Context) -> Result<()> {
    let mut guest = guest(context, Iotlb::default(), |options| {
        options.memory = 32 << 20
    })?;
    guest.start(context.disk()?)?;
    check::healthy("before", &mut guest, 0)?;
    let translator = translator(&guest)?;
    translator.use_small_pages();
    translator.invalidate(0, u64::MAX)?;
    let before = translator.counts();
    let shape = Shape::default();
    // A little less than there is room for.
    let queue = guest.queue(0);
    let done = queue
        .run(Request::read(0, 7 << 20), &shape, LONG)
        .context("7 MiB")?;
    check::outcome("7 MiB", &done, Status::Ok, UsedLen::Full)?;
    check::same("7 MiB", &done.data, &disk::pattern(0, 7 << 11))?;
    queue.submit(Request::read(0, 10 << 20), &shape)?;
    queue.kick()?;
    ensure!(
        queue.ring.wait_err(LONG)?,
        "10 MiB: the error eventfd stays silent"
    );
    for _ in 0..3 {
        check::healthy("10 MiB", &mut guest, 1)?;
    }
    let now = self::translator(&guest)?.counts();
    context.step(format_args!("{before:?}, then {now:?}"));
    guest.stop()?;
    guest.queue(0).abandon();
    begin_anew(context, "after 10 MiB", &mut guest)
}

fn memory_table(context: &Context) -> Result<()> {
    let how = Iotlb {
        invalidate_every: Some(Duration::from_millis(3)),
        ..Iotlb::default()
    };
    let mut guest = guest(context, how, |_| {})?;
    guest.start(context.disk()?)?;
    let regions = guest.memory().regions();
    let begin = Instant::now();
    for round in 0.. {
        let counts = translator(&guest)?.counts();
        if round >= 20 && counts.invalidations >= 5 {
            break;
        }
        ensure!(
            round < 20 || begin.elapsed() < PATIENCE,
            "{counts:?} in {round} rounds"
        );
        context.step(format_args!("round {round}"));
        check::healthy("before", &mut guest, 0)?;
        let queue = guest.queue(1);
        queue.submit(Request::read(0, 4096), &Shape::default())?;
        queue.kick()?;
        // Where nothing of the guest's is, and back.
        works(
            "SET_MEM_TABLE of nothing",
            guest.device().set_mem_table(&[]),
        )?;
        works("SET_MEM_TABLE", guest.device().set_mem_table(&regions))?;
        let addresses = guest.queue(0).ring.addresses();
        works(
            "SET_VRING_ADDR",
            guest.device().set_vring_addr(0, &addresses),
        )?;
        for done in guest.queue(1).wait_all(PATIENCE)? {
            check::outcome("meanwhile", &done, Status::Ok, UsedLen::Full)?;
        }
        check::healthy("after", &mut guest, 0)?;
    }
    guest.stop().map(drop).context("stop")
}
