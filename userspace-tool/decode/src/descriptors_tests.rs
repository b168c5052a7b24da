// SPDX-License-Identifier: GPL-2.0

//! Tests of `bindings/vhost/descriptors.rs`: against a second reader of the same memory, which follows the
//! specification one descriptor at a time and knows no shortcuts.

use proptest::prelude::*;

use crate::descriptors::{chain, Counts, Memory, Region, Words};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The guest's memory: its addresses from `FIRST` on are the owner's from `OWNER` on.
const FIRST: u64 = 0x1_0000;
const OWNER: u64 = 0x7000_0000;
/// Descriptors that fit it.
const COUNT: usize = 64;
/// Stretches that fit a chain.
const ROOM: usize = 20;

fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Words {
    let rest = u64::from(len) | (u64::from(flags) << 32) | (u64::from(next) << 48);
    [address.to_le(), rest.to_le()]
}

struct Guest {
    region: Region,
    descriptors: Vec<Words>,
    stretches: Vec<(u64, u32)>,
}

impl Guest {
    fn new(descriptors: &[Words]) -> Self {
        Self {
            region: Region {
                first: FIRST,
                last: FIRST + (COUNT * 16) as u64 - 1,
                address: OWNER,
            },
            descriptors: descriptors.to_vec(),
            stretches: Vec::new(),
        }
    }

    fn at(&self, address: u64) -> Option<Words> {
        let offset = address.checked_sub(OWNER)?;
        if offset % 16 != 0 {
            return None;
        }
        self.descriptors.get((offset / 16) as usize).copied()
    }
}

impl Memory for Guest {
    fn translate(&mut self, address: u64, len: u32) -> Option<u64> {
        self.region.translate(address, len)
    }

    fn read(&mut self, address: u64, out: &mut [Words]) -> Option<()> {
        for (index, words) in out.iter_mut().enumerate() {
            *words = self.at(address + 16 * index as u64)?;
        }
        Some(())
    }

    fn push(&mut self, address: u64, len: u32) -> Option<()> {
        if self.stretches.len() == ROOM {
            return None;
        }
        self.stretches.push((address, len));
        Some(())
    }
}

/// What the chain of `head` says, read in the plainest way; `None` if it is broken, or unusual.
fn plain(guest: &Guest, num: u16, head: u16) -> Option<(Counts, Vec<(u64, u32)>)> {
    let fields = |words: Words| {
        let rest = u64::from_le(words[1]);
        let (flags, next) = ((rest >> 32) as u16, (rest >> 48) as u16);
        (u64::from_le(words[0]), rest as u32, flags, next)
    };
    let mut counts = Counts::default();
    let mut stretches = Vec::new();
    let mut add = |counts: &mut Counts, address: u64, len: u32, flags: u16| {
        let end = u128::from(address) + u128::from(len);
        if flags & INDIRECT != 0
            || len == 0
            || address < FIRST
            || end > u128::from(FIRST + (COUNT * 16) as u64)
            || (flags & WRITE == 0 && counts.writable != 0)
            || stretches.len() == ROOM
        {
            return None;
        }
        if flags & WRITE == 0 {
            counts.readable += 1;
            counts.readable_len += u64::from(len);
        } else {
            counts.writable += 1;
            counts.writable_len += u64::from(len);
        }
        stretches.push((address - FIRST + OWNER, len));
        Some(())
    };

    let (mut index, mut table) = (u64::from(head), None);
    if index >= u64::from(num) {
        return None;
    }
    let (address, len, flags, _) = fields(guest.at(OWNER + 16 * index)?);
    if flags & INDIRECT != 0 {
        if flags & NEXT != 0 || len == 0 || len % 16 != 0 || address < FIRST {
            return None;
        }
        if u128::from(address) + u128::from(len) > u128::from(FIRST + (COUNT * 16) as u64) {
            return None;
        }
        counts.descriptors = 1;
        table = Some((address - FIRST + OWNER, u64::from(len / 16)));
        index = 0;
    }
    loop {
        let (base, num) = table.unwrap_or((OWNER, u64::from(num)));
        if index >= num || (table.is_none() && counts.descriptors == num.min(8) as u16) {
            return None;
        }
        let (address, len, flags, next) = fields(guest.at(base + 16 * index)?);
        if table.is_none() {
            counts.descriptors += 1;
        }
        add(&mut counts, address, len, flags)?;
        if flags & NEXT == 0 {
            return Some((counts, stretches));
        }
        // An indirect table is read from its start on, whatever `next` says.
        index = if table.is_some() {
            index + 1
        } else {
            u64::from(next)
        };
    }
}

fn read(descriptors: &[Words], num: u16, head: u16) -> Option<(Counts, Vec<(u64, u32)>)> {
    let mut guest = Guest::new(descriptors);
    let counts = chain(&mut guest, OWNER, num, head)?;
    Some((counts, guest.stretches))
}

