// SPDX-License-Identifier: GPL-2.0

//! Prints results as they come, for people or as KTAP.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::check::{Check, Outcome};

/// Counts results and prints them.
pub(crate) struct Report {
    out: Box<dyn Write>,
    ktap: bool,
    bar: ProgressBar,
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Report {
    /// Begins a report of `count` checks.
    pub(crate) fn new(out: Box<dyn Write>, ktap: bool, count: usize) -> Self {
        let bar = if ktap {
            ProgressBar::hidden()
        } else {
            // On standard error; hidden by itself if that is no terminal.
            let style = ProgressStyle::with_template("{spinner} {pos}/{len} {elapsed} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(count as u64).with_style(style)
        };
        bar.enable_steady_tick(Duration::from_millis(200));
        let mut report = Report {
            out,
            ktap,
            bar,
            passed: 0,
            failed: 0,
            skipped: 0,
        };
        if ktap {
            report.print(&format!("KTAP version 1\n1..{count}"));
        }
        report
    }

    /// Something to know beforehand.
    pub(crate) fn note(&mut self, text: &str) {
        let mark = if self.ktap { "# " } else { "" };
        self.print(&format!("{mark}{text}"));
    }

    /// A check begins.
    pub(crate) fn begin(&self, check: &Check) {
        self.bar.set_message(check.name);
    }

    /// A check has ended.
    pub(crate) fn end(&mut self, check: &Check, result: Result<Outcome>, took: Duration) {
        match &result {
            Ok(Outcome::Passed(_)) => self.passed += 1,
            Ok(Outcome::Skipped(_)) => self.skipped += 1,
            Err(_) => self.failed += 1,
        }
        let number = self.passed + self.failed + self.skipped;
        let text = if self.ktap {
            ktap(number, check, &result)
        } else {
            human(check, &result, took)
        };
        self.print(&text);
        self.bar.inc(1);
    }

    /// Prints the totals, and returns whether nothing failed.
    pub(crate) fn finish(mut self) -> bool {
        self.bar.finish_and_clear();
        let mark = if self.ktap { "# " } else { "" };
        let skipped = match self.skipped {
            0 => String::new(),
            count => format!(", {count} skipped"),
        };
        self.print(&format!(
            "{mark}{} passed, {} failed{skipped}",
            self.passed, self.failed
        ));
        self.failed == 0
    }

    /// Prints lines. If nobody reads them, the checks go on all the same, and
    /// what they have overwritten is put back.
    fn print(&mut self, text: &str) {
        let Report { out, bar, .. } = self;
        bar.suspend(|| {
            let _ = writeln!(out, "{text}");
        });
    }
}

fn human(check: &Check, result: &Result<Outcome>, took: Duration) -> String {
    let (state, detail) = match result {
        Ok(Outcome::Passed(detail)) => ("ok", format!("{detail}, {:.1} s", took.as_secs_f64())),
        Ok(Outcome::Skipped(reason)) => ("skip", reason.clone()),
        Err(error) => ("FAILED", format!("{error:#}")),
    };
    if result.is_err() {
        format!(
            "{state:<7} {}: {}\n        {detail}",
            check.name, check.title
        )
    } else {
        format!("{state:<7} {}: {} ({detail})", check.name, check.title)
    }
}

fn ktap(number: usize, check: &Check, result: &Result<Outcome>) -> String {
    let Check { name, title, .. } = check;
    match result {
        Ok(Outcome::Passed(detail)) => format!("# {title} ({detail})\nok {number} {name}"),
        Ok(Outcome::Skipped(reason)) => format!("ok {number} {name} # SKIP {reason}"),
        Err(error) => {
            let detail = format!("{error:#}").replace('\n', "\n# ");
            format!("# {title}: {detail}\nnot ok {number} {name}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;
    use std::io;

    const CHECK: Check = Check {
        name: "name",
        title: "what is true",
        writes: false,
        run: |_| Ok(Outcome::Passed(String::new())),
    };

    fn results() -> [Result<Outcome>; 3] {
        [
            Ok(Outcome::Passed("3 reads".into())),
            Ok(Outcome::Skipped("no disk".into())),
            Err(anyhow!("cause").context("effect\nof it")),
        ]
    }

    #[test]
    fn results_as_ktap() {
        let lines = results().map(|result| ktap(2, &CHECK, &result));
        assert_eq!(lines[0], "# what is true (3 reads)\nok 2 name");
        assert_eq!(lines[1], "ok 2 name # SKIP no disk");
        assert_eq!(
            lines[2],
            "# what is true: effect\n# of it: cause\nnot ok 2 name"
        );
    }

    #[test]
    fn results_for_people() {
        let lines = results().map(|result| human(&CHECK, &result, Duration::from_millis(1500)));
        assert_eq!(lines[0], "ok      name: what is true (3 reads, 1.5 s)");
        assert_eq!(lines[1], "skip    name: what is true (no disk)");
        assert!(lines[2].starts_with("FAILED  name: what is true\n"));
        assert!(lines[2].ends_with("effect\nof it: cause"));
    }

    #[test]
    fn totals_decide() {
        let mut report = Report::new(Box::new(io::sink()), false, 3);
        for result in results() {
            report.begin(&CHECK);
            report.end(&CHECK, result, Duration::ZERO);
        }
        assert_eq!((report.passed, report.failed, report.skipped), (1, 1, 1));
        assert!(!report.finish());
        let mut report = Report::new(Box::new(io::sink()), true, 1);
        report.end(&CHECK, Ok(Outcome::Skipped(String::new())), Duration::ZERO);
        assert!(report.finish());
    }
}
