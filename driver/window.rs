// SPDX-License-Identifier: GPL-2.0

//! For how long an idle virtqueue is polled before its worker sleeps.
//!
//! Pure code without kernel types, compiled again for the tests in user space.

/// The longest that user space can ask for, in microseconds: whoever shares the processor waits for it.
pub(crate) const MAX_TIMEOUT: u32 = 1000;

/// What a window starts from, in nanoseconds.
pub(crate) const START: u64 = 4000;

/// For how long the next idle virtqueue is polled.
///
/// It grows as long as work comes within the time that user space allows, whether polling found it or
/// it woke the worker, and shrinks to nothing as soon as work takes longer: a virtqueue that falls
/// idle is polled in vain once.
#[derive(Default)]
pub(crate) struct Window {
    ns: u64,
}

impl Window {
    /// Nanoseconds to poll for, if user space allows `timeout` microseconds.
    pub(crate) fn ns(&self, timeout: u32) -> u64 {
        self.ns.min(limit(timeout))
    }

    /// Learns that work came after `idle` nanoseconds.
    pub(crate) fn work_came(&mut self, idle: u64, timeout: u32) {
        let limit = limit(timeout);
        self.ns = if idle > limit {
            0
        } else {
            self.ns.saturating_mul(2).max(START).min(limit)
        };
    }
}

/// Nanoseconds that user space allows.
fn limit(timeout: u32) -> u64 {
    u64::from(timeout.min(MAX_TIMEOUT)) * 1000
}
