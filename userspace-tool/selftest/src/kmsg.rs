// SPDX-License-Identifier: GPL-2.0

//! What the kernel prints.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail};

/// Lines that say nothing about what a test did, and why.
const UNRELATED: &[(&str, &str)] = &[
    ("clocksource: ", "the emulated host's clock is uneven"),
    ("hrtimer: interrupt took", "the emulated host is slow"),
    ("perf: interrupt took too long", "the emulated host is slow"),
    ("random: crng init done", "the host has just booted"),
    (
        "open zones exceeded error, dev",
        "only the disk counts them: the block layer tells of it, a few times",
    ),
    (
        "active zones exceeded error, dev",
        "only the disk counts them: the block layer tells of it, a few times",
    ),
];

/// The kernel's log, from now on.
#[derive(Debug)]
pub(crate) struct Kmsg(File);

impl Kmsg {
    /// Opens it at its end.
    pub(crate) fn open() -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/kmsg")
            .context("cannot open /dev/kmsg")?;
        file.seek(SeekFrom::End(0)).context("/dev/kmsg")?;
        Ok(Kmsg(file))
    }

    /// Lines that the kernel has printed since the last call.
    pub(crate) fn new_lines(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(len) => lines.extend(kernel_line(&String::from_utf8_lossy(&record[..len]))),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(lines),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Records that were overwritten before they were read.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {
                    lines.push("(lines are lost: the kernel prints too much)".to_owned());
                }
                Err(e) => bail!("/dev/kmsg: {e}"),
            }
        }
    }
}

/// The text of a record of `/dev/kmsg`, if the kernel itself printed it, and it may have to do
/// with a test.
fn kernel_line(record: &str) -> Option<String> {
    let (prefix, text) = record.split_once(';')?;
    let priority: u32 = prefix.split(',').next()?.parse().ok()?;
    // The facility: 0 is the kernel, all else comes from user space.
    if priority >> 3 != 0 {
        return None;
    }
    // Lines after the first are the record's dictionary.
    let text = text.lines().next().unwrap_or_default();
    let unrelated = UNRELATED.iter().any(|(start, _)| text.starts_with(start));
    (!unrelated).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read() {
        let kernel = "4,339,5140900,-;vhost_blk: hello\n SUBSYSTEM=x\n";
        assert_eq!(kernel_line(kernel).as_deref(), Some("vhost_blk: hello"));
        assert_eq!(kernel_line("30,1,2,-;systemd[1]: hello\n"), None);
        assert_eq!(kernel_line("6,1,2,-;random: crng init done\n"), None);
        assert_eq!(kernel_line("nonsense"), None);
    }
}
