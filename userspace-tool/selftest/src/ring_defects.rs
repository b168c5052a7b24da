// SPDX-License-Identifier: GPL-2.0

//! Rings that a broken or hostile guest might write.
//!
//! A defect stops its queue and signals the error eventfd. All other queues go
//! on, the queue works again after a stop and a start with a fresh ring, and
//! the host says nothing.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use vhost_blk_ring::memory::PAGE_SIZE;
use vhost_blk_ring::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use vhost_blk_ring::{
    Buffer, Descriptor, Guest, GuestAddress, Memory, Protection, Request, Ring, Segment, Shape,
    Table, uapi,
};

use crate::check::{self, works};
use crate::context::{Context, PATIENCE, QUIET, Test, test};
use crate::disk;

/// A defect, as a test.
macro_rules! defect {
    ($name:literal, $what:literal, $write:expr) => {
        test!($name, $what, |context| broken(context, $write))
    };
}

pub(crate) const TESTS: &[Test] = &[
    defect!(
        "ring.readable_after_writable",
        "status before data that is read",
        |p| {
            let parts = p.parts(4096)?;
            p.chain(&[parts.header, parts.status, parts.data(false)])
        }
    ),
    defect!("ring.header_after_status", "the header comes last", |p| {
        let parts = p.parts(0)?;
        p.chain(&[parts.status, parts.header])
    }),
    defect!(
        "ring.readable_after_writable_indirect",
        "the same in an indirect table",
        |p| {
            let parts = p.parts(4096)?;
            let table = p.table(&[parts.header, parts.status, parts.data(false)])?;
            p.indirect(table, 48)
        }
    ),
    defect!(
        "ring.readable_indirect_after_writable",
        "writable in the ring, then a readable table",
        |p| {
            let parts = p.parts(4096)?;
            let table = p.table(&[parts.header, parts.status])?;
            let taken = p.ring().take(2)?;
            p.write(taken[0], parts.data(true), Some(taken[1]))?;
            let entry = Descriptor::new(table.addr().0, 32, DESC_F_INDIRECT, 0);
            p.ring().write_descriptor(taken[1], entry)?;
            p.publish(taken[0])
        }
    ),
    defect!("ring.head_is_size", "a head just beyond the table", |p| {
        let size = p.ring().size();
        p.publish(size)
    }),
    defect!("ring.head_is_65535", "the largest head", |p| p
        .publish(65535)),
    defect!(
        "ring.head_is_negative",
        "a head that is negative as 16 bits",
        |p| p.publish(0x8000)
    ),
    defect!(
        "ring.next_is_size",
        "next points just beyond the table",
        |p| {
            let size = p.ring().size();
            p.next(size)
        }
    ),
    defect!("ring.next_is_65535", "next is the largest number", |p| p
        .next(65535)),
    defect!(
        "ring.loop_of_one",
        "a descriptor that is its own next",
        |p| p.next(0)
    ),
    defect!(
        "ring.loop_of_readable",
        "two readable descriptors in a loop",
        |p| {
            let parts = p.parts(0)?;
            p.write(0, parts.header, Some(1))?;
            p.write(1, parts.header, Some(0))?;
            p.publish(0)
        }
    ),
    defect!(
        "ring.loop_of_writable",
        "a good start, then writable descriptors in a loop",
        |p| {
            let parts = p.parts(4096)?;
            p.write(0, parts.header, Some(1))?;
            p.write(1, parts.data(true), Some(2))?;
            p.write(2, parts.status, Some(1))?;
            p.publish(0)
        }
    ),
    defect!(
        "ring.loop_of_empty",
        "a loop of descriptors of no bytes",
        |p| {
            p.write(0, Segment::readable(GuestAddress(4096), 0), Some(1))?;
            p.write(1, Segment::readable(GuestAddress(4096), 0), Some(0))?;
            p.publish(0)
        }
    ),
    defect!(
        "ring.loop_of_indirect",
        "an indirect descriptor that is its own next",
        |p| {
            let parts = p.parts(0)?;
            let table = p.table(&[parts.header])?;
            let flags = DESC_F_INDIRECT | DESC_F_NEXT;
            p.ring()
                .write_descriptor(0, Descriptor::new(table.addr().0, 16, flags, 0))?;
            p.publish(0)
        }
    ),
    defect!(
        "ring.indirect_of_no_bytes",
        "an indirect table without entries",
        |p| {
            let table = p.good_table()?;
            p.indirect(table, 0)
        }
    ),
    defect!(
        "ring.indirect_of_1_byte",
        "an indirect table of one byte",
        |p| {
            let table = p.good_table()?;
            p.indirect(table, 1)
        }
    ),
    defect!("ring.indirect_of_17_bytes", "an entry and a byte", |p| {
        let table = p.good_table()?;
        p.indirect(table, 17)
    }),
    defect!(
        "ring.indirect_of_47_bytes",
        "a byte less than three entries",
        |p| {
            let table = p.good_table()?;
            p.indirect(table, 47)
        }
    ),
    defect!(
        "ring.indirect_cut_short",
        "the last entry of the table has a next",
        |p| {
            let table = p.good_table()?;
            p.indirect(table, 32)
        }
    ),
    defect!(
        "ring.indirect_nested",
        "an indirect entry in an indirect table",
        |p| {
            let inner = p.good_table()?;
            let outer = p.alloc(16)?;
            let entry = Descriptor::new(inner.addr().0, 48, DESC_F_INDIRECT, 0);
            p.ring().write_table_entry(&outer, 0, entry)?;
            p.keep(inner);
            p.indirect(outer, 16)
        }
    ),
    defect!(
        "ring.indirect_loop",
        "every entry of the table has a next",
        |p| {
            let parts = p.parts(0)?;
            let table = p.alloc(64 * 16)?;
            for index in 0..64 {
                let flags = DESC_F_NEXT | DESC_F_WRITE;
                let entry = Descriptor::new(parts.status.addr.0, 1, flags, (index + 1) % 64);
                p.ring().write_table_entry(&table, index, entry)?;
            }
            p.indirect(table, 64 * 16)
        }
    ),
    defect!(
        "ring.indirect_of_65537",
        "an indirect table of 65537 entries",
        |p| {
            let table = p.alloc(65537 * 16)?;
            p.indirect(table, 65537 * 16)
        }
    ),
    defect!(
        "ring.indirect_of_4_gib",
        "an indirect table that claims 4 GiB",
        |p| {
            let table = p.good_table()?;
            p.indirect(table, 0xffff_fff0)
        }
    ),
    defect!(
        "ring.indirect_unmapped",
        "an indirect table that is nowhere",
        |p| {
            let entry = Descriptor::new(1 << 40, 48, DESC_F_INDIRECT, 0);
            p.ring().write_descriptor(0, entry)?;
            p.publish(0)
        }
    ),
    defect!(
        "ring.indirect_half_mapped",
        "an indirect table over the end of memory",
        |p| {
            let end = p.end_of_memory();
            let entry = Descriptor::new(end - 16, 48, DESC_F_INDIRECT, 0);
            p.ring().write_descriptor(0, entry)?;
            p.publish(0)
        }
    ),
    defect!(
        "ring.indirect_unreadable",
        "an indirect table in a PROT_NONE page",
        |p| {
            let table = p.good_table()?;
            let page = p.page_of(&table);
            p.memory().protect(page, PAGE_SIZE, Protection::None)?;
            p.indirect(table, 48)
        }
    ),
    defect!("ring.header_unmapped", "a header that is nowhere", |p| {
        let parts = p.parts(0)?;
        p.chain(&[Segment::readable(GuestAddress(1 << 40), 16), parts.status])
    }),
    defect!("ring.data_unmapped", "data that is nowhere", |p| {
        let parts = p.parts(0)?;
        let data = Segment::writable(GuestAddress(1 << 40), 4096);
        p.chain(&[parts.header, data, parts.status])
    }),
    defect!("ring.status_unmapped", "a status that is nowhere", |p| {
        let parts = p.parts(4096)?;
        let status = Segment::writable(GuestAddress(1 << 40), 1);
        p.chain(&[parts.header, parts.data(true), status])
    }),
    defect!(
        "ring.data_over_the_end",
        "data over the end of memory",
        |p| {
            let parts = p.parts(0)?;
            let data = Segment::writable(GuestAddress(p.end_of_memory() - 512), 1024);
            p.chain(&[parts.header, data, parts.status])
        }
    ),
    defect!(
        "ring.data_over_everything",
        "data that claims all 4 GiB",
        |p| {
            let parts = p.parts(0)?;
            let data = Segment::writable(GuestAddress(0), u32::MAX);
            p.chain(&[parts.header, data, parts.status])
        }
    ),
    defect!(
        "ring.address_overflow",
        "data around the end of the address space",
        |p| {
            let parts = p.parts(0)?;
            let data = Segment::writable(GuestAddress(u64::MAX - 511), 1024);
            p.chain(&[parts.header, data, parts.status])
        }
    ),
    defect!(
        "ring.address_is_the_last",
        "a status at the last address",
        |p| {
            let parts = p.parts(0)?;
            p.chain(&[parts.header, Segment::writable(GuestAddress(u64::MAX), 1)])
        }
    ),
    defect!(
        "ring.kernel_address",
        "data at an address of the host's kernel",
        |p| {
            let parts = p.parts(0)?;
            let data = Segment::writable(GuestAddress(0xffff_8880_0000_0000), 4096);
            p.chain(&[parts.header, data, parts.status])
        }
    ),
    defect!(
        "ring.avail_beyond_size",
        "the available index is size + 1 ahead",
        |p| {
            let index = p.ring().next_avail().wrapping_add(p.ring().size() + 1);
            p.index(index)
        }
    ),
    defect!(
        "ring.avail_backwards",
        "the available index goes back",
        |p| {
            let index = p.ring().next_avail().wrapping_sub(1);
            p.index(index)
        }
    ),
    defect!(
        "ring.avail_half_way",
        "the available index is 32768 ahead",
        |p| {
            let index = p.ring().next_avail().wrapping_add(32768);
            p.index(index)
        }
    ),
    defect!(
        "ring.no_writable",
        "a header and nothing to write to",
        |p| {
            let parts = p.parts(0)?;
            p.chain(&[parts.header])
        }
    ),
    defect!(
        "ring.write_without_status",
        "a write without a status byte",
        |p| {
            let parts = p.parts(4096)?;
            p.chain(&[parts.header, parts.data(false)])
        }
    ),
    defect!("ring.nothing", "a chain of no bytes", |p| {
        p.chain(&[Segment::readable(GuestAddress(4096), 0)])
    }),
    defect!(
        "ring.status_of_no_bytes",
        "the only writable descriptor has no bytes",
        |p| {
            let parts = p.parts(0)?;
            p.chain(&[parts.header, Segment::writable(parts.status.addr, 0)])
        }
    ),
    defect!(
        "ring.status_unwritable",
        "a status byte in a read-only page",
        |p| { status_page(p, Protection::Read) }
    ),
    defect!(
        "ring.status_inaccessible",
        "a status byte in a PROT_NONE page",
        |p| { status_page(p, Protection::None) }
    ),
    defect!(
        "ring.descriptors_inaccessible",
        "the descriptor table becomes PROT_NONE",
        |p| {
            let page = p.ring().descriptor_table().addr();
            let len = p.ring().descriptor_table().len();
            p.good_read()?;
            p.memory().protect(page, len, Protection::None)?;
            p.kick()
        }
    ),
    defect!(
        "ring.avail_inaccessible",
        "the available ring becomes PROT_NONE",
        |p| {
            let page = p.ring().avail_ring().addr();
            let len = p.ring().avail_ring().len();
            p.good_read()?;
            p.memory().protect(page, len, Protection::None)?;
            p.kick()
        }
    ),
    defect!(
        "ring.used_inaccessible",
        "the used ring becomes PROT_NONE",
        |p| {
            let page = p.ring().used_ring().addr();
            let len = p.ring().used_ring().len();
            p.good_read()?;
            p.memory().protect(page, len, Protection::None)?;
            p.kick()
        }
    ),
    defect!(
        "ring.used_unwritable",
        "the used ring becomes read-only",
        |p| {
            let page = p.ring().used_ring().addr();
            let len = p.ring().used_ring().len();
            p.good_read()?;
            p.memory().protect(page, len, Protection::Read)?;
            p.kick()
        }
    ),
    defect!(
        "ring.good_then_bad",
        "a bad chain right behind good ones",
        |p| {
            for _ in 0..5 {
                p.good_read()?;
            }
            let size = p.ring().size();
            p.publish(size)
        }
    ),
    test!(
        "ring.start_without_used",
        "a used ring where nothing is mapped: EFAULT",
        start_without_used
    ),
    test!(
        "ring.start_without_descriptors",
        "descriptors where nothing is mapped",
        |context| { start_nowhere(context, |addr| addr.desc_user_addr = NOWHERE) }
    ),
    test!(
        "ring.start_without_avail",
        "an available ring where nothing is mapped",
        |context| { start_nowhere(context, |addr| addr.avail_user_addr = NOWHERE) }
    ),
    test!(
        "ring.busy_head",
        "a head that is in flight is posted again",
        busy_head
    ),
    test!(
        "ring.same_head_many_times",
        "one head in every entry of the available ring",
        same_head
    ),
    test!(
        "ring.memory_taken_away",
        "a table without the ring's buffers while running",
        memory_taken_away
    ),
    test!(
        "ring.hole",
        "data over a hole between two regions of memory",
        hole
    ),
    test!(
        "ring.too_many_segments",
        "more segments than any ring has: IOERR or broken",
        too_many_segments
    ),
    test!(
        "ring.defects_in_all_queues",
        "every queue breaks, one after the other",
        all_queues
    ),
    test!(
        "ring.random_descriptors",
        "random descriptor tables for some seconds",
        120,
        random
    ),
];

