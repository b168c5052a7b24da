// SPDX-License-Identifier: GPL-2.0

//! How many requests a guest is asked to add before it kicks.
//!
//! Pure code without kernel types, compiled again for the tests in user space.

use super::choice::Handler;

/// Most requests that it is asked to add.
pub(crate) const MOST: u16 = 16;

/// The shortest and the longest time that one of them waits for the others, in nanoseconds. Less than the shortest is
/// not worth a timer.
const SHORTEST: u64 = 20_000;
pub(crate) const LONGEST: u64 = 10_000_000;

/// Fewest and most kicks from one trial to the next: few after one that was worth it.
const SOON: u32 = STRETCH + 1;
const RARE: u32 = 4096;

/// Kicks over which the pace is measured, and that a trial takes, once or twice: not those that nobody asked for. After
/// so many such kicks it is given up.
const STRETCH: u32 = 16;
const MOST_UNASKED: u32 = 4 * STRETCH;

/// What more has to be faster by to be asked for: one part in so many of its pace.
const GAIN: u64 = 8;

/// The pace from which on it has to be so twice, in nanoseconds: who adds requests that rarely has them wait the longer
/// for each other if it was chance.
const RARELY: u64 = 500_000;

/// Kicks in time that make up for one that did not come.
const PRICE: u32 = 4;

/// The same if it has added nothing, so that nothing waited.
const PRICE_OF_NONE: u32 = 2;

/// Most kicks in time that can be set off against such that do not come.
const CREDIT: u32 = 4 * PRICE;

/// The average of what is found for a kick: the newest is one part in so many, and one request is so much.
const PARTS: u64 = 8;
const ONE: u64 = 16;

/// How many requests a guest is asked to add before it kicks.
///
/// A guest that does not wait for each request goes on adding them, but kicks for each one, and is interrupted for
/// each, where one is complete before the next is there. Asked to kick for several, it does both once for all. That
/// it does not wait shows when several are found for one kick. Whether it adds as many as are asked for, and gets more
/// done so, is tried, and tried again: the worker comes in time if it does not.
///
/// For whoever holds the virtqueue's mutex.
pub(crate) struct Threshold {
    /// Requests that are asked for now.
    requests: u16,
    /// Requests that were asked for before the trial that is on.
    before: Option<u16>,
    /// The pace in its first stretch, if it takes two; otherwise 0.
    first: u64,
    /// More is tried next, not less.
    more_next: bool,
    /// Several were found for a kick that nobody asked for, since it was seen last that the guest waits. That outlives
    /// a pause.
    goes_on: bool,
    /// Requests found for such a kick, on average.
    usual: u64,
    /// Kicks until a trial, and how many these were in the beginning.
    left: u32,
    interval: u32,
    /// Kicks that came in time, less what had to be made up for.
    credit: u32,
    /// Kicks that nobody asked for since it was said how many to ask for.
    unasked: u32,
    stretch: Stretch,
    /// Who is to handle the kicks that it measures.
    by: Handler,
    /// The pace below is theirs.
    is_measured: bool,
    /// Nanoseconds from a request to the next, while there may have been something to do, in the last two stretches
    /// without trials in vain; 0 if there was none.
    paces: [u64; 2],
}

/// Kicks over which the pace is measured.
#[derive(Default)]
struct Stretch {
    since: Option<u64>,
    /// Since when the guest may have nothing to do, and how long it may have had nothing to do before.
    idle_since: Option<u64>,
    idle: u64,
    /// Kicks that came in time, and requests that were found for any.
    kicks: u32,
    found: u64,
}

