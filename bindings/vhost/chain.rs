// SPDX-License-Identifier: GPL-2.0

//! A descriptor chain that the guest made available, and its completion.

use super::{
    fetch::Fetched,
    log::Log,
    request::{
        Direct,
        Request, //
    },
    virtqueue::{
        Operations,
        VirtqueueGuard, //
    },
};
use crate::bindings::{
    block::{
        Bio,
        BuildError,
        Building,
        Op, //
    },
    iov::{
        self,
        Direction,
        IoVec,
        OwnedUserIter,
        PageBytes,
        StatusByte,
        UserIter, //
    },
};
use core::mem::ManuallyDrop;
use kernel::prelude::*;

/// The newest chain fetched from a virtqueue.
///
/// Its readable memory cannot be written, nor its writable memory read, nor either passed. It ends
/// in [`DescChain::discard`], which gives it back to the ring, in [`DescChain::complete`], or in
/// [`DescChain::claim`]; one that is just dropped breaks the ring, since its request could never
/// complete.
///
/// # Invariants
///
/// `head` is that of a slot which is nobody's until [`DescChain::claim`].
#[must_use = "a chain that is dropped breaks the ring"]
pub(crate) struct DescChain<'n, 'a, T: Operations> {
    guard: &'n mut VirtqueueGuard<'a, T>,
    head: u16,
    out_num: u32,
    in_num: u32,
    readable_len: usize,
    writable_len: usize,
    descriptors: u32,
    /// The last writable byte. It is not part of the chain's memory any more.
    status: Option<StatusByte>,
    log: Option<KBox<Log>>,
    ended: bool,
}

impl<'n, 'a, T: Operations> DescChain<'n, 'a, T> {
    /// A chain that was fetched.
    ///
    /// # Safety
    ///
    /// [`VirtqueueGuard::fetch`] of this guard has just returned it.
    #[inline]
    pub(super) unsafe fn new(guard: &'n mut VirtqueueGuard<'a, T>, fetched: Fetched) -> Self {
        let (out_num, in_num) = (fetched.out_num, fetched.in_num);
        let status = StatusByte::cut_off(guard.chain_memory_mut(out_num, in_num));
        // INVARIANT: `fetch()` has looked, and slots are claimed with the mutex held, which the guard is exclusively
        // borrowed for.
        Self {
            guard,
            head: fetched.head,
            // CAST: Neither is above the length of the array.
            out_num: out_num as u32,
            in_num: in_num as u32,
            readable_len: fetched.readable_len,
            // Without the status.
            writable_len: fetched.writable_len.saturating_sub(1),
            descriptors: fetched.descriptors,
            status,
            log: fetched.log,
            ended: false,
        }
    }

    #[inline]
    fn out(&self) -> &[IoVec] {
        self.guard.chain_memory(0, self.out_num as usize)
    }

    #[inline]
    fn input(&self) -> &[IoVec] {
        self.guard
            .chain_memory(self.out_num as usize, self.in_num as usize)
    }

    /// Bytes of memory that the device reads.
    #[inline]
    pub(crate) fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes of memory that the device writes, without the status.
    #[inline]
    pub(crate) fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Copies the first bytes that the device reads to `out`. Returns how many: fewer if there are
    /// fewer, or if they cannot be read.
    ///
    /// Context: process context in the owner's address space; may sleep.
    #[inline]
    pub(crate) fn copy_start(&self, out: &mut [u8; 16]) -> usize {
        iov::copy_start(self.out(), out)
    }

