// SPDX-License-Identifier: GPL-2.0

//! What user space and the module say to each other.
//!
//! C headers: `include/uapi/linux/vhost_blk.h` of this project, `include/uapi/linux/vhost.h` and
//! `include/uapi/linux/virtio_blk.h` of the kernel.

use crate::bindings::{
    block::Backend,
    raw, //
};
use kernel::{
    ioctl::{
        _IO,
        _IOR,
        _IOW,
        _IOWR, //
    },
    prelude::*,
    transmute::{
        AsBytes,
        FromBytes, //
    },
    uaccess::{
        UserPtr,
        UserSlice, //
    },
};

/// Bytes of the string that a guest asks for with `VIRTIO_BLK_T_GET_ID`.
pub(crate) const SERIAL_LEN: usize = raw::VHOST_BLK_SERIAL_LEN as usize;

/// `VHOST_BLK_CAP_WRITEBACK`: the writeback mode can be switched.
const CAP_WRITEBACK: u64 = 1 << 0;

/// `VHOST_BLK_CAP_PIN_MEMORY`: the guest's memory can stay pinned.
const CAP_PIN_MEMORY: u64 = 1 << 1;

const TYPE: u32 = raw::VHOST_VIRTIO;

/// Numbers of the ioctls. bindgen does not evaluate the macros, for they use `sizeof`.
pub(crate) const GET_FEATURES: u32 = _IOR::<u64>(TYPE, 0x00);
pub(crate) const SET_FEATURES: u32 = _IOW::<u64>(TYPE, 0x00);
pub(crate) const RESET_OWNER: u32 = _IO(TYPE, 0x02);
pub(crate) const NEW_WORKER: u32 = _IOR::<raw::vhost_worker_state>(TYPE, 0x08);
pub(crate) const FREE_WORKER: u32 = _IOW::<raw::vhost_worker_state>(TYPE, 0x09);
pub(crate) const SET_VRING_NUM: u32 = _IOW::<raw::vhost_vring_state>(TYPE, 0x10);
pub(crate) const SET_VRING_CALL: u32 = _IOW::<raw::vhost_vring_file>(TYPE, 0x21);
pub(crate) const SET_VRING_ADDR: u32 = _IOW::<raw::vhost_vring_addr>(TYPE, 0x11);
pub(crate) const SET_MEM_TABLE: u32 = _IOW::<raw::vhost_memory>(TYPE, 0x03);
pub(crate) const ATTACH_VRING_WORKER: u32 = _IOW::<raw::vhost_vring_worker>(TYPE, 0x15);
pub(crate) const GET_VRING_WORKER: u32 = _IOWR::<raw::vhost_vring_worker>(TYPE, 0x16);
pub(crate) const SET_BACKEND_FEATURES: u32 = _IOW::<u64>(TYPE, 0x25);
pub(crate) const GET_BACKEND_FEATURES: u32 = _IOR::<u64>(TYPE, 0x26);
pub(crate) const SET_BACKEND: u32 = _IOW::<raw::vhost_vring_file>(TYPE, 0xff);
pub(crate) const SET_SERIAL: u32 = _IOW::<[u8; SERIAL_LEN]>(TYPE, 0xfe);
pub(crate) const GET_INFO: u32 = _IOWR::<raw::vhost_blk_info>(TYPE, 0xfd);
pub(crate) const SET_WRITEBACK: u32 = _IOW::<u32>(TYPE, 0xfc);
pub(crate) const SET_PIN_MEMORY: u32 = _IOW::<u32>(TYPE, 0xfb);

/// Numbers of the feature bits.
pub(crate) mod feature {
    use crate::bindings::raw;

