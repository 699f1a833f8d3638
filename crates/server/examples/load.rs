//! Prints what a server at a websocket address can do.
//!
//! `cargo run --release -p pirouette-server --example load -- ws://127.0.0.1:8000 --clients 64`

use std::time::Duration;

use pirouette_server::load::{LoadOptions, Percentiles, run, sample_observation};

const USAGE: &str = "load URL [--clients 1] [--requests 1000] [--warm-up 20] [--rate R] \
    [--deadline-ms D] [--cameras 3] [--side 224] [--api-key K]";

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut given = std::env::args().skip(1);
    let (mut cameras, mut side) = (3, 224);
    let mut options = LoadOptions {
        url: given.next().ok_or(USAGE)?,
        api_key: None,
        clients: 1,
        requests: 1000,
        warm_up: 20,
        rate: None,
        deadline: None,
        observation: sample_observation(0, 0),
        timeout: Duration::from_secs(30),
    };
    while let Some(flag) = given.next() {
        let value = given.next().ok_or(USAGE)?;
        match flag.as_str() {
            "--clients" => options.clients = value.parse()?,
            "--requests" => options.requests = value.parse()?,
            "--warm-up" => options.warm_up = value.parse()?,
            "--rate" => options.rate = Some(value.parse()?),
            "--deadline-ms" => {
                options.deadline = Some(Duration::from_secs_f64(value.parse::<f64>()? / 1e3));
            }
            "--cameras" => cameras = value.parse()?,
            "--side" => side = value.parse()?,
            "--api-key" => options.api_key = Some(value),
            _ => return Err(USAGE.into()),
        }
    }
    options.observation = sample_observation(cameras, side);
    let report = run(&options).await?;
    println!(
        "{} sent, {} answered, {} good in {:.2} s: {:.1} good/s",
        report.sent,
        report.answered,
        report.good,
        report.seconds,
        report.goodput()
    );
    let row = |name: &str, p: &Percentiles| {
        println!(
            "{name:12} p50 {:8.3}  p90 {:8.3}  p99 {:8.3}  p99.9 {:8.3}  max {:8.3}  \
             mean {:8.3} ms",
            p.p50_ms, p.p90_ms, p.p99_ms, p.p999_ms, p.max_ms, p.mean_ms
        );
    };
    row("latency", &report.latency);
    row("over server", &report.over_server);
    row("over model", &report.over_model);
    if !report.errors.is_empty() {
        row("refusals", &report.refusal);
        println!("errors: {:?}; first: {}", report.errors, report.first_error.unwrap_or_default());
    }
    Ok(())
}
