// SPDX-License-Identifier: GPL-2.0

//! What memory of the host an open device takes, and that it gives it back.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::{Device, Memory, Request, Ring, Shape, Status, Table};

use crate::check::{self, UsedLen};
use crate::context::{Context, PATIENCE, Test, test};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "memory.device",
        "open devices take what GET_INFO says, and give it back",
        180,
        devices
    ),
    test!(
        "memory.slots",
        "request slots take what GET_INFO says",
        180,
        slots
    ),
    test!(
        "memory.requests",
        "requests leave nothing behind",
        300,
        requests
    ),
    test!(
        "memory.refused_requests",
        "requests that fail leave nothing behind",
        300,
        refused_requests
    ),
];

/// What else of the kernel's memory comes and goes meanwhile, bytes.
const NOISE: i64 = 2 << 20;

/// A field of `/proc/meminfo`, bytes.
fn field(text: &str, name: &str) -> Result<i64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .with_context(|| format!("no {name} in /proc/meminfo"))?;
    let kib: i64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// Bytes that the kernel has and cannot give up: neither free, nor a cache, nor a program's.
fn kernel_bytes() -> Result<i64> {
    // Counters of each CPU are summed up; only root may ask for that.
    fs::read("/proc/sys/vm/stat_refresh").context("/proc/sys/vm/stat_refresh")?;
    let text = fs::read_to_string("/proc/meminfo")?;
    let mut bytes = field(&text, "MemTotal")?;
    for name in [
        "MemFree",
        "Buffers",
        "Cached",
        "SwapCached",
        "AnonPages",
        "SReclaimable",
        "PageTables",
    ] {
        bytes -= field(&text, name)?;
    }
    // Free pages that wait in the lists of each CPU.
    let zones = fs::read_to_string("/proc/zoneinfo").context("/proc/zoneinfo")?;
    for line in zones.lines() {
        if let Some(count) = line.trim().strip_prefix("count:") {
            bytes -= count.trim().parse::<i64>()? * 4096;
        }
    }
    Ok(bytes)
}

/// [`kernel_bytes`], when it does not change any more: memory is also freed behind one's back.
fn settled() -> Result<i64> {
    let mut last = kernel_bytes()?;
    for _ in 0..20 {
        thread::sleep(Duration::from_millis(100));
        let now = kernel_bytes()?;
        if (now - last).abs() < 64 << 10 {
            return Ok(now);
        }
        last = now;
    }
    Ok(last)
}

/// Counters of pages that were pinned and unpinned, on all of the host, since it was started.
fn pins() -> Option<(i64, i64)> {
    fs::read("/proc/sys/vm/stat_refresh").ok()?;
    let text = fs::read_to_string("/proc/vmstat").ok()?;
    let counter = |name: &str| -> Option<i64> {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?
            .parse()
            .ok()
    };
    Some((
        counter("nr_foll_pin_acquired")?,
        counter("nr_foll_pin_released")?,
    ))
}

/// Pages that are pinned now, for all of the host.
pub(crate) fn pinned_pages() -> Option<i64> {
    pins().map(|(acquired, released)| acquired - released)
}

/// Pages that were pinned so far, for all of the host.
pub(crate) fn acquired_pins() -> Option<i64> {
    pins().map(|(acquired, _)| acquired)
}

/// Checks bytes that were measured against what they have to be: within a tenth, since workers, and
/// what an open file needs, come with each device, and the noise.
fn near(what: &str, measured: i64, expected: i64) -> Result<()> {
    let tolerance = expected / 10 + NOISE;
    ensure!(
        (measured - expected).abs() <= tolerance,
        "{what}: {} KiB measured, {} KiB expected, {} KiB of tolerance",
        measured >> 10,
        expected >> 10,
        tolerance >> 10
    );
    Ok(())
}

/// A device of which all virtqueues use the same ring: there are no requests.
fn all_queues(context: &Context, memory: &Memory, ring: &Ring) -> Result<Device> {
    let mut device = context.device()?;
    device.set_owner()?;
    device.set_memory(memory)?;
    for index in 0..device.info(None)?.max_virtqueues {
        ring.set_up(&device, index, 0)?;
    }
    Ok(device)
}

fn devices(context: &Context) -> Result<()> {
    const COUNT: usize = 8;
    let memory = Memory::new(4 << 20)?;
    let ring = Ring::new(&memory, 16, false)?;
    let disk = context.disk()?;
    // What the first one makes for ever, such as slab caches, is not counted.
    let first = all_queues(context, &memory, &ring)?;
    first.set_backend(&disk)?;
    let info = first.info(None)?;
    drop(first);

    let before = settled()?;
    let mut all = Vec::new();
    for _ in 0..COUNT {
        let device = all_queues(context, &memory, &ring)?;
        device.set_backend(&disk)?;
        all.push(device);
    }
    let open = settled()?;
    let queue = i64::from(info.queue_bytes) + 16 * i64::from(info.slot_bytes);
    let each = i64::from(info.device_bytes) + i64::from(info.max_virtqueues) * queue;
    let count = i64::try_from(COUNT)?;
    context.note(format_args!(
        "{COUNT} devices of {} queues: {} KiB each, {} KiB by GET_INFO",
        info.max_virtqueues,
        ((open - before) / count) >> 10,
        each >> 10
    ));
    near(&format!("{COUNT} devices"), open - before, count * each)?;
    drop(all);
    near("after their close", settled()? - before, 0)
}

