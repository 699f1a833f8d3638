//! Mutated real files and frames → every parser of outside bytes; a panic is a finding.
//!
//! `cargo run --release -p pirouette-fuzz -- SECONDS [TARGET…]`. The seed is printed; a finding is
//! written to `target/fuzz/` and replayed with `-- --replay TARGET FILE`.

mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::targets::{TARGETS, Target};
use pirouette_testing::mutate::Mutator;

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("fuzz: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    if let [flag, target, file] = arguments
        && flag == "--replay"
    {
        let input = std::fs::read(file).with_context(|| format!("can't read {file}"))?;
        (find(target)?.run)(&input);
        println!("{target}: {file} passes");
        return Ok(());
    }
    let (seconds, names) = arguments.split_first().context("usage: SECONDS [TARGET…]")?;
    let seconds: f64 = seconds.parse().context("SECONDS is not a number")?;
    let seed = match std::env::var("FUZZ_SEED") {
        Ok(seed) => seed.parse().context("FUZZ_SEED is not a number")?,
        Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(1, |t| t.as_nanos() as u64),
    };
    println!("seed {seed} (FUZZ_SEED={seed} repeats this run)");
    // A panic is reported with its input; the hook's own text would drown it.
    std::panic::set_hook(Box::new(|_| {}));
    let mut findings = 0;
    for target in TARGETS {
        if names.is_empty() || names.iter().any(|n| n == target.name) {
            findings += fuzz(target, Duration::from_secs_f64(seconds), seed)?;
        }
    }
    if findings > 0 {
        bail!("{findings} findings");
    }
    Ok(())
}

fn find(name: &str) -> Result<&'static Target> {
    TARGETS.iter().find(|t| t.name == name).with_context(|| {
        let names: Vec<&str> = TARGETS.iter().map(|t| t.name).collect();
        format!("no target `{name}`: {}", names.join(", "))
    })
}

/// Runs one target for a while; returns how many findings it made (it stops at the first).
fn fuzz(target: &Target, time: Duration, seed: u64) -> Result<usize> {
    let corpus = targets::corpus(target)?;
    let mut mutator = Mutator::new(seed);
    let started = Instant::now();
    let (mut runs, mut slowest) = (0u64, Duration::ZERO);
    while runs < corpus.len() as u64 || started.elapsed() < time {
        // The unmutated files come first: they must pass as well.
        let input = match corpus.get(runs as usize) {
            Some(whole) => whole.clone(),
            None => mutator.mutate(&corpus),
        };
        let begun = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (target.run)(&input)));
        slowest = slowest.max(begun.elapsed());
        runs += 1;
        if let Err(panic) = outcome {
            let path = keep(target.name, &input)?;
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("panic");
            eprintln!("{}: {text}\n  input kept in {}", target.name, path.display());
            return Ok(1);
        }
    }
    println!(
        "{:<18} {:>4} seeds {runs:>9} runs, slowest {:.1} ms",
        target.name,
        corpus.len(),
        slowest.as_secs_f64() * 1e3
    );
    Ok(0)
}

fn keep(name: &str, input: &[u8]) -> Result<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fuzz");
    std::fs::create_dir_all(&dir)?;
    let path = dir.join(format!("{name}-{}", std::process::id()));
    std::fs::write(&path, input)?;
    Ok(path)
}
