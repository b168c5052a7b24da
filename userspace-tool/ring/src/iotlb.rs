// SPDX-License-Identifier: GPL-2.0

//! The device IOTLB: its messages, and a thread that answers what the device asks for.
//!
//! With `VIRTIO_F_ACCESS_PLATFORM` the addresses in rings and descriptors are I/O virtual ones. Here they
//! are those of [`Memory`]: what a [`Guest`](crate::Guest) gives the device as its memory table leads
//! elsewhere, so that nothing works without translations.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory, PAGE_SIZE};

/// Length of a message, bytes: `struct vhost_msg` and `struct vhost_msg_v2`.
pub const MESSAGE_LEN: usize = 72;
/// What is translated as a whole, at most.
const LARGE_PAGE: u64 = 16 * PAGE_SIZE as u64;
/// Misses to be answered before a translation is taken away, while the device asks for more: what is taken from
/// a slow device before it could use it would be asked for, and taken away, for ever.
const ANSWERS: u64 = 8;
/// A device that asks for nothing for so long is taken to have what it needs.
const IDLE: Duration = Duration::from_millis(20);
/// Where `struct vhost_iotlb_msg` is in either.
const BODY: usize = 8;

/// How a message is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `struct vhost_msg`, `VHOST_IOTLB_MSG`.
    V1,
    /// `struct vhost_msg_v2`, `VHOST_IOTLB_MSG_V2`, which
    /// `VHOST_BACKEND_F_IOTLB_MSG_V2` switches on.
    #[default]
    V2,
}

impl Format {
    /// `type` of the message.
    pub fn number(self) -> u32 {
        match self {
            Format::V1 => 1,
            Format::V2 => 2,
        }
    }

    /// The bits of `VHOST_SET_BACKEND_FEATURES` for it.
    pub fn backend_features(self) -> u64 {
        match self {
            Format::V1 => 0,
            Format::V2 => 1 << 1,
        }
    }
}

/// What an access does; `VHOST_ACCESS_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access(u8);

impl Access {
    /// The device reads: `VHOST_ACCESS_RO`.
    pub const READ: Access = Access(1);
    /// The device writes: `VHOST_ACCESS_WO`.
    pub const WRITE: Access = Access(2);
    /// It does both: `VHOST_ACCESS_RW`.
    pub const BOTH: Access = Access(3);
}

/// What a message says: `VHOST_IOTLB_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The device misses a translation.
    Miss,
    /// User space gives one.
    Update,
    /// User space takes those of a range away.
    Invalidate,
    /// Any number.
    Other(u8),
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Kind::Miss => 1,
            Kind::Update => 2,
            Kind::Invalidate => 3,
            Kind::Other(number) => number,
        }
    }
}

impl From<u8> for Kind {
    fn from(number: u8) -> Self {
        match number {
            1 => Kind::Miss,
            2 => Kind::Update,
            3 => Kind::Invalidate,
            number => Kind::Other(number),
        }
    }
}

/// A message of the device IOTLB; `struct vhost_iotlb_msg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// What it says.
    pub kind: Kind,
    /// First address that it is about.
    pub iova: u64,
    /// Length of the range, bytes.
    pub size: u64,
    /// Where the range is in this process.
    pub uaddr: u64,
    /// What is to be done there, or what may be.
    pub access: Access,
}

impl Message {
    /// The `size` bytes from `iova` on are at `uaddr` of this process.
    pub fn update(iova: u64, size: u64, uaddr: u64, access: Access) -> Self {
        Message {
            kind: Kind::Update,
            iova,
            size,
            uaddr,
            access,
        }
    }

    /// The `size` bytes from `iova` on have no translation any more.
    pub fn invalidate(iova: u64, size: u64) -> Self {
        Message {
            kind: Kind::Invalidate,
            iova,
            size,
            uaddr: 0,
            access: Access(0),
        }
    }

