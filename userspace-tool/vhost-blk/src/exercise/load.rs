// SPDX-License-Identifier: GPL-2.0

//! A random load on a queue, with a check of every answer.

use std::collections::HashMap;

use anyhow::{Context as _, Result, ensure};
use rand::RngExt;
use rand::rngs::StdRng;
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::{Completion, Error, Kind, Queue, Request, Shape};

use super::check::{Context, describe, same, succeeded};
use super::shapes;

/// Longest request of a load, bytes.
const MAX_LEN: usize = 64 << 10;
/// Most segments of a request of a load, if the ring is large enough for that.
const MAX_SEGMENTS: usize = 48;

/// A piece of the disk with at most one request in flight, so that the order in
/// which requests complete does not matter.
#[derive(Debug)]
struct Lane {
    sector: u64,
    blocks: u64,
    /// What is on it, if the load writes.
    image: Option<Vec<u8>>,
    busy: bool,
}

/// A random load on one queue.
#[derive(Debug)]
pub(crate) struct Load<'a> {
    context: &'a Context<'a>,
    rng: StdRng,
    lanes: Vec<Lane>,
    /// By head: the lane and the shape of each request in flight.
    pending: HashMap<u16, (usize, Shape)>,
    completed: usize,
    submitted: usize,
    max_segments: usize,
}

impl<'a> Load<'a> {
    /// Reads from anywhere on the disk, with `depth` requests at a time.
    pub(crate) fn reads(context: &'a Context<'a>, rng: StdRng, depth: usize) -> Self {
        let blocks = context.disk.capacity() / context.disk.block_sectors();
        let lanes = (0..depth)
            .map(|_| Lane {
                sector: 0,
                blocks,
                image: None,
                busy: false,
            })
            .collect();
        Self::new(context, rng, lanes)
    }

    /// Reads and writes of slice number `index` of `count` of the region that
    /// may be overwritten, with `depth` requests at a time.
    pub(crate) fn writes(
        context: &'a Context<'a>,
        rng: StdRng,
        depth: usize,
        index: usize,
        count: usize,
    ) -> Result<Self> {
        let disk = context.disk;
        let depth = depth.min(context.region.len / disk.block() / count).max(1);
        let blocks = context.region.len / disk.block() / (count * depth);
        ensure!(blocks > 0, "the region is too small for {count} queues");
        let lanes = (0..depth)
            .map(|lane| {
                let first = (index * depth + lane) * blocks;
                let sector = context.region.sector() + first as u64 * disk.block_sectors();
                Ok(Lane {
                    sector,
                    blocks: blocks as u64,
                    image: Some(disk.read(sector, blocks * disk.block())?),
                    busy: false,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self::new(context, rng, lanes))
    }

    fn new(context: &'a Context<'a>, rng: StdRng, lanes: Vec<Lane>) -> Self {
        Load {
            context,
            rng,
            lanes,
            pending: HashMap::new(),
            completed: 0,
            submitted: 0,
            max_segments: MAX_SEGMENTS.min(usize::from(context.args.queue_size) / 2),
        }
    }

    /// Requests that are complete and right.
    pub(crate) fn completed(&self) -> usize {
        self.completed
    }

    /// Gives every idle lane a request, up to `total` requests in all, as far as
    /// the ring has room, and kicks.
    pub(crate) fn fill(&mut self, queue: &mut Queue, total: usize) -> Result<()> {
        for index in 0..self.lanes.len() {
            if self.lanes[index].busy || self.submitted == total {
                continue;
            }
            let request = self.request(index);
            let shape = shapes::random(&mut self.rng, &request, self.max_segments);
            let head = match queue.submit(request.clone(), &shape) {
                Ok(head) => head,
                Err(Error::RingFull { .. }) => break,
                Err(error) => return Err(error).context(describe(&request, &shape)),
            };
            let lane = &mut self.lanes[index];
            if let (Kind::Out, Some(image)) = (request.kind, &mut lane.image) {
                let at = offset(lane.sector, request.sector);
                image[at..at + request.out.len()].copy_from_slice(&request.out);
            }
            lane.busy = true;
            self.pending.insert(head, (index, shape));
            self.submitted += 1;
        }
        Ok(queue.kick()?)
    }

    /// Waits for one request, and checks it.
    pub(crate) fn wait(&mut self, queue: &mut Queue) -> Result<()> {
        let done = queue
            .wait(self.context.timeout())
            .with_context(|| format!("{} requests in flight", self.pending.len()))?;
        self.check(&done)
    }

    /// Checks all requests that are complete.
    pub(crate) fn poll(&mut self, queue: &mut Queue) -> Result<()> {
        while let Some(done) = queue.poll()? {
            self.check(&done)?;
        }
        Ok(())
    }

    /// Runs `total` requests in all to their end.
    pub(crate) fn run(&mut self, queue: &mut Queue, total: usize) -> Result<()> {
        while self.completed < total {
            self.fill(queue, total)?;
            self.wait(queue)?;
            self.poll(queue)?;
        }
        Ok(())
    }

    /// Compares all lanes that were written to with the disk.
    pub(crate) fn compare(&self) -> Result<()> {
        for lane in &self.lanes {
            if let Some(image) = &lane.image {
                let found = self.context.disk.read(lane.sector, image.len())?;
                same(&found, image)
                    .with_context(|| format!("on the disk, from sector {} on", lane.sector))?;
            }
        }
        Ok(())
    }

    fn request(&mut self, index: usize) -> Request {
        let lane = &self.lanes[index];
        let block = self.context.disk.block();
        let most = MAX_LEN / block;
        let most = most.min(usize::try_from(lane.blocks).unwrap_or(most));
        let blocks = self.rng.random_range(1..=most);
        let first = self.rng.random_range(0..=lane.blocks - blocks as u64);
        let sector = lane.sector + first * self.context.disk.block_sectors();
        let len = blocks * block;
        match self.rng.random_range(0..10) {
            0 => Request::flush(),
            1..=5 if lane.image.is_some() => {
                Request::write(sector, shapes::noise(&mut self.rng, len))
            }
            _ => Request::read(sector, len),
        }
    }

    fn check(&mut self, done: &Completion) -> Result<()> {
        let (index, shape) = self
            .pending
            .remove(&done.head)
            .context("a request that this load did not make")?;
        let request = &done.request;
        let lane = &mut self.lanes[index];
        lane.busy = false;
        self.completed += 1;
        let context = self.context;
        match (request.kind, &lane.image) {
            (Kind::In, Some(image)) => succeeded(done).and_then(|()| {
                let at = offset(lane.sector, request.sector);
                let expected = &image[at..at + request.in_len];
                same(&done.data, expected).with_context(|| {
                    match context.disk.read(request.sector, request.in_len) {
                        Ok(found) if found == expected => "the disk has what was written",
                        Ok(found) if found == done.data => "the disk has what was read",
                        Ok(_) => "the disk has something else",
                        Err(_) => "the disk cannot be read",
                    }
                })
            }),
            (Kind::In, None) => context.matches_disk(done),
            _ => succeeded(done),
        }
        .with_context(|| format!("request {}: {}", self.completed, describe(request, &shape)))
    }
}

/// Bytes from sector `from` to sector `to` of a lane.
fn offset(from: u64, to: u64) -> usize {
    usize::try_from(to - from).expect("a lane is in memory") * SECTOR_SIZE
}
