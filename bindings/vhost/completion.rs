// SPDX-License-Identifier: GPL-2.0

//! Where finished requests of a virtqueue wait for its worker.
//!
//! C headers: `include/linux/llist.h`, `drivers/vhost/vhost.h`.

use super::{
    request::SlotHead,
    used_ring::UsedRing, //
};
use crate::bindings::{
    compat::smp_mb,
    raw, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        ordering,
        Atomic, //
    },
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::Opaque, //
};

/// Why [`CompletionList::wait`] returned.
pub(super) enum Wait {
    /// There may be something to take.
    Woken,
    /// The time is over.
    TimedOut,
    /// The task is to die.
    Killed,
}

/// A lock-free list of requests whose bios are done, and the work that takes them.
///
/// Producers are the bios' `end_io`, on any processor and in any context. The consumer holds the
/// virtqueue's mutex: its worker, or whoever stops the device. While there is no consumer, producers
/// complete what they can themselves, for which it would have to be woken.
///
/// # Invariants
///
/// `vq` points to the virtqueue that contains this object, which is part of an initialised device
/// before anything is pushed.
#[pin_data]
pub(crate) struct CompletionList {
    #[pin]
    list: Opaque<raw::llist_head>,
    #[pin]
    work: Opaque<raw::vhost_work>,
    vq: *mut raw::vhost_virtqueue,
    /// A consumer is at work, and looks at the list again before it leaves.
    consuming: Atomic<bool>,
    /// Somebody sleeps in [`CompletionList::wait`].
    waiting: Atomic<bool>,
    /// The consumer is to be called for the next request.
    wanted: Atomic<bool>,
    /// The last request that was done found no consumer.
    alone: Atomic<bool>,
    #[pin]
    wake: Opaque<raw::completion>,
    #[pin]
    used_ring: UsedRing,
}

// SAFETY: All that producers touch is atomic or does its own locking.
unsafe impl Send for CompletionList {}
// SAFETY: As above.
unsafe impl Sync for CompletionList {}

impl CompletionList {
    /// An empty list for `vq`, whose worker runs `handler` when it fills.
    ///
    /// # Safety
    ///
    /// `vq` must be the virtqueue that contains the list.
    pub(super) unsafe fn new(
        vq: *mut raw::vhost_virtqueue,
        handler: unsafe extern "C" fn(*mut raw::vhost_work),
    ) -> impl PinInit<Self> {
        // INVARIANT: The caller promises what is said of `vq`.
        pin_init!(Self {
            list: Opaque::zeroed(),
            work <- Opaque::ffi_init(move |work: *mut raw::vhost_work| {
                // SAFETY: `work` is memory for a `struct vhost_work`. The core's function clears
                // one bit of the flags and leaves the others as they were.
                unsafe {
                    work.write_bytes(0, 1);
                    raw::vhost_work_init(work, Some(handler));
                }
            }),
            vq,
            consuming: Atomic::new(false),
            waiting: Atomic::new(false),
            wanted: Atomic::new(false),
            alone: Atomic::new(false),
            used_ring <- UsedRing::new(),
            // SAFETY: `wake` is memory for a `struct completion`.
            wake <- Opaque::ffi_init(|wake| unsafe { raw::init_completion(wake) }),
        })
    }

    /// The virtqueue whose work this is.
    ///
    /// # Safety
    ///
    /// `work` must be the work of a `CompletionList`.
    pub(super) unsafe fn virtqueue_of(work: *mut raw::vhost_work) -> *mut raw::vhost_virtqueue {
        let work = Opaque::cast_from(work);
        // SAFETY: The caller says that `work` is a field of a `CompletionList`.
        unsafe { (*kernel::container_of!(work, Self, work)).vq }
    }

    /// Completes the request of a node, or adds the node and sees to it that a consumer comes.
    /// Context: any.
    ///
    /// # Safety
    ///
    /// `node` must be that of the bios of a slot whose owner is [`Owner::InFlight`] and whose bios are
    /// done; it must be in no list, and stay valid until it is taken. The caller must be in an RCU
    /// read-side critical section.
    ///
    /// [`Owner::InFlight`]: super::request::Owner::InFlight
    #[inline]
    pub(in crate::bindings) unsafe fn push(&self, node: *mut raw::llist_node) {
        let alone = !self.consuming.load(ordering::Relaxed);
        if self.alone.load(ordering::Relaxed) != alone {
            self.alone.store(alone, ordering::Relaxed);
        }
        // SAFETY: The caller promises what is said of `node`, and nobody else knows of it yet.
        if alone && unsafe { SlotHead::complete(node, &self.used_ring) } {
            // The slot was freed, and a barrier came after that. So either this sees that somebody
            // counts on the request, or they saw that it was done.
            if self.waiting.load(ordering::Relaxed) || self.wanted.load(ordering::Relaxed) {
                self.call_consumer();
            }
            return;
        }
        // SAFETY: The caller promises what is said of `node`.
        unsafe { raw::rust_helper_llist_add(node, self.list.get()) };
        // Adding is fully ordered, so either this sees that the consumer left, or the consumer,
        // which looks once more behind a barrier, sees the node.
        if !self.consuming.load(ordering::Relaxed) {
            self.call_consumer();
        }
    }

