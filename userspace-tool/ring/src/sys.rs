// SPDX-License-Identifier: GPL-2.0

//! System calls that no crate has a safe function for: all unsafe code of the
//! workspace.

use std::ffi::{c_int, c_uint, c_ulong};
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};
use vhost::vhost_kern::vhost_binding::{vhost_vring_addr, vhost_vring_file, vhost_vring_state};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{
    _IOC_DIRMASK, _IOC_DIRSHIFT, _IOC_SIZEMASK, _IOC_SIZESHIFT, _IOC_WRITE, ioctl_with_mut_ptr,
    ioctl_with_mut_ref, ioctl_with_ref,
};

use crate::device::RawArg;
use crate::driver::Op;
use crate::error::{Error, Result};
use crate::memory::{PAGE_SIZE, Protection};
use crate::request::Zone;
use crate::uapi::{Info, VHOST_BLK_GET_INFO, VHOST_BLK_SERIAL_LEN, VringWorker, WorkerState};

/// Arguments of ioctls that the kernel may fill with any bytes.
///
/// # Safety
///
/// Every bit pattern is a value of the type, it has no padding, and no ioctl of
/// a vhost device that takes it accesses more than its size.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: An integer; the kernel copies one byte from or to the user's memory.
unsafe impl Plain for u8 {}
// SAFETY: An integer; the kernel copies four bytes from the user's memory.
unsafe impl Plain for u32 {}
// SAFETY: An array of integers of the length that the header gives.
unsafe impl Plain for [u8; VHOST_BLK_SERIAL_LEN] {}
// SAFETY: repr(C), one u32, copied as a whole by the kernel.
unsafe impl Plain for WorkerState {}
// SAFETY: repr(C), two u32, copied as a whole by the kernel.
unsafe impl Plain for VringWorker {}
// SAFETY: repr(C), two 32-bit integers, copied as a whole by the kernel.
unsafe impl Plain for vhost_vring_state {}
// SAFETY: repr(C), two 32-bit integers, copied as a whole by the kernel.
unsafe impl Plain for vhost_vring_file {}
// SAFETY: repr(C), two u32 and then four u64, copied as a whole by the kernel.
unsafe impl Plain for vhost_vring_addr {}

/// Issues an ioctl of a vhost device whose argument the kernel only reads.
///
/// # Panics
///
/// If `request` is not encoded so, with the size of `T`.
pub(crate) fn write<T: Plain>(fd: &File, request: c_ulong, arg: &T) -> io::Result<()> {
    assert_eq!(encoded_size(request), size_of::<T>());
    assert_eq!(encoded_direction(request), _IOC_WRITE);
    // SAFETY: `arg` is valid for reads of the size that is encoded in the
    // request, and `Plain` promises that no more is accessed. The assertion on
    // the direction rules out those that write back to `arg`, but for one:
    // VHOST_GET_VRING_BUSYLOOP_TIMEOUT, which no caller passes here.
    result(unsafe { ioctl_with_ref(fd, request, arg) }).map(drop)
}

/// Issues an ioctl of a vhost device whose argument the kernel may read and
/// write.
///
/// # Panics
///
/// If `request` is not encoded with the size of `T`.
pub(crate) fn exchange<T: Plain>(fd: &File, request: c_ulong, arg: &mut T) -> io::Result<()> {
    assert_eq!(encoded_size(request), size_of::<T>());
    // SAFETY: `arg` is valid for reads and writes of the size that is encoded
    // in the request. `Plain` promises that no more is accessed, and that
    // whatever is written is a value of `T`.
    result(unsafe { ioctl_with_mut_ref(fd, request, arg) }).map(drop)
}

/// Issues `VHOST_BLK_GET_INFO` for the block device `of`, or -1.
pub(crate) fn get_info(fd: &File, of: c_int) -> io::Result<Info> {
    let mut info = Info {
        argsz: c_uint::try_from(size_of::<Info>()).expect("the size fits the encoding"),
        fd: of,
        ..Info::default()
    };
    // SAFETY: `info` is valid for reads and writes of `argsz` bytes, and the
    // kernel accesses no more than that. All its members are integers.
    result(unsafe { ioctl_with_mut_ref(fd, VHOST_BLK_GET_INFO, &mut info) })?;
    Ok(info)
}

