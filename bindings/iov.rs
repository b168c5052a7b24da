// SPDX-License-Identifier: GPL-2.0

//! Memory of a guest, as the virtqueue's owner has it mapped.
//!
//! C header: `include/linux/uio.h`.

use crate::bindings::{
    pages::PinnedByte,
    raw, //
};
use core::mem::MaybeUninit;
use kernel::{
    iov::{
        IovIterDest,
        IovIterSource, //
    },
    prelude::*, //
};

/// A stretch of user memory; `struct iovec`.
#[repr(transparent)]
pub(crate) struct IoVec(raw::iovec);

impl Clone for IoVec {
    fn clone(&self) -> Self {
        Self(raw::iovec {
            iov_base: self.0.iov_base,
            iov_len: self.0.iov_len,
        })
    }
}

// SAFETY: The pointer in it is an address in user space, which is never dereferenced directly.
unsafe impl Send for IoVec {}
// SAFETY: As above.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// An empty stretch.
    pub(crate) const EMPTY: Self = Self::new(0, 0);

    /// `len` bytes from `address` on.
    #[inline]
    pub(super) const fn new(address: usize, len: usize) -> Self {
        Self(raw::iovec {
            iov_base: core::ptr::without_provenance_mut(address),
            iov_len: len,
        })
    }

    /// Address of its first byte.
    #[inline]
    pub(crate) fn address(&self) -> usize {
        self.0.iov_base as usize
    }

    /// Bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.0.iov_len
    }

    /// The C form of a slice.
    #[inline]
    pub(super) fn as_raw_mut(slice: &mut [Self]) -> *mut raw::iovec {
        slice.as_mut_ptr().cast()
    }
}

/// Which way data goes between the kernel and the memory of an iterator.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Direction {
    /// The memory is read, as by a write to a disk.
    Source,
    /// The memory is written, as by a read from a disk.
    Destination,
}

/// A cursor over stretches of user memory.
///
/// # Invariants
///
/// `iter` is an iterator of type `ITER_IOVEC` over all of `iovecs`, which are `total` bytes.
pub(crate) struct UserIter<'a> {
    iter: raw::iov_iter,
    direction: Direction,
    total: usize,
    iovecs: &'a [IoVec],
}

impl<'a> UserIter<'a> {
    /// A cursor at the start of `iovecs`.
    #[inline]
    pub(crate) fn new(iovecs: &'a [IoVec], direction: Direction) -> Self {
        let total = total(iovecs);
        let mut iter = MaybeUninit::<raw::iov_iter>::uninit();
        let c_direction = match direction {
            Direction::Source => raw::ITER_SOURCE,
            Direction::Destination => raw::ITER_DEST,
        };

        // SAFETY: `iovecs` is an array of `struct iovec` that outlives the iterator, and holds
        // `total` bytes.
        let iter = unsafe {
            raw::iov_iter_init(
                iter.as_mut_ptr(),
                c_direction,
                iovecs.as_ptr().cast(),
                iovecs.len(),
                total,
            );
            // `iov_iter_init()` initialised it.
            iter.assume_init()
        };
        // INVARIANT: It was just made so.
        Self {
            iter,
            direction,
            total,
            iovecs,
        }
    }

    /// Bytes from the cursor to the end.
    #[inline]
    pub(crate) fn remaining(&self) -> usize {
        let iter = core::ptr::from_ref(&self.iter).cast_mut();
        // SAFETY: By the type invariant `iter` is valid and of that direction; it is only read.
        unsafe {
            match self.direction {
                Direction::Source => IovIterSource::from_raw(iter).len(),
                Direction::Destination => IovIterDest::from_raw(iter).len(),
            }
        }
    }

    /// Bytes from the start to the cursor.
    fn position(&self) -> usize {
        self.total - self.remaining()
    }

    /// Which way the data goes.
    #[inline]
    pub(crate) fn direction(&self) -> Direction {
        self.direction
    }

