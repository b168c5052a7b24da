// SPDX-License-Identifier: GPL-2.0

//! Who handles a kick: the task that kicks, or the worker.
//!
//! Pure code without kernel types, compiled again for the tests in user space.

/// Who handled a kick, or is to.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Handler {
    /// The task that kicks.
    Kicker,
    /// The worker.
    Worker,
}

/// Most and fewest kicks between two trials. Fewer after a change.
const MOST: u32 = 512;
const LEAST: u32 = 16;

/// Kicks from a pause to a trial, and how many trials that are as rare as can be have to be between two of these.
const SOON: u32 = 64;
const RARE: u32 = 3;

/// Kicks that the worker handles after one that it was left.
const REFUSED: u32 = 16;

/// A trial: how many kicks are left to the other one, to see what it would find. The first ones may find what the
/// chosen one has left behind: they say no more than whether it is worth to go on.
const FIRST: u32 = 4;
const COUNTED: u32 = 12;

/// What the chosen one found for a kick is one part in so many of its average.
const PARTS: u32 = 16;

/// One request, in averages.
const ONE: u32 = 256;

/// Most requests that one of them is said to find. A kick for so many costs each of them next to nothing: who finds
/// more is no better.
const MANY: usize = 16;

/// Chooses who handles the next kick, by how many requests each of them finds.
///
/// The task that kicks is sooner. But a guest that does not wait for each request kicks for each of them all the
/// same if that is done when the kick returns. While a worker wakes up the guest goes on, so it finds several, and
/// each kick and each interrupt is for several. Who finds as many of them without a worker, since its kicks are for
/// several from the start, needs none.
pub(crate) struct Choice {
    chosen: Handler,
    /// How many requests each found for a kick, on average; 0 if that is unknown.
    kicker: u32,
    worker: u32,
    /// Kicks of the chosen one until the other one is tried, and how many these were in the beginning.
    left: u32,
    interval: u32,
    trial: Trial,
    /// Trials, as rare as can be, since the last one that followed a pause.
    rare: u32,
    /// Kicks that the worker handles whoever is chosen.
    refused: u32,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            chosen: Handler::Kicker,
            kicker: ONE,
            worker: ONE,
            left: LEAST,
            interval: LEAST,
            trial: Trial::default(),
            rare: 0,
            refused: 0,
        }
    }
}

/// What is known of the kicks that the other one handled.
#[derive(Default)]
struct Trial {
    kicks: u32,
    /// Requests that were found for them.
    found: u32,
    /// Whether any was for clearly more than the chosen one finds.
    more: bool,
}

impl Trial {
    /// Learns what a kick was for, where the chosen one finds `usual` on average. Returns the average when the trial
    /// is over.
    fn handled(&mut self, found: u32, usual: u32) -> Option<u32> {
        self.kicks += 1;
        self.found += found;
        self.more |= 4 * found > 5 * usual;
        if self.kicks == FIRST {
            if !self.more {
                return Some(self.found / FIRST);
            }
            self.found = 0;
        }
        (self.kicks == FIRST + COUNTED).then_some(self.found / COUNTED)
    }
}

impl Choice {
    /// Learns that the task that kicked had to leave a request to the worker, as it may have to with what comes next.
    /// Returns who is to handle the next kick.
    pub(crate) fn refused(&mut self) -> Handler {
        self.refused = REFUSED;
        if self.chosen == Handler::Worker && self.left == 0 {
            self.end_trial();
        }
        self.next()
    }

    /// Learns that the guest paused before the last kick. What comes may be another load: the other one is tried soon,
    /// unless trials would be more than one kick in a hundred then.
    pub(crate) fn paused(&mut self) {
        if self.rare >= RARE && self.left > SOON {
            self.left = SOON;
            self.rare = 0;
        }
    }

    /// Learns that the guest kicks for another number of requests from now on, whoever handles that: what they found is
    /// forgotten, and the other one is tried soon.
    pub(crate) fn kicks_changed(&mut self) {
        self.kicker = 0;
        self.worker = 0;
        self.wait(LEAST);
    }

    /// Learns that a kick was handled, and that `requests` were found. Returns who is to handle the next one.
    pub(crate) fn handled(&mut self, by: Handler, requests: usize) -> Handler {
        if requests == 0 {
            return self.next();
        }
        self.refused = self.refused.saturating_sub(1);
        // CAST: At most `MANY`.
        let found = requests.min(MANY) as u32 * ONE;
        if by == self.chosen {
            let average = self.average(by);
            *average = match *average {
                0 => found,
                average => (average * (PARTS - 1) + found + PARTS / 2) / PARTS,
            };
            self.left = self.left.saturating_sub(1);
        } else {
            let usual = *self.average(self.chosen);
            if let Some(average) = self.trial.handled(found, usual) {
                *self.average(by) = average;
                self.end_trial();
            }
        }
        if self.left > 0 {
            self.choose();
        }
        self.next()
    }

    fn average(&mut self, of: Handler) -> &mut u32 {
        match of {
            Handler::Kicker => &mut self.kicker,
            Handler::Worker => &mut self.worker,
        }
    }

    fn end_trial(&mut self) {
        if self.interval == MOST {
            self.rare = self.rare.saturating_add(1);
        }
        self.wait((2 * self.interval).min(MOST));
    }

    /// Waits for the next trial.
    fn wait(&mut self, kicks: u32) {
        self.interval = kicks;
        self.left = kicks;
        self.trial = Trial::default();
    }

    fn choose(&mut self) {
        if self.kicker == 0 || self.worker == 0 {
            return;
        }
        // Not to and fro where it makes no difference.
        let quarters = match self.chosen {
            Handler::Kicker => 6,
            Handler::Worker => 5,
        };
        let better = if 4 * self.worker >= quarters * self.kicker {
            Handler::Worker
        } else {
            Handler::Kicker
        };
        if better != self.chosen {
            self.chosen = better;
            self.rare = 0;
            self.wait(LEAST);
        }
    }

    /// Who is to handle the next kick.
    pub(crate) fn next(&self) -> Handler {
        if self.refused > 0 {
            return Handler::Worker;
        }
        match (self.chosen, self.left) {
            (Handler::Kicker, 0) | (Handler::Worker, 1..) => Handler::Worker,
            (Handler::Worker, 0) | (Handler::Kicker, 1..) => Handler::Kicker,
        }
    }
}
