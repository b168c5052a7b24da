// SPDX-License-Identifier: GPL-2.0

//! A block device or image file that user space opened.
//!
//! C headers: `include/linux/blkdev.h`, `include/linux/file.h`.

use super::image::Image;
use crate::bindings::raw;
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// What a disk's data is on: an open block device or image file, held through the file that user space opened.
///
/// The file's own mode says what may be done: see [`Backend::writable`].
pub(crate) struct Backend {
    kind: Kind,
    /// The file is open for writing.
    write_mode: bool,
}

enum Kind {
    Device(Device),
    Image(Image),
}

/// An open block device.
///
/// # Invariants
///
/// `bdev` is the block device that `_file` is of, open for reading.
struct Device {
    /// Keeps `bdev` open.
    _file: File,
    bdev: *mut raw::block_device,
    /// The driver itself may sleep where a bio is submitted.
    may_sleep: bool,
}

/// A reference to an open file.
///
/// # Invariants
///
/// This object holds a reference to the file.
pub(super) struct File(NonNull<raw::file>);

impl File {
    /// The C file.
    pub(super) fn as_raw(&self) -> *mut raw::file {
        self.0.as_ptr()
    }
}

impl Clone for File {
    fn clone(&self) -> Self {
        // SAFETY: By the type invariant the file is open.
        // INVARIANT: `get_file()` takes another reference.
        unsafe { raw::rust_helper_get_file(self.as_raw()) };
        Self(self.0)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours to drop.
        unsafe { raw::fput(self.0.as_ptr()) };
    }
}

// SAFETY: A `struct file` is reference-counted and may be used and released by any thread.
unsafe impl Send for File {}
// SAFETY: What is read of it is constant, or the functions that are called do their own locking.
unsafe impl Sync for File {}
// SAFETY: A block device may be used by any thread, and so may its file.
unsafe impl Send for Device {}
// SAFETY: What is read of it is constant, or read as a copy of what may change, or the functions that are called
// do their own locking.
unsafe impl Sync for Device {}

/// What a device can do; see `struct queue_limits` for each field.
///
/// Sizes are in bytes, `*_sectors` in sectors of 512 bytes; 0 means 'cannot' or 'no limit', as in
/// the block layer.
#[derive(Default)]
pub(crate) struct Limits {
    pub(crate) logical_block_size: u32,
    pub(crate) physical_block_size: u32,
    pub(crate) io_min: u32,
    pub(crate) io_opt: u32,
    pub(crate) alignment_offset: u32,
    pub(crate) max_sectors: u32,
    pub(crate) max_segments: u32,
    pub(crate) dma_alignment: u32,
    pub(crate) max_discard_sectors: u32,
    pub(crate) discard_granularity: u32,
    /// Where the first whole `discard_granularity` of the disk begins.
    pub(crate) discard_alignment: u32,
    pub(crate) max_write_zeroes_sectors: u32,
    pub(crate) max_secure_erase_sectors: u32,
    pub(crate) zone_sectors: u32,
    pub(crate) nr_zones: u32,
    pub(crate) max_open_zones: u32,
    pub(crate) max_active_zones: u32,
    /// No request but a discard or an erase goes across a multiple of this; 0 if any may.
    pub(crate) chunk_sectors: u32,
    /// The first sector of a partition on its disk.
    pub(crate) start_sector: u64,
    pub(crate) zone_write_granularity: u32,
    pub(crate) write_cache: bool,
    pub(crate) rotational: bool,
}

impl Backend {
    /// Takes a reference to the block device or image file behind a descriptor of the calling task.
    ///
    /// # Errors
    ///
    /// `EBADF` if there is no such descriptor, `ENOTBLK` if it is neither a block device nor a regular file,
    /// `EINVAL` if it is not open for reading, or is a regular file that can do no direct I/O, or not in blocks
    /// of up to 4096 bytes, or is open for appending; `ETXTBSY` if it is a file that is swapped to; `ENOMEM`;
    /// errors of the file's filesystem.
    ///
    /// Context: may sleep, as long as somebody opens the same disk, but not if the task is killed.
    pub(crate) fn from_fd(fd: u32) -> Result<Self> {
        // SAFETY: `fget()` may be called with any number.
        // INVARIANT: `fget()` took the reference.
        let file = File(NonNull::new(unsafe { raw::fget(fd) }).ok_or(EBADF)?);
        let raw_file = file.as_raw();

        // SAFETY: The file is open, so its inode and mode are set and do not change.
        let (inode_mode, mode) = unsafe { ((*(*raw_file).f_inode).i_mode, (*raw_file).f_mode) };
        let kind = u32::from(inode_mode) & raw::S_IFMT;
        if kind != raw::S_IFBLK && kind != raw::S_IFREG {
            return Err(ENOTBLK);
        }
        if mode & FMODE_READ == 0 {
            return Err(EINVAL);
        }
        let kind = if kind == raw::S_IFREG {
            Kind::Image(Image::new(file)?)
        } else {
            // SAFETY: The file is an open block device.
            let bdev = unsafe { raw::file_bdev(raw_file) };
            // INVARIANT: This is the one that the file is of.
            Kind::Device(Device {
                bdev,
                // SAFETY: The reference to the file keeps the block device alive.
                may_sleep: unsafe { raw::rust_helper_bdev_may_sleep(bdev) },
                _file: file,
            })
        };
        Ok(Self {
            kind,
            write_mode: mode & FMODE_WRITE != 0,
        })
    }

