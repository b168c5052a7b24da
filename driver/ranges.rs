// SPDX-License-Identifier: GPL-2.0

//! Requests that do something to ranges of the disk, without data: discard, write zeroes, secure erase.
//!
//! Each of a guest's segments, however long, is cut into bios that the disk takes as one request each, so
//! that the worker does not wait in the block layer. A few are in flight at a time, in *rounds*: when all
//! bios of one are done, the next one follows.

use super::{
    queue::Queue,
    request::{
        Limits,
        RangeOp,
        Status,
        SECTOR_SIZE, //
    },
    segment::{
        self,
        Cut,
        Segment,
        SEGMENT_LEN, //
    },
    transfer::PAGE_SIZE, //
};
use crate::bindings::{
    block::{
        Bio,
        BioError,
        BuildError,
        Building,
        Op,
        MAX_BIO_PAGES, //
    },
    iov::UserIter,
    vhost::VirtqueueGuard, //
};
use kernel::prelude::*;

/// Sectors of a page, and of as many pages as a bio holds.
const PAGE_SECTORS: usize = PAGE_SIZE / SECTOR_SIZE as usize;
const PAGES_SECTORS: u32 = (MAX_BIO_PAGES * PAGE_SECTORS) as u32;

/// How a disk turned out not to write zeroes, although it says that it can. It is not asked again, since
/// the block layer logs each time.
#[derive(Copy, Clone, Default)]
pub(super) struct Refused {
    /// Zeroes that may be deallocated.
    unmap: bool,
    /// Zeroes that may not.
    keep: bool,
}

/// A place in the segments.
#[derive(Copy, Clone, Default)]
struct Position {
    index: usize,
    /// Sectors of that segment.
    done: u32,
}

/// What is left of such a request.
pub(super) struct Ranges {
    op: RangeOp,
    segments: KVec<Segment>,
    /// What comes next.
    next: Position,
    /// Where the last round began; `None` for that of the flush.
    round: Option<Position>,
    /// Which zeroes of the last round the disk was asked to write by itself.
    asked: Refused,
    /// The disk does not write zeroes by itself: pages of zeroes are written.
    pages: bool,
    /// A flush is to follow.
    flush: bool,
}

impl Ranges {
    /// The request whose `count` segments are at the cursor of `memory`. With `stable`, what it does is on
    /// stable storage when it is complete.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// The status to complete it with.
    pub(super) fn new(
        memory: &mut UserIter<'_>,
        op: RangeOp,
        count: usize,
        little_endian: bool,
        limits: &Limits,
        stable: bool,
    ) -> Result<Self, Status> {
        let mut segments =
            KVec::with_capacity(count, GFP_KERNEL_ACCOUNT).map_err(|_| Status::IoErr)?;
        for _ in 0..count {
            let mut bytes = [0; SEGMENT_LEN];
            if memory.copy_from(&mut bytes) < SEGMENT_LEN {
                return Err(Status::IoErr);
            }
            let segment = segment::decode(&bytes, little_endian, op, limits)?;
            segments
                .push(segment, GFP_KERNEL_ACCOUNT)
                .map_err(|_| Status::IoErr)?;
        }
        Ok(Self {
            op,
            segments,
            next: Position::default(),
            round: None,
            asked: Refused::default(),
            pages: false,
            flush: stable,
        })
    }

    /// The segment that comes next, from where on, and how many sectors of it.
    fn left(&mut self) -> Option<(Segment, u64, u32)> {
        loop {
            let segment = *self.segments.get(self.next.index)?;
            let left = segment.sectors - self.next.done;
            if left > 0 {
                let sector = segment.sector + u64::from(self.next.done);
                return Some((segment, sector, left));
            }
            self.next.index += 1;
            self.next.done = 0;
        }
    }

    /// Whether there is nothing to do, not even a flush.
    pub(super) fn is_submitted(&mut self) -> bool {
        self.left().is_none() && !self.flush
    }