    pub(crate) const SIZE_MAX: u32 = raw::VIRTIO_BLK_F_SIZE_MAX;
    pub(crate) const SEG_MAX: u32 = raw::VIRTIO_BLK_F_SEG_MAX;
    pub(crate) const GEOMETRY: u32 = raw::VIRTIO_BLK_F_GEOMETRY;
    pub(crate) const RO: u32 = raw::VIRTIO_BLK_F_RO;
    pub(crate) const BLK_SIZE: u32 = raw::VIRTIO_BLK_F_BLK_SIZE;
    pub(crate) const FLUSH: u32 = raw::VIRTIO_BLK_F_FLUSH;
    pub(crate) const TOPOLOGY: u32 = raw::VIRTIO_BLK_F_TOPOLOGY;
    pub(crate) const CONFIG_WCE: u32 = raw::VIRTIO_BLK_F_CONFIG_WCE;
    pub(crate) const MQ: u32 = raw::VIRTIO_BLK_F_MQ;
    pub(crate) const DISCARD: u32 = raw::VIRTIO_BLK_F_DISCARD;
    pub(crate) const WRITE_ZEROES: u32 = raw::VIRTIO_BLK_F_WRITE_ZEROES;
    pub(crate) const SECURE_ERASE: u32 = raw::VIRTIO_BLK_F_SECURE_ERASE;
    pub(crate) const ZONED: u32 = raw::VIRTIO_BLK_F_ZONED;
    // Of `linux/virtio_config.h`, most of which the kernel crate does not have.
    pub(crate) const NOTIFY_ON_EMPTY: u32 = 24;
    pub(crate) const LOG_ALL: u32 = raw::VHOST_F_LOG_ALL;
    pub(crate) const ANY_LAYOUT: u32 = 27;
    pub(crate) const INDIRECT_DESC: u32 = raw::VIRTIO_RING_F_INDIRECT_DESC;
    pub(crate) const EVENT_IDX: u32 = raw::VIRTIO_RING_F_EVENT_IDX;
    pub(crate) const VERSION_1: u32 = 32;
    pub(crate) const ACCESS_PLATFORM: u32 = 33;
}

/// Numbers of the bits of `VHOST_GET_BACKEND_FEATURES`.
pub(crate) mod backend_feature {
    use crate::bindings::raw;

    pub(crate) const IOTLB_MSG_V2: u32 = raw::VHOST_BACKEND_F_IOTLB_MSG_V2;
}

/// `struct vhost_vring_state`: a number for a virtqueue.
#[repr(transparent)]
pub(crate) struct VringState(raw::vhost_vring_state);

// SAFETY: All its fields are integers, of which any value is valid.
unsafe impl FromBytes for VringState {}

impl VringState {
    /// The number.
    pub(crate) fn num(&self) -> u32 {
        self.0.num
    }
}

/// `struct vhost_vring_file`: a descriptor for a virtqueue.
#[repr(transparent)]
pub(crate) struct VringFile(raw::vhost_vring_file);

// SAFETY: All its fields are integers, of which any value is valid.
unsafe impl FromBytes for VringFile {}

impl VringFile {
    /// Which virtqueue.
    pub(crate) fn index(&self) -> usize {
        self.0.index as usize
    }

    /// The descriptor, or `None` to unbind.
    pub(crate) fn fd(&self) -> Option<i32> {
        (self.0.fd != raw::VHOST_FILE_UNBIND).then_some(self.0.fd)
    }
}

/// `struct vhost_blk_info`: see the header for each field.
#[repr(transparent)]
pub(crate) struct Info(raw::vhost_blk_info);

// SAFETY: All its fields are integers, of which any value is valid.
unsafe impl FromBytes for Info {}
// SAFETY: All its fields are integers, in an order that leaves no padding: see below.
unsafe impl AsBytes for Info {}

const _: () = assert!(
    size_of::<raw::vhost_blk_info>() == 2 * 4 + 2 * 4 + 2 * 8 + 24 * 4 + 3 * 8,
    "struct vhost_blk_info has padding"
);

impl Info {
    /// Bytes of the fields that user space fills in: `argsz` and `fd`.
    const IN_LEN: usize = 8;

    /// Nothing known yet.
    pub(crate) fn new() -> Self {
        Self(raw::vhost_blk_info::default())
    }

