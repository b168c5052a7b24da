// SPDX-License-Identifier: GPL-2.0

//! Bios, the pages that they own, and where they report that they are done.
//!
//! C headers: `include/linux/bio.h`, `include/linux/blk_types.h`.

use super::{
    backend::{
        Backend,
        File, //
    },
    image::{
        self,
        Image, //
    },
    submitter::Submitter, //
};
use crate::bindings::{
    iov::{
        Direction,
        PageBytes,
        UserIter, //
    },
    pages::PinnedMemory,
    raw,
    vhost::CompletionList, //
};
use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    mem::{
        offset_of,
        size_of,
        MaybeUninit, //
    },
    ptr::NonNull, //
};
use kernel::{
    error::to_result,
    prelude::*,
    sync::{
        atomic::{
            ordering,
            Atomic, //
        },
        rcu,
        Arc, //
    },
    types::Opaque, //
};

/// Most page-sized pieces that one bio holds.
pub(crate) const MAX_BIO_PAGES: usize = raw::BIO_MAX_VECS as usize;

/// Most bytes that one bio holds, however few pieces they are.
const MAX_BIO_LEN: u32 = (MAX_BIO_PAGES * raw::PAGE_SIZE) as u32;

/// What stands before each bio of a [`BioSet`] or a [`BioRoom`] in memory.
#[repr(C)]
struct Prefix {
    /// The next bio of the same request.
    next: *mut raw::bio,
    /// The image that the bio is on; null if it is on a block device.
    image: *const Image,
    /// Where the page of the bio stays pinned, if it was not pinned for the bio; else null.
    memory: *const PinnedMemory,
    /// Where it begins on the disk, and what it does, as it was submitted: the block layer changes what the
    /// bio says.
    sector: u64,
    flags: u32,
    /// Whether the bio's pages are the kernel's own, to bounce through, and not pinned.
    bounces: bool,
}

impl Prefix {
    /// That of a new bio.
    #[inline]
    fn new(backend: &Backend, sector: u64, flags: u32) -> Self {
        Self {
            next: core::ptr::null_mut(),
            image: backend.image(),
            memory: core::ptr::null(),
            sector,
            flags,
            bounces: false,
        }
    }
}

fn prefix(bio: NonNull<raw::bio>) -> *mut Prefix {
    // All bios of this module come from a `BioSet` or a `BioRoom`, which put a `Prefix` before each.
    bio.as_ptr().wrapping_byte_sub(size_of::<Prefix>()).cast()
}

/// Where bios come from; `struct bio_set`.
///
/// # Invariants
///
/// `raw` is all zeroes, or initialised if `ready` is true, which stays so until it is dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct BioSet {
    #[pin]
    raw: Opaque<raw::bio_set>,
    ready: Atomic<bool>,
}

// SAFETY: A `struct bio_set` is used from any thread and does its own locking.
unsafe impl Send for BioSet {}
// SAFETY: As above.
unsafe impl Sync for BioSet {}

impl BioSet {
    /// Bios that are there even when memory is short, each with room for [`MAX_BIO_PAGES`].
    const RESERVE: u32 = 1;

    /// Bytes that the reserve takes.
    pub(crate) const RESERVE_BYTES: usize = Self::RESERVE as usize
        * (size_of::<Prefix>() + size_of::<raw::bio>() + MAX_BIO_PAGES * size_of::<raw::bio_vec>());

    /// An empty set, from which nothing can be had before [`BioSet::prepare`].
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            raw: Opaque::zeroed(),
            ready: Atomic::new(false),
        })
    }

    /// Allocates the reserve, the first time that it is called. Callers hold a lock over it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(crate) fn prepare(self: Pin<&Self>) -> Result {
        if self.ready.load(ordering::Relaxed) {
            return Ok(());
        }
        // SAFETY: By the type invariant `raw` is all zeroes, as `bioset_init()` wants it, and it
        // is pinned.
        to_result(unsafe {
            raw::bioset_init(
                self.raw.get(),
                Self::RESERVE,
                size_of::<Prefix>() as u32,
                BIOSET_NEED_BVECS,
            )
        })?;
        // INVARIANT: It was initialised just now.
        self.ready.store(true, ordering::Relaxed);
        Ok(())
    }

    /// A bio on `device` for up to `pages` pieces of pages, from `sector` on.
    ///
    /// With `nowait`, whoever submits it does not wait for the disk: then the bio fails, and
    /// [`Ended::WouldBlock`] says so.
    ///
    /// With `wait`, takes from the reserve if it must, and may sleep until a bio of this set is
    /// free: the caller says so only if none is in flight, else it may wait for what it has to free
    /// itself. Without, it neither sleeps nor takes from the reserve, and may return `None`.
    #[inline]
    pub(crate) fn alloc<'a>(
        self: Pin<&'a Self>,
        device: &Backend,
        op: Op,
        sector: u64,
        pages: usize,
        nowait: bool,
        wait: bool,
    ) -> Option<Bio<'a, Building>> {
        if !self.ready.load(ordering::Relaxed) {
            return None;
        }
        let flags = op.submit_flags(nowait);
        let gfp = if wait {
            raw::RUST_CONST_HELPER_GFP_NOIO
        } else {
            raw::RUST_CONST_HELPER_GFP_NOWAIT_NOWARN
        };

        // SAFETY: The device is open, `self` is initialised by the type invariant, and the count of
        // vectors is not above `BIO_MAX_VECS`.
        let bio = NonNull::new(unsafe {
            raw::bio_alloc_bioset(
                device.as_raw(),
                pages.min(MAX_BIO_PAGES) as u16,
                flags,
                gfp,
                self.raw.get(),
            )
        })?;
        // SAFETY: The bio is ours alone, and a `Prefix` is before it.
        unsafe {
            (*bio.as_ptr()).bi_iter.bi_sector = sector;
            prefix(bio).write(Prefix::new(device, sector, flags));
        }
        // INVARIANT: The bio is new, holds no pages, and nobody else has it.
        Some(Bio {
            raw: bio,
            _state: PhantomData,
        })
    }
}

