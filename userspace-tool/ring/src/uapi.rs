// SPDX-License-Identifier: GPL-2.0

//! Numbers and structures of `<linux/vhost_blk.h>`, and those of
//! `<linux/vhost.h>` that rust-vmm's `vhost` crate does not have.

use std::ffi::{c_uint, c_ulong};

use vhost::vhost_kern::vhost_binding::{VHOST_VIRTIO, vhost_vring_file, vhost_vring_state};
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_SIZEMASK, _IOC_WRITE, ioctl_expr};

/// Where the device node is.
pub const DEVICE_PATH: &str = "/dev/vhost-blk";

/// Version of the interface that this crate was written for.
pub const VHOST_BLK_ABI_VERSION: u32 = 2;

/// Length of the string that `VIRTIO_BLK_T_GET_ID` returns, bytes.
pub const VHOST_BLK_SERIAL_LEN: usize = 20;

/// `VHOST_BLK_SET_WRITEBACK` is there ([`Info::capabilities`]).
pub const VHOST_BLK_CAP_WRITEBACK: u64 = 1 << 0;
/// `VHOST_BLK_SET_PIN_MEMORY` is there ([`Info::capabilities`]).
pub const VHOST_BLK_CAP_PIN_MEMORY: u64 = 1 << 1;

/// The backend takes no writes ([`Info::flags`]).
pub const VHOST_BLK_INFO_READ_ONLY: u32 = 1 << 0;
/// The backend has a volatile write cache ([`Info::flags`]).
pub const VHOST_BLK_INFO_WRITE_CACHE: u32 = 1 << 1;
/// The backend is a rotating disk ([`Info::flags`]).
pub const VHOST_BLK_INFO_ROTATIONAL: u32 = 1 << 2;
/// A backend runs ([`Info::flags`]).
pub const VHOST_BLK_INFO_RUNNING: u32 = 1 << 3;
/// The guest's memory stays pinned meanwhile ([`Info::flags`]).
pub const VHOST_BLK_INFO_MEMORY_PINNED: u32 = 1 << 4;

const fn encode<T>(direction: c_uint, nr: c_uint) -> c_ulong {
    assert!(size_of::<T>() <= _IOC_SIZEMASK as usize);
    #[expect(clippy::cast_possible_truncation, reason = "it has 14 bits")]
    let size = size_of::<T>() as c_uint;
    ioctl_expr(direction, VHOST_VIRTIO, nr, size)
}

const fn iow<T>(nr: c_uint) -> c_ulong {
    encode::<T>(_IOC_WRITE, nr)
}

const fn ior<T>(nr: c_uint) -> c_ulong {
    encode::<T>(_IOC_READ, nr)
}

const fn iowr<T>(nr: c_uint) -> c_ulong {
    encode::<T>(_IOC_READ | _IOC_WRITE, nr)
}

/// Starts the device on a block device, or stops it.
pub const VHOST_BLK_SET_BACKEND: c_ulong = iow::<vhost_vring_file>(0xff);
/// Sets the string that `VIRTIO_BLK_T_GET_ID` returns.
pub const VHOST_BLK_SET_SERIAL: c_ulong = iow::<[u8; VHOST_BLK_SERIAL_LEN]>(0xfe);
/// Asks for the limits of the device and of a backend.
pub const VHOST_BLK_GET_INFO: c_ulong = iowr::<Info>(0xfd);
/// Switches the write cache that the guest sees.
pub const VHOST_BLK_SET_WRITEBACK: c_ulong = iow::<u32>(0xfc);
/// Keeps the guest's memory pinned while a backend runs.
pub const VHOST_BLK_SET_PIN_MEMORY: c_ulong = iow::<u32>(0xfb);

/// Makes a worker.
pub const VHOST_NEW_WORKER: c_ulong = ior::<WorkerState>(0x08);
/// Frees a worker that no virtqueue uses.
pub const VHOST_FREE_WORKER: c_ulong = iow::<WorkerState>(0x09);
/// Gives a virtqueue its worker.
pub const VHOST_ATTACH_VRING_WORKER: c_ulong = iow::<VringWorker>(0x15);
/// Asks for the worker of a virtqueue.
pub const VHOST_GET_VRING_WORKER: c_ulong = iowr::<VringWorker>(0x16);
/// Sets for how long a virtqueue is polled before its worker sleeps.
pub const VHOST_SET_VRING_BUSYLOOP_TIMEOUT: c_ulong = iow::<vhost_vring_state>(0x23);
/// Asks for what `VHOST_SET_VRING_BUSYLOOP_TIMEOUT` set. The kernel's header
/// has it as one that only writes.
pub const VHOST_GET_VRING_BUSYLOOP_TIMEOUT: c_ulong = iow::<vhost_vring_state>(0x24);
/// Chooses between tasks and kernel threads as workers.
pub const VHOST_SET_FORK_FROM_OWNER: c_ulong = iow::<u8>(0x84);
/// Asks for what `VHOST_SET_FORK_FROM_OWNER` set.
pub const VHOST_GET_FORK_FROM_OWNER: c_ulong = ior::<u8>(0x85);

