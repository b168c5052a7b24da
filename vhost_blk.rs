// SPDX-License-Identifier: GPL-2.0

//! vhost-blk: serves a guest's virtio-blk disk from a block device of the host, in the kernel.

use kernel::prelude::*;

mod bindings;
mod driver;

module! {
    type: VhostBlk,
    name: "vhost_blk",
    authors: ["The vhost-blk developers"],
    description: "Host kernel accelerator for virtio block devices",
    license: "GPL",
    params: {
        max_virtqueues: u32 {
            default: 64,
            description: "Virtqueues of each open device, 1 to 64",
        },
        direct_submission: u32 {
            default: 1,
            description: "Submit small requests in the task that kicks, without a worker: 0 off, 1 on",
        },
        direct_completion: u32 {
            default: 1,
            description: "Complete requests where the disk does, without a worker: 0 off, 1 on",
        },
        coalesce_kicks: u32 {
            default: 1,
            description: "Ask a guest that goes on adding requests to kick for several: 0 off, 1 on",
        },
    },
}

/// The loaded module.
#[pin_data]
struct VhostBlk {
    #[pin]
    node: bindings::chardev::Registration<driver::Device>,
    // Dropped when no device can be opened any more.
    _callbacks: bindings::vhost::Callbacks,
    // Dropped last, so that its line in the log is the last one.
    _announcement: Announcement,
}

impl kernel::InPlaceModule for VhostBlk {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            node <- bindings::chardev::Registration::new(c"vhost-blk", module),
            _callbacks: bindings::vhost::Callbacks,
            _announcement: Announcement::new(),
        }? Error)
    }
}

/// Says in the kernel's log that the module came, and that it went.
struct Announcement;

impl Announcement {
    fn new() -> Self {
        pr_info!("loaded, /dev/vhost-blk is ready\n");
        Self
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        pr_info!("unloaded\n");
    }
}
