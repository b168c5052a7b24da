// SPDX-License-Identifier: GPL-2.0

//! Requests of zoned disks: what they say, what is wrong with them, and what a report looks like.
//!
//! Pure code without kernel types, compiled again for the tests in user space.
//!
//! Source: Virtual I/O Device (VIRTIO) 1.3, section 5.2.6, 'Device Operation' of the block device.

use super::{
    request::{
        Status,
        MAX_LEN,
        SECTOR_SIZE, //
    },
    transfer::PAGE_SIZE, //
};

/// Bytes of `struct virtio_blk_zone_report` before the descriptors.
pub(crate) const REPORT_HEADER_LEN: usize = 64;

/// Bytes of `struct virtio_blk_zone_descriptor`.
pub(crate) const DESCRIPTOR_LEN: usize = 64;

/// Bytes of the sector that a zone append returns.
pub(crate) const APPEND_SECTOR_LEN: usize = 8;

/// Most bytes of a zone append. It has to be one bio, and so much can be bounced if the memory's
/// layout does not fit one.
const MAX_APPEND_LEN: usize = 256 << 10;

/// `VIRTIO_BLK_T_ZONE_*`.
const T_APPEND: u32 = 15;
const T_REPORT: u32 = 16;
const T_OPEN: u32 = 18;
const T_CLOSE: u32 = 20;
const T_FINISH: u32 = 22;
const T_RESET: u32 = 24;
const T_RESET_ALL: u32 = 26;

/// What a guest may ask of a zoned disk now.
#[derive(Copy, Clone, Debug)]
pub(crate) struct Limits {
    /// Sectors from the start of one zone to that of the next; not 0.
    pub(crate) zone_sectors: u64,
    /// Most sectors of a zone append; 0 if there is none.
    pub(crate) max_append_sectors: u32,
    /// Bytes of the unit in which sequential zones are written.
    pub(crate) write_granularity: u32,
    /// An empty zone may have writes in flight.
    pub(crate) writes_queue: bool,
}

/// Most sectors of a zone append to a disk that takes `disk` sectors and `max_segments` in one bio, which may
/// all be pages.
pub(crate) fn max_append_sectors(disk: u32, max_segments: usize) -> u32 {
    let most = MAX_APPEND_LEN.min(max_segments.saturating_mul(PAGE_SIZE)) as u64;
    // CAST: At most `MAX_APPEND_LEN`.
    disk.min((most / SECTOR_SIZE) as u32)
}

/// What to do with a zone.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// Open it explicitly.
    Open,
    /// Close it.
    Close,
    /// Make it full.
    Finish,
    /// Make it empty.
    Reset,
}

/// A request that was checked, as far as that goes without looking at the zone.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Write `len` bytes at the write pointer of a zone.
    Append {
        /// First sector of the zone.
        sector: u64,
    },
    /// Tell of up to `zones` zones.
    Report {
        /// A sector of the first one.
        sector: u64,
        /// How many descriptors there is room for; not 0.
        zones: u64,
    },
    /// Do something with one zone.
    Manage {
        /// What.
        op: Op,
        /// First sector of the zone.
        sector: u64,
    },
    /// Make all zones empty.
    ResetAll,
}

/// Decodes and checks a request whose type is none of those that all disks have.
///
/// `readable` and `writable` are the bytes of data that the guest gave, as in
/// [`decode`](super::request::decode). `capacity` is in sectors. `limits` are `None` if the disk is not zoned,
/// or the guest does not know that it is.
///
/// # Errors
///
/// The status to complete the request with: [`Status::Unsupp`] for an unknown type, and for all if
/// there are no `limits`; [`Status::IoErr`] for what would change a read-only disk;
/// [`Status::ZoneUnalignedWp`] for an append that is not in units of the disk's;
/// [`Status::ZoneInvalidCmd`] for anything else, more than 2 GiB of memory to write to among it.
pub(crate) fn decode(
    kind: u32,
    sector: u64,
    readable: u64,
    writable: u64,
    capacity: u64,
    read_only: bool,
    limits: Option<Limits>,
) -> Result<Request, Status> {
    let limits = limits.ok_or(Status::Unsupp)?;
    let op = match kind {
        T_REPORT => return decode_report(sector, writable, capacity),
        T_APPEND | T_OPEN | T_CLOSE | T_FINISH | T_RESET | T_RESET_ALL if read_only => {
            return Err(Status::IoErr)
        }
        T_APPEND => {
            check_append(sector, readable, writable, capacity, &limits)?;
            return Ok(Request::Append { sector });
        }
        T_RESET_ALL => return Ok(Request::ResetAll),
        T_OPEN => Op::Open,
        T_CLOSE => Op::Close,
        T_FINISH => Op::Finish,
        T_RESET => Op::Reset,
        _ => return Err(Status::Unsupp),
    };
    if sector < capacity && sector % limits.zone_sectors == 0 {
        Ok(Request::Manage { op, sector })
    } else {
        Err(Status::ZoneInvalidCmd)
    }
}

