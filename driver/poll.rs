// SPDX-License-Identifier: GPL-2.0

//! Polling a virtqueue for a while before its worker sleeps, if user space wants that.

use super::{
    complete,
    queue::Queue, //
};
use crate::bindings::vhost::{
    busy_clock,
    NotifyDisabled,
    Turn,
    VirtqueueGuard, //
};

/// Says that there is nothing to do for a virtqueue, from now on if that is new. Returns since when; `None`
/// if user space does not want polling.
pub(super) fn idle(guard: &mut VirtqueueGuard<'_, Queue>) -> Option<u64> {
    let polls = guard.busyloop_timeout() != 0;
    let since = &mut guard.data_mut().idle_since;
    *since = polls.then(|| since.unwrap_or_else(busy_clock));
    *since
}

/// Learns how long there was nothing to do, if there is something now. Called when somebody comes.
pub(super) fn woken(guard: &mut VirtqueueGuard<'_, Queue>) {
    if guard.data().idle_since.is_some() && (guard.has_completed() || !guard.avail_empty()) {
        work_came(guard);
    }
}

/// Learns how long there was nothing to do, until now.
pub(super) fn work_came(guard: &mut VirtqueueGuard<'_, Queue>) {
    let timeout = guard.busyloop_timeout();
    let queue = guard.data_mut();
    if let Some(since) = queue.idle_since.take() {
        queue.window.work_came(elapsed(since), timeout);
    }
}

/// Nanoseconds. The clock of another processor may be behind: then it is more than anybody polls for.
fn elapsed(since: u64) -> u64 {
    busy_clock().wrapping_sub(since)
}

/// For how long a virtqueue without work would be polled now, in nanoseconds.
pub(super) fn window(guard: &VirtqueueGuard<'_, Queue>) -> u64 {
    guard.data().window.ns(guard.busyloop_timeout())
}

/// Polls an empty ring and its completions, which are completed as they come. Returns whether the guest
/// added buffers.
pub(super) fn poll(ring: &mut NotifyDisabled<'_, '_, Queue>, turn: &Turn) -> bool {
    let guard = ring.guard();
    loop {
        let Some(since) = idle(guard) else {
            return false;
        };
        let window = window(guard);
        if window == 0 || !turn.is_last() {
            return false;
        }
        loop {
            // First, since one who always finds something would never look.
            if guard.should_yield() || elapsed(since) > window {
                return false;
            }
            if guard.has_completed() {
                break;
            }
            // Has to be fetched: enabling notifications does not report again what was seen here.
            if !guard.avail_empty() {
                work_came(guard);
                return true;
            }
            core::hint::spin_loop();
        }
        work_came(guard);
        complete::completions(guard);
    }
}
