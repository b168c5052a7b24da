// SPDX-License-Identifier: GPL-2.0

//! What was measured, for people or as JSON.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::account::{HostUse, ServerUse, Switches, ThreadUse};
use super::engine::Counts;
use super::load::{Outcome, histogram};
use crate::args::{BenchArgs, CompletionArg, PathArg, RwArg, WorkerModeArg, WorkersArg};

/// All figures of one run. Those per request are per read and write; the flushes
/// of `--sync-every-write` are part of their writes.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    path: PathArg,
    disk: Option<PathBuf>,
    rw: RwArg,
    bs: u64,
    iodepth: u16,
    queues: u16,
    requests: u64,
    flushes: u64,
    seconds: f64,
    iops: f64,
    bytes_per_second: f64,
    lat_us: Option<Latency>,
    cpu: Cpu,
    /// Everything on this machine but guests, as `/proc/stat` counts it.
    host_non_guest_us_per_req: f64,
    context_switches: ContextSwitches,
    interrupts_per_req: f64,
    kicks_per_req: f64,
    calls_per_req: f64,
    server_threads: Option<ServerThreads>,
    options: Options,
}

/// Microseconds.
#[derive(Debug, PartialEq, Serialize)]
struct Latency {
    mean: f64,
    p50: f64,
    p99: f64,
    p999: f64,
    min: f64,
    max: f64,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Self {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        let at = |quantile| micros(histogram.value_at_quantile(quantile));
        Latency {
            mean: histogram.mean() / 1e3,
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            min: micros(histogram.min()),
            max: micros(histogram.max()),
        }
    }
}

/// Processor time for each request, microseconds.
#[derive(Debug, Serialize)]
struct Cpu {
    front_end_us_per_req: f64,
    front_end_user_us_per_req: f64,
    front_end_system_us_per_req: f64,
    server_us_per_req: Option<f64>,
}

#[derive(Debug, Serialize)]
struct ContextSwitches {
    front_end: PerRequest,
    server: Option<PerRequest>,
}

#[derive(Debug, PartialEq, Serialize)]
struct PerRequest {
    voluntary: f64,
    involuntary: f64,
}

impl PerRequest {
    fn of(switches: Switches, requests: f64) -> Self {
        PerRequest {
            voluntary: switches.voluntary as f64 / requests,
            involuntary: switches.involuntary as f64 / requests,
        }
    }
}

#[derive(Debug, Serialize)]
struct ServerThreads {
    count: usize,
    appeared: usize,
    disappeared: usize,
}

/// How it was measured.
#[derive(Debug, Serialize)]
struct Options {
    rwmixread: Option<u8>,
    queue_size: Option<u16>,
    completion: CompletionArg,
    count: Option<u64>,
    runtime: Option<f64>,
    warmup: u64,
    sync_every_write: bool,
    event_idx: Option<bool>,
    indirect: Option<bool>,
    workers: Option<WorkersArg>,
    worker_mode: Option<WorkerModeArg>,
    poll_us: Option<u32>,
    pin_memory: Option<bool>,
    registered: Option<bool>,
    huge_pages: bool,
    range: u64,
    seed: u64,
    latency: bool,
    batch: Option<u16>,
}

impl Options {
    fn new(args: &BenchArgs, range: u64) -> Self {
        let rings = args.path != PathArg::IoUring;
        let module = args.path == PathArg::VhostBlk;
        Options {
            rwmixread: (args.rw == RwArg::RandRw).then_some(args.rwmixread),
            queue_size: rings.then_some(args.queue_size),
            completion: args.completion,
            count: args.count,
            runtime: args.runtime.map(|time| time.as_secs_f64()),
            warmup: args.warmup,
            sync_every_write: args.sync_every_write,
            event_idx: rings.then_some(args.event_idx.is_on()),
            indirect: rings.then_some(args.indirect.is_on()),
            workers: module.then_some(args.workers),
            worker_mode: args.worker_mode,
            poll_us: module.then_some(args.poll_us),
            pin_memory: module.then_some(args.pin_memory),
            registered: (!rings).then_some(!args.unregistered),
            huge_pages: args.huge_pages.is_on(),
            range,
            seed: args.seed,
            latency: !args.no_latency,
            batch: args.batch,
        }
    }
}