fn slots(context: &Context) -> Result<()> {
    const COUNT: usize = 4;
    let memory = Memory::new(4 << 20)?;
    let disk = context.disk()?;
    let small = Ring::new(&memory, 16, false)?;
    let large = Ring::new(&memory, 1024, false)?;
    let mut devices = Vec::new();
    for _ in 0..COUNT {
        let device = all_queues(context, &memory, &small)?;
        device.set_backend(&disk)?;
        devices.push(device);
    }
    let info = devices[0].info(None)?;
    let count = i64::try_from(COUNT)? * i64::from(info.max_virtqueues) * (1024 - 16);
    let resize = |ring: &Ring| -> Result<i64> {
        for device in &devices {
            device.stop()?;
            for index in 0..info.max_virtqueues {
                ring.set_up(device, index, 0)?;
            }
            device.set_backend(&disk)?;
        }
        settled()
    };
    let start = resize(&small)?;
    for round in 0..2 {
        let running = resize(&large)?;
        context.note(format_args!(
            "{count} more slots: {} bytes each, {} by GET_INFO",
            (running - start) / count,
            info.slot_bytes
        ));
        near(
            &format!("slots, round {round}"),
            running - start,
            count * i64::from(info.slot_bytes),
        )?;
        near(
            &format!("slots given up, round {round}"),
            resize(&small)? - start,
            0,
        )?;
    }
    Ok(())
}

/// Does `count` requests, up to 32 at once, and checks their status.
fn run(
    guest: &mut vhost_blk_ring::Guest,
    count: usize,
    request: fn(u64) -> (Request, Status),
    shape: &Shape,
) -> Result<()> {
    let queue = guest.queue(0);
    let mut submitted = 0;
    let mut finished = 0;
    while finished < count {
        while submitted - finished < 32 && submitted < count {
            queue.submit(request(submitted as u64).0, shape)?;
            submitted += 1;
        }
        queue.kick()?;
        let done = queue.wait(PATIENCE)?;
        finished += 1;
        ensure!(
            matches!(
                done.status,
                Status::Ok | Status::IoErr | Status::Unsupported
            ),
            "status {:?}",
            done.status
        );
        if done.status == Status::Ok {
            check::outcome("a request", &done, Status::Ok, UsedLen::Full)?;
        }
    }
    Ok(())
}

/// Requests leave nothing behind: neither memory nor pinned pages.
fn flat(
    context: &Context,
    count: usize,
    request: fn(u64) -> (Request, Status),
    shape: &Shape,
) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    run(&mut guest, 2000, request, shape)?;
    let pinned = pinned_pages();
    let before = settled()?;
    run(&mut guest, count, request, shape)?;
    let after = settled()?;
    ensure!(
        pinned_pages() == pinned,
        "{count} requests left pages pinned: {:?}, {pinned:?} before",
        pinned_pages()
    );
    // The smallest object of a slab cache that is left behind each time is twice as much.
    let limit = i64::try_from(count)? * 64;
    ensure!(
        after - before < limit.max(NOISE),
        "{count} requests left {} KiB behind",
        (after - before) >> 10
    );
    Ok(())
}

fn requests(context: &Context) -> Result<()> {
    let request = |n: u64| match n % 4 {
        0 => (
            Request::write(crate::disk::SCRATCH.0 + 8 * (n % 512), vec![1; 4096]),
            Status::Ok,
        ),
        _ => (Request::read(8 * (n % 2048), 4096), Status::Ok),
    };
    flat(context, 80_000, request, &Shape::default())?;
    // Buffers that need another way through the kernel.
    let off = Shape::default().table(Table::Indirect).at(512, 3);
    flat(context, 20_000, request, &off)
}

fn refused_requests(context: &Context) -> Result<()> {
    let request = |n: u64| match n % 5 {
        0 => (Request::read(u64::MAX - 7, 4096), Status::IoErr),
        1 => (Request::read(0, 4097), Status::IoErr),
        2 => (Request::other(77, 0, Vec::new(), 512), Status::Unsupported),
        3 => (Request::read(0, 4096).with_header_len(3), Status::IoErr),
        _ => (Request::read(0, 0), Status::Ok),
    };
    flat(context, 50_000, request, &Shape::default())
}
