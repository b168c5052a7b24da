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

/// Of how many kicks one is left to the other one, to see what it would find: fewer after a change.
const MOST: u32 = 256;
const LEAST: u32 = 16;

/// One request, in averages.
const ONE: u32 = 256;

/// Most requests that one of them is said to find.
const MANY: usize = 1024;

/// Chooses who handles the next kick, by how many requests each of them finds.
///
/// The task that kicks is sooner. But a guest that does not wait for each request kicks for each of them all the
/// same if that is done when the kick returns. While a worker wakes up the guest goes on, so it finds several, and
/// each kick and each interrupt is for several. Who finds as many of them without a worker, since its kicks are for
/// several from the start, needs none.
pub(crate) struct Choice {
    chosen: Handler,
    /// How many requests each found for a kick, on average.
    kicker: u32,
    worker: u32,
    /// Kicks until the other one is tried, and how many these were in the beginning.
    left: u32,
    interval: u32,
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
            refused: 0,
        }
    }
}

impl Choice {
    /// Learns that the task that kicked had to leave a request to the worker, as it may have to with what comes next.
    /// Returns who is to handle the next kick.
    pub(crate) fn refused(&mut self) -> Handler {
        self.refused = LEAST;
        self.next()
    }

    /// Learns that a kick was handled, and that `requests` were found. Returns who is to handle the next one.
    pub(crate) fn handled(&mut self, by: Handler, requests: usize) -> Handler {
        if requests == 0 {
            return self.next();
        }
        self.refused = self.refused.saturating_sub(1);
        // CAST: At most `MANY`.
        let found = requests.min(MANY) as u32 * ONE;
        let average = match by {
            Handler::Kicker => &mut self.kicker,
            Handler::Worker => &mut self.worker,
        };
        // What is seen seldom counts more.
        let parts = if by == self.chosen { 8 } else { 4 };
        *average = (*average * (parts - 1) + found + parts / 2) / parts;

        // Not to and fro where it makes no difference.
        let quarters = match self.chosen {
            Handler::Kicker => 7,
            Handler::Worker => 5,
        };
        let better = if 4 * self.worker >= quarters * self.kicker {
            Handler::Worker
        } else {
            Handler::Kicker
        };
        if better != self.chosen {
            self.chosen = better;
            self.interval = LEAST;
            self.left = LEAST;
        } else if self.left > 0 {
            self.left -= 1;
        } else if by != self.chosen {
            // It was tried.
            self.interval = (2 * self.interval).min(MOST);
            self.left = self.interval;
        }
        self.next()
    }

    fn next(&self) -> Handler {
        if self.refused > 0 {
            return Handler::Worker;
        }
        match (self.chosen, self.left) {
            (Handler::Kicker, 0) | (Handler::Worker, 1..) => Handler::Worker,
            (Handler::Worker, 0) | (Handler::Kicker, 1..) => Handler::Kicker,
        }
    }
}
