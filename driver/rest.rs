// SPDX-License-Identifier: GPL-2.0

//! The data of a request: how it is put into bios, and what does not fit the first ones.

use super::{
    queue::{
        InFlight,
        Queue, //
    },
    ranges::Ranges,
    request::{
        Status,
        SECTOR_SIZE, //
    },
    transfer::{
        plan,
        Plan,
        PAGE_SIZE, //
    },
    zone::Report,
};
use crate::bindings::{
    block::{
        Bio,
        BioError,
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
use kernel::{
    prelude::*,
    time::Delta, //
};

/// For how long requests go on after a stop that are more than their bios in flight.
///
/// User space offers limits with which ranges are a round or two. This is for those that are more
/// because their disk refused to write zeroes, and for reports of many zones.
pub(super) const GRACE: Delta = Delta::from_secs(5);

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

    /// Copies memory that one bio would not hold otherwise.
    pub(super) fn bounced() -> Self {
        Self {
            plan: Plan::Bounce,
            dma_alignment: 0,
        }
    }

    /// How many pieces of pages it is, if it fits one bio without being copied.
    pub(super) fn single(self) -> Option<usize> {
        match self.plan {
            Plan::Single(pages) => Some(pages),
            Plan::Split | Plan::Bounce => None,
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

/// What is left to do for a request when its bios are done.
pub(super) enum Rest {
    /// Data that does not fit the first bio.
    Data(Data),
    /// Ranges of the disk.
    Ranges(Ranges),
    /// Zones to report.
    Report(Report),
}

impl Rest {
    /// `left` bytes of a request's data, with `memory`'s cursor where [`Data`] has it.
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
        let data = Data {
            memory: memory.to_owned(memory.remaining())?,
            op,
            sector,
            left,
            how,
        };
        Ok(KBox::new(Self::Data(data), GFP_KERNEL_ACCOUNT)?)
    }

    /// Whether all of it was submitted.
    pub(super) fn is_submitted(&mut self) -> bool {
        match self {
            Self::Data(data) => data.left == 0,
            Self::Ranges(ranges) => ranges.is_submitted(),
            Self::Report(report) => report.is_complete(),
        }
    }

    /// Copies what a bio read to the guest, if it bounced.
    pub(super) fn copy(&mut self, bio: &Bio<'_, Finished>) -> Result<(), BuildError> {
        match self {
            Self::Data(data) if data.how.bounces() => {
                data.memory.with(|memory| bio.copy_bounced(memory))
            }
            _ => Ok(()),
        }
    }

    /// Learns that its bios failed, with `error` if the disk said so. `Ok` if it goes on all the same.
    ///
    /// # Errors
    ///
    /// The status to complete the request with: `failure` if it has data.
    pub(super) fn failed(
        &mut self,
        error: Option<BioError>,
        failure: Status,
        guard: &mut VirtqueueGuard<'_, Queue>,
    ) -> Result<(), Status> {
        match self {
            Self::Data(_) => Err(failure),
            Self::Ranges(ranges) => ranges.failed(error, guard),
            Self::Report(_) => Err(Status::IoErr),
        }
    }

    /// How much it is to resume it, next to others.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Data(_) => 1,
            // What a disk without queue does is done by the worker, however much it is.
            Self::Ranges(_) => 32,
            // Its piece was copied to the guest just before.
            Self::Report(_) => 8,
        }
    }

    /// Whether who submits its bios may have to wait for the disk.
    fn is_throttled(&self) -> bool {
        matches!(self, Self::Ranges(ranges) if ranges.is_throttled())
    }

    /// Leaves out what comes next if the device was stopped too long ago: nobody waits for hours for what
    /// a guest asked. While requests are waited for to switch logging on, they go on.
    ///
    /// # Errors
    ///
    /// The status to complete the request with, if it had to be done.
    fn mind_stop(&mut self, guard: &VirtqueueGuard<'_, Queue>) -> Result<(), Status> {
        if guard.stopped_for().is_none_or(|time| time < GRACE) {
            return Ok(());
        }
        match self {
            // Its length is bounded.
            Self::Data(_) => Ok(()),
            Self::Ranges(ranges) => ranges.leave_out(),
            Self::Report(_) => Err(Status::IoErr),
        }
    }

    /// The next bio of the request, of which there are others unless it is the `first`; `None` if there
    /// is no memory for it now, or it has to wait for the others.
    fn next_bio<'a>(
        &mut self,
        guard: &VirtqueueGuard<'a, Queue>,
        first: bool,
    ) -> Option<Result<Bio<'a, Building>, BuildError>> {
        match self {
            Self::Data(data) => data.next_bio(guard, first),
            Self::Ranges(ranges) => ranges.next_bio(guard, first),
            Self::Report(_) => None,
        }
    }
}

