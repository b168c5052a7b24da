// SPDX-License-Identifier: GPL-2.0

//! The driver's side of a split virtqueue.
//!
//! [`Ring`] keeps the books of a good driver (free descriptors, chains in
//! flight, both indices), and has methods that write anything else to the
//! ring's memory, as a hostile or broken driver would.

use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_kern::vhost_binding::vhost_vring_addr;
use vhost::vhost_user::Frontend;
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{AtomicAccess, Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Device, VringAddresses};
use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory, PAGE_SIZE};

pub use virtio_queue::desc::split::Descriptor;

/// Descriptor flag: another descriptor follows.
#[expect(clippy::cast_possible_truncation, reason = "flags have 16 bits")]
pub const DESC_F_NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// Descriptor flag: the device writes to the buffer.
#[expect(clippy::cast_possible_truncation, reason = "flags have 16 bits")]
pub const DESC_F_WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// Descriptor flag: the buffer is a table of descriptors.
#[expect(clippy::cast_possible_truncation, reason = "flags have 16 bits")]
pub const DESC_F_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
#[expect(clippy::cast_possible_truncation, reason = "flags have 16 bits")]
pub(crate) const AVAIL_F_NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
#[expect(clippy::cast_possible_truncation, reason = "flags have 16 bits")]
pub(crate) const USED_F_NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Size of a descriptor, bytes.
pub const DESCRIPTOR_BYTES: usize = 16;
/// Size of an entry of the used ring, bytes.
pub(crate) const USED_ELEM_BYTES: usize = 8;
/// Largest ring that can be made here, descriptors.
pub const MAX_SIZE: u16 = 32768;

/// A piece of guest memory that a chain hands to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte.
    pub addr: GuestAddress,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes to it, instead of reading it.
    pub writable: bool,
}

impl Segment {
    /// A piece that the device reads.
    pub fn readable(addr: GuestAddress, len: u32) -> Self {
        Segment {
            addr,
            len,
            writable: false,
        }
    }

    /// A piece that the device writes to.
    pub fn writable(addr: GuestAddress, len: u32) -> Self {
        Segment {
            addr,
            len,
            writable: true,
        }
    }

    fn descriptor(&self, next: Option<u16>) -> Descriptor {
        let write = if self.writable { DESC_F_WRITE } else { 0 };
        let more = if next.is_some() { DESC_F_NEXT } else { 0 };
        Descriptor::new(self.addr.0, self.len, write | more, next.unwrap_or(0))
    }
}

/// Which descriptors of a chain stand in an indirect table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Table {
    /// None: all stand in the ring's own table.
    #[default]
    Direct,
    /// All.
    Indirect,
    /// All but this many first ones.
    After(usize),
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// Bytes that the device says that it wrote.
    pub len: u32,
}

/// The guest memory of a ring's three parts.
#[derive(Debug)]
pub struct Parts {
    /// The descriptor table.
    pub desc: Buffer,
    /// The available ring.
    pub avail: Buffer,
    /// The used ring.
    pub used: Buffer,
}

impl Parts {
    /// Takes memory for a ring of `size` descriptors: a page or more for each part, so that a test
    /// can protect one of them.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]
    pub fn new(memory: &Memory, size: u16) -> Result<Self> {
        let part = |len: usize| memory.alloc(len.next_multiple_of(PAGE_SIZE), PAGE_SIZE);
        let [desc, avail, used] = Self::lengths(size, true);
        Ok(Parts {
            desc: part(desc)?,
            avail: part(avail)?,
            used: part(used)?,
        })
    }

    /// How long they are, in bytes. Without event indices the two rings need no room for them.
    pub fn lengths(size: u16, event_idx: bool) -> [usize; 3] {
        let entries = usize::from(size);
        let tail = if event_idx { 2 } else { 0 };
        [
            DESCRIPTOR_BYTES * entries,
            4 + 2 * entries + tail,
            4 + USED_ELEM_BYTES * entries + tail,
        ]
    }

    /// Where they are in this process, as those of ring `index` (`VHOST_SET_VRING_ADDR`).
    ///
    /// # Errors
    ///
    /// [`Error::Access`]
    pub fn user_addresses(&self, index: u32) -> Result<vhost_vring_addr> {
        let user = |part: &Buffer| part.memory().host_address(part.addr());
        Ok(vhost_vring_addr {
            index,
            flags: 0,
            desc_user_addr: user(&self.desc)?,
            used_user_addr: user(&self.used)?,
            avail_user_addr: user(&self.avail)?,
            log_guest_addr: 0,
        })
    }

