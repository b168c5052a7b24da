// SPDX-License-Identifier: GPL-2.0

//! Guest memory that stays pinned while a backend runs.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Uid, setuid};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::{
    Buffer, Guest, GuestAddress, Memory, Protection, Request, Segment, Shape, Status, Table, uapi,
};

use crate::check::{self, UsedLen, fails, works};
use crate::context::{Context, PATIENCE, Test, skip, test};
use crate::{disk, memory};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "pinned.counts",
        "from start to stop all memory is pinned, and counts as locked; requests pin none",
        counts
    ),
    test!(
        "pinned.limit",
        "no more is pinned than RLIMIT_MEMLOCK allows",
        limit
    ),
    test!(
        "pinned.unwritable",
        "memory that cannot be pinned for long is an error at the start",
        unwritable
    ),
    test!(
        "pinned.device",
        "what there is besides the memory of a device stays pinned; a read to that one fails",
        device
    ),
    test!(
        "pinned.replaced",
        "memory that was replaced is found after SET_MEM_TABLE, with requests in flight",
        replaced
    ),
    test!(
        "pinned.load",
        "reads and writes of all sizes, over stop and start",
        120,
        load
    ),
];

/// Where a process finds how much memory of its is locked.
const STATUS: &str = "/proc/self/status";

/// Bytes of guest memory.
const LEN: usize = 16 << 20;

/// A guest with `memory`, which is to stay pinned.
fn guest(context: &Context, memory: &Memory) -> Result<Guest> {
    let mut options = context.options();
    options.pin_memory = true;
    Ok(Guest::with_memory(&options, memory)?)
}

fn is_pinned(guest: &Guest) -> Result<bool> {
    Ok(guest.device().info(None)?.flags & uapi::VHOST_BLK_INFO_MEMORY_PINNED != 0)
}

/// Locked memory of this process, bytes.
fn locked() -> Result<usize> {
    locked_by(&mut File::open(STATUS)?)
}

/// Locked memory of the process whose [`STATUS`] this is, bytes.
fn locked_by(status: &mut File) -> Result<usize> {
    let mut text = String::new();
    status.rewind()?;
    status.read_to_string(&mut text)?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmLck:"));
    let kib = line.context("no VmLck")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<usize>()? << 10)
}