#[test]
fn a_chain_of_the_ring() {
    let ring = [
        descriptor(FIRST + 8, 1, WRITE, 9),
        descriptor(FIRST, 16, NEXT, 2),
        descriptor(FIRST + 100, 512, NEXT | WRITE, 0),
    ];
    let counts = Counts {
        readable: 1,
        writable: 2,
        readable_len: 16,
        writable_len: 513,
        descriptors: 3,
    };
    let stretches = vec![(OWNER, 16), (OWNER + 100, 512), (OWNER + 8, 1)];
    assert_eq!(read(&ring, 4, 1), Some((counts, stretches)));
}

#[test]
fn an_indirect_table_longer_than_a_block() {
    for count in [1, 3, 4, 5, 8, 9, 19] {
        let mut memory = vec![descriptor(FIRST + 16, 16 * count, INDIRECT | WRITE, 0)];
        for index in 0..count {
            let next = if index + 1 == count { 0 } else { NEXT };
            memory.push(descriptor(FIRST + u64::from(index), 1, WRITE | next, 0));
        }
        let (counts, stretches) = read(&memory, 1, 0).expect("a usual chain");
        assert_eq!((counts.readable, counts.writable), (0, count as usize));
        assert_eq!(counts.descriptors, 1);
        assert_eq!(stretches.last(), Some(&(OWNER + u64::from(count) - 1, 1)));
    }
}

#[test]
fn what_is_left_to_the_core() {
    let table = |len, flags| {
        [
            descriptor(FIRST + 16, len, flags, 0),
            descriptor(FIRST, 1, 0, 0),
        ]
    };
    assert!(read(&table(16, INDIRECT), 1, 0).is_some());
    // Its length, a next one, one in a table, none at all.
    assert_eq!(read(&table(0, INDIRECT), 1, 0), None);
    assert_eq!(read(&table(24, INDIRECT), 1, 0), None);
    assert_eq!(read(&table(16, INDIRECT | NEXT), 1, 0), None);
    assert_eq!(read(&[table(16, INDIRECT)[0]; 2], 1, 0), None);
    assert_eq!(read(&table(16, INDIRECT), 1, 1), None);
    // A table that goes on behind its end, a loop, readable behind writable, no bytes.
    let one = |flags| {
        [
            descriptor(FIRST + 16, 16, INDIRECT, 0),
            descriptor(FIRST, 1, flags, 0),
        ]
    };
    assert_eq!(read(&one(NEXT), 2, 0), None);
    assert_eq!(read(&[descriptor(FIRST, 1, NEXT, 0)], 1, 0), None);
    assert_eq!(read(&[descriptor(FIRST, 1, NEXT, 1)], 1, 0), None);
    let behind = [
        descriptor(FIRST, 1, NEXT | WRITE, 1),
        descriptor(FIRST, 1, 0, 0),
    ];
    assert_eq!(read(&behind, 2, 0), None);
    assert_eq!(read(&[descriptor(FIRST, 0, 0, 0)], 1, 0), None);
}

#[test]
fn a_region_to_its_last_byte() {
    let region = Region {
        first: FIRST,
        last: FIRST + 99,
        address: OWNER,
    };
    assert_eq!(region.translate(FIRST, 100), Some(OWNER));
    assert_eq!(region.translate(FIRST + 99, 1), Some(OWNER + 99));
    for (address, len) in [
        (FIRST, 101),
        (FIRST - 1, 2),
        (FIRST + 99, 2),
        (FIRST + 100, 1),
        (FIRST, 0),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (FIRST + 1, u32::MAX),
    ] {
        assert_eq!(region.translate(address, len), None, "{address:#x}, {len}");
    }
    let all = Region {
        first: 0,
        last: u64::MAX,
        address: 0,
    };
    assert_eq!(all.translate(u64::MAX, 1), Some(u64::MAX));
    assert_eq!(all.translate(u64::MAX, 2), None);
    assert_eq!(Region::EMPTY.translate(0, 1), None);
    assert_eq!(Region::EMPTY.translate(1, 1), None);
}

/// Mostly sensible descriptors, and some of anything.
fn any_descriptor() -> impl Strategy<Value = Words> {
    let address = prop_oneof![
        8 => (0..COUNT as u64).prop_map(|index| FIRST + 16 * index),
        1 => FIRST - 4..FIRST + (COUNT * 16) as u64 + 4,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![6 => (1..8u32).prop_map(|n| 16 * n), 2 => 0..600u32, 1 => any::<u32>()];
    let flags = prop_oneof![
        6 => Just(NEXT),
        6 => Just(NEXT | WRITE),
        4 => Just(WRITE),
        2 => Just(0),
        3 => Just(INDIRECT),
        1 => 0..8u16,
        1 => any::<u16>(),
    ];
    let next = prop_oneof![12 => 0..COUNT as u16, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(a, l, f, n)| descriptor(a, l, f, n))
}

proptest! {
    #[test]
    fn both_readers_agree(
        descriptors in prop::collection::vec(any_descriptor(), COUNT),
        order in 0..7u32,
        head in prop_oneof![9 => 0..4u16, 1 => 0..70u16],
    ) {
        let num = 1 << order;
        let expected = plain(&Guest::new(&descriptors), num, head);
        prop_assert_eq!(read(&descriptors, num, head), expected);
    }
}