/// An address of this process at which nothing is ever mapped.
const NOWHERE: u64 = 0x1000;

/// Queue 0 of a running guest, on which a defect is written.
struct Playground<'a> {
    guest: &'a mut Guest,
    /// Memory that the device may still access.
    kept: Vec<Buffer>,
}

/// The parts of a good request to read from sector 0.
struct Parts {
    header: Segment,
    status: Segment,
    data: (GuestAddress, u32),
}

impl Parts {
    fn data(&self, writable: bool) -> Segment {
        Segment {
            addr: self.data.0,
            len: self.data.1,
            writable,
        }
    }
}

impl Playground<'_> {
    fn ring(&mut self) -> &mut Ring {
        &mut self.guest.queue(0).ring
    }

    fn memory(&self) -> Memory {
        self.guest.memory().clone()
    }

    fn end_of_memory(&self) -> u64 {
        let regions = self.guest.memory().regions();
        regions
            .last()
            .map_or(0, |region| region.guest_phys_addr + region.memory_size)
    }

    fn keep(&mut self, buffer: Buffer) {
        self.kept.push(buffer);
    }

    fn alloc(&self, len: usize) -> Result<Buffer> {
        Ok(self.memory().alloc(len, PAGE_SIZE)?)
    }

    fn page_of(&self, buffer: &Buffer) -> GuestAddress {
        GuestAddress(buffer.addr().0 & !(PAGE_SIZE as u64 - 1))
    }

    /// Each in pages of its own.
    fn parts(&mut self, len: u32) -> Result<Parts> {
        let header = self.alloc(PAGE_SIZE)?;
        let status = self.alloc(PAGE_SIZE)?;
        let data = self.alloc(usize::try_from(len)?.max(PAGE_SIZE))?;
        header.fill(0)?;
        let parts = Parts {
            header: Segment::readable(header.addr(), 16),
            status: Segment::writable(status.addr(), 1),
            data: (data.addr(), len),
        };
        self.kept.extend([header, status, data]);
        Ok(parts)
    }

    /// An indirect table, at the start of a page.
    fn table(&mut self, segments: &[Segment]) -> Result<Buffer> {
        let table = self.alloc(16 * segments.len())?;
        for (index, segment) in segments.iter().enumerate() {
            let mut flags = if segment.writable { DESC_F_WRITE } else { 0 };
            if index + 1 < segments.len() {
                flags |= DESC_F_NEXT;
            }
            let index = u16::try_from(index)?;
            let entry = Descriptor::new(segment.addr.0, segment.len, flags, index + 1);
            self.ring().write_table_entry(&table, index, entry)?;
        }
        Ok(table)
    }

    /// The indirect table of a good request.
    fn good_table(&mut self) -> Result<Buffer> {
        let parts = self.parts(4096)?;
        self.table(&[parts.header, parts.data(true), parts.status])
    }

    /// Publishes an indirect descriptor that says that its table has `len` bytes.
    fn indirect(&mut self, table: Buffer, len: usize) -> Result<()> {
        let entry = Descriptor::new(table.addr().0, u32::try_from(len)?, DESC_F_INDIRECT, 0);
        self.keep(table);
        self.ring().write_descriptor(0, entry)?;
        self.publish(0)
    }

    fn write(&mut self, index: u16, segment: Segment, next: Option<u16>) -> Result<()> {
        let mut flags = if segment.writable { DESC_F_WRITE } else { 0 };
        if next.is_some() {
            flags |= DESC_F_NEXT;
        }
        let entry = Descriptor::new(segment.addr.0, segment.len, flags, next.unwrap_or(0));
        Ok(self.ring().write_descriptor(index, entry)?)
    }

    /// Publishes a chain of these segments.
    fn chain(&mut self, segments: &[Segment]) -> Result<()> {
        let ring = self.ring();
        ring.add(segments, Table::Direct)?;
        self.kick()
    }

    /// A header in descriptor 0, whose next is `next`.
    fn next(&mut self, next: u16) -> Result<()> {
        let parts = self.parts(0)?;
        self.write(0, parts.header, Some(next))?;
        self.publish(0)
    }

    /// Publishes a head, whatever it is.
    fn publish(&mut self, head: u16) -> Result<()> {
        self.ring().push_avail(head)?;
        self.kick()
    }

    /// Sets the available index.
    fn index(&mut self, index: u16) -> Result<()> {
        self.ring().set_avail_idx(index)?;
        Ok(self.ring().kick()?)
    }

    /// A good read, not yet published.
    fn good_read(&mut self) -> Result<()> {
        self.guest
            .queue(0)
            .submit(Request::read(0, 4096), &Shape::default())?;
        Ok(())
    }

    /// Publishes, where that is possible, and kicks.
    fn kick(&mut self) -> Result<()> {
        let ring = self.ring();
        let index = ring.next_avail();
        // A ring that was taken away cannot be written: then what was published before is enough.
        if !self.protected() {
            self.ring().set_avail_idx(index)?;
        }
        Ok(self.ring().kick()?)
    }

    /// Whether the available ring cannot be written now.
    fn protected(&mut self) -> bool {
        let memory = self.memory();
        let Ok(address) = memory.host_address(self.ring().avail_ring().addr()) else {
            return true;
        };
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        !maps.lines().any(|line| {
            let Some((range, rest)) = line.split_once(' ') else {
                return false;
            };
            let mut ends = range.split('-').map(|end| u64::from_str_radix(end, 16));
            let (Some(Ok(start)), Some(Ok(end))) = (ends.next(), ends.next()) else {
                return false;
            };
            (start..end).contains(&address) && rest.starts_with("rw")
        })
    }
}