/// Most zones that [`report_zones`] asks for.
const MAX_ZONES: c_uint = 256;

/// `struct blk_zone_report` of `<linux/blkzoned.h>`, with room for zones.
#[repr(C)]
struct ZoneReport {
    sector: u64,
    nr_zones: u32,
    flags: u32,
    /// `struct blk_zone`, 64 bytes each.
    zones: [[u64; 8]; MAX_ZONES as usize],
}

/// Asks a zoned disk of the host for up to 256 zones, from that of `sector` on.
///
/// # Errors
///
/// Those of `BLKREPORTZONE`.
pub fn report_zones(disk: &File, sector: u64) -> io::Result<Vec<Zone>> {
    /// `_IOWR(0x12, 130, struct blk_zone_report)`, which is 16 bytes without the zones.
    const BLKREPORTZONE: c_ulong = 0xc010_1282;

    let mut report = Box::new(ZoneReport {
        sector,
        nr_zones: MAX_ZONES,
        flags: 0,
        zones: [[0; 8]; MAX_ZONES as usize],
    });
    // SAFETY: The kernel reads and writes the 16 bytes of the header, and up to `nr_zones` zones of 64 bytes
    // behind it, for which there is room. All members are integers.
    result(unsafe { ioctl_with_mut_ref(disk, BLKREPORTZONE, &mut *report) })?;
    let zones = report.zones.iter().take(report.nr_zones as usize);
    Ok(zones
        .map(|zone| {
            let [kind, state, ..] = zone[3].to_ne_bytes();
            // The capacity is there if the flag says so, as it does since Linux 5.9.
            let capacity = if report.flags & 1 != 0 {
                zone[4]
            } else {
                zone[1]
            };
            Zone {
                start: zone[0],
                capacity,
                write_pointer: zone[2],
                kind,
                state,
            }
        })
        .collect())
}

/// Size of the memory that an argument of [`raw`] stands in, bytes. No ioctl of
/// a character device accesses more: the encoding has 14 bits for the size; a
/// memory table has at most 65535 regions (the type of the vhost module's
/// parameter) of 32 bytes each, behind 8 bytes; and `VHOST_BLK_GET_INFO` writes
/// no more than the kernel's own structure, which is far below a page.
const RAW_BYTES: usize = 1 << 22;

/// Issues an ioctl with any number and any bytes as its argument.
pub(crate) fn raw(fd: &File, request: u32, arg: RawArg<'_>) -> io::Result<c_int> {
    let request = c_ulong::from(request);
    match arg {
        RawArg::Bytes(bytes) => {
            if bytes.len() > RAW_BYTES {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let mut memory = vec![0u8; RAW_BYTES];
            memory[..bytes.len()].copy_from_slice(bytes);
            // SAFETY: `memory` is valid for reads and writes of RAW_BYTES bytes,
            // which is more than any ioctl accesses (see there), and all bytes
            // are values of its elements.
            let ret = result(unsafe { ioctl_with_mut_ptr(fd, request, memory.as_mut_ptr()) });
            bytes.copy_from_slice(&memory[..bytes.len()]);
            ret
        }
        RawArg::Null => bad_pointer(fd, request, 0),
        RawArg::Kernel => bad_pointer(fd, request, c_ulong::MAX << 47),
    }
}

/// Issues an ioctl with an address that user space cannot have mapped.
fn bad_pointer(fd: &File, request: c_ulong, address: c_ulong) -> io::Result<c_int> {
    assert!(address == 0 || address >= c_ulong::MAX << 47);
    let pointer = std::ptr::without_provenance_mut::<u8>(
        usize::try_from(address).expect("an address fits usize"),
    );
    // SAFETY: The kernel checks every access through the pointer, and it faults:
    // nothing can be mapped at page 0 (mmap_min_addr) or in the kernel's half of
    // the address space. So no memory of this process is read or written.
    result(unsafe { ioctl_with_mut_ptr(fd, request, pointer) })
}

/// Makes reads of an eventfd block, whoever else has it.
pub(crate) fn set_blocking(event: &EventFd) -> io::Result<()> {
    // SAFETY: The file descriptor is open while `event` is borrowed. F_SETFL
    // takes a number and accesses no memory. Of the flags that it can change, an
    // eventfd has O_NONBLOCK only.
    result(unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) }).map(drop)
}

