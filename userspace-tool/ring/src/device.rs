// SPDX-License-Identifier: GPL-2.0

//! The open device node and its ioctls.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    self as binding, vhost_vring_addr, vhost_vring_file, vhost_vring_state,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::GuestMemoryMmap;

use crate::error::{Error, Result, named};
use crate::memory::Memory;
use crate::sys;
use crate::uapi::{self, Info, VringWorker, WorkerState};

pub use vhost::VhostBackend as GenericBackend;
pub use vhost::VringConfigData as VringAddresses;
pub use vhost::vhost_kern::vhost_binding as numbers;

/// What the workers of a device are (`VHOST_SET_FORK_FROM_OWNER`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerMode {
    /// Kernel threads, in the control groups of the owner
    /// (`VHOST_FORK_OWNER_KTHREAD`).
    Kthread,
    /// Threads of the owner's process (`VHOST_FORK_OWNER_TASK`).
    Task,
}

impl WorkerMode {
    /// The number that stands for it in the ioctl.
    pub fn number(self) -> u8 {
        match self {
            WorkerMode::Kthread => 0,
            WorkerMode::Task => 1,
        }
    }
}

/// The argument of an ioctl that may be wrong in any way ([`Device::raw`]).
#[derive(Debug)]
pub enum RawArg<'a> {
    /// A null pointer.
    Null,
    /// A pointer into the kernel's half of the address space.
    Kernel,
    /// A pointer to these bytes. The kernel can read zeroes after them. What it
    /// writes over them is there after the call; what it writes beyond is lost.
    Bytes(&'a mut [u8]),
}

/// `/dev/vhost-blk`, opened.
///
/// The methods named after ioctls issue them with arguments that may be wrong:
/// they take the kernel's types, and leave it to the kernel to judge.
/// [`VhostBackend`] has those of all vhost devices as rust-vmm sees them; it
/// refuses some wrong arguments by itself.
#[derive(Debug)]
pub struct Device {
    file: File,
    memory: Arc<GuestMemoryMmap>,
    /// Rings are where the device IOTLB says.
    translated: bool,
}