    /// The next bio, of a new round if it is the `first`. `None` if there is no memory for it, or if it
    /// has to wait for the round to end.
    ///
    /// # Errors
    ///
    /// [`BuildError::Fault`] if the disk has become smaller or read-only since the request came.
    pub(super) fn next_bio<'a>(
        &mut self,
        guard: &VirtqueueGuard<'a, Queue>,
        first: bool,
    ) -> Option<Result<Bio<'a, Building>, BuildError>> {
        let Some((segment, sector, left)) = self.left() else {
            // What it makes stable is what is complete when it is submitted.
            if !first || !self.flush {
                return None;
            }
            let bio = guard.new_bio(Op::Flush, 0, 0, first)?;
            self.flush = false;
            self.round = None;
            return Some(Ok(bio));
        };
        if first {
            self.round = Some(self.next);
            self.asked = Refused::default();
        }

        let disk = guard.backend()?;
        if !disk.takes(true, sector, left.into()) {
            return Some(Err(BuildError::Fault));
        }
        let limits = disk.limits();
        // What was not 0 when the request came may be by now: then the block layer refuses the bio.
        let (op, most) = match self.op {
            RangeOp::Discard => (Op::Discard, limits.max_discard_sectors),
            RangeOp::SecureErase => (Op::SecureErase, limits.max_secure_erase_sectors),
            RangeOp::WriteZeroes => {
                let unmap = segment.unmap;
                let refused = guard.data().refused;
                let refused = if unmap { refused.unmap } else { refused.keep };
                self.pages |= refused || limits.max_write_zeroes_sectors == 0;
                if !self.pages {
                    self.asked.unmap |= unmap;
                    self.asked.keep |= !unmap;
                }
                (Op::WriteZeroes { unmap }, limits.max_write_zeroes_sectors)
            }
        };
        let in_sectors = |bytes: u32| bytes / SECTOR_SIZE as u32;
        let block = in_sectors(limits.logical_block_size);
        let cut = match self.op {
            RangeOp::WriteZeroes => Cut {
                most: if self.pages { PAGES_SECTORS } else { most },
                unit: in_sectors(limits.physical_block_size),
                boundary: limits.chunk_sectors,
                block,
                before: limits.start_sector,
            },
            RangeOp::Discard | RangeOp::SecureErase => {
                let unit = in_sectors(limits.discard_granularity).max(1);
                let beyond = in_sectors(limits.discard_alignment) % unit;
                Cut {
                    most,
                    unit,
                    boundary: 0,
                    block,
                    before: limits.start_sector + u64::from(unit - beyond),
                }
            }
        };
        let sectors = cut.len(sector, left);

        let bio = if self.pages {
            let pages = (sectors as usize).div_ceil(PAGE_SECTORS);
            let mut bio = guard.new_bio(Op::Write { fua: false }, sector, pages, first)?;
            bio.add_zeroes(sectors);
            bio
        } else {
            let mut bio = guard.new_bio(op, sector, 0, first)?;
            bio.set_range(sectors);
            bio
        };
        self.next.done += in_sectors(bio.len() as u32);
        Some(Ok(bio))
    }

    /// Whether who submits its bios may have to wait for the disk: the block layer throttles discards as
    /// it does writeback, and lets those wait who submit more than it allows, four by default.
    pub(super) fn is_throttled(&self) -> bool {
        self.op == RangeOp::Discard
    }

    /// Learns that a bio of the last round failed, with `error` if the disk said so. `Ok` if another round
    /// makes it good.
    ///
    /// As `blkdev_issue_zeroout()` does, pages of zeroes are written if the disk turns out not to write
    /// zeroes by itself. Some disks tell by failing, and offer it no longer.
    ///
    /// # Errors
    ///
    /// The status to complete the request with.
    pub(super) fn failed(
        &mut self,
        error: Option<BioError>,
        guard: &mut VirtqueueGuard<'_, Queue>,
    ) -> Result<(), Status> {
        let (Some(round), Some(error)) = (self.round, error) else {
            return Err(Status::IoErr);
        };
        if self.op != RangeOp::WriteZeroes {
            return Err(match error {
                BioError::Unsupported => Status::Unsupp,
                _ => Status::IoErr,
            });
        }
        let disk = guard.backend().map(|disk| disk.limits());
        let offered = disk.is_some_and(|limits| limits.max_write_zeroes_sectors != 0);
        let Refused { unmap, keep } = self.asked;
        if !(unmap || keep) || (error != BioError::Unsupported && offered) {
            return Err(Status::IoErr);
        }
        let refused = &mut guard.data_mut().refused;
        refused.unmap |= unmap;
        refused.keep |= keep;
        self.pages = true;
        self.next = round;
        Ok(())
    }

    /// Leaves out what comes next, but for the flush. A discard is advice, of which any part may be ignored.
    ///
    /// # Errors
    ///
    /// The status to complete the request with, if it had to be done.
    pub(super) fn leave_out(&mut self) -> Result<(), Status> {
        if self.left().is_none() {
            return Ok(());
        }
        if self.op != RangeOp::Discard {
            return Err(Status::IoErr);
        }
        self.next.index = self.segments.len();
        Ok(())
    }
}