/// An io_uring for requests that have their data in pieces of memory.
pub(crate) struct DataRing {
    ring: IoUring,
    /// The pieces, by number: addresses of this process, each of `len` bytes that
    /// `memory` has mapped.
    pieces: Vec<u64>,
    /// Bytes of each.
    len: u32,
    /// Whether all of the memory is registered buffer 0: then the kernel uses its
    /// pages, and else the addresses.
    registered: bool,
    /// Where the pieces are.
    memory: ManuallyDrop<Arc<GuestMemoryMmap>>,
    /// Requests that were added and not submitted.
    added: usize,
    /// Requests that were submitted and not taken: those that the kernel may work on.
    in_flight: usize,
}

impl DataRing {
    /// Makes requests on `ring` for the pieces of memory, of `len` bytes each. With
    /// `register`, all `register.1` bytes at `register.0` are registered before:
    /// then each piece has to be in there.
    pub(crate) fn new(
        ring: IoUring,
        memory: &Arc<GuestMemoryMmap>,
        pieces: impl Iterator<Item = GuestAddress>,
        len: u32,
        register: Option<(GuestAddress, usize)>,
    ) -> Result<Self> {
        let address = |addr, len| {
            let slice = memory
                .get_slice(addr, len)
                .map_err(Error::access(addr, len))?;
            Ok(slice.ptr_guard_mut().as_ptr())
        };
        let pieces = pieces
            .map(|addr| Ok(address(addr, len as usize)?.addr() as u64))
            .collect::<Result<_>>()?;
        if let Some((addr, len)) = register {
            let buffer = libc::iovec {
                iov_base: address(addr, len)?.cast(),
                iov_len: len,
            };
            // SAFETY: The memory is mapped while `memory` is borrowed, and so during
            // the call, in which the kernel pins its pages. From then on it accesses
            // these pages and not the addresses: if the mapping goes before the ring,
            // nothing else comes to be where the kernel writes. What is in them is
            // accessed by vm-memory in its volatile way only; there are no Rust
            // references to it.
            unsafe { ring.submitter().register_buffers(&[buffer]) }
                .map_err(Error::system("io_uring: cannot register the buffers"))?;
        }
        Ok(DataRing {
            ring,
            pieces,
            len,
            registered: register.is_some(),
            memory: ManuallyDrop::new(Arc::clone(memory)),
            added: 0,
            in_flight: 0,
        })
    }

    /// Whether the memory is registered.
    #[cfg(test)]
    pub(crate) fn is_registered(&self) -> bool {
        self.registered
    }

    /// Adds a request of file 0, for the data in a piece. Returns whether there was
    /// room.
    ///
    /// # Panics
    ///
    /// If there is no such piece.
    #[inline]
    pub(crate) fn push(&mut self, op: Op, offset: u64, piece: u16) -> bool {
        const FILE: types::Fixed = types::Fixed(0);
        let addr = self.pieces[usize::from(piece)];
        let pointer = std::ptr::without_provenance_mut::<u8>(
            usize::try_from(addr).expect("an address fits usize"),
        );
        let (len, registered) = (self.len, self.registered);
        let entry = match op {
            Op::In if registered => opcode::ReadFixed::new(FILE, pointer, len, 0)
                .offset(offset)
                .build(),
            Op::In => opcode::Read::new(FILE, pointer, len).offset(offset).build(),
            Op::Out if registered => opcode::WriteFixed::new(FILE, pointer, len, 0)
                .offset(offset)
                .build(),
            Op::Out => opcode::Write::new(FILE, pointer, len)
                .offset(offset)
                .build(),
            Op::Flush => opcode::Fsync::new(FILE)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
        };
        // SAFETY: The entry points to no memory of this process but its data, which
        // is the whole of a piece. Of a registered buffer the kernel takes the pages:
        // `new` says why they may be accessed at any time. Otherwise it takes the
        // addresses, which stay mapped: `memory` is given up only when no request is
        // in flight. What is there is accessed by vm-memory in its volatile way only.
        let added = unsafe {
            self.ring
                .submission()
                .push(&entry.user_data(piece.into()))
                .is_ok()
        };
        self.added += usize::from(added);
        added
    }

