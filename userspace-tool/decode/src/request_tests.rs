// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/request.rs`.

use proptest::prelude::*;

use crate::request::{decode, Limits, RangeOp, Request, Status, HEADER_LEN, SECTOR_SIZE};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SECURE_ERASE: u32 = 14;

/// Each of those with its feature bit.
const RANGES: [(u32, RangeOp, u32); 3] = [
    (DISCARD, RangeOp::Discard, 13),
    (WRITE_ZEROES, RangeOp::WriteZeroes, 14),
    (SECURE_ERASE, RangeOp::SecureErase, 16),
];

/// A disk of 1000 sectors.
const DISK: Limits = Limits {
    capacity: 1000,
    logical_block_size: 512,
    read_only: false,
    features: u64::MAX,
    zones: None,
};

/// The same with blocks of eight sectors.
const DISK_4K: Limits = Limits {
    logical_block_size: 4096,
    ..DISK
};

fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn read(sector: u64, len: u64, limits: &Limits) -> Result<Request, Status> {
    decode(&header(IN, sector), true, 0, len, limits)
}

fn write(sector: u64, len: u64, limits: &Limits) -> Result<Request, Status> {
    decode(&header(OUT, sector), true, len, 0, limits)
}

#[test]
fn statuses_are_those_of_virtio() {
    assert_eq!(
        [Status::Ok, Status::IoErr, Status::Unsupp].map(|status| status as u8),
        [0, 1, 2]
    );
}

#[test]
fn ranges_within_the_disk() {
    for (sector, len) in [(0, 512), (999, 512), (0, 512_000), (3, 5 * 512)] {
        assert_eq!(read(sector, len, &DISK), Ok(Request::In { sector, len }));
        assert_eq!(write(sector, len, &DISK), Ok(Request::Out { sector, len }));
    }
    for (sector, len) in [(0, 4096), (992, 4096), (8, 8192)] {
        assert_eq!(read(sector, len, &DISK_4K), Ok(Request::In { sector, len }));
    }
}

#[test]
fn ranges_beyond_the_disk() {
    for (sector, len) in [
        (1000, 512),
        (999, 1024),
        (0, 512_512),
        (1 << 55, 512),
        (1 << 63, 512),
        (u64::MAX, 512),
        (u64::MAX, 1024),
        (u64::MAX - 1, 1024),
        (1, u64::MAX - 511),
        (u64::MAX, u64::MAX - 511),
    ] {
        assert_eq!(
            read(sector, len, &DISK),
            Err(Status::IoErr),
            "{sector} {len}"
        );
        assert_eq!(
            write(sector, len, &DISK),
            Err(Status::IoErr),
            "{sector} {len}"
        );
    }
    // The last block of eight sectors would end at 1008.
    assert_eq!(read(1000, 4096, &DISK_4K), Err(Status::IoErr));
}

#[test]
fn ranges_of_gigabytes() {
    let huge = Limits {
        capacity: 1 << 40,
        ..DISK
    };
    let most = (1 << 31) - 512;
    assert_eq!(
        read(0, most, &huge),
        Ok(Request::In {
            sector: 0,
            len: most
        })
    );
    assert_eq!(read(0, most + 512, &huge), Err(Status::IoErr));
    assert_eq!(write(0, 1 << 40, &huge), Err(Status::IoErr));
}

#[test]
fn parts_of_blocks() {
    for len in [1, 511, 513, 1023] {
        assert_eq!(read(0, len, &DISK), Err(Status::IoErr), "{len}");
        assert_eq!(write(0, len, &DISK), Err(Status::IoErr), "{len}");
    }
    for (sector, len) in [
        (0, 512),
        (0, 3584),
        (0, 4608),
        (1, 4096),
        (7, 4096),
        (4, 4096),
    ] {
        assert_eq!(
            read(sector, len, &DISK_4K),
            Err(Status::IoErr),
            "{sector} {len}"
        );
    }
}

#[test]
fn nothing_is_a_range_too() {
    for sector in [0, 5, 1000] {
        assert_eq!(read(sector, 0, &DISK), Ok(Request::In { sector, len: 0 }));
        assert_eq!(write(sector, 0, &DISK), Ok(Request::Out { sector, len: 0 }));
    }
    assert_eq!(read(1001, 0, &DISK), Err(Status::IoErr));
}

#[test]
fn read_only_disks_take_no_writes() {
    let limits = Limits {
        read_only: true,
        ..DISK
    };
    assert_eq!(write(0, 512, &limits), Err(Status::IoErr));
    assert_eq!(write(0, 0, &limits), Err(Status::IoErr));
    assert!(read(0, 512, &limits).is_ok());
    assert_eq!(
        decode(&header(FLUSH, 0), true, 0, 0, &limits),
        Ok(Request::Flush)
    );
}

#[test]
fn data_counts_in_the_direction_of_the_request_only() {
    // A read with odd bytes behind its header, and a write with room to write to.
    assert_eq!(
        decode(&header(IN, 1), true, 7, 512, &DISK),
        Ok(Request::In {
            sector: 1,
            len: 512
        })
    );
    assert_eq!(
        decode(&header(OUT, 1), true, 512, 7, &DISK),
        Ok(Request::Out {
            sector: 1,
            len: 512
        })
    );
}

