// SPDX-License-Identifier: GPL-2.0

//! The guest's memory, and an allocator for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};

use crate::error::{Error, Result};
use crate::sys;

/// Size of a page of guest memory, bytes.
pub const PAGE_SIZE: usize = 4096;

/// What the host may do with pages of guest memory ([`Memory::protect`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing: the kernel cannot pin or access them.
    None,
    /// Read them.
    Read,
    /// Read and write them, as they are at first.
    ReadWrite,
}

/// The guest's memory: mappings of this process, one per region, anonymous or
/// of a file that can be [`shared`](Memory::shared).
///
/// A clone is another handle to the same memory.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    map: Arc<GuestMemoryMmap>,
    /// Free pieces: first byte, and length in bytes.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl Memory {
    /// Maps one region of `len` bytes at guest address 0.
    ///
    /// # Errors
    ///
    /// [`Error::Map`], if it cannot be had.
    pub fn new(len: usize) -> Result<Self> {
        Self::with_regions(&[(GuestAddress(0), len)])
    }

    /// Maps regions given by first address and length in bytes. They may leave
    /// holes between them, and have to be in order.
    ///
    /// # Errors
    ///
    /// [`Error::Map`], if they overlap or cannot be had.
    pub fn with_regions(regions: &[(GuestAddress, usize)]) -> Result<Self> {
        GuestMemoryMmap::from_ranges(regions)
            .map(Self::with_map)
            .map_err(|e| Error::Map(e.to_string()))
    }

    fn with_map(map: GuestMemoryMmap) -> Self {
        let free = map
            .iter()
            .map(|region| (region.start_addr().raw_value(), region.len()))
            .collect();
        Memory(Arc::new(Inner {
            map: Arc::new(map),
            free: Mutex::new(free),
        }))
    }

    /// Maps one region of `len` bytes at guest address 0 that other processes can
    /// map too, as a vhost-user server does.
    ///
    /// # Errors
    ///
    /// [`Error::Map`], if it cannot be had.
    pub fn shared(len: usize) -> Result<Self> {
        let file = memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)
            .map(File::from)
            .map_err(|e| Error::Map(e.to_string()))?;
        file.set_len(len as u64)
            .map_err(|e| Error::Map(e.to_string()))?;
        Self::with_files(vec![(GuestAddress(0), len, Some(file))])
    }

    /// As [`with_regions`](Self::with_regions); regions with a file are shared mappings of it, from
    /// its start on. The file has to be as long.
    ///
    /// # Errors
    ///
    /// [`Error::Map`], if they overlap or cannot be had.
    pub fn with_files(regions: Vec<(GuestAddress, usize, Option<File>)>) -> Result<Self> {
        let regions = regions
            .into_iter()
            .map(|(addr, len, file)| (addr, len, file.map(|file| FileOffset::new(file, 0))));
        GuestMemoryMmap::from_ranges_with_files(regions)
            .map(Self::with_map)
            .map_err(|e| Error::Map(e.to_string()))
    }

    /// rust-vmm's view of it.
    pub fn map(&self) -> &Arc<GuestMemoryMmap> {
        &self.0.map
    }

    /// The regions as `VHOST_SET_MEM_TABLE` wants them, with the file of those
    /// that can be shared.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.0
            .map
            .iter()
            .map(|region| {
                let file = region.file_offset();
                VhostUserMemoryRegionInfo {
                    guest_phys_addr: region.start_addr().raw_value(),
                    memory_size: region.len(),
                    userspace_addr: region.as_ptr().addr() as u64,
                    mmap_offset: file.map_or(0, FileOffset::start),
                    mmap_handle: file.map_or(-1, |file| file.file().as_raw_fd()),
                }
            })
            .collect()
    }

    /// The address in this process of a guest address.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if nothing is mapped there.
    pub fn host_address(&self, addr: GuestAddress) -> Result<u64> {
        self.0
            .map
            .get_host_address(addr)
            .map(|pointer| pointer.addr() as u64)
            .map_err(Error::access(addr, 1))
    }

    /// Takes `len` bytes at a multiple of `align` bytes, within one region.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`], if no free piece is large enough.
    ///
    /// # Panics
    ///
    /// If `align` is not a power of two.
    pub fn alloc(&self, len: usize, align: usize) -> Result<Buffer> {
        assert!(align.is_power_of_two(), "alignment of {align}");
        // No two buffers at one address, even if they are empty.
        let size = len.max(1) as u64;
        let mut free = self.free();
        let fit = free.iter().find_map(|(&start, &room)| {
            let addr = start.checked_next_multiple_of(align as u64)?;
            let end = addr.checked_add(size)?;
            (end <= start + room).then_some((start, room, addr, end))
        });
        let Some((start, room, addr, end)) = fit else {
            return Err(Error::OutOfMemory { len, align });
        };
        free.remove(&start);
        if addr > start {
            free.insert(start, addr - start);
        }
        if start + room > end {
            free.insert(end, start + room - end);
        }
        drop(free);
        Ok(Buffer {
            memory: self.clone(),
            addr: GuestAddress(addr),
            len,
        })
    }

    /// Takes the `len` bytes at `addr`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if there are none, or not all of them are free, in one region.
    pub fn alloc_at(&self, addr: GuestAddress, len: usize) -> Result<Buffer> {
        let taken = || Error::Invalid(format!("{len} bytes at {:#x}: not free", addr.0));
        let end = addr.0.checked_add(len as u64).ok_or_else(taken)?;
        let mut free = self.free();
        let (start, room) = free
            .range(..=addr.0)
            .next_back()
            .map(|(&start, &room)| (start, room))
            .filter(|(start, room)| len > 0 && end <= start + room)
            .ok_or_else(taken)?;
        free.remove(&start);
        if addr.0 > start {
            free.insert(start, addr.0 - start);
        }
        if start + room > end {
            free.insert(end, start + room - end);
        }
        drop(free);
        Ok(Buffer {
            memory: self.clone(),
            addr,
            len,
        })
    }

    /// Bytes that no buffer has.
    pub fn available(&self) -> u64 {
        self.free().values().sum()
    }

    /// Copies from guest memory to `bytes`.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if not all of it is mapped.
    pub fn read(&self, addr: GuestAddress, bytes: &mut [u8]) -> Result<()> {
        self.0
            .map
            .read_slice(bytes, addr)
            .map_err(Error::access(addr, bytes.len()))
    }

    /// Copies `bytes` to guest memory.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], if not all of it is mapped.
    pub fn write(&self, addr: GuestAddress, bytes: &[u8]) -> Result<()> {
        self.0
            .map
            .write_slice(bytes, addr)
            .map_err(Error::access(addr, bytes.len()))
    }

    /// Changes what the host may do with `len` bytes of whole pages at `addr`.
    ///
    /// An access of this process, by [`read`](Self::read) and the like, to pages
    /// that do not allow it kills it with `SIGSEGV`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if these are not whole pages; [`Error::Access`], if
    /// they are not mapped, in one region; [`Error::System`].
    pub fn protect(&self, addr: GuestAddress, len: usize, protection: Protection) -> Result<()> {
        sys::protect(&self.0.map, addr, len, protection)
    }

    /// Asks the host for huge pages to make the memory of, as QEMU does, or for small ones. It has a say only
    /// for what was not touched before, and huge ones come only where they fit, at a multiple of their size.
    ///
    /// # Errors
    ///
    /// [`Error::System`], if the host's kernel knows nothing of them.
    pub fn advise_huge_pages(&self, huge: bool) -> Result<()> {
        sys::advise_huge_pages(&self.0.map, huge)
    }

    /// Puts other pages, of zeroes, where `len` bytes of whole pages at `addr` are, in a region that
    /// has a file: whoever has pinned the old ones keeps them, and sees the new ones no more.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if there is no file or these are not whole pages of one region;
    /// [`Error::System`].
    pub fn replace_pages(&self, addr: GuestAddress, len: usize) -> Result<()> {
        let invalid = || Error::Invalid(format!("pages to replace: {:#x}, {len} bytes", addr.0));
        let region = self.0.map.find_region(addr).ok_or_else(invalid)?;
        let file = region.file_offset().ok_or_else(invalid)?;
        let offset = addr.0 - region.start_addr().raw_value();
        let page = PAGE_SIZE as u64;
        if offset % page != 0 || len % PAGE_SIZE != 0 || offset + len as u64 > region.len() {
            return Err(invalid());
        }
        let [offset, len] = [file.start() + offset, len as u64].map(i64::try_from);
        fallocate(
            file.file(),
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            offset.map_err(|_| invalid())?,
            len.map_err(|_| invalid())?,
        )
        .map_err(|e| Error::system("fallocate of guest memory")(e.into()))
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        // The map is consistent whenever the lock is let go.
        self.0.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of guest memory, given back when it is dropped.
///
/// Who drops it says that the device does not access it any more.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    addr: GuestAddress,
    len: usize,
}