#[pinned_drop]
impl PinnedDrop for BioSet {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `raw` is initialised or all zeroes, and `bioset_exit()` takes both. Every bio of
        // it is gone: each borrowed it, or was owned by a slot of the virtqueue that owns it.
        unsafe { raw::bioset_exit(self.raw.get()) };
    }
}

/// Room for one bio with few vectors, which takes no allocation.
///
/// # Invariants
///
/// While `taken` is true there is one bio in it, initialised, whose `bi_pool` is null; else there is none.
#[repr(C)]
pub(crate) struct BioRoom {
    prefix: UnsafeCell<MaybeUninit<Prefix>>,
    /// Directly behind the prefix.
    bio: Opaque<raw::bio>,
    vectors: UnsafeCell<[MaybeUninit<raw::bio_vec>; BioRoom::VECTORS]>,
    taken: Atomic<bool>,
}

const _: () = assert!(
    offset_of!(BioRoom, bio) == size_of::<Prefix>(),
    "the prefix is not directly before the bio"
);

// SAFETY: Whose the bio is says its object; `taken` is atomic.
unsafe impl Send for BioRoom {}
// SAFETY: As above.
unsafe impl Sync for BioRoom {}

impl BioRoom {
    /// Vectors of its bio.
    pub(crate) const VECTORS: usize = 4;

    /// Room that is free.
    pub(in crate::bindings) const fn new() -> Self {
        // INVARIANT: It is not taken.
        Self {
            prefix: UnsafeCell::new(MaybeUninit::uninit()),
            bio: Opaque::uninit(),
            vectors: UnsafeCell::new([const { MaybeUninit::uninit() }; Self::VECTORS]),
            taken: Atomic::new(false),
        }
    }

    /// Whether there is a bio in it.
    #[inline]
    pub(in crate::bindings) fn is_taken(&self) -> bool {
        self.taken.load(ordering::Acquire)
    }

    /// Makes a bio as [`BioSet::alloc`] does, for up to [`BioRoom::VECTORS`] pieces of pages. Returns `None` if
    /// there is one already.
    ///
    /// # Safety
    ///
    /// Nobody else calls at the same time. The room is not moved or freed while it is taken.
    #[inline]
    pub(in crate::bindings) unsafe fn fill<'a>(
        &self,
        device: &Backend,
        op: Op,
        sector: u64,
        nowait: bool,
    ) -> Option<Bio<'a, Building>> {
        if self.is_taken() {
            return None;
        }
        let flags = op.submit_flags(nowait);
        let bio = self.bio.get();
        // SAFETY: The room is free and the caller's alone, so all of it may be written. The device is open,
        // and the vectors are as many as said. `bi_pool` becomes null.
        unsafe {
            raw::bio_init(
                bio,
                device.as_raw(),
                self.vectors.get().cast(),
                Self::VECTORS as u16,
                flags,
            );
            (*bio).bi_iter.bi_sector = sector;
            self.prefix
                .get()
                .cast::<Prefix>()
                .write(Prefix::new(device, sector, flags));
        }
        // INVARIANT: The bio is initialised.
        self.taken.store(true, ordering::Relaxed);
        // INVARIANT: The bio is new, holds no pages, and nobody else has it.
        Some(Bio {
            raw: NonNull::new(bio)?,
            _state: PhantomData,
        })
    }

    /// Gives up a bio, which frees the room that it is in or gives it back to its set. Context: any.
    ///
    /// # Safety
    ///
    /// `bio` is one of a [`BioSet`] or a [`BioRoom`], of which this is the only reference.
    #[inline]
    unsafe fn put(bio: NonNull<raw::bio>) {
        let raw = bio.as_ptr();
        // SAFETY: The caller promises that the bio is ours. One without a set is in a room, which lives at
        // least as long as it is taken.
        unsafe {
            if !(*raw).bi_pool.is_null() {
                raw::bio_put(raw);
                return;
            }
            raw::bio_uninit(raw);
            let room = kernel::container_of!(Opaque::cast_from(raw), Self, bio);
            // INVARIANT: The bio is gone.
            (*room).taken.store(false, ordering::Release);
        }
    }
}

/// The flag of a bio whose submitter must not wait.
const NOWAIT: u32 = 1 << raw::req_flag_bits___REQ_NOWAIT;

/// The flag of a bio that is not to be merged with others.
const NOMERGE: u32 = 1 << raw::req_flag_bits___REQ_NOMERGE;

/// `BIOSET_NEED_BVECS` of `include/linux/bio.h`, a member of an unnamed enum there.
const BIOSET_NEED_BVECS: i32 = 1 << 0;

/// What a bio does.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// Reads.
    Read,
    /// Writes; with `fua`, is complete only when the data is on stable storage.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Makes all writes that were complete before stable. Has no data.
    Flush,
    /// Tells the disk that what is in a range is not needed any more. Has a range and no data.
    Discard,
    /// Writes zeroes to a range. Has no data.
    WriteZeroes {
        /// The disk may deallocate it, if it reads as zeroes afterwards.
        unmap: bool,
    },
    /// Erases a range for good. Has no data.
    SecureErase,
    /// Writes at the write pointer of the zone that begins at the bio's sector.
    ZoneAppend {
        /// Force unit access.
        fua: bool,
    },
    /// Opens the zone that begins at the bio's sector. Has no data, as the ones below.
    ZoneOpen,
    /// Closes it.
    ZoneClose,
    /// Makes it full.
    ZoneFinish,
    /// Makes it empty.
    ZoneReset,
    /// Makes all zones empty.
    ZoneResetAll,
}

