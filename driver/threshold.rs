// SPDX-License-Identifier: GPL-2.0

//! How many requests a guest is asked to add before it kicks.
//!
//! Pure code without kernel types, compiled again for the tests in user space.

/// Most requests that it is asked to add.
pub(crate) const MOST: u32 = 8;

/// The shortest and the longest time that one of them waits for the others, in nanoseconds. Less than the shortest is
/// not worth a timer.
const SHORTEST: u64 = 20_000;
pub(crate) const LONGEST: u64 = 2_000_000;

/// Fewest and most kicks from one trial to the next: few after one that was worth it.
const SOON: u32 = 2 * STRETCH + 1;
const RARE: u32 = 4096;

/// Kicks over which the pace is measured, and that a trial takes.
const STRETCH: u32 = 16;

/// Kicks in time that make up for one that did not come.
const PRICE: u32 = 4;

/// Most kicks in time that can be set off against such that do not come.
const CREDIT: u32 = 4 * PRICE;

/// The average of what is found for a kick: the newest is one part in so many, and one request is so much.
const PARTS: u64 = 8;
const ONE: u64 = 16;

/// How many requests a guest is asked to add before it kicks.
///
/// A guest that does not wait for each request goes on adding them, but kicks for each one, and is interrupted for
/// each, where one is complete before the next is there. Asked to kick for several, it does both once for all. That
/// it does not wait shows when several are found for one kick. Whether it adds as many as are asked for, and gets no
/// less done so, is tried, and tried again: the worker comes in time if it does not.
///
/// For whoever holds the virtqueue's mutex.
pub(crate) struct Threshold {
    /// Requests that are asked for now.
    requests: u32,
    /// Requests that the guest was asked for last, if it has not kicked since.
    asked: Option<u32>,
    /// Requests that were asked for before the trial that is on.
    before: Option<u32>,
    /// More is tried next, not less.
    more_next: bool,
    /// Several were found for a kick that nobody asked for, since it was seen last that the guest waits.
    goes_on: bool,
    /// Requests found for such a kick, on average.
    usual: u64,
    /// Kicks until a trial, and how many these were in the beginning.
    left: u32,
    interval: u32,
    /// Kicks that came in time, less what had to be made up for.
    credit: u32,
    stretch: Stretch,
    /// Nanoseconds from a request to the next, in the last two stretches without trials in vain; 0 if unknown.
    paces: [u64; 2],
}

/// Kicks over which the pace is measured.
#[derive(Default)]
struct Stretch {
    since: Option<u64>,
    kicks: u32,
    found: u64,
}

impl Stretch {
    /// Adds a kick. Returns the pace when the stretch is over: 0 if it is none.
    fn add(&mut self, found: u64, now: u64) -> Option<u64> {
        let Some(since) = self.since else {
            self.since = Some(now);
            return None;
        };
        self.kicks += 1;
        self.found += found;
        if self.kicks < STRETCH {
            return None;
        }
        let elapsed = now.wrapping_sub(since);
        // More is a pause, or the clock of another processor.
        let is_pace = elapsed < u64::from(STRETCH) * 2 * LONGEST;
        let pace = (elapsed / self.found.max(1)).max(1);
        *self = Self {
            since: Some(now),
            ..Self::default()
        };
        Some(if is_pace { pace } else { 0 })
    }
}

impl Default for Threshold {
    fn default() -> Self {
        Self {
            requests: 1,
            asked: None,
            before: None,
            more_next: true,
            goes_on: false,
            usual: ONE,
            left: SOON,
            interval: SOON,
            credit: 0,
            stretch: Stretch::default(),
            paces: [0; 2],
        }
    }
}

impl Threshold {
    /// Learns how many requests the guest was asked for after [`Threshold::next`] said how many to ask for: `None` if
    /// it was not asked.
    pub(crate) fn asked(&mut self, requests: Option<u32>) {
        self.asked = requests;
        if requests.is_none() {
            // That says nothing.
            self.abandon_trial();
        }
    }

