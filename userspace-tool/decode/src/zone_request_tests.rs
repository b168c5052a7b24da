// SPDX-License-Identifier: GPL-2.0

//! Tests of `driver/zone_request.rs`.

use proptest::prelude::*;

use crate::request::{self, Status, HEADER_LEN};
use crate::zone_request::{
    decode, is_uncut, max_append_sectors, report_header, zone_of, zones_from, Limits, Op, Request,
    Zone, DESCRIPTOR_LEN, STATE_EMPTY, STATE_FULL, STATE_OFFLINE, STATE_READ_ONLY,
    TYPE_CONVENTIONAL,
};

const APPEND: u32 = 15;
const REPORT: u32 = 16;
const OPEN: u32 = 18;
const CLOSE: u32 = 20;
const FINISH: u32 = 22;
const RESET: u32 = 24;
const RESET_ALL: u32 = 26;
const ALL: [u32; 7] = [APPEND, REPORT, OPEN, CLOSE, FINISH, RESET, RESET_ALL];

/// Zones of 64 sectors.
const ZONES: Limits = Limits {
    zone_sectors: 64,
    max_append_sectors: 32,
    write_granularity: 512,
    writes_queue: false,
};

/// Fifteen zones, and one of 40 sectors.
const CAPACITY: u64 = 1000;

const INVALID: Status = Status::ZoneInvalidCmd;
const UNALIGNED: Status = Status::ZoneUnalignedWp;

/// A zone of which some was written.
const OPENED: Zone = Zone {
    start: 128,
    capacity: 48,
    write_pointer: 136,
    kind: 2,
    state: 2,
};

fn zoned(kind: u32, sector: u64, readable: u64, writable: u64) -> Result<Request, Status> {
    let limits = Some(ZONES);
    decode(kind, sector, readable, writable, CAPACITY, false, limits)
}

#[test]
fn statuses_are_those_of_virtio() {
    let statuses = [
        INVALID,
        UNALIGNED,
        Status::ZoneOpenResource,
        Status::ZoneActiveResource,
    ];
    assert_eq!(statuses.map(|status| status as u8), [3, 4, 5, 6]);
}

#[test]
fn types() {
    for (number, op) in [
        (OPEN, Op::Open),
        (CLOSE, Op::Close),
        (FINISH, Op::Finish),
        (RESET, Op::Reset),
    ] {
        for sector in [0, 64, 960] {
            let expected = Ok(Request::Manage { op, sector });
            assert_eq!(zoned(number, sector, 0, 0), expected);
        }
        for sector in [1, 63, 65, 999, 1000, 1024, 1 << 63, u64::MAX - 63, u64::MAX] {
            assert_eq!(zoned(number, sector, 0, 0), Err(INVALID), "{sector}");
        }
    }
    for sector in [0, 7, u64::MAX] {
        assert_eq!(zoned(RESET_ALL, sector, 0, 0), Ok(Request::ResetAll));
    }
    for number in (0..64).filter(|number| !ALL.contains(number)) {
        assert_eq!(zoned(number, 0, 512, 512), Err(Status::Unsupp), "{number}");
    }
}

#[test]
fn without_zones_there_are_no_such_requests() {
    for number in ALL {
        for read_only in [false, true] {
            let result = decode(number, 0, 512, 512, CAPACITY, read_only, None);
            assert_eq!(result, Err(Status::Unsupp));
        }
    }
}

#[test]
fn a_read_only_disk_reports_and_no_more() {
    for number in ALL {
        let result = decode(number, 0, 512, 512, CAPACITY, true, Some(ZONES));
        if number == REPORT {
            assert!(result.is_ok());
        } else {
            assert_eq!(result, Err(Status::IoErr), "{number}");
        }
    }
}

#[test]
fn reports() {
    for (writable, zones) in [(128, 1), (191, 1), (192, 2), (0x7fff_fe00, (1 << 25) - 9)] {
        for sector in [0, 1, 999, 1000] {
            let expected = Ok(Request::Report { sector, zones });
            assert_eq!(zoned(REPORT, sector, 0, writable), expected);
        }
        for sector in [1001, 1 << 55, u64::MAX] {
            assert_eq!(zoned(REPORT, sector, 0, writable), Err(INVALID));
        }
    }
    for writable in [0, 1, 63, 64, 127, 0x7fff_fe01, u64::MAX] {
        assert_eq!(zoned(REPORT, 0, 0, writable), Err(INVALID), "{writable}");
    }
}

