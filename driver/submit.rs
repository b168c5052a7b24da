// SPDX-License-Identifier: GPL-2.0

//! From a descriptor chain to bios in flight.

use super::{
    queue::{
        InFlight,
        Queue,
        BYTE_WEIGHT,
        WEIGHT, //
    },
    ranges::Ranges,
    request::{
        self,
        Limits,
        RangeOp,
        Request,
        Status,
        HEADER_LEN,
        SECTOR_SIZE, //
    },
    rest::{
        self,
        Fill,
        Rest, //
    },
    transfer::PAGE_SIZE,
    zone::{
        self,
        InZone, //
    },
    zone_request, //
};
use crate::bindings::{
    block::{
        Backend,
        Bio,
        BuildError,
        Building,
        Op,
        Plug, //
    },
    iov::{
        PageBytes,
        UserIter, //
    },
    uapi::{
        feature,
        SERIAL_LEN, //
    },
    vhost::{
        DescChain,
        FetchError,
        NotifyDisabled,
        Outcomes,
        VirtqueueGuard, //
    },
};
use kernel::prelude::*;

/// Requests of one virtqueue that may be bounced at the same time, which bounds the memory that a
/// guest can make the host allocate.
const MAX_BOUNCING: usize = 16;

/// Requests that are submitted before completions are looked at. The block layer gives what is
/// plugged to the disk after as many.
const TURN: usize = 32;

/// After how many requests the task that kicks leaves those that are still in the ring to the worker.
const DIRECT_WEIGHT: usize = 2 * TURN;

/// After more than how many bytes it does.
const DIRECT_BYTE_WEIGHT: usize = 512 << 10;

/// The largest request that it submits, in bytes, and in pieces of pages.
const DIRECT_LEN: usize = 128 << 10;
const DIRECT_PAGES: usize = DIRECT_LEN / PAGE_SIZE + 1;

const _: () = assert!(
    DIRECT_WEIGHT <= WEIGHT as usize && DIRECT_BYTE_WEIGHT < BYTE_WEIGHT as usize,
    "it submits more than the worker does in one turn"
);

/// What no zoned disk has: the block layer does none of it to a zone that is written sequentially, and the
/// specification has DISCARD offered for no host-managed disk. Guests reset zones.
const RANGES: u64 = 1 << feature::DISCARD | 1 << feature::WRITE_ZEROES | 1 << feature::SECURE_ERASE;

/// What was submitted for a kick.
#[derive(Copy, Clone, Default)]
pub(super) struct Batch {
    pub(super) requests: usize,
    pub(super) bytes: usize,
    /// The next one was not for the task that kicked.
    pub(super) refused: bool,
}

/// Why a batch ended.
pub(super) enum End {
    /// The ring is empty, or was when it was last looked at.
    Empty,
    /// It is time to look at completions.
    Turn,
    /// Enough was done for this virtqueue: the worker comes, or is let come back.
    Weight,
    /// The next request is for the worker.
    ForWorker,
    /// There is no memory for the next request until another completes.
    NoMemory,
    /// An address is not in the device IOTLB.
    NoTranslation,
    /// The guest broke the ring.
    Broken,
}

/// Fetches chains and submits their requests, plugged if there are several.
pub(super) fn batch(
    ring: &mut NotifyDisabled<'_, '_, Queue>,
    batch: &mut Batch,
    plug: &Plug,
) -> End {
    for number in 0..TURN {
        let much = batch.requests >= DIRECT_WEIGHT || batch.bytes > DIRECT_BYTE_WEIGHT;
        if much && (ring.guard().must_not_wait() || is_enough(ring, batch)) {
            return End::Weight;
        }
        let chain = match ring.next_chain() {
            Ok(Some(chain)) => chain,
            Ok(None) => return End::Empty,
            Err(FetchError::Again) => return End::NoTranslation,
            Err(FetchError::NoMemory) => return End::NoMemory,
            Err(FetchError::Broken) => return End::Broken,
        };
        let guard = chain.guard();
        let more = guard.waiting();
        let alone = number == 0 && more == 0;
        if !alone || guard.backend().is_some_and(Backend::has_scheduler) {
            plug.start((1 + more).min(TURN - number));
        }
        match submit(chain) {
            Outcome::Submitted(bytes) => {
                batch.requests += 1;
                batch.bytes = batch.bytes.saturating_add(bytes);
            }
            Outcome::ForWorker => {
                batch.refused = true;
                return End::ForWorker;
            }
            Outcome::NoMemory => return End::NoMemory,
            Outcome::Broken => return End::Broken,
        }
        if alone {
            // Whoever lets the guest kick again looks at the ring after that.
            return End::Empty;
        }
    }
    End::Turn
}

