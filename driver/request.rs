// SPDX-License-Identifier: GPL-2.0

//! Decoding of requests: bytes of a guest in, a checked request or a status out.
//!
//! Pure code without kernel types, compiled again for the tests in user space.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.3, section 5.2.6, 'Device Operation' of the block device.

use super::{
    segment::SEGMENT_LEN,
    zone_request, //
};

/// Bytes of `struct virtio_blk_outhdr`: type, reserved, sector.
pub(crate) const HEADER_LEN: usize = 16;

/// Bytes of the unit that positions and capacities are in.
pub(crate) const SECTOR_SIZE: u64 = 512;

/// Most bytes of data of one request, QEMU's limit too. A guest could otherwise have the same memory
/// in a chain many times over, and keep the host busy for hours with one request.
pub(super) const MAX_LEN: u64 = 0x7fff_fe00;

/// `VIRTIO_BLK_T_*`.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const T_SECURE_ERASE: u32 = 14;

/// Most segments of a discard, write zeroes or secure erase: what Linux's driver sends at most.
const MAX_SEGMENTS: u64 = 256;

/// `VIRTIO_BLK_F_*`.
pub(crate) const F_DISCARD: u32 = 13;
const F_WRITE_ZEROES: u32 = 14;
const F_SECURE_ERASE: u32 = 16;

/// What the device says of a request; `VIRTIO_BLK_S_*`.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// The request was done.
    Ok = 0,
    /// The request failed, or was not valid.
    IoErr = 1,
    /// The device has no such request.
    Unsupp = 2,
    /// The request is not one for that zone.
    ZoneInvalidCmd = 3,
    /// It does not begin at the zone's write pointer.
    ZoneUnalignedWp = 4,
    /// Too many zones would be open.
    ZoneOpenResource = 5,
    /// Too many zones would be open or closed.
    ZoneActiveResource = 6,
}

/// What a guest may ask now.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Limits {
    /// Size of the disk, in sectors.
    pub(crate) capacity: u64,
    /// Bytes of the smallest unit that the disk reads and writes: a power of two, at least 512.
    pub(crate) logical_block_size: u32,
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// Features that were negotiated and that the backend has.
    pub(crate) features: u64,
    /// What goes for zones, if the guest knows that the disk has any.
    pub(crate) zones: Option<zone_request::Limits>,
}

impl Limits {
    /// Whether a feature bit was negotiated.
    pub(crate) fn negotiated(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }
}

/// What a request does to ranges of the disk, without data.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum RangeOp {
    /// What was there is not needed any more.
    Discard,
    /// What is there becomes zeroes.
    WriteZeroes,
    /// What was there can never be read again.
    SecureErase,
}

/// A request that was checked.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Read `len` bytes from `sector` on.
    In {
        /// First sector.
        sector: u64,
        /// Bytes, whole logical blocks.
        len: u64,
    },
    /// Write `len` bytes from `sector` on.
    Out {
        /// First sector.
        sector: u64,
        /// Bytes, whole logical blocks.
        len: u64,
    },
    /// Make completed writes stable.
    Flush,
    /// Tell the disk's serial string.
    GetId,
    /// Do something to each of `count` segments: see `segment`.
    Ranges {
        /// What.
        op: RangeOp,
        /// How many, at least one.
        count: usize,
    },
    /// One that only zoned disks have.
    Zone(zone_request::Request),
}

/// Decodes and checks a request.
///
/// `readable` and `writable` are the bytes of data that the guest gave: readable ones behind the
/// header, writable ones before the status.
///
/// # Errors
///
/// The status to complete the request with: [`Status::Unsupp`] for an unknown type or one that was not
/// negotiated, [`Status::IoErr`] for a range that is not whole blocks of the disk or above 2 GiB, for
/// what is no array of segments, and for a write to a read-only disk. See [`zone_request::decode`] for
/// the requests of zoned disks.
pub(crate) fn decode(
    header: &[u8; HEADER_LEN],
    little_endian: bool,
    readable: u64,
    writable: u64,
    limits: &Limits,
) -> Result<Request, Status> {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
    let (kind, sector) = if little_endian {
        (
            u32::from_le_bytes([t0, t1, t2, t3]),
            u64::from_le_bytes(sector),
        )
    } else {
        (
            u32::from_be_bytes([t0, t1, t2, t3]),
            u64::from_be_bytes(sector),
        )
    };

    match kind {
        T_IN => {
            check_data(sector, writable, limits)?;
            Ok(Request::In {
                sector,
                len: writable,
            })
        }
        T_OUT if limits.read_only => Err(Status::IoErr),
        T_OUT => {
            check_data(sector, readable, limits)?;
            Ok(Request::Out {
                sector,
                len: readable,
            })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD => ranges(RangeOp::Discard, F_DISCARD, readable, limits),
        T_WRITE_ZEROES => ranges(RangeOp::WriteZeroes, F_WRITE_ZEROES, readable, limits),
        T_SECURE_ERASE => ranges(RangeOp::SecureErase, F_SECURE_ERASE, readable, limits),
        _ => zone_request::decode(
            kind,
            sector,
            readable,
            writable,
            limits.capacity,
            limits.read_only,
            limits.zones,
        )
        .map(Request::Zone),
    }
}

/// Checks what can be known of a request with segments before they are read.
fn ranges(op: RangeOp, feature: u32, readable: u64, limits: &Limits) -> Result<Request, Status> {
    let segment = SEGMENT_LEN as u64;

    if !limits.negotiated(feature) {
        return Err(Status::Unsupp);
    }
    let count = readable / segment;
    if limits.read_only || readable % segment != 0 || count == 0 || count > MAX_SEGMENTS {
        return Err(Status::IoErr);
    }
    Ok(Request::Ranges {
        op,
        // CAST: Checked above.
        count: count as usize,
    })
}

/// Checks the range of a request with `len` bytes of data.
fn check_data(sector: u64, len: u64, limits: &Limits) -> Result<(), Status> {
    check_range(sector, len, limits)?;
    if len <= MAX_LEN {
        Ok(())
    } else {
        Err(Status::IoErr)
    }
}

/// Checks that `len` bytes from `sector` on are whole logical blocks within the disk.
///
/// # Errors
///
/// [`Status::IoErr`].
pub(crate) fn check_range(sector: u64, len: u64, limits: &Limits) -> Result<(), Status> {
    let block = u64::from(limits.logical_block_size).max(SECTOR_SIZE);

    // A power of two. To divide by it would take longer.
    let aligned = len & (block - 1) == 0 && sector & (block / SECTOR_SIZE - 1) == 0;
    let within = sector
        .checked_add(len / SECTOR_SIZE)
        .is_some_and(|end| end <= limits.capacity);
    if aligned && within {
        Ok(())
    } else {
        Err(Status::IoErr)
    }
}
