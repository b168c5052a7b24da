// SPDX-License-Identifier: GPL-2.0

//! The data of a request: how it is put into bios, and what does not fit the first.

use super::{
    queue::Queue,
    request::SECTOR_SIZE,
    transfer::{
        plan,
        Plan,
        PAGE_SIZE, //
    },
};
use crate::bindings::{
    block::{
        Bio,
        BuildError,
        Building,
        Finished,
        Op,
        MAX_BIO_PAGES, //
    },
    iov::{
        OwnedUserIter,
        UserIter, //
    },
    vhost::{
        Request,
        VirtqueueGuard, //
    },
};
use kernel::prelude::*;

/// Bytes that one request bounces at a time.
const BOUNCE_LEN: usize = 256 << 10;

/// Bios of one request that are in flight at the same time.
const MAX_BIOS: usize = 4;

/// How a request's memory gets into bios.
#[derive(Copy, Clone)]
pub(super) struct Fill {
    plan: Plan,
    dma_alignment: u32,
}

impl Fill {
    /// How `memory`, all of a request's, gets into bios.
    pub(super) fn new(memory: &UserIter<'_>, dma_alignment: u32, logical_block_size: u32) -> Self {
        Self {
            plan: plan(
                memory.segments(),
                dma_alignment,
                logical_block_size,
                MAX_BIO_PAGES,
            ),
            dma_alignment,
        }
    }

    /// Whether it is copied.
    pub(super) fn bounces(self) -> bool {
        self.plan == Plan::Bounce
    }

    /// How many pieces of pages a bio should have room for, with `left` bytes to come.
    pub(super) fn pages(self, left: usize) -> usize {
        match self.plan {
            Plan::Single(pages) => pages,
            Plan::Split => MAX_BIO_PAGES,
            Plan::Bounce => left.min(BOUNCE_LEN).div_ceil(PAGE_SIZE),
        }
    }

    /// Puts data into a bio from `memory`'s cursor on. Context: may sleep.
    ///
    /// # Errors
    ///
    /// See [`BuildError`].
    pub(super) fn fill(
        self,
        bio: &mut Bio<'_, Building>,
        memory: &mut UserIter<'_>,
    ) -> Result<(), BuildError> {
        if self.bounces() {
            let len = memory.remaining().min(BOUNCE_LEN);
            bio.bounce(memory, len)
        } else {
            bio.pin(memory, self.dma_alignment)
        }
    }
}

/// The part of a request that does not fit its first bio.
pub(super) struct Rest {
    /// Where the data is: behind what was submitted, but for reads that bounce behind what was
    /// copied.
    memory: OwnedUserIter,
    op: Op,
    /// Where on the disk the next bio begins.
    sector: u64,
    /// Bytes that were not submitted yet.
    left: usize,
    how: Fill,
}

impl Rest {
    /// `left` bytes of a request, with `memory`'s cursor where [`Rest`] has it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. Context: may sleep.
    pub(super) fn new(
        memory: &UserIter<'_>,
        op: Op,
        sector: u64,
        left: usize,
        how: Fill,
    ) -> Result<KBox<Self>> {
        let rest = Self {
            memory: memory.to_owned()?,
            op,
            sector,
            left,
            how,
        };
        Ok(KBox::new(rest, GFP_KERNEL_ACCOUNT)?)
    }

    /// Whether all of it was submitted.
    pub(super) fn is_submitted(&self) -> bool {
        self.left == 0
    }

    /// Copies what a bio read to the guest, if it bounced.
    pub(super) fn copy(&mut self, bio: &Bio<'_, Finished>) -> Result<(), BuildError> {
        if !self.how.bounces() {
            return Ok(());
        }
        self.memory.with(|memory| bio.copy_bounced(memory))
    }

    /// The next bio of the request, or `None` if there is no memory for it now.
    fn next_bio<'a>(
        &mut self,
        guard: &VirtqueueGuard<'a, Queue>,
        first: bool,
    ) -> Option<Result<Bio<'a, Building>, BuildError>> {
        let how = self.how;
        let mut bio = guard.new_bio(self.op, self.sector, how.pages(self.left), first)?;

        match self.memory.with(|memory| how.fill(&mut bio, memory)) {
            Err(BuildError::NoMemory) => None,
            Err(fault) => Some(Err(fault)),
            Ok(()) => {
                self.sector += bio.len() as u64 / SECTOR_SIZE;
                self.left -= bio.len();
                Some(Ok(bio))
            }
        }
    }
}

/// Adds bios to a request that has one already and more data, as far as memory goes.
pub(super) fn extend(guard: &VirtqueueGuard<'_, Queue>, request: &mut Request<'_, Queue>) {
    // Data that bounces goes one bio at a time: the next is filled when the last was copied.
    if !request.data().bounces {
        add_bios(guard, request, 1);
    }
}

/// Adds bios to a request that has `count`. Returns how many it has then.
fn add_bios(
    guard: &VirtqueueGuard<'_, Queue>,
    request: &mut Request<'_, Queue>,
    mut count: usize,
) -> usize {
    let most = if request.data().bounces { 1 } else { MAX_BIOS };
    while count < most {
        let rest = request.data().rest.as_mut();
        let Some(rest) = rest.filter(|rest| !rest.is_submitted()) else {
            break;
        };
        match rest.next_bio(guard, count == 0) {
            None => break,
            Some(Err(_)) => {
                request.fail();
                break;
            }
            Some(Ok(bio)) => request.add(guard, bio),
        }
        count += 1;
    }
    count
}

/// Submits the next bios of a request whose last ones are done. If there is no memory for any, it
/// is put aside.
///
/// Returns whether it was submitted.
pub(super) fn resume(
    guard: &mut VirtqueueGuard<'_, Queue>,
    mut request: Request<'_, Queue>,
) -> bool {
    // With no bio, but a failure, it is submitted too: that completes it.
    if add_bios(guard, &mut request, 0) == 0 && !request.failed() {
        guard.defer(request);
        return false;
    }
    request.submit();
    true
}
