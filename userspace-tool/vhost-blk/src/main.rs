// SPDX-License-Identifier: GPL-2.0

//! `vhost-blk`: checks a host and its vhost-blk module, and measures.

mod args;
mod bench;
mod conformance;
mod exercise;
mod probe;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match &args.command {
        Command::Probe(probe) => probe::run(&args.device, probe),
        Command::Exercise(exercise) => exercise::run(&args.device, exercise),
        Command::Conformance(conformance) => conformance::run(&args.device, conformance),
        Command::Bench(bench) => bench::run(&args.device, bench),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("vhost-blk: {error:#}");
            ExitCode::FAILURE
        }
    }
}
