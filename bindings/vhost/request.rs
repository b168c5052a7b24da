// SPDX-License-Identifier: GPL-2.0

//! A request that has a slot of its virtqueue, from its descriptor chain to its completion.

use super::{
    used_ring::UsedRing,
    virtqueue::{
        Operations,
        Virtqueue,
        VirtqueueGuard, //
    },
};
use crate::bindings::{
    block::{
        Backend,
        Bio,
        BioRoom,
        Building,
        Ended,
        Finished,
        PendingBios,
        Submitter, //
    },
    pages::PinnedByte,
    raw,
};
use core::cell::UnsafeCell;
use kernel::sync::{
    atomic::{
        ordering,
        Atomic, //
    },
    Arc, //
};

/// Whose a slot is.
#[derive(Copy, Clone, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Owner {
    /// Nobody's: it can be claimed.
    Nobody = 0,
    /// A [`Request`]'s, or the virtqueue's list of deferred requests'.
    Request = 1,
    /// The block layer's, or the completion list's.
    InFlight = 2,
}

/// How a request is completed without the worker, in the context of the end of its last bio.
pub(super) struct Direct {
    pub(super) status: PinnedByte,
    /// The status byte and the used entry if all goes well, and if a bio failed.
    pub(super) ok: (u8, raw::vring_used_elem),
    pub(super) failed: (u8, raw::vring_used_elem),
}

/// The part of a [`Slot`] that the end of a bio needs.
#[repr(C)]
pub(super) struct SlotHead {
    /// First, so that its node leads to the slot.
    pub(super) bios: PendingBios,
    owner: Atomic<i32>,
    /// For the request's first bio, if it is a small one.
    room: BioRoom,
    /// The slot's owner's.
    direct: UnsafeCell<Option<Direct>>,
}

impl SlotHead {
    #[inline]
    pub(super) fn is(&self, owner: Owner) -> bool {
        self.owner.load(ordering::Acquire) == owner as i32
    }

    #[inline]
    fn pass_to(&self, owner: Owner) {
        self.owner.store(owner as i32, ordering::Release);
    }

    /// Whether it has no owner, and no bio: it may be moved or freed.
    #[inline]
    pub(super) fn is_idle(&self) -> bool {
        self.is(Owner::Nobody) && !self.room.is_taken()
    }

    /// Room for the first bio of the request that claims the slot.
    #[inline]
    pub(super) fn room(&self) -> &BioRoom {
        &self.room
    }

    /// The head of the slot of a node that [`PendingBios`] handed over.
    ///
    /// # Safety
    ///
    /// `node` must be the node of the bios of a slot.
    #[inline]
    unsafe fn from_node<'a>(node: *mut raw::llist_node) -> &'a Self {
        // SAFETY: The node is the first field of the bios, which are the first of the head; both
        // types are `repr(C)`.
        unsafe { &*node.cast::<Self>() }
    }

    /// Completes the request of a node on `ring` and frees its slot, if that can be done in any
    /// context. Returns whether it was done: then the slot may be claimed again already.
    ///
    /// Context: any.
    ///
    /// # Safety
    ///
    /// `node` must be the node of the bios of a slot whose owner is [`Owner::InFlight`] and whose bios
    /// are done, and the caller the only one to know of it.
    #[inline]
    pub(super) unsafe fn complete(node: *mut raw::llist_node, ring: &UsedRing) -> bool {
        // SAFETY: The caller promises what is said of `node`.
        let slot = unsafe { Self::from_node(node) };
        let ended = slot.bios.ended();
        if !ring.is_mapped() || ended == Ended::WouldBlock {
            return false;
        }
        // SAFETY: The caller is the only one to know of the slot.
        let Some(direct) = (unsafe { (*slot.direct.get()).take() }) else {
            return false;
        };
        let (status, entry) = if ended == Ended::Failed {
            direct.failed
        } else {
            direct.ok
        };
        // The worker writes the same byte if it has to take over.
        direct.status.write(status);
        // SAFETY: As above.
        if !direct.status.is_dirty() || !unsafe { slot.bios.release() } {
            return false;
        }
        ring.complete(|rings| {
            rings.push(&entry);
            // Before the guest sees the entry, since it may post the same head again at once.
            slot.pass_to(Owner::Nobody);
        })
        .is_some()
    }
}

