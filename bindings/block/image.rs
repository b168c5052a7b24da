// SPDX-License-Identifier: GPL-2.0

//! Image files: regular files whose filesystem does what bios say, with direct I/O.
//!
//! C headers: `include/linux/fs.h`, `include/linux/falloc.h`, `include/linux/uio.h`.

use super::{
    backend::{
        File,
        Limits, //
    },
    bio::REQ_OP_MASK,
    submitter::Submitter, //
};
use crate::bindings::{
    compat::eopnotsupp,
    raw, //
};
use kernel::{
    error::to_result,
    ffi::{
        c_int,
        c_long, //
    },
    prelude::*,
    sync::atomic::{
        ordering,
        Atomic, //
    }, //
};

/// An image file.
///
/// # Invariants
///
/// `file` is a regular file, open for reading, that can do direct I/O.
pub(super) struct Image {
    /// Bytes of the unit in which the file is read and written.
    block_size: u32,
    /// Mask of the address bits that must be 0 in memory that is read or written.
    dma_alignment: u32,
    /// Bytes of the unit in which the filesystem has space.
    granularity: u32,
    /// Where reads and writes are begun.
    transfers: Submitter,
    /// Where what takes long is done.
    slow: Submitter,
    // Dropped when both have ended, in a task that closes it before it returns to user space.
    file: File,
}

impl Image {
    /// Reads and writes that may be waiting for the filesystem before they are in flight, such as for space
    /// or for the journal.
    const TRANSFERS: i32 = 16;

    /// Flushes and changes of ranges that are done at the same time.
    const SLOW: i32 = 4;

    /// Most sectors of one discard or one write of zeroes, a bio's limit.
    const MAX_RANGE: u32 = u32::MAX >> 9;

    /// Most bytes that are worth reading or writing at once, as many as a bio holds.
    const MAX_TRANSFER: u32 = 1 << 20;

    /// An image in a regular file that is open for reading.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the file can do no direct I/O, or not in blocks of up to 4096 bytes, or is open for
    /// appending; `ETXTBSY` if it is swapped to; `ENOMEM`. Context: may sleep.
    pub(super) fn new(file: File) -> Result<Self> {
        let raw_file = file.as_raw();
        // SAFETY: The file is open. Its inode does not change, and the others are read as they are now.
        let (inode_flags, mode, flags) = unsafe {
            (
                (*(*raw_file).f_inode).i_flags,
                (*raw_file).f_mode,
                (*raw_file).f_flags,
            )
        };
        if inode_flags & raw::S_SWAPFILE != 0 {
            return Err(ETXTBSY);
        }
        if mode & raw::RUST_CONST_HELPER_FMODE_CAN_ODIRECT == 0 || flags & raw::O_APPEND != 0 {
            return Err(EINVAL);
        }

        let mut stat = raw::kstat::default();
        // SAFETY: The file is open; `stat` is written.
        to_result(unsafe {
            raw::rust_helper_file_getattr(raw_file, &mut stat, raw::STATX_DIOALIGN)
        })?;
        let block_size = stat.dio_offset_align.max(512);
        let known = stat.result_mask & raw::STATX_DIOALIGN != 0 && stat.dio_mem_align != 0;
        if !known || stat.dio_offset_align == 0 || block_size > 4096 {
            return Err(EINVAL);
        }
        // INVARIANT: `FMODE_CAN_ODIRECT` is set; the caller has looked at the rest.
        Ok(Self {
            block_size,
            dma_alignment: stat.dio_mem_align - 1,
            granularity: stat.blksize.max(block_size),
            transfers: Submitter::new(Self::TRANSFERS)?,
            slow: Submitter::new(Self::SLOW)?,
            file,
        })
    }

    /// Whether its filesystem can be written to now.
    pub(super) fn writable(&self) -> bool {
        // SAFETY: By the type invariant the file is open, which keeps its filesystem.
        !unsafe { raw::rust_helper_sb_rdonly((*(*self.file.as_raw()).f_inode).i_sb) }
    }

    /// Its size now, in sectors; what is less than one at the end does not count.
    pub(super) fn capacity(&self) -> u64 {
        // SAFETY: By the type invariant the file is open.
        let bytes = unsafe { raw::rust_helper_i_size_read((*self.file.as_raw()).f_inode) };
        u64::try_from(bytes).unwrap_or(0) >> 9
    }

