// SPDX-License-Identifier: GPL-2.0

//! Decoding of requests: bytes of a guest in, a checked request or a status out.
//!
//! Pure code without kernel types, compiled again for the tests in user space.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.3, section 5.2.6, 'Device Operation' of the block device.

/// Bytes of `struct virtio_blk_outhdr`: type, reserved, sector.
pub(crate) const HEADER_LEN: usize = 16;

/// Bytes of the unit that positions and capacities are in.
pub(crate) const SECTOR_SIZE: u64 = 512;

/// Most bytes of data of one request, QEMU's limit too. A guest could otherwise have the same memory
/// in a chain many times over, and keep the host busy for hours with one request.
const MAX_LEN: u64 = 0x7fff_fe00;

/// `VIRTIO_BLK_T_*`.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;

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
}

/// Decodes and checks a request.
///
/// `readable` and `writable` are the bytes of data that the guest gave: readable ones behind the
/// header, writable ones before the status.
///
/// # Errors
///
/// The status to complete the request with: [`Status::Unsupp`] for an unknown type,
/// [`Status::IoErr`] for a range that is not whole blocks of the disk or above 2 GiB, and for a write
/// to a read-only disk.
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
            check_range(sector, writable, limits)?;
            Ok(Request::In {
                sector,
                len: writable,
            })
        }
        T_OUT if limits.read_only => Err(Status::IoErr),
        T_OUT => {
            check_range(sector, readable, limits)?;
            Ok(Request::Out {
                sector,
                len: readable,
            })
        }
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        _ => Err(Status::Unsupp),
    }
}

/// Checks that `len` bytes from `sector` on are whole logical blocks within the disk, and not too
/// many.
fn check_range(sector: u64, len: u64, limits: &Limits) -> Result<(), Status> {
    let block = u64::from(limits.logical_block_size).max(SECTOR_SIZE);

    let aligned = len % block == 0 && sector % (block / SECTOR_SIZE) == 0;
    let within = sector
        .checked_add(len / SECTOR_SIZE)
        .is_some_and(|end| end <= limits.capacity);
    if aligned && within && len <= MAX_LEN {
        Ok(())
    } else {
        Err(Status::IoErr)
    }
}