/// `struct vhost_worker_state`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerState {
    /// Number of the worker.
    pub worker_id: c_uint,
}

/// `struct vhost_vring_worker`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringWorker {
    /// Number of the virtqueue.
    pub index: c_uint,
    /// Number of its worker.
    pub worker_id: c_uint,
}

/// `struct vhost_blk_info`: what the device and a backend can do.
///
/// A sector is 512 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// In: size of the caller's structure; out: of the kernel's. Bytes.
    pub argsz: u32,
    /// In: a block device to ask about, or -1 for the running backend.
    pub fd: i32,
    /// `VHOST_BLK_ABI_VERSION` of the kernel.
    pub abi_version: u32,
    /// `VHOST_BLK_INFO_*`
    pub flags: u32,
    /// `VHOST_BLK_CAP_*`
    pub capabilities: u64,
    /// Sectors.
    pub capacity: u64,
    /// Virtqueues of this open device.
    pub max_virtqueues: u32,
    /// Largest ring, descriptors.
    pub max_queue_size: u32,
    /// Bytes.
    pub logical_block_size: u32,
    /// Bytes.
    pub physical_block_size: u32,
    /// Minimum I/O size, bytes.
    pub io_min: u32,
    /// Optimal I/O size, bytes; 0 for none.
    pub io_opt: u32,
    /// Bytes.
    pub alignment_offset: u32,
    /// Largest I/O that the disk takes unsplit, sectors.
    pub max_sectors: u32,
    /// Largest count of segments that the disk takes unsplit.
    pub max_segments: u32,
    /// Mask of the address bits that must be 0 for DMA.
    pub dma_alignment: u32,
    /// 0 if the disk cannot discard.
    pub max_discard_sectors: u32,
    /// Bytes.
    pub discard_granularity: u32,
    /// 0 if the disk has no write-zeroes command.
    pub max_write_zeroes_sectors: u32,
    /// 0 if the disk cannot erase.
    pub max_secure_erase_sectors: u32,
    /// 0 if the disk is not zoned.
    pub zone_sectors: u32,
    /// 0 for no limit.
    pub max_open_zones: u32,
    /// 0 for no limit.
    pub max_active_zones: u32,
    /// Largest zone append that the device takes; 0 if the disk is not zoned.
    pub max_zone_append_sectors: u32,
    /// 0 if the disk is not zoned.
    pub nr_zones: u32,
    /// Memory of an open device, bytes, without its virtqueues.
    pub device_bytes: u32,
    /// Memory of each of its virtqueues, bytes, without request slots.
    pub queue_bytes: u32,
    /// Memory of each request slot, bytes.
    pub slot_bytes: u32,
    /// Bytes; 0 if the disk is not zoned.
    pub zone_write_granularity: u32,
    /// 0
    pub reserved32: u32,
    /// 0
    pub reserved: [u64; 3],
}

/// Feature bits that this crate uses by name, as masks.
pub mod feature {
    use super::{virtio_blk, virtio_config, virtio_ring};

