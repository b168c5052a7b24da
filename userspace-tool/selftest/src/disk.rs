// SPDX-License-Identifier: GPL-2.0

//! Disks as the host sees them: past its page cache, and in sysfs.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vhost_blk_ring::aligned::{ALIGN, Aligned};

/// Size of a sector, bytes.
pub(crate) const SECTOR: usize = 512;

/// Start and length, in sectors, of what every test finds filled with [`pattern`] and only reads.
pub(crate) const PATTERN: (u64, usize) = (0, 16 << 11);

/// Start and length, in sectors, of what tests write to.
pub(crate) const SCRATCH: (u64, usize) = (16 << 11, 32 << 11);

/// Opens a disk.
pub(crate) fn open(path: &Path, read: bool, write: bool) -> Result<File> {
    OpenOptions::new()
        .read(read)
        .write(write)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Has a disk refuse writes, or take them again.
pub(crate) fn set_read_only(path: &Path, read_only: bool) -> Result<()> {
    let status = Command::new("blockdev")
        .arg(if read_only { "--setro" } else { "--setrw" })
        .arg(path)
        .status()
        .context("cannot run blockdev")?;
    ensure!(
        status.success(),
        "blockdev, of {}: {status}",
        path.display()
    );
    Ok(())
}

/// What is in `count` sectors from `sector` on: every eight bytes are different from all others on
/// the disk, and tell where they belong.
pub(crate) fn pattern(sector: u64, count: usize) -> Vec<u8> {
    numbered(0x5ec7_0000_0000_0000, sector, count)
}

/// As [`pattern`], with another content for each `seed`.
pub(crate) fn seeded(seed: u64, sector: u64, count: usize) -> Vec<u8> {
    numbered(0x5eed_0000_0000_0000 ^ (seed << 32), sector, count)
}

fn numbered(tag: u64, sector: u64, count: usize) -> Vec<u8> {
    let words = (SECTOR / 8) as u64;
    (0..words * count as u64)
        .flat_map(|word| (tag ^ (sector * words + word)).to_le_bytes())
        .collect()
}

/// A disk, opened with `O_DIRECT`.
#[derive(Debug)]
pub(crate) struct Disk(File);

impl Disk {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
            .open(path)
            .map(Disk)
            .with_context(|| format!("cannot open {} with O_DIRECT", path.display()))
    }

    /// Reads `count` sectors from `sector` on.
    pub(crate) fn read(&self, sector: u64, count: usize) -> Result<Vec<u8>> {
        // Whole blocks, whatever their size.
        let block = (ALIGN / SECTOR) as u64;
        let first = sector / block * block;
        let skipped = usize::try_from(sector - first)? * SECTOR;
        let len = (skipped + count * SECTOR).next_multiple_of(ALIGN);
        let mut buffer = Aligned::new(len);
        self.0
            .read_exact_at(buffer.bytes(), first * SECTOR as u64)
            .with_context(|| format!("O_DIRECT read of {count} sectors at {sector}"))?;
        Ok(buffer.bytes()[skipped..skipped + count * SECTOR].to_vec())
    }

    /// Reads a 4 KiB block to memory that is two pieces of pages.
    fn read_in_pieces(&self, sector: u64) -> Result<Vec<u8>> {
        let mut buffer = Aligned::new(2 * ALIGN);
        let bytes = &mut buffer.bytes()[SECTOR..SECTOR + ALIGN];
        self.0
            .read_exact_at(bytes, sector * SECTOR as u64)
            .with_context(|| format!("O_DIRECT read in pieces at {sector}"))?;
        Ok(bytes.to_vec())
    }

    /// Writes whole 4 KiB blocks from `sector` on.
    pub(crate) fn write(&self, sector: u64, data: &[u8]) -> Result<()> {
        let mut buffer = Aligned::new(data.len());
        buffer.bytes().copy_from_slice(data);
        self.0
            .write_all_at(buffer.bytes(), sector * SECTOR as u64)
            .with_context(|| format!("O_DIRECT write of {} bytes at {sector}", data.len()))
    }
}

/// Fills a disk with what the tests expect on it, and checks that it keeps that.
pub(crate) fn prepare(path: &Path) -> Result<()> {
    let meta = path
        .metadata()
        .with_context(|| format!("{}", path.display()))?;
    ensure!(
        meta.file_type().is_block_device() || meta.is_file(),
        "{} is neither a block device nor an image file",
        path.display()
    );
    let disk = Disk::open(path)?;
    let (start, count) = PATTERN;
    let step = 2048;
    for offset in (0..count).step_by(step) {
        let sector = start + offset as u64;
        disk.write(sector, &pattern(sector, step))?;
    }
    for offset in (0..count).step_by(step) {
        let sector = start + offset as u64;
        ensure!(
            disk.read(sector, step)? == pattern(sector, step),
            "{} does not keep what is written to it",
            path.display()
        );
    }
    // A disk that cannot read to such memory by itself does not have to.
    ensure!(
        disk.read_in_pieces(start)
            .map_or(true, |data| data == pattern(start, ALIGN / SECTOR)),
        "{} loses parts of blocks that are read to several pieces of memory, as null_blk does with \
         blocks of 4096 bytes: take another disk",
        path.display()
    );
    Ok(())
}

/// A disk's folder in sysfs; for a partition, that of the partition.
pub(crate) fn sysfs(path: &Path) -> Result<PathBuf> {
    let rdev = path.metadata()?.rdev();
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    Ok(PathBuf::from(format!("/sys/dev/block/{major}:{minor}")).canonicalize()?)
}

/// `queue/` of the whole disk.
pub(crate) fn queue_sysfs(path: &Path) -> Result<PathBuf> {
    let disk = sysfs(path)?;
    let queue = disk.join("queue");
    Ok(if queue.exists() {
        queue
    } else {
        disk.join("../queue").canonicalize()?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_tell_places_apart() {
        let all = pattern(7, 16);
        assert_eq!(all.len(), 16 * SECTOR);
        assert_eq!(pattern(8, 1), all[SECTOR..2 * SECTOR]);
        assert_ne!(pattern(0, 1), seeded(0, 0, 1));
        assert_ne!(seeded(1, 0, 1), seeded(0, 0, 1));
        let mut words: Vec<_> = all.chunks(8).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 16 * SECTOR / 8);
    }
}