/// Whether so much was done for this virtqueue that the worker's turn is over.
fn is_enough(ring: &mut NotifyDisabled<'_, '_, Queue>, batch: &Batch) -> bool {
    // The core is asked when there is something to do about it.
    let weighs = batch.requests >= WEIGHT as usize || batch.bytes >= BYTE_WEIGHT as usize;
    weighs && ring.exceeds_weight(batch.requests, batch.bytes)
}

/// What became of a chain.
pub(super) enum Outcome {
    /// Its request, of so many bytes, is in flight, or complete already.
    Submitted(usize),
    /// It is back in the ring, for the worker.
    ForWorker,
    /// It is back in the ring, until there is memory.
    NoMemory,
    /// It broke the ring.
    Broken,
}

fn submit(chain: DescChain<'_, '_, Queue>) -> Outcome {
    let mut header = [0; HEADER_LEN];
    if chain.copy_start(&mut header) < HEADER_LEN {
        return complete(chain, Status::IoErr, 0);
    }
    let (readable, writable) = (chain.readable_len(), chain.writable_len());

    let guard = chain.guard();
    let little_endian = guard.is_little_endian();
    let features = guard.features();
    let Some(limits) = limits(guard, features) else {
        return complete(chain, Status::IoErr, 0);
    };
    let decoded = request::decode(
        &header,
        little_endian,
        (readable - HEADER_LEN) as u64,
        writable as u64,
        &limits,
    );
    let (op, sector, zone) = match decoded {
        Ok(Request::In { len: 0, .. } | Request::Out { len: 0, .. }) => {
            return complete(chain, Status::Ok, 0);
        }
        Ok(Request::In { sector, .. }) => (Op::Read, sector, InZone::No),
        Ok(Request::Out { sector, len }) => {
            let fua = !writeback(guard, features);
            match check_zones(guard, sector, len, limits.zones) {
                Ok(zone) => (Op::Write { fua }, sector, zone),
                Err(status) => return complete(chain, status, 0),
            }
        }
        Ok(request) => return submit_other(chain, request, limits),
        Err(status) => return complete(chain, status, 0),
    };
    transfer(chain, op, sector, limits.logical_block_size, zone)
}

/// Does what is not a read or a write.
#[inline(never)]
fn submit_other(chain: DescChain<'_, '_, Queue>, request: Request, limits: Limits) -> Outcome {
    let guard = chain.guard();
    match request {
        Request::GetId => {
            let serial = guard.data().settings.serial();
            get_id(chain, &serial)
        }
        _ if guard.must_not_wait() => {
            chain.discard();
            Outcome::ForWorker
        }
        Request::Flush => flush(chain),
        Request::Ranges { op, count } => ranges(chain, op, count, &limits),
        Request::Zone(request) => {
            let fua = !writeback(guard, limits.features);
            zone::submit(chain, request, &limits, fua)
        }
        // Those are not passed on.
        Request::In { .. } | Request::Out { .. } => complete(chain, Status::IoErr, 0),
    }
}

/// Checks a write, if the disk is zoned. Returns what its end has to know of that.
fn check_zones(
    guard: &VirtqueueGuard<'_, Queue>,
    sector: u64,
    len: u64,
    zones: Option<zone_request::Limits>,
) -> Result<InZone, Status> {
    match (guard.backend(), zones) {
        (Some(backend), Some(zones)) => zone::check_write(backend, sector, len, &zones),
        _ => Ok(InZone::No),
    }
}

/// Whether a feature bit is set.
fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Whether completed writes may be in a volatile cache.
fn writeback(guard: &VirtqueueGuard<'_, Queue>, features: u64) -> bool {
    has(features, feature::FLUSH) && guard.data().settings.writeback()
}

/// What the guest may ask of the backend now; `None` if there is none.
fn limits(guard: &VirtqueueGuard<'_, Queue>, features: u64) -> Option<Limits> {
    let backend = guard.backend()?;
    let zoned = backend.is_zoned();
    // A guest that knows nothing of zones would write where it must not.
    let unaware = zoned && !has(features, feature::ZONED);
    Some(Limits {
        capacity: backend.capacity(),
        logical_block_size: backend.logical_block_size(),
        read_only: has(features, feature::RO) || !backend.writable() || unaware,
        features: if zoned { features & !RANGES } else { features },
        zones: if zoned && !unaware {
            zone::limits(backend)
        } else {
            None
        },
    })
}

