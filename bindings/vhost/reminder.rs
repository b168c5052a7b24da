// SPDX-License-Identifier: GPL-2.0

//! A timer that has the worker look at a ring whether the guest kicks or not.
//!
//! C headers: `include/linux/hrtimer.h`, `drivers/vhost/vhost.h`.

use crate::bindings::raw;
use kernel::{
    impl_has_hr_timer,
    prelude::*,
    sync::{
        atomic::{
            ordering,
            Atomic, //
        },
        Arc,
        ArcBorrow, //
    },
    time::{
        hrtimer::{
            ArcHrTimerHandle,
            HrTimer,
            HrTimerCallback,
            HrTimerCallbackContext,
            HrTimerPointer,
            HrTimerRestart,
            RelativeMode, //
        },
        Delta,
        Monotonic, //
    }, //
};

/// A timer that has the worker look at a ring.
///
/// # Invariants
///
/// `vq` points to a virtqueue that is part of an initialised device while there is an [`Armed`].
#[pin_data]
pub(super) struct Reminder {
    #[pin]
    timer: HrTimer<Self>,
    /// It was time since it was last armed.
    due: Atomic<bool>,
    vq: *mut raw::vhost_virtqueue,
}

// SAFETY: The core lets any thread, in any context, queue a virtqueue's work.
unsafe impl Send for Reminder {}
// SAFETY: As above.
unsafe impl Sync for Reminder {}

/// What became of a timer.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reminded {
    /// None was running.
    No,
    /// It was stopped before its time.
    NotYet,
    /// It was time: the worker was called.
    Yes,
}

/// A timer that is running, or was. It is stopped when this is dropped, which waits for its callback.
pub(super) struct Armed(#[expect(dead_code)] ArcHrTimerHandle<Reminder>);

impl Reminder {
    /// One for `vq`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(super) fn new(vq: *mut raw::vhost_virtqueue) -> Result<Arc<Self>> {
        // INVARIANT: There is no `Armed`.
        Arc::pin_init(
            pin_init!(Self {
                timer <- HrTimer::new(),
                due: Atomic::new(false),
                vq,
            }),
            GFP_KERNEL_ACCOUNT,
        )
    }

    /// Has the worker look in a while.
    ///
    /// # Safety
    ///
    /// The virtqueue must be part of an initialised device until what is returned is dropped. There must be no older
    /// [`Armed`], whose end would stop this one.
    pub(super) unsafe fn arm(self: Arc<Self>, within: Delta) -> Armed {
        self.due.store(false, ordering::Relaxed);
        // INVARIANT: The caller promises it.
        Armed(self.start(within))
    }

    /// Whether it was time since it was last armed. For good once the [`Armed`] is dropped.
    #[inline]
    pub(super) fn is_due(&self) -> bool {
        self.due.load(ordering::Relaxed)
    }
}

impl HrTimerCallback for Reminder {
    type Pointer<'a> = Arc<Self>;

    /// Context: a hard interrupt; a softirq with `PREEMPT_RT`.
    fn run(this: ArcBorrow<'_, Self>, _: HrTimerCallbackContext<'_, Self>) -> HrTimerRestart {
        this.due.store(true, ordering::Relaxed);
        // SAFETY: By the type invariant the virtqueue is initialised, as there is an `Armed`: its end waits for
        // this. Without a worker this does nothing.
        unsafe { raw::vhost_poll_queue(&raw mut (*this.vq).poll) };
        HrTimerRestart::NoRestart
    }
}

impl_has_hr_timer! {
    impl HasHrTimer<Self> for Reminder {
        mode: RelativeMode<Monotonic>, field: self.timer
    }
}