impl Stretch {
    /// Adds a kick. Returns the pace when the stretch is over: 0 if it is none.
    fn add(&mut self, found: u64, in_time: bool, now: u64) -> Option<u64> {
        let Some(since) = self.since else {
            self.since = Some(now);
            return None;
        };
        if let Some(idle_since) = self.idle_since.take() {
            self.idle = self.idle.wrapping_add(now.wrapping_sub(idle_since));
        }
        self.kicks += u32::from(in_time);
        self.found += found;
        if self.kicks < STRETCH {
            return None;
        }
        let elapsed = now.wrapping_sub(since);
        let pace = elapsed.saturating_sub(self.idle) / self.found.max(1);
        *self = Self {
            since: Some(now),
            ..Self::default()
        };
        // More is a pause, or the clock of another processor.
        let is_pace = elapsed < u64::from(STRETCH) * 2 * LONGEST;
        Some(if is_pace { pace.max(1) } else { 0 })
    }

    /// Adds what was found when it was time. If the disk has nothing to do any more, the guest may have nothing, either.
    fn add_late(&mut self, found: u64, is_idle: bool, now: u64) {
        if self.since.is_some() {
            self.found += found;
            self.idle_since = is_idle.then_some(now);
        }
    }
}

impl Default for Threshold {
    fn default() -> Self {
        Self {
            requests: 1,
            before: None,
            first: 0,
            more_next: true,
            goes_on: false,
            usual: ONE,
            left: SOON,
            interval: SOON,
            credit: 0,
            unasked: 0,
            stretch: Stretch::default(),
            by: Handler::Kicker,
            is_measured: false,
            paces: [0; 2],
        }
    }
}

impl Threshold {
    /// Learns that the guest paused before the last kick. What comes may be another load.
    pub(crate) fn paused(&mut self) {
        // Trials stay rare if they were in vain.
        let interval = if self.settled() > 1 {
            SOON
        } else {
            self.interval
        };
        *self = Self {
            goes_on: self.goes_on,
            interval,
            left: self.left.min(interval),
            ..Self::default()
        };
    }

    /// Learns that it could not be asked.
    pub(crate) fn cannot_ask(&mut self) {
        self.abandon_trial();
    }

    /// Whether it tries to ask for more or fewer.
    #[inline]
    pub(crate) fn is_trying(&self) -> bool {
        self.before.is_some()
    }

    /// How many requests it asks for, but for a trial that is on.
    #[inline]
    pub(crate) fn settled(&self) -> u16 {
        self.before.unwrap_or(self.requests)
    }

    /// Learns that the guest kicked for `found` requests, for how many it was `asked`, if it was, and who was to handle
    /// that. `now` is called where the time matters, and says the nanoseconds since some time.
    #[inline]
    pub(crate) fn kicked(
        &mut self,
        found: usize,
        asked: Option<u16>,
        by: Handler,
        now: impl FnOnce() -> u64,
    ) {
        let several = asked.is_none() && (2..MOST.into()).contains(&found);
        if found > 0 && (self.goes_on || several) {
            self.goes_on = true;
            self.came(found as u64, asked, by, now());
        }
    }

    fn came(&mut self, found: u64, asked: Option<u16>, by: Handler, now: u64) {
        if self.requests == 1 {
            self.usual = (self.usual * (PARTS - 1) + found * ONE + PARTS / 2) / PARTS;
        } else if asked.is_none_or(|asked| found < asked.into()) {
            self.stretch.add(found, false, now);
            self.unasked = self.unasked.saturating_add(1);
            if self.is_trying() && self.unasked > MOST_UNASKED {
                self.end_trial();
            }
            return;
        }
        if by != self.by {
            // It has its own pace.
            self.abandon_trial();
            self.by = by;
            self.stretch = Stretch::default();
            self.is_measured = false;
        }
        self.credit = (self.credit + 1).min(CREDIT);
        self.left = self.left.saturating_sub(1);
        match self.stretch.add(found, true, now) {
            Some(0) => self.abandon_trial(),
            Some(pace) => self.measured(pace),
            None => (),
        }
        if self.left == 0 && self.before.is_none() && self.is_measured {
            self.begin_trial();
        }
    }

