// SPDX-License-Identifier: GPL-2.0

//! A ring's fast path, to measure with.
//!
//! [`Ring`] and [`Request`](crate::Request) are made to do anything, and pay for
//! it with allocations and look-ups. A [`Driver`] does one thing at the price
//! that it has for a guest's own driver: requests of one size, one for each of
//! its [`Slots`], whose descriptors are written once and stay as long as the slot
//! is used for the same operation. It allocates nothing once it is made.

use std::sync::atomic::{Ordering, fence};

use vm_memory::bitmap::BS;
use vm_memory::{AtomicAccess, Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory, PAGE_SIZE};
use crate::request::{HEADER_LEN, Kind, SECTOR_SIZE, Status, UNWRITTEN};
use crate::ring::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESCRIPTOR_BYTES, Descriptor,
    Ring, USED_ELEM_BYTES, USED_F_NO_NOTIFY, need_event,
};

/// What a slot's request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// It reads.
    In,
    /// It writes.
    Out,
    /// It makes what was written stable.
    Flush,
}

impl Op {
    fn kind(self) -> Kind {
        match self {
            Op::In => Kind::In,
            Op::Out => Kind::Out,
            Op::Flush => Kind::Flush,
        }
    }
}

/// Descriptors of a request: header, data, status.
const CHAIN: u16 = 3;
/// Where a slot's status byte is in what it has of the common memory, behind its
/// header.
const STATUS: usize = HEADER_LEN;
/// Where its indirect table is: in a cache line of its own, as the device writes
/// the status.
const TABLE: usize = 64;
/// What a slot has of the common memory, bytes.
const SLOT_BYTES: usize = 128;
/// Offset of the sector in a header.
const SECTOR: usize = 8;

/// Memory of requests that are in flight at once, all of one size.
#[derive(Debug)]
pub struct Slots {
    /// Header, status and indirect table of each.
    common: Buffer,
    /// The data of each, in whole pages.
    data: Buffer,
    count: u16,
    len: u32,
    indirect: bool,
}

impl Slots {
    /// Guest memory that `count` slots for `len` bytes of data take, bytes.
    pub fn memory_needed(count: u16, len: u32) -> usize {
        let each = (len as usize).next_multiple_of(PAGE_SIZE) + SLOT_BYTES;
        (usize::from(count) * each).next_multiple_of(PAGE_SIZE) + 2 * PAGE_SIZE
    }

    /// Takes memory for `count` requests of `len` bytes each, and touches all of
    /// it. With `indirect` their descriptors stand in indirect tables.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Invalid`], if `len` is not a multiple of
    /// [`SECTOR_SIZE`].
    pub fn new(memory: &Memory, count: u16, len: u32, indirect: bool) -> Result<Self> {
        if count == 0 || len == 0 || len as usize % SECTOR_SIZE != 0 {
            return Err(Error::Invalid(format!("{count} slots of {len} bytes")));
        }
        let stride = (len as usize).next_multiple_of(PAGE_SIZE);
        let slots = Slots {
            common: memory.alloc(SLOT_BYTES * usize::from(count), PAGE_SIZE)?,
            data: memory.alloc(stride * usize::from(count), PAGE_SIZE)?,
            count,
            len,
            indirect,
        };
        slots.common.fill(0)?;
        let page = vec![0; stride];
        for slot in 0..usize::from(count) {
            slots.data.write(slot * stride, &page)?;
        }
        Ok(slots)
    }

    /// How many there are.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Data of each request, bytes.
    pub fn data_len(&self) -> u32 {
        self.len
    }

    /// The memory of all data.
    pub fn data(&self) -> &Buffer {
        &self.data
    }

    /// Where the data of a slot is.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    pub fn data_addr(&self, slot: u16) -> GuestAddress {
        assert!(slot < self.count, "slot {slot} of {}", self.count);
        let stride = (self.len as usize).next_multiple_of(PAGE_SIZE);
        self.data.at(usize::from(slot) * stride)
    }

    /// Sets the data of a slot.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if `bytes` is too long.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    pub fn set_data(&self, slot: u16, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.len as usize {
            return Err(Error::Invalid(format!(
                "{} bytes for a slot of {}",
                bytes.len(),
                self.len
            )));
        }
        self.data.memory().write(self.data_addr(slot), bytes)
    }

    /// Descriptors of the ring that each slot takes.
    pub fn descriptors(&self) -> u16 {
        if self.indirect { 1 } else { CHAIN }
    }
}

