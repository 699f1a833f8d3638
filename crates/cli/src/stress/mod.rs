//! `pirouette stress`: every promise of the server that needs no GPU, put to the test → a table
//! of bars and measured values, and a results file.
//!
//! Models are null devices whose times come from a table measured on an H200; everything else is
//! the real thing: `pirouette serve` in a process of its own, loopback sockets, real frames.

mod abuse;
mod bare;
mod client;
mod engine;
mod port;
mod server;
mod traffic;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pirouette_engine::NullTimes;
use serde::Serialize;

use crate::log;
use crate::provenance::Provenance;
use crate::text::{table, writable, write_json};

/// Arguments of `stress`.
#[derive(clap::Args)]
pub struct StressArgs {
    /// A few seconds for each row, with loose bars for times: machines that run tests are shared.
    #[arg(long)]
    pub short: bool,
    /// Only these rows.
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// The server of `overhead` with `serve --busy-poll=MS`.
    #[arg(long, value_name = "MS")]
    pub busy_poll: Option<f64>,
    /// Seconds of overload, up to a week (default 600; 10 in the short form).
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub overload_seconds: Option<u64>,
    /// Write the results as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// How much of everything.
pub struct Scale {
    /// The short form.
    pub short: bool,
    overload_seconds: Option<u64>,
    /// Milliseconds the server of `overhead` stays awake; `None`: as it does by itself.
    pub busy_poll: Option<f64>,
    /// Milliseconds of a batch as measured on an H200.
    pub times: NullTimes,
}

impl Scale {
    /// The full count, or the short one.
    pub fn of<T>(&self, full: T, short: T) -> T {
        if self.short { short } else { full }
    }

    /// Seconds of the overload row.
    pub fn overload(&self) -> Duration {
        Duration::from_secs(self.overload_seconds.unwrap_or(self.of(600, 10)))
    }

    /// Samples per second of the measured table at a batch size.
    pub fn capacity(&self, batch: usize) -> f64 {
        batch as f64 / self.times.of(batch).as_secs_f64()
    }
}

/// One promise: a bar, what was measured, and whether it holds.
#[derive(Debug, Serialize)]
pub struct Check {
    what: String,
    bar: String,
    measured: String,
    holds: bool,
}

impl Check {
    /// `measured` must be at least `bar`.
    pub fn at_least(what: &str, bar: f64, measured: f64) -> Check {
        Check::new(what, format!(">= {bar:.3}"), format!("{measured:.3}"), measured >= bar)
    }

    /// `measured` must be at most `bar`.
    pub fn at_most(what: &str, bar: f64, measured: f64) -> Check {
        Check::new(what, format!("<= {bar:.3}"), format!("{measured:.3}"), measured <= bar)
    }

    /// A count that must be exactly this.
    pub fn exactly(what: &str, bar: u64, measured: u64) -> Check {
        Check::new(what, bar.to_string(), measured.to_string(), measured == bar)
    }

    /// A count of something that must have happened, or the row shows nothing.
    pub fn some(what: &str, measured: u64) -> Check {
        Check::new(what, "> 0".into(), measured.to_string(), measured > 0)
    }

    /// A number that explains the others; nothing is promised of it.
    pub fn told(what: &str, measured: f64) -> Check {
        Check::new(what, "-".into(), format!("{measured:.3}"), true)
    }

