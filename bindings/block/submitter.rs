// SPDX-License-Identifier: GPL-2.0

//! Where bios are submitted whose submitter may have to wait for the disk.
//!
//! C header: `include/linux/workqueue.h`.

use crate::bindings::raw;
use core::ptr::NonNull;
use kernel::{
    alloc::AllocError,
    prelude::*,
    workqueue::Queue, //
};

/// A workqueue; `struct workqueue_struct`.
///
/// # Invariants
///
/// `0` is a workqueue of which this object is the owner.
pub(crate) struct Submitter(NonNull<raw::workqueue_struct>);

// SAFETY: A workqueue may be used and destroyed by any thread.
unsafe impl Send for Submitter {}
// SAFETY: As above; it does its own locking.
unsafe impl Sync for Submitter {}

impl Submitter {
    /// A workqueue of which up to `tasks` tasks may wait at the same time. They are made when they are needed.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(crate) fn new(tasks: i32) -> Result<Self> {
        // SAFETY: The name is a string without conversions, so no more arguments are read.
        let raw = unsafe {
            raw::alloc_workqueue_noprof(c"vhost-blk".as_char_ptr(), raw::wq_flags_WQ_UNBOUND, tasks)
        };
        // INVARIANT: It is new.
        Ok(Self(NonNull::new(raw).ok_or(ENOMEM)?))
    }

    /// Waits until all that was spawned has returned. Context: may sleep.
    pub(crate) fn flush(&self) {
        // SAFETY: By the type invariant it is a workqueue.
        unsafe { raw::__flush_workqueue(self.0.as_ptr()) };
    }

    /// Has `submit` called by another task, which may sleep. Whatever it is called for ends before this
    /// object does.
    pub(super) fn spawn(&self, submit: impl FnOnce() + Send + 'static) -> Result<(), AllocError> {
        // SAFETY: By the type invariant it is a workqueue, which lives as long as `self` is borrowed.
        let queue = unsafe { Queue::from_raw(self.0.as_ptr()) };
        queue.try_spawn(GFP_KERNEL_ACCOUNT, submit)
    }
}

impl Drop for Submitter {
    fn drop(&mut self) {
        // Returns when all that was queued has returned, so that no code of this module runs after it.
        // SAFETY: By the type invariant it is ours, and it is not used again.
        unsafe { raw::destroy_workqueue(self.0.as_ptr()) };
    }
}