    /// Its bytes.
    pub fn to_bytes(&self, format: Format) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        bytes[..4].copy_from_slice(&format.number().to_ne_bytes());
        for (index, number) in [self.iova, self.size, self.uaddr].into_iter().enumerate() {
            let at = BODY + 8 * index;
            bytes[at..at + 8].copy_from_slice(&number.to_ne_bytes());
        }
        bytes[BODY + 24] = self.access.0;
        bytes[BODY + 25] = self.kind.number();
        bytes
    }

    /// The message that `bytes` are, and its format.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if they are none.
    pub fn from_bytes(bytes: &[u8]) -> Result<(Self, Format)> {
        let invalid = || Error::Invalid(format!("IOTLB message of {} bytes", bytes.len()));
        let (head, body) = bytes.split_at_checked(BODY).ok_or_else(invalid)?;
        if body.len() != MESSAGE_LEN - BODY {
            return Err(invalid());
        }
        let format = match head {
            [1, 0, 0, 0, ..] => Format::V1,
            [2, 0, 0, 0, ..] => Format::V2,
            _ => return Err(Error::Invalid(format!("IOTLB message {head:?}"))),
        };
        let number = |at: usize| {
            body[at..at + 8]
                .iter()
                .rev()
                .fold(0, |n, &b| (n << 8) | u64::from(b))
        };
        let message = Message {
            kind: body[25].into(),
            iova: number(0),
            size: number(8),
            uaddr: number(16),
            access: Access(body[24]),
        };
        Ok((message, format))
    }
}

/// How a [`Guest`](crate::Guest) translates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Iotlb {
    /// What its messages look like.
    pub format: Format,
    /// How often, at most, a translation is taken away at random: after it the device has missed eight more, or none
    /// for 20 ms. By default not at all.
    pub invalidate_every: Option<Duration>,
    /// Nobody answers misses but the caller.
    pub manual: bool,
}

/// How many messages there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Misses that the device reported.
    pub misses: u64,
    /// Translations that were taken away at random.
    pub invalidations: u64,
}

/// What [`Translator`] and its thread share.
#[derive(Debug)]
struct Shared {
    file: File,
    memory: Memory,
    format: Format,
    policy: Mutex<Policy>,
    misses: AtomicU64,
    invalidations: AtomicU64,
    end: AtomicBool,
}

#[derive(Debug, Default)]
struct Policy {
    small_pages: bool,
    holes: Vec<Range<u64>>,
    read_only: Vec<Range<u64>>,
    error: Option<Error>,
}

/// Sends a message to a device: `write()`.
fn send(mut file: &File, bytes: &[u8]) -> Result<()> {
    match file.write(bytes) {
        Ok(MESSAGE_LEN) => Ok(()),
        Ok(len) => Err(Error::Invalid(format!(
            "{len} bytes of an IOTLB message taken"
        ))),
        Err(source) => Err(Error::System {
            what: "write of an IOTLB message",
            source,
        }),
    }
}

/// Takes a message from a device, if there is one: `read()`.
fn receive(mut file: &File) -> Result<Option<(Message, Format)>> {
    let mut bytes = [0; 2 * MESSAGE_LEN];
    match file.read(&mut bytes) {
        Ok(len) => Message::from_bytes(&bytes[..len]).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(source) => Err(Error::System {
            what: "read of an IOTLB message",
            source,
        }),
    }
}

impl Device {
    /// Sends a message for the device IOTLB. The kernel accesses this process where an update says:
    /// that is the caller's to choose well.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn send_iotlb(&self, message: &Message, format: Format) -> Result<()> {
        send(self.file(), &message.to_bytes(format))
    }

    /// As [`send_iotlb`](Self::send_iotlb), any bytes.
    ///
    /// # Errors
    ///
    /// [`Error::System`]; [`Error::Invalid`], if another length is taken than that of a message.
    pub fn send_iotlb_raw(&self, bytes: &[u8]) -> Result<()> {
        send(self.file(), bytes)
    }

    /// Takes a message of the device IOTLB, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::System`]; [`Error::Invalid`], if it is no message.
    pub fn receive_iotlb(&self) -> Result<Option<(Message, Format)>> {
        receive(self.file())
    }
}

