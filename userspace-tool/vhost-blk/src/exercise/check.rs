// SPDX-License-Identifier: GPL-2.0

//! What a check is, and what it works with.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use vhost_blk_ring::request::SECTOR_SIZE;
use vhost_blk_ring::{Completion, Guest, Options, Queue, Request, Shape, Status};

use super::disk::Disk;
use crate::args::ExerciseArgs;

/// Guest memory of each guest, bytes. Only what is used is ever allocated.
const MEMORY: usize = 512 << 20;

/// One check.
#[derive(Debug)]
pub(crate) struct Check {
    /// Short, for `--only`.
    pub(crate) name: &'static str,
    /// What is true if it passes.
    pub(crate) title: &'static str,
    /// Whether it overwrites the region that `--write` gives.
    pub(crate) writes: bool,
    /// Does it.
    pub(crate) run: fn(&Context<'_>) -> Result<Outcome>,
}

/// How a check ended that did not fail.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// With what was done, in a few words.
    Passed(String),
    /// With the reason.
    Skipped(String),
}

/// The piece of the disk that the checks may overwrite.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    /// Its first byte.
    pub(crate) start: u64,
    /// Its length, bytes.
    pub(crate) len: usize,
}

impl Region {
    /// What `--write-at` and `--write-size` give on a disk of so many bytes.
    fn new(at: u64, mib: u64, disk: u64, block: usize) -> Result<Self> {
        let block = block as u64;
        if at % block != 0 {
            bail!("--write-at is not a multiple of the disk's block size, {block}");
        }
        let end = disk.min(at.saturating_add(mib << 20));
        let len = end.saturating_sub(at) / block * block;
        if len < 1 << 20 {
            bail!("the checks that write need 1 MiB of the disk from byte {at} on");
        }
        Ok(Region {
            start: at,
            len: usize::try_from(len)?,
        })
    }

    /// Its first sector.
    pub(crate) fn sector(&self) -> u64 {
        self.start / SECTOR_SIZE as u64
    }
}

/// What checks work with.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    device: &'a Path,
    pub(crate) disk: &'a Disk,
    pub(crate) args: &'a ExerciseArgs,
    pub(crate) region: Region,
    seed: u64,
}

impl<'a> Context<'a> {
    pub(crate) fn new(
        device: &'a Path,
        disk: &'a Disk,
        args: &'a ExerciseArgs,
        seed: u64,
    ) -> Result<Self> {
        let region = if args.write {
            Region::new(args.write_at, args.write_size, disk.bytes(), disk.block())?
        } else {
            Region { start: 0, len: 0 }
        };
        Ok(Context {
            device,
            disk,
            args,
            region,
            seed,
        })
    }

    /// A source of choices that depends on the seed and the check only.
    pub(crate) fn rng(&self, check: &str) -> StdRng {
        let name = check.bytes().fold(0u64, |hash, byte| {
            hash.wrapping_mul(31).wrapping_add(byte.into())
        });
        StdRng::seed_from_u64(self.seed ^ name)
    }

    /// How long a request may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.args.timeout()
    }

    /// What guests are made with, by the command line.
    pub(crate) fn options(&self, queues: u32) -> Options {
        Options {
            path: self.device.to_owned(),
            queues,
            queue_size: self.args.queue_size,
            memory: MEMORY,
            workers: self.args.workers.into(),
            worker_mode: self.args.worker_mode.map(Into::into),
            busyloop_timeout: self.args.poll_us,
            pin_memory: self.args.pin_memory,
            iotlb: self.args.iotlb(),
            ..Options::default()
        }
    }

    /// A guest that runs on the disk.
    pub(crate) fn start(&self, options: &Options) -> Result<Guest> {
        let guest = Guest::new(options)?;
        guest.start(self.disk.backend())?;
        Ok(guest)
    }

    /// A guest with one queue that runs on the disk.
    pub(crate) fn guest(&self) -> Result<Guest> {
        self.start(&self.options(1))
    }

    /// Runs one request to its end.
    pub(crate) fn run(
        &self,
        queue: &mut Queue,
        request: Request,
        shape: &Shape,
    ) -> Result<Completion> {
        let what = describe(&request, shape);
        queue.run(request, shape, self.timeout()).context(what)
    }

    /// Reads, and compares with the disk.
    pub(crate) fn read(
        &self,
        queue: &mut Queue,
        sector: u64,
        len: usize,
        shape: &Shape,
    ) -> Result<()> {
        let request = Request::read(sector, len);
        let what = describe(&request, shape);
        let done = self.run(queue, request, shape)?;
        self.matches_disk(&done).context(what)
    }

    /// Fails unless `done` is a read that gave what is on the disk.
    pub(crate) fn matches_disk(&self, done: &Completion) -> Result<()> {
        succeeded(done)?;
        let expected = self.disk.read(done.request.sector, done.request.in_len)?;
        same(&done.data, &expected)
    }
}

/// Fails unless the device did all of the request and said so.
pub(crate) fn succeeded(done: &Completion) -> Result<()> {
    ended(done, Status::Ok, done.request.full_used_len())
}