    fn new(what: &str, bar: String, measured: String, holds: bool) -> Check {
        Check { what: what.into(), bar, measured, holds }
    }
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    what: &'static str,
    passed: bool,
    seconds: f64,
    checks: Vec<Check>,
    error: Option<String>,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    provenance: Provenance,
    optimised: bool,
    short: bool,
    busy_poll: Option<f64>,
    batch_ms: Vec<(usize, f64)>,
    rows: Vec<Row>,
}

type Outcome = Result<Vec<Check>>;

struct Promise {
    name: &'static str,
    what: &'static str,
    run: fn(&tokio::runtime::Runtime, &Scale) -> Outcome,
}

const PROMISES: &[Promise] = &[
    Promise {
        name: "throughput",
        what: "64 clients against offline batches of 64",
        run: |rt, scale| rt.block_on(traffic::throughput(scale)),
    },
    Promise {
        name: "overhead",
        what: "one client, three 224x224 images: everything but the model",
        run: |rt, scale| rt.block_on(traffic::overhead(scale)),
    },
    Promise {
        name: "overload",
        what: "twice the capacity, 128 clients with deadlines",
        run: |rt, scale| rt.block_on(traffic::overload(scale)),
    },
    Promise {
        name: "replicas",
        what: "two engines against one",
        run: |rt, scale| rt.block_on(traffic::replicas(scale)),
    },
    Promise {
        name: "frames",
        what: "mutated frames over TCP, a good client beside them",
        run: |rt, scale| rt.block_on(abuse::frames(scale)),
    },
    Promise {
        name: "kills",
        what: "clients that connect and die",
        run: |rt, scale| rt.block_on(abuse::kills(scale)),
    },
    Promise {
        name: "half_open",
        what: "1000 half-open sockets beside 64 good clients",
        run: |rt, scale| rt.block_on(abuse::half_open(scale)),
    },
    Promise {
        name: "faults",
        what: "engines killed under load",
        run: |rt, scale| rt.block_on(engine::faults(scale)),
    },
    Promise {
        name: "one_of_two",
        what: "one of two engines killed under load",
        run: |rt, scale| rt.block_on(engine::one_of_two(scale)),
    },
    Promise {
        name: "swaps",
        what: "checkpoints swapped at 80 % load",
        run: |rt, scale| rt.block_on(traffic::swaps(scale)),
    },
    Promise {
        name: "interleavings",
        what: "deterministic mode: the same bits in any company",
        run: |rt, scale| rt.block_on(engine::interleavings(scale)),
    },
];

/// Runs the rows; an error when one does not hold.
pub fn run(args: &StressArgs) -> Result<()> {
    writable(&args.json)?;
    for name in &args.only {
        if !PROMISES.iter().any(|p| p.name == name) {
            let names: Vec<&str> = PROMISES.iter().map(|p| p.name).collect();
            bail!("no row `{name}`: {}", names.join(", "));
        }
    }
    raise_file_limit();
    silence_engines();
    let times = measured_times()?;
    let StressArgs { short, overload_seconds, busy_poll, .. } = *args;
    let scale = Scale { short, overload_seconds, busy_poll, times };
    let mut report = Report {
        provenance: Provenance::here(),
        optimised: !cfg!(debug_assertions),
        short,
        busy_poll,
        batch_ms: scale.times.0.clone(),
        rows: vec![],
    };
    for promise in PROMISES {
        if args.only.is_empty() || args.only.iter().any(|n| n == promise.name) {
            let row = row(promise, &scale);
            // Rows take minutes: they are shown as they come, but for what a program reads.
            if args.json.as_ref().is_none_or(|path| path.as_os_str() != "-") {
                row.print();
            }
            report.rows.push(row);
        }
    }
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    let failed: Vec<&str> = report.rows.iter().filter(|r| !r.passed).map(|r| r.name).collect();
    if !failed.is_empty() {
        bail!("not held: {}", failed.join(", "));
    }
    Ok(())
}

fn row(promise: &Promise, scale: &Scale) -> Row {
    log::note(format_args!("{}: {} …", promise.name, promise.what));
    let began = Instant::now();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let outcome = match &runtime {
        Ok(runtime) => (promise.run)(runtime, scale),
        Err(error) => Err(anyhow::anyhow!("no runtime: {error}")),
    };
    let (checks, error) = match outcome {
        Ok(checks) => (checks, None),
        Err(error) => (vec![], Some(format!("{error:#}"))),
    };
    let passed = error.is_none() && checks.iter().all(|c| c.holds);
    let seconds = began.elapsed().as_secs_f64();
    Row { name: promise.name, what: promise.what, passed, seconds, checks, error }
}

impl Row {
    fn print(&self) {
        let outcome = if self.passed { "held  " } else { "FAILED" };
        println!("{outcome} {} ({:.1} s)", self.name, self.seconds);
        let cells = |c: &Check| {
            let mark = if c.holds { "" } else { "<- not held" };
            vec![format!("  {}", c.what), c.bar.clone(), c.measured.clone(), mark.into()]
        };
        let rows: Vec<Vec<String>> = self.checks.iter().map(cells).collect();
        print!("{}", table(&["", "bar", "measured", ""], &rows));
        if let Some(error) = &self.error {
            println!("  {error}");
        }
    }
}

/// Batch → milliseconds, from the benchmark kept in the repository.
fn measured_times() -> Result<NullTimes> {
    let text = include_str!("../../../../benchmarks/h200/pi0-batch.json");
    let report: serde_json::Value = serde_json::from_str(text)?;
    let rows = report["results"].as_array().context("the benchmark has no results")?;
    let pair =
        |row: &serde_json::Value| Some((row["batch"].as_u64()? as usize, row["p50_ms"].as_f64()?));
    let table: Option<Vec<_>> = rows.iter().map(pair).collect();
    Ok(NullTimes(table.context("a row has no batch or no median")?))
}

/// Engines are killed by panics here; their words would drown the table. Other threads have theirs.
fn silence_engines() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        if !thread.name().is_some_and(|name| name.starts_with("device-")) {
            usual(panic);
        }
    }));
}

/// A thousand sockets need as many descriptors, at both ends.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Where it can't be raised, the rows that need it say what they lacked.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