    /// Requests that were added and not yet submitted.
    pub(crate) fn added(&self) -> usize {
        self.added
    }

    /// Submits what was added, and waits until `want` requests are complete.
    #[inline]
    pub(crate) fn submit_and_wait(&mut self, want: usize) -> io::Result<()> {
        let submitted = self.ring.submit_and_wait(want)?;
        self.added -= submitted;
        self.in_flight += submitted;
        Ok(())
    }

    /// Takes the next completion that is there: the piece, and what the system call
    /// would have returned.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<(u16, i32)> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        // It is what `push` gave.
        let piece = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
        Some((piece, entry.result()))
    }
}

impl Drop for DataRing {
    fn drop(&mut self) {
        /// Of `<linux/io_uring.h>`.
        const IORING_ENTER_GETEVENTS: u32 = 1 << 0;

        if !self.registered {
            while self.in_flight > 0 {
                // SAFETY: No argument is passed, and nothing submitted: what was only added is not done.
                let waited = unsafe {
                    self.ring
                        .submitter()
                        .enter::<()>(0, 1, IORING_ENTER_GETEVENTS, None)
                };
                match waited {
                    // The memory stays mapped for ever.
                    Err(e) if e.kind() != io::ErrorKind::Interrupted => return,
                    _ => while self.take().is_some() {},
                }
            }
        }
        // SAFETY: It is not used again. The ring is closed after this: the kernel has
        // the pages of what it may still work on, or works on nothing.
        unsafe { ManuallyDrop::drop(&mut self.memory) };
    }
}