impl Op {
    /// What a bio says that does it, and whose submitter must not wait if `nowait`.
    #[inline]
    fn submit_flags(self, nowait: bool) -> u32 {
        self.flags() | if nowait { NOWAIT } else { 0 }
    }

    #[inline]
    fn flags(self) -> u32 {
        const fn flag(bit: raw::req_flag_bits) -> u32 {
            1 << bit
        }
        /// As the block layer marks direct writes: somebody waits for them.
        const WRITE: u32 = raw::req_op_REQ_OP_WRITE
            | flag(raw::req_flag_bits___REQ_SYNC)
            | flag(raw::req_flag_bits___REQ_IDLE);

        const FUA: u32 = flag(raw::req_flag_bits___REQ_FUA);
        const SYNC: u32 = flag(raw::req_flag_bits___REQ_SYNC);

        match self {
            Op::Read => raw::req_op_REQ_OP_READ,
            Op::Write { fua: false } => WRITE,
            Op::Write { fua: true } => WRITE | FUA,
            Op::ZoneAppend { fua: false } => raw::req_op_REQ_OP_ZONE_APPEND | SYNC,
            Op::ZoneAppend { fua: true } => raw::req_op_REQ_OP_ZONE_APPEND | SYNC | FUA,
            Op::ZoneOpen => raw::req_op_REQ_OP_ZONE_OPEN | SYNC,
            Op::ZoneClose => raw::req_op_REQ_OP_ZONE_CLOSE | SYNC,
            Op::ZoneFinish => raw::req_op_REQ_OP_ZONE_FINISH | SYNC,
            Op::ZoneReset => raw::req_op_REQ_OP_ZONE_RESET | SYNC,
            Op::ZoneResetAll => raw::req_op_REQ_OP_ZONE_RESET_ALL | SYNC,
            // `submit_bio()` refuses `REQ_OP_FLUSH`.
            Op::Flush => WRITE | flag(raw::req_flag_bits___REQ_PREFLUSH),
            Op::Discard => raw::req_op_REQ_OP_DISCARD,
            Op::WriteZeroes { unmap: true } => raw::req_op_REQ_OP_WRITE_ZEROES,
            Op::WriteZeroes { unmap: false } => {
                raw::req_op_REQ_OP_WRITE_ZEROES | flag(raw::req_flag_bits___REQ_NOUNMAP)
            }
            Op::SecureErase => raw::req_op_REQ_OP_SECURE_ERASE,
        }
    }
}

/// Why the block layer or the disk did not do what a bio says.
#[derive(Copy, Clone, PartialEq, Eq)]
pub(crate) enum BioError {
    /// The disk does not do such a thing: `BLK_STS_NOTSUPP`.
    Unsupported,
    /// Too many zones would be open.
    OpenZones,
    /// Too many zones would be open or closed.
    ActiveZones,
    /// Any other reason.
    Failed,
}

/// State of a [`Bio`] that is not submitted yet.
pub(crate) enum Building {}

/// State of a [`Bio`] that the block layer is done with, or never got.
pub(crate) enum Finished {}

/// Why pages could not be added to a bio.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BuildError {
    /// The guest's memory, or the disk, cannot be used as it should be.
    Fault,
    /// The host has no memory to bounce through.
    NoMemory,
}

/// A bio that owns its pages. They are released when it is dropped.
///
/// A submitted bio belongs to the block layer and has no object: it comes back, finished, from the
/// [`PendingBios`] it was submitted with.
///
/// # Invariants
///
/// - `raw` is a bio of a [`BioSet`] or a [`BioRoom`], of which this object has the only reference.
/// - Its vectors are kernel pages allocated for it if its prefix says that it bounces, else pages
///   pinned for it if `BIO_PAGE_PINNED` is set, else there are none, or all are of the memory that its
///   prefix names, or it is a write and all are the zero page, which is nobody's.
pub(crate) struct Bio<'a, State> {
    raw: NonNull<raw::bio>,
    _state: PhantomData<(&'a BioSet, State)>,
}

impl<State> Bio<'_, State> {
    fn is_read(&self) -> bool {
        self.op() == raw::req_op_REQ_OP_READ
    }

    fn op(&self) -> u32 {
        // SAFETY: By the type invariant the bio is ours.
        unsafe { (*self.raw.as_ptr()).bi_opf & REQ_OP_MASK }
    }

    fn bounces(&self) -> bool {
        // SAFETY: By the type invariant the bio is ours, with its prefix.
        unsafe { (*prefix(self.raw)).bounces }
    }

    /// Whether it has pages that are pinned.
    #[inline]
    fn is_pinned(&self) -> bool {
        // SAFETY: By the type invariant the bio is ours.
        let flags = unsafe { (*self.raw.as_ptr()).bi_flags };
        flags & (1 << raw::BIO_PAGE_PINNED) != 0 && !self.vectors().is_empty()
    }

    /// Its page, if it has one vector and that is within one page.
    #[inline]
    fn single_page(&self) -> Option<*mut raw::page> {
        match self.vectors() {
            [vector] => {
                let end = vector.bv_offset as usize + vector.bv_len as usize;
                (end <= raw::PAGE_SIZE).then_some(vector.bv_page)
            }
            _ => None,
        }
    }

    /// Whether all its pages, of which there are some, are dirty.
    ///
    /// # Safety
    ///
    /// `single` is what [`Bio::single_page`] returns.
    #[inline]
    unsafe fn is_dirty(&self, single: Option<*mut raw::page>) -> bool {
        if let Some(page) = single {
            // SAFETY: The caller promises that it is the bio's, and by the type invariant it is pinned for that.
            return unsafe { raw::rust_helper_page_dirty(page) };
        }
        // SAFETY: By the type invariant the bio is ours, and its pages are pinned.
        unsafe { raw::rust_helper_bio_dirty(self.raw.as_ptr()) }
    }

    /// The bio's vectors: page, offset and length of each.
    fn vectors(&self) -> &[raw::bio_vec] {
        // SAFETY: By the type invariant the bio is ours; the block layer does not change
        // `bi_io_vec` and `bi_vcnt` of a bio that it is given.
        unsafe {
            let bio = &*self.raw.as_ptr();
            if bio.bi_vcnt == 0 {
                return &[];
            }
            core::slice::from_raw_parts(bio.bi_io_vec, usize::from(bio.bi_vcnt))
        }
    }
}

