// SPDX-License-Identifier: GPL-2.0

//! Plugging: bios submitted together reach the device together.
//!
//! C headers: `include/linux/blkdev.h`, `include/linux/bottom_half.h`.

use crate::bindings::raw;
use core::{
    cell::{
        Cell,
        UnsafeCell, //
    },
    mem::MaybeUninit, //
};

/// Where a task's bios wait for others, from [`Plug::start`] on: see [`with_plug`].
///
/// # Invariants
///
/// `raw` is initialised and the task's plug if `started`. The object is on the stack frame of [`with_plug`].
pub(crate) struct Plug {
    raw: UnsafeCell<MaybeUninit<raw::blk_plug>>,
    started: Cell<bool>,
}

impl Plug {
    /// Plugs the block layer, if it is not. Worth its price if more than one bio is submitted.
    #[inline]
    pub(crate) fn start(&self) {
        if self.started.get() {
            return;
        }
        // SAFETY: By the type invariant it is on a stack frame that outlives the matching
        // `blk_finish_plug()`, and not started.
        unsafe { raw::blk_start_plug((*self.raw.get()).as_mut_ptr()) };
        // INVARIANT: It was started just now, by the task whose stack frame it is on: it is not `Sync`.
        self.started.set(true);
    }
}

/// Runs `submit` with a plug. Once it is started, what is submitted is merged and handed to the device in one
/// go when `submit` returns, or when the task sleeps.
///
/// Bios may complete before this returns. Context: may sleep.
#[inline]
pub(crate) fn with_plug<R>(submit: impl FnOnce(&Plug) -> R) -> R {
    let plug = Plug {
        raw: UnsafeCell::new(MaybeUninit::uninit()),
        started: Cell::new(false),
    };

    let result = submit(&plug);
    if plug.started.get() {
        // SAFETY: By the type invariant it was started by this very task. The kernel is built with `panic=abort`,
        // so `submit` cannot unwind past this call.
        unsafe { raw::blk_finish_plug((*plug.raw.get()).as_mut_ptr()) };
    }
    result
}

/// Runs the softirqs that wait for this processor. What was just submitted and is done may be waiting for
/// one, which would otherwise run in a thread of its own when this task sleeps.
///
/// Context: process context, with interrupts on.
#[inline]
pub(crate) fn run_softirqs() {
    // SAFETY: To have them off for a moment is legal here: they run when they are switched on again.
    unsafe { raw::rust_helper_local_bh_disable_enable() };
}