fn status_page(p: &mut Playground<'_>, protection: Protection) -> Result<()> {
    let parts = p.parts(4096)?;
    p.memory()
        .protect(parts.status.addr, PAGE_SIZE, protection)?;
    p.chain(&[parts.header, parts.data(true), parts.status])
}

/// Makes all memory of a guest accessible again.
fn unprotect(memory: &Memory) -> Result<()> {
    for region in memory.regions() {
        memory.protect(
            GuestAddress(region.guest_phys_addr),
            usize::try_from(region.memory_size)?,
            Protection::ReadWrite,
        )?;
    }
    Ok(())
}

/// Writes a defect to queue 0 of two, and checks everything that is true for all defects. With and
/// without event indices, the one with tasks for workers and the other with kernel threads.
fn broken(context: &Context, write: fn(&mut Playground<'_>) -> Result<()>) -> Result<()> {
    for event_idx in [true, false] {
        let worker_mode = context.worker_mode(!event_idx)?;
        let mut guest = context.started(|options| {
            options.queues = 2;
            options.queue_size = 64;
            options.worker_mode = worker_mode;
            if !event_idx {
                options.features &= !uapi::feature::EVENT_IDX;
            }
        })?;
        for queue in 0..2 {
            check::healthy("before the defect", &mut guest, queue)?;
        }
        ensure!(
            !guest.queue(0).ring.wait_err(Duration::ZERO)?,
            "the error eventfd was signalled before the defect"
        );
        // The defect takes descriptors from 0 on: the ring starts afresh.
        restart(context, &mut guest)?;

        context.step(format_args!(
            "writing the defect (event indices: {event_idx})"
        ));
        let mut playground = Playground {
            guest: &mut guest,
            kept: Vec::new(),
        };
        write(&mut playground)?;
        let kept = playground.kept;
        after_defect(context, &mut guest)?;
        drop(kept);
    }
    Ok(())
}

/// What has to be true after queue 0 broke.
fn after_defect(context: &Context, guest: &mut Guest) -> Result<()> {
    context.step("waiting for the error eventfd");
    ensure!(
        guest.queue(0).ring.wait_err(PATIENCE)?,
        "the error eventfd was not signalled"
    );
    context.step("using the other queue");
    for _ in 0..3 {
        check::healthy("other queue after the defect", guest, 1)?;
    }
    unprotect(guest.memory())?;

    context.step("kicking the broken queue");
    let before = guest.queue(0).ring.used_idx()?;
    for _ in 0..3 {
        guest.queue(0).ring.kick()?;
        check::healthy("other queue while the broken one is kicked", guest, 1)?;
    }
    thread::sleep(QUIET);
    let after = guest.queue(0).ring.used_idx()?;
    ensure!(
        before == after,
        "the broken queue goes on: its used index went from {before} to {after}"
    );
    // It takes nothing any more, not even what is good.
    let base = guest.device().get_vring_base(0)?;
    thread::sleep(Duration::from_millis(20));
    ensure!(
        guest.device().get_vring_base(0)? == base,
        "the broken queue goes on fetching"
    );

    context.step("stop and start");
    restart(context, guest)?;
    for queue in 0..2 {
        check::healthy("started again after the defect", guest, queue)?;
    }
    ensure!(
        !guest.queue(0).ring.wait_err(Duration::ZERO)?,
        "the error eventfd is signalled although the ring is good again"
    );
    Ok(())
}

/// Stops, makes queue 0 a fresh ring, and starts.
fn restart(context: &Context, guest: &mut Guest) -> Result<()> {
    let mut bases = guest.stop()?;
    bases[0] = 0;
    guest.queue(0).reset(0)?;
    // What was signalled up to now was for the old ring.
    guest.queue(0).ring.wait_err(Duration::ZERO)?;
    guest.queue(0).ring.wait_call(Duration::ZERO)?;
    works("start", guest.resume(context.disk()?, &bases))
}

fn start_without_used(context: &Context) -> Result<()> {
    let mut guest = context.guest(|_| {})?;
    let mut addr = guest.queue(0).ring.user_addresses(0)?;
    addr.used_user_addr = NOWHERE;
    guest.device().set_vring_user_addr(&addr)?;
    check::fails(
        "start",
        guest.device().set_backend(context.disk()?),
        libc::EFAULT,
    )?;
    let info = guest.device().info(None)?;
    ensure!(
        info.flags & uapi::VHOST_BLK_INFO_RUNNING == 0,
        "it says that it runs: {info:?}"
    );
    let good = guest.queue(0).ring.addresses();
    guest.device().set_vring_addr(0, &good)?;
    works("start with a good ring", guest.start(context.disk()?))?;
    check::healthy("good ring", &mut guest, 0)
}

/// A ring part of which is nowhere: either the start fails, or the first kick breaks the ring.
fn start_nowhere(
    context: &Context,
    change: fn(&mut vhost_blk_ring::device::numbers::vhost_vring_addr),
) -> Result<()> {
    let mut guest = context.guest(|options| options.queues = 2)?;
    let mut addr = guest.queue(0).ring.user_addresses(0)?;
    change(&mut addr);
    guest.device().set_vring_user_addr(&addr)?;
    match guest.start(context.disk()?) {
        Err(e) if e.errno() == Some(libc::EFAULT) => {}
        Err(e) => return Err(e.into()),
        Ok(()) => {
            guest
                .queue(0)
                .submit(Request::read(0, 4096), &Shape::default())?;
            guest.queue(0).ring.publish()?;
            guest.queue(0).ring.kick()?;
            ensure!(
                guest.queue(0).ring.wait_err(PATIENCE)?,
                "the error eventfd was not signalled"
            );
            check::healthy("other queue", &mut guest, 1)?;
        }
    }
    restart(context, &mut guest)?;
    check::healthy("good ring", &mut guest, 0)
}

fn busy_head(context: &Context) -> Result<()> {
    let slow_disk = context.slow_disk()?;
    let mut guest = context.guest(|options| {
        options.queues = 2;
        options.queue_size = 64;
    })?;
    guest.start(&slow_disk)?;
    let queue = guest.queue(0);
    let head = queue.submit(Request::read(0, 4096), &Shape::default())?;
    queue.kick()?;
    // While it is in flight, it comes again, twice.
    thread::sleep(Duration::from_millis(20));
    ensure!(
        queue.ring.used_idx()? == 0,
        "the slow disk is too fast for this test"
    );
    queue.ring.push_avail(head)?;
    queue.ring.push_avail(head)?;
    queue.ring.publish()?;
    queue.ring.kick()?;
    ensure!(
        queue.ring.wait_err(PATIENCE)?,
        "the error eventfd was not signalled"
    );
    context.step("the first request");
    let done = queue.wait(PATIENCE)?;
    check::outcome(
        "the request that was in flight",
        &done,
        vhost_blk_ring::Status::Ok,
        check::UsedLen::Full,
    )?;
    thread::sleep(QUIET);
    ensure!(
        queue.ring.used_idx()? == 1,
        "it was used more than once: used index {}",
        queue.ring.used_idx()?
    );
    let other = guest
        .queue(1)
        .run(Request::read(8, 4096), &Shape::default(), PATIENCE)?;
    check::outcome(
        "other queue",
        &other,
        vhost_blk_ring::Status::Ok,
        check::UsedLen::Full,
    )?;
    restart(context, &mut guest)?;
    check::healthy("started again", &mut guest, 0)
}

fn same_head(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| {
        options.queues = 2;
        options.queue_size = 64;
    })?;
    for round in 0..20 {
        context.step(format_args!("round {round}"));
        let queue = guest.queue(0);
        let head = queue.submit(Request::read(0, 4096), &Shape::default())?;
        for _ in 1..64 {
            queue.ring.push_avail(head)?;
        }
        queue.ring.publish()?;
        queue.ring.kick()?;
        // A head may come again once it is done: then all are used. Else the ring breaks.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let used = queue.ring.used_idx()?;
            ensure!(used <= 64, "64 entries, but the used index is {used}");
            if used == 64 || queue.ring.wait_err(Duration::from_millis(10))? {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "neither broken nor done: used index {used}"
            );
        }
        check::healthy("other queue", &mut guest, 1)?;
        restart(context, &mut guest)?;
        check::healthy("started again", &mut guest, 0)?;
        restart(context, &mut guest)?;
    }
    Ok(())
}