impl Bio<'_, Building> {
    /// Whether it is on `device`.
    #[inline]
    pub(in crate::bindings) fn is_on(&self, device: &Backend) -> bool {
        // SAFETY: By the type invariant the bio is ours, with its prefix.
        let (bdev, image) = unsafe { ((*self.raw.as_ptr()).bi_bdev, (*prefix(self.raw)).image) };
        bdev == device.as_raw() && image == device.image()
    }

    /// Whether all of its pages are its own, or stay pinned in `memory`.
    #[inline]
    pub(in crate::bindings) fn is_of(&self, memory: Option<&PinnedMemory>) -> bool {
        // SAFETY: By the type invariant the bio is ours, with its prefix.
        let kept = unsafe { (*prefix(self.raw)).memory };
        kept.is_null() || memory.is_some_and(|memory| core::ptr::eq(kept, memory))
    }

    /// Has the block layer not look for others to merge it with, nor merge others with it.
    #[inline]
    pub(crate) fn forbid_merging(&mut self) {
        // SAFETY: By the type invariant the bio is ours, with its prefix.
        unsafe {
            (*self.raw.as_ptr()).bi_opf |= NOMERGE;
            (*prefix(self.raw)).flags |= NOMERGE;
        }
    }

    /// Bytes of data in it.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        // SAFETY: By the type invariant the bio is ours.
        unsafe { (*self.raw.as_ptr()).bi_iter.bi_size as usize }
    }

    /// Pins the memory from `memory`'s cursor on and adds it, until the bio is full or the memory
    /// ends. Moves the cursor behind what was added. A read's memory must be a destination, a
    /// write's a source.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// [`BuildError::Fault`] if memory cannot be pinned or is not aligned to `dma_alignment`, a
    /// mask. What was added before stays in the bio.
    #[inline]
    pub(crate) fn pin(
        &mut self,
        memory: &mut UserIter<'_>,
        dma_alignment: u32,
    ) -> Result<(), BuildError> {
        let has_others = !self.vectors().is_empty() && !self.is_pinned();
        let goes_back = self.is_read() != (memory.direction() == Direction::Destination);
        if self.bounces() || has_others || goes_back {
            return Err(BuildError::Fault);
        }
        // SAFETY: By the type invariant the bio is ours.
        let bio = unsafe { &mut *self.raw.as_ptr() };

        while memory.remaining() > 0 && bio.bi_vcnt < bio.bi_max_vecs {
            let room = MAX_BIO_LEN.saturating_sub(bio.bi_iter.bi_size) as usize;
            if room == 0 {
                break;
            }
            // SAFETY: The vectors are an array of `bi_max_vecs`, of which `bi_vcnt` are used; the
            // iterator is over user memory and valid.
            let added = unsafe {
                raw::iov_iter_extract_bvecs(
                    memory.as_raw(),
                    bio.bi_io_vec,
                    room,
                    &mut bio.bi_vcnt,
                    bio.bi_max_vecs,
                    dma_alignment,
                    0,
                )
            };
            if added <= 0 {
                return Err(BuildError::Fault);
            }
            // INVARIANT: `iov_iter_extract_bvecs()` pins pages of user memory, so the vectors up to
            // `bi_vcnt` are pinned, and the flag says so from the first on.
            bio.bi_flags |= 1 << raw::BIO_PAGE_PINNED;
            // CAST: Positive, and not above `room`.
            bio.bi_iter.bi_size += added as u32;
        }
        Ok(())
    }

    /// Pins memory of one page, unless it stays pinned in `kept`, and adds it: for that, the same as
    /// [`Bio::pin`]. Its address and length are aligned as the device wants it.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// [`BuildError::Fault`] if the memory cannot be pinned, or the bio has data already.
    #[inline]
    pub(in crate::bindings) fn pin_page(
        &mut self,
        memory: &PageBytes,
        kept: Option<&PinnedMemory>,
    ) -> Result<(), BuildError> {
        let writes = memory.direction() == Direction::Destination;
        let (bounces, is_read) = (self.bounces(), self.is_read());
        // SAFETY: By the type invariant the bio is ours.
        let bio = unsafe { &mut *self.raw.as_ptr() };
        if bounces || is_read != writes || bio.bi_vcnt != 0 || bio.bi_max_vecs == 0 {
            return Err(BuildError::Fault);
        }
        let offset = memory.address() % raw::PAGE_SIZE;
        let page = match kept.and_then(|kept| Some((kept, kept.page(memory.address())?))) {
            // INVARIANT: The only vector will be of this memory.
            Some((kept, page)) => {
                // SAFETY: By the type invariant the bio is ours, with its prefix.
                unsafe { (*prefix(self.raw)).memory = kept };
                page
            }
            None => {
                let flags = if writes { raw::FOLL_WRITE } else { 0 };
                let address = memory.address() - offset;
                let mut page = core::ptr::null_mut();
                // SAFETY: There is room for one page. Any user address may be asked for.
                if unsafe { raw::pin_user_pages_fast(address, 1, flags, &mut page) } != 1 {
                    return Err(BuildError::Fault);
                }
                // INVARIANT: The only vector will be pinned.
                bio.bi_flags |= 1 << raw::BIO_PAGE_PINNED;
                page
            }
        };
        // CAST: Both are not above the size of a page.
        let vector = raw::bio_vec {
            bv_page: page,
            bv_len: memory.len() as u32,
            bv_offset: offset as u32,
        };
        // SAFETY: There is room for at least one vector.
        unsafe { *bio.bi_io_vec = vector };
        bio.bi_vcnt = 1;
        bio.bi_iter.bi_size = memory.len() as u32;
        Ok(())
    }

    /// Sets how many sectors a bio that has a range and no data is about, at most what its length can
    /// say. Others stay empty.
    pub(crate) fn set_range(&mut self, sectors: u32) {
        let op = self.op();
        if op != raw::req_op_REQ_OP_DISCARD
            && op != raw::req_op_REQ_OP_WRITE_ZEROES
            && op != raw::req_op_REQ_OP_SECURE_ERASE
        {
            return;
        }
        // SAFETY: By the type invariant the bio is ours.
        unsafe { (*self.raw.as_ptr()).bi_iter.bi_size = sectors.min(u32::MAX >> 9) << 9 };
    }

    /// Adds `sectors` sectors of zeroes to a write without other data, as many as fit.
    pub(crate) fn add_zeroes(&mut self, sectors: u32) {
        let has_others = !self.vectors().is_empty() || self.bounces();
        if self.op() != raw::req_op_REQ_OP_WRITE || has_others {
            return;
        }
        // SAFETY: By the type invariant the bio is ours.
        let bio = unsafe { &mut *self.raw.as_ptr() };
        let mut left = sectors.min(MAX_BIO_LEN >> 9) << 9;

        while left > 0 && bio.bi_vcnt < bio.bi_max_vecs {
            let piece = left.min(raw::PAGE_SIZE as u32);
            // INVARIANT: All vectors of the bio are the zero page.
            // SAFETY: There is room for another vector. The zero page is never freed.
            unsafe {
                *bio.bi_io_vec.add(usize::from(bio.bi_vcnt)) = raw::bio_vec {
                    bv_page: raw::rust_helper_zero_page(),
                    bv_len: piece,
                    bv_offset: 0,
                };
            }
            bio.bi_vcnt += 1;
            bio.bi_iter.bi_size += piece;
            left -= piece;
        }
    }

    /// Adds up to `len` bytes of the kernel's own pages, as many as fit; for a write, filled from
    /// `memory`, whose cursor moves behind them.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// [`BuildError::NoMemory`], or [`BuildError::Fault`] if `memory` cannot be read.
    pub(crate) fn bounce(
        &mut self,
        memory: &mut UserIter<'_>,
        len: usize,
    ) -> Result<(), BuildError> {
        let has_others = !self.vectors().is_empty() && !self.bounces();
        // SAFETY: By the type invariant the bio is ours.
        let bio = unsafe { &mut *self.raw.as_ptr() };
        if has_others || bio.bi_flags & (1 << raw::BIO_PAGE_PINNED) != 0 {
            return Err(BuildError::Fault);
        }
        // INVARIANT: All vectors that the bio gets are pages allocated below.
        // SAFETY: The bio is ours, with its prefix.
        unsafe { (*prefix(self.raw)).bounces = true };

        let mut flags = raw::RUST_CONST_HELPER_GFP_KERNEL_ACCOUNT_NOWARN;
        if memory.direction() == Direction::Destination {
            // The guest gets what is in them, whether the disk fills them or not.
            flags |= raw::RUST_CONST_HELPER_GFP_ZERO;
        }
        let mut left = len;
        while left > 0 && bio.bi_vcnt < bio.bi_max_vecs {
            let piece = left.min(raw::PAGE_SIZE);
            // SAFETY: Any flags and order may be given.
            let page = unsafe { raw::alloc_pages(flags, 0) };
            if page.is_null() {
                return Err(BuildError::NoMemory);
            }
            // Each page a vector of its own, so that they can be freed one by one.
            // SAFETY: There is room for another vector.
            unsafe {
                *bio.bi_io_vec.add(usize::from(bio.bi_vcnt)) = raw::bio_vec {
                    bv_page: page,
                    bv_len: piece as u32,
                    bv_offset: 0,
                };
            }
            bio.bi_vcnt += 1;
            bio.bi_iter.bi_size += piece as u32;
            left -= piece;

            if memory.direction() == Direction::Source {
                // SAFETY: The page is new and of `PAGE_SIZE`, of which `piece` is a part; the
                // iterator is a source and valid.
                let copied = unsafe { raw::copy_page_from_iter(page, 0, piece, memory.as_raw()) };
                if copied != piece {
                    return Err(BuildError::Fault);
                }
            }
        }
        Ok(())
    }
}

