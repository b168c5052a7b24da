// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/window.rs`.

use proptest::prelude::*;

use crate::window::{Window, MAX_TIMEOUT, START};

/// Microseconds.
const TIMEOUT: u32 = 50;
const LIMIT: u64 = 1000 * TIMEOUT as u64;

#[test]
fn it_starts_at_nothing_and_doubles_up_to_the_limit() {
    let mut window = Window::default();
    assert_eq!(window.ns(TIMEOUT), 0);
    for ns in [START, 2 * START, 4 * START, 8 * START, LIMIT, LIMIT] {
        window.work_came(LIMIT, TIMEOUT);
        assert_eq!(window.ns(TIMEOUT), ns);
    }
}

#[test]
fn work_that_takes_longer_ends_it() {
    let mut window = Window::default();
    window.work_came(0, TIMEOUT);
    assert_ne!(window.ns(TIMEOUT), 0);
    window.work_came(LIMIT + 1, TIMEOUT);
    assert_eq!(window.ns(TIMEOUT), 0);
}

#[test]
fn the_limit_is_that_of_now() {
    let mut window = Window::default();
    for _ in 0..64 {
        window.work_came(0, u32::MAX);
    }
    let most = u64::from(MAX_TIMEOUT) * 1000;
    assert_eq!(window.ns(u32::MAX), most);
    assert_eq!(window.ns(MAX_TIMEOUT), most);
    assert_eq!(window.ns(1), 1000);
    assert_eq!(window.ns(0), 0);

    // One that is shorter than what a window starts from.
    let mut window = Window::default();
    window.work_came(1000, 1);
    assert_eq!(window.ns(1), 1000);
    window.work_came(0, 0);
    assert_eq!(window.ns(u32::MAX), 0);
}

proptest! {
    /// A window is never above the limit, and of work that takes longer than that only the first is polled
    /// for.
    #[test]
    fn what_is_slow_is_polled_for_once(
        timeout in 0u32..2 * MAX_TIMEOUT,
        idle in prop::collection::vec(0u64..2_000_000, 0..100),
    ) {
        let limit = u64::from(timeout.min(MAX_TIMEOUT)) * 1000;
        let mut window = Window::default();
        let mut slow = true;
        for idle in idle {
            let ns = window.ns(timeout);
            prop_assert!(ns <= limit);
            prop_assert!(!slow || ns == 0);
            slow = idle > limit;
            window.work_came(idle, timeout);
        }
    }
}