#[test]
fn appends() {
    let at = |sector| Ok(Request::Append { sector });
    for len in [512, 32 * 512] {
        assert_eq!(zoned(APPEND, 64, len, 8), at(64));
        assert_eq!(zoned(APPEND, 64, len, 9), at(64));
        assert_eq!(zoned(APPEND, 64, len, 7), Err(INVALID));
        assert_eq!(zoned(APPEND, 65, len, 8), Err(INVALID));
    }
    for len in [0, 33 * 512, 512 << 50] {
        assert_eq!(zoned(APPEND, 64, len, 8), Err(INVALID), "{len}");
    }
    for len in [1, 511, 513] {
        assert_eq!(zoned(APPEND, 64, len, 8), Err(UNALIGNED), "{len}");
    }
    for sector in [1000, 1024, u64::MAX - 63, u64::MAX] {
        assert_eq!(zoned(APPEND, sector, 512, 8), Err(INVALID), "{sector}");
    }
    let of =
        |limits: Limits, sector, len| decode(APPEND, sector, len, 8, CAPACITY, false, Some(limits));
    let none = Limits {
        max_append_sectors: 0,
        ..ZONES
    };
    assert_eq!(of(none, 64, 512), Err(Status::Unsupp));
    let coarse = Limits {
        write_granularity: 4096,
        ..ZONES
    };
    assert_eq!(of(coarse, 64, 4096), at(64));
    assert_eq!(of(coarse, 64, 512), Err(UNALIGNED));
    assert_eq!(of(coarse, 68, 4096), Err(UNALIGNED));
    assert_eq!(of(coarse, 72, 4096), Err(INVALID));
    let large = Limits {
        max_append_sectors: u32::MAX,
        ..ZONES
    };
    assert_eq!(of(large, 64, 64 * 512), at(64));
    assert_eq!(of(large, 64, 65 * 512), Err(INVALID));
    assert_eq!(of(large, 960, 40 * 512), at(960));
    assert_eq!(of(large, 960, 41 * 512), Err(INVALID));
}

#[test]
fn appends_are_bounded_by_what_fits_one_bio() {
    assert_eq!(max_append_sectors(u32::MAX, usize::MAX), 512);
    assert_eq!(max_append_sectors(512, 64), 512);
    assert_eq!(max_append_sectors(512, 63), 504);
    assert_eq!(max_append_sectors(100, 128), 100);
    assert_eq!(max_append_sectors(0, 128), 0);
}

#[test]
fn the_hook_passes_everything_on() {
    let limits = request::Limits {
        capacity: CAPACITY,
        logical_block_size: 512,
        read_only: false,
        features: u64::MAX,
        zones: Some(ZONES),
    };
    let decoded = |kind: u32, sector: u64, limits: &request::Limits| {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        request::decode(&header, true, 512, 192, limits)
    };
    for (kind, request) in [
        (APPEND, Request::Append { sector: 64 }),
        (
            REPORT,
            Request::Report {
                sector: 64,
                zones: 2,
            },
        ),
        (
            OPEN,
            Request::Manage {
                op: Op::Open,
                sector: 64,
            },
        ),
    ] {
        let expected = Ok(request::Request::Zone(request));
        assert_eq!(decoded(kind, 64, &limits), expected);
        let unaware = request::Limits {
            zones: None,
            ..limits
        };
        assert_eq!(decoded(kind, 64, &unaware), Err(Status::Unsupp));
    }
}

#[test]
fn writes() {
    let write = |zone: Zone, sector, sectors| zone.check_write(sector, sectors, &ZONES);
    assert_eq!(write(OPENED, 136, 1), Ok(()));
    assert_eq!(write(OPENED, 136, 40), Ok(()));
    assert_eq!(write(OPENED, 136, 41), Err(INVALID));
    // It may follow one that is in flight.
    assert_eq!(write(OPENED, 137, 1), Ok(()));
    assert_eq!(write(OPENED, 176, 1), Err(INVALID));
    assert_eq!(write(OPENED, 135, 1), Err(UNALIGNED));
    assert_eq!(write(OPENED, 128, 1), Err(UNALIGNED));
    assert_eq!(OPENED.status_of_failed_write(136), Status::IoErr);
    assert_eq!(OPENED.status_of_failed_write(137), UNALIGNED);

    let empty = Zone {
        write_pointer: 128,
        state: STATE_EMPTY,
        ..OPENED
    };
    assert_eq!(write(empty, 128, 48), Ok(()));
    assert_eq!(write(empty, 129, 1), Err(UNALIGNED));
    let queued = Limits {
        writes_queue: true,
        ..ZONES
    };
    assert_eq!(empty.check_write(129, 1, &queued), Ok(()));
    assert_eq!(empty.status_of_failed_write(129), UNALIGNED);

    for state in [STATE_FULL, STATE_READ_ONLY, STATE_OFFLINE] {
        let zone = Zone {
            state,
            write_pointer: u64::MAX,
            ..OPENED
        };
        assert_eq!(write(zone, 136, 1), Err(INVALID), "{state}");
        assert_eq!(zone.check_append(1), Err(INVALID), "{state}");
    }
    let conventional = Zone {
        kind: TYPE_CONVENTIONAL,
        state: 0,
        write_pointer: u64::MAX,
        ..OPENED
    };
    assert_eq!(write(conventional, 130, 64), Ok(()));
    assert_eq!(conventional.status_of_failed_write(130), Status::IoErr);
    assert_eq!(conventional.check_append(1), Err(INVALID));
    assert_eq!(OPENED.check_append(40), Ok(()));
    assert_eq!(OPENED.check_append(41), Err(INVALID));

    let coarse = Limits {
        write_granularity: 4096,
        ..ZONES
    };
    assert_eq!(OPENED.check_write(136, 8, &coarse), Ok(()));
    assert_eq!(OPENED.check_write(136, 9, &coarse), Err(UNALIGNED));
    assert_eq!(OPENED.check_write(137, 8, &coarse), Err(UNALIGNED));
}

