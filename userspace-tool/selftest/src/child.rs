// SPDX-License-Identifier: GPL-2.0

//! Parts of tests that another process plays.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::context::Context;
use crate::{abi, dirty_log, kicks, lifecycle, zones};

/// Plays a part, with what it works on as standard input.
pub(crate) fn play(context: &Context, part: &str) -> ExitCode {
    match try_play(context, part) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_play(context: &Context, part: &str) -> Result<()> {
    let input = || -> Result<File> { Ok(std::io::stdin().as_fd().try_clone_to_owned()?.into()) };
    match part {
        "not_the_owner" => abi::not_the_owner(context, input()?),
        "wait" => {
            std::io::read_to_string(input()?)?;
            Ok(())
        }
        "log_of_another" => dirty_log::of_another(input()?),
        "kick" => kicks::kick(input()?),
        "hold" => lifecycle::hold(input()?),
        "zones" => zones::report_until_killed(context),
        busy if busy.starts_with("busy_") => lifecycle::busy_until_killed(context, busy),
        _ => bail!("no part {part}"),
    }
}