    /// Bytes of the unit in which the file is read and written.
    pub(super) fn block_size(&self) -> u32 {
        self.block_size
    }

    /// As [`Backend::dma_alignment`](super::Backend::dma_alignment).
    pub(super) fn dma_alignment(&self) -> u32 {
        self.dma_alignment
    }

    /// What it can do. Whether the filesystem can punch holes and zero ranges is known when it was asked to.
    pub(super) fn limits(&self) -> Limits {
        Limits {
            logical_block_size: self.block_size,
            physical_block_size: self.granularity,
            io_min: self.granularity,
            max_sectors: Self::MAX_TRANSFER >> 9,
            max_segments: raw::BIO_MAX_VECS,
            dma_alignment: self.dma_alignment,
            max_discard_sectors: Self::MAX_RANGE,
            discard_granularity: self.granularity,
            max_write_zeroes_sectors: Self::MAX_RANGE,
            // The filesystem's and the disk's below it.
            write_cache: true,
            ..Limits::default()
        }
    }

    /// Writes back what the host's page cache holds of it. Direct I/O keeps what is read later coherent.
    ///
    /// Context: may sleep for long.
    ///
    /// # Errors
    ///
    /// The error of the write-back, such as `EIO`.
    pub(super) fn sync(&self) -> Result {
        // SAFETY: By the type invariant the file is open.
        to_result(unsafe {
            raw::filemap_write_and_wait_range((*self.file.as_raw()).f_mapping, 0, i64::MAX)
        })
    }

    /// Has `submit` called by another task with a reference to the file, or here if there is no memory for
    /// that. `transfers` says that it is about reads or writes: see [`is_transfer()`].
    ///
    /// This object does not end before `submit` has returned, if that is called by another task.
    pub(super) fn spawn(
        &self,
        transfers: bool,
        submit: impl FnOnce(&File) + Copy + Send + 'static,
    ) {
        let to = if transfers {
            &self.transfers
        } else {
            &self.slow
        };
        let file = self.file.clone();
        let cgroup = IoCgroup::current();
        let task = move || {
            // SAFETY: The cgroup is one or null, of which another reference is taken; a kernel thread, as this
            // one, is charged to none of its own.
            unsafe { raw::rust_helper_associate_blkcg(cgroup.as_raw()) };
            as_opener(&file, submit);
            // SAFETY: As above.
            unsafe { raw::rust_helper_associate_blkcg(core::ptr::null_mut()) };
        };
        if to.spawn(task).is_err() {
            as_opener(&self.file.clone(), submit);
        }
    }
}

/// Whether a bio reads or writes data. A write without is a flush.
pub(super) fn is_transfer(bio: &raw::bio) -> bool {
    match bio.bi_opf & REQ_OP_MASK {
        raw::req_op_REQ_OP_READ => true,
        raw::req_op_REQ_OP_WRITE => bio.bi_iter.bi_size != 0,
        _ => false,
    }
}

/// Calls `submit` with the rights of who opened the file, which count for the space that is left for root among
/// others. Memory is allocated without waiting for disks, since this may be what they wait for.
fn as_opener(file: &File, submit: impl FnOnce(&File)) {
    // SAFETY: An open file has credentials. What is restored is what was saved.
    unsafe {
        let cred = raw::rust_helper_override_creds((*file.as_raw()).f_cred);
        let flags = raw::rust_helper_memalloc_noio_save();
        submit(file);
        raw::rust_helper_memalloc_noio_restore(flags);
        raw::rust_helper_revert_creds(cred);
    }
}

/// The cgroup to which a task's I/O is charged.
///
/// # Invariants
///
/// This object holds a reference to it, unless it is null since the kernel has none.
struct IoCgroup(*mut raw::cgroup_subsys_state);

// SAFETY: A cgroup is reference-counted, and may be used and released by any thread.
unsafe impl Send for IoCgroup {}

impl IoCgroup {
    /// That of the current task.
    fn current() -> Self {
        // SAFETY: There is a current task.
        // INVARIANT: This takes a reference.
        Self(unsafe { raw::rust_helper_current_io_css() })
    }

