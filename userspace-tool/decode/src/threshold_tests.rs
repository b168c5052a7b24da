// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/threshold.rs`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::choice::Handler;
use crate::threshold::{Threshold, LONGEST, MOST};

/// Makes the next pseudorandom number of one that is not 0.
fn shuffle(random: &mut u64) {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
}

/// A guest on a disk that is done when the kick returns.
#[derive(Clone, Copy)]
struct Guest {
    /// Requests that it adds for one kick if it is not asked for more, and before it waits for the first.
    usual: u32,
    most: u32,
    /// Nanoseconds for each, and for a kick as many as for so many of them.
    pace: u64,
}

const KICK: u64 = 4;

/// What came of it.
#[derive(Debug, Default)]
struct Seen {
    requests: u64,
    kicks: u64,
    late: u64,
    /// Nanoseconds that were waited for in vain.
    waited: u64,
}

const MICROSECOND: u64 = 1000;

impl Guest {
    /// Lets it kick so many times, or be looked at without, from a time on.
    fn run(self, threshold: &mut Threshold, now: &mut u64, times: usize) -> Seen {
        let mut seen = Seen::default();
        for _ in 0..times {
            let asked = threshold.next();
            let wanted = requests(threshold);
            if wanted > self.most {
                let within = asked.map_or(0, |(_, within)| within);
                seen.late += 1;
                seen.waited += within;
                *now += within;
                seen.requests += u64::from(self.most);
                threshold.failed(self.most as usize, true, || *now);
                continue;
            }
            let found = wanted.next_multiple_of(self.usual);
            seen.kicks += 1;
            *now += (KICK + u64::from(found)) * self.pace;
            seen.requests += u64::from(found);
            kicked(threshold, found as usize, *now);
        }
        seen
    }
}

/// The guest has kicked for so many requests, as it was asked to.
fn kicked(threshold: &mut Threshold, found: usize, now: u64) {
    let asked = threshold.next().map(|(requests, _)| requests);
    threshold.kicked(found, asked, Handler::Kicker, || now);
}

/// It has kicked for so many that nobody asked for.
fn unasked(threshold: &mut Threshold, found: usize, now: u64) {
    threshold.kicked(found, None, Handler::Kicker, || now);
}

/// How many it says now.
fn requests(threshold: &Threshold) -> u32 {
    threshold.next().map_or(1, |(requests, _)| requests.into())
}

/// Several were found for a kick, as a worker may that came late, or a guest that added several at once.
fn shown(threshold: &mut Threshold) {
    unasked(threshold, 2, 0);
}

/// A guest that goes on whatever happens.
const GOES_ON: Guest = Guest {
    usual: 1,
    most: 32,
    pace: 5 * MICROSECOND,
};

/// A threshold that has learned that the guest goes on, and the time.
fn learned() -> (Threshold, u64) {
    let mut threshold = Threshold::default();
    let mut now = 0;
    shown(&mut threshold);
    GOES_ON.run(&mut threshold, &mut now, 1000);
    assert_eq!(requests(&threshold), u32::from(MOST));
    assert_eq!(threshold.settled(), MOST);
    (threshold, now)
}

#[test]
fn one_request_at_a_time_is_never_held_up() {
    let mut threshold = Threshold::default();
    let guest = Guest { most: 1, ..GOES_ON };
    let seen = guest.run(&mut threshold, &mut 0, 100_000);
    assert_eq!(seen.late, 0, "{seen:?}");
    assert!(threshold.next().is_none());
}

#[test]
fn the_clock_is_not_read_for_one_request_at_a_time() {
    let mut threshold = Threshold::default();
    // One, none, and as many as that without being asked for.
    for found in [1, 0, MOST.into()] {
        threshold.kicked(found, None, Handler::Kicker, || {
            unreachable!("nobody needs it")
        });
    }
}

#[test]
fn a_guest_that_goes_on_kicks_for_several() {
    for most in [MOST.into(), 32, 256] {
        for pace in [1, 5, 200] {
            let mut threshold = Threshold::default();
            let mut now = 0;
            let guest = Guest {
                most,
                pace: pace * MICROSECOND,
                ..GOES_ON
            };
            shown(&mut threshold);
            guest.run(&mut threshold, &mut now, 200);
            let seen = guest.run(&mut threshold, &mut now, 10_000);
            assert_eq!(seen.late, 0, "{pace}: {seen:?}");
            // But for trials of less.
            assert!(10 * seen.requests > 75 * seen.kicks, "{pace}: {seen:?}");
        }
    }
}

