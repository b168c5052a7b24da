// SPDX-License-Identifier: GPL-2.0

//! What the descriptors of a chain say, for chains as drivers usually make them, on a little-endian ring.
//!
//! Everything else is left to the vhost core, errors included: what is not usual here is `None`.
//!
//! Pure code without kernel types, compiled again for the tests in user space.
//!
//! Source: virtio 1.3, 2.7.5.

/// `VIRTQ_DESC_F_*`.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
const LEN: usize = 16;

/// Descriptors of an indirect table that are read at once.
pub(crate) const BLOCK: usize = 4;

/// Descriptors that a chain of the ring's own may have.
const MAX_CHAINED: u16 = 8;

/// A descriptor as it stands in memory.
pub(crate) type Words = [u64; 2];

/// A descriptor.
#[derive(Copy, Clone)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[inline]
    fn new([address, rest]: Words) -> Self {
        let (address, rest) = (u64::from_le(address), u64::from_le(rest));
        // CAST: The fields of the second word, from its low bytes on.
        Self {
            address,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    #[inline]
    fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A stretch of the guest's memory, and where it is in its owner's.
#[derive(Copy, Clone)]
pub(crate) struct Region {
    /// The guest's addresses of its first and last byte. With the last before the first it is empty.
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// The owner's address of its first byte.
    pub(crate) address: u64,
}

impl Region {
    pub(crate) const EMPTY: Self = Self {
        first: 1,
        last: 0,
        address: 0,
    };

    /// The owner's address of `len` bytes of the guest's, if there are any and all are in this region.
    #[inline]
    pub(crate) fn translate(&self, address: u64, len: u32) -> Option<u64> {
        let behind_first = u64::from(len).checked_sub(1)?;
        let within = self.first <= address
            && address <= self.last
            && behind_first <= self.last.wrapping_sub(address);
        within.then(|| self.address.wrapping_add(address.wrapping_sub(self.first)))
    }
}

/// The guest's memory, and what is made of a chain.
pub(crate) trait Memory {
    /// The owner's address of `len` bytes of the guest's, all of which the guest may read and write.
    fn translate(&mut self, address: u64, len: u32) -> Option<u64>;

    /// Reads descriptors from an address of the owner's.
    fn read(&mut self, address: u64, out: &mut [Words]) -> Option<()>;

    /// Takes the next stretch of a chain, of so many bytes from an address of the owner's on.
    fn push(&mut self, address: u64, len: u32) -> Option<()>;
}

/// How many stretches of memory a chain has that the device reads, and that it writes, and how many bytes these
/// are; and how many descriptors of the ring.
#[derive(Copy, Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) readable: usize,
    pub(crate) writable: usize,
    pub(crate) readable_len: u64,
    pub(crate) writable_len: u64,
    pub(crate) descriptors: u16,
}

impl Counts {
    /// Adds what a descriptor says, which is no indirect table.
    // It has two callers, and is called for each descriptor of each request.
    #[inline(always)]
    fn add(&mut self, memory: &mut impl Memory, descriptor: Descriptor) -> Option<()> {
        let Descriptor { address, len, .. } = descriptor;
        if descriptor.has(INDIRECT) {
            return None;
        }
        if descriptor.has(WRITE) {
            self.writable += 1;
            self.writable_len += u64::from(len);
        } else if self.writable == 0 {
            self.readable += 1;
            self.readable_len += u64::from(len);
        } else {
            return None;
        }
        let address = memory.translate(address, len)?;
        memory.push(address, len)
    }
}

/// Reads the chain that begins with descriptor `head` of the ring's `num`, which are at `table` in the owner's
/// memory. Its stretches go to `memory`, those that the device reads first.
#[inline]
pub(crate) fn chain(memory: &mut impl Memory, table: u64, num: u16, head: u16) -> Option<Counts> {
    if head >= num {
        return None;
    }
    let first = read_one(memory, table, head)?;
    if first.has(INDIRECT) {
        return indirect(memory, first);
    }

    let mut counts = Counts::default();
    let mut descriptor = first;
    while counts.descriptors < MAX_CHAINED.min(num) {
        counts.descriptors += 1;
        counts.add(memory, descriptor)?;
        if !descriptor.has(NEXT) {
            return Some(counts);
        }
        if descriptor.next >= num {
            return None;
        }
        descriptor = read_one(memory, table, descriptor.next)?;
    }
    None
}

/// Reads the descriptor at `index` of a table of the owner's.
#[inline]
fn read_one(memory: &mut impl Memory, table: u64, index: u16) -> Option<Descriptor> {
    let mut words = [[0; 2]];
    memory.read(
        table.wrapping_add(u64::from(index) * LEN as u64),
        &mut words,
    )?;
    Some(Descriptor::new(words[0]))
}

/// Reads the chain of an indirect table, which goes from its first descriptor on without a gap.
#[inline]
fn indirect(memory: &mut impl Memory, table: Descriptor) -> Option<Counts> {
    if table.has(NEXT) || table.len % LEN as u32 != 0 {
        return None;
    }
    let mut left = table.len as usize / LEN;
    let mut address = memory.translate(table.address, table.len)?;
    let mut counts = Counts {
        descriptors: 1,
        ..Counts::default()
    };
    while left > 0 {
        let mut words = [[0; 2]; BLOCK];
        let block = words.get_mut(..left.min(BLOCK))?;
        memory.read(address, block)?;
        left -= block.len();
        address = address.wrapping_add((block.len() * LEN) as u64);

        for words in block {
            let descriptor = Descriptor::new(*words);
            counts.add(memory, descriptor)?;
            if !descriptor.has(NEXT) {
                return Some(counts);
            }
        }
    }
    None
}