/// Another descriptor of an eventfd.
///
/// # Errors
///
/// Those of `dup()`.
pub fn event_descriptor(event: &EventFd) -> io::Result<OwnedFd> {
    let descriptor = event.try_clone()?.into_raw_fd();
    // SAFETY: It is open, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Adds 1 to an eventfd, and closes a descriptor, in one system call of one task.
///
/// They are not linked: then the second one would be made in a callback of the task's.
///
/// # Errors
///
/// Those of io_uring, of `write()` and of `close()`.
pub fn write_and_close(event: &EventFd, file: OwnedFd) -> io::Result<()> {
    const ONE: u64 = 1;
    let mut ring = IoUring::new(2)?;
    let event = types::Fd(event.as_raw_fd());
    let len = u32::try_from(size_of_val(&ONE)).expect("a few bytes");
    let write = opcode::Write::new(event, std::ptr::from_ref(&ONE).cast(), len).build();
    // From here on it is the kernel's to close.
    let close = opcode::Close::new(types::Fd(file.into_raw_fd())).build();
    // SAFETY: The data that is written is a constant; the other entry has none.
    unsafe { ring.submission().push_multiple(&[write, close]) }.map_err(io::Error::other)?;
    ring.submit_and_wait(2)?;
    for done in ring.completion() {
        if done.result() < 0 {
            return Err(io::Error::from_raw_os_error(-done.result()));
        }
    }
    Ok(())
}

/// Changes what may be done with pages of the guest's memory.
pub(crate) fn protect(
    memory: &GuestMemoryMmap,
    addr: GuestAddress,
    len: usize,
    protection: Protection,
) -> Result<()> {
    if addr.0 % PAGE_SIZE as u64 != 0 || len % PAGE_SIZE != 0 {
        return Err(Error::Invalid(format!(
            "pages to protect: {:#x}, {len} bytes",
            addr.0
        )));
    }
    let slice = memory
        .get_slice(addr, len)
        .map_err(Error::access(addr, len))?;
    let flags = match protection {
        Protection::None => libc::PROT_NONE,
        Protection::Read => libc::PROT_READ,
        Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: `slice` is a range within one mapping of `memory`, which cannot go
    // while `memory` is borrowed. It starts at a page, as the mapping does and
    // as its offset does (checked above), and is whole pages. There is no Rust
    // reference to what it holds, since vm-memory gives volatile access only:
    // the worst that an access can do from now on is to fault.
    let ret = unsafe { libc::mprotect(slice.ptr_guard_mut().as_ptr().cast(), len, flags) };
    result(ret)
        .map(drop)
        .map_err(Error::system("mprotect of guest memory"))
}

/// Says whether all of the guest's memory is to be made of huge pages.
pub(crate) fn advise_huge_pages(memory: &GuestMemoryMmap, huge: bool) -> Result<()> {
    let advice = if huge {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    for region in memory.iter() {
        let len = usize::try_from(region.len()).expect("a mapping fits usize");
        // SAFETY: The region is a mapping of `memory`, which cannot go while that is borrowed. The advice
        // changes what pages it is made of, not what they hold.
        let ret = unsafe { libc::madvise(region.as_ptr().cast(), len, advice) };
        result(ret).map_err(Error::system("madvise of guest memory"))?;
    }
    Ok(())
}

fn result(ret: c_int) -> io::Result<c_int> {
    if ret < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(ret)
    }
}

fn encoded_size(request: c_ulong) -> usize {
    usize::try_from(request >> _IOC_SIZESHIFT).expect("a request fits usize")
        & _IOC_SIZEMASK as usize
}

fn encoded_direction(request: c_ulong) -> c_uint {
    c_uint::try_from(request >> _IOC_DIRSHIFT).expect("a request has 32 bits") & _IOC_DIRMASK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uapi;

    #[test]
    fn requests_are_taken_apart() {
        assert_eq!(encoded_size(uapi::VHOST_BLK_GET_INFO), size_of::<Info>());
        assert_eq!(encoded_direction(uapi::VHOST_BLK_GET_INFO), 3);
        assert_eq!(encoded_size(uapi::VHOST_SET_FORK_FROM_OWNER), 1);
        assert_eq!(
            encoded_direction(uapi::VHOST_SET_FORK_FROM_OWNER),
            _IOC_WRITE
        );
    }

    #[test]
    fn eventfds_can_be_made_to_block() {
        let event = EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let clone = event.try_clone().expect("eventfd");
        assert!(event.read().is_err());
        set_blocking(&event).expect("fcntl");
        let reader = std::thread::spawn(move || clone.read().expect("a number"));
        std::thread::sleep(std::time::Duration::from_millis(20));
        event.write(3).expect("eventfd");
        assert_eq!(reader.join().expect("it ends"), 3);
    }

    #[test]
    fn raw_ioctl_of_a_file_that_has_none() {
        let file = File::open("/dev/null").expect("/dev/null opens");
        for arg in [RawArg::Null, RawArg::Kernel, RawArg::Bytes(&mut [0; 8])] {
            let errno = raw(&file, 0x4008_afff, arg).map_err(|e| e.raw_os_error());
            assert_eq!(errno, Err(Some(libc::ENOTTY)));
        }
    }

    #[test]
    fn bad_pointer_is_a_fault() {
        // FIONREAD writes an int.
        let (reader, _writer) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
        let file = File::from(std::os::fd::OwnedFd::from(reader));
        for arg in [RawArg::Null, RawArg::Kernel] {
            let errno = raw(&file, 0x541b, arg).map_err(|e| e.raw_os_error());
            assert_eq!(errno, Err(Some(libc::EFAULT)));
        }
    }
}