    /// The stretches from the cursor to the end, as pairs of address and length in bytes.
    #[inline]
    pub(crate) fn segments(&self) -> Segments<'_> {
        Segments {
            iovecs: self.iovecs,
            skip: self.position(),
        }
    }

    /// Moves the cursor on, by no more than what remains.
    #[inline]
    pub(crate) fn advance(&mut self, bytes: usize) {
        let bytes = bytes.min(self.remaining());
        // SAFETY: By the type invariant `iter` is valid; `bytes` does not go past its end.
        unsafe { raw::iov_iter_advance(&mut self.iter, bytes) };
    }

    /// Copies from the memory to `out` and moves the cursor on. Returns the bytes copied: fewer
    /// than asked if the memory ends or cannot be read, and 0 if this is no source.
    ///
    /// Context: process context in the owner's address space; may sleep.
    pub(crate) fn copy_from(&mut self, out: &mut [u8]) -> usize {
        if self.direction != Direction::Source {
            return 0;
        }
        // SAFETY: By the type invariant `iter` is valid, and it is a source.
        unsafe { IovIterSource::from_raw(&mut self.iter) }.copy_from_iter(out)
    }

    /// Copies from `data` to the memory and moves the cursor on. Returns the bytes copied: fewer
    /// than asked if the memory ends or cannot be written, and 0 if this is no destination.
    ///
    /// Context: process context in the owner's address space; may sleep.
    pub(crate) fn copy_to(&mut self, data: &[u8]) -> usize {
        if self.direction != Direction::Destination {
            return 0;
        }
        // SAFETY: By the type invariant `iter` is valid, and it is a destination.
        unsafe { IovIterDest::from_raw(&mut self.iter) }.copy_to_iter(data)
    }

    /// The C iterator, for functions that move it on within its bounds.
    #[inline]
    pub(super) fn as_raw(&mut self) -> *mut raw::iov_iter {
        &mut self.iter
    }

    /// The next `len` bytes from the cursor on, or fewer if there are fewer, in an array of its own, so that
    /// it can outlive the virtqueue's.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(crate) fn to_owned(&self, len: usize) -> Result<OwnedUserIter> {
        let mut left = len;
        let segments = || {
            self.segments().map_while(move |(address, len)| {
                let len = len.min(left);
                left -= len;
                (len > 0).then_some((address, len))
            })
        };
        let mut iovecs = KVVec::with_capacity(segments().count(), GFP_KERNEL_ACCOUNT)?;
        for (address, len) in segments() {
            iovecs.push(IoVec::new(address, len), GFP_KERNEL_ACCOUNT)?;
        }
        Ok(OwnedUserIter {
            iovecs,
            direction: self.direction,
            position: 0,
        })
    }
}

/// Bytes of memory in `iovecs`.
#[inline]
pub(super) fn total(iovecs: &[IoVec]) -> usize {
    iovecs.iter().map(IoVec::len).sum()
}

/// Reads pairs of words of the owner's memory. `None` if they cannot all be read.
///
/// Context: process context in the owner's address space; may sleep.
#[inline]
pub(super) fn read_pairs(address: usize, out: &mut [[u64; 2]]) -> Option<()> {
    let from = core::ptr::without_provenance(address);
    let (to, count) = (out.as_mut_ptr().cast(), out.len() as u32);
    // SAFETY: There is room for as many pairs. Any address may be given: what is not the owner's fails.
    let read = unsafe {
        match count {
            1 => raw::rust_helper_get_user_pair(to, from),
            _ => raw::rust_helper_get_user_pairs(to, from, count),
        }
    };
    read.then_some(())
}

/// Copies from the start of `iovecs` to `out`. Returns the bytes copied, as [`UserIter::copy_from`]
/// does, or 0 if they cannot all be read.
///
/// Context: process context in the owner's address space; may sleep.
#[inline]
pub(super) fn copy_start(iovecs: &[IoVec], out: &mut [u8; 16]) -> usize {
    match iovecs.first() {
        // All in one piece, as drivers do it: no need for a cursor.
        Some(first) if first.len() >= out.len() => {
            let mut words = [[0; 2]];
            if read_pairs(first.address(), &mut words).is_none() {
                return 0;
            }
            let [low, high] = words[0].map(u64::to_ne_bytes);
            out[..8].copy_from_slice(&low);
            out[8..].copy_from_slice(&high);
            out.len()
        }
        _ => UserIter::new(iovecs, Direction::Source).copy_from(out),
    }
}