impl<'a> Bio<'a, Finished> {
    /// Why it failed, if it did.
    pub(crate) fn error(&self) -> Option<BioError> {
        // SAFETY: By the type invariant the bio is ours.
        match unsafe { (*self.raw.as_ptr()).bi_status } {
            0 => None,
            raw::RUST_CONST_HELPER_BLK_STS_NOTSUPP => Some(BioError::Unsupported),
            raw::RUST_CONST_HELPER_BLK_STS_ZONE_OPEN_RESOURCE => Some(BioError::OpenZones),
            raw::RUST_CONST_HELPER_BLK_STS_ZONE_ACTIVE_RESOURCE => Some(BioError::ActiveZones),
            _ => Some(BioError::Failed),
        }
    }

    /// Where it began on the disk. That of a zone append is where its data was written.
    pub(crate) fn sector(&self) -> u64 {
        // SAFETY: By the type invariant the bio is ours.
        unsafe { (*self.raw.as_ptr()).bi_iter.bi_sector }
    }

    /// Copies what a read bounced to `memory`, whose cursor moves behind it.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// [`BuildError::Fault`] if `memory` cannot be written or is too short.
    pub(crate) fn copy_bounced(&self, memory: &mut UserIter<'_>) -> Result<(), BuildError> {
        if !self.bounces() || !self.is_read() {
            return Ok(());
        }
        if memory.direction() != Direction::Destination {
            return Err(BuildError::Fault);
        }
        for vector in self.vectors() {
            let len = vector.bv_len as usize;
            // SAFETY: The page is the bio's own, and the range is within it; the iterator is a
            // destination and valid.
            let copied = unsafe {
                raw::copy_page_to_iter(
                    vector.bv_page,
                    vector.bv_offset as usize,
                    len,
                    memory.as_raw(),
                )
            };
            if copied != len {
                return Err(BuildError::Fault);
            }
        }
        Ok(())
    }
}