fn memory_taken_away(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queue_size = 64)?;
    check::healthy("before", &mut guest, 0)?;
    // The rings are given by their addresses in this process, and stay.
    works(
        "SET_MEM_TABLE without regions",
        guest.device().set_mem_table(&[]),
    )?;
    let queue = guest.queue(0);
    queue.submit(Request::read(0, 4096), &Shape::default())?;
    queue.kick()?;
    ensure!(
        queue.ring.wait_err(PATIENCE)?,
        "the error eventfd was not signalled"
    );
    let regions = guest.memory().regions();
    works("SET_MEM_TABLE", guest.device().set_mem_table(&regions))?;
    restart(context, &mut guest)?;
    check::healthy("with its memory again", &mut guest, 0)
}

fn hole(context: &Context) -> Result<()> {
    let regions = [
        (GuestAddress(0), 16 << 20),
        (GuestAddress(16 << 20), 1 << 20),
        (GuestAddress(32 << 20), 1 << 20),
    ];
    let memory = Memory::with_regions(&regions)?;
    let options = vhost_blk_ring::Options {
        queues: 2,
        queue_size: 64,
        ..context.options()
    };
    let mut guest = Guest::with_memory(&options, &memory)?;
    guest.start(context.disk()?)?;
    let mut playground = Playground {
        guest: &mut guest,
        kept: Vec::new(),
    };
    // Regions that touch are no hole: data may go over their border.
    let border = 16u64 << 20;
    let parts = playground.parts(0)?;
    let data = Segment::writable(GuestAddress(border - 2048), 4096);
    memory.write(data.addr, &[0; 2048])?;
    playground.chain(&[parts.header, data, parts.status])?;
    let used = playground.ring().wait_used(PATIENCE)?;
    ensure!(used.len == 4097, "used.len {} of 4097", used.len);
    let mut got = vec![0; 4096];
    memory.read(data.addr, &mut got[..2048])?;
    memory.read(GuestAddress(border), &mut got[2048..])?;
    check::same("read over a border of regions", &got, &disk::pattern(0, 8))?;

    let data = Segment::writable(GuestAddress(border + (1 << 20) - 2048), 4096);
    playground.chain(&[parts.header, data, parts.status])?;
    let kept = playground.kept;
    after_defect(context, &mut guest)?;
    drop(kept);
    Ok(())
}