    /// The C block device; null if it is an image.
    #[inline]
    pub(super) fn as_raw(&self) -> *mut raw::block_device {
        self.device().unwrap_or(core::ptr::null_mut())
    }

    /// The C block device, if it is none but that.
    #[inline]
    pub(super) fn device(&self) -> Option<*mut raw::block_device> {
        match &self.kind {
            Kind::Device(device) => Some(device.bdev),
            Kind::Image(_) => None,
        }
    }

    /// The image file; null if it is a block device.
    #[inline]
    pub(super) fn image(&self) -> *const Image {
        match &self.kind {
            Kind::Device(_) => core::ptr::null(),
            Kind::Image(image) => image,
        }
    }

    /// Whether the descriptor was opened for writing and the disk takes writes now.
    #[inline]
    pub(crate) fn writable(&self) -> bool {
        self.write_mode
            && match &self.kind {
                // SAFETY: The reference to the file keeps the block device alive.
                Kind::Device(device) => !unsafe { raw::rust_helper_bdev_read_only(device.bdev) },
                Kind::Image(image) => image.writable(),
            }
    }

    /// Whether the disk says so instead of letting who submits a bio wait, where a bio asks for that.
    pub(in crate::bindings) fn takes_nowait(&self) -> bool {
        match &self.kind {
            Kind::Device(device) => {
                // SAFETY: The reference to the file keeps the block device alive.
                !device.may_sleep && unsafe { raw::rust_helper_bdev_nowait(device.bdev) }
            }
            Kind::Image(_) => false,
        }
    }

    /// Whether the disk has a scheduler. Then a bio that does not come from a plug is dispatched by a thread of the
    /// block layer's, which has to be woken.
    #[inline]
    pub(crate) fn has_scheduler(&self) -> bool {
        // SAFETY: The reference to the file keeps the block device and its queue alive. The read is volatile since
        // the scheduler may change.
        self.device().is_some_and(|bdev| unsafe {
            !(&raw const (*(*bdev).bd_queue).elevator)
                .read_volatile()
                .is_null()
        })
    }

    /// The block device, if it has a queue of requests.
    #[inline]
    fn queued_device(&self) -> Option<*mut raw::block_device> {
        self.device().filter(|&bdev| {
            // SAFETY: The reference to the file keeps the block device and its queue alive, whose operations stay.
            unsafe { !(*(*bdev).bd_queue).mq_ops.is_null() }
        })
    }

    /// Whether the disk has a queue of requests and no scheduler: then a bio is merged with the last one that is
    /// plugged, or with one of the last eight that wait for the disk on this processor, or with none.
    /// (`blk_attempt_plug_merge()` and `blk_mq_sched_bio_merge()`.)
    #[inline]
    pub(crate) fn has_plain_queue(&self) -> bool {
        self.queued_device().is_some() && !self.has_scheduler()
    }

    /// Whether the block layer would cut a read or write of `len` bytes, in so many pieces of pages, from `sector` on: a
    /// bio that must not wait fails then (`bio_split_io_at()`). A disk without a queue of requests cuts by itself.
    pub(crate) fn would_cut(&self, sector: u64, len: usize, pages: usize) -> bool {
        self.queued_device().is_some_and(|bdev| {
            // SAFETY: The reference to the file keeps the block device and its queue alive. The reads of its limits
            // are volatile since they may change.
            let (start, max_sectors, max_segments, chunk) = unsafe {
                let limits = &raw const (*(*bdev).bd_queue).limits;
                (
                    (*bdev).bd_start_sect,
                    (&raw const (*limits).max_sectors).read_volatile(),
                    (&raw const (*limits).max_segments).read_volatile(),
                    (&raw const (*limits).chunk_sectors).read_volatile(),
                )
            };
            let sectors = (len >> 9) as u64;
            let to_boundary = match chunk {
                0 => u64::MAX,
                chunk => u64::from(chunk) - start.wrapping_add(sector) % u64::from(chunk),
            };
            sectors > u64::from(max_sectors).min(to_boundary) || pages > usize::from(max_segments)
        })
    }

    /// The disk's size now, in sectors.
    #[inline]
    pub(crate) fn capacity(&self) -> u64 {
        match &self.kind {
            // SAFETY: The reference to the file keeps the block device alive. The read is volatile since the
            // disk may change.
            Kind::Device(device) => unsafe {
                (&raw const (*device.bdev).bd_nr_sectors).read_volatile()
            },
            Kind::Image(image) => image.capacity(),
        }
    }

