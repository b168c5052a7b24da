// SPDX-License-Identifier: GPL-2.0

//! The disk as the host sees it, past its page cache.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vhost_blk_ring::aligned::{ALIGN, Aligned};
use vhost_blk_ring::request::SECTOR_SIZE;

/// How much is read or written at once, bytes.
const CHUNK: usize = 1 << 20;

/// A block device or image file that nobody else uses.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Opened exclusively, if it is a block device; this is what the module gets.
    backend: File,
    /// For the host's own view.
    direct: File,
    capacity: u64,
    block: usize,
    read_only: bool,
    /// None of an image file.
    sysfs: Option<Sysfs>,
    /// Bytes of the unit in which a filesystem has space for a file.
    unit: u64,
}

/// A copy of a piece of the disk.
#[derive(Debug)]
pub(crate) struct Saved {
    start: u64,
    bytes: Vec<u8>,
}

impl Disk {
    /// Opens the disk for reading, and for writing if `write` says so.
    pub(crate) fn open(path: &Path, write: bool) -> Result<Self> {
        let shown = path.display();
        let meta = fs::metadata(path).with_context(|| format!("cannot look at {shown}"))?;
        let image = meta.file_type().is_file();
        if !image && !meta.file_type().is_block_device() {
            bail!("{shown} is neither a block device nor an image file");
        }
        // O_EXCL of a block device: not while it is mounted or held by another.
        let backend = open(path, write, libc::O_EXCL).map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::EBUSY) => " (it is mounted, or another device or program holds it)",
                Some(libc::EACCES | libc::EPERM) => " (are you root?)",
                _ => "",
            };
            anyhow::Error::new(error).context(format!("cannot open {shown}{hint}"))
        })?;
        let direct = open(path, write, libc::O_DIRECT)
            .with_context(|| format!("cannot open {shown} for direct I/O"))?;
        // An image's filesystem is on a device, whose blocks are the units of direct I/O.
        let sysfs = Sysfs::of(if image { meta.dev() } else { meta.rdev() });
        let disk = Disk {
            backend,
            direct,
            capacity: if image {
                meta.len() / SECTOR_SIZE as u64
            } else {
                sysfs.number("size")?
            },
            block: usize::try_from(sysfs.queue_number("logical_block_size")?)?,
            read_only: sysfs.number("ro")? != 0,
            sysfs: (!image).then_some(sysfs),
            unit: meta.blksize(),
        };
        if disk.capacity == 0 {
            bail!("{shown} has no medium");
        }
        if disk.block > ALIGN {
            bail!(
                "{shown} has blocks of {} bytes, more than a page",
                disk.block
            );
        }
        if write && disk.is_zoned() {
            bail!(
                "{shown} is zoned: what the checks write would need its zones to be reset (test \
                 without --write, and with 'selftest --zoned-disk')"
            );
        }
        if write && disk.read_only {
            bail!("{shown} is read-only");
        }
        Ok(disk)
    }

    /// What the module gets.
    pub(crate) fn backend(&self) -> &File {
        &self.backend
    }

    /// For direct I/O of the host's own.
    pub(crate) fn direct(&self) -> &File {
        &self.direct
    }

    /// Sectors.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Size, bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.capacity * SECTOR_SIZE as u64
    }

    /// Size of a logical block, bytes.
    pub(crate) fn block(&self) -> usize {
        self.block
    }

    /// Sectors of a logical block.
    pub(crate) fn block_sectors(&self) -> u64 {
        (self.block / SECTOR_SIZE) as u64
    }

    /// Whether the disk itself takes no writes.
    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it has zones.
    pub(crate) fn is_zoned(&self) -> bool {
        let model = self.sysfs.as_ref().map(|sysfs| sysfs.queue_text("zoned"));
        model.is_some_and(|model| model.is_ok_and(|model| model != "none"))
    }

    /// How often it was flushed. None if it has no volatile cache, or if writes may pass through
    /// that without a flush of their own (FUA), or if it is an image.
    pub(crate) fn flushes(&self) -> Result<Option<u64>> {
        let Some(sysfs) = &self.sysfs else {
            return Ok(None);
        };
        let cached = sysfs.queue_text("write_cache")? == "write back";
        if !cached || sysfs.queue_number("fua")? != 0 {
            return Ok(None);
        }
        // Documentation/block/stat.rst: the field before the last.
        let stat = sysfs.text("stat")?;
        let count = stat.split_whitespace().nth(15);
        let count = count.and_then(|count| count.parse().ok());
        Ok(Some(count.context("the kernel does not count flushes")?))
    }

    /// What is on the disk, `len` bytes from `sector` on: whole blocks.
    pub(crate) fn read(&self, sector: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut aligned = Aligned::new(len.min(CHUNK));
        let mut offset = sector * SECTOR_SIZE as u64;
        for piece in bytes.chunks_mut(CHUNK) {
            let buffer = &mut aligned.bytes()[..piece.len()];
            self.direct
                .read_exact_at(buffer, offset)
                .with_context(|| format!("cannot read {} bytes at {offset}", piece.len()))?;
            piece.copy_from_slice(buffer);
            offset += piece.len() as u64;
        }
        Ok(bytes)
    }

    /// Writes whole blocks from `sector` on, past the module.
    pub(crate) fn write(&self, sector: u64, bytes: &[u8]) -> Result<()> {
        let mut aligned = Aligned::new(bytes.len().min(CHUNK));
        let mut offset = sector * SECTOR_SIZE as u64;
        for piece in bytes.chunks(CHUNK) {
            let buffer = &mut aligned.bytes()[..piece.len()];
            buffer.copy_from_slice(piece);
            self.direct
                .write_all_at(buffer, offset)
                .with_context(|| format!("cannot write {} bytes at {offset}", piece.len()))?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Whether the host's own reads into memory at an odd multiple of 512 bytes
    /// give the same as into whole pages, `len` bytes from `sector` on.
    ///
    /// A guest's buffers may be so, and a driver that errs here is no disk to
    /// compare with: null_blk with memory_backed and blocks of 4096 bytes is.
    pub(crate) fn reads_agree(&self, sector: u64, len: usize) -> Result<bool> {
        let whole = self.read(sector, len)?;
        let mut aligned = Aligned::new(len + SECTOR_SIZE);
        let odd = &mut aligned.bytes()[SECTOR_SIZE..];
        match self.direct.read_exact_at(odd, sector * SECTOR_SIZE as u64) {
            Ok(()) => Ok(odd == whole),
            // The disk needs more alignment than that.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(true),
            Err(error) => Err(error).context("cannot read into unaligned memory"),
        }
    }

    /// How many sectors the disk was told to discard since it appeared; of disks that keep no
    /// statistics, and of images, none.
    pub(crate) fn discarded(&self) -> Result<u64> {
        let Some(sysfs) = &self.sysfs else {
            return Ok(0);
        };
        let path = sysfs.0.join("stat");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        // Fields of reads, writes, and then discards: requests, merges, sectors, time.
        let sectors = text.split_whitespace().nth(13).map(str::parse);
        Ok(sectors.transpose()?.unwrap_or(0))
    }

    /// Sectors that are discarded together; 0 if the disk cannot.
    pub(crate) fn discard_sectors(&self) -> Result<u64> {
        let bytes = match &self.sysfs {
            Some(sysfs) => sysfs.queue_number("discard_granularity")?,
            None => self.unit,
        };
        Ok(bytes / SECTOR_SIZE as u64)
    }

    /// Copies `len` bytes at byte `start`: whole blocks.
    pub(crate) fn save(&self, start: u64, len: usize) -> Result<Saved> {
        let bytes = self.read(start / SECTOR_SIZE as u64, len)?;
        Ok(Saved { start, bytes })
    }

    /// Puts back what [`save`](Self::save) copied.
    pub(crate) fn restore(&self, saved: &Saved) -> Result<()> {
        self.write(saved.start / SECTOR_SIZE as u64, &saved.bytes)?;
        self.direct.sync_all().context("cannot flush the disk")
    }
}

fn open(path: &Path, write: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(path)
}

/// A block device in sysfs.
#[derive(Debug)]
struct Sysfs(PathBuf);

impl Sysfs {
    fn of(device: u64) -> Self {
        let (major, minor) = (libc::major(device), libc::minor(device));
        Sysfs(format!("/sys/dev/block/{major}:{minor}").into())
    }

    fn text(&self, name: &str) -> Result<String> {
        text(&self.0.join(name))
    }

    fn number(&self, name: &str) -> Result<u64> {
        number(&self.0.join(name))
    }

    /// A partition has its limits in the folder of its disk.
    fn queue(&self, name: &str) -> PathBuf {
        let own = self.0.join("queue");
        let folder = if own.is_dir() {
            own
        } else {
            self.0.join("../queue")
        };
        folder.join(name)
    }

    fn queue_text(&self, name: &str) -> Result<String> {
        text(&self.queue(name))
    }

    fn queue_number(&self, name: &str) -> Result<u64> {
        number(&self.queue(name))
    }
}

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .with_context(|| format!("cannot read {}", path.display()))
}

fn number(path: &Path) -> Result<u64> {
    let text = text(path)?;
    text.parse()
        .with_context(|| format!("{}: '{text}'", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_devices_and_files_are_disks() {
        let error = Disk::open(Path::new("/dev/null"), false).expect_err("a character device");
        assert!(error.to_string().contains("neither a block device"));
        assert!(Disk::open(Path::new("/nonexistent"), false).is_err());
    }
}