    /// The used ring, and whom to tell of new entries.
    #[inline]
    pub(super) fn used_ring(&self) -> &UsedRing {
        &self.used_ring
    }

    /// Whether the last request that was done found no consumer, as it will be for the next ones if
    /// the disk takes its time.
    #[inline]
    pub(super) fn finds_no_consumer(&self) -> bool {
        self.alone.load(ordering::Relaxed)
    }

    /// Says that the consumer is to be called for the next request that is done, until
    /// [`CompletionList::set_wanted`] with `false`. Whoever says so looks afterwards whether there is one
    /// in flight.
    pub(super) fn set_wanted(&self, wanted: bool) {
        self.wanted.store(wanted, ordering::Relaxed);
        smp_mb();
    }

    /// Calls the consumer, whether or not there is something on the list.
    pub(super) fn call_consumer(&self) {
        // SAFETY: By the type invariant `vq` is initialised; the work is too. If the worker is gone,
        // the core says so and whoever stops the device takes the list.
        let queued = unsafe { raw::vhost_vq_work_queue(self.vq, self.work.get()) };
        if !queued || self.waiting.load(ordering::Relaxed) {
            // SAFETY: `wake` is initialised. Waking is legal in any context.
            unsafe { raw::complete(self.wake.get()) };
        }
    }

    /// Says that a consumer is at work: until [`CompletionList::leave`] it need not be called.
    ///
    /// # Safety
    ///
    /// The caller holds the virtqueue's mutex.
    #[inline]
    pub(super) unsafe fn enter(&self) {
        self.consuming.store(true, ordering::Relaxed);
    }

    /// Ends [`CompletionList::enter`]. Calls the consumer again if something came meanwhile, and
    /// wakes who waits, unless that is the caller itself. `blocked` says that nothing can be taken until
    /// the worker is called for another reason.
    ///
    /// # Safety
    ///
    /// The caller holds the virtqueue's mutex.
    #[inline]
    pub(super) unsafe fn leave(&self, caller_waits: bool, blocked: bool) {
        self.consuming.store(false, ordering::Relaxed);
        smp_mb();
        if !blocked && !self.is_empty() {
            self.call_consumer();
        } else if !caller_waits && self.waiting.load(ordering::Relaxed) {
            // SAFETY: `wake` is initialised.
            unsafe { raw::complete(self.wake.get()) };
        }
    }

    /// Whether there is nothing to take now.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        // SAFETY: The list is initialised. The read is volatile since producers may write.
        unsafe { (&raw const (*self.list.get()).first).read_volatile() }.is_null()
    }

    /// Takes all nodes, oldest first; null if there are none.
    ///
    /// # Safety
    ///
    /// The caller holds the virtqueue's mutex.
    #[inline]
    pub(super) unsafe fn take_all(&self) -> *mut raw::llist_node {
        if self.is_empty() {
            return core::ptr::null_mut();
        }
        // SAFETY: The list is initialised; what is taken off is the caller's alone.
        unsafe { raw::llist_reverse_order(raw::rust_helper_llist_del_all(self.list.get())) }
    }

    /// Says that somebody is going to [`CompletionList::wait`], from now on or no longer. Said
    /// before the mutex is taken to see whether there is something to wait for.
    pub(super) fn set_waiting(&self, waiting: bool) {
        self.waiting.store(waiting, ordering::Relaxed);
        smp_mb();
    }

    /// Sleeps until something was added to the list or a consumer left, or for `timeout`; with
    /// `killable`, until the task is killed. May be woken without reason.
    pub(super) fn wait(&self, timeout: Msecs, killable: bool) -> Wait {
        let timeout = msecs_to_jiffies(timeout);
        if !killable {
            // SAFETY: `wake` is initialised.
            let left = unsafe { raw::wait_for_completion_timeout(self.wake.get(), timeout) };
            return if left == 0 {
                Wait::TimedOut
            } else {
                Wait::Woken
            };
        }
        // SAFETY: `wake` is initialised.
        match unsafe { raw::wait_for_completion_killable_timeout(self.wake.get(), timeout) } {
            0 => Wait::TimedOut,
            1.. => Wait::Woken,
            _ => Wait::Killed,
        }
    }
}
