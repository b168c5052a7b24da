// SPDX-License-Identifier: GPL-2.0

//! What the requests of a queue are, and where on the disk.

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use vhost_blk_ring::Op;

use crate::args::RwArg;

/// Gives the same requests for the same arguments, each time.
#[derive(Clone, Debug)]
pub(crate) struct Generator {
    rw: RwArg,
    reads_percent: u8,
    rng: Xoshiro256PlusPlus,
    /// Size of a request, bytes.
    bs: u64,
    /// The piece of the disk that is in use, in requests.
    first: u64,
    count: u64,
    /// Of a sequential mode: the next one in that piece.
    next: u64,
}

impl Generator {
    /// The requests of queue number `index` of `queues`, in the first `range`
    /// bytes of the disk. Random ones are anywhere in there; sequential ones in
    /// a piece of the queue's own, again and again.
    ///
    /// There has to be room for one request of each queue.
    pub(crate) fn new(
        rw: RwArg,
        reads_percent: u8,
        bs: u64,
        range: u64,
        seed: u64,
        (index, queues): (u16, u16),
    ) -> Self {
        let (mut first, mut count) = (0, range / bs);
        if !rw.is_random() {
            count /= u64::from(queues);
            first = u64::from(index) * count;
        }
        // Multiplied, so that the next seed does not give the next queue's.
        let stream = u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Generator {
            rw,
            reads_percent,
            rng: Xoshiro256PlusPlus::seed_from_u64(seed ^ stream),
            bs,
            first,
            count,
            next: 0,
        }
    }

    /// The next request, and its byte offset on the disk.
    #[inline]
    pub(crate) fn next(&mut self) -> (Op, u64) {
        let op = match self.rw {
            RwArg::Read | RwArg::RandRead => Op::In,
            RwArg::Write | RwArg::RandWrite => Op::Out,
            RwArg::RandRw if self.rng.random_range(0..100) < self.reads_percent => Op::In,
            RwArg::RandRw => Op::Out,
        };
        let place = if self.rw.is_random() {
            self.rng.random_range(0..self.count)
        } else {
            let place = self.next;
            self.next = if place + 1 == self.count {
                0
            } else {
                place + 1
            };
            place
        };
        (op, (self.first + place) * self.bs)
    }
}

/// How many of `total` fall to number `index` of `parts`: the first ones have one
/// more, if it does not come out even.
pub(crate) fn share(total: u64, (index, parts): (u16, u16)) -> u64 {
    let parts = u64::from(parts);
    total / parts + u64::from(u64::from(index) < total % parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offsets(rw: RwArg, seed: u64, of: (u16, u16), count: usize) -> Vec<u64> {
        let mut generator = Generator::new(rw, 70, 4096, 10 * 4096 + 512, seed, of);
        (0..count).map(|_| generator.next().1).collect()
    }

    #[test]
    fn sequential_pieces_are_apart_and_start_over() {
        let first = offsets(RwArg::Read, 1, (0, 3), 5);
        assert_eq!(first, [0, 4096, 8192, 0, 4096]);
        let last = offsets(RwArg::Write, 2, (2, 3), 4);
        assert_eq!(last, [6 * 4096, 7 * 4096, 8 * 4096, 6 * 4096]);
        assert_eq!(offsets(RwArg::Read, 1, (9, 10), 2), [9 * 4096; 2]);
    }

    #[test]
    fn random_offsets_are_aligned_and_cover_the_range() {
        let mut seen = offsets(RwArg::RandRead, 7, (0, 1), 500);
        seen.sort_unstable();
        seen.dedup();
        let all: Vec<u64> = (0..10).map(|place| place * 4096).collect();
        assert_eq!(seen, all);
    }

    #[test]
    fn seeds_and_queues_differ_and_repeat() {
        let one = offsets(RwArg::RandRead, 1, (0, 2), 50);
        assert_eq!(one, offsets(RwArg::RandRead, 1, (0, 2), 50));
        assert_ne!(one, offsets(RwArg::RandRead, 2, (0, 2), 50));
        assert_ne!(one, offsets(RwArg::RandRead, 1, (1, 2), 50));
    }

    #[test]
    fn reads_and_writes_are_mixed_as_asked() {
        for (percent, low, high) in [(0, 0, 0), (70, 6700, 7300), (100, 10_000, 10_000)] {
            let mut generator = Generator::new(RwArg::RandRw, percent, 512, 1 << 20, 3, (0, 1));
            let reads = (0..10_000).filter(|_| generator.next().0 == Op::In).count();
            assert!((low..=high).contains(&reads), "{percent} %: {reads}");
        }
    }

    #[test]
    fn shares_make_up_the_total() {
        for total in [0, 1, 7, 8, 1_000_003] {
            let shares: Vec<u64> = (0..4).map(|index| share(total, (index, 4))).collect();
            assert_eq!(shares.iter().sum::<u64>(), total);
            assert!(shares[0] - shares[3] <= 1 && shares.is_sorted_by(|a, b| a >= b));
        }
    }
}
