// SPDX-License-Identifier: GPL-2.0

//! What the device says of a zoned disk. What changes zones is selftest's.

use anyhow::{Context as _, Result, ensure};
use vhost_blk_ring::uapi::feature;
use vhost_blk_ring::{Cut, Kind, Request, Shape, Status, report_zones};

use super::check::{Check, Context, Outcome, ended, refused, succeeded};

/// Length of the header of a report, and of each of its zones, bytes.
const LEN: usize = vhost_blk_ring::request::ZONE_LEN;

pub(crate) const CHECKS: &[Check] = &[
    Check {
        name: "zones-report",
        title: "zones are reported as on the disk, in pieces of any size and in any layout",
        writes: false,
        run: report,
    },
    Check {
        name: "zones-refused",
        title: "a guest that has not taken ZONED, or reads only, changes no zone",
        writes: false,
        run: unaware,
    },
];

fn not_zoned() -> Result<Outcome> {
    Ok(Outcome::Skipped("the disk is not zoned".into()))
}

fn report(context: &Context<'_>) -> Result<Outcome> {
    if !context.disk.is_zoned() {
        return not_zoned();
    }
    let capacity = context.disk.capacity();
    let host = report_zones(context.disk.backend(), 0).context("BLKREPORTZONE")?;
    let mut guest = context.guest()?;
    let queue = guest.queue(0);
    let mut requests = 0;
    for pieces in [1, 2, 7, host.len(), host.len() + 1] {
        let mut zones = Vec::new();
        while zones.len() < host.len() {
            let sector = host[zones.len()].start;
            let done = context.run(
                queue,
                Request::zone_report(sector, pieces),
                &Shape::default(),
            )?;
            let now = done
                .zones()
                .context("a report of more zones than there is room for")?;
            let full = now.len() == pieces;
            ended(&done, Status::Ok, LEN + now.len() * LEN + usize::from(full))?;
            ensure!(!now.is_empty(), "no zone from sector {sector} on");
            zones.extend(now);
            requests += 1;
            // The host was asked for as many as one ioctl gives.
            if host.len() == 256 {
                zones.truncate(host.len());
            }
        }
        ensure!(zones == host, "{zones:?} instead of {host:?}");
    }
    for cut in [Cut::Joined, Cut::Every(65), Cut::Data(LEN), Cut::Data(1)] {
        let shape = Shape::cut(cut).at(1, 0);
        let done = context.run(queue, Request::zone_report(0, 1), &shape)?;
        succeeded(&done)?;
        ensure!(
            done.zones().as_deref() == Some(&host[..1]),
            "{:?}",
            done.zones()
        );
    }
    let end = context.run(queue, Request::zone_report(capacity, 2), &Shape::default())?;
    ended(&end, Status::Ok, LEN)?;
    for (sector, len) in [
        (0, 0),
        (0, 2 * LEN - 1),
        (capacity + 1, 2 * LEN),
        (u64::MAX, 2 * LEN),
    ] {
        let request = Request::other(Kind::ZoneReport.number(), sector, Vec::new(), len);
        let done = context.run(queue, request, &Shape::default())?;
        refused(&done, Status::ZoneInvalidCommand)?;
    }
    Ok(Outcome::Passed(format!(
        "{} zones, {requests} reports",
        host.len()
    )))
}

fn unaware(context: &Context<'_>) -> Result<Outcome> {
    if !context.disk.is_zoned() {
        return not_zoned();
    }
    let before = report_zones(context.disk.backend(), 0).context("BLKREPORTZONE")?;
    let last = before.last().map_or(0, |zone| zone.start);
    let mut options = context.options(1);
    for (features, status) in [
        (!feature::ZONED, Status::Unsupported),
        (u64::MAX, Status::IoErr),
    ] {
        options.features = features & !feature::NOTIFY_ON_EMPTY & !feature::LOG_ALL | feature::RO;
        let mut guest = context.start(&options)?;
        let queue = guest.queue(0);
        for request in [
            Request::zone_append(last, vec![0; context.disk.block()]),
            Request::zone(Kind::ZoneOpen, last),
            Request::zone(Kind::ZoneClose, last),
            Request::zone(Kind::ZoneFinish, last),
            Request::zone(Kind::ZoneReset, last),
            Request::zone(Kind::ZoneResetAll, 0),
        ] {
            let done = context.run(queue, request, &Shape::default())?;
            refused(&done, status)?;
        }
    }
    let after = report_zones(context.disk.backend(), 0).context("BLKREPORTZONE")?;
    ensure!(before == after, "zones were changed");
    Ok(Outcome::Passed("12 requests".into()))
}