    /// The kernel's object, or null; valid as long as this one.
    fn as_raw(&self) -> *mut raw::cgroup_subsys_state {
        self.0
    }
}

impl Drop for IoCgroup {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours, or it is null.
        unsafe { raw::rust_helper_css_put(self.0) };
    }
}

/// What the flags of `kiocb` and of `fallocate()` are here.
const READ: c_int = raw::RUST_CONST_HELPER_IOCB_DIRECT;
const WRITE: c_int = raw::RUST_CONST_HELPER_IOCB_DIRECT | raw::RUST_CONST_HELPER_IOCB_WRITE;
const PUNCH_HOLE: c_int = raw::RUST_CONST_HELPER_FALLOC_PUNCH_HOLE;
const ZERO_RANGE: c_int = raw::RUST_CONST_HELPER_FALLOC_ZERO_RANGE;

/// A read or write that is in flight.
struct Transfer {
    iocb: raw::kiocb,
    bio: *mut raw::bio,
    /// Who needs it: the call that begins it, since filesystems look at the `iocb` after it was queued, and whoever
    /// ends it.
    users: Atomic<i32>,
}

impl Transfer {
    /// Frees it if nobody else needs it. Context: any.
    ///
    /// # Safety
    ///
    /// `this` must be from [`transfer()`], and the caller one of its users, which it is no more then.
    unsafe fn put(this: *mut Self) {
        // SAFETY: The caller is a user, so it is there. Full ordering: what the other did to it is done.
        if unsafe { (*this).users.fetch_sub(1, ordering::Full) } == 1 {
            // SAFETY: `transfer()` made it from a box, and nobody needs it any more.
            drop(unsafe { KBox::from_raw(this) });
        }
    }
}

/// Has the filesystem of `file` do what a bio says. The bio is ended by this, or later.
///
/// Context: process context; may sleep as long as the filesystem does.
///
/// # Safety
///
/// `bio` is valid with its memory until its `bi_end_io` was called, which this may do, and is nobody
/// else's until then. So long somebody keeps `file` open, besides who calls this.
pub(super) unsafe fn submit(file: &File, bio: *mut raw::bio) {
    // SAFETY: The caller promises that the bio is valid and ours.
    let (flags, iter) = unsafe { ((*bio).bi_opf, (*bio).bi_iter) };
    let len = i64::from(iter.bi_size);
    let Ok(position) = i64::try_from(iter.bi_sector << 9) else {
        // SAFETY: As above.
        return unsafe { end(bio, Err(EINVAL)) };
    };
    let change = |mode: c_int| {
        // SAFETY: The file is open; the filesystem checks the rest.
        to_result(unsafe { raw::vfs_fallocate(file.as_raw(), mode, position, len) })
    };

    let result = match flags & REQ_OP_MASK {
        raw::req_op_REQ_OP_READ => {
            // SAFETY: The caller promises what this asks for.
            return unsafe { transfer(file, bio, position, READ) };
        }
        raw::req_op_REQ_OP_WRITE if len != 0 => {
            let stable = if flags & (1 << raw::req_flag_bits___REQ_FUA) != 0 {
                raw::RUST_CONST_HELPER_IOCB_DSYNC
            } else {
                0
            };
            // SAFETY: As above.
            return unsafe { transfer(file, bio, position, WRITE | stable) };
        }
        // A flush.
        // SAFETY: The file is open.
        raw::req_op_REQ_OP_WRITE => to_result(unsafe { raw::vfs_fsync(file.as_raw(), 1) }),
        raw::req_op_REQ_OP_DISCARD => change(PUNCH_HOLE),
        raw::req_op_REQ_OP_WRITE_ZEROES if flags & (1 << raw::req_flag_bits___REQ_NOUNMAP) == 0 => {
            change(PUNCH_HOLE)
        }
        raw::req_op_REQ_OP_WRITE_ZEROES => change(ZERO_RANGE),
        _ => Err(eopnotsupp()),
    };
    // SAFETY: The bio is still ours.
    unsafe { end(bio, result) };
}

