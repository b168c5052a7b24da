// SPDX-License-Identifier: GPL-2.0

//! A ring that its driver has broken.

use std::time::Duration;

use anyhow::{Result, ensure};
use vhost_blk_ring::ring::{DESC_F_NEXT, DESC_F_WRITE};
use vhost_blk_ring::{Descriptor, Queue, Request, Shape};

use super::check::{Check, Context, Outcome};

pub(crate) const CHECKS: &[Check] = &[Check {
    name: "broken-ring",
    title: "a broken ring stops its queue only, is told of, and works again after a restart",
    writes: false,
    run: broken_ring,
}];

/// A way to break a ring.
struct Fault {
    name: &'static str,
    /// With a device IOTLB nothing is wrong with it: the device waits for a translation.
    only_without_iotlb: bool,
    /// Publishes something that no good driver does.
    cause: fn(&mut Queue) -> vhost_blk_ring::Result<()>,
}

const FAULTS: &[Fault] = &[
    Fault {
        name: "a head beyond the table",
        only_without_iotlb: false,
        cause: |queue| {
            queue.ring.push_avail(queue.ring.size())?;
            queue.ring.publish().map(drop)
        },
    },
    Fault {
        name: "more entries than the ring has",
        only_without_iotlb: false,
        cause: |queue| {
            let index = queue.ring.next_avail().wrapping_add(queue.ring.size() + 1);
            queue.ring.set_avail_idx(index)
        },
    },
    Fault {
        name: "a loop",
        only_without_iotlb: false,
        cause: |queue| {
            let chain = queue.ring.take(2)?;
            let buffer = queue.ring.avail_ring().addr().0;
            for (from, to) in [(chain[0], chain[1]), (chain[1], chain[0])] {
                let descriptor = Descriptor::new(buffer, 16, DESC_F_NEXT, to);
                queue.ring.write_descriptor(from, descriptor)?;
            }
            queue.ring.add_written(chain)?;
            queue.ring.publish().map(drop)
        },
    },
    Fault {
        name: "a buffer outside of the memory",
        only_without_iotlb: true,
        cause: |queue| {
            let chain = queue.ring.take(1)?;
            let descriptor = Descriptor::new(1 << 52, 4096, DESC_F_WRITE, 0);
            queue.ring.write_descriptor(chain[0], descriptor)?;
            queue.ring.add_written(chain)?;
            queue.ring.publish().map(drop)
        },
    },
];

fn broken_ring(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.start(&context.options(2))?;
    let block = context.disk.block();
    let faults = FAULTS
        .iter()
        .filter(|fault| guest.translator().is_none() || !fault.only_without_iotlb);
    let faults: Vec<_> = faults.collect();
    for Fault { name, cause, .. } in &faults {
        cause(guest.queue(0))?;
        let ring = &guest.queue(0).ring;
        ring.kick()?;
        ensure!(
            ring.wait_err(context.timeout())?,
            "{name}: the error eventfd stays silent"
        );
        let used = ring.used_idx()?;
        // A good request on the broken ring stays where it is.
        let queue = guest.queue(0);
        queue.submit(Request::read(0, block), &Shape::default())?;
        queue.ring.kick()?;
        for _ in 0..10 {
            context.read(guest.queue(1), 0, block, &Shape::default())?;
        }
        std::thread::sleep(Duration::from_millis(10));
        ensure!(
            guest.queue(0).ring.used_idx()? == used,
            "{name}: the broken ring goes on"
        );
        // As a driver does that resets its device.
        guest.stop()?;
        for queue in guest.queues() {
            queue.reset(0)?;
        }
        guest.resume(context.disk.backend(), &[0, 0])?;
        for index in [0, 1] {
            context.read(guest.queue(index), 0, block, &Shape::default())?;
        }
    }
    Ok(Outcome::Passed(format!("{} ways", faults.len())))
}