impl Buffer {
    /// Its first byte.
    pub fn addr(&self) -> GuestAddress {
        self.addr
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The memory that it is a piece of.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The guest address of its byte number `offset`.
    ///
    /// # Panics
    ///
    /// If that is beyond its end.
    pub fn at(&self, offset: usize) -> GuestAddress {
        assert!(offset <= self.len, "offset {offset} of {}", self.len);
        self.addr.unchecked_add(offset as u64)
    }

    /// Copies `len` bytes from its byte number `offset` on.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if that is beyond its end.
    pub fn read(&self, offset: usize, len: usize) -> Result<Vec<u8>> {
        self.check(offset, len)?;
        let mut bytes = vec![0; len];
        self.memory.read(self.at(offset), &mut bytes)?;
        Ok(bytes)
    }

    /// Copies `bytes` to its byte number `offset` and on.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], if that is beyond its end.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes.len())?;
        self.memory.write(self.at(offset), bytes)
    }

    /// Sets all its bytes to `byte`.
    ///
    /// # Errors
    ///
    /// [`Error::Access`], which cannot happen while its memory is mapped.
    pub fn fill(&self, byte: u8) -> Result<()> {
        self.memory.write(self.addr, &vec![byte; self.len])
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Error::Invalid(format!(
                "{len} bytes at {offset} of a buffer of {}",
                self.len
            ))),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut start = self.addr.0;
        let mut len = self.len.max(1) as u64;
        let mut free = self.memory.free();
        if let Some(next) = free.remove(&(start + len)) {
            // Regions that touch are separate mappings: their free pieces are
            // not joined across the border.
            if self.memory.same_region(start, start + len) {
                len += next;
            } else {
                free.insert(start + len, next);
            }
        }
        let before = free.range(..start).next_back().map(|(&a, &l)| (a, l));
        if let Some((addr, room)) = before {
            if addr + room == start && self.memory.same_region(addr, start) {
                start = addr;
                len += room;
            }
        }
        free.insert(start, len);
    }
}