#[test]
fn what_cannot_be_done_with_a_zone() {
    for (state, refused) in [
        (STATE_EMPTY, vec![Op::Close]),
        (2, vec![]),
        (3, vec![]),
        (4, vec![]),
        (STATE_FULL, vec![Op::Open, Op::Close]),
        (
            STATE_READ_ONLY,
            vec![Op::Open, Op::Close, Op::Finish, Op::Reset],
        ),
        (
            STATE_OFFLINE,
            vec![Op::Open, Op::Close, Op::Finish, Op::Reset],
        ),
    ] {
        let zone = Zone { state, ..OPENED };
        for op in [Op::Open, Op::Close, Op::Finish, Op::Reset] {
            let result = zone.check_manage(op);
            assert_eq!(result.is_err(), refused.contains(&op), "{state} {op:?}");
            let kind = TYPE_CONVENTIONAL;
            assert!(Zone { kind, ..zone }.check_manage(op).is_err());
        }
    }
}

#[test]
fn descriptors() {
    let zone = Zone {
        start: 0x0102,
        capacity: 3,
        write_pointer: 1 << 56,
        kind: 4,
        state: 5,
    };
    let mut expected = [0; DESCRIPTOR_LEN];
    for (at, byte) in [(0, 3), (8, 2), (9, 1), (23, 1), (24, 4), (25, 5)] {
        expected[at] = byte;
    }
    assert_eq!(zone.descriptor(true), expected);
    let big = zone.descriptor(false);
    assert_eq!((big[7], big[14], big[15], big[16]), (3, 1, 2, 1));
    assert_eq!(report_header(258, true)[..3], [2, 1, 0]);
    assert_eq!(report_header(258, false)[5..9], [0, 1, 2, 0]);
}

#[test]
fn bios_that_are_not_cut() {
    let uncut = |segments: &[(usize, usize)], pages, max, boundary| {
        is_uncut(segments.iter().copied(), pages, max, boundary)
    };
    assert!(uncut(&[(0x1200, 512), (0x5200, 512)], 2, 2, 0));
    assert!(!uncut(&[(0x1200, 512), (0x5200, 512)], 2, 1, 0));
    assert!(!uncut(&[(0x1200, 512), (0x5200, 512)], 2, 2, 4095));
    assert!(uncut(&[(0x1200, 0xe00), (0x5000, 512)], 2, 2, 4095));
    assert!(!uncut(&[(0x1200, 0xe00), (0x5200, 512)], 2, 2, 4095));
    assert!(uncut(&[(0x1200, 512)], 1, 1, 4095));
    assert!(uncut(&[], 0, 0, 4095));
}

#[test]
fn zones_are_counted_from_the_one_with_the_sector() {
    for (sector, zones) in [(0, 16), (63, 16), (64, 15), (959, 2), (960, 1), (999, 1)] {
        assert_eq!(zones_from(sector, CAPACITY, &ZONES), zones, "{sector}");
    }
    assert_eq!(zones_from(1024, CAPACITY, &ZONES), 0);
    assert_eq!(zones_from(u64::MAX, CAPACITY, &ZONES), 0);
}

proptest! {
    #[test]
    fn what_is_let_through_is_within_the_disk(
        kind in prop::sample::select(&ALL[..]),
        sector in prop_oneof![0..2000u64, any::<u64>()],
        readable in prop_oneof![(0..100u64).prop_map(|n| n * 512), any::<u64>()],
        writable in prop_oneof![0..10_000u64, any::<u64>()],
        zone_sectors in prop_oneof![Just(64u64), 1..3000u64],
        max_append_sectors in any::<u32>(),
    ) {
        let limits = Limits { zone_sectors, max_append_sectors, write_granularity: 512, writes_queue: false };
        let decoded = decode(kind, sector, readable, writable, CAPACITY, false, Some(limits));
        match decoded {
            Ok(Request::Append { sector }) => {
                let (start, next) = zone_of(sector, &limits);
                let end = sector + readable / 512;
                prop_assert!(start == sector && end <= next.min(CAPACITY) && end > sector);
            }
            Ok(Request::Manage { sector, .. }) => {
                prop_assert!(sector < CAPACITY && zone_of(sector, &limits).0 == sector);
            }
            Ok(Request::Report { sector, zones }) => {
                prop_assert!(sector <= CAPACITY && zones > 0 && 64 + zones * 64 <= writable);
            }
            Ok(Request::ResetAll) | Err(_) => (),
        }
    }
}
