// SPDX-License-Identifier: GPL-2.0

//! Memory of the owner that the kernel can write in any context.
//!
//! C headers: `include/linux/mm.h`, `include/linux/vmalloc.h`, `include/linux/highmem.h`.

use crate::bindings::{
    compat::smp_mb,
    raw, //
};
use core::ptr::NonNull;
use kernel::{
    ffi::c_ulong,
    prelude::*, //
};

const PAGE_SIZE: usize = raw::PAGE_SIZE;

/// Pages of the owner's memory, pinned for writing, which are marked dirty when they are unpinned.
///
/// # Invariants
///
/// Each element is a page with one pin that belongs to this object.
struct PinnedPages(KVec<*mut raw::page>);

impl PinnedPages {
    /// Pins the `count` pages from `address`, the start of one, on, for as long as it takes.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if there is memory that cannot be written or pinned for long, `ENOMEM`.
    fn new(address: usize, count: usize) -> Result<Self> {
        let mut pages = Self(KVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?);
        // SAFETY: There is room for `count` elements. Any user address may be asked for.
        let pinned = unsafe {
            raw::pin_user_pages_fast(
                address as c_ulong,
                count as i32,
                raw::FOLL_WRITE | raw::FOLL_LONGTERM,
                pages.0.as_mut_ptr(),
            )
        };
        // INVARIANT: So many elements were set to pages that are pinned.
        // SAFETY: As above; it is not above `count`, the capacity.
        unsafe {
            pages
                .0
                .inc_len(usize::try_from(pinned).map_err(|_| EFAULT)?)
        };
        if pages.0.len() == count {
            Ok(pages)
        } else {
            Err(EFAULT)
        }
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        // SAFETY: By the type invariant all elements are pinned pages; the pins end here. The
        // object's owner is in process context: see `Mapping`.
        unsafe {
            raw::unpin_user_pages_dirty_lock(self.0.as_mut_ptr(), self.0.len() as c_ulong, true);
        }
    }
}

/// A stretch of the owner's memory that stays at one address of the kernel's.
///
/// What the guest sees is this memory as long as its owner does not map something else at the
/// address. Whoever holds this asks for a new one when the owner says that it did.
///
/// Context: dropped in process context; may sleep.
///
/// # Invariants
///
/// `base` is where all of `pages` are mapped, one behind the other; the stretch begins `offset` bytes
/// from it and ends `len` bytes later, within them.
pub(super) struct Mapping {
    base: NonNull<u8>,
    offset: usize,
    len: usize,
    _pages: PinnedPages,
}

// SAFETY: The mapping is the kernel's, and the same for all threads.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` bytes, at least one, of the owner's memory at `address`.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if they cannot be written or pinned for long, `ENOMEM`.
    pub(super) fn new(address: usize, len: usize) -> Result<Self> {
        let offset = address % PAGE_SIZE;
        let count = offset.checked_add(len).ok_or(EFAULT)?.div_ceil(PAGE_SIZE);
        let mut pages = PinnedPages::new(address - offset, count)?;
        // SAFETY: They are as many pages, which are pinned as long as they are mapped.
        let base = unsafe { raw::rust_helper_vmap(pages.0.as_mut_ptr(), count as u32) };
        // INVARIANT: They were just mapped there, and `count` pages hold the stretch.
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or(ENOMEM)?,
            offset,
            len,
            _pages: pages,
        })
    }

    /// The `T` at `at` bytes from the start, a multiple of its size; `None` if it is not in the stretch.
    ///
    /// The guest may change it at any time, hence a pointer, for volatile accesses only. It is valid
    /// as long as the mapping.
    #[inline]
    pub(super) fn pointer<T: Integer>(&self, at: usize) -> Option<*mut T> {
        let end = at.checked_add(size_of::<T>())?;
        let offset = self.offset + at;
        (end <= self.len && offset % size_of::<T>() == 0)
            .then(|| self.base.as_ptr().wrapping_add(offset).cast())
    }

    /// Reads the `T` at `at`: see [`Mapping::pointer`].
    #[inline]
    pub(super) fn read<T: Integer>(&self, at: usize) -> Option<T> {
        let pointer = self.pointer(at)?;
        // SAFETY: By the type invariant it is mapped, and aligned: the base is a page's start.
        Some(unsafe { core::ptr::read_volatile(pointer) })
    }

    /// Writes the `T` at `at`: see [`Mapping::pointer`]. Does nothing if it is not in the stretch.
    #[inline]
    pub(super) fn write<T: Integer>(&self, at: usize, value: T) {
        if let Some(pointer) = self.pointer(at) {
            // SAFETY: As in `read()`; the pages were pinned for writing.
            unsafe { core::ptr::write_volatile(pointer, value) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this is a mapping by `vmap()`, and it is not used again.
        unsafe { raw::rust_helper_vunmap(self.base.as_ptr().cast()) };
    }
}

/// What a guest's structures are made of.
pub(super) trait Integer: Copy {}
impl Integer for u16 {}
impl Integer for u32 {}

/// A byte of the owner's memory, pinned.
///
/// # Invariants
///
/// `page` has a pin that belongs to this object. `offset` is less than the size of a page.
pub(super) struct PinnedByte {
    page: NonNull<raw::page>,
    offset: usize,
}

// SAFETY: Pages are no thread's own.
unsafe impl Send for PinnedByte {}

impl PinnedByte {
    /// Pins the byte at `address`, or returns `None` if it cannot be written.
    ///
    /// Context: process context in the owner's address space; may sleep.
    #[inline]
    pub(super) fn new(address: usize) -> Option<Self> {
        let mut page = core::ptr::null_mut();
        // SAFETY: There is room for one page.
        let pinned =
            unsafe { raw::pin_user_pages_fast(address as c_ulong, 1, raw::FOLL_WRITE, &mut page) };
        if pinned != 1 {
            return None;
        }
        // INVARIANT: It was just pinned.
        let byte = Self {
            page: NonNull::new(page)?,
            offset: address % PAGE_SIZE,
        };
        if !byte.is_dirty() {
            // SAFETY: The page is pinned. Process context.
            unsafe { raw::set_page_dirty_lock(page) };
        }
        Some(byte)
    }

    /// Whether the page will be written back as it is now, with what was written before. If not, somebody
    /// has to write the byte again in process context, where the page can be marked.
    #[inline]
    pub(super) fn is_dirty(&self) -> bool {
        smp_mb();
        // SAFETY: By the type invariant the page is pinned.
        unsafe { raw::rust_helper_page_dirty(self.page.as_ptr()) }
    }

    /// Writes the byte. Context: any.
    #[inline]
    pub(super) fn write(&self, value: u8) {
        // SAFETY: By the type invariant the page is pinned, for writing, and the offset within it.
        unsafe {
            let base = raw::kmap_local_page(self.page.as_ptr()).cast::<u8>();
            base.add(self.offset).write_volatile(value);
            raw::kunmap_local(base.cast());
        }
    }
}

impl Drop for PinnedByte {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: By the type invariant the pin is ours. Context: any.
        unsafe { raw::unpin_user_page(self.page.as_ptr()) };
    }
}