    /// The three.
    pub fn all(&self) -> [&Buffer; 3] {
        [&self.desc, &self.avail, &self.used]
    }
}

/// What a chain in flight holds.
#[derive(Debug)]
struct Chain {
    descriptors: Vec<u16>,
    /// Freed with the chain.
    _indirect: Option<Buffer>,
}

/// A split virtqueue as its driver sees it, with its three eventfds.
#[derive(Debug)]
pub struct Ring {
    memory: Memory,
    size: u16,
    event_idx: bool,
    parts: Parts,
    /// The used index in memory and the one that it stands for, after a move until the device
    /// writes it.
    moved: Option<(u16, u16)>,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    /// Watches `call`, then `err`.
    // Made when first waited with: whoever signals pays for each that watches.
    call_poll: OnceLock<Epoll>,
    err_poll: OnceLock<Epoll>,
    /// Free descriptors; the next one to take is the last.
    free: Vec<u16>,
    /// By head: the chains in flight.
    chains: Vec<Option<Chain>>,
    in_flight: usize,
    /// The available index, entries not yet published included.
    next_avail: u16,
    /// The available index in memory.
    published: u16,
    /// The used index up to which entries were taken.
    last_used: u16,
}

impl Ring {
    /// Makes a ring of `size` descriptors in `memory`, empty, at index 0.
    ///
    /// `event_idx` says whether `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if `size` is not a power of two up to [`MAX_SIZE`];
    /// [`Error::OutOfMemory`]; [`Error::System`], if an eventfd cannot be had.
    pub fn new(memory: &Memory, size: u16, event_idx: bool) -> Result<Self> {
        Self::with_parts(memory, size, event_idx, Parts::new(memory, size)?)
    }

