// SPDX-License-Identifier: GPL-2.0

//! Results: as they come, kept in a file, and as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::statements::{STATEMENTS, Statement};
use crate::exercise::check::Outcome;

/// What became of a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mark {
    Skipped,
    Passed,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    mark: Mark,
    /// What was done, why not, or what went wrong.
    detail: String,
}

/// What the tests of one device or server said, by id.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Results {
    name: String,
    tests: BTreeMap<String, Entry>,
}

impl Results {
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// What was saved. Files with the same name are runs of the same device, on
    /// a disk that is read-only for instance: what one of them skipped counts
    /// only if all did.
    pub(crate) fn load(paths: &[PathBuf]) -> Result<Vec<Self>> {
        let mut all: Vec<Results> = Vec::new();
        for path in paths {
            let text = fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let results: Results = serde_json::from_str(&text)
                .with_context(|| format!("{} is not what --save keeps", path.display()))?;
            match all.iter_mut().find(|other| other.name == results.name) {
                Some(other) => other.merge(results),
                None => all.push(results),
            }
        }
        Ok(all)
    }

    fn merge(&mut self, other: Results) {
        for (id, entry) in other.tests {
            match self.tests.get_mut(&id) {
                Some(old) if old.mark >= entry.mark => {}
                _ => drop(self.tests.insert(id, entry)),
            }
        }
    }
}

/// Prints results as they come, for people or as KTAP.
pub(crate) struct Report {
    results: Results,
    ktap: bool,
}

impl Report {
    pub(crate) fn new(name: &str, ktap: bool, count: usize) -> Self {
        if ktap {
            println!("KTAP version 1\n1..{count}");
        }
        Report {
            results: Results {
                name: name.to_owned(),
                tests: BTreeMap::new(),
            },
            ktap,
        }
    }

    pub(crate) fn end(&mut self, statement: &Statement, result: Result<Outcome>, took: Duration) {
        let Statement {
            id, level, text, ..
        } = statement;
        let (mark, detail) = match result {
            Ok(Outcome::Passed(detail)) => (Mark::Passed, detail),
            Ok(Outcome::Skipped(reason)) => (Mark::Skipped, reason),
            Err(error) => (Mark::Failed, format!("{error:#}").replace('\n', " ")),
        };
        let number = self.results.tests.len() + 1;
        match (self.ktap, mark) {
            (true, Mark::Passed) => println!("# {level} {text} ({detail})\nok {number} {id}"),
            (true, Mark::Skipped) => println!("ok {number} {id} # SKIP {detail}"),
            (true, Mark::Failed) => println!("# {level} {text}: {detail}\nnot ok {number} {id}"),
            (false, Mark::Passed) => println!(
                "ok      {id:<13} {text} ({detail}, {:.1} s)",
                took.as_secs_f64()
            ),
            (false, Mark::Skipped) => println!("skip    {id:<13} {text} ({detail})"),
            (false, Mark::Failed) => println!("FAILED  {id:<13} {text}\n        {detail}"),
        }
        self.results
            .tests
            .insert((*id).to_owned(), Entry { mark, detail });
    }

    /// Prints the totals; returns all results, and whether none failed.
    pub(crate) fn finish(self) -> (Results, bool) {
        let count = |mark| {
            self.results
                .tests
                .values()
                .filter(|e| e.mark == mark)
                .count()
        };
        let failed = count(Mark::Failed);
        println!(
            "{}{} passed, {failed} failed, {} skipped",
            if self.ktap { "# " } else { "" },
            count(Mark::Passed),
            count(Mark::Skipped)
        );
        (self.results, failed == 0)
    }
}

/// The table of all statements, and what others than the first do not do.
pub(crate) fn markdown(all: &[Results]) -> String {
    let mut text = String::from("| statement | | what it says of the device | also");
    let mut line = String::from("|---|---|---|---");
    for results in all {
        let _ = write!(text, " | {}", results.name);
        line.push_str("|---");
    }
    text = format!("{text} |\n{line}|\n");
    for statement in STATEMENTS {
        let Statement {
            id,
            level,
            text: says,
            also,
            ..
        } = statement;
        let _ = write!(text, "| {id} | {level} | {says} | {also}");
        for results in all {
            let mark = match results.tests.get(*id).map(|entry| entry.mark) {
                Some(Mark::Passed) => "✓",
                Some(Mark::Failed) => "✗",
                Some(Mark::Skipped) | None => "–",
            };
            let _ = write!(text, " | {mark}");
        }
        text.push_str(" |\n");
    }
    for results in all {
        for (mark, title) in [
            (Mark::Failed, "does not do"),
            (Mark::Skipped, "cannot be tested for"),
        ] {
            let entries = STATEMENTS.iter().filter_map(|statement| {
                let entry = results.tests.get(statement.id)?;
                (entry.mark == mark).then_some((statement.id, entry))
            });
            let lines: String = entries.fold(String::new(), |mut lines, (id, entry)| {
                let _ = writeln!(lines, "- {id}: {}", entry.detail);
                lines
            });
            if !lines.is_empty() {
                let _ = write!(text, "\nWhat {} {title}:\n\n{lines}", results.name);
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(name: &str, marks: &[(&str, Mark)]) -> Results {
        let entry = |mark| Entry {
            mark,
            detail: "because".into(),
        };
        Results {
            name: name.into(),
            tests: marks
                .iter()
                .map(|&(id, mark)| (id.into(), entry(mark)))
                .collect(),
        }
    }

    #[test]
    fn tables_have_all_statements() {
        let one = results("one", &[("6.2-a", Mark::Passed)]);
        let two = results("two", &[("6.2-a", Mark::Failed), ("6.2-c", Mark::Skipped)]);
        let text = markdown(&[one, two]);
        let rows = text.lines().filter(|line| line.starts_with("| ")).count();
        assert_eq!(rows, STATEMENTS.len() + 1);
        assert!(text.contains("| 6.2-a | MUST | offers VERSION_1 |  | ✓ | ✗ |"));
        assert!(text.ends_with(
            "\nWhat two does not do:\n\n- 6.2-a: because\n\
             \nWhat two cannot be tested for:\n\n- 6.2-c: because\n"
        ));
    }

    #[test]
    fn what_one_run_skips_another_may_do() {
        let mut first = results("x", &[("a", Mark::Skipped), ("b", Mark::Passed)]);
        first.merge(results("x", &[("a", Mark::Passed), ("b", Mark::Skipped)]));
        assert_eq!(first.tests["a"].mark, Mark::Passed);
        assert_eq!(first.tests["b"].mark, Mark::Passed);
        first.merge(results("x", &[("b", Mark::Failed), ("c", Mark::Skipped)]));
        assert_eq!(first.tests["b"].mark, Mark::Failed);
        assert_eq!(first.tests["c"].mark, Mark::Skipped);
    }

    #[test]
    fn results_are_kept_in_files() {
        let path = std::env::temp_dir().join(format!("vhost-blk-results-{}", std::process::id()));
        results("x", &[("a", Mark::Failed)])
            .save(&path)
            .expect("a temporary file");
        let paths = [path.clone(), path.clone()];
        let all = Results::load(&paths).expect("it is there");
        fs::remove_file(&path).expect("it is there");
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].tests["a"].mark, Mark::Failed);
        assert!(Results::load(&paths).is_err());
    }
}
