// SPDX-License-Identifier: GPL-2.0

//! Runs tests, each in a process of its own, and prints KTAP.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::check;
use crate::context::{Context, NOTE, STEP, Skip, Test};
use crate::disk;
use crate::kmsg::Kmsg;
use crate::{events, lifecycle, memory};

/// Exit status of a test that was skipped, as kernel selftests have it.
const SKIPPED: u8 = 4;

/// Name of the check that runs after every test.
const HEALTH: Test = Test {
    name: "health",
    what: "a fresh device works",
    timeout: 60,
    run: |context| {
        let mut guest = context.started(|_| {})?;
        check::healthy("fresh device", &mut guest, 0)
    },
};

/// What became of a test.
enum Outcome {
    Passed,
    Skipped(String),
    Failed,
    /// Failed, and its process is still there.
    Hangs,
}

/// Runs one test in this process, of which the parent is [`run_all`].
pub(crate) fn run_here(context: &Context, tests: &[&Test], name: &str) -> ExitCode {
    let Some(test) = tests
        .iter()
        .copied()
        .chain([&HEALTH])
        .find(|test| test.name == name)
    else {
        println!("no test {name}");
        return ExitCode::FAILURE;
    };
    match (test.run)(context) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            if error.is::<Skip>() {
                ExitCode::from(SKIPPED)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Runs tests, and returns whether none failed.
pub(crate) fn run_all(context: &Context, tests: &[&Test]) -> Result<bool> {
    println!("KTAP version 1");
    println!("1..{}", tests.len());
    disk::prepare(context.disk_path())?;
    let mut kmsg = Kmsg::open()?;
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    let mut hanging: Vec<&str> = Vec::new();
    for (number, test) in (1..).zip(tests) {
        let begin = Instant::now();
        let (users, pinned) = (lifecycle::users(), memory::pinned_pages());
        let mut outcome = run_apart(context, test)?;
        let hangs = matches!(outcome, Outcome::Hangs);
        // What happens to disks makes others say so.
        let eventful = test.name.starts_with(events::PREFIX);
        for line in kmsg.new_lines()? {
            if eventful && !line.contains("vhost") {
                continue;
            }
            println!("# {}: the kernel printed: {line}", test.name);
            outcome = Outcome::Failed;
        }
        if matches!(outcome, Outcome::Failed | Outcome::Hangs) && !hanging.is_empty() {
            println!(
                "# {}: it may be because of {hanging:?}, which still hang",
                test.name
            );
        }
        if hangs {
            hanging.push(test.name);
        }
        if let Some(trouble) = left_behind(users, pinned) {
            println!("# {}: {trouble}", test.name);
            outcome = Outcome::Failed;
        }
        if let Outcome::Failed | Outcome::Hangs = run_apart(context, &HEALTH)? {
            println!("# {}: afterwards a fresh device does not work", test.name);
            outcome = Outcome::Failed;
        }
        for line in kmsg.new_lines()? {
            println!("# {}: afterwards the kernel printed: {line}", test.name);
            outcome = Outcome::Failed;
        }
        let seconds = begin.elapsed().as_secs_f32();
        match outcome {
            Outcome::Passed => {
                passed += 1;
                println!(
                    "ok {number} - {} # {} ({seconds:.1} s)",
                    test.name, test.what
                );
            }
            Outcome::Skipped(reason) => {
                skipped += 1;
                println!("ok {number} - {} # SKIP {reason}", test.name);
            }
            Outcome::Failed | Outcome::Hangs => {
                failed += 1;
                // It may have left anything on the disk.
                disk::prepare(context.disk_path())?;
                println!(
                    "not ok {number} - {} # {} ({seconds:.1} s)",
                    test.name, test.what
                );
            }
        }
    }
    if skipped > 0 {
        println!("# {skipped} skipped");
    }
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// Says what a test left in the kernel: it has to use the module and to have pages pinned as often
/// as before.
fn left_behind(users: Option<u64>, pinned: Option<i64>) -> Option<String> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let now = (lifecycle::users(), memory::pinned_pages());
        if now == (users, pinned) {
            return None;
        }
        if Instant::now() >= deadline {
            return Some(format!(
                "users of the module and pinned pages are {now:?}, {:?} before",
                (users, pinned)
            ));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a test in another process, and prints what it has to say if it fails.
fn run_apart(context: &Context, test: &Test) -> Result<Outcome> {
    let mut child = context
        .again()?
        .arg("--run-test")
        .arg(test.name)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run this program again")?;
    let (sender, lines) = mpsc::channel();
    let stdout = child.stdout.take().context("no pipe to the test")?;
    let stderr = child.stderr.take().context("no pipe to the test")?;
    read_lines(stdout, sender.clone());
    read_lines(stderr, sender);

    let deadline = Instant::now() + Duration::from_secs(test.timeout);
    let mut said: Vec<String> = Vec::new();
    let mut hangs = false;
    // Both pipes close when the process ends.
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => said.push(line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                hangs = true;
                break;
            }
        }
    }
    if hangs {
        print_said(test, &said);
        println!("# {}: hangs: no end after {} s", test.name, test.timeout);
        print!("{}", where_it_hangs(test, child.id()));
        return Ok(if end(test, &mut child)? {
            Outcome::Failed
        } else {
            Outcome::Hangs
        });
    }
    let Some(status) = wait(&mut child, Duration::from_secs(60))? else {
        print_said(test, &said);
        println!("# {}: hangs in its exit", test.name);
        print!("{}", where_it_hangs(test, child.id()));
        return Ok(Outcome::Hangs);
    };
    Ok(match status.code() {
        Some(0) => {
            for note in said.iter().filter_map(|line| line.strip_prefix(NOTE)) {
                println!("# {}: {note}", test.name);
            }
            Outcome::Passed
        }
        Some(code) if code == i32::from(SKIPPED) => {
            Outcome::Skipped(said.pop().unwrap_or_default())
        }
        _ => {
            print_said(test, &said);
            println!("# {}: ended with {status}", test.name);
            Outcome::Failed
        }
    })
}

fn read_lines(pipe: impl std::io::Read + Send + 'static, sender: mpsc::Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            // Nobody listens any more to a test that hung.
            if sender.send(line).is_err() {
                return;
            }
        }
    });
}