impl Shared {
    fn policy(&self) -> MutexGuard<'_, Policy> {
        // It is consistent whenever the lock is let go.
        self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: &Message) -> Result<()> {
        send(&self.file, &message.to_bytes(self.format))
    }

    /// Gives the translation of the page of `iova`, unless it has none. As long as all is translated, three
    /// in four large pages are given as a whole.
    fn map(&self, policy: &Policy, iova: u64) -> Result<bool> {
        let page = iova - iova % PAGE_SIZE as u64;
        let large = iova - iova % LARGE_PAGE;
        if !policy.small_pages && large / LARGE_PAGE % 4 != 0 {
            let ends = [large, large + LARGE_PAGE - 1];
            if let [Ok(first), Ok(last)] = ends.map(|a| self.memory.host_address(GuestAddress(a))) {
                if last.wrapping_sub(first) == LARGE_PAGE - 1 {
                    self.send(&Message::update(large, LARGE_PAGE, first, Access::BOTH))?;
                    return Ok(true);
                }
            }
        }
        let is_in = |ranges: &[Range<u64>]| ranges.iter().any(|range| range.contains(&page));
        if is_in(&policy.holes) {
            return Ok(false);
        }
        let Ok(uaddr) = self.memory.host_address(GuestAddress(page)) else {
            return Ok(false);
        };
        let access = if is_in(&policy.read_only) {
            Access::READ
        } else {
            Access::BOTH
        };
        self.send(&Message::update(page, PAGE_SIZE as u64, uaddr, access))?;
        Ok(true)
    }

    fn run(&self, invalidate_every: Option<Duration>) -> Result<()> {
        let poll = Epoll::new().map_err(Error::system("epoll"))?;
        poll.ctl(
            ControlOperation::Add,
            self.file.as_raw_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )
        .map_err(Error::system("epoll of the device"))?;
        let mut known = Vec::new();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let (mut last_miss, mut last_invalidation) = (Instant::now(), Instant::now());
        let mut misses_then = 0;
        while !self.end.load(Ordering::Relaxed) {
            let pause = invalidate_every.map_or(20, |every| every.as_millis().clamp(1, 20));
            let pause = i32::try_from(pause).unwrap_or(20);
            let ready = match poll.wait(pause, &mut [EpollEvent::default()]) {
                Ok(ready) => ready,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
                Err(source) => return Err(Error::system("epoll")(source)),
            };
            let policy = self.policy();
            if ready > 0 {
                self.answer_all(&policy, &mut known)?;
                last_miss = Instant::now();
            }
            let is_due = invalidate_every.is_some_and(|every| last_invalidation.elapsed() >= every);
            let misses = self.misses.load(Ordering::Relaxed);
            if is_due && (misses - misses_then >= ANSWERS || last_miss.elapsed() >= IDLE) {
                (last_invalidation, misses_then) = (Instant::now(), misses);
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                self.invalidate_some(&mut known, random)?;
            }
        }
        Ok(())
    }

    fn answer_all(&self, policy: &Policy, known: &mut Vec<u64>) -> Result<()> {
        while let Some((message, format)) = receive(&self.file)? {
            if message.kind != Kind::Miss || format != self.format {
                return Err(Error::Invalid(format!("the device says {message:?}")));
            }
            self.misses.fetch_add(1, Ordering::Relaxed);
            if self.map(policy, message.iova)? {
                if known.len() == 256 {
                    known.remove(0);
                }
                known.push(message.iova);
            }
        }
        Ok(())
    }

    /// Takes the translation of a page away that was asked for lately, or now and then all.
    fn invalidate_some(&self, known: &mut Vec<u64>, random: u64) -> Result<()> {
        if known.is_empty() {
            return Ok(());
        }
        let message = if random % 16 == 0 {
            known.clear();
            Message::invalidate(0, u64::MAX)
        } else {
            let index = usize::try_from((random >> 8) % known.len() as u64).unwrap_or(0);
            let iova = known.swap_remove(index);
            Message::invalidate(iova - iova % PAGE_SIZE as u64, PAGE_SIZE as u64)
        };
        self.invalidations.fetch_add(1, Ordering::Relaxed);
        self.send(&message)
    }
}

