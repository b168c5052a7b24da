// SPDX-License-Identifier: GPL-2.0

//! Plugging: bios submitted together reach the device together.
//!
//! C headers: `include/linux/blkdev.h`, `include/linux/bottom_half.h`.

use crate::bindings::raw;
use core::mem::MaybeUninit;

/// Runs `submit` with the block layer plugged, so that what it submits is merged and handed to the
/// device in one go when it returns, or when the task sleeps.
///
/// Bios may complete before this returns. Context: may sleep.
#[inline]
pub(crate) fn with_plug<R>(submit: impl FnOnce() -> R) -> R {
    let mut plug = MaybeUninit::<raw::blk_plug>::uninit();

    // SAFETY: `plug` is on this stack frame, does not move, and outlives the matching
    // `blk_finish_plug()` below. The kernel is built with `panic=abort`, so `submit` cannot unwind
    // past that call.
    unsafe { raw::blk_start_plug(plug.as_mut_ptr()) };
    let result = submit();
    // SAFETY: `plug` was started above by this very task.
    unsafe { raw::blk_finish_plug(plug.as_mut_ptr()) };
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