/// Begins to read or write what a bio says, at byte `position`.
///
/// # Safety
///
/// As for [`submit`]. `flags` are [`READ`] for a bio that reads, and those of [`WRITE`] with others for one that
/// writes.
unsafe fn transfer(file: &File, bio: *mut raw::bio, position: i64, flags: c_int) {
    // SAFETY: The caller promises that the bio is valid and ours.
    let (len, vectors, count) =
        unsafe { ((*bio).bi_iter.bi_size, (*bio).bi_io_vec, (*bio).bi_vcnt) };
    let transfer = Transfer {
        iocb: raw::kiocb {
            ki_filp: file.as_raw(),
            ki_pos: position,
            ki_complete: Some(transferred),
            ki_flags: flags,
            ..Default::default()
        },
        bio,
        users: Atomic::new(2),
    };
    let Ok(transfer) = KBox::new(transfer, GFP_KERNEL) else {
        // SAFETY: The bio is still ours.
        return unsafe { end(bio, Err(ENOMEM)) };
    };

    let writes = flags & raw::RUST_CONST_HELPER_IOCB_WRITE != 0;
    let direction = if writes {
        raw::ITER_SOURCE
    } else {
        raw::ITER_DEST
    };
    let mut iter = raw::iov_iter::default();
    let transfer = KBox::into_raw(transfer);
    // SAFETY: The bio's vectors are valid until it is ended, which is when the filesystem is done with them.
    // `transfer` stays until both of its users have put it: this one, and either `transferred()`, if the
    // filesystem has queued it, or else `finish()` here. The iterator is not used after the call.
    unsafe {
        raw::iov_iter_bvec(&mut iter, direction, vectors, count.into(), len as usize);
        let iocb = &raw mut (*transfer).iocb;
        let result = if writes {
            raw::vfs_iocb_iter_write(file.as_raw(), iocb, &mut iter)
        } else {
            raw::vfs_iocb_iter_read(file.as_raw(), iocb, &mut iter)
        };
        if result != -(raw::EIOCBQUEUED as isize) {
            finish(transfer, result);
        }
        Transfer::put(transfer);
    }
}

/// Called by the filesystem when a transfer that it has queued is done. Context: any.
///
/// # Safety
///
/// Only for what [`transfer`] began.
unsafe extern "C" fn transferred(iocb: *mut raw::kiocb, result: c_long) {
    // SAFETY: `transfer()` made it a part of a `Transfer`, which it left to this. For a queued write,
    // `vfs_iocb_iter_write()` leaves to it the end of the write, too.
    unsafe {
        if (*iocb).ki_flags & raw::RUST_CONST_HELPER_IOCB_WRITE != 0 {
            raw::rust_helper_kiocb_end_write(iocb);
        }
        finish(kernel::container_of!(iocb, Transfer, iocb), result);
    }
}

/// Ends a transfer that has moved so many bytes, or failed, and its bio. One that is short has failed: what is
/// missing lies behind the end of the file.
///
/// # Safety
///
/// `transfer` must be from [`transfer()`], done, and its end be left to the caller, who is one of its users, and is
/// no more then.
unsafe fn finish(transfer: *mut Transfer, result: isize) {
    // SAFETY: The caller is a user, so it is there, and the bio was left to it. Filesystems have no bio but their
    // own, so this one's length is as it was.
    let (bio, len) = unsafe { ((*transfer).bio, (*(*transfer).bio).bi_iter.bi_size) };
    let result = match u32::try_from(result) {
        Ok(done) if done == len => Ok(()),
        Ok(_) => Err(EIO),
        // CAST: The kernel's errors are small.
        Err(_) => Err(Error::from_errno(result as c_int)),
    };
    // SAFETY: The bio was left to the transfer, and its end to the caller.
    unsafe {
        Transfer::put(transfer);
        end(bio, result);
    }
}

/// Ends a bio. Context: any.
///
/// # Safety
///
/// The bio is the caller's, and submitted: it has a `bi_end_io`.
unsafe fn end(bio: *mut raw::bio, result: Result) {
    let error = result.map_or_else(|error| error.to_errno(), |()| 0);
    // SAFETY: The caller promises that the bio is ours.
    unsafe {
        (*bio).bi_status = raw::errno_to_blk_status(error);
        if let Some(end_io) = (*bio).bi_end_io {
            end_io(bio);
        }
    }
}
