// SPDX-License-Identifier: GPL-2.0

//! The vhost core: a device, its virtqueues, and what completes their requests.
//!
//! C header: `drivers/vhost/vhost.h`, of the kernel that the module is built for.

mod busy_poll;
mod chain;
mod completion;
mod descriptors;
mod device;
mod direct_kick;
mod fetch;
mod iotlb;
mod log;
mod reminder;
mod request;
mod slow;
mod used_ring;
mod virtqueue;

pub(crate) use busy_poll::{busy_clock, jiffies, Turn};
pub(crate) use chain::{Completion, DescChain, Outcomes};
pub(crate) use completion::CompletionList;
pub(crate) use device::{Device, DeviceGuard};
pub(crate) use direct_kick::Callbacks;
pub(crate) use fetch::{FetchError, Idle, NotifyDisabled};
pub(crate) use reminder::Reminded;
pub(crate) use request::{
    FinishedRequest,
    Request, //
};
pub(crate) use used_ring::EventFd;
pub(crate) use virtqueue::{Operations, Virtqueue, VirtqueueGuard, MAX_QUEUE_SIZE};