/// Prints what a test said: the last of its steps, and all else.
fn print_said(test: &Test, said: &[String]) {
    let mut step = None;
    for line in said {
        match line.strip_prefix(STEP) {
            Some(text) => step = Some(text),
            None => {
                let line = line.strip_prefix(NOTE).unwrap_or(line);
                println!("# {}: {line}", test.name);
            }
        }
    }
    if let Some(step) = step {
        println!("# {}: it was at: {step}", test.name);
    }
}

/// Where the threads of a process wait, as far as the kernel tells.
fn where_it_hangs(test: &Test, pid: u32) -> String {
    let mut text = String::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name| {
            fs::read_to_string(task.path().join(name))
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "# {}: thread {} waits in {}",
            test.name,
            read("comm"),
            read("wchan")
        );
        for frame in read("stack").lines() {
            let _ = writeln!(text, "# {}:   {frame}", test.name);
        }
    }
    text
}

/// Kills a test that hangs, and returns whether that works.
fn end(test: &Test, child: &mut Child) -> Result<bool> {
    child.kill().context("cannot kill a test")?;
    let ended = wait(child, Duration::from_secs(10))?.is_some();
    if !ended {
        println!("# {}: cannot be killed", test.name);
        print!("{}", where_it_hangs(test, child.id()));
    }
    Ok(ended)
}

/// Waits for a process to end.
fn wait(child: &mut Child, timeout: Duration) -> Result<Option<std::process::ExitStatus>> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}
