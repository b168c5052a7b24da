// SPDX-License-Identifier: GPL-2.0

//! `vhost-blk exercise`: plays the guest on a disk, and checks what comes back
//! against what is on the disk.

mod broken;
pub(crate) mod check;
pub(crate) mod disk;
mod id;
mod layout;
mod limits;
mod load;
mod notify;
mod parallel;
mod ranges;
mod reading;
mod report;
pub(crate) mod shapes;
mod stopping;
mod writing;
mod zones;

use std::io;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use rand::RngExt;

use crate::args::ExerciseArgs;
use check::{Check, Context, Outcome};
use disk::{Disk, Saved};
use report::Report;

/// All checks, in the order in which they run.
const CHECKS: &[&[Check]] = &[
    id::CHECKS,
    zones::CHECKS,
    reading::CHECKS,
    layout::CHECKS,
    notify::CHECKS,
    limits::CHECKS,
    parallel::CHECKS,
    stopping::CHECKS,
    broken::CHECKS,
    writing::CHECKS,
    ranges::CHECKS,
];

/// Runs the checks, prints their results, and returns whether none failed.
pub(crate) fn run(device: &Path, args: &ExerciseArgs) -> Result<bool> {
    let checks: Vec<&Check> = CHECKS
        .iter()
        .flat_map(|group| group.iter())
        .filter(|check| args.only.is_empty() || args.only.iter().any(|o| check.name.contains(o)))
        .collect();
    if args.list {
        for check in checks {
            let write = if check.writes { " (writes)" } else { "" };
            println!("{:<24} {}{write}", check.name, check.title);
        }
        return Ok(true);
    }
    args.check()?;
    if checks.is_empty() {
        bail!("no check has such a name: see --list");
    }
    let path = args.disk.as_deref().context("which disk? (--disk)")?;
    let disk = Disk::open(path, args.write)?;
    let seed = args.seed.unwrap_or_else(rand::random);
    let context = Context::new(device, &disk, args, seed)?;
    let mut report = Report::new(Box::new(io::stdout()), args.ktap, checks.len());
    report.note(&format!(
        "{}, {}, {}-byte blocks, {}; seed {seed}",
        path.display(),
        bytes(disk.bytes()),
        disk.block(),
        if args.write {
            "read and write"
        } else {
            "read only"
        },
    ));
    let saved = save(&context, &mut report)?;
    let run = trust(&context).map(|()| {
        for check in checks {
            report.begin(check);
            let begin = Instant::now();
            let result = if check.writes && !args.write {
                Ok(Outcome::Skipped("needs --write".into()))
            } else {
                (check.run)(&context)
            };
            report.end(check, result, begin.elapsed());
        }
    });
    let restored = match saved {
        Some(saved) if !args.no_restore => disk
            .restore(&saved)
            .context("cannot put back what was overwritten"),
        _ => Ok(()),
    };
    run?;
    let passed = report.finish();
    restored.map(|()| passed)
}

/// Fails if the disk's own driver gives wrong answers: there is nothing to
/// compare with then.
fn trust(context: &Context<'_>) -> Result<()> {
    let disk = context.disk;
    let len = disk.block();
    let mut rng = context.rng("trust");
    let blocks = disk.capacity() / disk.block_sectors();
    let mut sectors: Vec<_> = (0..16)
        .map(|_| rng.random_range(0..blocks) * disk.block_sectors())
        .collect();
    if context.args.write {
        // A disk of zeroes would show nothing.
        disk.write(context.region.sector(), &shapes::noise(&mut rng, len))?;
        sectors.push(context.region.sector());
    }
    for sector in sectors {
        if !disk.reads_agree(sector, len)? {
            bail!(
                "the disk's own driver reads sector {sector} wrongly into memory that is not \
                 aligned to the block size, without vhost-blk (null_blk does so with memory_backed \
                 and blocks of more than 512 bytes): use another disk"
            );
        }
    }
    Ok(())
}

/// Keeps a copy of what the checks overwrite, and says what that is.
fn save(context: &Context<'_>, report: &mut Report) -> Result<Option<Saved>> {
    if !context.args.write {
        return Ok(None);
    }
    let region = &context.region;
    report.note(&format!(
        "overwrites {} at byte {}{}",
        bytes(region.len as u64),
        region.start,
        if context.args.no_restore {
            ", for good"
        } else {
            ", and puts it back at the end"
        }
    ));
    let saved = context.disk.save(region.start, region.len)?;
    // Of a sector that nobody has written, a disk may say anything, and
    // null_blk says different things depending on the reader's memory.
    context.disk.restore(&saved)?;
    Ok(Some(saved))
}

/// A length for people to read.
fn bytes(len: u64) -> String {
    indicatif::BinaryBytes(len).to_string()
}