/// Room for one request. A ring has as many as descriptors; a chain's slot is that of its head.
///
/// # Invariants
///
/// `request` is initialised while the owner is not [`Owner::Nobody`]. What [`SlotHead::complete`]
/// leaves there is out of reach, and dropped when the slot is claimed again. There are no bios while the owner is
/// [`Owner::Nobody`].
#[repr(C)]
pub(super) struct Slot<R> {
    /// First, so that a node leads to the slot.
    head: SlotHead,
    request: UnsafeCell<Option<R>>,
}

impl<R> core::ops::Deref for Slot<R> {
    type Target = SlotHead;

    #[inline]
    fn deref(&self) -> &SlotHead {
        &self.head
    }
}

impl<R> Slot<R> {
    /// A free slot.
    pub(super) fn new(bios: PendingBios) -> Self {
        Self {
            head: SlotHead {
                bios,
                owner: Atomic::new(Owner::Nobody as i32),
                room: BioRoom::new(),
                direct: UnsafeCell::new(None),
            },
            request: UnsafeCell::new(None),
        }
    }

    /// Calls [`Operations::handle_slow`] for the slot's request and submits its bios, or lets it fail.
    ///
    /// # Safety
    ///
    /// [`Request::submit_slow`] must have given up the slot, and the caller be the only one to know of it. It is not
    /// the caller's any more when this returns.
    pub(super) unsafe fn run_slow<T: Operations<Request = R>>(&self, fail: bool) {
        if fail {
            self.bios.set_error(true);
        // SAFETY: The caller is the only one to know of the slot.
        } else if let Some(request) = unsafe { &mut *self.request.get() } {
            T::handle_slow(request);
        }
        // SAFETY: As above. The bios are those of a `Request`, as in its `submit()`.
        unsafe { self.bios.submit() };
    }

    /// The slot of a node that [`PendingBios`] put in a list.
    ///
    /// # Safety
    ///
    /// `node` must be the node of the bios of a `Slot<R>`.
    #[inline]
    pub(super) unsafe fn from_node<'a>(node: *mut raw::llist_node) -> &'a Self {
        // SAFETY: The node is the first field of the bios, which are the first of the head, which is
        // the first of the slot; all are `repr(C)`.
        unsafe { &*node.cast::<Self>() }
    }
}

/// A request in its slot, with the bios that it is to have done, owned by whoever works on it.
///
/// It ends in [`Request::submit`] or [`VirtqueueGuard::defer`]. One that is just dropped fails: it goes to the
/// completion list with an error.
///
/// # Invariants
///
/// The slot is one of `vq`'s, its owner is [`Owner::Request`], and this is the only object for it.
/// Unless it is within a [`FinishedRequest`], none of its bios has been submitted since the bio was made or
/// rewound.
#[must_use = "a request that is dropped fails"]
pub(crate) struct Request<'a, T: Operations> {
    vq: &'a Virtqueue<T>,
    slot: &'a Slot<T::Request>,
}

impl<'a, T: Operations> Request<'a, T> {
    /// Claims a free slot. With `direct`, the request may be completed without
    /// [`VirtqueueGuard::next_completed`] returning it.
    ///
    /// # Safety
    ///
    /// `slot` must be one of `vq`'s and nobody's, and the caller hold the mutex.
    #[inline]
    pub(super) unsafe fn claim(
        vq: &'a Virtqueue<T>,
        slot: &'a Slot<T::Request>,
        request: impl FnOnce() -> T::Request,
        direct: Option<Direct>,
    ) -> Self {
        debug_assert!(slot.is(Owner::Nobody));
        // SAFETY: The caller promises that the slot is nobody's, and slots are claimed with the mutex held.
        let (old, old_direct) = unsafe { (&mut *slot.request.get(), &mut *slot.direct.get()) };
        // First, so that the new ones are made where they are to be.
        if old.is_some() {
            *old = None;
        }
        if old_direct.is_some() || direct.is_some() {
            *old_direct = direct;
        }
        // SAFETY: As above; what was there is dropped.
        unsafe { slot.request.get().write(Some(request())) };
        slot.bios.set_error(false);
        slot.pass_to(Owner::Request);
        // INVARIANT: The slot was just claimed, and has no bios.
        Self { vq, slot }
    }

