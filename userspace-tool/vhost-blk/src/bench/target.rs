// SPDX-License-Identifier: GPL-2.0

//! The disk to measure with, as the command line names it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use vhost_blk_ring::request::SECTOR_SIZE;

use crate::exercise::disk::Disk;

/// A block device that nobody else uses, or an image file.
#[derive(Debug)]
pub(crate) enum Target {
    Disk(Disk),
    File { direct: File, bytes: u64 },
}

impl Target {
    /// Opens it for reading, and for writing if `write` says so.
    pub(crate) fn open(path: &Path, write: bool) -> Result<Self> {
        let shown = path.display();
        let kind = fs::metadata(path).with_context(|| format!("cannot look at {shown}"))?;
        if kind.is_file() {
            let direct = OpenOptions::new()
                .read(true)
                .write(write)
                .custom_flags(libc::O_DIRECT | libc::O_CLOEXEC)
                .open(path)
                .with_context(|| format!("cannot open {shown} for direct I/O"))?;
            return Ok(Target::File {
                direct,
                bytes: kind.len(),
            });
        }
        Disk::open(path, write).map(Target::Disk)
    }

    /// What a device is started on, opened exclusively if it is a block device.
    pub(crate) fn backend(&self) -> &File {
        match self {
            Target::Disk(disk) => disk.backend(),
            Target::File { direct, .. } => direct,
        }
    }

    /// For direct I/O.
    pub(crate) fn direct(&self) -> &File {
        match self {
            Target::Disk(disk) => disk.direct(),
            Target::File { direct, .. } => direct,
        }
    }

    /// Size, bytes.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Target::Disk(disk) => disk.bytes(),
            Target::File { bytes, .. } => *bytes,
        }
    }

    /// What requests have to be a multiple of, bytes. What a file needs, its
    /// file system says when it is read.
    pub(crate) fn block(&self) -> usize {
        match self {
            Target::Disk(disk) => disk.block(),
            Target::File { .. } => SECTOR_SIZE,
        }
    }
}

/// How much of a disk of `disk` bytes the requests are spread over: what
/// `--range` says, or all.
pub(crate) fn range(asked: Option<u64>, disk: u64, bs: u64, parts: u64) -> Result<u64> {
    let range = asked.unwrap_or(disk);
    if range > disk {
        bail!("--range is {range} bytes, and the disk has {disk}");
    }
    if range / bs < parts {
        bail!(
            "{range} bytes of the disk have no room for {parts} requests of {bs} bytes: \
             {} or a smaller --bs",
            if asked.is_some() {
                "a larger --range"
            } else {
                "a larger disk"
            }
        );
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(range(None, 1 << 20, 4096, 1).expect("room"), 1 << 20);
        assert_eq!(range(Some(8192), 1 << 20, 4096, 2).expect("room"), 8192);
        for (asked, bs, parts) in [
            (Some(2 << 20), 512, 1),
            (Some(8192), 4096, 3),
            (None, 2 << 20, 1),
        ] {
            assert!(range(asked, 1 << 20, bs, parts).is_err(), "{asked:?} {bs}");
        }
    }

    #[test]
    fn files_are_disks() {
        let path = std::env::temp_dir().join(format!("vhost-blk-target-{}", std::process::id()));
        fs::write(&path, [0; 8192]).expect("a temporary file");
        // Not all file systems have direct I/O.
        match Target::open(&path, true) {
            Ok(target) => assert_eq!((target.bytes(), target.block()), (8192, 512)),
            Err(error) => assert!(error.to_string().contains("direct I/O"), "{error:#}"),
        }
        fs::remove_file(&path).expect("it is there");
        assert!(Target::open(&path, false).is_err());
        assert!(Target::open(Path::new("/dev/null"), false).is_err());
    }
}