#[test]
fn arrays_of_segments() {
    for (kind, op, bit) in RANGES {
        let ranges =
            |readable, limits: &Limits| decode(&header(kind, 7), true, readable, 0, limits);
        for count in [1, 2, 255, 256] {
            let expected = Ok(Request::Ranges { op, count });
            assert_eq!(ranges(16 * count as u64, &DISK), expected);
        }
        for len in [
            0,
            1,
            15,
            17,
            31,
            4095,
            4097,
            4112,
            1 << 40,
            u64::MAX,
            u64::MAX - 15,
        ] {
            assert_eq!(ranges(len, &DISK), Err(Status::IoErr), "{len}");
        }
        let read_only = Limits {
            read_only: true,
            ..DISK
        };
        assert_eq!(ranges(16, &read_only), Err(Status::IoErr));
        let without = Limits {
            features: !(1 << bit),
            ..DISK
        };
        assert_eq!(ranges(16, &without), Err(Status::Unsupp));
        assert_eq!(ranges(17, &without), Err(Status::Unsupp));
    }
}

#[test]
fn headers_of_either_endianness() {
    let mut big = [0; HEADER_LEN];
    big[..4].copy_from_slice(&OUT.to_be_bytes());
    big[8..].copy_from_slice(&258u64.to_be_bytes());
    assert_eq!(
        decode(&big, false, 512, 0, &DISK),
        Ok(Request::Out {
            sector: 258,
            len: 512
        })
    );
    assert_eq!(decode(&big, true, 512, 0, &DISK), Err(Status::Unsupp));
}

/// Numbers near what matters: 0, the end of the disk, powers of two, the most.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..2100u64,
        (0..64u32, 0..3u64)
            .prop_map(|(bit, near)| (1u64 << bit).wrapping_add(near).wrapping_sub(1)),
        (0..5000u64).prop_map(|back| u64::MAX - back),
        (0..300u64).prop_map(|blocks| blocks * 512),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    (number(), 9..=12u32, any::<bool>(), any::<u64>()).prop_map(
        |(capacity, shift, read_only, features)| Limits {
            capacity,
            logical_block_size: 1 << shift,
            read_only,
            features,
            zones: None,
        },
    )
}

fn kind() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0..30u32]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    /// What is let through is whole blocks within the disk, in arithmetic that
    /// cannot overflow; and all that is so is let through.
    #[test]
    fn ranges_are_let_through_exactly(
        kind in kind(), sector in number(), readable in number(), writable in number(),
        limits in limits(),
    ) {
        let len = if kind == OUT { readable } else { writable };
        let block = u128::from(limits.logical_block_size);
        let start = u128::from(sector) * u128::from(SECTOR_SIZE);
        let end = start + u128::from(len);
        let fits = start % block == 0
            && u128::from(len) % block == 0
            && end <= u128::from(limits.capacity) * u128::from(SECTOR_SIZE)
            && len < 1 << 31;
        let expected = match kind {
            IN if fits => Ok(Request::In { sector, len }),
            OUT if fits && !limits.read_only => Ok(Request::Out { sector, len }),
            IN | OUT => Err(Status::IoErr),
            FLUSH => Ok(Request::Flush),
            GET_ID => Ok(Request::GetId),
            _ => match RANGES.iter().find(|(number, ..)| *number == kind) {
                Some((_, _, bit)) if (limits.features >> bit) & 1 == 0 => Err(Status::Unsupp),
                Some(_) if limits.read_only => Err(Status::IoErr),
                Some((_, op, _)) if readable % 16 == 0 && (16..=4096).contains(&readable) => {
                    Ok(Request::Ranges { op: *op, count: (readable / 16) as usize })
                }
                Some(_) => Err(Status::IoErr),
                None => Err(Status::Unsupp),
            },
        };
        prop_assert_eq!(
            decode(&header(kind, sector), true, readable, writable, &limits),
            expected
        );
    }

    /// Any bytes give an answer.
    #[test]
    fn no_header_is_too_strange(
        bytes in any::<[u8; HEADER_LEN]>(), little in any::<bool>(), readable in any::<u64>(),
        writable in any::<u64>(), limits in limits(),
    ) {
        match decode(&bytes, little, readable, writable, &limits) {
            Ok(Request::In { len, .. }) => prop_assert_eq!(len, writable),
            Ok(Request::Out { len, .. }) => prop_assert_eq!(len, readable),
            Ok(Request::Ranges { count, .. }) => prop_assert_eq!(16 * count as u64, readable),
            Ok(Request::Flush | Request::GetId) => {}
            Ok(Request::Zone(zone)) => prop_assert!(false, "{:?} of a disk without", zone),
            Err(status) => prop_assert_ne!(status, Status::Ok),
        }
    }

    /// The reserved word has no meaning.
    #[test]
    fn reserved_is_ignored(kind in kind(), sector in number(), reserved in any::<u32>()) {
        let plain = header(kind, sector);
        let mut odd = plain;
        odd[4..8].copy_from_slice(&reserved.to_le_bytes());
        prop_assert_eq!(
            decode(&plain, true, 512, 512, &DISK),
            decode(&odd, true, 512, 512, &DISK)
        );
    }
}