fn decode_report(sector: u64, writable: u64, capacity: u64) -> Result<Request, Status> {
    let zones = writable.saturating_sub(REPORT_HEADER_LEN as u64) / DESCRIPTOR_LEN as u64;
    if zones > 0 && sector <= capacity && writable <= MAX_LEN {
        Ok(Request::Report { sector, zones })
    } else {
        Err(Status::ZoneInvalidCmd)
    }
}

fn check_append(
    sector: u64,
    readable: u64,
    writable: u64,
    capacity: u64,
    limits: &Limits,
) -> Result<(), Status> {
    let most = u64::from(limits.max_append_sectors) * SECTOR_SIZE;
    if most == 0 {
        return Err(Status::Unsupp);
    }
    let room = APPEND_SECTOR_LEN as u64..=MAX_LEN;
    if sector >= capacity || !room.contains(&writable) || readable == 0 {
        return Err(Status::ZoneInvalidCmd);
    }
    check_granularity(sector, readable, limits)?;
    // The last zone may be shorter than the others.
    let zone = limits.zone_sectors.min(capacity - sector) * SECTOR_SIZE;
    if sector % limits.zone_sectors == 0 && readable <= most.min(zone) {
        Ok(())
    } else {
        Err(Status::ZoneInvalidCmd)
    }
}

fn check_granularity(sector: u64, len: u64, limits: &Limits) -> Result<(), Status> {
    let unit = u64::from(limits.write_granularity).max(SECTOR_SIZE);
    if sector % (unit / SECTOR_SIZE) == 0 && len % unit == 0 {
        Ok(())
    } else {
        Err(Status::ZoneUnalignedWp)
    }
}

/// The sector at which the zone of `sector` begins, and that at which the next one does.
pub(crate) fn zone_of(sector: u64, limits: &Limits) -> (u64, u64) {
    let start = sector - sector % limits.zone_sectors;
    (start, start.saturating_add(limits.zone_sectors))
}

/// How many zones there are from that of `sector` on, on a disk of `capacity` sectors.
pub(crate) fn zones_from(sector: u64, capacity: u64, limits: &Limits) -> u64 {
    let (start, _) = zone_of(sector, limits);
    capacity.saturating_sub(start).div_ceil(limits.zone_sectors)
}

/// Of what type a zone is; `VIRTIO_BLK_ZT_*`, and `enum blk_zone_type`, which has the same numbers.
pub(crate) const TYPE_CONVENTIONAL: u8 = 1;

/// In what state a zone is; `VIRTIO_BLK_ZS_*`, and `enum blk_zone_cond`, which has the same numbers.
pub(crate) const STATE_EMPTY: u8 = 1;
pub(crate) const STATE_READ_ONLY: u8 = 13;
pub(crate) const STATE_FULL: u8 = 14;
pub(crate) const STATE_OFFLINE: u8 = 15;

/// A zone. All positions are in sectors.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) struct Zone {
    /// Where it begins.
    pub(crate) start: u64,
    /// How much of it can be written.
    pub(crate) capacity: u64,
    /// Where it is written next.
    pub(crate) write_pointer: u64,
    /// `VIRTIO_BLK_ZT_*`.
    pub(crate) kind: u8,
    /// `VIRTIO_BLK_ZS_*`.
    pub(crate) state: u8,
}

