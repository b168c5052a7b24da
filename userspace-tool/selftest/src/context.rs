// SPDX-License-Identifier: GPL-2.0

//! What a test is, and what it is given.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use vhost_blk_ring::uapi::Info;
use vhost_blk_ring::{Device, Guest, Options, WorkerMode};

use crate::disk::{self, Disk};
use crate::events::Event;

/// How long a request may take. Generous: the host may be emulated.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// For how long nothing has to happen where nothing may happen.
pub(crate) const QUIET: Duration = Duration::from_millis(150);

/// How long a test may take, unless it says otherwise, in seconds.
pub(crate) const USUAL: u64 = 60;

/// A test.
pub(crate) struct Test {
    /// Its module and what it is about.
    pub(crate) name: &'static str,
    /// What it checks.
    pub(crate) what: &'static str,
    /// How long it may take, seconds.
    pub(crate) timeout: u64,
    /// The test. An error is a failure, unless it is a [`Skip`].
    pub(crate) run: fn(&Context) -> Result<()>,
}

/// Makes a [`Test`].
macro_rules! test {
    ($name:literal, $what:literal, $run:expr) => {
        test!($name, $what, $crate::context::USUAL, $run)
    };
    ($name:literal, $what:literal, $timeout:expr, $run:expr) => {
        $crate::context::Test {
            name: $name,
            what: $what,
            timeout: $timeout,
            run: $run,
        }
    };
}
pub(crate) use test;

/// The error of a test that cannot run here, and why.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// A test ends here, since it cannot run.
pub(crate) fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(Skip(reason.into()).into())
}

/// The path that an argument gives. Without it, the test is skipped.
fn given<'a>(path: &'a Option<PathBuf>, argument: &str) -> Result<&'a Path> {
    match path {
        Some(path) => Ok(path),
        None => skip(format!("needs {argument}")),
    }
}

/// What only some tests need.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Others {
    /// A disk that takes 500 ms or more for a request (dm-delay), 16 MiB or more, of which 12 are
    /// overwritten; without it some tests are skipped
    #[arg(long, value_name = "DISK")]
    pub(crate) slow_disk: Option<PathBuf>,
    /// A disk that takes one request at a time, for a second, and lets who submits another wait, 1 MiB or
    /// more, overwritten; without it some tests are skipped
    #[arg(long, value_name = "DISK")]
    pub(crate) narrow_disk: Option<PathBuf>,
    /// A disk of which the first half works and every request to the second half fails (dm-linear
    /// and dm-error), 4 MiB or more, overwritten; without it some tests are skipped
    #[arg(long, value_name = "DISK")]
    pub(crate) bad_disk: Option<PathBuf>,
    /// A zoned disk with a limit of open and one of active zones, at least two conventional zones and
    /// eight sequential ones, whose capacity is below their size, overwritten; without it some tests
    /// are skipped
    #[arg(long, value_name = "DISK")]
    pub(crate) zoned_disk: Option<PathBuf>,
    /// A folder on a filesystem that has a disk, such as ext4; without it some tests are skipped
    #[arg(long, value_name = "FOLDER")]
    pub(crate) folder: Option<PathBuf>,
}

/// What the tests work with.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    device: PathBuf,
    disk: PathBuf,
    others: Others,
    event: Option<Event>,
    poll_us: u32,
    pin_memory: bool,
}

impl Context {
    pub(crate) fn new(
        device: PathBuf,
        disk: PathBuf,
        others: Others,
        event: Option<Event>,
        poll_us: u32,
        pin_memory: bool,
    ) -> Self {
        Context {
            device,
            disk,
            others,
            event,
            poll_us,
            pin_memory,
        }
    }

    /// Path of the disk.
    pub(crate) fn disk_path(&self) -> &Path {
        &self.disk
    }

    /// The device, freshly opened.
    pub(crate) fn device(&self) -> Result<Device> {
        Ok(Device::open(&self.device)?)
    }

    /// What a guest is made with: the usual, on our device node.
    pub(crate) fn options(&self) -> Options {
        Options {
            path: self.device.clone(),
            busyloop_timeout: self.poll_us,
            pin_memory: self.pin_memory,
            ..Options::default()
        }
    }

    /// A guest on a fresh device, not started.
    pub(crate) fn guest(&self, change: impl FnOnce(&mut Options)) -> Result<Guest> {
        let mut options = self.options();
        change(&mut options);
        Ok(Guest::new(&options)?)
    }

    /// A guest on a fresh device, started on the disk.
    pub(crate) fn started(&self, change: impl FnOnce(&mut Options)) -> Result<Guest> {
        let guest = self.guest(change)?;
        guest.start(self.disk()?)?;
        Ok(guest)
    }

    /// The mode of the workers in some of the rounds of a test: what is asked for, unless the kernel
    /// has one mode only.
    pub(crate) fn worker_mode(&self, kthread: bool) -> Result<Option<WorkerMode>> {
        if self.device()?.get_fork_from_owner().is_err() {
            return Ok(None);
        }
        Ok(Some(if kthread {
            WorkerMode::Kthread
        } else {
            WorkerMode::Task
        }))
    }