    /// Learns the pace of a stretch.
    fn measured(&mut self, pace: u64) {
        let Some(before) = self.before else {
            self.paces = [pace, if self.is_measured { self.paces[0] } else { 0 }];
            self.is_measured = true;
            if self.requests > 1 && self.time(self.requests) > LONGEST {
                self.ask_for_fewer(self.requests / 2);
            }
            return;
        };
        // Who waits for others to be added has to gain by it.
        let usual = self.pace();
        let is_better = if self.requests > before {
            pace + pace / GAIN < usual
        } else {
            pace <= usual
        };
        if !is_better {
            return self.end_trial();
        }
        if self.requests > before && usual > RARELY && self.first == 0 {
            self.first = pace;
            self.unasked = 0;
            return;
        }
        self.before = None;
        self.paces = [pace, self.first];
        self.interval = SOON;
        // On in the same direction.
        self.more_next = !self.more_next;
        self.left = 1;
    }

    fn begin_trial(&mut self) {
        let more = self.more();
        let can_more = more <= MOST && self.time(more) <= LONGEST;
        let is_more = can_more && (self.more_next || self.requests == 1);
        if !is_more && self.requests == 1 {
            return;
        }
        self.more_next = !is_more;
        self.before = Some(self.requests);
        self.first = 0;
        self.ask_for(if is_more { more } else { self.requests / 2 });
    }

    /// Learns that the guest did not kick in time for as many as it was asked for, and had added `found`. All that it had
    /// is complete if `is_idle`. `now` is as for [`Threshold::kicked`].
    pub(crate) fn failed(&mut self, found: usize, is_idle: bool, now: impl FnOnce() -> u64) {
        if self.goes_on {
            self.stretch.add_late(found as u64, is_idle, now());
        }
        let price = if found == 0 { PRICE_OF_NONE } else { PRICE };
        if self.credit >= price {
            self.credit -= price;
            return;
        }
        // Who is late for fewer is late for more.
        let more_or_none = |before| found == 0 || before < self.requests;
        if self.before.is_some_and(more_or_none) {
            self.end_trial();
        } else {
            self.before = None;
            self.ask_for_fewer(self.requests / 2);
        }
        self.goes_on &= found == 0 || self.requests > 1;
    }

    /// Ends a trial that was not worth it.
    fn end_trial(&mut self) {
        self.interval = (2 * self.interval).min(RARE);
        self.abandon_trial();
    }

    fn abandon_trial(&mut self) {
        if let Some(before) = self.before.take() {
            self.ask_for_fewer(before);
            // It had come in time for as many.
            self.credit = PRICE;
        }
    }

    /// Asks for as many as these, unless that many come without being asked for.
    fn ask_for_fewer(&mut self, requests: u16) {
        let is_usual = u64::from(requests) * ONE <= self.usual + ONE / 2;
        self.ask_for(if is_usual { 1 } else { requests });
        self.left = self.interval;
    }

    fn ask_for(&mut self, requests: u16) {
        self.requests = requests;
        self.credit = 0;
        self.unasked = 0;
        self.stretch = Stretch::default();
    }

    /// How many requests to ask for, and after how many nanoseconds to look whatever was added; `None` if the guest
    /// is to kick for each.
    #[inline]
    pub(crate) fn next(&self) -> Option<(u16, u64)> {
        (self.requests > 1).then(|| {
            let time = self.time(self.requests);
            (self.requests, time.clamp(SHORTEST, LONGEST))
        })
    }

    /// Nanoseconds that a guest gets for so many: twice what it takes.
    fn time(&self, requests: u16) -> u64 {
        2 * self.pace() * u64::from(requests)
    }

    /// The pace without trials: the better of two stretches, as one may have been interrupted.
    fn pace(&self) -> u64 {
        match self.paces {
            [one, 0] | [0, one] => one,
            [one, other] => one.min(other),
        }
    }

    /// The next larger number to ask for.
    fn more(&self) -> u16 {
        if self.requests > 1 {
            2 * self.requests
        } else {
            // CAST: At most `MOST`.
            (((self.usual + ONE / 2) / ONE).min(MOST.into()) as u16 + 1).next_power_of_two()
        }
    }
}
