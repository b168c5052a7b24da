// SPDX-License-Identifier: GPL-2.0

//! Requests that the device has to refuse, by themselves and not by breaking
//! the queue.

use anyhow::{Context as _, Result};
use vhost_blk_ring::{Cut, Queue, Request, Shape, Status, Table};

use super::check::{Check, Context, Outcome, describe, ended, refused, succeeded};

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "bounds",
        title: "reads beyond the end of the disk are refused, however far",
        writes: false,
        run: bounds,
    },
    Check {
        name: "block-size",
        title: "reads that are no whole blocks are refused",
        writes: false,
        run: block_size,
    },
    Check {
        name: "zero-length",
        title: "reads and writes of nothing succeed",
        writes: false,
        run: zero_length,
    },
    Check {
        name: "unknown-type",
        title: "unknown types are answered as unsupported",
        writes: false,
        run: unknown_type,
    },
    Check {
        name: "short-header",
        title: "headers that are too short are refused",
        writes: false,
        run: short_header,
    },
];

fn refuse(
    context: &Context<'_>,
    queue: &mut Queue,
    requests: Vec<Request>,
    status: Status,
) -> Result<usize> {
    let mut count = 0;
    for request in requests {
        for table in [Table::Direct, Table::Indirect] {
            let shape = Shape::default().table(table);
            let done = context.run(queue, request.clone(), &shape)?;
            refused(&done, status).with_context(|| describe(&request, &shape))?;
            count += 1;
        }
        // And the queue goes on.
        context.read(queue, 0, context.disk.block(), &Shape::default())?;
    }
    Ok(count)
}

fn bounds(context: &Context<'_>) -> Result<Outcome> {
    let disk = context.disk;
    let (capacity, block) = (disk.capacity(), disk.block());
    let sectors = disk.block_sectors();
    let far = [
        capacity,
        capacity + sectors,
        1 << 40,
        // These overflow in bytes, or as a signed number of them, or when the
        // length is added.
        1 << 54,
        1 << 55,
        (1 << 55) - sectors,
        (1 << 63) - sectors,
        1 << 63,
        u64::MAX - sectors + 1,
    ];
    let mut requests: Vec<_> = far
        .into_iter()
        .filter(|&sector| sector >= capacity)
        .map(|sector| Request::read(sector, block))
        .collect();
    requests.push(Request::read(capacity - sectors, 2 * block));
    requests.push(Request::read(capacity - sectors, 1 << 20));
    let mut guest = context.guest()?;
    let count = refuse(context, guest.queue(0), requests, Status::IoErr)?;
    Ok(Outcome::Passed(format!("{count} requests")))
}

fn block_size(context: &Context<'_>) -> Result<Outcome> {
    let block = context.disk.block();
    let mut requests: Vec<_> = [1, 7, 511, 513, block - 1, block + 1, 2 * block + 5]
        .into_iter()
        .map(|len| Request::read(0, len))
        .collect();
    if block > 512 {
        requests.extend([
            Request::read(0, 512),
            Request::read(0, block + 512),
            Request::read(1, block),
            Request::read(context.disk.block_sectors() - 1, block),
        ]);
    }
    let mut guest = context.guest()?;
    let count = refuse(context, guest.queue(0), requests, Status::IoErr)?;
    Ok(Outcome::Passed(format!("{count} requests")))
}

fn zero_length(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    let mut requests = vec![Request::read(0, 0)];
    if context.args.write {
        requests.push(Request::write(0, Vec::new()));
    }
    for request in requests {
        for _ in 0..10 {
            let done = context.run(queue, request.clone(), &Shape::default())?;
            succeeded(&done).with_context(|| describe(&request, &Shape::default()))?;
        }
        context.read(queue, 0, context.disk.block(), &Shape::default())?;
    }
    Ok(Outcome::Passed("10 requests each".into()))
}

fn unknown_type(context: &Context<'_>) -> Result<Outcome> {
    let numbers = [2, 3, 5, 6, 7, 9, 10, 12, 27, 99, 0x8000_0000, u32::MAX];
    let mut requests = Vec::new();
    for number in numbers {
        requests.extend([
            Request::other(number, 0, vec![0; 512], 0),
            Request::other(number, 0, Vec::new(), 512),
            Request::other(number, u64::MAX, Vec::new(), 0),
            Request::other(number, 0, vec![0; 7], 3),
        ]);
    }
    let mut guest = context.guest()?;
    let count = refuse(context, guest.queue(0), requests, Status::Unsupported)?;
    Ok(Outcome::Passed(format!("{count} requests")))
}

fn short_header(context: &Context<'_>) -> Result<Outcome> {
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    let mut count = 0;
    for len in [0, 1, 8, 15] {
        for cut in [Cut::Usual, Cut::Header(2)] {
            let request = Request::read(0, 512).with_header_len(len);
            let shape = Shape::cut(cut);
            let done = context.run(queue, request.clone(), &shape)?;
            refused(&done, Status::IoErr).with_context(|| describe(&request, &shape))?;
            // The status byte alone: there is nothing before it.
            let bare = Request::flush().with_header_len(len);
            let done = context.run(queue, bare.clone(), &shape)?;
            ended(&done, Status::IoErr, 1).with_context(|| describe(&bare, &shape))?;
            count += 2;
        }
        context.read(queue, 0, context.disk.block(), &Shape::default())?;
    }
    Ok(Outcome::Passed(format!("{count} requests")))
}
