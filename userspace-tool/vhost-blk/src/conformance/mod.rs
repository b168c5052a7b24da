// SPDX-License-Identifier: GPL-2.0

//! `vhost-blk conformance`: one test for each statement of the virtio
//! specification, version 1.3, that binds a block device with split virtqueues.

mod block;
mod report;
mod ring;
mod session;
mod statements;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::args::{ConformanceArgs, SubjectArg};
use crate::exercise::check::Outcome;
use crate::exercise::disk::Disk;
use report::{Report, Results};
use session::{Subject, Target};
use statements::{Needs, STATEMENTS, Statement};

/// What the tests overwrite, bytes.
const REGION: usize = 1 << 20;

/// Runs the tests, or prints what was saved of them; returns whether none failed.
pub(crate) fn run(device: &Path, args: &ConformanceArgs) -> Result<bool> {
    if !args.markdown.is_empty() {
        print!("{}", report::markdown(&Results::load(&args.markdown)?));
        return Ok(true);
    }
    let chosen = |statement: &&Statement| {
        args.only.is_empty() || args.only.iter().any(|id| statement.id.starts_with(id))
    };
    let statements: Vec<_> = STATEMENTS.iter().filter(chosen).collect();
    if args.list {
        for Statement {
            id, level, text, ..
        } in &statements
        {
            println!("{id:<13} {level:<10} {text}");
        }
        return Ok(true);
    }
    let tests: Vec<_> = statements.iter().filter(|s| s.test.is_some()).collect();
    if tests.is_empty() {
        bail!("no test has such an id: see --list");
    }
    let target = match (args.path, &args.socket) {
        (SubjectArg::VhostBlk, None) => Target::Module(device.to_owned()),
        (SubjectArg::VhostUserBlk, Some(socket)) => Target::Server(socket.clone()),
        _ => bail!("--socket is for --path vhost-user-blk"),
    };
    let path = args.disk.as_deref().context("which disk? (--disk)")?;
    let disk = Disk::open(path, args.write)?;
    let timeout = Duration::from_secs(args.timeout);
    let subject = Subject::new(&target, &disk, args.write, timeout)
        .with_context(|| format!("{} cannot be tested", target.path().display()))?;
    let saved = match args.write {
        true => Some(disk.save(0, REGION).context("the tests need 1 MiB")?),
        false => None,
    };
    let name = args
        .name
        .clone()
        .unwrap_or_else(|| target.name().to_owned());
    let mut report = Report::new(&name, args.ktap, tests.len());
    for statement in tests {
        let begin = Instant::now();
        let result = test(&subject, statement);
        report.end(statement, result, begin.elapsed());
    }
    let restored = saved.map_or(Ok(()), |saved| disk.restore(&saved));
    let (results, passed) = report.finish();
    if let Some(file) = &args.save {
        results.save(file)?;
    }
    restored.context("cannot put back what was overwritten")?;
    Ok(passed)
}

fn test(subject: &Subject<'_>, statement: &Statement) -> Result<Outcome> {
    let skipped = |why: &str| Ok(Outcome::Skipped(why.to_owned()));
    match (statement.test, statement.needs) {
        (None, _) => skipped("not tested here"),
        (_, Needs::Config) if subject.is_module() => skipped("the configuration space is QEMU's"),
        (_, Needs::Write) if !subject.write => skipped("needs --write"),
        (Some(test), _) => test(subject),
    }
}