#[test]
fn no_more_is_asked_for_than_the_guest_adds() {
    for most in 2..MOST.into() {
        let mut threshold = Threshold::default();
        let mut now = 0;
        let guest = Guest { most, ..GOES_ON };
        shown(&mut threshold);
        let first = guest.run(&mut threshold, &mut now, 400);
        assert!(first.late < 8, "{most}: {first:?}");
        let seen = guest.run(&mut threshold, &mut now, 20_000);
        // Not more than one in a thousand.
        assert!(1000 * seen.late < seen.kicks, "{most}: {seen:?}");
        assert!(
            seen.requests > seen.kicks * u64::from(most) / 2,
            "{most}: {seen:?}"
        );
    }
}

#[test]
fn what_comes_without_being_asked_for_is_not_asked_for() {
    for usual in 2..MOST.into() {
        let mut threshold = Threshold::default();
        let mut now = 0;
        let guest = Guest {
            usual,
            most: usual,
            pace: 5 * MICROSECOND,
        };
        guest.run(&mut threshold, &mut now, 1000);
        let seen = guest.run(&mut threshold, &mut now, 20_000);
        assert!(seen.late < 10, "{usual}: {seen:?}");
        // It is not asked, or for what comes anyway.
        let requests = requests(&threshold);
        assert!(
            requests == 1 || requests == usual && usual >= 8,
            "{usual}: {requests}"
        );
    }
}

#[test]
fn a_guest_that_begins_to_wait_is_held_up_a_few_times() {
    let (mut threshold, mut now) = learned();
    let waits = Guest {
        usual: 1,
        most: 1,
        pace: 20 * MICROSECOND,
    };
    let seen = waits.run(&mut threshold, &mut now, 10_000);
    assert!(seen.late < 10, "{seen:?}");
    assert!(seen.waited < 1500 * MICROSECOND, "{seen:?}");
    assert!(threshold.next().is_none());
}

#[test]
fn a_slow_guest_is_not_asked() {
    let mut threshold = Threshold::default();
    shown(&mut threshold);
    let guest = Guest {
        pace: LONGEST / (4 * (1 + KICK)) + 1,
        ..GOES_ON
    };
    guest.run(&mut threshold, &mut 0, 1000);
    assert!(threshold.next().is_none());
}

#[test]
fn nothing_waits_longer_than_it_may() {
    let mut threshold = Threshold::default();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut now = 0u64;
    let mut asked = 0;
    for n in 0..1_000_000 {
        shuffle(&mut random);
        // Clocks of other processors, and pauses, among them.
        now = match random % 1000 {
            0 => random,
            1 => now.wrapping_sub(random % 10_000),
            _ => now.wrapping_add(random % 20_000),
        };
        let wanted = threshold.next();
        if let Some((requests, within)) = wanted {
            asked += 1;
            assert!((2..=MOST).contains(&requests) && (1..=LONGEST).contains(&within));
            if (random >> 40) % 4 == 0 {
                threshold.cannot_ask();
            }
        }
        let by = if (random >> 44) % 100 == 0 {
            Handler::Worker
        } else {
            Handler::Kicker
        };
        // Now a guest that goes on, then one that does anything.
        let found = if n % 2000 < 1000 {
            wanted.map_or(n % 2 + 1, |(requests, _)| requests as usize)
        } else {
            (random >> 32) as usize % 20
        };
        if (random >> 48) % 20 == 0 {
            threshold.failed(found, true, || now);
        } else {
            let wanted = wanted.map(|(requests, _)| requests);
            threshold.kicked(found, wanted, by, || now);
        }
    }
    assert!(asked > 100, "{asked}");
}

#[test]
fn who_is_late_each_few_times_is_not_asked() {
    for done_at_once in [1, 2, 3] {
        let mut threshold = Threshold::default();
        let mut now = 0;
        let mut asked = 0;
        for n in 0..10_000 {
            now += 5 * MICROSECOND;
            if n % (done_at_once + 1) == 0 {
                threshold.failed(1, true, || now);
            } else {
                kicked(&mut threshold, 2, now);
            }
            asked += u32::from(threshold.next().is_some());
        }
        assert_eq!(asked, 0, "{done_at_once}");
    }
}