fn too_many_segments(context: &Context) -> Result<()> {
    for count in [1022usize, 1025, 1500, 20_000] {
        context.step(format_args!("{count} segments of data"));
        let mut guest = context.started(|options| {
            options.queues = 2;
            options.queue_size = 1024;
        })?;
        let mut playground = Playground {
            guest: &mut guest,
            kept: Vec::new(),
        };
        let parts = playground.parts(4096)?;
        let mut segments = vec![parts.header];
        segments.extend(vec![parts.data(true); count]);
        segments.push(parts.status);
        let table = playground.table(&segments)?;
        playground.memory().write(parts.status.addr, &[0xee])?;
        let used_before = playground.ring().used_idx()?;
        let len = table.len();
        playground.indirect(table, len)?;
        let kept = playground.kept;
        let deadline = Instant::now() + PATIENCE;
        let ring = &guest.queue(0).ring;
        let broken = loop {
            if ring.used_idx()? != used_before {
                break false;
            }
            if ring.wait_err(Duration::from_millis(5))? {
                break true;
            }
            ensure!(
                Instant::now() < deadline,
                "{count} segments: nothing happens"
            );
        };
        if broken {
            ensure!(
                count > 1022,
                "a chain of a ring's full length breaks the ring"
            );
        } else {
            let mut status = [0];
            guest.memory().read(parts.status.addr, &mut status)?;
            let expected = u8::from(count > 1022);
            // More than a ring's length may be served or be refused.
            ensure!(
                status[0] == 0 || status[0] == expected,
                "{count} segments: status {}",
                status[0]
            );
        }
        check::healthy("other queue", &mut guest, 1)?;
        restart(context, &mut guest)?;
        check::healthy("started again", &mut guest, 0)?;
        drop(kept);
    }
    Ok(())
}