    /// As [`new`](Self::new), with its parts where the caller wants them. Indirect tables, and the
    /// requests of a [`Queue`](crate::Queue), are in `memory`.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new); [`Error::Invalid`], if a part is too short.
    pub fn with_parts(memory: &Memory, size: u16, event_idx: bool, parts: Parts) -> Result<Self> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(Error::Invalid(format!("ring of {size} descriptors")));
        }
        check_lengths(&parts, size, event_idx)?;
        let entries = usize::from(size);
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::system("eventfd"));
        let (call, err) = (event()?, event()?);
        let mut ring = Ring {
            memory: memory.clone(),
            size,
            event_idx,
            parts,
            moved: None,
            kick: event()?,
            call_poll: OnceLock::new(),
            err_poll: OnceLock::new(),
            call,
            err,
            free: Vec::with_capacity(entries),
            chains: Vec::new(),
            in_flight: 0,
            next_avail: 0,
            published: 0,
            last_used: 0,
        };
        ring.reset(0)?;
        Ok(ring)
    }

    /// Makes the ring empty, with both indices at `base`: an index other than 0
    /// brings their wrap-around near. The device has to be stopped.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if its memory was taken away.
    pub fn reset(&mut self, base: u16) -> Result<()> {
        for part in self.parts.all() {
            part.fill(0)?;
        }
        self.free = (0..self.size).rev().collect();
        self.chains = (0..self.size).map(|_| None).collect();
        self.in_flight = 0;
        self.next_avail = base;
        self.published = base;
        self.last_used = base;
        self.moved = None;
        self.store_u16(self.parts.avail.at(2), base)?;
        self.store_u16(self.parts.used.at(2), base)?;
        // A fresh driver wants to hear of the first entry.
        if self.event_idx {
            self.set_used_event(base)?;
        }
        Ok(())
    }

    /// Tells the device about this ring, as number `index`, to go on at `base` of
    /// the available ring: `VHOST_SET_VRING_NUM`, `_BASE`, `_ADDR`, `_CALL`,
    /// `_ERR`, `_KICK`.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`], [`Error::Vhost`]
    pub fn set_up(&self, device: &Device, index: u32, base: u16) -> Result<()> {
        device.set_vring_num(index, u32::from(self.size))?;
        device.set_vring_base(index, u32::from(base))?;
        device.set_vring_addr(index, &self.addresses())?;
        device.set_vring_call(index, self.call.as_raw_fd())?;
        device.set_vring_err(index, self.err.as_raw_fd())?;
        device.set_vring_kick(index, self.kick.as_raw_fd())
    }

    /// The same for a vhost-user server, whose messages have the same names, up
    /// to `VHOST_USER_SET_VRING_ENABLE`.
    ///
    /// # Errors
    ///
    /// [`Error::VhostUser`]
    pub(crate) fn set_up_user(&self, server: &Frontend, index: usize, base: u16) -> Result<()> {
        let said = |name, result: vhost::Result<()>| {
            result.map_err(|source| Error::VhostUser { name, source })
        };
        // A server looks for the ring at this process's addresses.
        let user = self.parts.user_addresses(0)?;
        let addresses = VringAddresses {
            desc_table_addr: user.desc_user_addr,
            used_ring_addr: user.used_user_addr,
            avail_ring_addr: user.avail_user_addr,
            ..self.addresses()
        };
        said("SET_VRING_NUM", server.set_vring_num(index, self.size))?;
        said("SET_VRING_BASE", server.set_vring_base(index, base))?;
        said("SET_VRING_ADDR", server.set_vring_addr(index, &addresses))?;
        said("SET_VRING_CALL", server.set_vring_call(index, &self.call))?;
        said("SET_VRING_ERR", server.set_vring_err(index, &self.err))?;
        said("SET_VRING_KICK", server.set_vring_kick(index, &self.kick))
    }

    /// Takes another eventfd to be told of used entries by, one that blocks who
    /// reads it for instance. It has to be before the ring is set up.
    ///
    /// [`wait_call`](Self::wait_call), [`wait_used`](Self::wait_used) and what
    /// stands on them need one that does not block.
    pub fn set_call_event(&mut self, call: EventFd) {
        self.call_poll = OnceLock::new();
        self.call = call;
    }

    /// Moves the ring to other memory while the device runs and chains are in flight: copies it,
    /// tells the device of ring `index` (`VHOST_SET_VRING_ADDR`), and goes on there. Returns the old
    /// parts, which the device does not touch any more.
    ///
    /// What the device wrote to the old used ring meanwhile is taken over. It may have missed that
    /// the copy of its wish to be kicked is old: kick it afterwards.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if a part is too short; [`Error::Ioctl`], [`Error::Access`]: then the ring
    /// is where it was.
    pub fn move_to(&mut self, device: &Device, index: u32, parts: Parts) -> Result<Parts> {
        check_lengths(&parts, self.size, self.event_idx)?;
        let from = self.used_idx()?;
        for (old, new) in self.parts.all().into_iter().zip(parts.all()) {
            new.write(0, &old.read(0, old.len().min(new.len()))?)?;
        }
        parts.used.write(2, &from.to_le_bytes())?;
        let memory = parts.desc.memory().clone();
        device.set_vring_user_addr(&parts.user_addresses(index)?)?;

        // What came between the copy and the move.
        let to = self.used_idx()?;
        let old = std::mem::replace(&mut self.parts, parts);
        let mut at = from;
        while at != to {
            let offset = 4 + USED_ELEM_BYTES * usize::from(at & (self.size - 1));
            let entry = old.used.read(offset, USED_ELEM_BYTES)?;
            self.parts.used.write(offset, &entry)?;
            at = at.wrapping_add(1);
        }
        self.moved = Some((from, to));
        self.memory = memory;
        Ok(old)
    }

    /// Where its three parts are.
    pub fn addresses(&self) -> VringAddresses {
        VringAddresses {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: self.parts.desc.addr().0,
            used_ring_addr: self.parts.used.addr().0,
            avail_ring_addr: self.parts.avail.addr().0,
            log_addr: None,
        }
    }

    /// Its three parts.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// Its size, descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Whether it uses event indices.
    pub fn event_idx(&self) -> bool {
        self.event_idx
    }

    /// The memory that it is in.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where it is in this process: see [`Parts::user_addresses`].
    ///
    /// # Errors
    ///
    /// [`Error::Access`]
    pub fn user_addresses(&self, index: u32) -> Result<vhost_vring_addr> {
        self.parts.user_addresses(index)
    }

    /// The descriptor table.
    pub fn descriptor_table(&self) -> &Buffer {
        &self.parts.desc
    }

    /// The available ring.
    pub fn avail_ring(&self) -> &Buffer {
        &self.parts.avail
    }

    /// The used ring.
    pub fn used_ring(&self) -> &Buffer {
        &self.parts.used
    }

    /// The eventfd by which the driver kicks.
    pub fn kick_event(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd that tells of used entries.
    pub fn call_event(&self) -> &EventFd {
        &self.call
    }

    /// The eventfd that tells that the ring is broken.
    pub fn err_event(&self) -> &EventFd {
        &self.err
    }

    /// Free descriptors.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Chains that were added and not yet used.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The available index, with chains that were added but not published.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The used index up to which entries were taken.
    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    // Adding chains.

    /// Adds a chain of these segments to the available ring, not yet published,
    /// and returns its head.
    ///
    /// # Errors
    ///
    /// [`Error::RingFull`]; [`Error::OutOfMemory`], for an indirect table;
    /// [`Error::Invalid`], for an empty chain or table, or one that is too long
    /// for its descriptors to be numbered.
    pub fn add(&mut self, segments: &[Segment], table: Table) -> Result<u16> {
        let direct = match table {
            Table::Direct => segments.len(),
            Table::Indirect => 0,
            Table::After(count) => count.min(segments.len()),
        };
        let (direct, indirect) = segments.split_at(direct);
        if segments.is_empty() || (indirect.is_empty() && table != Table::Direct) {
            return Err(Error::Invalid("chain without descriptors".into()));
        }
        let needed = direct.len() + usize::from(!indirect.is_empty());
        let descriptors = self.take(needed)?;
        let indirect_table = match self.write_chain(&descriptors, direct, indirect) {
            Ok(table) => table,
            Err(e) => {
                self.free.extend(descriptors.iter().rev());
                return Err(e);
            }
        };
        let head = descriptors[0];
        self.push(Chain {
            descriptors,
            _indirect: indirect_table,
        })?;
        Ok(head)
    }

    fn write_chain(
        &self,
        descriptors: &[u16],
        direct: &[Segment],
        indirect: &[Segment],
    ) -> Result<Option<Buffer>> {
        let table = if indirect.is_empty() {
            None
        } else {
            Some(self.indirect_table(indirect)?)
        };
        for (place, &index) in descriptors.iter().enumerate() {
            let next = descriptors.get(place + 1).copied();
            let descriptor = match (direct.get(place), &table) {
                (Some(segment), _) => segment.descriptor(next),
                (None, Some(table)) => {
                    Descriptor::new(table.addr().0, table_len(indirect)?, DESC_F_INDIRECT, 0)
                }
                (None, None) => unreachable!("more descriptors than segments"),
            };
            self.write_descriptor(index, descriptor)?;
        }
        Ok(table)
    }

    /// Makes an indirect table of these segments.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`]; [`Error::Invalid`], if it is too long for its
    /// descriptors to be numbered.
    pub fn indirect_table(&self, segments: &[Segment]) -> Result<Buffer> {
        let count = u16::try_from(segments.len())
            .map_err(|_| Error::Invalid(format!("indirect table of {} entries", segments.len())))?;
        let table = self
            .memory
            .alloc(DESCRIPTOR_BYTES * segments.len(), DESCRIPTOR_BYTES)?;
        for (index, segment) in (0..count).zip(segments) {
            let next = (index + 1 < count).then_some(index + 1);
            self.write_table_entry(&table, index, segment.descriptor(next))?;
        }
        Ok(table)
    }

    /// Takes `count` descriptors out of the free ones, for a chain that the
    /// caller writes with [`write_descriptor`](Self::write_descriptor) and adds
    /// with [`add_written`](Self::add_written).
    ///
    /// # Errors
    ///
    /// [`Error::RingFull`]
    pub fn take(&mut self, count: usize) -> Result<Vec<u16>> {
        let free = self.free.len();
        if count > free {
            return Err(Error::RingFull {
                needed: count,
                free,
            });
        }
        let mut taken = self.free.split_off(free - count);
        taken.reverse();
        Ok(taken)
    }

    /// Adds a chain that the caller has written to the available ring, not yet
    /// published. Its head is the first of `descriptors`; all of them are free
    /// again when the device has used the chain.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if there is no descriptor or the head is in flight.
    pub fn add_written(&mut self, descriptors: Vec<u16>) -> Result<u16> {
        match descriptors.first() {
            Some(&head)
                if self
                    .chains
                    .get(usize::from(head))
                    .is_some_and(Option::is_none) =>
            {
                self.push(Chain {
                    descriptors,
                    _indirect: None,
                })?;
                Ok(head)
            }
            _ => Err(Error::Invalid("chain without a free head".into())),
        }
    }

    fn push(&mut self, chain: Chain) -> Result<()> {
        let head = chain.descriptors[0];
        self.chains[usize::from(head)] = Some(chain);
        self.in_flight += 1;
        self.push_avail(head)
    }

    /// Puts any number into the next entry of the available ring, not yet
    /// published, past all books: a head that is in flight, or beyond the table.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn push_avail(&mut self, head: u16) -> Result<()> {
        self.write_avail_entry(self.next_avail, head)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Makes all chains that were added visible to the device, and returns
    /// whether the device wants to be kicked for them.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn publish(&mut self) -> Result<bool> {
        let old = self.published;
        self.set_avail_idx(self.next_avail)?;
        // The index has to be visible before the device's wish is read: the
        // device does the same the other way round.
        fence(Ordering::SeqCst);
        if self.event_idx {
            Ok(need_event(self.avail_event()?, self.published, old))
        } else {
            let flags = self.load_u16(self.parts.used.at(0))?;
            Ok(self.published != old && flags & USED_F_NO_NOTIFY == 0)
        }
    }

    /// For how many more chains the device wants to be kicked: `None` if it wants no kick, or without
    /// `VIRTIO_RING_F_EVENT_IDX`.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn wanted(&self) -> Result<Option<u16>> {
        if !self.event_idx {
            return Ok(None);
        }
        let ahead = self.avail_event()?.wrapping_sub(self.published);
        Ok((ahead < self.size).then_some(ahead + 1))
    }

    /// The index after which the device wants to be kicked.
    fn avail_event(&self) -> Result<u16> {
        self.load_u16(self.parts.used.at(4 + 8 * usize::from(self.size)))
    }

    /// Kicks the device.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn kick(&self) -> Result<()> {
        self.kick.write(1).map_err(Error::system("kick eventfd"))
    }

    /// Publishes, and kicks if the device wants that.
    ///
    /// # Errors
    ///
    /// Those of [`publish`](Self::publish) and [`kick`](Self::kick).
    pub fn publish_and_kick(&mut self) -> Result<()> {
        if self.publish()? {
            self.kick()?;
        }
        Ok(())
    }

    // Taking used entries.

    /// The used index in memory, or what it was where the ring was moved from, if that is more.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn used_idx(&self) -> Result<u16> {
        let index = self.load_u16(self.parts.used.at(2))?;
        Ok(match self.moved {
            Some((from, to)) if index == from => to,
            _ => index,
        })
    }

    /// Takes the next used entry, if there is one; the descriptors of its chain
    /// are free again.
    ///
    /// # Errors
    ///
    /// [`Error::UnexpectedUsed`], for a chain that is not in flight; the entry
    /// is taken all the same.
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        let index = self.used_idx()?;
        if index == self.last_used {
            return Ok(None);
        }
        if self.moved.is_some_and(|(_, to)| index != to) {
            // The device has written it.
            self.moved = None;
        }
        let slot = self.last_used & (self.size - 1);
        let addr = self.parts.used.at(4 + 8 * usize::from(slot));
        let mut entry = [0; USED_ELEM_BYTES];
        self.memory.read(addr, &mut entry)?;
        let [id, len] = [0, 4]
            .map(|at| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]));
        self.last_used = self.last_used.wrapping_add(1);
        let chain = u16::try_from(id)
            .ok()
            .and_then(|head| Some((head, self.chains.get_mut(usize::from(head))?.take()?)));
        let Some((head, chain)) = chain else {
            return Err(Error::UnexpectedUsed { id });
        };
        self.in_flight -= 1;
        self.free.extend(chain.descriptors.iter().rev());
        Ok(Some(Used { head, len }))
    }

    /// Waits until there is a used entry, and takes it. It sleeps until the
    /// device calls: an entry without a notification that was asked for is an
    /// error.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`], [`Error::LostNotification`], those of
    /// [`pop_used`](Self::pop_used).
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.pop_used()? {
                return Ok(used);
            }
            self.enable_notifications()?;
            // One that came before the device could see the wish.
            if let Some(used) = self.pop_used()? {
                return Ok(used);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait_call(left)? {
                let to = self.used_idx()?;
                return Err(if to == self.last_used {
                    Error::Timeout {
                        what: "used entry",
                        timeout,
                    }
                } else {
                    Error::LostNotification {
                        from: self.last_used,
                        to,
                    }
                });
            }
        }
    }

    /// Waits for a notification, takes it, and returns whether one came.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn wait_call(&self, timeout: Duration) -> Result<bool> {
        wait(&self.call, &self.call_poll, timeout)
    }

    /// Waits until the device says that the ring is broken, and returns whether
    /// it did.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn wait_err(&self, timeout: Duration) -> Result<bool> {
        wait(&self.err, &self.err_poll, timeout)
    }

    /// Asks for a notification at the next used entry.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn enable_notifications(&self) -> Result<()> {
        if self.event_idx {
            self.set_used_event(self.last_used)?;
        } else {
            self.set_avail_flags(0)?;
        }
        // The wish has to be visible before the used index is read again.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Asks for no notifications.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn disable_notifications(&self) -> Result<()> {
        if self.event_idx {
            // The index that comes last.
            self.set_used_event(self.last_used.wrapping_sub(1))
        } else {
            self.set_avail_flags(AVAIL_F_NO_INTERRUPT)
        }
    }

    // Writing anything.

    /// Writes a descriptor of the ring's table.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if the table has none at `index`.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) -> Result<()> {
        if index >= self.size {
            return Err(Error::Invalid(format!("descriptor {index}")));
        }
        self.write_table_entry(&self.parts.desc, index, descriptor)
    }

    /// Reads a descriptor of the ring's table.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if the table has none at `index`.
    pub fn read_descriptor(&self, index: u16) -> Result<Descriptor> {
        if index >= self.size {
            return Err(Error::Invalid(format!("descriptor {index}")));
        }
        let addr = self.parts.desc.at(DESCRIPTOR_BYTES * usize::from(index));
        self.memory
            .map()
            .read_obj(addr)
            .map_err(Error::access(addr, DESCRIPTOR_BYTES))
    }

    /// Writes a descriptor of any table.
    ///
    /// # Errors
    ///
    /// [`Error::Access`]
    pub fn write_table_entry(
        &self,
        table: &Buffer,
        index: u16,
        descriptor: Descriptor,
    ) -> Result<()> {
        let addr = table.at(DESCRIPTOR_BYTES * usize::from(index));
        self.memory
            .map()
            .write_obj(descriptor, addr)
            .map_err(Error::access(addr, DESCRIPTOR_BYTES))
    }

    /// Writes the entry of the available ring for the index `index`, which wraps
    /// around the ring's size.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn write_avail_entry(&self, index: u16, head: u16) -> Result<()> {
        let slot = usize::from(index & (self.size - 1));
        self.store_u16(self.parts.avail.at(4 + 2 * slot), head)
    }

    /// Writes the available index, whatever was added.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn set_avail_idx(&mut self, index: u16) -> Result<()> {
        self.published = index;
        self.store_u16(self.parts.avail.at(2), index)
    }

    /// Writes the flags of the available ring.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn set_avail_flags(&self, flags: u16) -> Result<()> {
        self.store_u16(self.parts.avail.at(0), flags)
    }

    /// Writes `used_event`: the used index at whose entry the driver wants to be
    /// notified.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if the ring's memory was taken away.
    pub fn set_used_event(&self, index: u16) -> Result<()> {
        self.store_u16(self.parts.avail.at(4 + 2 * usize::from(self.size)), index)
    }

    /// Forgets all chains in flight, as a driver does that resets its device;
    /// the indices stay. The device has to be stopped.
    pub fn abandon(&mut self) {
        self.free = (0..self.size).rev().collect();
        self.chains.fill_with(|| None);
        self.in_flight = 0;
    }

    fn store_u16(&self, addr: GuestAddress, value: u16) -> Result<()> {
        self.store(addr, value.to_le())
    }

    fn load_u16(&self, addr: GuestAddress) -> Result<u16> {
        self.memory
            .map()
            .load::<u16>(addr, Ordering::Acquire)
            .map(u16::from_le)
            .map_err(Error::access(addr, 2))
    }

    fn store<T: AtomicAccess>(&self, addr: GuestAddress, value: T) -> Result<()> {
        self.memory
            .map()
            .store(value, addr, Ordering::Release)
            .map_err(Error::access(addr, size_of::<T>()))
    }
}