impl Memory {
    fn same_region(&self, a: u64, b: u64) -> bool {
        let start = |addr| {
            self.0
                .map
                .find_region(GuestAddress(addr))
                .map(GuestMemoryRegion::start_addr)
        };
        start(a) == start(b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_apart() {
        let memory = Memory::new(1 << 20).expect("1 MiB");
        let mut buffers: Vec<Buffer> = Vec::new();
        for (len, align) in [(1, 1), (100, 512), (4096, 4096), (0, 1), (3, 2)] {
            let buffer = memory.alloc(len, align).expect("room");
            assert_eq!(buffer.addr().0 % align as u64, 0);
            for other in &buffers {
                assert!(
                    buffer.at(0).0 >= other.at(other.len()).0 || other.at(0).0 >= buffer.at(len).0
                );
                assert_ne!(buffer.addr(), other.addr());
            }
            buffers.push(buffer);
        }
    }

    #[test]
    fn freed_memory_comes_back_in_one_piece() {
        let memory = Memory::new(64 << 10).expect("64 KiB");
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]] {
            let mut buffers: Vec<_> = (0..3)
                .map(|_| Some(memory.alloc(20 << 10, 1).expect("room")))
                .collect();
            assert!(matches!(
                memory.alloc(20 << 10, 1),
                Err(Error::OutOfMemory { .. })
            ));
            for index in order {
                buffers[index] = None;
            }
            assert_eq!(memory.available(), 64 << 10);
            drop(memory.alloc(64 << 10, 1).expect("all of it"));
        }
    }

    #[test]
    fn no_buffer_crosses_regions() {
        let regions = [
            (GuestAddress(0), PAGE_SIZE),
            (GuestAddress(PAGE_SIZE as u64), PAGE_SIZE),
            (GuestAddress(1 << 32), 2 * PAGE_SIZE),
        ];
        let memory = Memory::with_regions(&regions).expect("regions");
        assert_eq!(memory.regions().len(), 3);
        let first = memory.alloc(PAGE_SIZE, 1).expect("region 0");
        let second = memory.alloc(PAGE_SIZE, 1).expect("region 1");
        let third = memory.alloc(2 * PAGE_SIZE, 1).expect("region 2");
        assert_eq!(third.addr(), GuestAddress(1 << 32));
        drop((first, second, third));
        let third = memory.alloc(PAGE_SIZE + 1, 1).expect("region 2 again");
        assert_eq!(third.addr(), GuestAddress(1 << 32));
    }