fn all_queues(context: &Context) -> Result<()> {
    let count = 8;
    let mut guest = context.started(|options| {
        options.queues = count;
        options.queue_size = 16;
    })?;
    let count = usize::try_from(count)?;
    for broken in 0..count {
        let ring = &mut guest.queue(broken).ring;
        ring.push_avail(9999)?;
        ring.publish()?;
        ring.kick()?;
        ensure!(ring.wait_err(PATIENCE)?, "queue {broken}: no error eventfd");
        for good in broken + 1..count {
            check::healthy(
                format_args!("{} queues are broken", broken + 1),
                &mut guest,
                good,
            )?;
        }
    }
    guest.stop()?;
    for queue in 0..count {
        guest.queue(queue).reset(0)?;
    }
    guest.resume(context.disk()?, &vec![0; count])?;
    for queue in 0..count {
        check::healthy("started again", &mut guest, queue)?;
    }
    Ok(())
}

/// Numbers that look random, the same in every run.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        // The remainder is less than a length, so it fits.
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap_or(0)]
    }
}

/// Fills the table with plausible and implausible descriptors, again and again. Nothing is checked
/// but that the host and the device survive it. Headers that overlap may write anywhere.
fn random(context: &Context) -> Result<()> {
    let result = random_tables(context);
    disk::prepare(context.disk_path())?;
    result
}