fn check_lengths(parts: &Parts, size: u16, event_idx: bool) -> Result<()> {
    for (part, needed) in parts.all().into_iter().zip(Parts::lengths(size, event_idx)) {
        if part.len() < needed {
            return Err(Error::Invalid(format!(
                "{} bytes for a part of a ring that needs {needed}",
                part.len()
            )));
        }
    }
    Ok(())
}

/// Whether an index that went from `old` to `new` passed `event`, and a
/// notification is due (virtio 1.3, 2.7.10).
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

fn table_len(segments: &[Segment]) -> Result<u32> {
    u32::try_from(DESCRIPTOR_BYTES * segments.len())
        .map_err(|_| Error::Invalid(format!("indirect table of {} entries", segments.len())))
}

fn watch(event: &EventFd) -> Result<Epoll> {
    let epoll = Epoll::new().map_err(Error::system("epoll"))?;
    epoll
        .ctl(
            ControlOperation::Add,
            event.as_raw_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )
        .map_err(Error::system("epoll of an eventfd"))?;
    Ok(epoll)
}

fn wait(event: &EventFd, epoll: &OnceLock<Epoll>, timeout: Duration) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        match event.read() {
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(Error::system("eventfd")(e)),
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let epoll = match epoll.get() {
            Some(epoll) => epoll,
            None => {
                let new = watch(event)?;
                epoll.get_or_init(|| new)
            }
        };
        // Whole milliseconds, rounded up: a wait of 0 would spin.
        let millis = i32::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
        match epoll.wait(millis, &mut [EpollEvent::default()]) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::system("epoll_wait")(e)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    const TICK: Duration = Duration::from_millis(1);

    /// A device's side of `ring`, by rust-vmm's own code.
    pub(crate) fn device_side(ring: &Ring) -> Queue {
        let mut queue = Queue::new(1024).expect("a queue");
        let at = ring.addresses();
        queue.set_size(ring.size());
        queue
            .try_set_desc_table_address(GuestAddress(at.desc_table_addr))
            .expect("aligned");
        queue
            .try_set_avail_ring_address(GuestAddress(at.avail_ring_addr))
            .expect("aligned");
        queue
            .try_set_used_ring_address(GuestAddress(at.used_ring_addr))
            .expect("aligned");
        queue.set_event_idx(ring.event_idx());
        queue.set_ready(true);
        assert!(queue.is_valid(ring.memory().map().as_ref()));
        queue
    }

    /// Takes all chains as the device does: heads and segments.
    pub(crate) fn fetch(queue: &mut Queue, memory: &Memory) -> Vec<(u16, Vec<Segment>)> {
        queue
            .iter(memory.map().as_ref())
            .expect("a valid ring")
            .map(|chain| {
                let head = chain.head_index();
                let segments = chain
                    .map(|d| Segment {
                        addr: d.addr(),
                        len: d.len(),
                        writable: d.is_write_only(),
                    })
                    .collect();
                (head, segments)
            })
            .collect()
    }

    fn segments(count: u32) -> Vec<Segment> {
        (0..count)
            .map(|n| Segment {
                addr: GuestAddress(0x10_0000 + u64::from(n) * 4096),
                len: 512 + n,
                writable: n > count / 2,
            })
            .collect()
    }

    #[test]
    fn sizes_are_powers_of_two() {
        let memory = Memory::new(2 << 20).expect("2 MiB");
        for size in [0, 3, 1000, 65535] {
            assert!(Ring::new(&memory, size, false).is_err(), "{size}");
        }
        for size in [1, 2, 256, 1024, MAX_SIZE] {
            let ring = Ring::new(&memory, size, false).expect("a power of two");
            assert_eq!(ring.free_descriptors(), usize::from(size));
        }
    }

    #[test]
    fn device_sees_the_chains_that_were_added() {
        for event_idx in [false, true] {
            let memory = Memory::new(2 << 20).expect("2 MiB");
            let mut ring = Ring::new(&memory, 16, event_idx).expect("a ring");
            let mut device = device_side(&ring);
            let chain = segments(5);
            let heads = [
                ring.add(&chain, Table::Direct).expect("room"),
                ring.add(&chain, Table::Indirect).expect("room"),
                ring.add(&chain, Table::After(2)).expect("room"),
            ];
            assert_eq!(ring.free_descriptors(), 16 - 5 - 1 - 3);
            assert!(fetch(&mut device, &memory).is_empty());
            assert!(ring.publish().expect("memory is there"));
            let seen = fetch(&mut device, &memory);
            assert_eq!(seen.len(), 3);
            for ((head, seen), expected) in seen.iter().zip(heads) {
                assert_eq!(*head, expected);
                assert_eq!(*seen, chain);
            }
        }
    }

    #[test]
    fn used_entries_come_in_order_and_free_their_chains() {
        let memory = Memory::new(2 << 20).expect("2 MiB");
        let mut ring = Ring::new(&memory, 8, false).expect("a ring");
        let mut device = device_side(&ring);
        let a = ring.add(&segments(3), Table::Direct).expect("room");
        let b = ring.add(&segments(4), Table::Direct).expect("room");
        assert!(matches!(
            ring.add(&segments(2), Table::Direct),
            Err(Error::RingFull { needed: 2, free: 1 })
        ));
        ring.publish().expect("memory is there");
        assert_eq!(ring.pop_used().expect("memory is there"), None);
        for (head, len) in [(b, 7), (a, 9)] {
            device
                .add_used(memory.map().as_ref(), head, len)
                .expect("memory is there");
        }
        assert_eq!(
            ring.pop_used().expect("in flight"),
            Some(Used { head: b, len: 7 })
        );
        assert_eq!(ring.free_descriptors(), 5);
        assert_eq!(ring.in_flight(), 1);
        assert_eq!(
            ring.pop_used().expect("in flight"),
            Some(Used { head: a, len: 9 })
        );
        assert_eq!(ring.free_descriptors(), 8);
        // Again, and beyond the table.
        for id in [a, 8] {
            let addr = ring.parts.used.at(4 + 8 * usize::from(ring.last_used & 7));
            memory
                .write(addr, &u64::from(id).to_le_bytes())
                .expect("memory is there");
            ring.store_u16(ring.parts.used.at(2), ring.last_used + 1)
                .expect("memory is there");
            assert!(matches!(
                ring.pop_used(),
                Err(Error::UnexpectedUsed { id: seen }) if seen == u32::from(id)
            ));
        }
    }

    #[test]
    fn indices_wrap_around() {
        let memory = Memory::new(2 << 20).expect("2 MiB");
        let mut ring = Ring::new(&memory, 4, true).expect("a ring");
        ring.reset(65534).expect("memory is there");
        let mut device = device_side(&ring);
        device.set_next_avail(65534);
        device.set_next_used(65534);
        for round in 0..6 {
            let head = ring.add(&segments(2), Table::Direct).expect("room");
            ring.publish().expect("memory is there");
            let seen = fetch(&mut device, &memory);
            assert_eq!(seen.len(), 1, "round {round}");
            assert_eq!(seen[0].0, head);
            device
                .add_used(memory.map().as_ref(), head, round)
                .expect("memory is there");
            let used = ring.pop_used().expect("in flight").expect("one is there");
            assert_eq!(used, Used { head, len: round });
        }
        assert_eq!(ring.last_used(), 4);
    }

    #[test]
    fn waiting_ends() {
        let memory = Memory::new(2 << 20).expect("2 MiB");
        let mut ring = Ring::new(&memory, 4, false).expect("a ring");
        let mut device = device_side(&ring);
        let head = ring.add(&segments(1), Table::Direct).expect("room");
        ring.publish().expect("memory is there");
        assert!(matches!(ring.wait_used(TICK), Err(Error::Timeout { .. })));
        let used = |device: &mut Queue| {
            device
                .add_used(memory.map().as_ref(), head, 1)
                .expect("memory is there");
        };
        used(&mut device);
        ring.call_event().write(1).expect("eventfd");
        assert_eq!(ring.wait_used(TICK).expect("used"), Used { head, len: 1 });
        assert!(ring.wait_call(TICK).expect("eventfd"));
        assert!(!ring.wait_call(TICK).expect("eventfd"));
        assert!(!ring.wait_err(TICK).expect("eventfd"));
        ring.err_event().write(1).expect("eventfd");
        assert!(ring.wait_err(TICK).expect("eventfd"));
    }

    #[test]
    fn events_are_due_when_passed() {
        assert!(need_event(0, 1, 0));
        assert!(!need_event(1, 1, 0));
        assert!(need_event(65535, 1, 65534));
        assert!(!need_event(5, 5, 2));
        assert!(need_event(4, 5, 2));
        assert!(!need_event(1, 5, 2));
        assert!(!need_event(7, 7, 7));
    }

    #[test]
    fn anything_can_be_written() {
        let memory = Memory::new(2 << 20).expect("2 MiB");
        let mut ring = Ring::new(&memory, 4, false).expect("a ring");
        let taken = ring.take(2).expect("room");
        let looped = Descriptor::new(1, 2, DESC_F_NEXT, taken[0]);
        ring.write_descriptor(taken[1], looped)
            .expect("in the table");
        let back = ring.read_descriptor(taken[1]).expect("in the table");
        assert_eq!((back.addr(), back.next()), (GuestAddress(1), taken[0]));
        assert!(ring.write_descriptor(4, looped).is_err());
        let head = ring.add_written(taken.clone()).expect("free head");
        assert!(ring.add_written(taken).is_err());
        ring.push_avail(head).expect("memory is there");
        ring.push_avail(999).expect("memory is there");
        assert_eq!(ring.next_avail(), 3);
        assert_eq!(ring.in_flight(), 1);
        ring.abandon();
        assert_eq!((ring.in_flight(), ring.free_descriptors()), (0, 4));
    }
}
