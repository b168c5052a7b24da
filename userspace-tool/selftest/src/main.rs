// SPDX-License-Identifier: GPL-2.0

//! `selftest`: tests of `/dev/vhost-blk`, as KTAP.
//!
//! Every test runs in a process of its own, since what a test does may kill or
//! hang it. Between tests the kernel has to have been silent and a fresh device
//! has to work.

mod abi;
mod check;
mod child;
mod context;
mod dirty_log;
mod disk;
mod events;
mod iotlb;
mod kicks;
mod kmsg;
mod lifecycle;
mod memory;
mod pinned;
mod placement;
mod ranges;
mod request_defects;
mod requests;
mod ring_defects;
mod runner;
mod zones;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use vhost_blk_ring::uapi;

use context::{Context, Others, Test};
use events::Event;

/// Test /dev/vhost-blk: its interface, requests, and broken or hostile guests.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    /// The device node
    #[arg(long, default_value = uapi::DEVICE_PATH, value_name = "NODE")]
    device: PathBuf,
    /// The disk to test with, 64 MiB or more; its first 48 MiB are overwritten
    #[arg(
        long,
        value_name = "DISK",
        required_unless_present = "list",
        requires = "yes_destroy_data"
    )]
    disk: Option<PathBuf>,
    /// Confirm that what is on the disks is lost
    #[arg(long)]
    yes_destroy_data: bool,
    #[command(flatten)]
    others: Others,
    /// A disk that something happens to, 32 MiB or more, overwritten; only tests of that are run
    #[arg(long, value_name = "DISK", requires = "event", requires = "event_end")]
    event_disk: Option<PathBuf>,
    /// The shell command that makes it happen; which tests it is for, --only says
    #[arg(long, value_name = "COMMAND", requires = "event_disk")]
    event: Option<String>,
    /// The shell command that ends it, and prints where the disk is then, if that has changed
    #[arg(long, value_name = "COMMAND", requires = "event_disk")]
    event_end: Option<String>,
    /// For how long the workers may poll before they sleep; 0 for not at all
    #[arg(long, default_value_t = 0, value_name = "MICROSECONDS")]
    poll_us: u32,
    /// Keep the guests' memory pinned, rather than what each request needs
    #[arg(long)]
    pin_memory: bool,
    /// Run only tests whose name contains this; may be given more than once
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// List the tests and end
    #[arg(long)]
    list: bool,
    /// Run this test in this process
    #[arg(long, hide = true)]
    run_test: Option<String>,
    /// Play this part of a test
    #[arg(long, hide = true)]
    child: Option<String>,
}

/// All tests, in the order in which they run.
fn tests() -> Vec<&'static Test> {
    [
        abi::TESTS,
        requests::TESTS,
        request_defects::TESTS,
        ring_defects::TESTS,
        lifecycle::TESTS,
        memory::TESTS,
        pinned::TESTS,
        placement::TESTS,
        kicks::TESTS,
        dirty_log::TESTS,
        iotlb::TESTS,
        events::TESTS,
        ranges::TESTS,
        zones::TESTS,
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn main() -> ExitCode {
    let args = Args::parse();
    let selected: Vec<_> = tests()
        .into_iter()
        .filter(|test| args.only.is_empty() || args.only.iter().any(|o| test.name.contains(o)))
        .filter(|test| {
            args.list || test.name.starts_with(events::PREFIX) == args.event_disk.is_some()
        })
        .collect();
    if args.list {
        for test in selected {
            println!("{:40} {}", test.name, test.what);
        }
        return ExitCode::SUCCESS;
    }
    let Some(disk) = args.disk else {
        eprintln!("selftest: --disk is needed");
        return ExitCode::from(2);
    };
    let event = match (args.event_disk, args.event, args.event_end) {
        (Some(disk), Some(begin), Some(end)) => Some(Event { disk, begin, end }),
        _ => None,
    };
    let context = Context::new(
        args.device,
        disk,
        args.others,
        event,
        args.poll_us,
        args.pin_memory,
    );
    if let Some(name) = args.run_test {
        return runner::run_here(&context, &tests(), &name);
    }
    if let Some(part) = args.child {
        return child::play(&context, &part);
    }
    match runner::run_all(&context, &selected) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("Bail out! {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn command_line_is_consistent() {
        Args::command().debug_assert();
        assert!(Args::try_parse_from(["selftest", "--list"]).is_ok());
        assert!(Args::try_parse_from(["selftest", "--disk", "/dev/x"]).is_err());
        assert!(
            Args::try_parse_from(["selftest", "--disk", "/dev/x", "--yes-destroy-data"]).is_ok()
        );
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = tests().iter().map(|test| test.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.iter().all(|name| !name.contains([' ', '#'])));
    }
}