#[test]
fn a_guest_that_has_little_to_do_is_not_asked_for_long() {
    let (mut threshold, mut now) = learned();
    let mut looks = 0;
    for _ in 0..100 {
        now += LONGEST;
        // It was asked, and added nothing in time. Then it kicks for one, as nobody asked for more.
        if threshold.next().is_some() {
            threshold.failed(0, true, || now);
            looks += 1;
        }
        unasked(&mut threshold, 1, now);
    }
    assert!(looks < 16, "{looks}");
}

#[test]
fn kicks_that_nobody_asked_for_make_up_for_nothing() {
    let (mut threshold, mut now) = learned();
    let mut late = 0;
    for _ in 0..100 {
        // Large ones, for which it is not asked to wait, and a small one.
        for _ in 0..4 {
            now += 10 * MICROSECOND;
            threshold.cannot_ask();
            unasked(&mut threshold, 1, now);
        }
        if threshold.next().is_some() {
            threshold.failed(1, true, || now);
            late += 1;
        }
    }
    assert!(late < 10, "{late}");
}

/// Lets a guest that goes on kick so many times, whose pace depends on what it is asked for, and is disturbed for a
/// millisecond once in so many kicks. Returns how many requests there were for a kick, in hundredths.
fn paced(
    threshold: &mut Threshold,
    now: &mut u64,
    kicks: u32,
    disturbed: u32,
    pace: impl Fn(u32) -> u64,
) -> u64 {
    let mut found = 0;
    for n in 1..=kicks {
        let wanted = requests(threshold);
        found += u64::from(wanted);
        *now += u64::from(wanted) * pace(wanted);
        if n % disturbed == 0 {
            *now += 1000 * MICROSECOND;
        }
        kicked(threshold, wanted as usize, *now);
        if n % 512 == 0 {
            shown(threshold);
        }
    }
    100 * found / u64::from(kicks)
}

#[test]
fn what_makes_it_slower_is_not_asked_for() {
    for (slower, disturbed) in [
        (15, u32::MAX),
        (15, 1000),
        (15, 100),
        (11, u32::MAX),
        (11, 1000),
    ] {
        // As of several who wait for each other: each step makes it slower.
        let pace = |wanted: u32| 10 * MICROSECOND * (slower_by(slower, wanted)) / 1000;
        let mut threshold = Threshold::default();
        let mut now = 0;
        shown(&mut threshold);
        paced(&mut threshold, &mut now, 1000, disturbed, pace);
        let found = paced(&mut threshold, &mut now, 50_000, disturbed, pace);
        assert!(found < 110, "{slower}, {disturbed}: {found}");
    }
}

/// The thousandths that it takes if each step takes `slower` tenths of the time of the one before.
fn slower_by(slower: u64, wanted: u32) -> u64 {
    (0..wanted.ilog2()).fold(1000, |pace, _| pace * slower / 10)
}

#[test]
fn a_guest_that_is_faster_without_it_is_asked_no_more() {
    let (mut threshold, mut now) = learned();
    // It is late for nothing, but each step makes it slower.
    let pace = |wanted| 10 * MICROSECOND * slower_by(15, wanted) / 1000;
    paced(&mut threshold, &mut now, 10_000, u32::MAX, pace);
    let found = paced(&mut threshold, &mut now, 10_000, u32::MAX, pace);
    assert!(found < 110, "{found}");
}

#[test]
fn what_makes_it_faster_is_found_though_it_is_disturbed() {
    // An exit for each kick.
    let pace = |wanted| 2 * MICROSECOND + 4 * MICROSECOND / u64::from(wanted);
    for disturbed in [u32::MAX, 1000, 200] {
        let mut threshold = Threshold::default();
        let mut now = 0;
        shown(&mut threshold);
        paced(&mut threshold, &mut now, 5000, disturbed, pace);
        let found = paced(&mut threshold, &mut now, 50_000, disturbed, pace);
        assert!(found > 700, "{disturbed}: {found}");
    }
}

#[test]
fn who_is_late_for_many_is_asked_for_fewer() {
    let (mut threshold, mut now) = learned();
    let guest = Guest {
        most: 5,
        pace: 200 * MICROSECOND,
        ..GOES_ON
    };
    guest.run(&mut threshold, &mut now, 1000);
    let seen = guest.run(&mut threshold, &mut now, 1000);
    assert!(seen.late < 20, "{seen:?}");
    assert!(seen.requests > 3 * seen.kicks, "{seen:?}");
    // It has time for them.
    let (requests, within) = threshold.next().unwrap();
    assert!(within > u64::from(requests) * guest.pace);
}