/// The part of a request's data that does not fit its first bio.
pub(super) struct Data {
    /// Where it is: behind what was submitted, but for reads that bounce behind what was copied.
    memory: OwnedUserIter,
    op: Op,
    /// Where on the disk the next bio begins.
    sector: u64,
    /// Bytes that were not submitted yet.
    left: usize,
    how: Fill,
}

impl Data {
    /// The next bio of the request, or `None` if there is no memory for it now.
    ///
    /// # Errors
    ///
    /// [`BuildError::Fault`] also if the disk has become smaller or read-only since the request came.
    fn next_bio<'a>(
        &mut self,
        guard: &VirtqueueGuard<'a, Queue>,
        first: bool,
    ) -> Option<Result<Bio<'a, Building>, BuildError>> {
        let disk = guard.backend()?;
        let left = self.left as u64 / SECTOR_SIZE;
        if !disk.takes(self.op != Op::Read, self.sector, left) {
            return Some(Err(BuildError::Fault));
        }
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
    if most_bios(request.data()) > 1 {
        add_bios(guard, request, 1);
    }
}

/// How many bios of a request may be in flight.
fn most_bios(in_flight: &InFlight) -> usize {
    // Data that bounces goes one bio at a time: the next is filled when the last was copied. So does what is
    // written to a sequential zone: if one fails, the next is not written at a wrong place.
    if in_flight.bounces || in_flight.zone.is_ordered() {
        1
    } else {
        MAX_BIOS
    }
}

/// Adds bios to a request that has `count`. Returns how many it has then.
fn add_bios(
    guard: &VirtqueueGuard<'_, Queue>,
    request: &mut Request<'_, Queue>,
    mut count: usize,
) -> usize {
    let most = most_bios(request.data());
    while count < most {
        let Some(rest) = request.data().rest.as_mut() else {
            break;
        };
        if rest.is_submitted() {
            break;
        }
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

/// Goes on with a request whose last bios are done: submits the next ones, or asks for more zones. If there
/// is no memory for any bio, it is put aside.
///
/// Returns whether it was submitted.
pub(super) fn resume(
    guard: &mut VirtqueueGuard<'_, Queue>,
    mut request: Request<'_, Queue>,
) -> bool {
    let rest = request.data().rest.as_mut();
    if rest.is_some_and(|rest| rest.mind_stop(guard).is_err()) {
        request.fail();
    }
    let rest = request.data().rest.as_deref();
    if matches!(rest, Some(Rest::Report(_))) && !request.failed() {
        request.submit_slow();
        return true;
    }
    // What has failed by then gets no more bios.
    let count = if request.failed() {
        0
    } else {
        add_bios(guard, &mut request, 0)
    };
    let rest = request.data().rest.as_mut();
    let waits = count == 0 && rest.is_some_and(|rest| !rest.is_submitted());
    // With no bio, but a failure or nothing left to do, it is submitted too: that completes it.
    if waits && !request.failed() {
        guard.defer(request);
        return false;
    }
    let rest = request.data().rest.as_deref();
    let throttled = rest.is_some_and(Rest::is_throttled);
    match guard.share_backend() {
        Some(backend) if throttled => {
            request.submit_by(&guard.data().settings.submitter, backend);
        }
        _ => request.submit(),
    }
    true
}