impl Bio<'_, Finished> {
    /// Releases the pages and drops the bio, in any context. Gives it back if that takes process
    /// context: it was bounced, or it is a read into pages that are not dirty yet.
    #[inline]
    fn release(self) -> Result<(), Self> {
        let pinned = self.is_pinned();
        let single = self.single_page();
        // SAFETY: It is what `single_page()` returned.
        let dirty = || unsafe { self.is_dirty(single) };
        if self.bounces() || (pinned && self.is_read() && !dirty()) {
            return Err(self);
        }
        let bio = self.raw;
        let raw = bio.as_ptr();
        let page = single.filter(|_| pinned);
        core::mem::forget(self);
        // SAFETY: By the type invariant, which was the object's, its pages are pinned if the flag says
        // so, and this is the only reference.
        unsafe {
            match page {
                Some(page) => raw::unpin_user_page(page),
                None if pinned => raw::__bio_release_pages(raw, false),
                None => (),
            }
            BioRoom::put(bio);
        }
        Ok(())
    }
}

impl<State> Drop for Bio<'_, State> {
    #[inline]
    fn drop(&mut self) {
        if self.bounces() {
            for vector in self.vectors() {
                // SAFETY: By the type invariant each is a page of order 0 allocated for this bio.
                unsafe { raw::__free_pages(vector.bv_page, 0) };
            }
        } else if self.is_pinned() {
            // SAFETY: The bio's pages are pinned. The disk may have written to a read's: they are
            // marked dirty, unless they are already, in which case they are written back as they are
            // now. A bio is dropped in process context, so their lock can be taken.
            unsafe {
                let single = self.single_page();
                let mark = self.is_read() && !self.is_dirty(single);
                match single {
                    Some(page) if !mark => raw::unpin_user_page(page),
                    _ => raw::__bio_release_pages(self.raw.as_ptr(), mark),
                }
            }
        }
        // SAFETY: By the type invariant this is the only reference.
        unsafe { BioRoom::put(self.raw) };
    }
}

/// `REQ_OP_MASK` of `include/linux/blk_types.h`, an expression that bindgen does not evaluate.
pub(super) const REQ_OP_MASK: u32 = (1 << raw::REQ_OP_BITS) - 1;

/// The bios of one request: those that are built, that are in flight, and that are finished.
///
/// It goes round: the owner adds bios and submits them; then it is the block layer's, until the last
/// bio is done and it is pushed to its [`CompletionList`], which owns it then; whoever completes the
/// request takes the finished bios.
///
/// # Invariants
///
/// - `first` to `last` is a list, linked by the bios' prefixes, of bios that this object owns.
/// - From `submit()` on until it is pushed, only `submit()` itself, before the last bio is submitted, and
///   `end_io()` touch it; `end_io()` only `pending` and `result`. With the last bio it pushes it.
/// - `completions` points to a list that outlives this object.
#[repr(C)]
pub(crate) struct PendingBios {
    /// The link in the completion list. First, so that the list's users can find this object.
    node: UnsafeCell<raw::llist_node>,
    completions: NonNull<CompletionList>,
    pending: Atomic<i32>,
    /// An [`Ended`], of all bios together.
    result: Atomic<i32>,
    first: UnsafeCell<*mut raw::bio>,
    last: UnsafeCell<*mut raw::bio>,
}

// SAFETY: The type invariants say who touches what and when; what `end_io()` shares is atomic.
unsafe impl Send for PendingBios {}
// SAFETY: As above; all methods that touch the list of bios are `unsafe` for that reason.
unsafe impl Sync for PendingBios {}

impl PendingBios {
    /// No bios.
    ///
    /// # Safety
    ///
    /// `completions` must outlive the object.
    pub(in crate::bindings) unsafe fn new(completions: &CompletionList) -> Self {
        // INVARIANT: The list is empty and nothing is in flight; the caller promises the rest.
        Self {
            node: UnsafeCell::new(raw::llist_node {
                next: core::ptr::null_mut(),
            }),
            completions: completions.into(),
            pending: Atomic::new(0),
            result: Atomic::new(Ended::Done as i32),
            first: UnsafeCell::new(core::ptr::null_mut()),
            last: UnsafeCell::new(core::ptr::null_mut()),
        }
    }

    /// The link in a list, which also leads to what begins with this object.
    pub(in crate::bindings) fn node(&self) -> *mut raw::llist_node {
        core::ptr::from_ref(self).cast_mut().cast()
    }

    /// How the bios ended, all together, since the last call of [`PendingBios::set_error`].
    #[inline]
    pub(in crate::bindings) fn ended(&self) -> Ended {
        let result = self.result.load(ordering::Relaxed);
        if result == Ended::Done as i32 {
            Ended::Done
        } else if result == Ended::WouldBlock as i32 {
            Ended::WouldBlock
        } else {
            Ended::Failed
        }
    }