impl Device {
    /// Opens the device node at `path`, usually [`uapi::DEVICE_PATH`].
    ///
    /// # Errors
    ///
    /// [`Error::Open`]
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| Error::Open {
                path: path.to_owned(),
                source,
            })?;
        Ok(Device {
            file,
            memory: Arc::default(),
            translated: false,
        })
    }

    /// The device that another process opened, and that came from it.
    pub fn from_file(file: File) -> Self {
        Device {
            file,
            memory: Arc::default(),
            translated: false,
        }
    }

    /// The open file, for `poll`, `read` and `write`.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// `VHOST_GET_FEATURES`: the feature bits on offer.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn get_features(&self) -> Result<u64> {
        named("VHOST_GET_FEATURES", VhostBackend::get_features(self))
    }

    /// `VHOST_SET_FEATURES`: takes these feature bits.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_features(&self, features: u64) -> Result<()> {
        named(
            "VHOST_SET_FEATURES",
            VhostBackend::set_features(self, features),
        )
    }

    /// `VHOST_GET_BACKEND_FEATURES`
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn get_backend_features(&self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.raw_named(
            "VHOST_GET_BACKEND_FEATURES",
            binding::VHOST_GET_BACKEND_FEATURES(),
            &mut bytes,
        )?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// `VHOST_SET_BACKEND_FEATURES`
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_backend_features(&self, features: u64) -> Result<()> {
        self.raw_named(
            "VHOST_SET_BACKEND_FEATURES",
            binding::VHOST_SET_BACKEND_FEATURES(),
            &mut features.to_ne_bytes(),
        )
    }

    /// `VHOST_SET_OWNER`: the device belongs to this process from now on.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_owner(&self) -> Result<()> {
        named("VHOST_SET_OWNER", VhostBackend::set_owner(self))
    }

    /// `VHOST_RESET_OWNER`: stops, drains, and gives the device back as it was
    /// when it was opened.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn reset_owner(&self) -> Result<()> {
        named("VHOST_RESET_OWNER", VhostBackend::reset_owner(self))
    }

    /// `VHOST_SET_MEM_TABLE` with the regions of `memory`, which stay mapped for
    /// as long as this device is open.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_memory(&mut self, memory: &Memory) -> Result<()> {
        self.set_mem_table(&memory.regions())?;
        self.memory = Arc::clone(memory.map());
        Ok(())
    }

    /// `VHOST_SET_MEM_TABLE` with any regions. The kernel accesses this process
    /// at `userspace_addr` of each of them: these are the caller's to choose
    /// well, as in [`VhostBackend::set_mem_table`].
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_mem_table(&self, regions: &[VhostUserMemoryRegionInfo]) -> Result<()> {
        let count = u32::try_from(regions.len())
            .map_err(|_| Error::Invalid(format!("{} memory regions", regions.len())))?;
        let mut bytes = Vec::with_capacity(8 + 32 * regions.len());
        bytes.extend(count.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        for region in regions {
            bytes.extend(region.guest_phys_addr.to_ne_bytes());
            bytes.extend(region.memory_size.to_ne_bytes());
            bytes.extend(region.userspace_addr.to_ne_bytes());
            bytes.extend(0u64.to_ne_bytes());
        }
        self.raw_named(
            "VHOST_SET_MEM_TABLE",
            binding::VHOST_SET_MEM_TABLE(),
            &mut bytes,
        )
    }

    /// `VHOST_SET_LOG_BASE`
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_log_base(&self, base: u64) -> Result<()> {
        named(
            "VHOST_SET_LOG_BASE",
            VhostBackend::set_log_base(self, base, None),
        )
    }

    /// `VHOST_SET_LOG_FD`
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_log_fd(&self, fd: RawFd) -> Result<()> {
        named("VHOST_SET_LOG_FD", VhostBackend::set_log_fd(self, fd))
    }

    /// `VHOST_SET_VRING_NUM`: the size of ring `index`, descriptors.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        let state = vhost_vring_state { index, num };
        self.write(
            "VHOST_SET_VRING_NUM",
            binding::VHOST_SET_VRING_NUM(),
            &state,
        )
    }

    /// `VHOST_SET_VRING_BASE`: where in the available ring the device goes on.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        let state = vhost_vring_state { index, num: base };
        self.write(
            "VHOST_SET_VRING_BASE",
            binding::VHOST_SET_VRING_BASE(),
            &state,
        )
    }

    /// `VHOST_GET_VRING_BASE`: where in the available ring the device stands.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        let mut state = vhost_vring_state { index, num: 0 };
        self.exchange(
            "VHOST_GET_VRING_BASE",
            binding::VHOST_GET_VRING_BASE(),
            &mut state,
        )?;
        Ok(state.num)
    }

    /// From now on the addresses of rings are those of a device IOTLB
    /// ([`set_vring_addr`](Self::set_vring_addr)).
    pub fn translate_rings(&mut self) {
        self.translated = true;
    }

    /// `VHOST_SET_VRING_ADDR` with addresses in guest memory, which are checked
    /// and turned into those of this process first, unless the device IOTLB
    /// translates them.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]; [`Error::Vhost`], if the parts of the ring are not
    /// within the memory that [`set_memory`](Self::set_memory) gave.
    pub fn set_vring_addr(&self, index: u32, addresses: &VringAddresses) -> Result<()> {
        if self.translated {
            return self.set_vring_user_addr(&vhost_vring_addr {
                index,
                flags: 0,
                desc_user_addr: addresses.desc_table_addr,
                used_user_addr: addresses.used_ring_addr,
                avail_user_addr: addresses.avail_ring_addr,
                log_guest_addr: 0,
            });
        }
        named(
            "VHOST_SET_VRING_ADDR",
            VhostBackend::set_vring_addr(self, index as usize, addresses),
        )
    }

    /// `VHOST_SET_VRING_ADDR` with any addresses of this process. The kernel
    /// writes to the used ring there: it is the caller's to choose well.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_user_addr(&self, addresses: &vhost_vring_addr) -> Result<()> {
        self.write(
            "VHOST_SET_VRING_ADDR",
            binding::VHOST_SET_VRING_ADDR(),
            addresses,
        )
    }

    /// `VHOST_SET_VRING_KICK`: the eventfd by which the driver kicks, or -1.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_kick(&self, index: u32, fd: RawFd) -> Result<()> {
        let file = vhost_vring_file { index, fd };
        self.write(
            "VHOST_SET_VRING_KICK",
            binding::VHOST_SET_VRING_KICK(),
            &file,
        )
    }

    /// `VHOST_SET_VRING_CALL`: the eventfd that tells of used entries, or -1.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_call(&self, index: u32, fd: RawFd) -> Result<()> {
        let file = vhost_vring_file { index, fd };
        self.write(
            "VHOST_SET_VRING_CALL",
            binding::VHOST_SET_VRING_CALL(),
            &file,
        )
    }

    /// `VHOST_SET_VRING_ERR`: the eventfd that tells of a broken ring, or -1.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_err(&self, index: u32, fd: RawFd) -> Result<()> {
        let file = vhost_vring_file { index, fd };
        self.write("VHOST_SET_VRING_ERR", binding::VHOST_SET_VRING_ERR(), &file)
    }

    /// `VHOST_SET_VRING_BUSYLOOP_TIMEOUT`, microseconds.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_vring_busyloop_timeout(&self, index: u32, microseconds: u32) -> Result<()> {
        let state = vhost_vring_state {
            index,
            num: microseconds,
        };
        self.write(
            "VHOST_SET_VRING_BUSYLOOP_TIMEOUT",
            uapi::VHOST_SET_VRING_BUSYLOOP_TIMEOUT,
            &state,
        )
    }

    /// `VHOST_GET_VRING_BUSYLOOP_TIMEOUT`, microseconds.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn get_vring_busyloop_timeout(&self, index: u32) -> Result<u32> {
        let mut state = vhost_vring_state { index, num: 0 };
        self.exchange(
            "VHOST_GET_VRING_BUSYLOOP_TIMEOUT",
            uapi::VHOST_GET_VRING_BUSYLOOP_TIMEOUT,
            &mut state,
        )?;
        Ok(state.num)
    }

    /// `VHOST_SET_FORK_FROM_OWNER`, which has to come before
    /// [`set_owner`](Self::set_owner).
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_worker_mode(&self, mode: WorkerMode) -> Result<()> {
        self.set_fork_from_owner(mode.number())
    }

    /// `VHOST_SET_FORK_FROM_OWNER` with any number.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_fork_from_owner(&self, number: u8) -> Result<()> {
        self.write(
            "VHOST_SET_FORK_FROM_OWNER",
            uapi::VHOST_SET_FORK_FROM_OWNER,
            &number,
        )
    }

    /// `VHOST_GET_FORK_FROM_OWNER`
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn get_fork_from_owner(&self) -> Result<u8> {
        let mut number = 0;
        self.exchange(
            "VHOST_GET_FORK_FROM_OWNER",
            uapi::VHOST_GET_FORK_FROM_OWNER,
            &mut number,
        )?;
        Ok(number)
    }

    /// `VHOST_NEW_WORKER`: makes a worker and returns its number.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]; with [`WorkerMode::Kthread`] always, `EFAULT`: the core
    /// has a limit for tasks only, and so allows no more kernel threads than
    /// the first.
    pub fn new_worker(&self) -> Result<u32> {
        let mut state = WorkerState::default();
        self.exchange("VHOST_NEW_WORKER", uapi::VHOST_NEW_WORKER, &mut state)?;
        Ok(state.worker_id)
    }

    /// `VHOST_FREE_WORKER`
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn free_worker(&self, worker_id: u32) -> Result<()> {
        let state = WorkerState { worker_id };
        self.write("VHOST_FREE_WORKER", uapi::VHOST_FREE_WORKER, &state)
    }

    /// `VHOST_ATTACH_VRING_WORKER`: ring `index` gets worker `worker_id`.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn attach_vring_worker(&self, index: u32, worker_id: u32) -> Result<()> {
        let worker = VringWorker { index, worker_id };
        self.write(
            "VHOST_ATTACH_VRING_WORKER",
            uapi::VHOST_ATTACH_VRING_WORKER,
            &worker,
        )
    }

    /// `VHOST_GET_VRING_WORKER`: the number of the worker of ring `index`.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn get_vring_worker(&self, index: u32) -> Result<u32> {
        let mut worker = VringWorker {
            index,
            worker_id: 0,
        };
        self.exchange(
            "VHOST_GET_VRING_WORKER",
            uapi::VHOST_GET_VRING_WORKER,
            &mut worker,
        )?;
        Ok(worker.worker_id)
    }

    /// `VHOST_BLK_SET_BACKEND`: starts every ring that is set up on the block
    /// device `disk`.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_backend(&self, disk: impl AsFd) -> Result<()> {
        self.set_backend_raw(0, disk.as_fd().as_raw_fd())
    }

    /// `VHOST_BLK_SET_BACKEND` with -1: stops all rings, and returns when every
    /// request in flight is complete.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn stop(&self) -> Result<()> {
        self.set_backend_raw(0, -1)
    }

    /// `VHOST_BLK_SET_BACKEND` with any numbers.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_backend_raw(&self, index: u32, fd: RawFd) -> Result<()> {
        let file = vhost_vring_file { index, fd };
        self.write("VHOST_BLK_SET_BACKEND", uapi::VHOST_BLK_SET_BACKEND, &file)
    }

    /// `VHOST_BLK_SET_SERIAL`: the bytes that `VIRTIO_BLK_T_GET_ID` returns.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_serial(&self, serial: &[u8; uapi::VHOST_BLK_SERIAL_LEN]) -> Result<()> {
        self.write("VHOST_BLK_SET_SERIAL", uapi::VHOST_BLK_SET_SERIAL, serial)
    }

    /// `VHOST_BLK_SET_WRITEBACK`: whether the guest has a write cache.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_writeback(&self, writeback: bool) -> Result<()> {
        self.set_writeback_raw(u32::from(writeback))
    }

    /// `VHOST_BLK_SET_WRITEBACK` with any number.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_writeback_raw(&self, mode: u32) -> Result<()> {
        self.write(
            "VHOST_BLK_SET_WRITEBACK",
            uapi::VHOST_BLK_SET_WRITEBACK,
            &mode,
        )
    }

    /// `VHOST_BLK_SET_PIN_MEMORY`: whether the guest's memory stays pinned while a
    /// backend runs, from the next start on.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_pin_memory(&self, pin: bool) -> Result<()> {
        self.set_pin_memory_raw(u32::from(pin))
    }

    /// `VHOST_BLK_SET_PIN_MEMORY` with any number.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn set_pin_memory_raw(&self, mode: u32) -> Result<()> {
        self.write(
            "VHOST_BLK_SET_PIN_MEMORY",
            uapi::VHOST_BLK_SET_PIN_MEMORY,
            &mode,
        )
    }

    /// `VHOST_BLK_GET_INFO` about the block device `disk`, or about the running
    /// backend.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn info(&self, disk: Option<BorrowedFd<'_>>) -> Result<Info> {
        self.info_raw(disk.map_or(-1, |fd| fd.as_raw_fd()))
    }

    /// `VHOST_BLK_GET_INFO` with any number for the descriptor.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn info_raw(&self, fd: RawFd) -> Result<Info> {
        sys::get_info(&self.file, fd).map_err(|source| Error::Ioctl {
            name: "VHOST_BLK_GET_INFO",
            source,
        })
    }

    /// An ioctl with any number and any bytes; returns what it returned.
    ///
    /// Addresses within the bytes are followed by the kernel: they are the
    /// caller's to choose well.
    ///
    /// # Errors
    ///
    /// [`Error::Ioctl`]
    pub fn raw(&self, request: u32, arg: RawArg<'_>) -> Result<i32> {
        sys::raw(&self.file, request, arg).map_err(|source| Error::Ioctl {
            name: "ioctl",
            source,
        })
    }

    fn raw_named(&self, name: &'static str, request: u64, bytes: &mut [u8]) -> Result<()> {
        let request = u32::try_from(request)
            .map_err(|_| Error::Invalid(format!("ioctl number {request:#x}")))?;
        sys::raw(&self.file, request, RawArg::Bytes(bytes))
            .map(drop)
            .map_err(|source| Error::Ioctl { name, source })
    }

    fn write<T: sys::Plain>(&self, name: &'static str, request: u64, arg: &T) -> Result<()> {
        sys::write(&self.file, request, arg).map_err(|source| Error::Ioctl { name, source })
    }

    fn exchange<T: sys::Plain>(&self, name: &'static str, request: u64, arg: &mut T) -> Result<()> {
        sys::exchange(&self.file, request, arg).map_err(|source| Error::Ioctl { name, source })
    }
}

impl VhostKernBackend for Device {
    type AS = Arc<GuestMemoryMmap>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }
}

impl AsRawFd for Device {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
