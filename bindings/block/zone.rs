// SPDX-License-Identifier: GPL-2.0

//! Zoned block devices.
//!
//! C headers: `include/linux/blkdev.h`, `include/uapi/linux/blkzoned.h`.

use super::backend::{
    queue_limits,
    Backend, //
};
use crate::bindings::raw;
use kernel::{
    error::to_result,
    ffi::{
        c_int,
        c_uint,
        c_void, //
    },
    prelude::*, //
};

/// What a zoned disk takes.
pub(crate) struct ZoneLimits {
    /// Sectors from the start of one zone to that of the next; not 0.
    pub(crate) zone_sectors: u64,
    /// Most sectors of a zone append; 0 if there is none.
    pub(crate) max_append_sectors: u32,
    /// Bytes of the unit in which sequential zones are written.
    pub(crate) write_granularity: u32,
    /// Most segments of a bio that must not be cut.
    pub(crate) max_segments: usize,
    /// Mask of the address bits that must be 0 between segments.
    pub(crate) virt_boundary: usize,
    /// Writes may queue in the block layer before it counts them as written.
    pub(crate) writes_queue: bool,
}

/// A zone; `struct blk_zone`. All positions are in sectors.
pub(crate) struct Zone(raw::blk_zone);

impl Zone {
    /// Where it begins.
    pub(crate) fn start(&self) -> u64 {
        self.0.start
    }

    /// Where the next one begins.
    pub(crate) fn end(&self) -> u64 {
        self.0.start.saturating_add(self.0.len)
    }

    /// How much of it can be written.
    pub(crate) fn capacity(&self) -> u64 {
        self.0.capacity
    }

    /// Where it is written next. Without meaning for zones that are not.
    pub(crate) fn write_pointer(&self) -> u64 {
        self.0.wp
    }

    /// `enum blk_zone_type`.
    pub(crate) fn kind(&self) -> u8 {
        self.0.type_
    }

    /// `enum blk_zone_cond`.
    pub(crate) fn condition(&self) -> u8 {
        self.0.cond
    }
}

impl Backend {
    /// Whether the disk is host-managed zoned.
    #[inline]
    pub(crate) fn is_zoned(&self) -> bool {
        self.device().is_some_and(|bdev| {
            // SAFETY: The reference to the file keeps the block device and its queue alive. The read is
            // volatile since the limits may change.
            let features =
                unsafe { (&raw const (*(*bdev).bd_queue).limits.features).read_volatile() };
            features & raw::RUST_CONST_HELPER_BLK_FEAT_ZONED != 0
        })
    }

    /// What the disk takes, if it is zoned.
    pub(crate) fn zone_limits(&self) -> Option<ZoneLimits> {
        if !self.is_zoned() {
            return None;
        }
        let bdev = self.device()?;
        // SAFETY: The reference to the file keeps the block device and its queue alive.
        let (limits, zone_sectors, writes_queue) = unsafe {
            (
                queue_limits(bdev),
                raw::rust_helper_bdev_zone_sectors(bdev),
                raw::rust_helper_bdev_zone_writes_queue(bdev),
            )
        };
        (zone_sectors != 0).then(|| ZoneLimits {
            zone_sectors,
            max_append_sectors: limits.max_zone_append_sectors,
            write_granularity: limits.zone_write_granularity,
            max_segments: usize::from(limits.max_segments),
            virt_boundary: limits.virt_boundary_mask,
            writes_queue,
        })
    }

    /// Whether a sector is known to be of a sequential zone.
    pub(crate) fn is_sequential(&self, sector: u64) -> bool {
        self.device().is_some_and(|bdev| {
            // SAFETY: The reference to the file keeps the block device alive; any number may be asked for.
            unsafe { raw::bdev_zone_is_seq(bdev, sector) }
        })
    }

    /// What the kernel knows of the zone of a sector; `None` if it does not keep account.
    ///
    /// Context: may sleep, but asks the disk only if a write to that zone failed before.
    pub(crate) fn known_zone(&self, sector: u64) -> Option<Zone> {
        let bdev = self.device()?;
        let mut zone = raw::blk_zone::default();
        // SAFETY: The reference to the file keeps the block device alive; `zone` is written. Memory is
        // allocated without waiting for disks, since the caller may be what they wait for.
        let result = unsafe {
            if !raw::rust_helper_bdev_zone_info_cached(bdev) {
                return None;
            }
            let flags = raw::rust_helper_memalloc_noio_save();
            let result = raw::blkdev_get_zone_info(bdev, sector, &mut zone);
            raw::rust_helper_memalloc_noio_restore(flags);
            result
        };
        (result == 0).then_some(Zone(zone))
    }

    /// Asks the disk for up to `count` zones, from that of `sector` on, and calls `f` with each.
    ///
    /// Context: may sleep as long as the disk takes.
    ///
    /// # Errors
    ///
    /// Those of `f` and of the disk; `ENOTBLK` for an image.
    pub(crate) fn report_zones<F: FnMut(Zone) -> Result>(
        &self,
        sector: u64,
        count: u32,
        mut f: F,
    ) -> Result {
        /// # Safety
        ///
        /// `zone` must be valid, and `data` point to an `F` that nobody else uses.
        unsafe extern "C" fn callback<F: FnMut(Zone) -> Result>(
            zone: *mut raw::blk_zone,
            _index: c_uint,
            data: *mut c_void,
        ) -> c_int {
            // SAFETY: The caller promises that both are valid, and the `F` ours.
            let (zone, f) = unsafe { (*zone, &mut *data.cast::<F>()) };
            f(Zone(zone)).map_or_else(|error| error.to_errno(), |()| 0)
        }

        let bdev = self.device().ok_or(ENOTBLK)?;
        // SAFETY: The reference to the file keeps the block device alive. The callback is called until
        // this returns, one call at a time, with `f`, which lives as long. Memory is allocated as in
        // `known_zone()`.
        let result = unsafe {
            let flags = raw::rust_helper_memalloc_noio_save();
            let result = raw::blkdev_report_zones(
                bdev,
                sector,
                count,
                Some(callback::<F>),
                (&raw mut f).cast(),
            );
            raw::rust_helper_memalloc_noio_restore(flags);
            result
        };
        to_result(result.min(0))
    }
}