    /// Sets whether a bio failed.
    #[inline]
    pub(in crate::bindings) fn set_error(&self, error: bool) {
        let outcome = if error { Ended::Failed } else { Ended::Done };
        self.result.store(outcome as i32, ordering::Relaxed);
    }

    /// Learns that a bio failed. Context: any.
    #[cold]
    fn bio_failed(&self, status: raw::blk_status_t, nowait: bool) {
        // The disk may have been one that does not know the flag when the bio came there.
        let would_block = status == raw::RUST_CONST_HELPER_BLK_STS_AGAIN
            || status == raw::RUST_CONST_HELPER_BLK_STS_NOTSUPP;
        if nowait && would_block {
            let (done, would_block) = (Ended::Done as i32, Ended::WouldBlock as i32);
            // One that failed stays so.
            let _ = self.result.cmpxchg(done, would_block, ordering::Relaxed);
        } else {
            self.set_error(true);
        }
    }

    /// Adds a bio at the end.
    ///
    /// # Safety
    ///
    /// The caller owns this object: nothing is in flight, and nobody else calls.
    #[inline]
    pub(in crate::bindings) unsafe fn add(&self, bio: Bio<'_, Building>) {
        let raw = bio.raw.as_ptr();
        // INVARIANT: The bio's ownership passes to the list.
        core::mem::forget(bio);
        // SAFETY: The caller owns this object, so both ends are ours; `last` is a bio of the list.
        unsafe {
            match NonNull::new(*self.last.get()) {
                Some(last) => (*prefix(last)).next = raw,
                None => *self.first.get() = raw,
            }
            *self.last.get() = raw;
        }
    }

    /// Takes the first bio off the list.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::add`].
    #[inline]
    pub(in crate::bindings) unsafe fn take<'a>(&self) -> Option<Bio<'a, Finished>> {
        // SAFETY: The caller owns this object, so both ends and the bios are ours.
        unsafe {
            let bio = NonNull::new(*self.first.get())?;
            let next = (*prefix(bio)).next;
            *self.first.get() = next;
            if next.is_null() {
                *self.last.get() = core::ptr::null_mut();
            }
            // INVARIANT: The list owned the bio; the block layer is done with it.
            Some(Bio {
                raw: bio,
                _state: PhantomData,
            })
        }
    }

    /// Makes all bios as they were before they were submitted, but that their submitter may wait.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::add`]. All bios must be finished, and on `device`.
    #[cold]
    pub(in crate::bindings) unsafe fn rewind(&self, device: &Backend) {
        self.set_error(false);
        // SAFETY: The caller owns this object, and so the bios, and says that they are finished.
        unsafe {
            let mut next = *self.first.get();
            while let Some(bio) = NonNull::new(next) {
                rewind(bio, device);
                next = (*prefix(bio)).next;
            }
        }
    }

    /// Releases the finished bios. Returns false if some are left, for whose release it takes process
    /// context.
    ///
    /// Context: any.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::add`].
    #[inline]
    pub(in crate::bindings) unsafe fn release(&self) -> bool {
        // SAFETY: The caller owns this object.
        while let Some(bio) = unsafe { self.take() } {
            if let Err(bio) = bio.release() {
                // SAFETY: As above.
                unsafe { self.put_back(bio) };
                return false;
            }
        }
        true
    }

    /// Undoes [`PendingBios::take`].
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::add`].
    unsafe fn put_back(&self, bio: Bio<'_, Finished>) {
        let raw = bio.raw;
        // INVARIANT: The bio's ownership passes to the list, in front of the others.
        core::mem::forget(bio);
        // SAFETY: The caller owns this object, so both ends and the bios are ours.
        unsafe {
            let next = core::mem::replace(&mut *self.first.get(), raw.as_ptr());
            (*prefix(raw)).next = next;
            if next.is_null() {
                *self.last.get() = raw.as_ptr();
            }
        }
    }

    /// Submits all bios of the list, in order. If there are none, completes at once. Those on an image are
    /// submitted by another task.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::add`]. The caller gives up ownership: when this returns, everything may
    /// be complete already. The bios' backends must stay open until the last bio is done, and this object must
    /// not move or go before. No bio may have been submitted since it was made or rewound.
    #[inline(always)]
    pub(in crate::bindings) unsafe fn submit(&self) {
        // SAFETY: The caller owns this object.
        let Some((image, transfers)) = (unsafe { self.image() }) else {
            // SAFETY: The caller promises it. `start()` gives bios that are complete, and `end_io()` takes them
            // back.
            return unsafe { self.start(|bio| raw::submit_bio(bio)) };
        };
        // SAFETY: The caller promises it; `image` is that of the bios.
        unsafe { self.submit_later(image, transfers) };
    }

    /// Has another task submit all bios of the list.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::submit`]; and the bios must be on `image`.
    #[cold]
    unsafe fn submit_later(&self, image: &Image, transfers: bool) {
        let pending = Pending(self.into());
        // SAFETY: The caller promises what this asks for; `file` is that of the bios.
        image.spawn(transfers, move |file| unsafe { pending.submit_to(file) });
    }

    /// The image that the bios are on, if they are on one, and whether they are reads or writes.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::add`]. The bios' backend must be open.
    #[inline]
    unsafe fn image(&self) -> Option<(&Image, bool)> {
        // SAFETY: The caller owns this object.
        let first = NonNull::new(unsafe { *self.first.get() })?;
        // SAFETY: The list owns the bio, and its image is open.
        unsafe {
            let image = (*prefix(first)).image.as_ref()?;
            Some((image, image::is_transfer(first.as_ref())))
        }
    }

    /// Passes all bios of the list to `submit`, in order. If there are none, completes at once.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::submit`]. `submit` must give each bio to somebody who calls its `bi_end_io`.
    #[inline]
    unsafe fn start(&self, submit: impl Fn(*mut raw::bio)) {
        // SAFETY: The caller owns this object.
        let mut bio = unsafe { *self.first.get() };
        let mut count = 0;

        let mut counted = bio;
        while let Some(raw) = NonNull::new(counted) {
            count += 1;
            // SAFETY: The list owns the bio. `end_io()` gets a pointer to this object, which is not
            // moved or freed while bios are in flight.
            unsafe {
                (*raw.as_ptr()).bi_private = core::ptr::from_ref(self).cast_mut().cast();
                (*raw.as_ptr()).bi_end_io = Some(end_io);
                counted = (*prefix(raw)).next;
            }
        }
        if count == 0 {
            self.complete();
            return;
        }
        self.pending.store(count, ordering::Relaxed);

        while let Some(raw) = NonNull::new(bio) {
            // The last bio may take this object with it, so look ahead.
            // SAFETY: The bio is not submitted yet, so it is still ours.
            bio = unsafe { (*prefix(raw)).next };
            submit(raw.as_ptr());
        }
    }

    /// As [`PendingBios::submit`], by a task of `submitter`, or here if there is no memory for that, or if they
    /// are on an image, which has tasks of its own. The task keeps `device`, which the bios are for, open until it
    /// submitted the last of them, which may be done before.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::submit`]; and this object must not move or go before it was pushed.
    pub(in crate::bindings) unsafe fn submit_by(
        &self,
        submitter: &Submitter,
        device: Arc<Backend>,
    ) {
        // SAFETY: The caller owns this object, and the bios' device is open.
        let on_image = unsafe { self.image() }.is_some();
        let pending = Pending(self.into());
        let submit = move || {
            // SAFETY: The caller promises what `submit()` asks for.
            unsafe { pending.submit() };
            drop(device);
        };
        if on_image || submitter.spawn(submit).is_err() {
            // SAFETY: The caller promises it; nobody else was asked.
            unsafe { self.submit() };
        }
    }

    /// Hands this object to the completion list, or completes what it is part of.
    #[inline(always)]
    fn complete(&self) {
        // Whoever takes this object from the list may free it together with the list, after a grace
        // period: the list is used until the end of this section.
        let _guard = rcu::read_lock();
        // SAFETY: By the type invariant the list outlives this object; nothing is in flight, and the
        // node is in no list.
        unsafe { self.completions.as_ref().push(self.node()) };
    }
}