    /// `VIRTIO_BLK_F_RO`
    pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
    /// `VIRTIO_BLK_F_FLUSH`
    pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
    /// `VIRTIO_BLK_F_CONFIG_WCE`
    pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
    /// `VIRTIO_BLK_F_MQ`
    pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
    /// `VIRTIO_BLK_F_DISCARD`
    pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`
    pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
    /// `VIRTIO_BLK_F_LIFETIME`
    pub const LIFETIME: u64 = 1 << 15;
    /// `VIRTIO_BLK_F_SECURE_ERASE`
    pub const SECURE_ERASE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SECURE_ERASE;
    /// `VIRTIO_BLK_F_ZONED`
    pub const ZONED: u64 = 1 << virtio_blk::VIRTIO_BLK_F_ZONED;
    /// `VIRTIO_F_NOTIFY_ON_EMPTY`
    pub const NOTIFY_ON_EMPTY: u64 = 1 << virtio_config::VIRTIO_F_NOTIFY_ON_EMPTY;
    /// `VHOST_F_LOG_ALL`
    pub const LOG_ALL: u64 = 1 << vhost::vhost_kern::vhost_binding::VHOST_F_LOG_ALL;
    /// `VIRTIO_RING_F_INDIRECT_DESC`
    pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// `VIRTIO_RING_F_EVENT_IDX`
    pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// `VIRTIO_F_VERSION_1`
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
    /// `VIRTIO_F_ACCESS_PLATFORM`
    pub const ACCESS_PLATFORM: u64 = 1 << virtio_config::VIRTIO_F_ACCESS_PLATFORM;
    /// `VIRTIO_F_RING_PACKED`
    pub const RING_PACKED: u64 = 1 << virtio_config::VIRTIO_F_RING_PACKED;
    /// `VIRTIO_F_IN_ORDER`
    pub const IN_ORDER: u64 = 1 << virtio_config::VIRTIO_F_IN_ORDER;
    /// `VIRTIO_F_SR_IOV`
    pub const SR_IOV: u64 = 1 << virtio_config::VIRTIO_F_SR_IOV;
    /// `VIRTIO_F_RING_RESET`
    pub const RING_RESET: u64 = 1 << virtio_config::VIRTIO_F_RING_RESET;

    /// Each feature bit of a virtio block device and its name, in order.
    pub const NAMES: &[(u32, &str)] = &[
        (virtio_blk::VIRTIO_BLK_F_BARRIER, "BARRIER"),
        (virtio_blk::VIRTIO_BLK_F_SIZE_MAX, "SIZE_MAX"),
        (virtio_blk::VIRTIO_BLK_F_SEG_MAX, "SEG_MAX"),
        (virtio_blk::VIRTIO_BLK_F_GEOMETRY, "GEOMETRY"),
        (virtio_blk::VIRTIO_BLK_F_RO, "RO"),
        (virtio_blk::VIRTIO_BLK_F_BLK_SIZE, "BLK_SIZE"),
        (virtio_blk::VIRTIO_BLK_F_SCSI, "SCSI"),
        (virtio_blk::VIRTIO_BLK_F_FLUSH, "FLUSH"),
        (virtio_blk::VIRTIO_BLK_F_TOPOLOGY, "TOPOLOGY"),
        (virtio_blk::VIRTIO_BLK_F_CONFIG_WCE, "CONFIG_WCE"),
        (virtio_blk::VIRTIO_BLK_F_MQ, "MQ"),
        (virtio_blk::VIRTIO_BLK_F_DISCARD, "DISCARD"),
        (virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES, "WRITE_ZEROES"),
        (15, "LIFETIME"),
        (virtio_blk::VIRTIO_BLK_F_SECURE_ERASE, "SECURE_ERASE"),
        (virtio_blk::VIRTIO_BLK_F_ZONED, "ZONED"),
        (virtio_config::VIRTIO_F_NOTIFY_ON_EMPTY, "NOTIFY_ON_EMPTY"),
        (vhost::vhost_kern::vhost_binding::VHOST_F_LOG_ALL, "LOG_ALL"),
        (virtio_config::VIRTIO_F_ANY_LAYOUT, "ANY_LAYOUT"),
        (virtio_ring::VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC"),
        (virtio_ring::VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX"),
        (virtio_config::VIRTIO_F_VERSION_1, "VERSION_1"),
        (virtio_config::VIRTIO_F_ACCESS_PLATFORM, "ACCESS_PLATFORM"),
        (virtio_config::VIRTIO_F_RING_PACKED, "RING_PACKED"),
        (virtio_config::VIRTIO_F_IN_ORDER, "IN_ORDER"),
        (virtio_config::VIRTIO_F_ORDER_PLATFORM, "ORDER_PLATFORM"),
        (virtio_config::VIRTIO_F_SR_IOV, "SR_IOV"),
        (
            virtio_config::VIRTIO_F_NOTIFICATION_DATA,
            "NOTIFICATION_DATA",
        ),
        (virtio_config::VIRTIO_F_RING_RESET, "RING_RESET"),
    ];

    /// The names of the bits that are set in `features`, lowest first; a bit
    /// without a name gives its number.
    pub fn names(features: u64) -> Vec<String> {
        (0..u64::BITS)
            .filter(|bit| features & (1 << bit) != 0)
            .map(|bit| {
                NAMES
                    .iter()
                    .find(|(number, _)| *number == bit)
                    .map_or_else(|| bit.to_string(), |(_, name)| (*name).to_owned())
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_those_of_the_headers() {
        for (number, expected) in [
            (VHOST_BLK_SET_BACKEND, 0x4008_afff),
            (VHOST_BLK_SET_SERIAL, 0x4014_affe),
            (VHOST_BLK_GET_INFO, 0xc098_affd),
            (VHOST_BLK_SET_WRITEBACK, 0x4004_affc),
            (VHOST_BLK_SET_PIN_MEMORY, 0x4004_affb),
            (VHOST_NEW_WORKER, 0x8004_af08),
            (VHOST_FREE_WORKER, 0x4004_af09),
            (VHOST_ATTACH_VRING_WORKER, 0x4008_af15),
            (VHOST_GET_VRING_WORKER, 0xc008_af16),
            (VHOST_SET_VRING_BUSYLOOP_TIMEOUT, 0x4008_af23),
            (VHOST_SET_FORK_FROM_OWNER, 0x4001_af84),
            (VHOST_GET_FORK_FROM_OWNER, 0x8001_af85),
        ] {
            assert_eq!(number, expected, "{number:#x} {expected:#x}");
        }
    }

    #[test]
    fn features_have_names() {
        assert_eq!(
            feature::names(feature::FLUSH | feature::EVENT_IDX | feature::VERSION_1 | (1 << 60)),
            ["FLUSH", "EVENT_IDX", "VERSION_1", "60"]
        );
        assert!(feature::names(0).is_empty());
        assert!(feature::NAMES.is_sorted());
    }
}
