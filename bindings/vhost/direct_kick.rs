// SPDX-License-Identifier: GPL-2.0

//! Kicks that are handled by the task that kicks, before it goes back to user space or into its guest.
//!
//! C headers: `include/linux/task_work.h`, `drivers/vhost/vhost.h`.

use super::virtqueue::{
    Operations,
    Virtqueue, //
};
use crate::bindings::raw;
use core::ptr::NonNull;
use kernel::{
    prelude::*,
    sync::{
        atomic::{
            ordering,
            Atomic, //
        },
        new_mutex,
        Arc,
        Mutex, //
    },
    types::Opaque, //
};

/// What the task that kicks a virtqueue has to do.
///
/// A task has it from [`DirectKick::queue`] until it was called back, which the end of the virtqueue must not
/// wait for: it may be that very task which closes the device. Hence an object of its own, which the task
/// shares, and from which the virtqueue is taken away.
///
/// # Invariants
///
/// - `work` is in the list of one task at most, which has a reference to the object. That task sets `queued` before,
///   and clears it when it has handled the kick.
/// - `virtqueue` is one that lives until [`DirectKick::detach`].
#[pin_data]
pub(super) struct DirectKick<T: Operations> {
    #[pin]
    work: Opaque<raw::callback_head>,
    queued: Atomic<bool>,
    /// There is a virtqueue, or was when this was last read.
    attached: Atomic<bool>,
    /// Kicks are to be handled so.
    wanted: Atomic<bool>,
    #[pin]
    virtqueue: Mutex<Option<NonNull<Virtqueue<T>>>>,
    _module: ModuleReference,
}

// SAFETY: Virtqueues are `Sync`; the work is used as the type invariant says.
unsafe impl<T: Operations> Send for DirectKick<T> {}
// SAFETY: As above.
unsafe impl<T: Operations> Sync for DirectKick<T> {}

impl<T: Operations> DirectKick<T> {
    /// One without a virtqueue.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep; a file of this module is open, or being opened.
    pub(super) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                // SAFETY: `work` is memory for a `struct callback_head`.
                work <- Opaque::ffi_init(|work: *mut raw::callback_head| unsafe {
                    work.write(raw::callback_head {
                        func: Some(Self::callback),
                        ..Default::default()
                    });
                }),
                queued: Atomic::new(false),
                attached: Atomic::new(false),
                wanted: Atomic::new(true),
                virtqueue <- new_mutex!(None),
                _module: ModuleReference::new(),
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Says whose kicks it is for. Context: may sleep, not for long.
    ///
    /// # Safety
    ///
    /// `virtqueue` must not go before [`DirectKick::detach`].
    pub(super) unsafe fn attach(&self, virtqueue: &Virtqueue<T>) {
        // INVARIANT: The caller promises it.
        *self.virtqueue.lock() = Some(virtqueue.into());
        self.attached.store(true, ordering::Relaxed);
    }

    /// Whether there is a virtqueue, or was a moment ago.
    #[inline]
    pub(super) fn is_attached(&self) -> bool {
        self.attached.load(ordering::Relaxed)
    }

    /// Says whether kicks are to be handled so, from now on.
    #[inline]
    pub(super) fn set_wanted(&self, wanted: bool) {
        if self.wanted.load(ordering::Relaxed) != wanted {
            self.wanted.store(wanted, ordering::Relaxed);
        }
    }

    /// Takes the virtqueue away. When this returns, nobody uses it any more for a kick.
    ///
    /// Context: may sleep, not for long; without the virtqueue's mutex.
    pub(super) fn detach(&self) {
        self.attached.store(false, ordering::Relaxed);
        *self.virtqueue.lock() = None;
    }

    /// Has the current task handle a kick of the virtqueue of a device whose owner's address space is `mm`.
    /// Returns whether it will: not if it is not of that address space, will not go back to user space, or if
    /// another task is to handle a kick or is at it.
    ///
    /// Context: any.
    #[inline]
    pub(super) fn queue(self: &Arc<Self>, mm: *const raw::mm_struct) -> bool {
        let wanted = self.is_attached() && self.wanted.load(ordering::Relaxed);
        // SAFETY: It only compares `mm`, and looks at the current task.
        if !wanted || !unsafe { raw::rust_helper_in_task_of(mm) } {
            return false;
        }
        if self.queued.xchg(true, ordering::Full) {
            return false;
        }
        let this = Arc::into_raw(self.clone());
        // INVARIANT: The task gets the reference, and `queued` was not set.
        // SAFETY: The work is initialised, in no list, and lives as long as the reference. The current task is
        // one of user space, and runs.
        let result = unsafe {
            raw::task_work_add(
                raw::get_current(),
                (*this).work.get(),
                raw::task_work_notify_mode_TWA_RESUME,
            )
        };
        if result != 0 {
            self.queued.store(false, ordering::Relaxed);
            // SAFETY: The task did not take the reference. It is not the last one: there is `self`.
            drop(unsafe { Arc::from_raw(this) });
        }
        result == 0
    }

    /// Called by the kernel when the task goes back to user space, enters its guest, or exits.
    ///
    /// # Safety
    ///
    /// Only for a task's list of works, with one that [`DirectKick::queue`] added.
    unsafe extern "C" fn callback(work: *mut raw::callback_head) {
        let work = Opaque::cast_from(work);
        // SAFETY: The work is a field of a `DirectKick`; the reference to it was the task's.
        let this = unsafe { Arc::from_raw(kernel::container_of!(work, Self, work)) };
        if let Some(virtqueue) = *this.virtqueue.lock() {
            // SAFETY: By the type invariant it lives until `detach()`, which waits for the lock.
            unsafe { virtqueue.as_ref() }.direct_kick();
        }
        // INVARIANT: The work is in no list any more, and is not looked at again by who called this.
        // Whoever kicked since it was queued has woken the worker.
        this.queued.store(false, ordering::Release);
    }
}

/// Keeps the module from being unloaded.
struct ModuleReference;

impl ModuleReference {
    /// For who has a file of the module open.
    fn new() -> Self {
        // SAFETY: The module is in use.
        unsafe { raw::rust_helper_this_module_get() };
        Self
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: `new()` took the reference. The code that runs after this is waited for by `Callbacks`.
        unsafe { raw::rust_helper_this_module_put() };
    }
}

/// When it is dropped, waits until tasks that dropped the last reference to the module, in a callback, have
/// left its code. To be dropped when the module is unloaded, after what makes such callbacks.
pub(crate) struct Callbacks;

impl Drop for Callbacks {
    fn drop(&mut self) {
        // A task that has dropped the reference does not sleep before it returns: so one that slept, or is in
        // user space, has returned.
        // SAFETY: May sleep here, and no lock is held.
        unsafe { raw::rust_helper_synchronize_rcu_tasks() };
    }
}
