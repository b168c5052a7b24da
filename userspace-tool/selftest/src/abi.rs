// SPDX-License-Identifier: GPL-2.0

//! The interface: each ioctl, and each of its errors.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::device::numbers;
use vhost_blk_ring::iotlb::Format;
use vhost_blk_ring::uapi::{self, Info, feature};
use vhost_blk_ring::{
    Device, Error, GuestAddress, Memory, RawArg, Request, Ring, Shape, Status, WorkerMode,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::check::{self, UsedLen, fails, works};
use crate::context::{Context, Test, test};
use crate::disk;

pub(crate) const TESTS: &[Test] = &[
    test!("abi.owner", "SET_OWNER once, RESET_OWNER gives back", owner),
    test!(
        "abi.without_owner",
        "what needs an owner is EPERM without one",
        without_owner
    ),
    test!(
        "abi.other_process",
        "what needs the owner is EPERM in another process",
        other_process
    ),
    test!(
        "abi.features",
        "offered bits, others EOPNOTSUPP, EBUSY while running",
        features
    ),
    test!(
        "abi.backend_features",
        "messages of version 2, and no other",
        backend_features
    ),
    test!(
        "abi.vring_num",
        "powers of two up to 1024, EBUSY while running",
        vring_num
    ),
    test!("abi.vring_base", "16 bits, EBUSY while running", vring_base),
    test!(
        "abi.vring_addr",
        "alignment, flags, the kernel's addresses",
        vring_addr
    ),
    test!(
        "abi.vring_eventfds",
        "KICK, CALL, ERR: eventfds or -1",
        vring_eventfds
    ),
    test!(
        "abi.vring_index",
        "beyond the last virtqueue: ENOBUFS",
        vring_index
    ),
    test!("abi.busyloop", "the busy-loop timeout is kept", busyloop),
    test!(
        "abi.mem_table",
        "SET_MEM_TABLE: padding, count, ranges",
        mem_table
    ),
    test!("abi.log", "SET_LOG_BASE and SET_LOG_FD", log),
    test!(
        "abi.backend_order",
        "SET_BACKEND needs owner, memory and a ring",
        backend_order
    ),
    test!(
        "abi.backend_fd",
        "SET_BACKEND: bad fds, no disks, write-only",
        backend_fd
    ),
    test!(
        "abi.backend_twice",
        "SET_BACKEND: EBUSY while running, -1 always works",
        backend_twice
    ),
    test!(
        "abi.info_size",
        "GET_INFO keeps to the caller's size",
        info_size
    ),
    test!("abi.info_limits", "GET_INFO agrees with sysfs", info_limits),
    test!(
        "abi.info_fd",
        "GET_INFO: bad fds, the running backend",
        info_fd
    ),
    test!("abi.serial", "SET_SERIAL is what GET_ID returns", serial),
    test!("abi.writeback", "SET_WRITEBACK takes 0 and 1", writeback),
    test!(
        "abi.pin_memory",
        "SET_PIN_MEMORY takes 0 and 1, and holds from the next start",
        pin_memory
    ),
    test!(
        "abi.workers",
        "NEW, ATTACH, GET, FREE: EBUSY, ENODEV, EINVAL",
        workers
    ),
    test!(
        "abi.fork_from_owner",
        "both worker modes work, others are EINVAL",
        fork_from_owner
    ),
    test!(
        "abi.bad_pointers",
        "EFAULT from every ioctl with an argument",
        bad_pointers
    ),
    test!("abi.unknown_ioctls", "ENOTTY", unknown_ioctls),
    test!(
        "abi.no_iotlb",
        "poll, read, write answer as without a device IOTLB",
        no_iotlb
    ),
    test!(
        "abi.reset_and_start",
        "RESET_OWNER, then all over again",
        reset_and_start
    ),
];

/// A descriptor that no process here has.
const NO_FD: i32 = 9999;

/// All that is on offer.
const OFFERED: u64 = feature::NOTIFY_ON_EMPTY
    | feature::LOG_ALL
    | (1 << 27)
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1
    | feature::ACCESS_PLATFORM
    | (1 << 1)
    | (1 << 2)
    | (1 << 4)
    | feature::RO
    | (1 << 6)
    | feature::FLUSH
    | (1 << 10)
    | feature::CONFIG_WCE
    | feature::MQ
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::SECURE_ERASE
    | feature::ZONED;

fn number(request: u64) -> Result<u32> {
    Ok(u32::try_from(request)?)
}

/// A device with an owner, memory, and ring 0 set up.
fn set_up(context: &Context) -> Result<(Device, Ring)> {
    let mut device = context.device()?;
    device.set_owner()?;
    device.set_features(feature::VERSION_1)?;
    let memory = Memory::new(4 << 20)?;
    device.set_memory(&memory)?;
    let ring = Ring::new(&memory, 64, false)?;
    ring.set_up(&device, 0, 0)?;
    Ok((device, ring))
}

/// As [`set_up`], and started.
fn running(context: &Context) -> Result<(Device, Ring)> {
    let (device, ring) = set_up(context)?;
    device.set_backend(context.disk()?)?;
    Ok((device, ring))
}

fn owner(context: &Context) -> Result<()> {
    let device = context.device()?;
    works("SET_OWNER", device.set_owner())?;
    fails("SET_OWNER again", device.set_owner(), libc::EBUSY)?;
    works("RESET_OWNER", device.reset_owner())?;
    fails("RESET_OWNER again", device.reset_owner(), libc::EPERM)?;
    works("SET_OWNER after RESET_OWNER", device.set_owner())?;
    // Each open file is a device of its own.
    let other = context.device()?;
    works("SET_OWNER of another open file", other.set_owner())
}

/// What needs the owner, with arguments that are right otherwise.
fn owners_ioctls(
    device: &Device,
    disk: &File,
) -> Vec<(&'static str, std::result::Result<(), Error>)> {
    vec![
        ("SET_MEM_TABLE", device.set_mem_table(&[])),
        ("SET_LOG_BASE", device.set_log_base(0)),
        ("SET_LOG_FD", device.set_log_fd(-1)),
        ("SET_VRING_NUM", device.set_vring_num(0, 64)),
        ("SET_VRING_BASE", device.set_vring_base(0, 0)),
        ("GET_VRING_BASE", device.get_vring_base(0).map(drop)),
        (
            "SET_VRING_ADDR",
            device.set_vring_user_addr(&numbers::vhost_vring_addr::default()),
        ),
        ("SET_VRING_KICK", device.set_vring_kick(0, -1)),
        ("SET_VRING_CALL", device.set_vring_call(0, -1)),
        ("SET_VRING_ERR", device.set_vring_err(0, -1)),
        (
            "SET_VRING_BUSYLOOP_TIMEOUT",
            device.set_vring_busyloop_timeout(0, 0),
        ),
        ("RESET_OWNER", device.reset_owner()),
        ("SET_BACKEND", device.set_backend(disk)),
        ("SET_BACKEND -1", device.stop()),
    ]
}

fn without_owner(context: &Context) -> Result<()> {
    let device = context.device()?;
    let disk = context.disk()?;
    for (name, result) in owners_ioctls(&device, &disk) {
        fails(name, result, libc::EPERM)?;
    }
    // The core has another error for these.
    fails("NEW_WORKER", device.new_worker(), libc::EINVAL)?;
    fails("FREE_WORKER", device.free_worker(0), libc::EINVAL)?;
    fails("GET_VRING_WORKER", device.get_vring_worker(0), libc::EINVAL)?;
    fails(
        "ATTACH_VRING_WORKER",
        device.attach_vring_worker(0, 0),
        libc::EINVAL,
    )?;
    works("GET_FEATURES", device.get_features())?;
    works("GET_BACKEND_FEATURES", device.get_backend_features())?;
    works("GET_INFO", device.info(None))?;
    works("GET_INFO of a disk", device.info(Some(disk.as_fd()))).map(drop)
}

fn other_process(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    let said = context.other_process("not_the_owner", device.file().try_clone()?)?;
    ensure!(said.trim() == "done", "the other process said: {said}");
    // What it tried left the device running.
    check_ring(&mut ring, "read after another process tried")?;
    works("SET_BACKEND -1 by the owner", device.stop())
}

/// The part of [`other_process`] that the other process plays.
pub(crate) fn not_the_owner(context: &Context, device: File) -> Result<()> {
    let device = Device::from_file(device);
    let disk = context.disk()?;
    for (name, result) in owners_ioctls(&device, &disk) {
        fails(name, result, libc::EPERM)?;
    }
    fails("SET_OWNER", device.set_owner(), libc::EBUSY)?;
    fails("NEW_WORKER", device.new_worker(), libc::EPERM)?;
    fails("FREE_WORKER", device.free_worker(0), libc::EPERM)?;
    fails("GET_VRING_WORKER", device.get_vring_worker(0), libc::EPERM)?;
    fails(
        "ATTACH_VRING_WORKER",
        device.attach_vring_worker(0, 0),
        libc::EPERM,
    )?;
    works("GET_FEATURES", device.get_features())?;
    let info = works("GET_INFO", device.info(None))?;
    ensure!(
        info.flags & uapi::VHOST_BLK_INFO_RUNNING != 0,
        "GET_INFO: flags {:#x} of a running device",
        info.flags
    );
    println!("done");
    Ok(())
}

/// A ring without a [`vhost_blk_ring::Queue`] has to serve a read.
fn check_ring(ring: &mut Ring, what: &str) -> Result<()> {
    let memory = ring.memory().clone();
    let shape = Shape::default();
    let prepared = vhost_blk_ring::request::Prepared::new(&memory, Request::read(8, 4096), &shape)?;
    ring.add(&prepared.segments()?, shape.table)?;
    ring.publish_and_kick()?;
    let used = ring
        .wait_used(crate::context::PATIENCE)
        .context(what.to_owned())?;
    let done = prepared.complete(used)?;
    check::outcome(what, &done, Status::Ok, UsedLen::Full)?;
    check::same(what, &done.data, &disk::pattern(8, 8))
}

fn features(context: &Context) -> Result<()> {
    let device = context.device()?;
    let offered = works("GET_FEATURES", device.get_features())?;
    ensure!(
        offered == OFFERED,
        "offered: {:?}, expected {:?}",
        feature::names(offered),
        feature::names(OFFERED)
    );
    device.set_owner()?;
    for bit in 0..64 {
        let mask = 1u64 << bit;
        let name = feature::names(mask).join("");
        if offered & mask != 0 {
            works(
                format_args!("SET_FEATURES {name}"),
                device.set_features(mask),
            )?;
        } else {
            fails(
                format_args!("SET_FEATURES {name}"),
                device.set_features(mask),
                libc::EOPNOTSUPP,
            )?;
            fails(
                format_args!("SET_FEATURES {name} and all that are offered"),
                device.set_features(mask | offered),
                libc::EOPNOTSUPP,
            )?;
        }
    }
    works("SET_FEATURES, all", device.set_features(offered))?;
    works("SET_FEATURES, none", device.set_features(0))?;
    drop(device);

    let (device, mut ring) = running(context)?;
    works(
        "SET_FEATURES while running, the same",
        device.set_features(feature::VERSION_1),
    )?;
    for bits in [0, feature::VERSION_1 | feature::EVENT_IDX, offered] {
        fails(
            format_args!("SET_FEATURES {bits:#x} while running"),
            device.set_features(bits),
            libc::EBUSY,
        )?;
    }
    check_ring(&mut ring, "read after SET_FEATURES while running")?;
    device.stop()?;
    works("SET_FEATURES, stopped", device.set_features(offered))
}

fn backend_features(context: &Context) -> Result<()> {
    let device = context.device()?;
    device.set_owner()?;
    let features = works("GET_BACKEND_FEATURES", device.get_backend_features())?;
    let offered = Format::V2.backend_features();
    ensure!(features == offered, "GET_BACKEND_FEATURES: {features:#x}");
    works(
        "SET_BACKEND_FEATURES, all",
        device.set_backend_features(offered),
    )?;
    works("SET_BACKEND_FEATURES 0", device.set_backend_features(0))?;
    for bit in (0..64).filter(|bit| offered != 1 << bit) {
        fails(
            format_args!("SET_BACKEND_FEATURES, bit {bit}"),
            device.set_backend_features(1 << bit),
            libc::EOPNOTSUPP,
        )?;
    }
    Ok(())
}

fn vring_num(context: &Context) -> Result<()> {
    let device = context.device()?;
    device.set_owner()?;
    let max = device.info(None)?.max_queue_size;
    ensure!(max == 1024, "GET_INFO: max_queue_size is {max}");
    for exponent in 0..=10 {
        let num = 1 << exponent;
        works(
            format_args!("SET_VRING_NUM {num}"),
            device.set_vring_num(0, num),
        )?;
    }
    for num in [
        0,
        3,
        100,
        1023,
        1025,
        2048,
        32768,
        65535,
        65536,
        1 << 31,
        u32::MAX,
    ] {
        fails(
            format_args!("SET_VRING_NUM {num}"),
            device.set_vring_num(0, num),
            libc::EINVAL,
        )?;
    }
    drop(device);
    let (device, mut ring) = running(context)?;
    for num in [64, 128] {
        fails(
            format_args!("SET_VRING_NUM {num} while running"),
            device.set_vring_num(0, num),
            libc::EBUSY,
        )?;
    }
    check_ring(&mut ring, "read after SET_VRING_NUM while running")
}

fn vring_base(context: &Context) -> Result<()> {
    let device = context.device()?;
    device.set_owner()?;
    for base in [0, 1, 1024, 65535] {
        works(
            format_args!("SET_VRING_BASE {base}"),
            device.set_vring_base(0, base),
        )?;
        let got = works("GET_VRING_BASE", device.get_vring_base(0))?;
        ensure!(got == base, "GET_VRING_BASE: {got}, set was {base}");
    }
    for base in [65536, u32::MAX] {
        fails(
            format_args!("SET_VRING_BASE {base}"),
            device.set_vring_base(0, base),
            libc::EINVAL,
        )?;
    }
    drop(device);
    let (device, mut ring) = running(context)?;
    fails(
        "SET_VRING_BASE while running",
        device.set_vring_base(0, 7),
        libc::EBUSY,
    )?;
    check_ring(&mut ring, "read after SET_VRING_BASE while running")?;
    device.stop()?;
    let base = works("GET_VRING_BASE", device.get_vring_base(0))?;
    ensure!(base == 1, "GET_VRING_BASE after one request: {base}");
    Ok(())
}

fn vring_addr(context: &Context) -> Result<()> {
    let (device, mut ring) = set_up(context)?;
    let good = ring.user_addresses(0)?;
    let kernel = 0xffff_8000_0000_0000u64;
    type Change = fn(&mut numbers::vhost_vring_addr);
    let misaligned: &[(&str, Change)] = &[
        ("available ring at 1", |a| a.avail_user_addr += 1),
        ("used ring at 1", |a| a.used_user_addr += 1),
        ("used ring at 2", |a| a.used_user_addr += 2),
        ("log at 2", |a| a.log_guest_addr = 2),
    ];
    for (what, change) in misaligned {
        let mut bad = good;
        change(&mut bad);
        fails(what, device.set_vring_user_addr(&bad), libc::EINVAL)?;
    }
    for flags in [2, 4, 1 << 31, u32::MAX] {
        let bad = numbers::vhost_vring_addr { flags, ..good };
        fails(
            format_args!("flags {flags:#x}"),
            device.set_vring_user_addr(&bad),
            libc::EOPNOTSUPP,
        )?;
    }
    // It is checked at the start whether the rings are accessible at all.
    let parts: &[(&str, Change)] = &[
        ("descriptors", |a| a.desc_user_addr = 0xffff_8000_0000_0000),
        ("available ring", |a| {
            a.avail_user_addr = 0xffff_8000_0000_0000
        }),
        ("used ring", |a| a.used_user_addr = 0xffff_8000_0000_0000),
    ];
    for (part, change) in parts {
        let mut bad = good;
        change(&mut bad);
        works(
            format_args!("{part} at {kernel:#x}"),
            device.set_vring_user_addr(&bad),
        )?;
        let started = device.set_backend(context.disk()?);
        ensure!(
            matches!(&started, Err(e) if matches!(e.errno(), Some(libc::EINVAL | libc::EFAULT))),
            "SET_BACKEND with the {part} at a kernel address: {started:?}"
        );
    }
    works("good addresses again", device.set_vring_user_addr(&good))?;
    works("SET_BACKEND", device.set_backend(context.disk()?))?;
    for (part, change) in parts {
        let mut bad = good;
        change(&mut bad);
        fails(
            format_args!("{part} at {kernel:#x} while running"),
            device.set_vring_user_addr(&bad),
            libc::EINVAL,
        )?;
    }
    works(
        "the same addresses while running",
        device.set_vring_user_addr(&good),
    )?;
    check_ring(&mut ring, "read after SET_VRING_ADDR while running")
}

fn vring_eventfds(context: &Context) -> Result<()> {
    type Set = fn(&Device, u32, i32) -> std::result::Result<(), Error>;
    let ioctls: &[(&str, Set)] = &[
        ("SET_VRING_KICK", Device::set_vring_kick),
        ("SET_VRING_CALL", Device::set_vring_call),
        ("SET_VRING_ERR", Device::set_vring_err),
    ];
    let device = context.device()?;
    device.set_owner()?;
    let event = EventFd::new(0)?;
    let null = File::open("/dev/null")?;
    let (socket, _other) = UnixStream::pair()?;
    for (name, set) in ioctls {
        works(format_args!("{name} -1"), set(&device, 0, -1))?;
        works(
            format_args!("{name} with an eventfd"),
            set(&device, 0, event.as_raw_fd()),
        )?;
        works(
            format_args!("{name} with the same again"),
            set(&device, 0, event.as_raw_fd()),
        )?;
        for fd in [-2, i32::MIN, NO_FD] {
            fails(
                format_args!("{name} {fd}"),
                set(&device, 0, fd),
                libc::EBADF,
            )?;
        }
        for (what, fd) in [
            ("/dev/null", null.as_raw_fd()),
            ("a socket", socket.as_raw_fd()),
            ("the device itself", device.as_raw_fd()),
        ] {
            fails(
                format_args!("{name} with {what}"),
                set(&device, 0, fd),
                libc::EINVAL,
            )?;
        }
        works(format_args!("{name} -1 again"), set(&device, 0, -1))?;
    }
    Ok(())
}

fn vring_index(context: &Context) -> Result<()> {
    let device = context.device()?;
    device.set_owner()?;
    let count = device.info(None)?.max_virtqueues;
    ensure!((1..=64).contains(&count), "GET_INFO: {count} virtqueues");
    works(
        "SET_VRING_NUM of the last",
        device.set_vring_num(count - 1, 16),
    )?;
    works(
        "GET_VRING_BASE of the last",
        device.get_vring_base(count - 1),
    )?;
    for index in [count, count + 1, 65536, u32::MAX] {
        let addr = numbers::vhost_vring_addr {
            index,
            ..Default::default()
        };
        for (name, result) in [
            ("SET_VRING_NUM", device.set_vring_num(index, 16)),
            ("SET_VRING_BASE", device.set_vring_base(index, 0)),
            ("GET_VRING_BASE", device.get_vring_base(index).map(drop)),
            ("SET_VRING_ADDR", device.set_vring_user_addr(&addr)),
            ("SET_VRING_KICK", device.set_vring_kick(index, -1)),
            ("SET_VRING_CALL", device.set_vring_call(index, -1)),
            ("SET_VRING_ERR", device.set_vring_err(index, -1)),
            (
                "SET_VRING_BUSYLOOP_TIMEOUT",
                device.set_vring_busyloop_timeout(index, 0),
            ),
            ("GET_VRING_WORKER", device.get_vring_worker(index).map(drop)),
            ("ATTACH_VRING_WORKER", device.attach_vring_worker(index, 0)),
        ] {
            fails(format_args!("{name} of {index}"), result, libc::ENOBUFS)?;
        }
    }
    Ok(())
}

fn busyloop(context: &Context) -> Result<()> {
    let device = context.device()?;
    device.set_owner()?;
    for microseconds in [0, 50, u32::MAX, 0] {
        works(
            "SET_VRING_BUSYLOOP_TIMEOUT",
            device.set_vring_busyloop_timeout(0, microseconds),
        )?;
        let got = works(
            "GET_VRING_BUSYLOOP_TIMEOUT",
            device.get_vring_busyloop_timeout(0),
        )?;
        ensure!(got == microseconds, "{got} µs, set were {microseconds}");
    }
    Ok(())
}

/// The argument of `VHOST_SET_MEM_TABLE`.
fn table(nregions: u32, padding: u32, regions: &[[u64; 4]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(nregions.to_ne_bytes());
    bytes.extend(padding.to_ne_bytes());
    for number in regions.iter().flatten() {
        bytes.extend(number.to_ne_bytes());
    }
    bytes
}

fn mem_table(context: &Context) -> Result<()> {
    let set = numbers::VHOST_SET_MEM_TABLE();
    let set = number(set)?;
    let device = context.device()?;
    device.set_owner()?;
    let give = |mut bytes: Vec<u8>| device.raw(set, RawArg::Bytes(&mut bytes));
    works("no regions", give(table(0, 0, &[])))?;
    fails("padding", give(table(0, 1, &[])), libc::EOPNOTSUPP)?;
    let max: u32 = fs::read_to_string("/sys/module/vhost/parameters/max_mem_regions")
        .map_or(64, |text| text.trim().parse().unwrap_or(64));
    for count in [max + 1, u32::MAX] {
        fails(
            format_args!("{count} regions"),
            give(table(count, 0, &[])),
            libc::E2BIG,
        )?;
    }
    let regions: Vec<_> = (0..u64::from(max))
        .map(|n| [n << 20, 1 << 20, 0x1000_0000 + (n << 20), 0])
        .collect();
    works(format_args!("{max} regions"), give(table(max, 0, &regions)))?;
    for (what, region) in [
        ("an empty region", [4096, 0, 0x1000_0000, 0]),
        (
            "a region around the end of the address space",
            [u64::MAX - 1, 4096, 0x1000_0000, 0],
        ),
    ] {
        fails(what, give(table(1, 0, &[region])), libc::EFAULT)?;
    }
    drop(device);

    // While a backend runs, what user space cannot access is refused, and the old table stays.
    let (device, mut ring) = running(context)?;
    let mut bytes = table(1, 0, &[[0, 1 << 20, 0xffff_8000_0000_0000, 0]]);
    fails(
        "a region of kernel addresses while running",
        device.raw(set, RawArg::Bytes(&mut bytes)),
        libc::EFAULT,
    )?;
    check_ring(&mut ring, "read after a refused table")
}

fn log(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    works("SET_LOG_BASE 0", device.set_log_base(0))?;
    for fd in [-2, NO_FD] {
        fails(
            format_args!("SET_LOG_FD {fd}"),
            device.set_log_fd(fd),
            libc::EBADF,
        )?;
    }
    let null = File::open("/dev/null")?;
    fails(
        "SET_LOG_FD with /dev/null",
        device.set_log_fd(null.as_raw_fd()),
        libc::EINVAL,
    )?;
    let event = EventFd::new(0)?;
    works("SET_LOG_FD", device.set_log_fd(event.as_raw_fd()))?;
    works("SET_LOG_FD -1", device.set_log_fd(-1))?;
    check_ring(&mut ring, "read after SET_LOG_BASE and SET_LOG_FD")
}

fn backend_order(context: &Context) -> Result<()> {
    let disk = context.disk()?;
    let mut device = context.device()?;
    fails("no owner", device.set_backend(&disk), libc::EPERM)?;
    device.set_owner()?;
    fails("nothing set up", device.set_backend(&disk), libc::EINVAL)?;
    let memory = Memory::new(4 << 20)?;
    device.set_memory(&memory)?;
    fails("no ring set up", device.set_backend(&disk), libc::EINVAL)?;
    device.set_vring_num(0, 64)?;
    fails("no addresses", device.set_backend(&disk), libc::EINVAL)?;
    // Any ring will do, the first need not be one of them.
    let mut ring = Ring::new(&memory, 64, false)?;
    ring.set_up(&device, 3, 0)?;
    works("ring 3 set up", device.set_backend(&disk))?;
    check_ring(&mut ring, "read on ring 3, the only one")?;
    works("stop", device.stop())
}

fn backend_fd(context: &Context) -> Result<()> {
    let (device, mut ring) = set_up(context)?;
    for fd in [-2, i32::MIN, i32::MAX, NO_FD] {
        fails(
            format_args!("fd {fd}"),
            device.set_backend_raw(0, fd),
            libc::EBADF,
        )?;
    }
    let (socket, _other) = UnixStream::pair()?;
    // A process that waits for the end of a pipe has the other end of it.
    let mut waiting = context
        .again()?
        .args(["--child", "wait"])
        .stdin(Stdio::piped())
        .spawn()?;
    let pipe = waiting.stdin.take().context("no pipe")?;
    let files = [
        ("a folder", OwnedFd::from(File::open("/")?)),
        ("/dev/null", File::open("/dev/null")?.into()),
        ("a socket", socket.into()),
        ("a pipe", pipe.into()),
        ("the device itself", device.file().try_clone()?.into()),
    ];
    for (what, file) in &files {
        fails(what, device.set_backend(file), libc::ENOTBLK)?;
    }
    drop(files);
    waiting.wait()?;
    let event = ring.kick_event().as_raw_fd();
    fails(
        "an eventfd",
        device.set_backend_raw(0, event),
        libc::ENOTBLK,
    )?;
    fails(
        "a file without direct I/O",
        device.set_backend(File::open("/proc/self/maps")?),
        libc::EINVAL,
    )?;
    fails(
        "a disk opened write-only",
        device.set_backend(context.disk_write_only()?),
        libc::EINVAL,
    )?;
    // None of them started anything.
    let info = device.info(None)?;
    ensure!(
        info.flags & uapi::VHOST_BLK_INFO_RUNNING == 0,
        "it runs: {info:?}"
    );
    // The index does not matter, and the backend outlives the descriptor.
    let disk = context.disk()?;
    works(
        "index 12345",
        device.set_backend_raw(12345, disk.as_raw_fd()),
    )?;
    drop(disk);
    check_ring(&mut ring, "read after the disk's descriptor is closed")?;
    works("-1 with index 12345", device.set_backend_raw(12345, -1))
}

fn backend_twice(context: &Context) -> Result<()> {
    let (device, mut ring) = set_up(context)?;
    works("-1 before any start", device.stop())?;
    for round in 0..3 {
        let disk = context.disk()?;
        works(format_args!("start {round}"), device.set_backend(&disk))?;
        fails(
            "the same disk while running",
            device.set_backend(&disk),
            libc::EBUSY,
        )?;
        fails(
            "the disk opened again while running",
            device.set_backend(context.disk_read_only()?),
            libc::EBUSY,
        )?;
        check_ring(&mut ring, "read after a start that was refused")?;
        works("stop", device.stop())?;
        works("stop again", device.stop())?;
    }
    Ok(())
}

fn info_size(context: &Context) -> Result<()> {
    let get = number(uapi::VHOST_BLK_GET_INFO)?;
    let device = context.device()?;
    let whole = size_of::<Info>();
    for argsz in [8, 12, 16, 100, whole - 1, whole, whole + 8, 4096] {
        let mut bytes = vec![0xaa; 8192];
        bytes[..4].copy_from_slice(&u32::try_from(argsz)?.to_ne_bytes());
        bytes[4..8].copy_from_slice(&(-1i32).to_ne_bytes());
        works(
            format_args!("GET_INFO of {argsz} bytes"),
            device.raw(get, RawArg::Bytes(&mut bytes)),
        )?;
        let size = u32::from_ne_bytes(bytes[..4].try_into()?);
        ensure!(
            usize::try_from(size)? >= whole,
            "GET_INFO of {argsz} bytes: the kernel's structure has {size}, ours {whole}"
        );
        let end = argsz.min(usize::try_from(size)?);
        ensure!(
            bytes[end..].iter().all(|&byte| byte == 0xaa),
            "GET_INFO of {argsz} bytes wrote beyond byte {end}"
        );
        if argsz >= 12 {
            let version = u32::from_ne_bytes(bytes[8..12].try_into()?);
            ensure!(
                version == uapi::VHOST_BLK_ABI_VERSION,
                "GET_INFO of {argsz} bytes: version {version}"
            );
        }
        ensure!(
            argsz < whole || bytes[whole - 32..whole].iter().all(|&byte| byte == 0),
            "GET_INFO: reserved fields are not 0"
        );
    }
    for argsz in [0u32, 1, 4, 7] {
        let mut bytes = [0; 8192];
        bytes[..4].copy_from_slice(&argsz.to_ne_bytes());
        bytes[4..8].copy_from_slice(&(-1i32).to_ne_bytes());
        fails(
            format_args!("GET_INFO of {argsz} bytes"),
            device.raw(get, RawArg::Bytes(&mut bytes)),
            libc::EINVAL,
        )?;
    }
    Ok(())
}

/// A number in sysfs, if the file is there.
fn sysfs_number(folder: &Path, name: &str) -> Result<Option<u64>> {
    match fs::read_to_string(folder.join(name)) {
        Ok(text) => Ok(Some(
            text.trim()
                .parse()
                .with_context(|| format!("{name} in sysfs: {text:?}"))?,
        )),
        Err(_) => Ok(None),
    }
}

fn info_limits(context: &Context) -> Result<()> {
    let info = context.info()?;
    let queue = disk::queue_sysfs(context.disk_path())?;
    let own = disk::sysfs(context.disk_path())?;
    let sectors = |bytes: u64| bytes >> 9;
    let same = |what: &str, got: u64, expected: Option<u64>| -> Result<()> {
        if let Some(expected) = expected {
            ensure!(
                got == expected,
                "GET_INFO: {what} is {got}, in sysfs {expected}"
            );
        }
        Ok(())
    };
    let number = |name| sysfs_number(&queue, name);
    let size = sysfs_number(&own, "size")?;
    ensure!(size.is_some(), "no size in sysfs: {}", own.display());
    same("capacity", info.capacity, size)?;
    for (what, got, name) in [
        (
            "logical_block_size",
            info.logical_block_size,
            "logical_block_size",
        ),
        (
            "physical_block_size",
            info.physical_block_size,
            "physical_block_size",
        ),
        ("io_min", info.io_min, "minimum_io_size"),
        ("io_opt", info.io_opt, "optimal_io_size"),
        ("max_segments", info.max_segments, "max_segments"),
        ("dma_alignment", info.dma_alignment, "dma_alignment"),
        (
            "discard_granularity",
            info.discard_granularity,
            "discard_granularity",
        ),
        ("zone_sectors", info.zone_sectors, "chunk_sectors"),
        ("nr_zones", info.nr_zones, "nr_zones"),
        ("max_open_zones", info.max_open_zones, "max_open_zones"),
        (
            "max_active_zones",
            info.max_active_zones,
            "max_active_zones",
        ),
    ] {
        let expected = number(name)?;
        // A chunk need not be a zone.
        let zoned = name != "chunk_sectors" || info.nr_zones > 0;
        same(what, got.into(), expected.filter(|_| zoned))?;
    }
    same(
        "max_sectors, in KiB,",
        (info.max_sectors >> 1).into(),
        number("max_sectors_kb")?,
    )?;
    for (what, got, name) in [
        (
            "max_discard_sectors",
            info.max_discard_sectors,
            "discard_max_bytes",
        ),
        (
            "max_write_zeroes_sectors",
            info.max_write_zeroes_sectors,
            "write_zeroes_max_bytes",
        ),
        (
            "max_zone_append_sectors",
            info.max_zone_append_sectors,
            "zone_append_max_bytes",
        ),
    ] {
        same(what, got.into(), number(name)?.map(sectors))?;
    }
    let flag = |bit| u64::from(info.flags & bit != 0);
    same(
        "the rotational flag",
        flag(uapi::VHOST_BLK_INFO_ROTATIONAL),
        number("rotational")?,
    )?;
    let cache = fs::read_to_string(queue.join("write_cache")).unwrap_or_default();
    same(
        "the write cache flag",
        flag(uapi::VHOST_BLK_INFO_WRITE_CACHE),
        match cache.trim() {
            "write back" => Some(1),
            "write through" => Some(0),
            _ => None,
        },
    )?;
    ensure!(
        info.max_queue_size == 1024,
        "max_queue_size {}",
        info.max_queue_size
    );
    ensure!(
        info.capabilities & uapi::VHOST_BLK_CAP_WRITEBACK != 0,
        "capabilities {:#x}",
        info.capabilities
    );
    ensure!(info.reserved == [0; 3], "reserved: {:?}", info.reserved);
    Ok(())
}

fn info_fd(context: &Context) -> Result<()> {
    let (device, _ring) = set_up(context)?;
    for fd in [-2, NO_FD] {
        fails(format_args!("fd {fd}"), device.info_raw(fd), libc::EBADF)?;
    }
    let null = File::open("/dev/null")?;
    fails("/dev/null", device.info(Some(null.as_fd())), libc::ENOTBLK)?;
    let write_only = context.disk_write_only()?;
    fails(
        "write-only",
        device.info(Some(write_only.as_fd())),
        libc::EINVAL,
    )?;

    let idle = works("-1, not running", device.info(None))?;
    ensure!(
        idle.flags == 0 && idle.capacity == 0 && idle.logical_block_size == 0,
        "-1, not running: {idle:?}"
    );
    ensure!(
        idle.device_bytes > 0 && idle.queue_bytes > 0 && idle.slot_bytes > 0,
        "memory is not told: {idle:?}"
    );
    let disk = context.disk()?;
    let asked = works("the disk", device.info(Some(disk.as_fd())))?;
    ensure!(
        asked.capacity > 0 && asked.flags & uapi::VHOST_BLK_INFO_RUNNING == 0,
        "the disk, not running: {asked:?}"
    );
    ensure!(
        asked.flags & uapi::VHOST_BLK_INFO_READ_ONLY == 0,
        "a disk opened for writing: {asked:?}"
    );
    let read_only = context.disk_read_only()?;
    let flags = works("the disk, read-only", device.info(Some(read_only.as_fd())))?.flags;
    ensure!(
        flags & uapi::VHOST_BLK_INFO_READ_ONLY != 0,
        "a disk opened read-only: flags {flags:#x}"
    );

    device.set_backend(&disk)?;
    let running = works("-1, running", device.info(None))?;
    ensure!(
        running.flags & uapi::VHOST_BLK_INFO_RUNNING != 0,
        "-1, running: flags {:#x}",
        running.flags
    );
    ensure!(
        (
            running.capacity,
            running.logical_block_size,
            running.max_sectors
        ) == (asked.capacity, asked.logical_block_size, asked.max_sectors),
        "-1, running: {running:?}; the disk: {asked:?}"
    );
    device.stop()?;
    let stopped = device.info(None)?;
    ensure!(
        stopped.flags == 0 && stopped.capacity == 0,
        "-1, stopped: {stopped:?}"
    );
    Ok(())
}

fn serial(context: &Context) -> Result<()> {
    let mut guest = context.started(|_| {})?;
    let id = |guest: &mut vhost_blk_ring::Guest, what: &str| -> Result<Vec<u8>> {
        Ok(check::request(
            what,
            guest.queue(0),
            Request::get_id(20),
            &Shape::default(),
            Status::Ok,
            UsedLen::Full,
        )?
        .data)
    };
    let none = id(&mut guest, "GET_ID before SET_SERIAL")?;
    ensure!(none == [0; 20], "GET_ID before SET_SERIAL: {none:?}");
    // While it runs, too; all 20 bytes count, there is no terminator.
    for serial in [
        *b"vhost-blk selftest!!",
        *b"short\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        [0xff; 20],
    ] {
        works("SET_SERIAL", guest.device().set_serial(&serial))?;
        let got = id(&mut guest, "GET_ID")?;
        ensure!(got == serial, "GET_ID: {got:?}, SET_SERIAL was {serial:?}");
    }
    Ok(())
}

fn pin_memory(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    for mode in [1, 0, 1] {
        works(
            format_args!("SET_PIN_MEMORY {mode}"),
            device.set_pin_memory_raw(mode),
        )?;
        let pinned = device.info(None)?.flags & uapi::VHOST_BLK_INFO_MEMORY_PINNED != 0;
        ensure!(!pinned, "SET_PIN_MEMORY {mode} held at once");
        check_ring(&mut ring, "read after SET_PIN_MEMORY")?;
    }
    for mode in [2, 3, 256, 1 << 31, u32::MAX] {
        fails(
            format_args!("SET_PIN_MEMORY {mode}"),
            device.set_pin_memory_raw(mode),
            libc::EINVAL,
        )?;
    }
    Ok(())
}

fn writeback(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    for mode in [0, 1, 0, 0, 1] {
        works(
            format_args!("SET_WRITEBACK {mode}"),
            device.set_writeback_raw(mode),
        )?;
        check_ring(&mut ring, "read after SET_WRITEBACK")?;
    }
    for mode in [2, 3, 256, 1 << 31, u32::MAX] {
        fails(
            format_args!("SET_WRITEBACK {mode}"),
            device.set_writeback_raw(mode),
            libc::EINVAL,
        )?;
    }
    Ok(())
}

fn workers(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    let first = works("GET_VRING_WORKER", device.get_vring_worker(0))?;
    let last = device.info(None)?.max_virtqueues - 1;
    let shared = works(
        "GET_VRING_WORKER of the last",
        device.get_vring_worker(last),
    )?;
    ensure!(
        shared == first,
        "queue 0 has worker {first}, queue {last} {shared}"
    );
    fails("FREE_WORKER in use", device.free_worker(first), libc::EBUSY)?;
    let new = works("NEW_WORKER", device.new_worker())?;
    ensure!(new != first, "NEW_WORKER: {new} again");
    works("FREE_WORKER unused", device.free_worker(new))?;
    fails("FREE_WORKER again", device.free_worker(new), libc::ENODEV)?;
    for bad in [new, first + 1000, u32::MAX] {
        fails(
            format_args!("FREE_WORKER {bad}"),
            device.free_worker(bad),
            libc::ENODEV,
        )?;
        fails(
            format_args!("ATTACH_VRING_WORKER {bad}"),
            device.attach_vring_worker(0, bad),
            libc::ENODEV,
        )?;
    }
    let new = works("NEW_WORKER", device.new_worker())?;
    works("ATTACH_VRING_WORKER", device.attach_vring_worker(0, new))?;
    let got = works("GET_VRING_WORKER", device.get_vring_worker(0))?;
    ensure!(got == new, "attached {new}, got {got}");
    fails("FREE_WORKER attached", device.free_worker(new), libc::EBUSY)?;
    check_ring(&mut ring, "read with the new worker")?;
    works(
        "ATTACH_VRING_WORKER again",
        device.attach_vring_worker(0, new),
    )?;
    check_ring(&mut ring, "read with the same worker attached again")?;
    works(
        "ATTACH_VRING_WORKER back",
        device.attach_vring_worker(0, first),
    )?;
    check_ring(&mut ring, "read with the first worker")?;
    works("FREE_WORKER detached", device.free_worker(new))
}

fn fork_from_owner(context: &Context) -> Result<()> {
    let device = context.device()?;
    let default = match device.get_fork_from_owner() {
        Ok(default) => default,
        Err(e) if e.errno() == Some(libc::EPERM) || e.errno() == Some(libc::ENOTTY) => {
            return crate::context::skip("this kernel has one worker mode only");
        }
        Err(e) => return Err(e.into()),
    };
    ensure!(default <= 1, "GET_FORK_FROM_OWNER: {default}");
    for bad in [2, 3, 255] {
        fails(
            format_args!("SET_FORK_FROM_OWNER {bad}"),
            device.set_fork_from_owner(bad),
            libc::EINVAL,
        )?;
    }
    for mode in [WorkerMode::Kthread, WorkerMode::Task] {
        let mut guest = context.guest(|options| options.worker_mode = Some(mode))?;
        let got = works("GET_FORK_FROM_OWNER", guest.device().get_fork_from_owner())?;
        ensure!(got == mode.number(), "{mode:?} was set, it is {got}");
        fails(
            "SET_FORK_FROM_OWNER with an owner",
            guest.device().set_worker_mode(mode),
            libc::EBUSY,
        )?;
        guest.start(context.disk()?)?;
        check::healthy(format_args!("{mode:?}"), &mut guest, 0)?;
        // The worker is a thread of ours, or not.
        let ours = fs::read_dir("/proc/self/task")?
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
            .any(|comm| comm.starts_with("vhost-"));
        ensure!(
            ours == (mode == WorkerMode::Task),
            "{mode:?}: a worker in this process: {ours}"
        );
        if mode == WorkerMode::Kthread {
            fails("NEW_WORKER", guest.device().new_worker(), libc::EFAULT)?;
        }
        let bases = guest.stop()?;
        guest.resume(context.disk()?, &bases)?;
        check::healthy(format_args!("{mode:?}, started again"), &mut guest, 0)?;
    }
    Ok(())
}

fn bad_pointers(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    let ioctls = [
        ("GET_FEATURES", numbers::VHOST_GET_FEATURES()),
        ("SET_FEATURES", numbers::VHOST_SET_FEATURES()),
        (
            "GET_BACKEND_FEATURES",
            numbers::VHOST_GET_BACKEND_FEATURES(),
        ),
        (
            "SET_BACKEND_FEATURES",
            numbers::VHOST_SET_BACKEND_FEATURES(),
        ),
        ("SET_MEM_TABLE", numbers::VHOST_SET_MEM_TABLE()),
        ("SET_LOG_BASE", numbers::VHOST_SET_LOG_BASE()),
        ("SET_LOG_FD", numbers::VHOST_SET_LOG_FD()),
        ("SET_VRING_NUM", numbers::VHOST_SET_VRING_NUM()),
        ("SET_VRING_ADDR", numbers::VHOST_SET_VRING_ADDR()),
        ("SET_VRING_BASE", numbers::VHOST_SET_VRING_BASE()),
        ("GET_VRING_BASE", numbers::VHOST_GET_VRING_BASE()),
        ("SET_VRING_KICK", numbers::VHOST_SET_VRING_KICK()),
        ("SET_VRING_CALL", numbers::VHOST_SET_VRING_CALL()),
        ("SET_VRING_ERR", numbers::VHOST_SET_VRING_ERR()),
        (
            "SET_VRING_BUSYLOOP_TIMEOUT",
            uapi::VHOST_SET_VRING_BUSYLOOP_TIMEOUT,
        ),
        (
            "GET_VRING_BUSYLOOP_TIMEOUT",
            uapi::VHOST_GET_VRING_BUSYLOOP_TIMEOUT,
        ),
        ("NEW_WORKER", uapi::VHOST_NEW_WORKER),
        ("FREE_WORKER", uapi::VHOST_FREE_WORKER),
        ("ATTACH_VRING_WORKER", uapi::VHOST_ATTACH_VRING_WORKER),
        ("GET_VRING_WORKER", uapi::VHOST_GET_VRING_WORKER),
        ("BLK_SET_BACKEND", uapi::VHOST_BLK_SET_BACKEND),
        ("BLK_SET_SERIAL", uapi::VHOST_BLK_SET_SERIAL),
        ("BLK_GET_INFO", uapi::VHOST_BLK_GET_INFO),
        ("BLK_SET_WRITEBACK", uapi::VHOST_BLK_SET_WRITEBACK),
        ("BLK_SET_PIN_MEMORY", uapi::VHOST_BLK_SET_PIN_MEMORY),
    ];
    for (name, request) in ioctls {
        let request = number(request)?;
        fails(
            format_args!("{name} at 0"),
            device.raw(request, RawArg::Null),
            libc::EFAULT,
        )?;
        fails(
            format_args!("{name} at a kernel address"),
            device.raw(request, RawArg::Kernel),
            libc::EFAULT,
        )?;
    }
    check_ring(&mut ring, "read after all bad pointers")
}

fn unknown_ioctls(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    let mut bytes = [0; 256];
    for request in [
        0x0000_af70, // _IO(0xaf, 0x70): vDPA's
        0x4008_af30, // VHOST_NET_SET_BACKEND
        0x40e8_af40, // VHOST_SCSI_SET_ENDPOINT
        0x4008_af60, // VHOST_VSOCK_SET_GUEST_CID
        0x4008_af00 | 0x7f,
        0x4004_af00 | 0xff, // VHOST_BLK_SET_BACKEND with another size
        0x8004_af00 | 0xfd,
        0x0000_1277, // BLKSSZGET
        0x0000_5401, // TCGETS
        0x0000_0000,
        0xffff_ffff,
    ] {
        fails(
            format_args!("ioctl {request:#010x}"),
            device.raw(request, RawArg::Bytes(&mut bytes)),
            libc::ENOTTY,
        )?;
    }
    check_ring(&mut ring, "read after unknown ioctls")
}

fn no_iotlb(context: &Context) -> Result<()> {
    let (device, mut ring) = running(context)?;
    let mut file = device.file();
    let epoll = Epoll::new()?;
    let events = EventSet::IN | EventSet::OUT | EventSet::PRIORITY;
    epoll.ctl(
        ControlOperation::Add,
        device.as_raw_fd(),
        EpollEvent::new(events, 0),
    )?;
    let ready = epoll.wait(100, &mut [EpollEvent::default()])?;
    ensure!(ready == 0, "poll: something to read or write");

    let error = |result: std::io::Result<usize>| result.map_err(|e| e.raw_os_error());
    let short = error(file.read(&mut [0; 8]));
    ensure!(short == Ok(0), "a short read: {short:?}");
    let read = error(file.read(&mut [0; 256]));
    ensure!(read == Err(Some(libc::EAGAIN)), "read: {read:?}");
    let mut message = [0; 128];
    for (what, kind, errno) in [
        ("message of type 0", 0u32, libc::EFAULT),
        ("message of type 3", 3, libc::EFAULT),
        ("IOTLB message", 1, libc::EFAULT),
        ("IOTLB message, version 2", 2, libc::EFAULT),
    ] {
        message[..4].copy_from_slice(&kind.to_ne_bytes());
        let wrote = error(file.write(&message));
        ensure!(wrote == Err(Some(errno)), "write of a {what}: {wrote:?}");
    }
    let wrote = error(file.write(&message[..3]));
    ensure!(wrote == Err(Some(libc::EFAULT)), "a short write: {wrote:?}");
    // An update of a device IOTLB that is not there.
    let mut update = [0; 72];
    update[..4].copy_from_slice(&1u32.to_ne_bytes());
    update[16..24].copy_from_slice(&4096u64.to_ne_bytes());
    update[33] = 2;
    let wrote = error(file.write(&update));
    ensure!(wrote == Err(Some(libc::EFAULT)), "IOTLB update: {wrote:?}");
    check_ring(&mut ring, "read after reads and writes of the device")
}

fn reset_and_start(context: &Context) -> Result<()> {
    let mut device = context.device()?;
    for round in 0..5u16 {
        context.step(format_args!("round {round}"));
        device.set_owner()?;
        device.set_features(feature::VERSION_1 | feature::EVENT_IDX)?;
        let memory = Memory::new(4 << 20)?;
        device.set_memory(&memory)?;
        let mut ring = Ring::new(&memory, 16 << round, true)?;
        ring.reset(100 * round)?;
        ring.set_up(&device, 0, 100 * round)?;
        device.set_backend(context.disk()?)?;
        check_ring(&mut ring, "read")?;
        // With and without a stop before.
        if round % 2 == 0 {
            device.stop()?;
        }
        works("RESET_OWNER", device.reset_owner())?;
        let info = device.info(None)?;
        ensure!(
            info.flags == 0,
            "after RESET_OWNER: flags {:#x}",
            info.flags
        );
        fails("SET_BACKEND after RESET_OWNER", device.stop(), libc::EPERM)?;
    }
    // Nothing of the old rings is left.
    device.set_owner()?;
    device.set_memory(&Memory::with_regions(&[(GuestAddress(0), 1 << 20)])?)?;
    fails(
        "SET_BACKEND without a new ring",
        device.set_backend(context.disk()?),
        libc::EINVAL,
    )
}
