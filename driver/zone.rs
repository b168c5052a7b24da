// SPDX-License-Identifier: GPL-2.0

//! Requests of zoned disks, and what is different for others on such a disk.

use super::{
    queue::{
        InFlight,
        Queue, //
    },
    request::{
        Status,
        HEADER_LEN,
        SECTOR_SIZE, //
    },
    rest::{
        Fill,
        Rest, //
    },
    submit::{
        self,
        Outcome, //
    },
    zone_request::{
        self,
        is_uncut,
        zones_from,
        Limits,
        Request,
        Zone,
        APPEND_SECTOR_LEN,
        DESCRIPTOR_LEN,
        REPORT_HEADER_LEN, //
    },
};
use crate::bindings::{
    block::{
        self,
        Backend,
        Bio,
        BioError,
        Finished,
        Op, //
    },
    iov::OwnedUserIter,
    vhost::{
        DescChain,
        VirtqueueGuard, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

/// Zones that the disk is asked for at once, and reports of a virtqueue that may ask for so many.
const REPORT_ZONES: u32 = 512;
const MAX_LARGE_REPORTS: usize = 4;

/// Zones that any other report asks for at once. Each request may be one: what they have in memory stays
/// below a page.
const SMALL_REPORT_ZONES: u32 = 32;

/// What a request's end has to know, if its disk is zoned.
pub(super) enum InZone {
    /// Nothing.
    No,
    /// It writes; one that fails does so with the status.
    Write(Status),
    /// It does something with zones, or asks for them, and has no data.
    Manage,
    /// It appends.
    Append(KBox<Append>),
}

impl InZone {
    /// What a request is completed with that failed, with `error` if the disk said so.
    pub(super) fn status(&self, error: Option<BioError>) -> Status {
        match (self, error) {
            (Self::No, _) => Status::IoErr,
            (_, Some(BioError::OpenZones)) => Status::ZoneOpenResource,
            (_, Some(BioError::ActiveZones)) => Status::ZoneActiveResource,
            (Self::Write(status), _) => *status,
            (Self::Manage | Self::Append(_), _) => Status::ZoneInvalidCmd,
        }
    }

    /// Whether its bios have to be written one after the other.
    pub(super) fn is_ordered(&self) -> bool {
        matches!(self, Self::Write(_))
    }

    /// Learns what a bio did. Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the guest's memory for it cannot be written.
    pub(super) fn bio_done(&mut self, bio: &Bio<'_, Finished>) -> Result {
        match self {
            Self::Append(append) => append.write_sector(bio.sector()),
            _ => Ok(()),
        }
    }
}

/// What goes for the backend's zones; `None` if it is not zoned.
pub(super) fn limits(backend: &Backend) -> Option<Limits> {
    let limits = backend.zone_limits()?;
    Some(Limits {
        zone_sectors: limits.zone_sectors,
        max_append_sectors: max_append_sectors(backend),
        write_granularity: limits.write_granularity,
        writes_queue: limits.writes_queue,
    })
}

/// Most sectors of a zone append to `backend` that always fits one bio: the smaller of what may be bounced,
/// and of the disk's own limits. 0 if it is not zoned.
pub(super) fn max_append_sectors(backend: &Backend) -> u32 {
    let Some(limits) = backend.zone_limits() else {
        return 0;
    };
    zone_request::max_append_sectors(limits.max_append_sectors, limits.max_segments)
}

/// Checks a write that is within the disk. Returns what its end has to know.
///
/// What the disk would refuse is refused here if it is known, since the host's log would tell of it.
///
/// # Errors
///
/// The status to complete the request with.
pub(super) fn check_write(
    backend: &Backend,
    sector: u64,
    len: u64,
    limits: &Limits,
) -> Result<InZone, Status> {
    let sectors = len / SECTOR_SIZE;
    let (_, mut next) = zone_request::zone_of(sector, limits);
    if sector + sectors > next {
        // Only in conventional zones: there at most 2 GiB are looked at, zone by zone.
        let mut sequential = backend.is_sequential(sector);
        while next < sector + sectors {
            sequential |= backend.is_sequential(next);
            next = next.saturating_add(limits.zone_sectors);
        }
        return if sequential {
            Err(Status::ZoneInvalidCmd)
        } else {
            Ok(InZone::Write(Status::IoErr))
        };
    }
    let Some(zone) = backend.known_zone(sector).map(Zone::from) else {
        return Ok(InZone::Write(Status::IoErr));
    };
    zone.check_write(sector, sectors, limits)?;
    Ok(InZone::Write(zone.status_of_failed_write(sector)))
}

/// Does what a request of a zoned disk asks for.
pub(super) fn submit(
    chain: DescChain<'_, '_, Queue>,
    request: Request,
    limits: &super::request::Limits,
    fua: bool,
) -> Outcome {
    let Some(backend) = chain.guard().backend() else {
        return submit::complete(chain, Status::IoErr, 0);
    };
    match request {
        Request::Report { sector, zones } => {
            let of = limits.zones.as_ref();
            let on_disk = of.map_or(0, |of| zones_from(sector, limits.capacity, of));
            report(chain, sector, zones.min(on_disk.max(1)))
        }
        Request::ResetAll => manage(chain, Op::ZoneResetAll, 0),
        Request::Manage { op, sector } => {
            let known = backend.known_zone(sector).map(Zone::from);
            if let Some(Err(status)) = known.map(|zone| zone.check_manage(op)) {
                return submit::complete(chain, status, 0);
            }
            let op = match op {
                zone_request::Op::Open => Op::ZoneOpen,
                zone_request::Op::Close => Op::ZoneClose,
                zone_request::Op::Finish => Op::ZoneFinish,
                zone_request::Op::Reset => Op::ZoneReset,
            };
            manage(chain, op, sector)
        }
        Request::Append { sector } => {
            let sectors = (chain.readable_len() - HEADER_LEN) as u64 / SECTOR_SIZE;
            // That is known even where the rest is not.
            if !backend.is_sequential(sector) {
                return submit::complete(chain, Status::ZoneInvalidCmd, 0);
            }
            let known = backend.known_zone(sector).map(Zone::from);
            if let Some(Err(status)) = known.map(|zone| zone.check_append(sectors)) {
                return submit::complete(chain, status, 0);
            }
            append(
                chain,
                Op::ZoneAppend { fua },
                sector,
                limits.logical_block_size,
            )
        }
    }
}

/// Submits a request that has no data.
fn manage(chain: DescChain<'_, '_, Queue>, op: Op, sector: u64) -> Outcome {
    let Some(bio) = chain.new_bio(op, sector, 0) else {
        chain.discard();
        return Outcome::NoMemory;
    };
    let request = chain.claim(None, |completion| InFlight {
        completion,
        read_len: 0,
        bounces: false,
        rest: None,
        zone: InZone::Manage,
    });
    let Some((guard, mut request)) = request else {
        return Outcome::Broken;
    };
    request.add(guard, bio);
    request.submit();
    Outcome::Submitted(0)
}

/// Where a zone append says at which sector it wrote.
pub(super) struct Append {
    memory: OwnedUserIter,
    little_endian: bool,
}

impl Append {
    fn write_sector(&mut self, sector: u64) -> Result {
        let sector = zone_request::to_guest(sector, self.little_endian);
        write_all(&mut self.memory, &sector)
    }
}

/// Writes all of `data` to the guest's memory. Context: process context in the owner's address space; may
/// sleep.
fn write_all(memory: &mut OwnedUserIter, data: &[u8]) -> Result {
    memory.with(|memory| {
        if memory.copy_to(data) == data.len() {
            Ok(())
        } else {
            Err(EFAULT)
        }
    })
}

/// Submits a zone append, which is one bio: the block layer must not cut it, since only one sector can be
/// returned.
fn append(chain: DescChain<'_, '_, Queue>, op: Op, sector: u64, block_size: u32) -> Outcome {
    let guard = chain.guard();
    let little_endian = guard.is_little_endian();
    let zones = guard.backend().and_then(Backend::zone_limits);
    let (Some(backend), Some(zones)) = (guard.backend(), zones) else {
        return submit::complete(chain, Status::IoErr, 0);
    };
    let returned = chain.own_writable(APPEND_SECTOR_LEN);
    let returned = returned.and_then(|memory| {
        let append = Append {
            memory,
            little_endian,
        };
        Ok(KBox::new(append, GFP_KERNEL_ACCOUNT)?)
    });
    let Ok(returned) = returned else {
        return submit::complete(chain, Status::IoErr, 0);
    };

    let mut memory = submit::data(&chain, op);
    let len = memory.remaining();
    let fill = Fill::new(&memory, backend.dma_alignment(), block_size);
    let how = match fill.single() {
        Some(pages)
            if is_uncut(
                memory.segments(),
                pages,
                zones.max_segments,
                zones.virt_boundary,
            ) =>
        {
            fill
        }
        _ => Fill::bounced(),
    };
    let bio = match submit::first_bio(&chain, op, sector, &mut memory, how) {
        // One that is not whole is not submitted.
        Ok(bio) if bio.len() == len => bio,
        Ok(_) => return submit::complete(chain, Status::ZoneInvalidCmd, 0),
        Err(block::BuildError::Fault) => return submit::complete(chain, Status::IoErr, 0),
        Err(block::BuildError::NoMemory) => {
            chain.discard();
            return Outcome::NoMemory;
        }
    };

    let bounces = how.bounces();
    let request = chain.claim(None, |completion| InFlight {
        completion,
        read_len: APPEND_SECTOR_LEN,
        bounces,
        rest: None,
        zone: InZone::Append(returned),
    });
    let Some((guard, mut request)) = request else {
        return Outcome::Broken;
    };
    if bounces {
        guard.data_mut().bouncing += 1;
    }
    request.add(guard, bio);
    request.submit();
    Outcome::Submitted(len)
}

/// A report of zones, which is made piece by piece: the disk is asked in a kernel thread, and what it said
/// is copied to the guest by the worker.
pub(super) struct Report {
    backend: Arc<Backend>,
    /// Where the next descriptor goes.
    memory: OwnedUserIter,
    little_endian: bool,
    /// From which sector on the disk is asked next.
    sector: u64,
    /// For how many zones there is room yet.
    left: u64,
    /// How many were reported.
    done: u64,
    /// How many the disk is asked for at once.
    most: u32,
    /// Their descriptors.
    descriptors: KVVec<u8>,
    failed: bool,
    /// The guest has all of it.
    complete: bool,
}

impl Report {
    /// Whether it is one of few that use more memory.
    pub(super) fn is_large(&self) -> bool {
        self.most > SMALL_REPORT_ZONES
    }

    fn asked(&self) -> u32 {
        self.left.min(u64::from(self.most)) as u32
    }

    /// Asks the disk for the next piece. Context: may sleep as long as the disk takes.
    pub(super) fn ask(&mut self) {
        let asked = self.asked();
        let room = asked as usize * DESCRIPTOR_LEN;
        let (descriptors, sector) = (&mut self.descriptors, &mut self.sector);
        let little_endian = self.little_endian;

        descriptors.clear();
        let result = self.backend.report_zones(*sector, asked, |zone| {
            if descriptors.len() >= room {
                return Err(EIO);
            }
            *sector = zone.end();
            let descriptor = Zone::from(zone).descriptor(little_endian);
            // There is room, so this allocates nothing.
            Ok(descriptors.extend_from_slice(&descriptor, GFP_NOWAIT)?)
        });
        self.failed = result.is_err();
    }

    /// Whether there is no more to ask for.
    pub(super) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Copies what the disk said to the guest. Returns how many bytes the guest has by now.
    ///
    /// Context: process context in the owner's address space; may sleep.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the guest's memory cannot be written, `EIO` if the disk failed.
    pub(super) fn copy(&mut self) -> Result<usize> {
        if self.failed {
            return Err(EIO);
        }
        let asked = self.asked();
        write_all(&mut self.memory, &self.descriptors)?;
        let zones = (self.descriptors.len() / DESCRIPTOR_LEN) as u64;
        self.left -= zones;
        self.done += zones;
        if zones < u64::from(asked) || self.left == 0 {
            self.memory.rewind();
            let header = zone_request::report_header(self.done, self.little_endian);
            write_all(&mut self.memory, &header)?;
            self.complete = true;
        }
        Ok(REPORT_HEADER_LEN + self.done as usize * DESCRIPTOR_LEN)
    }
}

/// Has the disk asked for up to `zones` zones.
fn report(chain: DescChain<'_, '_, Queue>, sector: u64, zones: u64) -> Outcome {
    let large = chain.guard().data().large_reports < MAX_LARGE_REPORTS;
    let most = if large {
        REPORT_ZONES
    } else {
        SMALL_REPORT_ZONES
    };
    let report = new_report(&chain, sector, zones, most).and_then(|report| {
        let large = report.is_large();
        Ok((large, KBox::new(Rest::Report(report), GFP_KERNEL_ACCOUNT)?))
    });
    let Ok((large, report)) = report else {
        return submit::complete(chain, Status::IoErr, 0);
    };
    let request = chain.claim(None, |completion| InFlight {
        completion,
        read_len: 0,
        bounces: false,
        rest: Some(report),
        zone: InZone::Manage,
    });
    let Some((guard, request)) = request else {
        return Outcome::Broken;
    };
    if large {
        guard.data_mut().large_reports += 1;
    }
    request.submit_slow();
    Outcome::Submitted(0)
}

fn new_report(
    chain: &DescChain<'_, '_, Queue>,
    sector: u64,
    zones: u64,
    most: u32,
) -> Result<Report> {
    // As much memory as is needed.
    let most = u64::from(most).min(zones) as u32;
    let mut memory = chain.own_writable(REPORT_HEADER_LEN + zones as usize * DESCRIPTOR_LEN)?;
    memory.with(|memory| {
        memory.advance(REPORT_HEADER_LEN);
        Ok::<_, Error>(())
    })?;
    Ok(Report {
        backend: chain.guard().share_backend().ok_or(ENODEV)?,
        memory,
        little_endian: chain.guard().is_little_endian(),
        sector,
        left: zones,
        done: 0,
        most,
        descriptors: KVVec::with_capacity(most as usize * DESCRIPTOR_LEN, GFP_KERNEL_ACCOUNT)?,
        failed: false,
        complete: false,
    })
}

/// Forgets a request that is complete.
pub(super) fn finished(guard: &mut VirtqueueGuard<'_, Queue>, rest: Option<&Rest>) {
    if let Some(Rest::Report(report)) = rest {
        if report.is_large() {
            guard.data_mut().large_reports -= 1;
        }
    }
}

impl From<block::Zone> for Zone {
    fn from(zone: block::Zone) -> Self {
        Self {
            start: zone.start(),
            capacity: zone.capacity(),
            write_pointer: zone.write_pointer(),
            kind: zone.kind(),
            state: zone.condition(),
        }
    }
}