fn random_tables(context: &Context) -> Result<()> {
    const SIZE: u16 = 64;
    let mut numbers = Xorshift(0x5eed_1234_5678_9abc);
    let mut guest = context.started(|options| {
        options.queues = 2;
        options.queue_size = SIZE;
    })?;
    let memory = guest.memory().clone();
    let area = memory.alloc(1 << 20, PAGE_SIZE)?;
    let begin = Instant::now();
    let mut round = 0;
    let mut broke = 0;
    let mut used = 0;
    while begin.elapsed() < Duration::from_secs(10) {
        context.step(format_args!("round {round}"));
        // Headers everywhere: reads of the pattern, writes to the scratch area, other types.
        let mut headers = Vec::with_capacity(area.len());
        for _ in 0..area.len() / 16 {
            let kind = numbers.of(&[0u32, 0, 1, 1, 4, 8, 11, 13, 77, u32::MAX]);
            let sector = match kind {
                1 => disk::SCRATCH.0 + numbers.below(disk::SCRATCH.1 as u64),
                _ => numbers.of(&[0, 8, 2048, u64::MAX, 1 << 55]),
            };
            headers.extend(kind.to_le_bytes());
            headers.extend(0u32.to_le_bytes());
            headers.extend(sector.to_le_bytes());
        }
        area.write(0, &headers)?;
        let queue = guest.queue(0);
        for index in 0..SIZE {
            let addr = match numbers.below(20) {
                0 => numbers.next(),
                1 => numbers.below(65 << 20),
                _ => area.addr().0 + numbers.below(1 << 16) * 16,
            };
            let len = match numbers.below(16) {
                0 => u32::try_from(numbers.below(1 << 32))?,
                1..4 => 1,
                4..8 => 16,
                _ => numbers.of(&[0u32, 15, 17, 48, 512, 512, 1024, 4096, 65536]),
            };
            // Mostly writable towards the end, mostly to the next.
            let mut flags = if index % 4 >= 2 { DESC_F_WRITE } else { 0 };
            if index % 4 != 3 {
                flags |= DESC_F_NEXT;
            }
            if numbers.below(12) == 0 {
                flags ^= numbers.of(&[DESC_F_WRITE, DESC_F_NEXT, DESC_F_INDIRECT, 0xfff8]);
            }
            let next = if numbers.below(16) == 0 {
                u16::try_from(numbers.below(65536))?
            } else {
                index + 1
            };
            queue
                .ring
                .write_descriptor(index, Descriptor::new(addr, len, flags, next))?;
        }
        let count = numbers.below(u64::from(SIZE)) + 1;
        for _ in 0..count {
            let head = if numbers.below(40) == 0 {
                u16::try_from(numbers.below(65536))?
            } else {
                u16::try_from(numbers.below(u64::from(SIZE)) / 4 * 4)?
            };
            queue.ring.push_avail(head)?;
        }
        queue.ring.publish()?;
        queue.ring.kick()?;
        // Some time for it, or none.
        if numbers.below(4) > 0 {
            let until = Instant::now() + Duration::from_secs(2);
            while u64::from(queue.ring.used_idx()?) < count && Instant::now() < until {
                if queue.ring.wait_err(Duration::from_millis(1))? {
                    broke += 1;
                    break;
                }
            }
        }
        used += u64::from(queue.ring.used_idx()?);
        ensure!(
            u64::from(queue.ring.used_idx()?) <= count,
            "round {round}: more used entries than available ones"
        );
        if round % 8 == 0 {
            check::answers("other queue", &mut guest, 1)?;
        }
        restart(context, &mut guest)?;
        round += 1;
    }
    ensure!(
        broke > 0 && used > 0,
        "{round} rounds, {broke} broke, {used} requests: the numbers are no good"
    );
    check::answers("afterwards", &mut guest, 0)
}