/// A piece of guest memory that was looked up once.
#[derive(Debug)]
struct Part<'m> {
    addr: GuestAddress,
    slice: VolatileSlice<'m, BS<'m, ()>>,
}

impl<'m> Part<'m> {
    fn of(buffer: &'m Buffer) -> Result<Self> {
        let (addr, len) = (buffer.addr(), buffer.len());
        let slice = buffer
            .memory()
            .map()
            .get_slice(addr, len)
            .map_err(Error::access(addr, len))?;
        Ok(Part { addr, slice })
    }

    #[inline]
    fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> Result<T> {
        self.slice
            .load(offset, order)
            .map_err(|e| self.error(offset, size_of::<T>(), e))
    }

    #[inline]
    fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) -> Result<()> {
        self.slice
            .store(value, offset, order)
            .map_err(|e| self.error(offset, size_of::<T>(), e))
    }

    fn write_descriptor(&self, index: usize, descriptor: Descriptor) -> Result<()> {
        self.write(DESCRIPTOR_BYTES * index, descriptor)
    }

    fn write(&self, offset: usize, descriptor: Descriptor) -> Result<()> {
        self.slice
            .write_obj(descriptor, offset)
            .map_err(|e| self.error(offset, DESCRIPTOR_BYTES, e))
    }

    #[cold]
    fn error(&self, offset: usize, len: usize, source: vm_memory::VolatileMemoryError) -> Error {
        Error::access(GuestAddress(self.addr.0 + offset as u64), len)(source.into())
    }
}

/// The driver's side of a ring, with prepared requests.
///
/// It has the ring to itself. The ring's own books are not kept meanwhile:
/// [`Ring::reset`] puts them right.
#[derive(Debug)]
pub struct Driver<'m> {
    ring: &'m Ring,
    slots: &'m Slots,
    desc: Part<'m>,
    avail: Part<'m>,
    used: Part<'m>,
    common: Part<'m>,
    event_idx: bool,
    /// By slot: what its descriptors are written for.
    written: Vec<Option<Op>>,
    /// By slot: whether its request is in flight.
    busy: Vec<bool>,
    next_avail: u16,
    published: u16,
    last_used: u16,
    /// Up to where [`answer`](Self::answer) has completed requests.
    answered: u16,
}

impl<'m> Driver<'m> {
    /// A driver of `ring`, on which nothing is in flight, with its requests in
    /// `slots`.
    ///
    /// # Errors
    ///
    /// [`Error::RingFull`], if the ring has not enough descriptors for all slots
    /// at once; [`Error::Invalid`], if something is in flight.
    pub fn new(ring: &'m mut Ring, slots: &'m Slots) -> Result<Self> {
        let ring: &'m Ring = ring;
        if ring.in_flight() > 0 {
            return Err(Error::Invalid("requests are in flight".into()));
        }
        let needed = usize::from(slots.count) * usize::from(slots.descriptors());
        if needed > usize::from(ring.size()) {
            return Err(Error::RingFull {
                needed,
                free: ring.size().into(),
            });
        }
        Ok(Driver {
            ring,
            slots,
            desc: Part::of(ring.descriptor_table())?,
            avail: Part::of(ring.avail_ring())?,
            used: Part::of(ring.used_ring())?,
            common: Part::of(&slots.common)?,
            event_idx: ring.event_idx(),
            written: vec![None; slots.count.into()],
            busy: vec![false; slots.count.into()],
            next_avail: ring.next_avail(),
            published: ring.next_avail(),
            last_used: ring.last_used(),
            answered: ring.next_avail(),
        })
    }

    /// Whether event indices are in use.
    pub fn event_idx(&self) -> bool {
        self.event_idx
    }