/// How the bios of a request ended.
#[derive(Copy, Clone, PartialEq, Eq)]
#[repr(i32)]
pub(crate) enum Ended {
    /// All well, as far as they are done.
    Done = 0,
    /// One failed.
    Failed = 1,
    /// None failed, and one would have had its submitter wait for the disk, where that was not to be: all of them
    /// can be submitted again, after [`PendingBios::rewind`].
    WouldBlock = 2,
}

/// Makes a bio with data as it was before it was submitted on `device`, but that its submitter may wait.
///
/// # Safety
///
/// The bio must be one of a [`BioSet`] or a [`BioRoom`], the caller's, and finished.
unsafe fn rewind(bio: NonNull<raw::bio>, device: &Backend) {
    let raw = bio.as_ptr();
    // SAFETY: The caller has the only reference to the bio, with its prefix. Its vectors stay as they are, and so
    // do those of its flags that say whose the pages are.
    unsafe {
        let prefix = prefix(bio);
        (*prefix).flags &= !NOWAIT;
        let (vectors, flags) = ((*raw).bi_vcnt, (*raw).bi_flags);
        raw::bio_reset(raw, device.as_raw(), (*prefix).flags);
        (*raw).bi_vcnt = vectors;
        (*raw).bi_flags |= flags & (1 << raw::BIO_PAGE_PINNED);
        (*raw).bi_iter.bi_sector = (*prefix).sector;
        for index in 0..usize::from(vectors) {
            (*raw).bi_iter.bi_size += (*(*raw).bi_io_vec.add(index)).bv_len;
        }
    }
}

/// Bios that another task submits.
#[derive(Copy, Clone)]
struct Pending(NonNull<PendingBios>);

// SAFETY: `PendingBios` is `Sync`.
unsafe impl Send for Pending {}

impl Pending {
    /// # Safety
    ///
    /// As for [`PendingBios::submit`].
    unsafe fn submit(self) {
        // SAFETY: The caller promises what `submit()` asks for, and that the object is there until the last
        // bio is done: `submit()` submits it.
        unsafe { self.0.as_ref().submit() };
    }

    /// Has the filesystem of `file` do what the bios say.
    ///
    /// # Safety
    ///
    /// As for [`PendingBios::submit`]; and the bios must be on the image in `file`.
    unsafe fn submit_to(self, file: &File) {
        // SAFETY: The caller promises it; the bios' backend, which is the image, keeps the file open until the last
        // of them is done. Each bio is complete, and `end_io()` takes it back.
        unsafe { self.0.as_ref().start(|bio| image::submit(file, bio)) };
    }
}

/// Called by the block layer when it is done with a bio. Context: any, interrupts included.
///
/// # Safety
///
/// Only for bios submitted by [`PendingBios::submit`].
unsafe extern "C" fn end_io(bio: *mut raw::bio) {
    // SAFETY: `submit()` set `bi_private` to a `PendingBios` that lives until all its bios are done,
    // and this one was not before.
    let (pending, status) =
        unsafe { (&*(*bio).bi_private.cast::<PendingBios>(), (*bio).bi_status) };

    if status != 0 {
        // SAFETY: The bio was submitted with its prefix, which nobody changes while it is in flight.
        let flags = unsafe { (*prefix(NonNull::new_unchecked(bio))).flags };
        pending.bio_failed(status, flags & NOWAIT != 0);
    }
    // Full ordering: the last one sees the errors of the others, and so does the worker.
    if pending.pending.fetch_sub(1, ordering::Full) == 1 {
        pending.complete();
    }
}