#[test]
fn what_it_does_is_remembered_over_a_pause() {
    let (mut threshold, mut now) = learned();
    threshold.paused();
    assert!(threshold.next().is_none());
    // Nobody has to show it again.
    GOES_ON.run(&mut threshold, &mut now, 150);
    assert_eq!(threshold.settled(), MOST);
    // One that waits is held up once, however often it pauses.
    let waits = Guest { most: 1, ..GOES_ON };
    let mut late = 0;
    for _ in 0..100 {
        threshold.paused();
        late += waits.run(&mut threshold, &mut now, 100).late;
    }
    assert_eq!(late, 1);
}

/// Lets a guest kick so many times for what it is asked for, each step of which makes it slower by half, whoever
/// handles that. Returns the most that it was asked for.
fn slower(threshold: &mut Threshold, now: &mut u64, by: Handler, kicks: u32, pace: u64) -> u32 {
    let mut most = 1;
    for _ in 0..kicks {
        let wanted = requests(threshold);
        most = most.max(wanted);
        *now += u64::from(wanted) * pace * slower_by(15, wanted) / 1000;
        let asked = threshold.next().map(|(requests, _)| requests);
        threshold.kicked(wanted as usize, asked, by, || *now);
    }
    most
}

#[test]
fn a_trial_is_measured_by_the_pace_of_who_handles_it() {
    let mut threshold = Threshold::default();
    let mut now = 0;
    shown(&mut threshold);
    // The pace of the slower one, and then a trial of the faster one, which is better than that.
    slower(
        &mut threshold,
        &mut now,
        Handler::Kicker,
        16,
        20 * MICROSECOND,
    );
    let most = slower(
        &mut threshold,
        &mut now,
        Handler::Worker,
        1000,
        5 * MICROSECOND,
    );
    assert_eq!(most, 2);
}

#[test]
fn who_comes_in_the_middle_of_a_trial_ends_it() {
    let mut threshold = Threshold::default();
    let mut now = 0;
    shown(&mut threshold);
    while !threshold.is_trying() {
        GOES_ON.run(&mut threshold, &mut now, 1);
    }
    assert_eq!(threshold.settled(), 1);
    let asked = threshold.next().map(|(requests, _)| requests);
    threshold.kicked(2, asked, Handler::Worker, || now);
    assert!(!threshold.is_trying());
    // Nothing is known of its pace.
    slower(&mut threshold, &mut now, Handler::Worker, 15, MICROSECOND);
    assert!(!threshold.is_trying());
}

#[test]
fn a_look_in_vain_now_and_then_is_no_reason_to_ask_for_less() {
    let (mut threshold, mut now) = learned();
    let mut found = 0;
    for _ in 0..1000 {
        found += GOES_ON.run(&mut threshold, &mut now, 7).requests;
        threshold.failed(0, true, || now);
        unasked(&mut threshold, 1, now);
    }
    assert!(found > 7 * 1000 * 7, "{found}");
}

#[test]
fn a_trial_is_over_soon() {
    // Nobody else learns anything meanwhile.
    let mut threshold = Threshold::default();
    let mut now = 0;
    let mut trying = 0;
    let mut trials = 0;
    shown(&mut threshold);
    for n in 0..100_000 {
        // Each is late now and then, more or less often.
        if n % 100 < n / 1000 && requests(&threshold) > 1 {
            threshold.failed(1, true, || now);
        } else {
            GOES_ON.run(&mut threshold, &mut now, 1);
        }
        trying = if threshold.is_trying() { trying + 1 } else { 0 };
        trials += u32::from(trying == 1);
        assert!(trying < 128, "{n}");
    }
    assert!(trials > 10, "{trials}");
}

#[test]
fn a_guest_that_kicks_unasked_ends_a_trial() {
    let mut threshold = Threshold::default();
    let mut now = 0;
    shown(&mut threshold);
    let (mut trying, mut trials) = (0, 0);
    for _ in 0..100_000 {
        now += GOES_ON.pace;
        // It may be asked for more, and kicks for one.
        kicked(&mut threshold, 1, now);
        trying = if threshold.is_trying() { trying + 1 } else { 0 };
        assert!(trying < 100);
        trials += u32::from(trying == 1);
    }
    assert!(trials > 2, "{trials}");
}