/// Completes a request that has no bio.
pub(super) fn complete(chain: DescChain<'_, '_, Queue>, status: Status, written: usize) -> Outcome {
    chain
        .complete(status as u8, written)
        .map_or(Outcome::Broken, |()| Outcome::Submitted(0))
}

fn get_id(chain: DescChain<'_, '_, Queue>, serial: &[u8; SERIAL_LEN]) -> Outcome {
    let wanted = chain.writable_len().min(SERIAL_LEN);
    let written = chain.write_start(serial);
    if written < wanted {
        return complete(chain, Status::IoErr, 0);
    }
    complete(chain, Status::Ok, written)
}

fn flush(chain: DescChain<'_, '_, Queue>) -> Outcome {
    let Some(bio) = chain.new_bio(Op::Flush, 0, 0) else {
        chain.discard();
        return Outcome::NoMemory;
    };
    let outcomes = Some(outcomes(0));
    let request = chain.claim(outcomes, |completion| InFlight {
        completion,
        read_len: 0,
        bounces: false,
        rest: None,
        zone: InZone::No,
    });
    let Some((guard, mut request)) = request else {
        return Outcome::Broken;
    };
    request.add(guard, bio);
    request.submit();
    Outcome::Submitted(0)
}

/// Takes a request for `count` ranges. Its bios are submitted when completions are looked at.
fn ranges(chain: DescChain<'_, '_, Queue>, op: RangeOp, count: usize, limits: &Limits) -> Outcome {
    let guard = chain.guard();
    let disk = guard.backend().map(|backend| backend.limits());
    let disk = disk.unwrap_or_default();
    let can = match op {
        RangeOp::Discard => disk.max_discard_sectors != 0,
        RangeOp::SecureErase => disk.max_secure_erase_sectors != 0,
        RangeOp::WriteZeroes => true,
    };
    if !can {
        return complete(chain, Status::Unsupp, 0);
    }

    let stable = !writeback(guard, limits.features);
    let mut memory = data(&chain, Op::Write { fua: false });
    let little_endian = guard.is_little_endian();
    let ranges = match Ranges::new(&mut memory, op, count, little_endian, limits, stable) {
        Ok(ranges) => ranges,
        Err(status) => return complete(chain, status, 0),
    };
    let Ok(rest) = KBox::new(Rest::Ranges(ranges), GFP_KERNEL_ACCOUNT) else {
        return complete(chain, Status::IoErr, 0);
    };
    let request = chain.claim(None, |completion| InFlight {
        completion,
        read_len: 0,
        bounces: false,
        rest: Some(rest),
        zone: InZone::No,
    });
    let Some((guard, request)) = request else {
        return Outcome::Broken;
    };
    // In its turn: a disk without queue does all that it is given before it returns.
    guard.defer(request);
    Outcome::Submitted(0)
}

/// Submits a read or a write of the chain's data.
#[inline(always)]
fn transfer(
    mut chain: DescChain<'_, '_, Queue>,
    op: Op,
    sector: u64,
    logical_block_size: u32,
    zone: InZone,
) -> Outcome {
    let Some(backend) = chain.guard().backend() else {
        return complete(chain, Status::IoErr, 0);
    };
    if let Some(page) = data_page(&chain, op, backend.dma_alignment()) {
        return transfer_page(chain, op, sector, &page, zone);
    }
    let mut memory = data(&chain, op);
    let len = memory.remaining();
    let how = Fill::new(&memory, backend.dma_alignment(), logical_block_size);
    let bounces = how.bounces();
    if chain.guard().must_not_wait() && !is_quick(backend, sector, len, how) {
        chain.discard();
        return Outcome::ForWorker;
    }

    let mut bio = match first_bio(&chain, op, sector, &mut memory, how) {
        Ok(bio) => bio,
        Err(BuildError::Fault) => return complete(chain, Status::IoErr, 0),
        Err(BuildError::NoMemory) => {
            chain.discard();
            return Outcome::NoMemory;
        }
    };

    let done = bio.len();
    let rest = if done < len || (bounces && op == Op::Read) {
        let sector = sector + done as u64 / SECTOR_SIZE;
        match Rest::new(&memory, op, sector, len - done, how) {
            Ok(rest) => Some(rest),
            Err(_) => return complete(chain, Status::IoErr, 0),
        }
    } else {
        None
    };

    if !may_merge(&mut chain, sector, len, &zone) && rest.is_none() {
        bio.forbid_merging();
    }
    let read_len = if op == Op::Read { len } else { 0 };
    // Of what is copied, goes on after its first bios, or may fail for more reasons, the worker has
    // more to do.
    let simple = rest.is_none() && !bounces && matches!(zone, InZone::No);
    let outcomes = simple.then(|| outcomes(read_len));
    let request = chain.claim(outcomes, |completion| InFlight {
        completion,
        read_len,
        bounces,
        rest,
        zone,
    });
    let Some((guard, mut request)) = request else {
        return Outcome::Broken;
    };
    if bounces {
        guard.data_mut().bouncing += 1;
    }
    request.add(guard, bio);
    rest::extend(guard, &mut request);
    request.submit();
    Outcome::Submitted(len)
}

