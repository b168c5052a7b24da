// SPDX-License-Identifier: GPL-2.0

//! Memory of the owner that stays where it is: that the kernel writes in any context, or gives to disks.
//!
//! C headers: `include/linux/mm.h`, `include/linux/vmalloc.h`, `include/linux/highmem.h`.

use crate::bindings::{
    compat::smp_mb,
    raw, //
};
use core::ptr::NonNull;
use kernel::{
    error::to_result,
    ffi::c_ulong,
    mm::{
        virt::flags,
        Mm, //
    },
    prelude::*,
    sync::aref::ARef, //
};

const PAGE_SIZE: usize = raw::PAGE_SIZE;

/// Pages that are pinned, or unpinned, before others get the processor.
const BATCH: usize = 512;

/// Pages of the owner's memory, pinned for writing, which are marked dirty when they are unpinned.
///
/// # Invariants
///
/// Each element is a page with one pin that belongs to this object.
struct PinnedPages(KVVec<*mut raw::page>);

// SAFETY: Pages are no thread's own.
unsafe impl Send for PinnedPages {}
// SAFETY: As above; nothing changes them.
unsafe impl Sync for PinnedPages {}

impl PinnedPages {
    /// Pins the `count` pages from `address`, the start of one, on, for as long as it takes.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if there is memory that cannot be written or pinned for long, `ENOMEM`, `EINTR` if the task was
    /// killed.
    fn new(address: usize, count: usize) -> Result<Self> {
        // The kernel would warn of a stretch of a TiB, which the owner says at will.
        let flags = GFP_KERNEL_ACCOUNT | __GFP_NOWARN;
        let mut pages = Self(KVVec::with_capacity(count, flags)?);
        while pages.0.len() < count {
            // SAFETY: Process context.
            if unsafe { raw::rust_helper_cond_resched_killed() } {
                return Err(EINTR);
            }
            let done = pages.0.len();
            // SAFETY: There is room for so many elements. Any user address may be asked for.
            let pinned = unsafe {
                raw::pin_user_pages_fast(
                    address.wrapping_add(done * PAGE_SIZE) as c_ulong,
                    (count - done).min(BATCH) as i32,
                    raw::FOLL_WRITE | raw::FOLL_LONGTERM,
                    pages.0.spare_capacity_mut().as_mut_ptr().cast(),
                )
            };
            to_result(pinned.min(0))?;
            if pinned == 0 {
                return Err(EFAULT);
            }
            // INVARIANT: So many elements were set to pages that are pinned.
            // SAFETY: As above; it is not above the room that there is. CAST: Positive.
            unsafe { pages.0.inc_len(pinned as usize) };
        }
        Ok(pages)
    }
}

impl Drop for PinnedPages {
    fn drop(&mut self) {
        for pages in self.0.chunks_mut(BATCH) {
            // SAFETY: By the type invariant all elements are pinned pages; the pins end here. The object's
            // owner is in process context: see `Mapping` and `PinnedMemory`.
            unsafe {
                raw::unpin_user_pages_dirty_lock(pages.as_mut_ptr(), pages.len() as c_ulong, true);
                raw::rust_helper_cond_resched_killed();
            }
        }
    }
}

/// Stretches of the owner's memory that stay pinned, each page known by its address.
///
/// The owner sees this memory as long as it does not map something else at the address, nor gives its pages
/// back. Whoever holds this asks for a new one when the owner says that it did.
///
/// Context: dropped in process context; may sleep.
///
/// The longest stretch comes first: most of a guest's memory is in one.
pub(crate) struct PinnedMemory(KVec<PinnedStretch>);

struct PinnedStretch {
    start: usize,
    pages: PinnedPages,
    _locked: LockedMemory,
}