    /// Requests that are in flight or added.
    pub fn in_flight(&self) -> u16 {
        self.next_avail.wrapping_sub(self.last_used)
    }

    /// Adds the request of a slot, at `sector` of the disk, to the available
    /// ring, not yet published.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if the slot's last request is in flight.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    #[inline]
    pub fn add(&mut self, slot: u16, op: Op, sector: u64) -> Result<()> {
        let index = usize::from(slot);
        if self.busy[index] {
            return Err(Error::Invalid(format!("slot {slot} is in flight")));
        }
        if self.written[index] != Some(op) {
            self.write_chain(slot, op)?;
            self.written[index] = Some(op);
        }
        let common = SLOT_BYTES * index;
        let relaxed = Ordering::Relaxed;
        self.common
            .store(common + SECTOR, sector.to_le(), relaxed)?;
        self.common.store(common + STATUS, UNWRITTEN, relaxed)?;
        let place = usize::from(self.next_avail & (self.ring.size() - 1));
        let head = slot * self.slots.descriptors();
        self.avail.store(4 + 2 * place, head.to_le(), relaxed)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.busy[index] = true;
        Ok(())
    }

    /// Writes the header's type and the descriptors of a slot.
    #[cold]
    fn write_chain(&self, slot: u16, op: Op) -> Result<()> {
        let common = SLOT_BYTES * usize::from(slot);
        let header = self.slots.common.at(common);
        let relaxed = Ordering::Relaxed;
        self.common
            .store(common, op.kind().number().to_le(), relaxed)?;
        let data = match op {
            Op::In => Some(DESC_F_WRITE),
            Op::Out => Some(0),
            Op::Flush => None,
        };
        let header_len = u32::try_from(HEADER_LEN).expect("a header is short");
        let parts = [
            Some((header.0, header_len, 0)),
            data.map(|flags| (self.slots.data_addr(slot).0, self.slots.len, flags)),
            Some((header.0 + STATUS as u64, 1, DESC_F_WRITE)),
        ];
        let count = parts.iter().flatten().count();
        // The first place of the chain in its table, and the table.
        let (first, table) = if self.slots.indirect {
            (0, &self.common)
        } else {
            (slot * self.slots.descriptors(), &self.desc)
        };
        let base = if self.slots.indirect {
            common + TABLE
        } else {
            DESCRIPTOR_BYTES * usize::from(first)
        };
        for ((number, place), (addr, len, flags)) in
            (1..).zip(first..).zip(parts.into_iter().flatten())
        {
            let (next, more) = if number < count {
                (place + 1, DESC_F_NEXT)
            } else {
                (0, 0)
            };
            let descriptor = Descriptor::new(addr, len, flags | more, next);
            table.write(base + DESCRIPTOR_BYTES * (number - 1), descriptor)?;
        }
        if self.slots.indirect {
            let len = u32::try_from(DESCRIPTOR_BYTES * count).expect("a table is short");
            let table = header.0 + TABLE as u64;
            self.desc
                .write_descriptor(slot.into(), Descriptor::new(table, len, DESC_F_INDIRECT, 0))?;
        }
        Ok(())
    }