    /// Learns that the guest kicked for `found` requests, and that they are complete. `now` is called where the time
    /// matters, and says the nanoseconds since some time.
    #[inline]
    pub(crate) fn kicked(&mut self, found: usize, now: impl FnOnce() -> u64) {
        let asked = self.asked.take();
        let several = asked.is_none() && (2..MOST as usize).contains(&found);
        if found > 0 && (self.goes_on || several) {
            self.goes_on = true;
            self.came(found as u64, asked, now());
        }
    }

    fn came(&mut self, found: u64, asked: Option<u32>, now: u64) {
        if self.requests == 1 {
            self.usual = (self.usual * (PARTS - 1) + found * ONE + PARTS / 2) / PARTS;
        } else if asked.is_none_or(|asked| found < asked.into()) {
            // Nobody asked for that kick.
            return;
        }
        self.credit = (self.credit + 1).min(CREDIT);
        self.left = self.left.saturating_sub(1);
        if let Some(pace) = self.stretch.add(found, now) {
            self.measured(pace);
        }
        if self.left == 0 && self.before.is_none() {
            self.begin_trial();
        }
    }

    /// Learns the pace of a stretch.
    fn measured(&mut self, pace: u64) {
        let Some(before) = self.before else {
            self.paces = [pace, self.paces[0]];
            return;
        };
        if pace == 0 {
            return self.abandon_trial();
        }
        // Kicks for more requests cost less; fewer have to be worth it.
        let usual = self.pace();
        let is_better = if self.requests > before {
            pace <= usual
        } else {
            pace + pace / 8 < usual
        };
        if !is_better {
            return self.end_trial();
        }
        self.before = None;
        self.paces = [pace, 0];
        self.interval = SOON;
        // On in the same direction.
        self.more_next = !self.more_next;
        self.left = 1;
    }

    fn begin_trial(&mut self) {
        let more = self.more();
        let can_more = more <= MOST && self.pace() != 0 && self.pace() * u64::from(more) <= LONGEST;
        let is_more = can_more && (self.more_next || self.requests == 1);
        if !is_more && self.requests == 1 {
            return;
        }
        self.more_next = !is_more;
        self.before = Some(self.requests);
        self.ask_for(if is_more { more } else { self.requests / 2 });
    }

    /// Learns that it was wrong, or would be, to ask for several: the guest did not kick in time, and had added `found`
    /// requests, or may wait for one that is in flight.
    pub(crate) fn failed(&mut self, found: usize) {
        self.asked = None;
        self.stretch.found += found as u64;
        if self.credit >= PRICE {
            self.credit -= PRICE;
        } else if self.before.is_some() {
            self.end_trial();
        } else {
            self.ask_for_fewer(self.requests / 2);
        }
    }

    /// Ends a trial that was not worth it.
    fn end_trial(&mut self) {
        self.interval = (2 * self.interval).min(RARE);
        self.abandon_trial();
    }

    fn abandon_trial(&mut self) {
        if let Some(before) = self.before.take() {
            self.ask_for_fewer(before);
        }
    }

    /// Asks for as many as these, unless that many come without being asked for.
    fn ask_for_fewer(&mut self, requests: u32) {
        let is_usual = u64::from(requests) * ONE <= self.usual + ONE / 2;
        self.ask_for(if is_usual { 1 } else { requests });
        self.left = self.interval;
        self.goes_on = self.requests > 1;
    }

    fn ask_for(&mut self, requests: u32) {
        self.requests = requests;
        self.credit = 0;
        self.stretch = Stretch::default();
    }

    /// How many requests to ask for, and after how many nanoseconds to look whatever was added; `None` if the guest
    /// is to kick for each.
    #[inline]
    pub(crate) fn next(&self) -> Option<(u32, u64)> {
        (self.requests > 1).then(|| {
            let time = 2 * self.pace() * u64::from(self.requests);
            (self.requests, time.clamp(SHORTEST, LONGEST))
        })
    }

    /// The pace without trials: the better of two stretches, as one may have been interrupted.
    fn pace(&self) -> u64 {
        match self.paces {
            [one, 0] | [0, one] => one,
            [one, other] => one.min(other),
        }
    }

    /// The next larger number to ask for.
    fn more(&self) -> u32 {
        if self.requests > 1 {
            2 * self.requests
        } else {
            // CAST: At most `MOST`.
            (((self.usual + ONE / 2) / ONE).min(MOST.into()) as u32 + 1).next_power_of_two()
        }
    }
}
