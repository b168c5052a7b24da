// SPDX-License-Identifier: GPL-2.0

//! What it takes to poll a virtqueue: a clock, and who else wants the worker or its processor.
//!
//! Source: `vhost_net_busy_poll()` in `drivers/vhost/net.c`.

use crate::bindings::raw;
use kernel::{
    current,
    sync::atomic::{
        ordering,
        Atomic, //
    },
    time::Jiffies, //
};

/// A turn of a worker at one virtqueue.
pub(crate) struct Turn {
    last: bool,
}

impl Turn {
    /// One in which nothing is polled, since others wait.
    pub(crate) const NOT_LAST: Self = Self { last: false };

    /// The turn that a worker is taking.
    ///
    /// # Safety
    ///
    /// `work` must be what the worker has just called back for.
    pub(super) unsafe fn new(work: *mut raw::vhost_work) -> Self {
        // A worker takes all work off its list at once, where `vhost_vq_has_work()` does not see it
        // any more, and the last of it has no successor. Whoever queues this work again meanwhile
        // writes that field, but then the list is not empty.
        // SAFETY: The caller says that `work` is valid. The read is volatile since others may write.
        let next = unsafe { (&raw const (*work).node.next).read_volatile() };
        Self {
            last: next.is_null(),
        }
    }

    /// Whether nothing else was waiting for the worker when the turn began.
    #[inline]
    pub(crate) fn is_last(&self) -> bool {
        self.last
    }
}

/// Nanoseconds since some time, to be compared with later ones. The clocks of two processors may differ by a
/// little.
#[inline]
pub(crate) fn busy_clock() -> u64 {
    // SAFETY: It may be called anywhere.
    unsafe { raw::rust_helper_local_clock() }
}

/// Ticks of the kernel's timer, of 1 to 10 ms each: costs next to nothing, and wraps. Any context.
#[inline]
pub(crate) fn jiffies() -> Jiffies {
    // SAFETY: It is always there; the timer's interrupt writes it, as a whole.
    unsafe { core::ptr::read_volatile(&raw const kernel::bindings::jiffies) }
}

/// Whether the current task should leave the processor to another, or has a signal.
///
/// Unlike the core this looks for lazy requests, too: who is to read what was just completed may be
/// waiting for this very processor.
#[inline]
pub(super) fn should_leave_processor() -> bool {
    // SAFETY: Both only read a flag of the current task.
    let resched =
        unsafe { raw::rust_helper_need_resched() || raw::rust_helper_need_resched_lazy() };
    resched || current!().signal_pending()
}

/// How many want a virtqueue that may be polled.
pub(super) struct Wanted(Atomic<i32>);

impl Wanted {
    pub(super) fn new() -> Self {
        Self(Atomic::new(0))
    }

    #[inline]
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(ordering::Relaxed) != 0
    }

    /// Says that one more, or one less, wants it.
    pub(super) fn add(&self, count: i32) {
        self.0.add(count, ordering::Relaxed);
    }
}
