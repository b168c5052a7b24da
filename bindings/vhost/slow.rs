// SPDX-License-Identifier: GPL-2.0

//! What takes long for a request of a virtqueue, and so is not done in its worker.
//!
//! C headers: `include/linux/workqueue.h`, `include/linux/llist.h`.

use crate::bindings::raw;
use kernel::{
    prelude::*,
    sync::atomic::{
        ordering,
        Atomic, //
    },
    types::Opaque, //
};

/// Requests that wait for a context in which to do what takes long, one after the other.
///
/// There is one such context for each virtqueue, at most: a guest cannot take more of the host's.
#[pin_data]
pub(super) struct SlowWork {
    #[pin]
    list: Opaque<raw::llist_head>,
    #[pin]
    work: Opaque<raw::work_struct>,
    /// Nothing that takes long is begun any more.
    ended: Atomic<bool>,
}

// SAFETY: Both the list and the work are used by any thread and do their own locking.
unsafe impl Send for SlowWork {}
// SAFETY: As above.
unsafe impl Sync for SlowWork {}

impl SlowWork {
    /// Nothing to do. `callback` is called when there is.
    pub(super) fn new(callback: unsafe extern "C" fn(*mut raw::work_struct)) -> impl PinInit<Self> {
        pin_init!(Self {
            list: Opaque::zeroed(),
            // SAFETY: `work` is memory for a `struct work_struct`.
            work <- Opaque::ffi_init(move |work| unsafe {
                raw::rust_helper_init_work(work, Some(callback));
            }),
            ended: Atomic::new(false),
        })
    }

    /// The object that a work is part of.
    ///
    /// # Safety
    ///
    /// `work` must be that of a `SlowWork`.
    pub(super) unsafe fn from_work(work: *mut raw::work_struct) -> *const Self {
        let work = Opaque::cast_from(work);
        // SAFETY: The caller says that `work` is a field of a `SlowWork`.
        unsafe { kernel::container_of!(work, Self, work) }
    }

    /// Adds a node and sees to it that the callback comes. Context: any.
    ///
    /// # Safety
    ///
    /// The node must be in no list, and stay valid until the callback took it, and this object until
    /// [`SlowWork::flush`] returned after that.
    pub(super) unsafe fn queue(&self, node: *mut raw::llist_node) {
        // SAFETY: The caller promises what is said of `node`. The work is initialised; one that is queued
        // already is not queued again, and takes the node too: adding is fully ordered.
        unsafe {
            raw::rust_helper_llist_add(node, self.list.get());
            raw::queue_work_on(
                raw::wq_misc_consts_WORK_CPU_UNBOUND as kernel::ffi::c_int,
                raw::system_dfl_wq,
                self.work.get(),
            );
        }
    }

    /// Takes all nodes, oldest first; null if there are none. Only for the callback.
    pub(super) fn take_all(&self) -> *mut raw::llist_node {
        // SAFETY: The list is initialised; what is taken off is the caller's alone.
        unsafe { raw::llist_reverse_order(raw::rust_helper_llist_del_all(self.list.get())) }
    }

    /// Says that what waits, and what comes, is not worth its time any more.
    pub(super) fn end(&self) {
        self.ended.store(true, ordering::Relaxed);
    }

    /// Takes that back.
    pub(super) fn resume(&self) {
        self.ended.store(false, ordering::Relaxed);
    }

    /// Whether [`SlowWork::end`] was called, and not [`SlowWork::resume`] since.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(ordering::Relaxed)
    }

    /// Waits until the callback has returned, if it was called for. Context: may sleep.
    pub(super) fn flush(&self) {
        // SAFETY: The work is initialised.
        unsafe { raw::flush_work(self.work.get()) };
    }
}