    /// Sets the fields of the open device: counts, and bytes of memory.
    pub(crate) fn set_device(
        &mut self,
        max_virtqueues: usize,
        max_queue_size: u32,
        device_bytes: usize,
        queue_bytes: usize,
        slot_bytes: usize,
    ) {
        let info = &mut self.0;
        info.argsz = size_of::<Self>() as u32;
        info.abi_version = raw::VHOST_BLK_ABI_VERSION;
        info.capabilities = CAP_WRITEBACK | CAP_PIN_MEMORY;
        info.max_virtqueues = max_virtqueues as u32;
        info.max_queue_size = max_queue_size;
        info.device_bytes = device_bytes as u32;
        info.queue_bytes = queue_bytes as u32;
        info.slot_bytes = slot_bytes as u32;
    }

    /// Says that a backend runs, and whether the guest's memory stays pinned meanwhile.
    pub(crate) fn set_running(&mut self, memory_pinned: bool) {
        self.0.flags |= raw::VHOST_BLK_INFO_RUNNING;
        if memory_pinned {
            self.0.flags |= raw::VHOST_BLK_INFO_MEMORY_PINNED;
        }
    }

    /// Sets the fields of a backend, of which a zone append may be of so many sectors.
    pub(crate) fn set_backend(&mut self, backend: &Backend, max_zone_append_sectors: u32) {
        let limits = backend.limits();
        let info = &mut self.0;

        for (set, flag) in [
            (!backend.writable(), raw::VHOST_BLK_INFO_READ_ONLY),
            (limits.write_cache, raw::VHOST_BLK_INFO_WRITE_CACHE),
            (limits.rotational, raw::VHOST_BLK_INFO_ROTATIONAL),
        ] {
            if set {
                info.flags |= flag;
            }
        }
        info.capacity = backend.capacity();
        info.logical_block_size = limits.logical_block_size;
        info.physical_block_size = limits.physical_block_size;
        info.io_min = limits.io_min;
        info.io_opt = limits.io_opt;
        info.alignment_offset = limits.alignment_offset;
        info.max_sectors = limits.max_sectors;
        info.max_segments = limits.max_segments;
        info.dma_alignment = limits.dma_alignment;
        // The device does nothing of the kind to zoned disks.
        if !backend.is_zoned() {
            info.max_discard_sectors = limits.max_discard_sectors;
            info.discard_granularity = limits.discard_granularity;
            info.max_write_zeroes_sectors = limits.max_write_zeroes_sectors;
            info.max_secure_erase_sectors = limits.max_secure_erase_sectors;
        }
        info.zone_sectors = limits.zone_sectors;
        info.max_open_zones = limits.max_open_zones;
        info.max_active_zones = limits.max_active_zones;
        info.max_zone_append_sectors = max_zone_append_sectors;
        info.nr_zones = limits.nr_zones;
        info.zone_write_granularity = limits.zone_write_granularity;
    }

    /// Reads what user space asks: the size of its structure in bytes, and a descriptor, or
    /// none for the running backend.
    ///
    /// # Errors
    ///
    /// `EFAULT`, or `EINVAL` if the structure is too short to ask anything.
    pub(crate) fn read_query(arg: usize) -> Result<(usize, Option<i32>)> {
        let mut reader = UserSlice::new(UserPtr::from_addr(arg), Self::IN_LEN).reader();
        let len = reader.read::<u32>()? as usize;
        let fd = reader.read::<i32>()?;
        if len < Self::IN_LEN {
            return Err(EINVAL);
        }
        Ok((len, (fd != -1).then_some(fd)))
    }

    /// Writes as much of it as fits a structure of `len` bytes.
    ///
    /// # Errors
    ///
    /// `EFAULT`.
    pub(crate) fn write_to(&self, arg: usize, len: usize) -> Result {
        let bytes = self.as_bytes();
        let bytes = bytes.get(..len).unwrap_or(bytes);
        UserSlice::new(UserPtr::from_addr(arg), bytes.len())
            .writer()
            .write_slice(bytes)
    }
}
