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

/// Most requests that are allocated at once. Tags come in batches only from one word of their bitmap, which has at
/// least 16 if there are 64 or more.
///
/// Source: `__sbitmap_queue_get_batch()` and `sbitmap_calculate_shift()` in `lib/sbitmap.c`.
const MAX_ALLOCATED: usize = 16;

/// Where a task's bios wait for others, from [`Plug::start`] on: see [`with_plug`].
///
/// # Invariants
///
/// `raw` is initialised if `started`, and the task's plug, unless that had one before. The object is on the stack
/// frame of [`with_plug`].
pub(crate) struct Plug {
    raw: UnsafeCell<MaybeUninit<raw::blk_plug>>,
    started: Cell<bool>,
    /// How many of the bios that requests are allocated for are still to come.
    expected: Cell<usize>,
}

impl Plug {
    #[inline]
    fn as_raw(&self) -> *mut raw::blk_plug {
        self.raw.get().cast()
    }

    /// Plugs the block layer, if it is not. Worth its price if more than one bio is submitted.
    ///
    /// About as many as `bios` are going to be submitted now: the block layer allocates requests for several at
    /// once. Those that are not needed it frees at the end, or when the task sleeps.
    #[inline]
    pub(crate) fn start(&self, bios: usize) {
        let plug = self.as_raw();
        if !self.started.get() {
            // SAFETY: By the type invariant it is on a stack frame that outlives the matching
            // `blk_finish_plug()`, and not started. If the task has a plug already, this one stays as it is.
            unsafe {
                plug.write(raw::blk_plug::default());
                raw::blk_start_plug(plug);
            }
            // INVARIANT: It was started just now, by the task whose stack frame it is on: it is not `Sync`.
            self.started.set(true);
        }
        if let Some(expected) = self.expected.get().checked_sub(1) {
            self.expected.set(expected);
            return;
        }
        let bios = bios.min(MAX_ALLOCATED);
        // CAST: At most `MAX_ALLOCATED`.
        // SAFETY: By the type invariant it is initialised. Only this task uses it, and the kernel on its behalf.
        unsafe { (*plug).nr_ios = bios as u16 };
        self.expected.set(bios.saturating_sub(1));
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
        expected: Cell::new(0),
    };

    let result = submit(&plug);
    if plug.started.get() {
        // SAFETY: By the type invariant it was started by this very task. The kernel is built with `panic=abort`,
        // so `submit` cannot unwind past this call.
        unsafe { raw::blk_finish_plug(plug.as_raw()) };
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