impl PinnedMemory {
    /// Pins all pages of `stretches`, address and length of each, for as long as it takes, and counts them as
    /// locked memory of the calling task's. Memory of a device, which nobody can pin, is left out.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if there is other memory that cannot be written or pinned for long, or none, `ENOMEM` if it is more than
    /// `RLIMIT_MEMLOCK` allows, or there is none to note where the pages are, `EINTR` if the task was killed.
    pub(super) fn new(stretches: &[(usize, usize)]) -> Result<Self> {
        let mut pinned = KVec::with_capacity(stretches.len(), GFP_KERNEL_ACCOUNT)?;
        for &(address, len) in stretches {
            let offset = address % PAGE_SIZE;
            let count = offset.checked_add(len).ok_or(EFAULT)?.div_ceil(PAGE_SIZE);
            let start = address - offset;
            if is_device_memory(start) {
                continue;
            }
            let locked = LockedMemory::new(count)?;
            let stretch = PinnedStretch {
                start,
                pages: PinnedPages::new(start, count)?,
                _locked: locked,
            };
            pinned.push(stretch, GFP_KERNEL_ACCOUNT)?;
        }
        if pinned.is_empty() && !stretches.is_empty() {
            return Err(EFAULT);
        }
        let longest = pinned
            .iter()
            .enumerate()
            .max_by_key(|(_, stretch)| stretch.pages.0.len());
        if let Some((longest, _)) = longest {
            pinned.swap(0, longest);
        }
        Ok(Self(pinned))
    }

    /// The page that `address` is in, if it stays pinned: as long as this object does.
    #[inline]
    pub(super) fn page(&self, address: usize) -> Option<*mut raw::page> {
        self.0.iter().find_map(|stretch| {
            let index = address.wrapping_sub(stretch.start) / PAGE_SIZE;
            stretch.pages.0.get(index).copied()
        })
    }
}

/// Whether a device's memory is mapped at `address` of the calling task, such as that of one that its guest has. That
/// is in the guest's memory, too.
///
/// Context: process context; may sleep.
fn is_device_memory(address: usize) -> bool {
    let task = current!();
    task.mm().is_some_and(|mm| {
        let mappings = mm.mmap_read_lock();
        let mapping = mappings.vma_lookup(address);
        mapping.is_some_and(|mapping| mapping.flags() & (flags::IO | flags::PFNMAP) != 0)
    })
}

/// Pages that count as locked memory of an address space.
///
/// # Invariants
///
/// `pages` were added to the count of `mm`, and belong to this object.
struct LockedMemory {
    mm: ARef<Mm>,
    pages: usize,
}

impl LockedMemory {
    /// Counts `pages` in the calling task's address space. Context: may sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if that is more than `RLIMIT_MEMLOCK` allows, `EFAULT` if the task has no address space.
    fn new(pages: usize) -> Result<Self> {
        let task = current!();
        let mm: &Mm = task.mm().ok_or(EFAULT)?;
        // SAFETY: It is the address space of the calling task.
        to_result(unsafe { raw::account_locked_vm(mm.as_raw(), pages as c_ulong, true) })?;
        // INVARIANT: They were just added.
        Ok(Self {
            mm: mm.into(),
            pages,
        })
    }
}

impl Drop for LockedMemory {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to the address space, and its count has these
        // pages.
        unsafe { raw::account_locked_vm(self.mm.as_raw(), self.pages as c_ulong, false) };
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

    /// The `T` at `at` bytes from the start; `None` if it is not in the stretch, or not aligned.
    ///
    /// The guest may change it at any time, hence a pointer, for volatile accesses only. It is valid
    /// as long as the mapping.
    #[inline]
    pub(super) fn pointer<T: Field>(&self, at: usize) -> Option<*mut T> {
        let end = at.checked_add(size_of::<T>())?;
        let offset = self.offset + at;
        (end <= self.len && offset % align_of::<T>() == 0)
            .then(|| self.base.as_ptr().wrapping_add(offset).cast())
    }

    /// Reads the `T` at `at`: see [`Mapping::pointer`].
    #[inline]
    pub(super) fn read<T: Field>(&self, at: usize) -> Option<T> {
        let pointer = self.pointer(at)?;
        // SAFETY: By the type invariant it is mapped, and aligned: the base is a page's start. Whatever the guest
        // left there is valid.
        Some(unsafe { core::ptr::read_volatile(pointer) })
    }

    /// Writes the `T` at `at`: see [`Mapping::pointer`]. Does nothing if it is not in the stretch.
    #[inline]
    pub(super) fn write<T: Field>(&self, at: usize, value: T) {
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
///
/// # Safety
///
/// Any bytes are a valid value.
pub(super) unsafe trait Field: Copy {}
// SAFETY: It is an integer.
unsafe impl Field for u16 {}
// SAFETY: As above.
unsafe impl Field for u32 {}
// SAFETY: They are integers.
unsafe impl Field for [u32; 2] {}

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