/// A thread that answers each miss of a device with the translation of a page, until it is dropped.
#[derive(Debug)]
pub struct Translator {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Translator {
    /// Starts it, for a device that has an IOTLB and whose addresses are those of `memory`.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn start(device: &Device, memory: &Memory, how: Iotlb) -> Result<Self> {
        let shared = Arc::new(Shared {
            file: device
                .file()
                .try_clone()
                .map_err(Error::system("dup of the device"))?,
            memory: memory.clone(),
            format: how.format,
            policy: Mutex::default(),
            misses: AtomicU64::new(0),
            invalidations: AtomicU64::new(0),
            end: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("iotlb".into())
            .spawn(move || {
                if let Err(error) = of_thread.run(how.invalidate_every) {
                    of_thread.policy().error = Some(error);
                }
            })
            .map_err(Error::system("a thread for the IOTLB"))?;
        Ok(Translator {
            shared,
            thread: Some(thread),
        })
    }

    /// From now on misses in `hole` are not answered. Translations that were given stay.
    pub fn add_hole(&self, hole: Range<u64>) {
        let mut policy = self.shared.policy();
        policy.small_pages = true;
        policy.holes.push(hole);
    }

    /// From now on translations of these pages do not allow the device to write.
    pub fn set_read_only(&self, pages: Range<u64>) {
        let mut policy = self.shared.policy();
        policy.small_pages = true;
        policy.read_only.push(pages);
    }

    /// From now on pages are translated one by one.
    pub fn use_small_pages(&self) {
        self.shared.policy().small_pages = true;
    }

    /// From now on all is translated, for reading and writing.
    pub fn allow_all(&self) {
        let mut policy = self.shared.policy();
        *policy = Policy {
            error: policy.error.take(),
            ..Policy::default()
        };
    }

    /// Takes translations away.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn invalidate(&self, iova: u64, size: u64) -> Result<()> {
        self.shared.send(&Message::invalidate(iova, size))
    }

    /// Gives the translations of all pages of `buffers`, unless they are in a hole.
    ///
    /// # Errors
    ///
    /// [`Error::System`]
    pub fn prefill<'b>(&self, buffers: impl IntoIterator<Item = &'b Buffer>) -> Result<()> {
        self.prefill_and(buffers, || Ok(()))
    }

    /// As [`prefill`](Self::prefill); then calls `f`, before any is taken away at random or answered.
    ///
    /// # Errors
    ///
    /// [`Error::System`], and those of `f`.
    pub fn prefill_and<'b, R>(
        &self,
        buffers: impl IntoIterator<Item = &'b Buffer>,
        f: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let policy = self.shared.policy();
        for buffer in buffers {
            let first = buffer.addr().0 / PAGE_SIZE as u64;
            let last = (buffer.addr().0 + buffer.len().max(1) as u64 - 1) / PAGE_SIZE as u64;
            for page in first..=last {
                self.shared.map(&policy, page * PAGE_SIZE as u64)?;
            }
        }
        f()
    }

    /// How many messages there were.
    pub fn counts(&self) -> Counts {
        Counts {
            misses: self.shared.misses.load(Ordering::Relaxed),
            invalidations: self.shared.invalidations.load(Ordering::Relaxed),
        }
    }

    /// The error with which the thread ended, if it did.
    ///
    /// # Errors
    ///
    /// Those of reading and writing messages.
    pub fn check(&self) -> Result<()> {
        self.shared.policy().error.take().map_or(Ok(()), Err)
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no way to panic, and nobody to tell.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_the_headers() {
        let message = Message::update(0x1000, 0x2000, 0x7f00_0000_1000, Access::BOTH);
        for format in [Format::V1, Format::V2] {
            let bytes = message.to_bytes(format);
            assert_eq!(u32::from(bytes[0]), format.number());
            assert_eq!(bytes[4..8], [0; 4]);
            assert_eq!(bytes[8..16], 0x1000u64.to_ne_bytes());
            assert_eq!(bytes[32..36], [3, 2, 0, 0]);
            assert_eq!(Message::from_bytes(&bytes).expect("one"), (message, format));
            assert!(Message::from_bytes(&bytes[..71]).is_err());
        }
        let none = Message::invalidate(0, u64::MAX).to_bytes(Format::V1);
        assert_eq!(none[33], 3);
        assert!(Message::from_bytes(&[3; MESSAGE_LEN]).is_err());
    }
}