impl Report {
    /// Of what all queues did, and what the others used meanwhile.
    pub(crate) fn new(
        args: &BenchArgs,
        range: u64,
        outcomes: &[Outcome],
        server: Option<ServerUse>,
        host: HostUse,
    ) -> Result<Self> {
        let begin = outcomes.iter().map(|outcome| outcome.begin).min();
        let end = outcomes.iter().map(|outcome| outcome.end).max();
        let time = end.zip(begin).context("no queue")?;
        let seconds = time.0.duration_since(time.1).as_secs_f64();
        let requests: u64 = outcomes.iter().map(|outcome| outcome.requests).sum();
        let thread = outcomes
            .iter()
            .fold(ThreadUse::default(), |sum, outcome| sum.and(outcome.thread));
        let mut counts = Counts::default();
        let mut latencies = histogram()?;
        for outcome in outcomes {
            counts.kicks += outcome.counts.kicks;
            counts.calls += outcome.counts.calls;
            if let Some(histogram) = &outcome.latencies {
                latencies.add(histogram)?;
            }
        }
        let per = requests as f64;
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / per;
        Ok(Report {
            path: args.path,
            disk: args.disk.clone(),
            rw: args.rw,
            bs: args.bs,
            iodepth: args.iodepth,
            queues: args.queues,
            requests,
            flushes: outcomes.iter().map(|outcome| outcome.flushes).sum(),
            seconds,
            iops: per / seconds,
            bytes_per_second: per * args.bs as f64 / seconds,
            lat_us: (!latencies.is_empty()).then(|| Latency::of(&latencies)),
            cpu: Cpu {
                front_end_us_per_req: micros(thread.cpu),
                front_end_user_us_per_req: micros(thread.user),
                front_end_system_us_per_req: micros(thread.system),
                server_us_per_req: server.map(|server| micros(server.cpu)),
            },
            host_non_guest_us_per_req: micros(host.busy),
            context_switches: ContextSwitches {
                front_end: PerRequest::of(thread.switches, per),
                server: server.map(|server| PerRequest::of(server.switches, per)),
            },
            interrupts_per_req: host.interrupts as f64 / per,
            kicks_per_req: counts.kicks as f64 / per,
            calls_per_req: counts.calls as f64 / per,
            server_threads: server.map(|server| ServerThreads {
                count: server.threads,
                appeared: server.appeared,
                disappeared: server.disappeared,
            }),
            options: Options::new(args, range),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, text: String| writeln!(f, "{name:<18} {text}");
        line(
            "requests",
            format!(
                "{} and {} flushes in {:.3} s",
                self.requests, self.flushes, self.seconds
            ),
        )?;
        line(
            "throughput",
            format!(
                "{:.0} requests and {:.1} MiB a second",
                self.iops,
                self.bytes_per_second / f64::from(1 << 20)
            ),
        )?;
        if let Some(lat) = &self.lat_us {
            line(
                "latency",
                format!(
                    "mean {:.1}, median {:.1}, 99 % {:.1}, 99.9 % {:.1}, {:.1} to {:.1} us",
                    lat.mean, lat.p50, lat.p99, lat.p999, lat.min, lat.max
                ),
            )?;
        }
        line("", "for each request:".into())?;
        line(
            "CPU, front end",
            format!(
                "{:.3} us (user {:.3}, system {:.3})",
                self.cpu.front_end_us_per_req,
                self.cpu.front_end_user_us_per_req,
                self.cpu.front_end_system_us_per_req
            ),
        )?;
        if let (Some(cpu), Some(threads)) = (self.cpu.server_us_per_req, &self.server_threads) {
            line(
                "CPU, server",
                format!("{cpu:.3} us ({} threads)", threads.count),
            )?;
            if threads.appeared + threads.disappeared > 0 {
                line(
                    "",
                    format!(
                        "({} of its threads appeared, {} disappeared)",
                        threads.appeared, threads.disappeared
                    ),
                )?;
            }
        }
        line(
            "CPU, machine",
            format!("{:.3} us", self.host_non_guest_us_per_req),
        )?;
        let switches = |s: &PerRequest| {
            format!(
                "{:.3} voluntary, {:.3} involuntary",
                s.voluntary, s.involuntary
            )
        };
        line("switches", switches(&self.context_switches.front_end))?;
        if let Some(server) = &self.context_switches.server {
            line("switches, server", switches(server))?;
        }
        line(
            "interrupts",
            format!("{:.3} of the machine", self.interrupts_per_req),
        )?;
        line(
            "notifications",
            format!(
                "{:.3} kicks, {:.3} calls",
                self.kicks_per_req, self.calls_per_req
            ),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, Command};
    use clap::Parser;
    use std::time::Instant;

    fn args(words: &str) -> Box<BenchArgs> {
        let words = ["vhost-blk", "bench"].into_iter().chain(words.split(' '));
        match Args::try_parse_from(words).expect("correct words").command {
            Command::Bench(args) => args,
            _ => unreachable!("bench was parsed"),
        }
    }

    fn outcome(begin: Instant, from: u64, to: u64, latencies: Option<&[u64]>) -> Outcome {
        let mut recorded = histogram().expect("it fits");
        for &nanos in latencies.unwrap_or_default() {
            recorded.record(nanos).expect("in range");
        }
        Outcome {
            requests: 100,
            flushes: 10,
            begin: begin + Duration::from_millis(from),
            end: begin + Duration::from_millis(to),
            thread: ThreadUse {
                cpu: Duration::from_micros(300),
                user: Duration::from_micros(100),
                system: Duration::from_micros(200),
                switches: Switches {
                    voluntary: 50,
                    involuntary: 1,
                },
            },
            counts: Counts {
                kicks: 100,
                calls: 80,
            },
            latencies: latencies.map(|_| recorded),
        }
    }

    #[test]
    fn figures_are_per_request() {
        let args = args("--path vhost-blk --disk /dev/x --rw randrw --count 200 --queues 2");
        let begin = Instant::now();
        let outcomes = [
            outcome(begin, 0, 90, Some(&[1000, 2000])),
            outcome(begin, 10, 100, Some(&[3000, 90_000])),
        ];
        let server = ServerUse {
            cpu: Duration::from_micros(400),
            switches: Switches {
                voluntary: 200,
                involuntary: 0,
            },
            threads: 1,
            appeared: 0,
            disappeared: 0,
        };
        let host = HostUse {
            busy: Duration::from_micros(2000),
            interrupts: 600,
        };
        let report = Report::new(&args, 1 << 20, &outcomes, Some(server), host).expect("figures");
        let json = serde_json::to_value(&report).expect("JSON");
        let number = |path: &str| {
            let value = json.pointer(path).and_then(serde_json::Value::as_f64);
            value.unwrap_or_else(|| panic!("{path} in {json:#}"))
        };
        for (path, expected) in [
            ("/requests", 200.0),
            ("/flushes", 20.0),
            ("/seconds", 0.1),
            ("/iops", 2000.0),
            ("/bytes_per_second", 2000.0 * 4096.0),
            ("/lat_us/min", 1.0),
            ("/lat_us/p50", 2.0),
            ("/lat_us/max", 90.0),
            ("/lat_us/p999", 90.0),
            ("/lat_us/mean", 24.0),
            ("/cpu/front_end_us_per_req", 3.0),
            ("/cpu/front_end_user_us_per_req", 1.0),
            ("/cpu/front_end_system_us_per_req", 2.0),
            ("/cpu/server_us_per_req", 2.0),
            ("/host_non_guest_us_per_req", 10.0),
            ("/context_switches/front_end/voluntary", 0.5),
            ("/context_switches/server/voluntary", 1.0),
            ("/interrupts_per_req", 3.0),
            ("/kicks_per_req", 1.0),
            ("/calls_per_req", 0.8),
            ("/options/range", f64::from(1 << 20)),
        ] {
            let found = number(path);
            assert!((found / expected - 1.0).abs() < 1e-3, "{path}: {found}");
        }
        assert_eq!(json["path"], "vhost-blk");
        assert_eq!(json["rw"], "randrw");
        assert_eq!(json["options"]["workers"], "shared");
        let text = report.to_string();
        for line in [
            "2000 requests",
            "median 2.0",
            "1.000 kicks",
            "2.000 us (1 threads)",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn what_was_not_measured_is_null() {
        let args = args("--path front-end --rw read --count 100 --no-latency");
        let outcomes = [outcome(Instant::now(), 0, 1, None)];
        let report =
            Report::new(&args, 1 << 20, &outcomes, None, HostUse::default()).expect("figures");
        let json = serde_json::to_value(&report).expect("JSON");
        for path in [
            "/disk",
            "/lat_us",
            "/cpu/server_us_per_req",
            "/context_switches/server",
        ] {
            assert!(
                json.pointer(path).is_some_and(serde_json::Value::is_null),
                "{path}"
            );
        }
        assert!(!report.to_string().contains("latency"));
        assert!(Report::new(&args, 0, &[], None, HostUse::default()).is_err());
    }
}