    /// Takes over a slot that came from the completion list or the list of deferred requests.
    ///
    /// # Safety
    ///
    /// `slot` must be one of `vq`'s, just taken from one of these lists; if it was the completion list, the object
    /// must go into a [`FinishedRequest`].
    #[inline]
    pub(super) unsafe fn resume(vq: &'a Virtqueue<T>, slot: &'a Slot<T::Request>) -> Self {
        slot.pass_to(Owner::Request);
        // INVARIANT: Whatever is in a list is in it once, and had no object. `VirtqueueGuard::defer()` takes none
        // that is finished.
        Self { vq, slot }
    }

    /// The virtqueue that it is of.
    pub(super) fn virtqueue(&self) -> &Virtqueue<T> {
        self.vq
    }

    /// Gives up the object, not the slot.
    pub(super) fn into_slot(self) -> &'a Slot<T::Request> {
        let slot = self.slot;
        core::mem::forget(self);
        slot
    }

    /// What the driver keeps of the request.
    #[inline]
    pub(crate) fn data(&mut self) -> &mut T::Request {
        // SAFETY: By the type invariant the slot is claimed, and this is the only object for it.
        match unsafe { &mut *self.slot.request.get() } {
            Some(request) => request,
            // SAFETY: By the slot's invariant it is initialised until `finish()`, which takes
            // `self`.
            None => unsafe { core::hint::unreachable_unchecked() },
        }
    }

    /// Whether one of its bios failed, or it was made to fail.
    #[inline]
    pub(crate) fn failed(&self) -> bool {
        self.slot.bios.ended() == Ended::Failed
    }

    /// Makes the request one that failed.
    pub(crate) fn fail(&self) {
        self.slot.bios.set_error(true);
    }

    /// Adds a bio, to be submitted after those that were added before.
    ///
    /// One that was made for another virtqueue, backend or memory fails the request instead.
    #[inline]
    pub(crate) fn add(&mut self, guard: &VirtqueueGuard<'_, T>, bio: Bio<'_, Building>) {
        let fits = guard.is_of(self.vq)
            && guard.backend().is_some_and(|device| bio.is_on(device))
            && bio.is_of(guard.memory());
        if fits {
            // SAFETY: By the type invariant the slot's bios are ours.
            unsafe { self.slot.bios.add(bio) };
        } else {
            self.fail();
        }
    }

    /// Takes its next bio, in the order in which they were added.
    #[inline]
    fn take_bio(&mut self) -> Option<Bio<'a, Finished>> {
        // SAFETY: By the type invariant the slot's bios are ours.
        unsafe { self.slot.bios.take() }
    }

    /// Drops its bios.
    #[inline]
    fn drop_bios(&mut self) {
        while self.take_bio().is_some() {}
    }

    /// Submits all its bios. When the last one is done, the request comes out of
    /// [`VirtqueueGuard::next_completed`], or was completed without; that may be before this returns.
    #[inline]
    pub(crate) fn submit(self) {
        let slot = self.into_slot();
        slot.pass_to(Owner::InFlight);
        // SAFETY: The object is given up, so nobody else has the slot's bios. `add()` took only bios
        // on the virtqueue's backend and memory, which stay open and pinned while a slot has an owner or a bio; slots
        // stay as long. By the type invariant none is submitted twice.
        unsafe { slot.bios.submit() };
    }

    /// As [`Request::submit`], by a task of `submitter`, which keeps `backend`, the virtqueue's, open meanwhile:
    /// for bios whose submitter may have to wait.
    ///
    /// The virtqueue may be stopped, and without a backend, before the task has returned:
    /// [`Submitter::flush`] waits for it.
    pub(crate) fn submit_by(self, submitter: &Submitter, backend: Arc<Backend>) {
        let slot = self.into_slot();
        slot.pass_to(Owner::InFlight);
        // SAFETY: As in `submit()`. Slots are not moved or freed while one has an owner.
        unsafe { slot.bios.submit_by(submitter, backend) };
    }

    /// Has [`Operations::handle_slow`] called for it in a context of its own, and submits its bios, if
    /// it has any, after that.
    pub(crate) fn submit_slow(self) {
        let vq = self.vq;
        let slot = self.into_slot();
        slot.pass_to(Owner::InFlight);
        // SAFETY: The object is given up and the slot in flight: it is `slow`'s until it calls back. Slots
        // stay, and the virtqueue with them, until none has an owner.
        unsafe { vq.slow().queue(slot.bios.node()) };
    }

    /// Ends the request, of which no bio is in flight, and frees its slot.
    #[inline]
    pub(super) fn finish(mut self) -> T::Request {
        self.drop_bios();
        let slot = self.into_slot();
        // SAFETY: The object is given up, so nobody else has the slot.
        let request = unsafe {
            *slot.direct.get() = None;
            (*slot.request.get()).take()
        };
        slot.pass_to(Owner::Nobody);
        match request {
            Some(request) => request,
            // SAFETY: By the slot's invariant it was initialised since it was claimed.
            None => unsafe { core::hint::unreachable_unchecked() },
        }
    }
}

