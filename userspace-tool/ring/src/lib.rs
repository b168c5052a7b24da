// SPDX-License-Identifier: GPL-2.0

//! Plays the guest on `/dev/vhost-blk`, without a guest.
//!
//! A program that uses this crate does what a virtual machine monitor and the
//! virtio-blk driver of a guest do together: it owns the guest's memory, sets
//! up virtqueues in it, hands both to the kernel, and then adds descriptor
//! chains, kicks, and takes completions off the used ring.
//!
//! From the bottom up:
//!
//! - [`uapi`]: numbers and structures of the kernel's interface.
//! - [`device`]: [`Device`], the open device node and its ioctls, correct ones
//!   and wrong ones.
//! - [`memory`]: [`Memory`], the guest's memory, and an allocator for it.
//! - [`ring`]: [`Ring`], the driver's side of one split virtqueue. It can also
//!   write anything else that a hostile guest could write.
//! - [`request`]: virtio-blk requests, cut into descriptors in any way.
//! - [`queue`]: [`Queue`], a ring with requests in flight on it.
//! - [`iotlb`]: the device IOTLB, and [`Translator`], which answers its misses.
//! - [`guest`]: [`Guest`], a device with its memory and all its queues, started
//!   and stopped as a whole.
//! - [`aligned`]: memory for the host's own direct I/O on the disk.
//!
//! And to measure instead of testing:
//!
//! - [`driver`]: [`Driver`], a ring's fast path: requests of one size in slots
//!   that are written beforehand, nothing allocated from then on.
//! - [`vhost_user`]: [`VhostUserGuest`], the same guest on a vhost-user server.
//! - [`uring`]: [`Uring`], the same requests on the host's own io_uring.
//!
//! ```no_run
//! use std::fs::File;
//! use std::time::Duration;
//! use vhost_blk_ring::{Guest, Options, Request, Shape, Status};
//!
//! # fn main() -> vhost_blk_ring::Result<()> {
//! let disk = File::open("/dev/nullb0").expect("a block device");
//! let mut guest = Guest::new(&Options::default())?;
//! guest.start(&disk)?;
//! let queue = guest.queue(0);
//! queue.submit(Request::read(0, 4096), &Shape::default())?;
//! queue.kick()?;
//! let done = queue.wait(Duration::from_secs(10))?;
//! assert_eq!(done.status, Status::Ok);
//! assert_eq!(done.used_len, 4096 + 1);
//! # Ok(())
//! # }
//! ```

pub mod aligned;
pub mod device;
pub mod driver;
mod error;
pub mod guest;
pub mod iotlb;
pub mod memory;
pub mod queue;
pub mod request;
pub mod ring;
#[expect(unsafe_code, reason = "the one module of the workspace that has it")]
mod sys;
pub mod uapi;
pub mod uring;
pub mod vhost_user;

pub use aligned::Aligned;
pub use device::{Device, RawArg, WorkerMode};
pub use driver::{Driver, Op, Slots};
pub use error::{Error, Result};
pub use guest::{Guest, Options, Workers};
pub use iotlb::{Counts, Iotlb, Translator};
pub use memory::{Buffer, Memory, Protection};
pub use queue::Queue;
pub use request::{Completion, Cut, Kind, Range, Request, Shape, Status, Zone};
pub use ring::{Descriptor, Parts, Ring, Segment, Table, Used};
pub use sys::{event_descriptor, report_zones, write_and_close};
pub use uring::Uring;
pub use vhost::VhostUserMemoryRegionInfo as Region;
pub use vhost_user::VhostUserGuest;
pub use vm_memory::GuestAddress;