    /// Makes what was added visible to the device, if anything was, and returns
    /// whether the device wants to be kicked for it.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], which cannot happen.
    #[inline]
    pub fn publish(&mut self) -> Result<bool> {
        let old = self.published;
        if self.next_avail == old {
            return Ok(false);
        }
        self.published = self.next_avail;
        self.avail
            .store(2, self.published.to_le(), Ordering::Release)?;
        // The index has to be visible before the device's wish is read: the
        // device does the same the other way round.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self
                .used
                .load(
                    4 + USED_ELEM_BYTES * usize::from(self.ring.size()),
                    Ordering::Relaxed,
                )
                .map(u16::from_le)?;
            Ok(need_event(event, self.published, old))
        } else {
            let flags = self.used.load(0, Ordering::Relaxed).map(u16::from_le)?;
            Ok(flags & USED_F_NO_NOTIFY == 0)
        }
    }

    /// Kicks the device.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn kick(&self) -> Result<()> {
        self.ring.kick()
    }

    /// Takes all used entries that are there: their slots go to the end of
    /// `done`, and are free again.
    ///
    /// # Errors
    ///
    /// [`Error::UnexpectedUsed`], for a chain that is not in flight.
    #[inline]
    pub fn take(&mut self, done: &mut Vec<u16>) -> Result<()> {
        loop {
            let there = self.used.load(2, Ordering::Acquire).map(u16::from_le)?;
            if there == self.last_used {
                return Ok(());
            }
            while self.last_used != there {
                let place = usize::from(self.last_used & (self.ring.size() - 1));
                let id: u32 = self
                    .used
                    .load(4 + USED_ELEM_BYTES * place, Ordering::Relaxed)?;
                done.push(self.complete(u32::from_le(id))?);
                self.last_used = self.last_used.wrapping_add(1);
            }
        }
    }

    #[inline]
    fn complete(&mut self, id: u32) -> Result<u16> {
        let unexpected = || Error::UnexpectedUsed { id };
        let head = u16::try_from(id).map_err(|_| unexpected())?;
        // A division by a constant, or none.
        let (slot, rest) = if self.slots.indirect {
            (head, 0)
        } else {
            (head / CHAIN, head % CHAIN)
        };
        match self.busy.get_mut(usize::from(slot)) {
            Some(busy) if *busy && rest == 0 => *busy = false,
            _ => return Err(unexpected()),
        }
        Ok(slot)
    }

    /// What became of the last request of a slot.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if there is no such slot.
    #[inline]
    pub fn status(&self, slot: u16) -> Result<Status> {
        self.common
            .load::<u8>(SLOT_BYTES * usize::from(slot) + STATUS, Ordering::Relaxed)
            .map(Status::from)
    }

    /// Asks for a notification at the next used entry, and returns whether there
    /// is one already, which may come without.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], which cannot happen.
    #[inline]
    pub fn enable_notifications(&self) -> Result<bool> {
        if self.event_idx {
            self.set_used_event(self.last_used)?;
        } else {
            self.avail.store(0, 0u16, Ordering::Relaxed)?;
        }
        // The wish has to be visible before the used index is read again.
        fence(Ordering::SeqCst);
        let there = self.used.load(2, Ordering::Acquire).map(u16::from_le)?;
        Ok(there != self.last_used)
    }

    /// Asks for no notifications. With event indices one comes all the same for
    /// each 65536 entries.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], which cannot happen.
    #[inline]
    pub fn disable_notifications(&self) -> Result<()> {
        if self.event_idx {
            // The index that comes last.
            self.set_used_event(self.last_used.wrapping_sub(1))
        } else {
            self.avail
                .store(0, AVAIL_F_NO_INTERRUPT.to_le(), Ordering::Relaxed)
        }
    }

    fn set_used_event(&self, index: u16) -> Result<()> {
        let at = 4 + 2 * usize::from(self.ring.size());
        self.avail.store(at, index.to_le(), Ordering::Relaxed)
    }

    /// Waits for a notification and takes it: one read of the call eventfd,
    /// which has to be one that blocks.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn wait_call(&self) -> Result<()> {
        self.ring
            .call_event()
            .read()
            .map(drop)
            .map_err(Error::system("call eventfd"))
    }

    /// Plays the device too, where there is none: completes up to `most` of the
    /// published requests, oldest first, and asks to be kicked for the next. It
    /// does nothing for them and looks at nothing but their heads, to cost as
    /// little as it can.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], which cannot happen.
    #[inline]
    pub fn answer(&mut self, most: u16) -> Result<()> {
        let count = self.published.wrapping_sub(self.answered).min(most);
        let relaxed = Ordering::Relaxed;
        for _ in 0..count {
            let place = usize::from(self.answered & (self.ring.size() - 1));
            let head: u16 = self.avail.load(4 + 2 * place, relaxed)?;
            let head = u16::from_le(head);
            let slot = if self.slots.indirect {
                head
            } else {
                head / CHAIN
            };
            self.common
                .store(SLOT_BYTES * usize::from(slot) + STATUS, 0u8, relaxed)?;
            let entry = 4 + USED_ELEM_BYTES * place;
            self.used.store(entry, u32::from(head).to_le(), relaxed)?;
            self.answered = self.answered.wrapping_add(1);
        }
        self.used
            .store(2, self.answered.to_le(), Ordering::Release)?;
        if self.event_idx {
            let at = 4 + USED_ELEM_BYTES * usize::from(self.ring.size());
            self.used.store(at, self.answered.to_le(), relaxed)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::tests::{device_side, fetch};
    use crate::{Segment, ring};
    use virtio_queue::QueueT;
    use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

    const LEN: u32 = 8192;

    fn memory() -> Memory {
        Memory::new(4 << 20).expect("4 MiB")
    }

    #[test]
    fn memory_needed_is_enough() {
        for (count, len) in [(1, 512), (32, 4096), (128, 4608), (3, 1 << 20)] {
            let needed = Slots::memory_needed(count, len);
            let memory = Memory::new(needed).expect("memory");
            assert!(
                Slots::new(&memory, count, len, true).is_ok(),
                "{count} {len}"
            );
        }
        assert!(Slots::new(&memory(), 1, 100, true).is_err());
        assert!(Slots::new(&memory(), 0, 512, true).is_err());
    }

    #[test]
    fn slots_have_to_fit_the_ring() {
        let memory = memory();
        let mut ring = Ring::new(&memory, 8, false).expect("a ring");
        for (count, indirect, fits) in [(8, true, true), (2, false, true), (3, false, false)] {
            let slots = Slots::new(&memory, count, 512, indirect).expect("room");
            assert_eq!(Driver::new(&mut ring, &slots).is_ok(), fits, "{count}");
        }
        let slots = Slots::new(&memory, 1, 512, true).expect("room");
        ring.add(
            &[Segment::readable(GuestAddress(0), 1)],
            ring::Table::Direct,
        )
        .expect("room");
        assert!(Driver::new(&mut ring, &slots).is_err());
    }

    /// The chains are those of a usual request, whatever the slot did before.
    #[test]
    fn device_sees_usual_requests() {
        for (indirect, event_idx) in [(false, false), (true, true)] {
            let memory = memory();
            let slots = Slots::new(&memory, 4, LEN, indirect).expect("room");
            let mut ring = Ring::new(&memory, 16, event_idx).expect("a ring");
            let mut device = device_side(&ring);
            let mut driver = Driver::new(&mut ring, &slots).expect("room");
            let ops = [Op::In, Op::Out, Op::Flush, Op::In, Op::Flush, Op::Out];
            for (round, op) in (0u64..).zip(ops) {
                let map = memory.map().as_ref();
                device.enable_notification(map).expect("memory is there");
                driver.add(3, op, 80 + round).expect("free");
                assert!(driver.add(3, op, 0).is_err(), "it is in flight");
                assert!(driver.publish().expect("memory is there"));
                assert!(!driver.publish().expect("memory is there"));
                let seen = fetch(&mut device, &memory);
                assert_eq!(seen.len(), 1);
                let (head, segments) = &seen[0];
                let data = slots.data_addr(3);
                let expected = match op {
                    Op::In => Some(Segment::writable(data, LEN)),
                    Op::Out => Some(Segment::readable(data, LEN)),
                    Op::Flush => None,
                };
                assert_eq!(segments.len(), 2 + usize::from(expected.is_some()));
                let (header, status) = (segments[0], segments[segments.len() - 1]);
                assert_eq!((header.len, header.writable), (16, false));
                assert_eq!((status.len, status.writable), (1, true));
                assert!(expected.is_none_or(|data| segments[1] == data));
                let mut bytes = [0; 16];
                memory.read(header.addr, &mut bytes).expect("mapped");
                assert_eq!(u32::from(bytes[0]), op.kind().number());
                assert_eq!(u64::from(bytes[8]), 80 + round);
                assert_eq!(driver.status(3).expect("a slot"), Status::Unwritten);
                memory.write(status.addr, &[1]).expect("mapped");
                device.add_used(map, *head, 1).expect("memory is there");
                let mut done = Vec::new();
                driver.take(&mut done).expect("in flight");
                assert_eq!(done, [3]);
                assert_eq!(driver.status(3).expect("a slot"), Status::IoErr);
                assert_eq!(driver.in_flight(), 0);
            }
        }
    }

    #[test]
    fn notifications_are_as_the_device_sees_them() {
        for event_idx in [false, true] {
            let memory = memory();
            let slots = Slots::new(&memory, 4, 512, true).expect("room");
            let mut ring = Ring::new(&memory, 4, event_idx).expect("a ring");
            let mut device = device_side(&ring);
            let mut driver = Driver::new(&mut ring, &slots).expect("room");
            let map = memory.map().as_ref();
            let mut done = Vec::new();
            for (round, wanted) in (0..12).zip([true, false, true].into_iter().cycle()) {
                if wanted {
                    assert!(!driver.enable_notifications().expect("mapped"));
                } else {
                    driver.disable_notifications().expect("mapped");
                }
                driver.add(round % 4, Op::In, 0).expect("free");
                driver.publish().expect("mapped");
                let (head, _) = fetch(&mut device, &memory)[0];
                device.add_used(map, head, 1).expect("mapped");
                let due = device.needs_notification(map).expect("mapped");
                // rust-vmm's device looks at event indices only.
                assert!(!event_idx || due == wanted, "round {round}");
                assert!(driver.enable_notifications().expect("mapped"));
                driver.take(&mut done).expect("in flight");
            }
            assert_eq!(done, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);
        }
    }

    #[test]
    fn wrong_used_entries_are_errors() {
        for (indirect, wrong) in [
            (true, 1),
            (true, 9),
            (false, 1),
            (false, 3),
            (false, 1 << 20),
        ] {
            let memory = memory();
            let slots = Slots::new(&memory, 2, 512, indirect).expect("room");
            let mut ring = Ring::new(&memory, 8, false).expect("a ring");
            let used = ring.used_ring().addr();
            let mut driver = Driver::new(&mut ring, &slots).expect("room");
            driver.add(0, Op::In, 0).expect("free");
            driver.publish().expect("mapped");
            let entry = u32::to_le_bytes(wrong);
            memory
                .write(GuestAddress(used.0 + 4), &entry)
                .expect("mapped");
            memory
                .write(GuestAddress(used.0 + 2), &[1, 0])
                .expect("mapped");
            assert!(matches!(
                driver.take(&mut Vec::new()),
                Err(Error::UnexpectedUsed { id }) if id == wrong
            ));
        }
    }

    /// With nothing behind the ring, over the end of the indices.
    #[test]
    fn answers_are_completions() {
        for (indirect, event_idx) in [(false, false), (true, true)] {
            let memory = memory();
            let slots = Slots::new(&memory, 5, 512, indirect).expect("room");
            let mut ring = Ring::new(&memory, 16, event_idx).expect("a ring");
            ring.reset(65530).expect("mapped");
            ring.set_call_event(EventFd::new(EFD_CLOEXEC).expect("eventfd"));
            ring.call_event().write(100).expect("eventfd");
            let mut driver = Driver::new(&mut ring, &slots).expect("room");
            driver.wait_call().expect("it was written to");
            // As a device that starts at this index.
            driver.answer(5).expect("mapped");
            let mut done = Vec::new();
            for round in 0..10 {
                for slot in 0..5 {
                    driver.add(slot, Op::Out, round).expect("free");
                }
                assert!(driver.publish().expect("mapped"), "a kick is due");
                driver.answer(3).expect("mapped");
                driver.take(&mut done).expect("in flight");
                assert_eq!(done, [0, 1, 2]);
                driver.answer(3).expect("mapped");
                driver.take(&mut done).expect("in flight");
                assert_eq!(done, [0, 1, 2, 3, 4]);
                for slot in done.drain(..) {
                    assert_eq!(driver.status(slot).expect("a slot"), Status::Ok);
                }
            }
        }
    }
}