    #[test]
    fn shared_memory_is_seen_by_others() {
        let memory = Memory::shared(2 * PAGE_SIZE).expect("2 pages");
        let buffer = memory.alloc(PAGE_SIZE, PAGE_SIZE).expect("a page");
        buffer.fill(7).expect("in range");
        let regions = memory.regions();
        assert_eq!((regions.len(), regions[0].mmap_offset), (1, 0));
        // As who gets the file descriptor sees it.
        let path = format!("/proc/self/fd/{}", regions[0].mmap_handle);
        let seen = std::fs::read(path).expect("a file");
        assert_eq!(seen.len(), 2 * PAGE_SIZE);
        assert_eq!((seen[0], seen[PAGE_SIZE]), (7, 0));
        let private = Memory::new(PAGE_SIZE).expect("a page");
        assert_eq!(private.regions()[0].mmap_handle, -1);
    }

    #[test]
    fn buffers_can_be_where_one_wants_them() {
        let regions = [
            (GuestAddress(0), PAGE_SIZE),
            (GuestAddress(PAGE_SIZE as u64), PAGE_SIZE),
        ];
        let memory = Memory::with_regions(&regions).expect("regions");
        let end = GuestAddress(2 * PAGE_SIZE as u64 - 12);
        let last = memory.alloc_at(end, 12).expect("the last bytes");
        assert_eq!(last.at(last.len()).0, 2 * PAGE_SIZE as u64);
        assert!(memory.alloc_at(end, 12).is_err(), "taken");
        assert!(memory.alloc_at(GuestAddress(4090), 12).is_err(), "regions");
        assert!(memory.alloc_at(GuestAddress(0), 0).is_err(), "nothing");
        assert!(memory.alloc_at(GuestAddress(1 << 20), 1).is_err(), "a hole");
        let middle = memory.alloc_at(GuestAddress(64), 64).expect("a piece");
        assert_eq!(memory.available(), 2 * PAGE_SIZE as u64 - 12 - 64);
        drop((last, middle));
        assert_eq!(memory.available(), 2 * PAGE_SIZE as u64);
    }

    #[test]
    fn pages_are_replaced() {
        let memory = Memory::shared(3 * PAGE_SIZE).expect("3 pages");
        let all = memory.alloc(3 * PAGE_SIZE, PAGE_SIZE).expect("all");
        all.fill(7).expect("in range");
        memory
            .replace_pages(all.at(PAGE_SIZE), PAGE_SIZE)
            .expect("a page");
        let ends = |page: usize| all.read(page * PAGE_SIZE, PAGE_SIZE).expect("in range");
        assert_eq!(
            [ends(0)[4095], ends(1)[0], ends(1)[4095], ends(2)[0]],
            [7, 0, 0, 7]
        );
        assert!(memory.replace_pages(all.at(1), PAGE_SIZE).is_err());
        assert!(memory.replace_pages(all.at(0), 4 * PAGE_SIZE).is_err());
        let private = Memory::new(PAGE_SIZE).expect("a page");
        assert!(private.replace_pages(GuestAddress(0), PAGE_SIZE).is_err());
    }

    #[test]
    fn bytes_go_in_and_out() {
        let memory = Memory::new(PAGE_SIZE).expect("a page");
        let buffer = memory.alloc(8, 8).expect("8 bytes");
        buffer.fill(7).expect("in range");
        buffer.write(2, &[1, 2]).expect("in range");
        assert_eq!(
            buffer.read(0, 8).expect("in range"),
            [7, 7, 1, 2, 7, 7, 7, 7]
        );
        assert!(buffer.read(1, 8).is_err());
        assert!(buffer.write(usize::MAX, &[0]).is_err());
        assert!(memory.write(GuestAddress(4095), &[0, 0]).is_err());
    }

    #[test]
    fn protection_is_of_whole_mapped_pages() {
        let memory = Memory::new(4 * PAGE_SIZE).expect("4 pages");
        let page = GuestAddress(PAGE_SIZE as u64);
        assert!(memory.protect(page, PAGE_SIZE, Protection::None).is_ok());
        let maps = std::fs::read_to_string("/proc/self/maps").expect("own maps");
        let host = memory.host_address(page).expect("mapped");
        let line = maps.lines().find(|l| l.starts_with(&format!("{host:x}-")));
        assert!(line.is_some_and(|l| l.contains("---p")), "{line:?}");
        assert!(
            memory
                .protect(page, PAGE_SIZE, Protection::ReadWrite)
                .is_ok()
        );
        memory.write(page, &[1]).expect("writable again");
        assert!(
            memory
                .protect(GuestAddress(1), PAGE_SIZE, Protection::None)
                .is_err()
        );
        assert!(memory.protect(page, 1, Protection::None).is_err());
        assert!(
            memory
                .protect(page, 4 * PAGE_SIZE, Protection::None)
                .is_err()
        );
    }
}
