/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
#ifndef _UAPI_LINUX_VHOST_BLK_H
#define _UAPI_LINUX_VHOST_BLK_H
/*
 * User-space interface of /dev/vhost-blk, beside the VHOST_* ioctls of
 * <linux/vhost.h>. docs/abi.md describes each ioctl and its errors.
 *
 * All numbers in struct vhost_blk_info are in the unit that the field's
 * comment gives. A sector is 512 bytes.
 */

#include <linux/ioctl.h>
#include <linux/types.h>
#include <linux/vhost.h>

/* Version of this interface; it grows when something is added. */
#define VHOST_BLK_ABI_VERSION		2

/*
 * Start the device on a block device or an image file, or stop it.
 *
 * vhost_vring_file.index is ignored. vhost_vring_file.fd is an open block
 * device or regular file, which starts every virtqueue whose ring is set up,
 * or -1, which stops all of them and returns when every request in flight is
 * complete.
 */
#define VHOST_BLK_SET_BACKEND		_IOW(VHOST_VIRTIO, 0xFF, \
					     struct vhost_vring_file)

/* Length of the string that VIRTIO_BLK_T_GET_ID returns, NUL-padded. */
#define VHOST_BLK_SERIAL_LEN		20

/* Set the string that VIRTIO_BLK_T_GET_ID returns. */
#define VHOST_BLK_SET_SERIAL		_IOW(VHOST_VIRTIO, 0xFE, \
					     char[VHOST_BLK_SERIAL_LEN])

/* vhost_blk_info.capabilities */
/* VHOST_BLK_SET_WRITEBACK is there. */
#define VHOST_BLK_CAP_WRITEBACK		(1ULL << 0)
/* VHOST_BLK_SET_PIN_MEMORY is there. */
#define VHOST_BLK_CAP_PIN_MEMORY	(1ULL << 1)

/* vhost_blk_info.flags */
/* The backend takes no writes: the disk or the descriptor is read-only. */
#define VHOST_BLK_INFO_READ_ONLY	(1U << 0)
/* The backend has a volatile write cache. */
#define VHOST_BLK_INFO_WRITE_CACHE	(1U << 1)
/* The backend is a rotating disk. */
#define VHOST_BLK_INFO_ROTATIONAL	(1U << 2)
/* A backend runs (VHOST_BLK_SET_BACKEND). */
#define VHOST_BLK_INFO_RUNNING		(1U << 3)
/* The guest's memory stays pinned meanwhile. */
#define VHOST_BLK_INFO_MEMORY_PINNED	(1U << 4)

/**
 * struct vhost_blk_info - what the device and a backend can do
 * @argsz: in: size in bytes of the caller's structure; out: size of the
 *	kernel's. The kernel writes the smaller of both.
 * @fd: in: a block device or image file to ask about, or -1 for the running
 *	backend (if none runs, the backend's fields are 0)
 * @abi_version: VHOST_BLK_ABI_VERSION of the kernel
 * @flags: VHOST_BLK_INFO_*
 * @capabilities: VHOST_BLK_CAP_*
 * @capacity: sectors
 * @max_virtqueues: virtqueues of this open device
 * @max_queue_size: largest ring, in descriptors
 * @logical_block_size: bytes
 * @physical_block_size: bytes
 * @io_min: minimum I/O size, bytes
 * @io_opt: optimal I/O size, bytes; 0 for none
 * @alignment_offset: bytes
 * @max_sectors: largest I/O that the disk takes unsplit, sectors
 * @max_segments: largest count of segments that the disk takes unsplit
 * @dma_alignment: mask of the address bits that must be 0 for DMA
 * @max_discard_sectors: 0 if the disk cannot discard, or is zoned
 * @discard_granularity: bytes
 * @max_write_zeroes_sectors: 0 if the disk has no write-zeroes command, or is
 *	zoned
 * @max_secure_erase_sectors: 0 if the disk cannot erase, or is zoned
 * @zone_sectors: 0 if the disk is not zoned
 * @max_open_zones: 0 for no limit
 * @max_active_zones: 0 for no limit
 * @max_zone_append_sectors: largest VIRTIO_BLK_T_ZONE_APPEND that the device
 *	takes; 0 if the disk is not zoned
 * @nr_zones: 0 if the disk is not zoned
 * @device_bytes: memory of an open device, bytes, without its virtqueues
 * @queue_bytes: memory of each of its virtqueues, bytes, the vhost core's
 *	buffers for an owner included, without request slots
 * @slot_bytes: memory of each request slot, bytes; a ring has as many slots
 *	as descriptors, from the start of the backend to its stop
 * @zone_write_granularity: bytes; 0 if the disk is not zoned
 * @reserved32: 0
 * @reserved: 0
 */
struct vhost_blk_info {
	__u32	argsz;
	__s32	fd;
	__u32	abi_version;
	__u32	flags;
	__u64	capabilities;
	__u64	capacity;
	__u32	max_virtqueues;
	__u32	max_queue_size;
	__u32	logical_block_size;
	__u32	physical_block_size;
	__u32	io_min;
	__u32	io_opt;
	__u32	alignment_offset;
	__u32	max_sectors;
	__u32	max_segments;
	__u32	dma_alignment;
	__u32	max_discard_sectors;
	__u32	discard_granularity;
	__u32	max_write_zeroes_sectors;
	__u32	max_secure_erase_sectors;
	__u32	zone_sectors;
	__u32	max_open_zones;
	__u32	max_active_zones;
	__u32	max_zone_append_sectors;
	__u32	nr_zones;
	__u32	device_bytes;
	__u32	queue_bytes;
	__u32	slot_bytes;
	__u32	zone_write_granularity;
	__u32	reserved32;
	__u64	reserved[3];
};

/* Ask for the limits of the device and of a backend. Needs no owner. */
#define VHOST_BLK_GET_INFO		_IOWR(VHOST_VIRTIO, 0xFD, \
					      struct vhost_blk_info)

/*
 * Switch the write cache that the guest sees (virtio_blk_config.wce): 1 for
 * writeback, the default, 0 for writethrough. It holds from the next request.
 * Without VIRTIO_BLK_F_FLUSH the device always writes through.
 */
#define VHOST_BLK_SET_WRITEBACK		_IOW(VHOST_VIRTIO, 0xFC, __u32)

/*
 * Keep the guest's memory, all of VHOST_SET_MEM_TABLE, pinned while a backend
 * runs (1), or pin what each request needs (0, the default). It holds from the
 * next start. What is pinned counts as locked memory (RLIMIT_MEMLOCK); a
 * device's memory, which cannot be pinned, is left out. Not for guests with a
 * balloon or other memory that is given back while they run.
 */
#define VHOST_BLK_SET_PIN_MEMORY	_IOW(VHOST_VIRTIO, 0xFB, __u32)

#endif /* _UAPI_LINUX_VHOST_BLK_H */