    /// The disk, for a backend.
    pub(crate) fn disk(&self) -> Result<File> {
        disk::open(&self.disk, true, true)
    }

    /// The disk, opened read-only.
    pub(crate) fn disk_read_only(&self) -> Result<File> {
        disk::open(&self.disk, true, false)
    }

    /// The disk, opened write-only.
    pub(crate) fn disk_write_only(&self) -> Result<File> {
        disk::open(&self.disk, false, true)
    }

    /// The disk, to look at what is on it past the host's cache.
    pub(crate) fn direct(&self) -> Result<Disk> {
        Disk::open(&self.disk)
    }

    /// Path of the slow disk. Without one, the test is skipped.
    pub(crate) fn slow_disk_path(&self) -> Result<&Path> {
        given(&self.others.slow_disk, "--slow-disk")
    }

    /// The slow disk, for a backend.
    pub(crate) fn slow_disk(&self) -> Result<File> {
        disk::open(self.slow_disk_path()?, true, true)
    }

    /// Path of the disk that takes one request at a time. Without one, the test is skipped.
    pub(crate) fn narrow_disk_path(&self) -> Result<&Path> {
        given(&self.others.narrow_disk, "--narrow-disk")
    }

    /// The disk that takes one request at a time, for a backend.
    pub(crate) fn narrow_disk(&self) -> Result<File> {
        disk::open(self.narrow_disk_path()?, true, true)
    }

    /// The disk that fails in its second half, for a backend. Without one, the test is skipped.
    pub(crate) fn bad_disk(&self) -> Result<File> {
        disk::open(given(&self.others.bad_disk, "--bad-disk")?, true, true)
    }

    /// Path of the zoned disk. Without one, the test is skipped.
    pub(crate) fn zoned_disk_path(&self) -> Result<&Path> {
        given(&self.others.zoned_disk, "--zoned-disk")
    }

    /// The zoned disk, for a backend.
    pub(crate) fn zoned_disk(&self) -> Result<File> {
        disk::open(self.zoned_disk_path()?, true, true)
    }

    /// A folder on a filesystem that has a disk. Without one, the test is skipped.
    pub(crate) fn folder(&self) -> Result<&Path> {
        given(&self.others.folder, "--folder")
    }

    /// What happens to a disk. Without one, the test is skipped.
    pub(crate) fn event(&self) -> Result<&Event> {
        match &self.event {
            Some(event) => Ok(event),
            None => skip("needs --event-disk"),
        }
    }

    /// What the device says of the disk.
    pub(crate) fn info(&self) -> Result<Info> {
        let disk = self.disk_read_only()?;
        Ok(self.device()?.info(Some(disk.as_fd()))?)
    }

    /// Says what comes next: it is printed if the test fails or hangs there.
    #[expect(clippy::unused_self, reason = "only a test has steps")]
    pub(crate) fn step(&self, what: impl fmt::Display) {
        println!("{STEP}{what}");
        // The runner reads it from a pipe. If that is gone, so is the reader.
        let _ = std::io::stdout().flush();
    }

    /// Says something that is printed whatever becomes of the test.
    #[expect(clippy::unused_self, reason = "only a test has notes")]
    pub(crate) fn note(&self, what: impl fmt::Display) {
        println!("{NOTE}{what}");
    }

    /// This program again, to do something else in another process.
    pub(crate) fn again(&self) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .arg("--device")
            .arg(&self.device)
            .arg("--disk")
            .arg(&self.disk)
            .arg("--yes-destroy-data")
            .stdin(Stdio::null());
        let others = &self.others;
        for (argument, path) in [
            ("--slow-disk", &others.slow_disk),
            ("--narrow-disk", &others.narrow_disk),
            ("--bad-disk", &others.bad_disk),
            ("--zoned-disk", &others.zoned_disk),
            ("--folder", &others.folder),
        ] {
            if let Some(path) = path {
                command.arg(argument).arg(path);
            }
        }
        if let Some(event) = &self.event {
            command.arg("--event-disk").arg(&event.disk);
            command.args(["--event", &event.begin, "--event-end", &event.end]);
        }
        command.arg("--poll-us").arg(self.poll_us.to_string());
        if self.pin_memory {
            command.arg("--pin-memory");
        }
        Ok(command)
    }

    /// Runs this program in another process, to play `part` of a test with `file` as its standard
    /// input, and returns what it printed.
    pub(crate) fn other_process(&self, part: &str, file: File) -> Result<String> {
        let output = self
            .again()?
            .arg("--child")
            .arg(part)
            .stdin(file)
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run this program again")?;
        anyhow::ensure!(
            output.status.success(),
            "the other process ({part}) ended with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stdout)
        );
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// What a line starts with that names a step, between a test and the runner.
pub(crate) const STEP: &str = "@step ";

/// What a line starts with that is printed even if the test passes.
pub(crate) const NOTE: &str = "@note ";