    /// Whether the disk now has `sectors` sectors from `sector` on and, if `writes`, may be written.
    pub(crate) fn takes(&self, writes: bool, sector: u64, sectors: u64) -> bool {
        let end = sector.checked_add(sectors);
        end.is_some_and(|end| end <= self.capacity()) && (!writes || self.writable())
    }

    /// Bytes of the smallest unit that the disk reads and writes.
    #[inline]
    pub(crate) fn logical_block_size(&self) -> u32 {
        match &self.kind {
            // SAFETY: The reference to the file keeps the block device and its queue alive. The read is
            // volatile since the limits may change.
            Kind::Device(device) => unsafe {
                (&raw const (*(*device.bdev).bd_queue).limits.logical_block_size).read_volatile()
            },
            Kind::Image(image) => image.block_size(),
        }
    }

    /// Mask of the address and length bits that must be 0 in a segment that the disk reads or
    /// writes by itself.
    #[inline]
    pub(crate) fn dma_alignment(&self) -> u32 {
        match &self.kind {
            // SAFETY: As in `logical_block_size()`.
            Kind::Device(device) => unsafe {
                (&raw const (*(*device.bdev).bd_queue).limits.dma_alignment).read_volatile()
            },
            Kind::Image(image) => image.dma_alignment(),
        }
    }

    /// Writes back what the host's page cache holds of the disk; of a block device it drops it, too.
    ///
    /// Bios go past that cache, so without this a guest could read stale data, and the host later
    /// overwrite the guest's. Pages that are mapped or held stay. A filesystem sees to that by itself later.
    /// Context: may sleep for long.
    ///
    /// # Errors
    ///
    /// The error of the write-back, such as `EIO`.
    pub(crate) fn sync_and_invalidate(&self) -> Result {
        match &self.kind {
            Kind::Device(device) => {
                // SAFETY: The reference to the file keeps the block device alive.
                to_result(unsafe { raw::sync_blockdev(device.bdev) })?;
                // SAFETY: As above.
                unsafe { raw::invalidate_bdev(device.bdev) };
                Ok(())
            }
            Kind::Image(image) => image.sync(),
        }
    }

    /// What the disk can do now.
    pub(crate) fn limits(&self) -> Limits {
        match &self.kind {
            Kind::Device(device) => device.limits(),
            Kind::Image(image) => image.limits(),
        }
    }
}

/// The limits of a block device's queue, each as it is or was a moment ago.
///
/// # Safety
///
/// `bdev` must be an open block device.
pub(super) unsafe fn queue_limits(bdev: *mut raw::block_device) -> raw::queue_limits {
    let mut limits = raw::queue_limits::default();
    // SAFETY: The caller promises that the block device is open, and so its queue is alive; `limits` is written.
    unsafe { raw::rust_helper_bdev_limits(bdev, &mut limits) };
    limits
}

impl Device {
    fn limits(&self) -> Limits {
        let bdev = self.bdev;
        // SAFETY: By the type invariant it is open.
        let limits = unsafe { queue_limits(bdev) };
        // SAFETY: The reference to the file keeps the block device alive.
        let (alignment_offset, zone_sectors, nr_zones, write_cache) = unsafe {
            (
                raw::rust_helper_bdev_alignment_offset(bdev),
                raw::rust_helper_bdev_zone_sectors(bdev),
                raw::rust_helper_bdev_nr_zones(bdev),
                raw::rust_helper_bdev_write_cache(bdev),
            )
        };

        Limits {
            logical_block_size: limits.logical_block_size,
            physical_block_size: limits.physical_block_size,
            io_min: limits.io_min,
            io_opt: limits.io_opt,
            alignment_offset: alignment_offset.try_into().unwrap_or(0),
            max_sectors: limits.max_sectors,
            max_segments: u32::from(limits.max_segments),
            dma_alignment: limits.dma_alignment,
            max_discard_sectors: limits.max_discard_sectors,
            discard_granularity: limits.discard_granularity,
            discard_alignment: limits.discard_alignment,
            max_write_zeroes_sectors: limits.max_write_zeroes_sectors,
            max_secure_erase_sectors: limits.max_secure_erase_sectors,
            zone_sectors: zone_sectors.try_into().unwrap_or(u32::MAX),
            nr_zones,
            max_open_zones: limits.max_open_zones,
            max_active_zones: limits.max_active_zones,
            chunk_sectors: limits.chunk_sectors,
            // SAFETY: The reference to the file keeps the block device alive.
            start_sector: unsafe { (*bdev).bd_start_sect },
            zone_write_granularity: limits.zone_write_granularity,
            write_cache,
            rotational: limits.features & raw::BLK_FEAT_ROTATIONAL != 0,
        }
    }
}

/// `FMODE_READ` and `FMODE_WRITE` of `include/linux/fs.h`, macros with a cast that bindgen does not
/// evaluate.
const FMODE_READ: raw::fmode_t = 1 << 0;
const FMODE_WRITE: raw::fmode_t = 1 << 1;