impl Zone {
    /// `struct virtio_blk_zone_descriptor`.
    pub(crate) fn descriptor(&self, little_endian: bool) -> [u8; DESCRIPTOR_LEN] {
        let mut bytes = [0; DESCRIPTOR_LEN];
        let numbers = [self.capacity, self.start, self.write_pointer];
        for (to, number) in bytes.chunks_exact_mut(8).zip(numbers) {
            to.copy_from_slice(&to_guest(number, little_endian));
        }
        bytes[24] = self.kind;
        bytes[25] = self.state;
        bytes
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, STATE_READ_ONLY | STATE_OFFLINE)
    }

    /// Checks what is known to fail of a request that does something with the zone.
    ///
    /// # Errors
    ///
    /// [`Status::ZoneInvalidCmd`].
    pub(crate) fn check_manage(&self, op: Op) -> Result<(), Status> {
        let wrong = match op {
            Op::Open => self.state == STATE_FULL,
            Op::Close => matches!(self.state, STATE_EMPTY | STATE_FULL),
            Op::Finish | Op::Reset => false,
        };
        if wrong || self.is_dead() || self.kind == TYPE_CONVENTIONAL {
            Err(Status::ZoneInvalidCmd)
        } else {
            Ok(())
        }
    }

    /// Checks what is known to fail of a request that appends `sectors` to the zone.
    ///
    /// # Errors
    ///
    /// [`Status::ZoneInvalidCmd`].
    pub(crate) fn check_append(&self, sectors: u64) -> Result<(), Status> {
        let left = (self.start + self.capacity).saturating_sub(self.write_pointer);
        let full = self.state == STATE_FULL || sectors > left;
        if full || self.is_dead() || self.kind == TYPE_CONVENTIONAL {
            Err(Status::ZoneInvalidCmd)
        } else {
            Ok(())
        }
    }

    /// Checks what is known to fail of a request that writes `sectors`, all of this zone, from `sector`
    /// on.
    ///
    /// Writes that are in flight count as written or not: what lies behind the write pointer may be
    /// their sequel. They have opened the zone, unless they queue.
    ///
    /// # Errors
    ///
    /// The status to complete the request with, as [`decode`] chooses it.
    pub(crate) fn check_write(
        &self,
        sector: u64,
        sectors: u64,
        limits: &Limits,
    ) -> Result<(), Status> {
        if self.kind == TYPE_CONVENTIONAL {
            return Ok(());
        }
        if self.state == STATE_FULL || self.is_dead() {
            return Err(Status::ZoneInvalidCmd);
        }
        check_granularity(sector, sectors * SECTOR_SIZE, limits)?;
        let first = self.state == STATE_EMPTY && !limits.writes_queue;
        if sector < self.write_pointer || (first && sector > self.start) {
            return Err(Status::ZoneUnalignedWp);
        }
        if sector + sectors > self.start + self.capacity {
            return Err(Status::ZoneInvalidCmd);
        }
        Ok(())
    }

    /// What a write from `sector` on most likely fails with.
    pub(crate) fn status_of_failed_write(&self, sector: u64) -> Status {
        if self.kind != TYPE_CONVENTIONAL && sector > self.write_pointer {
            Status::ZoneUnalignedWp
        } else {
            Status::IoErr
        }
    }
}

/// The start of `struct virtio_blk_zone_report`.
pub(crate) fn report_header(zones: u64, little_endian: bool) -> [u8; REPORT_HEADER_LEN] {
    let mut bytes = [0; REPORT_HEADER_LEN];
    bytes[..8].copy_from_slice(&to_guest(zones, little_endian));
    bytes
}

/// A number in the guest's byte order.
pub(crate) fn to_guest(number: u64, little_endian: bool) -> [u8; 8] {
    if little_endian {
        number.to_le_bytes()
    } else {
        number.to_be_bytes()
    }
}

/// Whether memory, given as pairs of address and length in bytes, makes a bio that the block layer need
/// not cut for a disk that takes `max_segments`, between which the address bits of `virt_boundary` must be
/// 0.
///
/// `pages` is how many pieces of pages it is.
pub(crate) fn is_uncut(
    segments: impl Iterator<Item = (usize, usize)>,
    pages: usize,
    max_segments: usize,
    virt_boundary: usize,
) -> bool {
    let mut end = None;
    for (address, len) in segments {
        if end.is_some_and(|end: usize| (end | address) & virt_boundary != 0) {
            return false;
        }
        end = Some(address.wrapping_add(len));
    }
    pages <= max_segments
}
