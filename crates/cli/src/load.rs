//! `pirouette load`: many clients against a server → latencies, goodput, refusals.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pirouette_policy::sample_observation;
use pirouette_server::load::{self, LoadError, LoadOptions, LoadReport, Percentiles};
use serde::Serialize;

use crate::args::at_least_one;
use crate::log;
use crate::provenance::Provenance;
use crate::setup;
use crate::text::{table, writable, write_json};

/// Arguments of `load`.
#[derive(clap::Args)]
pub struct LoadArgs {
    /// The server: `ws://HOST:PORT`.
    #[arg(default_value = "ws://127.0.0.1:8000")]
    pub url: String,
    /// Connections, each with at most one request in flight, as a robot has.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub clients: u16,
    /// Requests per second of all clients together, at fixed times, latencies counted from when a
    /// request was due (default: each client asks as soon as it has its answer).
    #[arg(long)]
    pub rate: Option<f64>,
    /// `deadline_ms` of every request; later answers do not count as good.
    #[arg(long)]
    pub deadline_ms: Option<f64>,
    /// Seconds to run (default 10, unless --requests is given).
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Requests per client.
    #[arg(long, value_parser = at_least_one)]
    pub requests: Option<usize>,
    /// Requests per client before that, not counted.
    #[arg(long, default_value_t = 3)]
    pub warm_up: usize,
    /// Send what this configuration takes (default: what the server's contract asks for).
    #[arg(long)]
    pub config: Option<String>,
    /// Side of the images, in pixels.
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub side: u16,
    /// Send this JPEG or PNG file for every camera instead of pixels.
    #[arg(long, conflicts_with = "config")]
    pub image: Option<PathBuf>,
    /// File whose first key is sent as `Authorization: Api-Key …`.
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// Seconds after which a request without an answer counts as failed.
    #[arg(long, default_value_t = 30.0)]
    pub timeout: f64,
    /// Write the results as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    provenance: Provenance,
    url: &'a str,
    clients: u16,
    rate: Option<f64>,
    deadline_ms: Option<f64>,
    request_bytes: usize,
    goodput_per_s: f64,
    #[serde(flatten)]
    measured: &'a LoadReport,
}

/// Runs the clients and prints what they saw.
pub fn run(args: &LoadArgs) -> Result<()> {
    writable(&args.json)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(args))
}

async fn measure(args: &LoadArgs) -> Result<()> {
    let options = options(args).await?;
    let request_bytes = pirouette_server::msgpack::encode(&options.observation)?.len();
    log::note(format_args!(
        "{} clients · {} · {request_bytes} bytes a request",
        args.clients, args.url
    ));
    let (measured, failed) = match load::run(&options).await {
        Ok(measured) => (measured, None),
        // Told before it fails: an older file must not be read as this run's.
        Err(LoadError::Nothing { error, report }) => {
            let measured = (*report).clone();
            (measured, Some(LoadError::Nothing { error, report }))
        }
        Err(error) => return Err(error.into()),
    };
    match &args.json {
        Some(path) => save(path, args, request_bytes, &measured)?,
        None if failed.is_none() => print(&measured, args.rate),
        None => {}
    }
    failed.map_or(Ok(()), |error| Err(error.into()))
}

fn save(path: &Path, args: &LoadArgs, request_bytes: usize, measured: &LoadReport) -> Result<()> {
    let report = Report {
        provenance: Provenance::here(),
        url: &args.url,
        clients: args.clients,
        rate: args.rate,
        deadline_ms: args.deadline_ms,
        request_bytes,
        goodput_per_s: measured.goodput(),
        measured,
    };
    write_json(path, &report)
}

async fn options(args: &LoadArgs) -> Result<LoadOptions> {
    let positive = |value: Option<f64>, flag: &str| match value {
        Some(v) if !(v > 0.0 && v <= 1e6) => bail!("{flag} must be above 0, at most a million"),
        other => Ok(other),
    };
    let rate = positive(args.rate, "--rate")?;
    let deadline = positive(args.deadline_ms, "--deadline-ms")?;
    let seconds = positive(args.seconds, "--seconds")?;
    let timeout = positive(Some(args.timeout), "--timeout")?.unwrap_or(30.0);
    let api_key = args.api_key_file.as_deref().map(first_key).transpose()?;
    let observation = match &args.config {
        Some(name) => sample_observation(&setup::policy_config(name)?, 0),
        None => {
            let card = load::contract(&args.url, api_key.as_deref()).await.map_err(advised)?;
            let read = |path: &PathBuf| {
                std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
            };
            let image = args.image.as_ref().map(read).transpose()?.map(bytes::Bytes::from);
            load::observation_of(&card, args.side.into(), image.as_ref())?
        }
    };
    let by_time = args.requests.is_none().then_some(seconds.unwrap_or(10.0));
    Ok(LoadOptions {
        url: args.url.clone(),
        api_key,
        clients: args.clients.into(),
        requests: args.requests.unwrap_or(usize::MAX),
        duration: seconds.or(by_time).map(Duration::from_secs_f64),
        warm_up: args.warm_up,
        rate,
        deadline: deadline.map(|ms| Duration::from_secs_f64(ms / 1e3)),
        observation,
        timeout: Duration::from_secs_f64(timeout),
    })
}

