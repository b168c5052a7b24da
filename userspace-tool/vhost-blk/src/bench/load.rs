// SPDX-License-Identifier: GPL-2.0

//! A closed loop on one queue: as soon as a request is complete, its slot has
//! the next one.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use anyhow::Result;
use hdrhistogram::Histogram;
use vhost_blk_ring::Op;

use super::account::ThreadUse;
use super::engine::{Counts, Engine};
use super::generator::Generator;

/// Longest latency that is told apart, nanoseconds.
const MAX_LATENCY: u64 = 100_000_000_000;

/// What a queue's thread has in common with the one that waits for it.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Set when no more requests are to be made.
    pub(crate) stop: AtomicBool,
    /// Goes on as long as requests are completed.
    pub(crate) progress: AtomicU64,
}

/// A histogram of latencies, nanoseconds.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    // Three digits.
    Ok(Histogram::new_with_bounds(1, MAX_LATENCY, 3)?)
}

/// What a run did.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) flushes: u64,
    pub(crate) begin: Instant,
    pub(crate) end: Instant,
    pub(crate) thread: ThreadUse,
    pub(crate) counts: Counts,
    pub(crate) latencies: Option<Histogram<u64>>,
}

/// A load on one queue.
pub(crate) struct Load<E> {
    engine: E,
    generator: Generator,
    slots: u16,
    /// Whether each write is followed by a flush.
    sync: bool,
    /// By slot: what is in flight.
    ops: Vec<Op>,
    /// By slot: when its request was made.
    begun: Vec<Instant>,
    done: Vec<u16>,
    /// Latencies that are not in the histogram yet, nanoseconds.
    fresh: Vec<u64>,
    histogram: Option<Histogram<u64>>,
}

impl<E: Engine> Load<E> {
    pub(crate) fn new(
        engine: E,
        generator: Generator,
        slots: u16,
        sync: bool,
        latencies: bool,
    ) -> Result<Self> {
        let count = usize::from(slots);
        Ok(Load {
            engine,
            generator,
            slots,
            sync,
            ops: vec![Op::In; count],
            begun: vec![Instant::now(); count],
            done: Vec::with_capacity(count),
            fresh: Vec::with_capacity(count),
            histogram: latencies.then(histogram).transpose()?,
        })
    }

    /// Runs `count` requests to their end, or fewer if it is stopped; no request
    /// is in flight before or after.
    pub(crate) fn run(&mut self, count: u64, shared: &Shared) -> Result<Outcome> {
        if let Some(histogram) = &mut self.histogram {
            histogram.reset();
        }
        let counts = self.engine.counts();
        let thread = ThreadUse::so_far()?;
        let begin = Instant::now();
        let (requests, flushes) = self.requests(count, shared)?;
        let end = Instant::now();
        Ok(Outcome {
            requests,
            flushes,
            begin,
            end,
            thread: ThreadUse::so_far()?.since(thread),
            counts: self.engine.counts().since(counts),
            latencies: self.histogram.clone(),
        })
    }