/// Fails unless the request ended with `status`, and the device said that it
/// wrote `used_len` bytes, and wrote nowhere else.
pub(crate) fn ended(done: &Completion, status: Status, used_len: usize) -> Result<()> {
    ensure!(
        done.status == status,
        "status {:?} instead of {status:?}",
        done.status
    );
    ensure!(
        done.used_len as usize == used_len,
        "used.len {} instead of {used_len}",
        done.used_len
    );
    if let Some(offset) = done.stray_write {
        bail!(
            "byte {offset} of the request's memory was written, which is not the device's to write"
        );
    }
    Ok(())
}

/// Fails unless the device refused the request with `status` and left its data
/// alone. `used.len` covers the status only where nothing comes before it.
pub(crate) fn refused(done: &Completion, status: Status) -> Result<()> {
    ended(done, status, usize::from(done.request.in_len == 0))?;
    ensure!(done.untouched, "data was written by a request that failed");
    Ok(())
}

/// Fails unless both are the same, and says where they are not.
pub(crate) fn same(found: &[u8], expected: &[u8]) -> Result<()> {
    ensure!(
        found.len() == expected.len(),
        "{} bytes instead of {}",
        found.len(),
        expected.len()
    );
    let differ = |(_, (a, b)): &(usize, (&u8, &u8))| a != b;
    let mut different = found.iter().zip(expected).enumerate().filter(differ);
    if let Some((first, _)) = different.next() {
        let (count, last) = different.fold((1, first), |(count, _), (at, _)| (count + 1, at));
        bail!(
            "{count} of {} bytes differ, from {first} to {last}, the first is {:#04x} instead of {:#04x}",
            found.len(),
            found[first],
            expected[first]
        );
    }
    Ok(())
}

/// A request and its shape in a few words, for errors.
pub(crate) fn describe(request: &Request, shape: &Shape) -> String {
    let (readable, writable) = shape.cut.lengths(request);
    let len = request.out.len().max(request.in_len);
    let mut text = format!(
        "{:?} of {len} bytes at sector {}, cut {:?} ({} + {} segments)",
        request.kind,
        request.sector,
        shape.cut,
        readable.len(),
        writable.len(),
    );
    if text.len() > 300 {
        text = format!(
            "{:?} of {len} bytes at sector {}, {} + {} segments",
            request.kind,
            request.sector,
            readable.len(),
            writable.len(),
        );
    }
    format!(
        "{text}, {:?}, at {} + {}",
        shape.table, shape.align, shape.offset
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(request: Request, status: Status, used_len: u32) -> Completion {
        Completion {
            data: vec![0x5a; request.in_len],
            request,
            head: 0,
            status,
            used_len,
            untouched: true,
            stray_write: None,
        }
    }

    #[test]
    fn regions() {
        let region = Region::new(4096, 16, 1 << 30, 4096).expect("room");
        assert_eq!((region.start, region.len), (4096, 16 << 20));
        assert_eq!(region.sector(), 8);
        let cut = Region::new(4096, 16, (2 << 20) + 512, 512).expect("room");
        assert_eq!(cut.len, (2 << 20) + 512 - 4096);
        assert!(Region::new(512, 16, 1 << 30, 4096).is_err());
        assert!(Region::new(1 << 30, 16, 1 << 30, 512).is_err());
        assert!(Region::new(u64::MAX - 511, 16, 1 << 30, 512).is_err());
    }

    #[test]
    fn used_len_is_checked() {
        let read = Request::read(0, 512);
        assert!(succeeded(&completion(read.clone(), Status::Ok, 513)).is_ok());
        assert!(succeeded(&completion(read.clone(), Status::Ok, 512)).is_err());
        assert!(succeeded(&completion(read.clone(), Status::IoErr, 513)).is_err());
        assert!(refused(&completion(read.clone(), Status::IoErr, 0), Status::IoErr).is_ok());
        assert!(refused(&completion(read.clone(), Status::IoErr, 1), Status::IoErr).is_err());
        let write = Request::write(0, vec![0; 512]);
        assert!(succeeded(&completion(write.clone(), Status::Ok, 1)).is_ok());
        assert!(succeeded(&completion(write.clone(), Status::Ok, 513)).is_err());
        assert!(refused(&completion(write, Status::IoErr, 1), Status::IoErr).is_ok());
        let mut touched = completion(read, Status::IoErr, 0);
        touched.untouched = false;
        assert!(refused(&touched, Status::IoErr).is_err());
        touched.stray_write = Some(3);
        let error = ended(&touched, Status::IoErr, 0).expect_err("a stray write");
        assert!(error.to_string().contains("byte 3"));
    }

    #[test]
    fn differences_are_located() {
        assert!(same(&[1, 2], &[1, 2]).is_ok());
        assert!(same(&[1], &[1, 2]).is_err());
        let error = same(&[1, 9, 8], &[1, 2, 3]).expect_err("two differ");
        assert_eq!(
            error.to_string(),
            "2 of 3 bytes differ, from 1 to 2, the first is 0x09 instead of 0x02"
        );
    }
}