/// Whether a read or write of `len` bytes may be submitted by the task that kicks. The larger it is, the longer the
/// guest's processor is kept, and the less a worker to be woken costs.
fn is_quick(backend: &Backend, sector: u64, len: usize, how: Fill) -> bool {
    len <= DIRECT_LEN
        && how
            .single()
            .is_some_and(|pages| pages <= DIRECT_PAGES && !backend.would_cut(sector, len, pages))
}

/// Learns of a read or write of `len` bytes from `sector` on. Returns whether the block layer is to look for others to
/// merge it with, which takes longer than to see here that it does not go on where one of the last ones ended. Where
/// more would come of it than of that, it is to look: in a scheduler, and for what waits for a zone.
#[inline]
fn may_merge(chain: &mut DescChain<'_, '_, Queue>, sector: u64, len: usize, zone: &InZone) -> bool {
    let goes_on = chain
        .data_mut()
        .streams
        .goes_on(sector, len as u64 / SECTOR_SIZE);
    goes_on
        || !matches!(zone, InZone::No)
        || !chain
            .guard()
            .backend()
            .is_some_and(Backend::has_plain_queue)
}

/// The first bio of a request, filled from `memory`'s cursor on. Context: may sleep.
///
/// # Errors
///
/// See [`BuildError`]; [`BuildError::NoMemory`] also if too many requests are being bounced.
pub(super) fn first_bio<'a>(
    chain: &DescChain<'_, 'a, Queue>,
    op: Op,
    sector: u64,
    memory: &mut UserIter<'_>,
    how: Fill,
) -> Result<Bio<'a, Building>, BuildError> {
    if how.bounces() && chain.guard().data().bouncing >= MAX_BOUNCING {
        return Err(BuildError::NoMemory);
    }
    let pages = how.pages(memory.remaining());
    let mut bio = chain
        .new_bio(op, sector, pages)
        .ok_or(BuildError::NoMemory)?;
    how.fill(&mut bio, memory)?;
    Ok(bio)
}

/// The memory of the chain's data, if it is within one page, and the disk can access it.
///
/// A request's length was checked to be whole blocks: there is nothing to cut.
fn data_page(chain: &DescChain<'_, '_, Queue>, op: Op, dma_alignment: u32) -> Option<PageBytes> {
    let page = if op == Op::Read {
        chain.writable_page()
    } else {
        chain.readable_page(HEADER_LEN)
    }?;
    ((page.address() | page.len()) & dma_alignment as usize == 0).then_some(page)
}

/// Submits a read or a write of data in one page: the most common request, with the least to do.
fn transfer_page(
    mut chain: DescChain<'_, '_, Queue>,
    op: Op,
    sector: u64,
    page: &PageBytes,
    zone: InZone,
) -> Outcome {
    let Some(mut bio) = chain.new_bio(op, sector, 1) else {
        chain.discard();
        return Outcome::NoMemory;
    };
    if chain.pin_page(&mut bio, page).is_err() {
        return complete(chain, Status::IoErr, 0);
    }
    if !may_merge(&mut chain, sector, page.len(), &zone) {
        bio.forbid_merging();
    }
    let read_len = if op == Op::Read { page.len() } else { 0 };
    let outcomes = matches!(zone, InZone::No).then(|| outcomes(read_len));
    let request = chain.claim(outcomes, |completion| InFlight {
        completion,
        read_len,
        bounces: false,
        rest: None,
        zone,
    });
    let Some((guard, mut request)) = request else {
        return Outcome::Broken;
    };
    request.add(guard, bio);
    request.submit();
    Outcome::Submitted(page.len())
}

/// What the end of a request says that `read_len` bytes are read for.
fn outcomes(read_len: usize) -> Outcomes {
    Outcomes {
        ok: (Status::Ok as u8, read_len),
        failed: (Status::IoErr as u8, 0),
    }
}

/// The memory of the chain's data.
pub(super) fn data<'c>(chain: &'c DescChain<'_, '_, Queue>, op: Op) -> UserIter<'c> {
    if op == Op::Read {
        chain.writable()
    } else {
        let mut memory = chain.readable();
        memory.advance(HEADER_LEN);
        memory
    }
}
