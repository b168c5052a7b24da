// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/transfer.rs`.

use proptest::prelude::*;

use crate::transfer::{plan, Plan, PAGE_SIZE};

/// As of most disks: addresses and lengths are multiples of 4.
const DMA: u32 = 3;
const MAX_PAGES: usize = 256;

fn plan_of(segments: &[(usize, usize)]) -> Plan {
    plan(segments.iter().copied(), DMA, 512, MAX_PAGES)
}

#[test]
fn pages_are_counted_by_what_is_touched() {
    for (segments, pages) in [
        (&[][..], 0),
        (&[(0x1000, 0)], 0),
        (&[(0x1000, 512)], 1),
        (&[(0x1000, 4096)], 1),
        (&[(0x1ffc, 512)], 2),
        (&[(0x1004, 4096)], 2),
        (&[(0x1ffc, 4096 + 512)], 3),
        (&[(0x1000, 512), (0x1200, 512)], 2),
        (&[(0x1000, 1 << 20)], 256),
    ] {
        assert_eq!(plan_of(segments), Plan::Single(pages), "{segments:x?}");
    }
}

#[test]
fn more_than_a_bio_is_split_between_blocks() {
    assert_eq!(plan_of(&[(0x1000, (1 << 20) + 512)]), Plan::Split);
    assert_eq!(plan_of(&[(0x1200, 1 << 20)]), Plan::Split);
    assert_eq!(plan_of(&[(0x1000, 1 << 30)]), Plan::Split);
    let many = vec![(0x1000, 512); 257];
    assert_eq!(plan_of(&many), Plan::Split);
    // Pieces that begin within a block cross pages within one.
    let odd = vec![(0x1004, 512); 300];
    assert_eq!(plan_of(&odd), Plan::Bounce);
    assert_eq!(plan_of(&odd[..256]), Plan::Single(256));
}

#[test]
fn pieces_of_blocks_are_copied() {
    assert_eq!(plan_of(&[(0x1000, 508), (0x2000, 4)]), Plan::Bounce);
    let large = plan([(0x1000, 512); 8].into_iter(), DMA, 4096, MAX_PAGES);
    assert_eq!(large, Plan::Bounce);
    // A page ends within a block that is larger.
    let huge = plan([(0x10000, 2 << 20)].into_iter(), DMA, 8192, MAX_PAGES);
    assert_eq!(huge, Plan::Bounce);
}

#[test]
fn what_no_dma_can_reach_is_copied() {
    for segment in [(0x1001, 512), (0x1002, 512), (0x1000, 510), (0x1003, 513)] {
        assert_eq!(plan_of(&[segment]), Plan::Bounce, "{segment:x?}");
        assert_eq!(plan_of(&[(0x1000, 512), segment]), Plan::Bounce);
    }
    let strict = plan([(0x1010, 512)].into_iter(), 511, 512, MAX_PAGES);
    assert_eq!(strict, Plan::Bounce);
    let none = plan([(0x1001, 512)].into_iter(), 0, 512, MAX_PAGES);
    assert_eq!(none, Plan::Single(1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn plans_hold(
        segments in prop::collection::vec((0..1usize << 40, 1..200_000usize), 0..20),
        coarse in any::<bool>(),
        dma_shift in 0..10u32,
        block_shift in 9..15u32,
        max_pages in 1..300usize,
    ) {
        // Random numbers alone are almost never aligned.
        let align = if coarse { 4096 } else { 1 };
        let segments: Vec<_> = segments
            .into_iter()
            .map(|(address, len)| (address / align * align, len / align * align))
            .collect();
        let (dma, block) = ((1u32 << dma_shift) - 1, 1u32 << block_shift);
        let pages: usize = segments
            .iter()
            .map(|&(address, len)| match len {
                0 => 0,
                _ => (address + len - 1) / PAGE_SIZE - address / PAGE_SIZE + 1,
            })
            .sum();
        let all = |multiple: u32, of: fn(&(usize, usize)) -> usize| {
            segments.iter().all(|segment| of(segment) % multiple as usize == 0)
        };
        let (address, len) = (|&(address, _): &_| address, |&(_, len): &_| len);
        let expected = if !all(dma + 1, address) || !all(dma + 1, len) || !all(block, len) {
            Plan::Bounce
        } else if pages <= max_pages {
            Plan::Single(pages)
        } else if all(block, address) && block as usize <= PAGE_SIZE {
            Plan::Split
        } else {
            Plan::Bounce
        };
        prop_assert_eq!(
            plan(segments.into_iter(), dma, block, max_pages),
            expected
        );
    }

    #[test]
    fn no_length_overflows(address in any::<usize>(), len in any::<usize>(), count in 0..9usize) {
        let segments = std::iter::repeat((address, len)).take(count);
        let planned = plan(segments, 0, 512, MAX_PAGES);
        prop_assert!(count > 0 || planned == Plan::Single(0));
    }
}
