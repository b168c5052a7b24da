// SPDX-License-Identifier: GPL-2.0

//! The state of a virtqueue in which chains are fetched.

use super::{
    chain::DescChain,
    log::Log,
    virtqueue::{
        Operations,
        VirtqueueGuard, //
    },
};
use kernel::{
    prelude::*,
    time::Delta, //
};

/// Why no chain could be fetched.
pub(crate) enum FetchError {
    /// An address is not in the device IOTLB yet: requeue.
    Again,
    /// There is no memory for what is to be logged of it: it is back in the ring.
    NoMemory,
    /// The guest broke the ring. The core has signalled the error eventfd.
    Broken,
}

/// A chain that was fetched.
pub(super) struct Fetched {
    pub(super) head: u16,
    /// Stretches of memory, readable and writable ones.
    pub(super) out_num: usize,
    pub(super) in_num: usize,
    /// Bytes of them.
    pub(super) readable_len: usize,
    pub(super) writable_len: usize,
    /// Descriptors that were consumed.
    pub(super) descriptors: u32,
    /// Its writable memory, if it is to be logged what is written there.
    pub(super) log: Option<KBox<Log>>,
}

/// What [`NotifyDisabled::enable`] or [`NotifyDisabled::enable_after`] found.
pub(crate) enum Idle<N> {
    /// Nothing, or less than it was asked for: the guest kicks when it has added that.
    Yes,
    /// Buffers that came meanwhile; notifications are off again.
    No(N),
}

/// A locked virtqueue whose guest was told not to kick, the only state in which the core fetches.
///
/// It is left by [`NotifyDisabled::enable`] or [`NotifyDisabled::enable_after`], when nothing is left to fetch, or by
/// [`NotifyDisabled::requeue`], [`NotifyDisabled::wait_for_completion`] or
/// [`NotifyDisabled::wait_for_iotlb`], when something is.
///
#[must_use = "the guest does not kick until it is told to"]
pub(crate) struct NotifyDisabled<'g, 'a, T: Operations> {
    guard: &'g mut VirtqueueGuard<'a, T>,
}

impl<'g, 'a, T: Operations> NotifyDisabled<'g, 'a, T> {
    /// A virtqueue whose notifications were just switched off.
    #[inline]
    pub(super) fn new(guard: &'g mut VirtqueueGuard<'a, T>) -> Self {
        Self { guard }
    }

    /// The guard, to complete requests in between.
    #[inline]
    pub(crate) fn guard(&mut self) -> &mut VirtqueueGuard<'a, T> {
        self.guard
    }

    /// Fetches the next descriptor chain, if there is one. A head that is in flight already breaks
    /// the ring.
    ///
    /// # Errors
    ///
    /// See [`FetchError`].
    #[inline]
    pub(crate) fn next_chain(&mut self) -> Result<Option<DescChain<'_, 'a, T>>, FetchError> {
        let Some(fetched) = self.guard.fetch()? else {
            return Ok(None);
        };
        // SAFETY: It was fetched just now.
        Ok(Some(unsafe { DescChain::new(self.guard, fetched) }))
    }

    /// Lets the guest kick again, unless it added buffers meanwhile.
    #[inline]
    pub(crate) fn enable(self) -> Idle<Self> {
        if self.guard.enable_notify() {
            // Fetching switches them off again.
            Idle::No(self)
        } else {
            Idle::Yes
        }
    }

    /// Lets the guest kick when it has added `requests`, and the worker look after `within` whatever was added,
    /// unless so many are there already.
    ///
    /// Context: may sleep; waits for the callback of an earlier timer, which takes no lock that the caller may hold.
    ///
    /// # Errors
    ///
    /// The ring as it was, if the guest cannot be asked for so many: `VIRTIO_RING_F_EVENT_IDX` was not negotiated, they
    /// are more than half of the ring's size, the core has to translate or log, or the used ring cannot be written.
    pub(crate) fn enable_after(self, requests: u16, within: Delta) -> Result<Idle<Self>, Self> {
        match self.guard.enable_notify_after(requests, within) {
            Ok(true) => Ok(Idle::No(self)),
            Ok(false) => Ok(Idle::Yes),
            Err(_) => Err(self),
        }
    }

    /// Leaves notifications off and lets the worker come back, after what else it has to do.
    pub(crate) fn requeue(self) {
        self.guard.poll();
    }

    /// Whether the worker has done enough for one turn.
    #[inline]
    pub(crate) fn exceeds_weight(&self, requests: usize, bytes: usize) -> bool {
        self.guard.exceeds_weight(requests, bytes)
    }

    /// Leaves notifications off after [`FetchError::Again`]: the worker comes back when the device IOTLB
    /// has the address.
    pub(crate) fn wait_for_iotlb(self) {
        self.guard.wait_for_translation();
    }

    /// Leaves notifications off. If a request is in flight, its completion has to lead back here:
    /// then this returns true. Otherwise the worker is let come back.
    pub(crate) fn wait_for_completion(self) -> bool {
        let waits = self.guard.wait_for_completion();
        if !waits {
            self.requeue();
        }
        waits
    }
}