/// Lets requests come when they come, whoever is interested in them: `next` says after how many nanoseconds. Returns how
/// many nanoseconds the first ones waited for others, for each request.
fn waits_for_others(mut next: impl FnMut() -> u64) -> u64 {
    let mut threshold = Threshold::default();
    let (mut now, mut at) = (0u64, next());
    let (mut requests, mut waited) = (0, 0);
    for n in 0..20_000 {
        let asked = threshold.next();
        let (wanted, until) = asked.map_or((1, u64::MAX), |(wanted, ns)| (wanted, now + ns));
        let begin = at;
        let mut found = 0;
        while found < wanted && at <= until {
            now = now.max(at);
            found += 1;
            at += next();
        }
        if found < wanted {
            now = until;
            threshold.failed(found.into(), true, || now);
            if found == 0 {
                // Nobody asked for the next one.
                now = at;
                at += next();
                requests += 1;
                unasked(&mut threshold, 1, now);
            }
        } else {
            let asked = asked.map(|(wanted, _)| wanted);
            threshold.kicked(found.into(), asked, Handler::Kicker, || now);
        }
        requests += u64::from(found);
        waited += now.saturating_sub(begin);
        if n % 100 == 0 {
            unasked(&mut threshold, 2, now);
        }
    }
    waited / requests
}

#[test]
fn who_is_not_faster_for_it_does_not_wait_for_others() {
    // At random, so far apart on average.
    for apart in [30, 300, 700, 1000, 2000, 2400].map(|us| us * MICROSECOND) {
        let waited: Vec<_> = (1..50)
            .map(|seed| {
                let mut random = seed;
                waits_for_others(|| {
                    shuffle(&mut random);
                    (random % apart) + ((random >> 32) % apart)
                })
            })
            .collect();
        let mean = waited.iter().sum::<u64>() / waited.len() as u64;
        assert!(mean < 40 * MICROSECOND, "{apart}: {mean}, {waited:?}");
    }

    // Several at once, and then none for a while.
    for most in [4, 16, 33] {
        let mut n = 0;
        let waited = waits_for_others(|| {
            n += 1;
            (if n % most == 0 { 1000 } else { 5 }) * MICROSECOND
        });
        assert!(waited < 10 * MICROSECOND, "{most}: {waited}");
    }
}

#[test]
fn who_becomes_slow_is_asked_for_fewer() {
    let (mut threshold, mut now) = learned();
    // As many come in time, but only just.
    let guest = Guest {
        pace: LONGEST / (u64::from(MOST) + KICK),
        ..GOES_ON
    };
    guest.run(&mut threshold, &mut now, 200);
    assert!(2 * u64::from(requests(&threshold)) * guest.pace <= LONGEST);
}

#[test]
fn trials_go_on_over_pauses() {
    let mut threshold = Threshold::default();
    let mut now = 0;
    shown(&mut threshold);
    let mut burst = |threshold: &mut Threshold, goes_on: bool| {
        threshold.paused();
        now += 1000 * MICROSECOND;
        if goes_on {
            GOES_ON.run(threshold, &mut now, 1000);
        } else {
            slower(threshold, &mut now, Handler::Kicker, 1000, 5 * MICROSECOND);
        }
        threshold.settled()
    };
    for _ in 0..100 {
        burst(&mut threshold, false);
    }
    assert_eq!(threshold.settled(), 1);
    let settled = (0..10).map(|_| burst(&mut threshold, true));
    assert_eq!(settled.max(), Some(MOST));
}

/// A disk that takes so many nanoseconds for a request, on average.
#[derive(Clone, Copy, Debug)]
enum Disk {
    /// Whatever else it has to do.
    Parallel(u64),
    /// One after the other.
    Serial(u64),
    /// As the first one, but nothing is done for a while now and then.
    Stalls(u64),
}

/// Requests that a disk has.
struct InFlight {
    disk: Disk,
    random: u64,
    busy_until: u64,
    ends: BinaryHeap<Reverse<u64>>,
}

impl InFlight {
    fn new(disk: Disk) -> Self {
        Self {
            disk,
            random: 0x9e37_79b9_7f4a_7c15,
            busy_until: 0,
            ends: BinaryHeap::new(),
        }
    }

    /// As many nanoseconds, on average.
    fn around(&mut self, average: u64) -> u64 {
        shuffle(&mut self.random);
        average / 2 + self.random % average.max(1)
    }