    /// The memory that the device reads.
    #[inline]
    pub(crate) fn readable(&self) -> UserIter<'_> {
        UserIter::new(self.out(), Direction::Source)
    }

    /// The memory that the device writes, without the last byte: that is the status.
    ///
    /// If what is written is logged, all of it is, written or not: so the caller has checked its length.
    #[inline]
    pub(crate) fn writable(&self) -> UserIter<'_> {
        if let Some(log) = &self.log {
            log.will_write(self.writable_len());
        }
        UserIter::new(self.input(), Direction::Destination)
    }

    /// The first `len` bytes of [`DescChain::writable`], or fewer if there are fewer, to outlive the chain. Of
    /// what is logged, it is these.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(crate) fn own_writable(&self, len: usize) -> Result<OwnedUserIter> {
        let len = self.writable_len().min(len);
        if let Some(log) = &self.log {
            log.will_write(len);
        }
        UserIter::new(self.input(), Direction::Destination).to_owned(len)
    }

    /// Copies `data` to the first bytes that the device writes. Returns the bytes copied: fewer if there are
    /// fewer before the status, or if they cannot be written.
    ///
    /// Context: process context in the owner's address space; may sleep.
    pub(crate) fn write_start(&self, data: &[u8]) -> usize {
        if let Some(log) = &self.log {
            log.will_write(self.writable_len().min(data.len()));
        }
        UserIter::new(self.input(), Direction::Destination).copy_to(data)
    }

    /// As [`DescChain::writable`], if all is one stretch within a page.
    #[inline]
    pub(crate) fn writable_page(&self) -> Option<PageBytes> {
        if let Some(log) = &self.log {
            log.will_write(self.writable_len());
        }
        PageBytes::new(self.input(), 0, Direction::Destination)
    }

    /// The memory that the device reads behind the first stretch, of `skip` bytes, if all is one stretch within
    /// a page.
    #[inline]
    pub(crate) fn readable_page(&self, skip: usize) -> Option<PageBytes> {
        PageBytes::new(self.out(), skip, Direction::Source)
    }

    /// The locked virtqueue.
    #[inline]
    pub(crate) fn guard(&self) -> &VirtqueueGuard<'a, T> {
        self.guard
    }

    /// The locked virtqueue's driver's data, to change it.
    #[inline]
    pub(crate) fn data_mut(&mut self) -> &mut T {
        self.guard.data_mut()
    }

    /// The first bio of its request: see [`VirtqueueGuard::new_bio`].
    #[inline]
    pub(crate) fn new_bio(&self, op: Op, sector: u64, pages: usize) -> Option<Bio<'a, Building>> {
        self.guard.first_bio(self.head, op, sector, pages)
    }

    /// Adds memory of one page to a bio without data: from what stays pinned, or pinned for the bio.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// [`BuildError::Fault`] if the memory cannot be pinned, or the bio has data already, or goes the other way.
    #[inline]
    pub(crate) fn pin_page(
        &self,
        bio: &mut Bio<'_, Building>,
        memory: &PageBytes,
    ) -> Result<(), BuildError> {
        bio.pin_page(memory, self.guard.memory())
    }

    /// Gives the chain back to the ring: it is the next one to be fetched.
    pub(crate) fn discard(mut self) {
        self.ended = true;
        self.guard.discard(self.descriptors);
    }

    /// Completes the chain's request at once: see [`VirtqueueGuard::complete`].
    ///
    /// `None` breaks the ring: the chain has no byte for a status.
    #[inline]
    pub(crate) fn complete(mut self, status: u8, written: usize) -> Option<()> {
        let completion = self.completion()?;
        self.ended = true;
        self.guard.complete(completion, status, written);
        Some(())
    }

    // Each caller ends the chain, so that there is one completion of it.
    #[inline]
    fn completion(&mut self) -> Option<Completion> {
        Some(Completion {
            head: self.head,
            status: self.status.take()?,
            writable_len: self.writable_len,
            log: self.log.take(),
        })
    }

    /// Claims the slot of the chain's head for the request that `request` makes of its completion.
    /// Gives back the locked virtqueue, too.
    ///
    /// With `outcomes`, nothing is to be done for the request at its end but that. It may then end
    /// without [`VirtqueueGuard::next_completed`] returning it.
    ///
    /// `None` breaks the ring: the chain has no byte for a status.
    #[inline]
    pub(crate) fn claim(
        mut self,
        outcomes: Option<Outcomes>,
        request: impl FnOnce(Completion) -> T::Request,
    ) -> Option<(&'n mut VirtqueueGuard<'a, T>, Request<'a, T>)> {
        let completion = self.completion()?;
        let direct = outcomes
            .filter(|_| self.guard.completes_directly())
            .and_then(|outcomes| self.direct(&completion, &outcomes));
        // SAFETY: By the type invariant the slot is nobody's.
        let request = unsafe { self.guard.claim(self.head, || request(completion), direct) }?;
        let chain = ManuallyDrop::new(self);
        // SAFETY: The chain is not used again, nor dropped, so the reference is not duplicated.
        let guard = unsafe { core::ptr::read(&chain.guard) };
        Some((guard, request))
    }

    /// How to complete the request without the worker; `None` if the worker has to.
    fn direct(&self, completion: &Completion, outcomes: &Outcomes) -> Option<Direct> {
        let entry = |written| {
            let len = completion.used_len(written);
            self.guard.used_element(completion.head, len)
        };
        Some(Direct {
            status: completion.status.pin()?,
            ok: (outcomes.ok.0, entry(outcomes.ok.1)),
            failed: (outcomes.failed.0, entry(outcomes.failed.1)),
        })
    }
}

/// What a request's end says: the status byte, and how many bytes were written as in
/// [`VirtqueueGuard::complete`].
pub(crate) struct Outcomes {
    /// If all goes well.
    pub(crate) ok: (u8, usize),
    /// If a bio failed.
    pub(crate) failed: (u8, usize),
}

impl<T: Operations> Drop for DescChain<'_, '_, T> {
    #[inline]
    fn drop(&mut self) {
        if !self.ended {
            self.guard.set_broken();
        }
    }
}

/// The right to complete a request, once: see [`VirtqueueGuard::complete`].
///
/// # Invariants
///
/// There is one for each chain that was fetched and not given back, and was not completed; and one, out
/// of reach, in a slot whose request was completed without the worker, until it is claimed again.
#[must_use = "a request that is not completed keeps the guest waiting"]
pub(crate) struct Completion {
    head: u16,
    status: StatusByte,
    writable_len: usize,
    /// What to log.
    log: Option<KBox<Log>>,
}

impl Completion {
    /// Takes what is to be logged when the status was written.
    #[inline]
    pub(super) fn take_log(&mut self) -> Option<KBox<Log>> {
        self.log.take()
    }

    /// What its used entry says was written: the status too, if nothing before it was left out.
    /// (Virtio 1.3, 2.7.8.)
    #[inline]
    fn used_len(&self, written: usize) -> u32 {
        let used_len = if written >= self.writable_len {
            self.writable_len.saturating_add(1)
        } else {
            written
        };
        used_len.try_into().unwrap_or(u32::MAX)
    }

    /// Writes the status byte. Returns the chain's head and the length of its used entry.
    ///
    /// # Errors
    ///
    /// The head, if the byte cannot be written.
    #[inline]
    pub(super) fn write_status(self, status: u8, written: usize) -> Result<(u16, u32), u16> {
        let (head, used_len) = (self.head, self.used_len(written));
        match self.status.write(status) {
            Ok(()) => Ok((head, used_len)),
            Err(_) => Err(head),
        }
    }
}