impl<T: Operations> Drop for Request<'_, T> {
    fn drop(&mut self) {
        // Its bios are released, and the request completes with an error.
        self.drop_bios();
        self.slot.bios.set_error(true);
        self.slot.pass_to(Owner::InFlight);
        // SAFETY: The object is at its end, so nobody else has the slot's bios; there are none.
        unsafe { self.slot.bios.submit() };
    }
}

/// A request whose bios, if it had any, are done, owned by whoever works on it.
///
/// It ends in [`FinishedRequest::finish`], or goes on by [`FinishedRequest::rewind`] or [`FinishedRequest::go_on`].
/// One that is just dropped fails, as a [`Request`] does.
///
/// # Invariants
///
/// The request's bios were submitted and are done.
#[must_use = "a request that is dropped fails"]
pub(crate) struct FinishedRequest<'a, T: Operations>(Request<'a, T>);

impl<'a, T: Operations> FinishedRequest<'a, T> {
    /// Takes over a slot that came from the completion list.
    ///
    /// # Safety
    ///
    /// `slot` must be one of `vq`'s, just taken from that list.
    #[inline]
    pub(super) unsafe fn resume(vq: &'a Virtqueue<T>, slot: &'a Slot<T::Request>) -> Self {
        // INVARIANT: A request gets into that list when the last of its bios is done.
        // SAFETY: The caller promises it, and the object goes into a `FinishedRequest`.
        Self(unsafe { Request::resume(vq, slot) })
    }

    /// As [`Request::data`].
    #[inline]
    pub(crate) fn data(&mut self) -> &mut T::Request {
        self.0.data()
    }

    /// How its bios ended, all together. If one would have blocked, see [`FinishedRequest::rewind`].
    #[inline]
    pub(crate) fn ended(&self) -> Ended {
        self.0.slot.bios.ended()
    }

    /// Takes the next finished bio, in the order in which they were added. Its pages are released
    /// when it is dropped.
    #[inline]
    pub(crate) fn take_bio(&mut self) -> Option<Bio<'a, Finished>> {
        self.0.take_bio()
    }

    /// Makes it one whose bios, which nobody took, are to be done again, by somebody who may wait. How
    /// they ended is forgotten.
    ///
    /// It fails if `guard` is not that of its virtqueue, or there is no backend.
    pub(crate) fn rewind(self, guard: &VirtqueueGuard<'_, T>) -> Request<'a, T> {
        let mut request = self.0;
        match guard.backend() {
            Some(backend) if guard.is_of(request.vq) => {
                // SAFETY: By the type invariants the slot's bios are ours and done, and they are on the virtqueue's
                // backend.
                unsafe { request.slot.bios.rewind(backend) };
            }
            _ => {
                request.drop_bios();
                request.fail();
            }
        }
        // INVARIANT: Its bios were rewound or dropped.
        request
    }

    /// Makes it one without bios, which gets others. Those that nobody took are dropped; a failure stays.
    pub(crate) fn go_on(self) -> Request<'a, T> {
        let mut request = self.0;
        request.drop_bios();
        // INVARIANT: It has no bios.
        request
    }

    /// Undoes a failure, which somebody made good.
    pub(crate) fn clear_failure(&self) {
        self.0.slot.bios.set_error(false);
    }

    /// Ends the request and frees its slot.
    #[inline]
    pub(crate) fn finish(self) -> T::Request {
        self.0.finish()
    }
}
