// SPDX-License-Identifier: GPL-2.0

//! What the device says about itself and its disk.

use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use vhost_blk_ring::uapi::{self, VHOST_BLK_SERIAL_LEN, feature};
use vhost_blk_ring::{Cut, Device, Options, Request, Shape, Status};

use super::check::{Check, Context, Outcome, ended, same, succeeded};
use super::shapes;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "info",
        title: "the limits that the device gives are the disk's",
        writes: false,
        run: info,
    },
    Check {
        name: "id",
        title: "the serial number is what was set, cut to the buffer",
        writes: false,
        run: id,
    },
    Check {
        name: "id-layout",
        title: "the serial number comes in any layout",
        writes: false,
        run: id_layout,
    },
    Check {
        name: "flush",
        title: "a flush succeeds, whatever sector and data it has",
        writes: false,
        run: flush,
    },
];

fn info(context: &Context<'_>) -> Result<Outcome> {
    let disk = context.disk;
    let options = context.options(1);
    let device = Device::open(&options.path)?;
    let info = device.info(Some(disk.backend().as_fd()))?;
    ensure!(
        info.abi_version >= uapi::VHOST_BLK_ABI_VERSION,
        "interface version {}",
        info.abi_version
    );
    ensure!(
        info.capacity == disk.capacity(),
        "capacity {} instead of {}",
        info.capacity,
        disk.capacity()
    );
    ensure!(
        info.logical_block_size as usize == disk.block(),
        "logical block size {} instead of {}",
        info.logical_block_size,
        disk.block()
    );
    let read_only = info.flags & uapi::VHOST_BLK_INFO_READ_ONLY != 0;
    ensure!(
        read_only == (disk.read_only() || !context.args.write),
        "read-only: {read_only}, for a descriptor that is open for {}",
        if context.args.write {
            "writing"
        } else {
            "reading"
        }
    );
    ensure!(
        info.max_queue_size >= u32::from(options.queue_size),
        "rings of up to {} descriptors",
        info.max_queue_size
    );
    let none = device.info(None)?;
    ensure!(
        none.flags & uapi::VHOST_BLK_INFO_RUNNING == 0 && none.capacity == 0,
        "a backend is there before one was set"
    );
    drop(device);
    let guest = context.guest()?;
    let running = guest.device().info(None)?;
    ensure!(
        running.flags & uapi::VHOST_BLK_INFO_RUNNING != 0 && running.capacity == disk.capacity(),
        "the running backend is not shown"
    );
    Ok(Outcome::Passed(format!(
        "{} sectors, {} queues",
        info.capacity, info.max_virtqueues
    )))
}

fn serial() -> [u8; VHOST_BLK_SERIAL_LEN] {
    *b"exercise-0123456789\0"
}

fn with_serial(context: &Context<'_>) -> Options {
    Options {
        serial: Some(serial()),
        ..context.options(1)
    }
}

fn id(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.start(&with_serial(context))?;
    let queue = guest.queue(0);
    let lengths = [20, 1, 7, 19, 21, 64, 512];
    for len in lengths {
        let done = context.run(queue, Request::get_id(len), &Shape::default())?;
        // Beyond 20 bytes nothing is written up to the status, which then does
        // not count.
        let written = len.min(VHOST_BLK_SERIAL_LEN);
        let used_len = if len <= VHOST_BLK_SERIAL_LEN {
            len + 1
        } else {
            VHOST_BLK_SERIAL_LEN
        };
        ended(&done, Status::Ok, used_len)?;
        same(&done.data[..written], &serial()[..written])?;
    }
    Ok(Outcome::Passed(format!("{} lengths", lengths.len())))
}

fn id_layout(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.start(&with_serial(context))?;
    let request = Request::get_id(VHOST_BLK_SERIAL_LEN);
    let shapes = shapes::all(&request, context.args.queue_size);
    for shape in &shapes {
        let done = context.run(guest.queue(0), request.clone(), shape)?;
        succeeded(&done)?;
        same(&done.data, &serial())?;
    }
    Ok(Outcome::Passed(format!("{} layouts", shapes.len())))
}

fn flush(context: &Context<'_>) -> Result<Outcome> {
    let mut count = 0;
    for features in [u64::MAX, !feature::CONFIG_WCE, !feature::FLUSH] {
        let mut options = context.options(1);
        options.features &= features;
        let mut guest = context.start(&options)?;
        let far = Request {
            sector: u64::MAX,
            reserved: u32::MAX,
            ..Request::flush()
        };
        let with_data = Request {
            out: vec![1; 512],
            ..Request::flush()
        };
        for request in [Request::flush(), far, with_data] {
            for cut in [Cut::Usual, Cut::Every(61)] {
                let done = context.run(guest.queue(0), request.clone(), &Shape::cut(cut))?;
                succeeded(&done)?;
                count += 1;
            }
        }
    }
    Ok(Outcome::Passed(format!("{count} flushes")))
}