    /// The loop itself. It allocates nothing.
    fn requests(&mut self, mut count: u64, shared: &Shared) -> Result<(u64, u64)> {
        let timed = self.histogram.is_some();
        let mut issued = 0;
        let mut completed = 0;
        let mut flushes = 0;
        let mut now = self.begun[0];
        if timed {
            now = Instant::now();
        }
        for slot in 0..self.slots {
            if issued == count {
                break;
            }
            self.next(slot, now)?;
            issued += 1;
        }
        self.engine.publish()?;
        while completed < issued {
            self.done.clear();
            self.engine.wait(&mut self.done)?;
            if timed {
                now = Instant::now();
            }
            if shared.stop.load(Ordering::Relaxed) {
                count = issued;
            }
            for place in 0..self.done.len() {
                let slot = self.done[place];
                let index = usize::from(slot);
                if self.sync && self.ops[index] == Op::Out {
                    self.ops[index] = Op::Flush;
                    self.engine.add(slot, Op::Flush, 0)?;
                    flushes += 1;
                    continue;
                }
                completed += 1;
                if timed {
                    let latency = now.saturating_duration_since(self.begun[index]);
                    self.fresh
                        .push(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
                }
                if issued < count {
                    self.next(slot, now)?;
                    issued += 1;
                }
            }
            self.engine.publish()?;
            shared
                .progress
                .store(completed + flushes, Ordering::Relaxed);
            // Now that the disk has something to do.
            if let Some(histogram) = &mut self.histogram {
                for latency in self.fresh.drain(..) {
                    histogram.saturating_record(latency);
                }
            }
        }
        Ok((completed, flushes))
    }

    #[inline]
    fn next(&mut self, slot: u16, now: Instant) -> Result<()> {
        let (op, offset) = self.generator.next();
        let index = usize::from(slot);
        self.ops[index] = op;
        self.begun[index] = now;
        self.engine.add(slot, op, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::RwArg;
    use std::collections::VecDeque;
    use std::time::Duration;

    /// Completes requests `batch` at a time, after a fruitless wait.
    struct Fake {
        batch: usize,
        added: Vec<(u16, Op, u64)>,
        in_flight: VecDeque<u16>,
        seen: Vec<(Op, u64)>,
        most: usize,
        fruitless: bool,
        fail_after: usize,
    }

    impl Fake {
        fn new(batch: usize) -> Self {
            Fake {
                batch,
                added: Vec::new(),
                in_flight: VecDeque::new(),
                seen: Vec::new(),
                most: 0,
                fruitless: false,
                fail_after: usize::MAX,
            }
        }
    }

    impl Engine for Fake {
        fn add(&mut self, slot: u16, op: Op, offset: u64) -> Result<()> {
            assert!(!self.in_flight.contains(&slot), "slot {slot} is in flight");
            self.added.push((slot, op, offset));
            Ok(())
        }

        fn publish(&mut self) -> Result<()> {
            for (slot, op, offset) in self.added.drain(..) {
                self.in_flight.push_back(slot);
                self.seen.push((op, offset));
            }
            self.most = self.most.max(self.in_flight.len());
            Ok(())
        }

        fn wait(&mut self, done: &mut Vec<u16>) -> Result<()> {
            anyhow::ensure!(self.seen.len() < self.fail_after, "as asked");
            self.fruitless = !self.fruitless;
            if self.fruitless {
                return Ok(());
            }
            let count = self.batch.min(self.in_flight.len());
            assert!(count > 0, "a wait for nothing");
            std::thread::sleep(Duration::from_micros(20));
            done.extend(self.in_flight.drain(..count));
            Ok(())
        }

        fn counts(&self) -> Counts {
            Counts {
                kicks: self.seen.len() as u64,
                calls: 0,
            }
        }
    }

    fn load(rw: RwArg, batch: usize, slots: u16, sync: bool) -> Load<Fake> {
        let generator = Generator::new(rw, 50, 512, 1 << 20, 1, (0, 1));
        Load::new(Fake::new(batch), generator, slots, sync, true).expect("a histogram")
    }

    #[test]
    fn so_many_requests_as_asked_for() {
        for (batch, slots, count) in [(1, 1, 7), (3, 8, 100), (8, 8, 5), (2, 4, 0)] {
            let mut load = load(RwArg::RandRead, batch, slots, false);
            let outcome = load.run(count, &Shared::default()).expect("no error");
            assert_eq!((outcome.requests, outcome.flushes), (count, 0));
            assert_eq!(load.engine.seen.len() as u64, count);
            assert_eq!(outcome.counts.kicks, count);
            assert_eq!(load.engine.most as u64, count.min(slots.into()));
            assert!(load.engine.in_flight.is_empty());
            let latencies = outcome.latencies.expect("it was asked for");
            assert_eq!(latencies.len(), count);
            assert!(count == 0 || latencies.min() >= 20_000);
            assert!(outcome.end >= outcome.begin);
        }
    }

    #[test]
    fn runs_go_on_where_the_last_one_ended() {
        let shared = Shared::default();
        let mut apart = load(RwArg::RandRw, 1, 1, false);
        for count in [3, 4] {
            let outcome = apart.run(count, &shared).expect("no error");
            assert_eq!(outcome.latencies.map(|h| h.len()), Some(count));
        }
        let mut whole = load(RwArg::RandRw, 1, 1, false);
        whole.run(7, &shared).expect("no error");
        assert_eq!(apart.engine.seen, whole.engine.seen);
    }

    #[test]
    fn writes_are_flushed() {
        let mut load = load(RwArg::RandRw, 2, 4, true);
        let outcome = load.run(200, &Shared::default()).expect("no error");
        let count = |op| load.engine.seen.iter().filter(|(o, _)| *o == op).count() as u64;
        assert_eq!(outcome.requests, 200);
        assert_eq!(count(Op::In) + count(Op::Out), 200);
        assert!(count(Op::Out) > 50);
        assert_eq!(outcome.flushes, count(Op::Out));
        assert_eq!(outcome.flushes, count(Op::Flush));
        assert_eq!(outcome.latencies.map(|h| h.len()), Some(200));
    }

    #[test]
    fn it_stops_when_told_to() {
        let shared = Shared::default();
        shared.stop.store(true, Ordering::Relaxed);
        let mut load = load(RwArg::Write, 1, 4, true);
        let outcome = load.run(u64::MAX, &shared).expect("no error");
        assert_eq!((outcome.requests, outcome.flushes), (4, 4));
        assert!(load.engine.in_flight.is_empty());
    }

    #[test]
    fn errors_end_it() {
        let mut load = load(RwArg::Read, 1, 4, false);
        load.engine.fail_after = 10;
        assert!(load.run(100, &Shared::default()).is_err());
    }
}