/// `--config` helps where a server answered that it has no contract, not where none did.
fn advised(error: LoadError) -> anyhow::Error {
    let lacks = matches!(error, LoadError::Contract(_));
    let error = anyhow::Error::new(error);
    if !lacks {
        return error;
    }
    error.context("the server does not say what it takes: name its configuration with --config")
}

/// The first line of a key file that is one.
fn first_key(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("can't read the key file {}", path.display()))?;
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let line = lines.next().with_context(|| format!("{} holds no key", path.display()))?;
    // A key may be followed by its limits.
    Ok(line.split_whitespace().next().unwrap_or(line).to_string())
}

/// What was sent, where it is less than what was asked for: the clients wait for their answers.
fn shortfall(report: &LoadReport, rate: f64) -> Option<String> {
    let sent = report.sent_per_s?;
    let short = report.unsent > 0 || sent < 0.99 * rate;
    let unsent = report.unsent;
    short.then(|| format!("offered {rate:.1}/s, sent {sent:.1}/s: {unsent} due were never sent"))
}

fn print(report: &LoadReport, rate: Option<f64>) {
    println!(
        "{} sent, {} answered, {} good in {:.2} s: {:.1} good answers a second",
        report.sent,
        report.answered,
        report.good,
        report.seconds,
        report.goodput()
    );
    if let Some(line) = rate.and_then(|rate| shortfall(report, rate)) {
        println!("{line}");
    }
    println!();
    let row = |name: &str, p: &Percentiles| {
        let values = [p.p50_ms, p.p90_ms, p.p99_ms, p.p999_ms, p.max_ms, p.mean_ms];
        let cells = values.iter().map(|ms| format!("{ms:.3}"));
        std::iter::once(name.to_string()).chain(cells).collect::<Vec<_>>()
    };
    let mut rows = vec![
        row("latency", &report.latency),
        row("over the server's infer_ms", &report.over_server),
        row("over the model's infer_ms", &report.over_model),
    ];
    if report.refusal.max_ms > 0.0 {
        rows.push(row("until refused", &report.refusal));
    }
    print!("{}", table(&["ms", "p50", "p90", "p99", "p99.9", "max", "mean"], &rows));
    for (kind, count) in &report.errors {
        println!("{count} × {kind}");
    }
    if let Some(error) = &report.first_error {
        println!("the first: {error}");
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn where_nothing_was_answered_the_file_says_so() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("ws://{}", listener.local_addr().unwrap());
        // Takes connections, and drops them.
        std::thread::spawn(move || listener.incoming().for_each(drop));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("load.json");
        std::fs::write(&file, r#"{"goodput_per_s": 70.0}"#).unwrap();
        let line = ["pirouette", "load", &url, "--config", "pi05_droid", "--requests", "2"];
        let file = file.to_str().unwrap();
        let cli = Cli::try_parse_from(line.into_iter().chain(["--json", file])).unwrap();
        let Command::Load(args) = cli.command else { panic!("load was typed") };
        let error = format!("{:#}", run(&args).unwrap_err());
        assert!(error.starts_with("no request was answered"), "{error}");
        let text = std::fs::read_to_string(file).unwrap();
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(report["goodput_per_s"], 0.0, "{report}");
        assert_eq!((&report["sent"], &report["errors"]["transport"]), (&2.into(), &2.into()));
    }

    #[test]
    fn a_rate_that_was_not_sent_is_told() {
        let report =
            |unsent, sent| LoadReport { unsent, sent_per_s: Some(sent), ..LoadReport::default() };
        let told = shortfall(&report(180, 20.0), 200.0).unwrap();
        assert_eq!(told, "offered 200.0/s, sent 20.0/s: 180 due were never sent");
        assert!(shortfall(&report(0, 150.0), 200.0).is_some());
        assert_eq!(shortfall(&report(0, 199.9), 200.0), None);
    }
}