/// A stretch of user memory within one page, and which way its data goes.
///
/// # Invariants
///
/// It is at least one byte, and does not cross the end of a page.
pub(crate) struct PageBytes {
    address: usize,
    len: usize,
    direction: Direction,
}

impl PageBytes {
    /// What is in `iovecs` behind a first one of `skip` bytes, or in all of them if that is 0. `None` unless
    /// it is one stretch within one page.
    #[inline]
    pub(super) fn new(iovecs: &[IoVec], skip: usize, direction: Direction) -> Option<Self> {
        let (mut data, mut rest) = iovecs.split_first()?;
        if skip != 0 {
            if data.len() != skip {
                return None;
            }
            (data, rest) = rest.split_first()?;
        }
        let (address, len) = (data.address(), data.len());
        let room = raw::PAGE_SIZE - address % raw::PAGE_SIZE;
        if len == 0 || len > room || rest.iter().any(|iovec| iovec.len() != 0) {
            return None;
        }
        // INVARIANT: It was checked just now.
        Some(Self {
            address,
            len,
            direction,
        })
    }

    /// Address of its first byte.
    #[inline]
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// Bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Which way the data goes.
    #[inline]
    pub(super) fn direction(&self) -> Direction {
        self.direction
    }
}

/// A position in stretches of user memory that it owns.
pub(crate) struct OwnedUserIter {
    iovecs: KVVec<IoVec>,
    direction: Direction,
    position: usize,
}

impl OwnedUserIter {
    /// Moves the position to the first byte.
    pub(crate) fn rewind(&mut self) {
        self.position = 0;
    }

    /// Calls `f` with a cursor at the position, and keeps how far `f` moved it if it succeeds.
    ///
    /// # Errors
    ///
    /// Those of `f`.
    pub(crate) fn with<E>(
        &mut self,
        f: impl FnOnce(&mut UserIter<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut iter = UserIter::new(&self.iovecs, self.direction);
        iter.advance(self.position);
        f(&mut iter)?;
        self.position = iter.position();
        Ok(())
    }
}

/// Iterator of [`UserIter::segments`].
pub(crate) struct Segments<'a> {
    iovecs: &'a [IoVec],
    skip: usize,
}

impl Iterator for Segments<'_> {
    type Item = (usize, usize);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (first, rest) = self.iovecs.split_first()?;
            self.iovecs = rest;
            let skip = self.skip.min(first.len());
            self.skip -= skip;
            if skip < first.len() {
                return Some((first.address() + skip, first.len() - skip));
            }
        }
    }
}

/// The byte of a guest's memory that a request's status goes to.
///
/// Not `Copy`: the owner of it has the request to complete.
pub(crate) struct StatusByte {
    address: usize,
}

impl StatusByte {
    /// Cuts the last byte off `iovecs`, if there is one.
    #[inline]
    pub(crate) fn cut_off(iovecs: &mut [IoVec]) -> Option<Self> {
        let last = iovecs.iter_mut().rev().find(|iovec| iovec.len() > 0)?;
        last.0.iov_len -= 1;
        Some(Self {
            address: last.address() + last.len(),
        })
    }

    /// Pins the byte, so that it can be written in any context. Returns `None` if that cannot be.
    ///
    /// Context: process context in the owner's address space; may sleep.
    #[inline]
    pub(super) fn pin(&self) -> Option<PinnedByte> {
        PinnedByte::new(self.address)
    }

    /// Writes the byte.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the memory cannot be written.
    #[inline]
    pub(crate) fn write(self, status: u8) -> Result {
        let to = core::ptr::without_provenance_mut(self.address);
        // SAFETY: Any address may be given: what is not the owner's fails.
        if unsafe { raw::rust_helper_put_user_u8(status, to) } {
            Ok(())
        } else {
            Err(EFAULT)
        }
    }
}