/// Waits until `count` pages more are pinned, on all of the host, than `before`.
fn wait_pinned(what: &str, before: i64, count: usize) -> Result<()> {
    /// Pages that the rings of a queue are in at most, which stay pinned, too, while a backend runs.
    const RINGS: i64 = 4;
    let count = i64::try_from(count)?;
    let most = if count == 0 { 0 } else { count + RINGS };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = memory::pinned_pages().context("no counts of pinned pages")? - before;
        if (count..=most).contains(&now) {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: {now} pages are pinned, not {count} to {most}"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

/// A request's memory: header, data and status in a page each.
struct Pages(Buffer);

impl Pages {
    fn new(memory: &Memory) -> Result<Self> {
        Ok(Pages(memory.alloc(3 * PAGE_SIZE, PAGE_SIZE)?))
    }

    /// Reads 4 KiB from sector 0 to the data's page, and returns what is there then.
    fn read(&self, guest: &mut Guest) -> Result<Vec<u8>> {
        self.submit(guest)?;
        guest.queue(0).ring.wait_used(PATIENCE)?;
        ensure!(self.0.read(2 * PAGE_SIZE, 1)? == [0], "the read failed");
        Ok(self.0.read(PAGE_SIZE, PAGE_SIZE)?)
    }

    fn submit(&self, guest: &mut Guest) -> Result<()> {
        self.submit_to(guest, self.0.at(PAGE_SIZE))
    }

    /// As [`submit`](Self::submit), but reads to a page that is given.
    fn submit_to(&self, guest: &mut Guest, data: GuestAddress) -> Result<()> {
        self.0.write(0, &Request::read(0, 0).readable())?;
        self.0.write(2 * PAGE_SIZE, &[0xee])?;
        let ring = &mut guest.queue(0).ring;
        ring.add(
            &[
                Segment::readable(self.0.at(0), 16),
                Segment::writable(data, 4096),
                Segment::writable(self.0.at(2 * PAGE_SIZE), 1),
            ],
            Table::Direct,
        )?;
        ring.publish_and_kick()?;
        Ok(())
    }
}

fn counts(context: &Context) -> Result<()> {
    let memory = Memory::new(LEN)?;
    let mut guest = guest(context, &memory)?;
    let before = memory::pinned_pages().context("no counts of pinned pages")?;
    let locked_before = locked()?;
    for round in 0..3 {
        context.step(format_args!("round {round}"));
        ensure!(!is_pinned(&guest)?, "pinned before the start");
        works("start", guest.start(context.disk()?))?;
        ensure!(is_pinned(&guest)?, "GET_INFO says that nothing is pinned");
        wait_pinned("after the start", before, LEN / PAGE_SIZE)?;
        let more = locked()? - locked_before;
        ensure!(more == LEN, "{more} bytes are locked, not {LEN}");

        let acquired = memory::acquired_pins().context("no counts of pinned pages")?;
        let pages = Pages::new(&memory)?;
        for _ in 0..100 {
            let data = pages.read(&mut guest)?;
            check::same("read", &data, &disk::pattern(0, 8))?;
        }
        let pins = memory::acquired_pins().context("no counts of pinned pages")? - acquired;
        // Others may pin something, too.
        ensure!(pins < 50, "{pins} pages were pinned for 100 reads");

        let bases = works("stop", guest.stop())?;
        guest.queue(0).reset(bases[0])?;
        wait_pinned("after the stop", before, 0)?;
        let more = locked()? - locked_before;
        ensure!(more == 0, "{more} bytes are locked after the stop");
    }
    works("start", guest.start(context.disk()?))?;
    drop(guest);
    wait_pinned("after the device was closed", before, 0)?;
    let more = locked()? - locked_before;
    ensure!(more == 0, "{more} bytes are locked after the end");
    Ok(())
}

/// Has this process lock no more than `bytes`, which root might. Returns its [`STATUS`], which it could not open then.
fn limit_locked(bytes: usize) -> Result<File> {
    let bytes = u64::try_from(bytes)?;
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes)?;
    let status = File::open(STATUS)?;
    setuid(Uid::from_raw(65534))?;
    Ok(status)
}

fn limit(context: &Context) -> Result<()> {
    let memory = Memory::new(LEN)?;
    let mut guest = guest(context, &memory)?;
    let disk = context.disk()?;
    let mut status = limit_locked(LEN / 2)?;
    fails("start", guest.start(&disk), libc::ENOMEM)?;
    let still = locked_by(&mut status)?;
    ensure!(still == 0, "{still} bytes are still locked");
    works("SET_PIN_MEMORY 0", guest.device().set_pin_memory(false))?;
    works("start", guest.start(&disk))?;
    check::healthy("without pinning", &mut guest, 0)
}

fn unwritable(context: &Context) -> Result<()> {
    let memory = Memory::new(LEN)?;
    let mut guest = guest(context, &memory)?;
    let buffer = memory.alloc(PAGE_SIZE, PAGE_SIZE)?;
    let protect = |protection| memory.protect(buffer.at(0), PAGE_SIZE, protection);
    for protection in [Protection::None, Protection::Read] {
        protect(protection)?;
        fails("start", guest.start(context.disk()?), libc::EFAULT)?;
        ensure!(locked()? == 0, "{} bytes are still locked", locked()?);
    }
    protect(Protection::ReadWrite)?;
    works("start", guest.start(context.disk()?))?;
    check::healthy("afterwards", &mut guest, 0)
}

/// Memory of the guest, and above it a page of a device's of the host, as of one that the guest has.
fn with_device_memory() -> Result<(Memory, Buffer)> {
    let address = GuestAddress(1 << 32);
    for device in fs::read_dir("/sys/bus/pci/devices").into_iter().flatten() {
        let device = device?.path();
        if device.join("driver").exists() {
            continue;
        }
        for number in 0..6 {
            let path = device.join(format!("resource{number}"));
            let Ok(file) = File::options().read(true).write(true).open(path) else {
                continue;
            };
            // Those of ports cannot be mapped.
            let regions = vec![
                (GuestAddress(0), LEN, None),
                (address, PAGE_SIZE, Some(file)),
            ];
            if let Ok(memory) = Memory::with_files(regions) {
                let page = memory.alloc_at(address, PAGE_SIZE)?;
                return Ok((memory, page));
            }
        }
    }
    skip("no PCI device without a driver whose memory can be mapped")
}

fn device(context: &Context) -> Result<()> {
    let (memory, page) = with_device_memory()?;
    let mut guest = guest(context, &memory)?;
    let disk = context.disk()?;
    // Nothing of the device counts, not even for a while.
    let mut status = limit_locked(LEN)?;
    works("start", guest.start(&disk))?;
    let pages = Pages::new(&memory)?;
    for what in ["at the start", "after SET_MEM_TABLE"] {
        context.step(what);
        ensure!(is_pinned(&guest)?, "{what} nothing is pinned");
        let now = locked_by(&mut status)?;
        ensure!(now == LEN, "{what} {now} bytes are locked, not {LEN}");
        check::same(what, &pages.read(&mut guest)?, &disk::pattern(0, 8))?;
        // Nothing of it is accessed.
        pages.submit_to(&mut guest, page.at(0))?;
        guest.queue(0).ring.wait_used(PATIENCE)?;
        let status = Status::from(pages.0.read(2 * PAGE_SIZE, 1)?[0]);
        ensure!(
            status == Status::IoErr,
            "{what}: a read to the device: {status:?}"
        );
        works(
            "SET_MEM_TABLE",
            guest.device().set_mem_table(&memory.regions()),
        )?;
    }
    Ok(())
}

fn replaced(context: &Context) -> Result<()> {
    let memory = Memory::shared(LEN)?;
    let mut guest = guest(context, &memory)?;
    let pattern = disk::pattern(0, 8);
    guest.start(context.disk()?)?;
    let pages = Pages::new(&memory)?;
    check::same("at first", &pages.read(&mut guest)?, &pattern)?;
    for round in 0..20 {
        // What stays pinned is read to, and nobody sees it any more.
        memory.replace_pages(pages.0.at(PAGE_SIZE), PAGE_SIZE)?;
        let data = pages.read(&mut guest)?;
        check::same("replaced", &data, &[0; PAGE_SIZE])?;

        let others: Vec<_> = (0..8).map(|_| Pages::new(&memory)).collect::<Result<_>>()?;
        for each in &others {
            each.submit(&mut guest)?;
        }
        works(
            "SET_MEM_TABLE",
            guest.device().set_mem_table(&memory.regions()),
        )?;
        ensure!(is_pinned(&guest)?, "round {round}: nothing is pinned");
        for _ in &others {
            guest.queue(0).ring.wait_used(PATIENCE)?;
        }
        for each in &others {
            check::same("in flight", &each.0.read(PAGE_SIZE, PAGE_SIZE)?, &pattern)?;
        }
        check::same("after SET_MEM_TABLE", &pages.read(&mut guest)?, &pattern)?;
    }
    // As locked as it was.
    ensure!(locked()? == LEN, "{} bytes are locked", locked()?);
    works("stop", guest.stop())?;
    Ok(())
}

fn load(context: &Context) -> Result<()> {
    let memory = Memory::new(LEN)?;
    let mut guest = guest(context, &memory)?;
    guest.start(context.disk()?)?;
    let (start, _) = disk::SCRATCH;
    for seed in 0..3 {
        for sectors in [1, 8, 9, 64, 512] {
            let data = disk::seeded(seed, start, sectors);
            let write = guest.queue(0).run(
                Request::write(start, data.clone()),
                &Shape::default(),
                PATIENCE,
            )?;
            check::outcome("write", &write, Status::Ok, UsedLen::Full)?;
            let read = guest.queue(0).run(
                Request::read(start, data.len()),
                &Shape::default(),
                PATIENCE,
            )?;
            check::outcome("read", &read, Status::Ok, UsedLen::Full)?;
            check::same("read", &read.data, &data)?;
        }
        let bases = works("stop", guest.stop())?;
        works("start", guest.resume(context.disk()?, &bases))?;
    }
    check::healthy("at last", &mut guest, 0)
}
