// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/segment.rs`.

use proptest::prelude::*;

use crate::request::{Limits, RangeOp, Status};
use crate::segment::{decode, Cut, Segment, SEGMENT_LEN};

const OPS: [RangeOp; 3] = [RangeOp::Discard, RangeOp::WriteZeroes, RangeOp::SecureErase];

/// A disk of 10000 sectors.
const DISK: Limits = Limits {
    capacity: 10_000,
    logical_block_size: 512,
    read_only: false,
    features: u64::MAX,
    zones: None,
};

fn bytes(sector: u64, sectors: u32, flags: u32) -> [u8; SEGMENT_LEN] {
    let mut bytes = [0; SEGMENT_LEN];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

#[test]
fn segments_within_the_disk() {
    for op in OPS {
        for (sector, sectors) in [(0, 1), (0, 10_000), (9_999, 1), (10_000, 0), (7, 0)] {
            assert_eq!(
                decode(&bytes(sector, sectors, 0), true, op, &DISK),
                Ok(Segment {
                    sector,
                    sectors,
                    unmap: false
                })
            );
        }
    }
    let huge = Limits {
        capacity: 1 << 55,
        ..DISK
    };
    let most = decode(
        &bytes(1 << 54, u32::MAX, 1),
        true,
        RangeOp::WriteZeroes,
        &huge,
    );
    let expected = Segment {
        sector: 1 << 54,
        sectors: u32::MAX,
        unmap: true,
    };
    assert_eq!(most, Ok(expected));
}

#[test]
fn segments_beyond_the_disk() {
    let large = Limits {
        logical_block_size: 4096,
        ..DISK
    };
    for op in OPS {
        for (sector, sectors, limits) in [
            (10_000, 1, DISK),
            (0, 10_001, DISK),
            (9_999, 2, DISK),
            (10_001, 0, DISK),
            (0, u32::MAX, DISK),
            (u64::MAX, 1, DISK),
            (u64::MAX, u32::MAX, DISK),
            (1 << 55, 1, DISK),
            (0, 7, large),
            (1, 8, large),
            (4, 0, large),
        ] {
            let result = decode(&bytes(sector, sectors, 0), true, op, &limits);
            assert_eq!(result, Err(Status::IoErr), "{sector} {sectors}");
        }
    }
}

#[test]
fn flags() {
    for op in OPS {
        for flags in [1, 2, 3, 1 << 31, u32::MAX] {
            let result = decode(&bytes(0, 8, flags), true, op, &DISK);
            if (op, flags) == (RangeOp::WriteZeroes, 1) {
                assert_eq!(result.map(|segment| segment.unmap), Ok(true));
            } else {
                assert_eq!(result, Err(Status::Unsupp), "{op:?} {flags:x}");
                // Whatever else is wrong.
                let beyond = bytes(u64::MAX, 8, flags);
                assert_eq!(decode(&beyond, true, op, &DISK), Err(Status::Unsupp));
            }
        }
    }
}

#[test]
fn nothing_is_deallocated_without_discards() {
    let limits = Limits {
        features: !(1 << 13),
        ..DISK
    };
    let result = decode(&bytes(0, 8, 1), true, RangeOp::WriteZeroes, &limits);
    assert_eq!(result.map(|segment| segment.unmap), Ok(false));
}

#[test]
fn segments_of_either_endianness() {
    let mut big = [0; SEGMENT_LEN];
    big[..8].copy_from_slice(&258u64.to_be_bytes());
    big[8..12].copy_from_slice(&772u32.to_be_bytes());
    big[12..].copy_from_slice(&1u32.to_be_bytes());
    assert_eq!(
        decode(&big, false, RangeOp::WriteZeroes, &DISK),
        Ok(Segment {
            sector: 258,
            sectors: 772,
            unmap: true
        })
    );
    assert_eq!(
        decode(&big, true, RangeOp::WriteZeroes, &DISK),
        Err(Status::Unsupp)
    );
}

/// The pieces of a range, as sector and length.
fn pieces(cut: &Cut, mut sector: u64, mut left: u32) -> Vec<(u64, u32)> {
    let mut all = Vec::new();
    while left > 0 {
        let len = cut.len(sector, left);
        all.push((sector, len));
        sector += u64::from(len);
        left -= len;
    }
    all
}

const PLAIN: Cut = Cut {
    most: 100,
    unit: 1,
    boundary: 0,
    block: 1,
    before: 0,
};

#[test]
fn pieces_of_ranges() {
    let unit = Cut { unit: 8, ..PLAIN };
    let partition = Cut { before: 3, ..unit };
    let boundary = Cut {
        boundary: 64,
        ..PLAIN
    };
    let small = Cut { most: 5, ..unit };
    let none = Cut {
        most: 0,
        block: 8,
        ..unit
    };
    for (cut, sector, left, expected) in [
        (PLAIN, 7, 250, &[(7, 100), (107, 100), (207, 50)][..]),
        (PLAIN, 7, 100, &[(7, 100)]),
        // 96 is the largest multiple of 8.
        (unit, 0, 200, &[(0, 96), (96, 96), (192, 8)]),
        (unit, 3, 200, &[(3, 93), (96, 96), (192, 11)]),
        (partition, 5, 200, &[(5, 96), (101, 96), (197, 8)]),
        (boundary, 60, 100, &[(60, 4), (64, 64), (128, 32)]),
        (small, 0, 12, &[(0, 5), (5, 3), (8, 4)]),
        (none, 0, 16, &[(0, 8), (8, 8)]),
    ] {
        assert_eq!(pieces(&cut, sector, left), expected, "{cut:?} {sector}");
    }
}

#[test]
fn the_longest_range_is_a_few_thousand_pieces() {
    let cut = Cut {
        most: u32::MAX,
        ..PLAIN
    };
    assert_eq!(pieces(&cut, 0, u32::MAX).len(), 2048);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    /// Whatever the disk says: pieces are whole blocks, not too long, do not cross a boundary, end
    /// between units if there is room for one, and are never nothing.
    #[test]
    fn pieces_are_what_the_disk_takes(
        most in prop_oneof![any::<u32>(), 0..100u32], unit in prop_oneof![1..20u32, Just(1 << 15)],
        boundary in prop_oneof![Just(0u32), 1..50u32], shift in 0..4u32, before in 0..1000u64,
        sector in 0..100_000u64, blocks in 1..300u32,
    ) {
        let block = 1u32 << shift;
        let (unit, boundary, before) = (unit * block, boundary * block, before * u64::from(block));
        let (sector, left) = (sector * u64::from(block), blocks * block);
        let cut = Cut { most, unit, boundary, block, before };
        let len = cut.len(sector, left);
        prop_assert!(len >= block && len <= left && len % block == 0);
        prop_assert!(len <= most.max(block));
        let (start, end) = (before + sector, before + sector + u64::from(len));
        if boundary != 0 {
            prop_assert_eq!(start / u64::from(boundary), (end - 1) / u64::from(boundary));
        }
        if len < left && boundary == 0 && most >= unit {
            prop_assert_eq!(end % u64::from(unit), 0);
        }
    }

    /// Nothing that a disk may say makes a piece of nothing.
    #[test]
    fn no_disk_is_too_strange(
        most in any::<u32>(), unit in any::<u32>(), boundary in any::<u32>(), block in any::<u32>(),
        before in any::<u64>(), sector in any::<u64>(), left in 1..u32::MAX,
    ) {
        let cut = Cut { most, unit, boundary, block, before };
        prop_assert!((1..=left).contains(&cut.len(sector, left)));
    }

    /// Any bytes give an answer.
    #[test]
    fn no_segment_is_too_strange(
        bytes in any::<[u8; SEGMENT_LEN]>(), little in any::<bool>(), capacity in any::<u64>(),
        shift in 9..=12u32,
    ) {
        let limits = Limits { capacity, logical_block_size: 1 << shift, ..DISK };
        for op in OPS {
            if let Ok(segment) = decode(&bytes, little, op, &limits) {
                let end = u128::from(segment.sector) + u128::from(segment.sectors);
                prop_assert!(end <= u128::from(capacity));
            }
        }
    }
}