    fn add(&mut self, now: u64) {
        let end = match self.disk {
            Disk::Parallel(average) => now + self.around(average),
            Disk::Serial(average) => {
                self.busy_until = self.busy_until.max(now) + self.around(average);
                self.busy_until
            }
            Disk::Stalls(average) => {
                let end = now + self.around(average);
                if (self.random >> 40) % 64 == 0 {
                    self.busy_until = now + 50 * average;
                }
                self.busy_until.max(end)
            }
        };
        self.ends.push(Reverse(end));
    }

    /// When the next one ends.
    fn next(&self) -> u64 {
        self.ends.peek().map_or(u64::MAX, |end| end.0)
    }

    /// Takes those that have ended. Returns how many they are.
    fn take(&mut self, now: u64) -> usize {
        let before = self.ends.len();
        while self.next() <= now {
            self.ends.pop();
        }
        before - self.ends.len()
    }

    fn is_idle(&self, now: u64) -> bool {
        self.ends.iter().all(|end| end.0 <= now)
    }
}

/// A guest that adds as many requests as it may have.
struct Busy {
    depth: usize,
    /// And then waits for all of them.
    waits: bool,
    disk: Disk,
    /// Nanoseconds of the guest for a request; for a kick and for an interrupt it takes as many as for [`KICK`] of
    /// them.
    pace: u64,
    /// Nanoseconds from a kick until somebody looks at the ring.
    wake: u64,
}

impl Busy {
    /// Lets it have so many requests done, asked for several only if it `learns`. Returns how many nanoseconds that
    /// takes.
    fn run(&self, learns: bool, requests: usize) -> u64 {
        let mut threshold = Threshold::default();
        if learns {
            shown(&mut threshold);
        }
        let (mut now, mut done, mut waiting, mut adds) = (0, 0, 0, true);
        let mut in_flight = InFlight::new(self.disk);
        // What it is asked for, and until when; and when somebody looks since it has kicked.
        let mut asked: Option<(u16, u64)> = None;
        let mut kicked = None;
        while done < requests {
            let until = kicked.or(asked.map(|(_, until)| until));
            let wanted = asked.map_or(1, |(wanted, _)| wanted.into());
            let has = in_flight.ends.len() + waiting;
            adds = has == 0 || (has < self.depth && (adds || !self.waits));
            if until.is_some_and(|until| until <= now) {
                // As the driver: it submits and asks before it learns.
                for _ in 0..waiting {
                    in_flight.add(now);
                }
                let next = threshold.next();
                let is_late = waiting < wanted;
                if is_late {
                    threshold.failed(waiting, in_flight.is_idle(now), || now);
                } else {
                    let asked = asked.map(|(wanted, _)| wanted);
                    threshold.kicked(waiting, asked, Handler::Kicker, || now);
                }
                asked = next
                    .filter(|_| learns && !is_late)
                    .map(|(wanted, ns)| (wanted, now + ns));
                kicked = None;
                waiting = 0;
            } else if kicked.is_none() && waiting >= wanted {
                now += KICK * self.pace;
                kicked = Some(now + self.wake);
            } else if in_flight.next() <= now {
                done += in_flight.take(now);
                now += KICK * self.pace;
            } else if adds {
                now += in_flight.around(self.pace);
                waiting += 1;
            } else {
                now = now.max(until.unwrap_or(u64::MAX).min(in_flight.next()));
            }
        }
        now
    }
}

#[test]
fn a_disk_that_takes_its_time_is_worth_waiting_for_only_if_more_is_done() {
    let mut faster = 0;
    for average in [3, 30, 100, 1000, 10_000].map(|us| us * MICROSECOND) {
        for disk in [
            Disk::Parallel(average),
            Disk::Serial(average),
            Disk::Stalls(average),
        ] {
            for depth in [1, 2, 3, 4, 8, 19, 32, 128] {
                for (waits, wake) in [(false, 0), (false, 20), (true, 0), (true, 20)] {
                    let guest = Busy {
                        depth,
                        waits,
                        disk,
                        pace: 5 * MICROSECOND,
                        wake: wake * MICROSECOND,
                    };
                    let never = guest.run(false, 20_000);
                    let asked = guest.run(true, 20_000);
                    // But for trials.
                    assert!(
                        100 * asked < 104 * never,
                        "{disk:?}, {depth}, {waits}, {wake}: {asked}, {never}"
                    );
                    faster += u32::from(average >= 100 * MICROSECOND && 10 * asked < 8 * never);
                }
            }
        }
    }
    assert!(faster > 10, "{faster}");
}
