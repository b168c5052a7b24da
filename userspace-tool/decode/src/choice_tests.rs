// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/choice.rs`.

use crate::choice::{Choice, Handler};

/// Has so many kicks handled by whom it says, each finding what it finds. Returns how many the worker handled.
fn run(choice: &mut Choice, kicks: usize, kicker: usize, worker: usize) -> usize {
    let mut next = choice.handled(Handler::Kicker, 0);
    let mut by_worker = 0;
    for _ in 0..kicks {
        let found = match next {
            Handler::Kicker => kicker,
            Handler::Worker => {
                by_worker += 1;
                worker
            }
        };
        next = choice.handled(next, found);
    }
    by_worker
}

/// Has so many kicks handled, of which the task that kicks has to leave all that are its own to the worker. Returns how
/// many these were.
fn run_refused(choice: &mut Choice, kicks: usize, worker: usize) -> usize {
    let mut next = Handler::Kicker;
    let mut refused = 0;
    for _ in 0..kicks {
        next = match next {
            Handler::Kicker => {
                refused += 1;
                choice.refused()
            }
            Handler::Worker => choice.handled(Handler::Worker, worker),
        };
    }
    refused
}

#[test]
fn one_request_at_a_time_needs_no_worker() {
    let mut choice = Choice::default();
    assert!(run(&mut choice, 1000, 1, 1) < 30);
    // Less than one in a hundred, which would show in percentiles.
    assert!(run(&mut choice, 10_000, 1, 1) < 100);
}

#[test]
fn a_guest_that_goes_on_gets_the_worker() {
    let mut choice = Choice::default();
    for (kicker, worker) in [(1, 2), (2, 3), (1, 8), (2, 4), (4, 8), (1, 1000)] {
        run(&mut choice, 1000, kicker, worker);
        let by_worker = run(&mut choice, 10_000, kicker, worker);
        assert!(by_worker > 9800, "{kicker}, {worker}: {by_worker}");
    }
}

#[test]
fn what_the_worker_finds_only_after_some_kicks_counts() {
    let mut choice = Choice::default();
    let mut next = choice.handled(Handler::Kicker, 0);
    let (mut since, mut by_worker) = (0, 0);
    for _ in 0..1000 {
        since = match next {
            Handler::Kicker => 0,
            Handler::Worker => since + 1,
        };
        by_worker += usize::from(next == Handler::Worker);
        // Few in the first kicks, but for one of them, and then three for two.
        let found = [1, 1, 2, 1, 1, 2, 1, 2].get(since);
        next = choice.handled(next, *found.unwrap_or(&(1 + since % 2)));
    }
    assert!(by_worker > 900, "{by_worker}");
}

#[test]
fn kicks_for_many_need_no_worker() {
    let mut choice = Choice::default();
    for worker in [16, 32, 64] {
        run(&mut choice, 1000, 16, worker);
        assert!(run(&mut choice, 10_000, 16, worker) < 100, "{worker}");
    }
}

#[test]
fn it_follows_the_guest() {
    let mut choice = Choice::default();
    for _ in 0..5 {
        run(&mut choice, 300, 1, 20);
        assert!(run(&mut choice, 1000, 1, 20) > 950);
        run(&mut choice, 300, 1, 1);
        assert!(run(&mut choice, 1000, 1, 1) < 50);
    }
}

#[test]
fn after_a_pause_it_follows_the_guest_soon() {
    let mut choice = Choice::default();
    run(&mut choice, 5000, 1, 1);
    choice.paused();
    let by_worker = run(&mut choice, 200, 1, 20);
    assert!(by_worker > 120, "{by_worker}");
}

#[test]
fn a_guest_that_pauses_all_the_time_has_few_trials() {
    let mut choice = Choice::default();
    let mut by_worker = 0;
    for _ in 0..1000 {
        by_worker += run(&mut choice, 10, 1, 1);
        choice.paused();
    }
    // More than the first ones, and in the end less than one in a hundred.
    assert!((30..125).contains(&by_worker), "{by_worker}");
}

#[test]
fn what_is_refused_goes_to_the_worker_for_a_while() {
    let mut choice = Choice::default();
    let refused = run_refused(&mut choice, 1700, 1);
    assert!((50..=110).contains(&refused), "{refused}");
    run(&mut choice, 100, 1, 1);
    assert!(run(&mut choice, 1000, 1, 1) < 30);
}

#[test]
fn finding_nothing_says_nothing() {
    let mut choice = Choice::default();
    for _ in 0..1000 {
        assert_eq!(choice.handled(Handler::Worker, 0), Handler::Kicker);
    }
}

#[test]
fn any_number_may_be_found() {
    let mut choice = Choice::default();
    for n in 0..100_000_usize {
        let by = if n % 3 == 0 {
            Handler::Worker
        } else {
            Handler::Kicker
        };
        choice.handled(by, n.wrapping_mul(n) << (n % 40));
        choice.handled(by, usize::MAX);
    }
}

#[test]
fn what_is_refused_does_not_keep_the_worker_from_being_chosen() {
    let refused = run_refused(&mut Choice::default(), 2000, 30);
    assert!(refused < 12, "{refused}");
}

#[test]
fn what_was_found_is_forgotten_when_kicks_are_for_another_number() {
    let mut choice = Choice::default();
    assert!(run(&mut choice, 10_000, 1, 20) > 9_000);
    // Each finds as many from now on.
    choice.kicks_changed();
    let by_worker = run(&mut choice, 200, 8, 8);
    assert!((4..30).contains(&by_worker), "{by_worker}");
    choice.kicks_changed();
    let by_worker = run(&mut choice, 200, 16, 16);
    assert!((4..30).contains(&by_worker), "{by_worker}");
    choice.kicks_changed();
    let by_worker = run(&mut choice, 200, 1, 1);
    assert!((4..30).contains(&by_worker), "{by_worker}");
}
