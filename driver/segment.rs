// SPDX-License-Identifier: GPL-2.0

//! Segments of discard, write zeroes and secure erase: decoding, and cutting into what a disk takes.
//!
//! Pure code without kernel types, compiled again for the tests in user space.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.3, section 5.2.6, `struct virtio_blk_discard_write_zeroes`.

use super::request::{
    check_range,
    Limits,
    RangeOp,
    Status,
    F_DISCARD,
    SECTOR_SIZE, //
};

/// Bytes of a segment: sector, number of sectors, flags.
pub(crate) const SEGMENT_LEN: usize = 16;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const FLAG_UNMAP: u32 = 1 << 0;

/// A range of the disk.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// First sector.
    pub(crate) sector: u64,
    /// Count of sectors, whole logical blocks; 0 is allowed.
    pub(crate) sectors: u32,
    /// What is zeroed may be deallocated. That is up to the device, which does not do it if discards were
    /// not negotiated: user space does not offer them if the disk is to stay allocated.
    pub(crate) unmap: bool,
}

/// Decodes and checks a segment.
///
/// # Errors
///
/// The status to complete the request with: [`Status::Unsupp`] for flags that the request does not have,
/// [`Status::IoErr`] for a range that is not whole blocks of the disk.
pub(crate) fn decode(
    bytes: &[u8; SEGMENT_LEN],
    little_endian: bool,
    op: RangeOp,
    limits: &Limits,
) -> Result<Segment, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *bytes;
    let (sector, sectors) = ([s0, s1, s2, s3, s4, s5, s6, s7], [n0, n1, n2, n3]);
    let (sector, sectors, flags) = if little_endian {
        (
            u64::from_le_bytes(sector),
            u32::from_le_bytes(sectors),
            u32::from_le_bytes(flags),
        )
    } else {
        (
            u64::from_be_bytes(sector),
            u32::from_be_bytes(sectors),
            u32::from_be_bytes(flags),
        )
    };

    let allowed = match op {
        RangeOp::WriteZeroes => FLAG_UNMAP,
        RangeOp::Discard | RangeOp::SecureErase => 0,
    };
    if flags & !allowed != 0 {
        return Err(Status::Unsupp);
    }
    check_range(sector, u64::from(sectors) * SECTOR_SIZE, limits)?;
    Ok(Segment {
        sector,
        sectors,
        unmap: flags & FLAG_UNMAP != 0 && limits.negotiated(F_DISCARD),
    })
}

/// Where a range is cut, so that the disk takes each piece as one request. Everything is in sectors.
///
/// The block layer would cut a bio in the same places, but all of it at once, and wait for the disk in
/// between.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Cut {
    /// Largest piece.
    pub(crate) most: u32,
    /// Pieces that are not the last of a range end at multiples of this, if they can.
    pub(crate) unit: u32,
    /// No piece goes across a multiple of this; 0 for none.
    pub(crate) boundary: u32,
    /// Size of a logical block: every piece is whole blocks.
    pub(crate) block: u32,
    /// What stands before sector 0, for `unit` and `boundary`: where a partition starts, for instance.
    pub(crate) before: u64,
}

impl Cut {
    /// Largest piece, whatever the disk says: 1 GiB.
    const MOST: u32 = 1 << 21;

    /// How many of the `left` sectors from `sector` on are the next piece: at least one block, if as much
    /// is left.
    pub(crate) fn len(&self, sector: u64, left: u32) -> u32 {
        let block = self.block.max(1);
        let unit = self.unit.max(1);
        let at = self.before.wrapping_add(sector);
        // Whole units, then whole blocks, if it is less than one.
        let most = self.most.min(Self::MOST.max(unit));
        let mut most = match most - most % unit {
            0 => most,
            whole => whole,
        };
        if self.boundary != 0 {
            // CAST: Not above the boundary.
            most = most.min(self.boundary - (at % u64::from(self.boundary)) as u32);
        }
        if left > most {
            // CAST: Less than the unit.
            let over = (at.wrapping_add(u64::from(most)) % u64::from(unit)) as u32;
            if over < most {
                most -= over;
            }
        }
        let most = (most - most % block).max(block);
        left.min(most)
    }
}
