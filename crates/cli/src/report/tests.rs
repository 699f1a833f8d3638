//! The whole command on the tiny checkpoint: profile, ladder and report in seconds.

use std::path::PathBuf;

use clap::Parser;
use pirouette_testing::fixture::testdata;
use serde_json::Value;

use super::data::{ModelReport, Published, Report, read};
use super::html::markdown;
use super::html::tests::assert_well_formed;
use crate::args::{Cli, Command};

/// Runs a command line as typed, but for the binary's name.
fn pirouette(line: &[&str]) -> anyhow::Result<()> {
    let cli = Cli::try_parse_from(["pirouette"].iter().chain(line))?;
    match cli.command {
        Command::Profile(a) => crate::profile::run(&a),
        Command::Ladder(a) => crate::ladder::run(&a),
        Command::Report(a) => super::run(&a),
        _ => anyhow::bail!("not a command of these tests"),
    }
}

fn tiny(model: &str) -> String {
    testdata().join("A_tiny").join(model).display().to_string()
}

const SMALL: [&str; 10] =
    ["--device", "cpu", "--threads", "2", "--steps", "2", "--runs", "2", "--prompt-tokens", "5"];

#[test]
fn tiny_profile_writes_a_trace_and_tables() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (trace, json, tiny) = (at("trace.json"), at("profile.json"), tiny("pi0"));
    let mut line = vec!["profile", "--checkpoint", &tiny, "--trace", &trace, "--json", &json];
    line.extend(SMALL);
    pirouette(&line).unwrap();
    let trace: Value = read(&PathBuf::from(trace)).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().any(|e| e["name"] == "denoise.step1.0.up" && e["ph"] == "X"));
    let profile: Value = read(&PathBuf::from(json)).unwrap();
    assert!(profile["end_to_end_ms"].as_f64().unwrap() > 0.0);
    let total = profile["total_ms"].as_f64().unwrap();
    for table in ["categories", "stages", "kinds"] {
        let rows = profile[table].as_array().unwrap();
        let sum: f64 = rows.iter().map(|r| r["ms"].as_f64().unwrap()).sum();
        assert!((sum - total).abs() < 1e-6 && total > 0.0, "{table}");
    }
}

#[test]
fn tiny_ladder_measures_every_rung() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("ladder.json");
    let (tiny, path) = (tiny("pi05"), json.display().to_string());
    let mut line = vec!["ladder", "--checkpoint", &tiny, "--json", &path];
    line.extend(SMALL);
    pirouette(&line).unwrap();
    let value: Value = read(&json).unwrap();
    let ladders = value["ladders"].as_array().unwrap();
    assert_eq!(ladders.len(), 2);
    let first = &ladders[0]["rungs"];
    assert_eq!(first[0]["name"], "portable, 1 thread");
    assert!(
        first.as_array().unwrap().last().unwrap()["name"].as_str().unwrap().ends_with("2 threads")
    );
    for rung in ladders.iter().flat_map(|l| l["rungs"].as_array().unwrap()) {
        assert!(rung["p50_ms"].as_f64().unwrap() > 0.0 && rung["runs"] == 2, "{rung}");
    }
    assert!(value["device"].as_str().unwrap().starts_with("cpu"), "{value}");
    let work = &ladders[1]["rungs"];
    assert_eq!((&work[0]["prompt_tokens"], &work[1]["prompt_tokens"]), (&200.into(), &5.into()));
    assert_eq!((&work[1]["cameras"], &work[2]["cameras"]), (&3.into(), &2.into()));
}

#[test]
fn tiny_report_is_saved_rendered_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let (json, page, again, text) = (at("a.json"), at("a.html"), at("b.html"), at("c.md"));
    let (tiny, again_json) = (tiny("pi0"), at("again.json"));
    let published = testdata().join("../benchmarks/published.json").display().to_string();
    let mut line =
        vec!["report", "--checkpoint", &tiny, "--batch", "1,2", "--published", &published];
    line.extend(["--json", &json, "--html", &page]);
    line.extend(SMALL);
    pirouette(&line).unwrap();
    let report: Report = read(&PathBuf::from(&json)).unwrap();
    let model = &report.models[0];
    assert_eq!((model.model.as_str(), model.batches.len(), model.ladders.len()), ("pi0", 2, 2));
    let html = std::fs::read_to_string(&page).unwrap();
    assert_well_formed(&html);
    for part in ["Throughput over", "Ladder: ", "Published by others", "flash-vla", "prefill.up"] {
        assert!(html.contains(part), "the page lacks {part}");
    }

    // Others' numbers are of the full size: a small model is never called faster.
    assert!(!model.full_size && !html.contains("ours is"));
    let mut small = model.clone();
    small.batches[0].workload.prompt_tokens = 20;
    small.batches[0].workload.euler_steps = 10;
    let full = ModelReport { full_size: true, ..small.clone() };
    let others: Published = read(&PathBuf::from(&published)).unwrap();
    let matching = |m: &ModelReport| {
        others.rows.iter().filter(|r| m.timings().any(|t| r.matches(m, t))).count()
    };
    assert_eq!((matching(model), matching(&small)), (0, 0));
    assert_eq!(matching(&full), 4, "the openpi fork three times, realtime-vla once");

    // Saved and rendered again: the same measurements, the same page.
    let from = ["report", "--from", &json, "--published", &published];
    pirouette(&[&from[..], &["--html", &again, "--json", &again_json]].concat()).unwrap();
    assert_eq!(std::fs::read_to_string(&again).unwrap(), html);
    assert_eq!(read::<Report>(&PathBuf::from(&again_json)).unwrap(), report);

    pirouette(&["report", "--compare", &json, &again_json, "--markdown", &text]).unwrap();
    let text = std::fs::read_to_string(&text).unwrap();
    assert!(text.contains("| prefill.up |") && text.contains("| 1.00 |"), "{text}");
    assert!(!text.contains("| 0.99 |") && !text.contains("in A only"));
}

#[test]
fn published_numbers_are_readable_and_name_their_source() {
    let path = testdata().join("../benchmarks/published.json");
    let published: Published = read(&path).unwrap();
    assert!(published.rows.len() >= 15);
    for row in &published.rows {
        assert!(row.run_ms().is_some_and(|ms| ms > 1.0), "{row:?}");
        assert!(!row.source.is_empty() && ["published", "re-measured"].contains(&&*row.measured));
    }
    let first = &published.rows[0];
    assert_eq!(first.shape(), "batch 1 · 3 cam · 20 tok · h 10");
    let fast = |r: &&super::data::PublishedRow| r.samples_per_s == Some(110.3);
    let ms = published.rows.iter().find(fast).unwrap().run_ms().unwrap();
    assert!((ms - 64.0 / 110.3 * 1e3).abs() < 1e-9);
}

#[test]
fn other_files_are_refused_with_the_remedy() {
    let other = testdata().join("A_tiny/pi0/config.json").display().to_string();
    let error = pirouette(&["report", "--from", &other]).unwrap_err();
    assert!(format!("{error:#}").contains("--json"), "{error:#}");
}

/// A small report of a model that differs from another in device and precision alone.
fn saved() -> Report {
    let dir = tempfile::tempdir().unwrap();
    let (tiny, json) = (tiny("pi0"), dir.path().join("a.json"));
    let mut line = vec!["report", "--checkpoint", &tiny, "--batch", "1,2", "--no-ladder"];
    line.extend(["--json", json.to_str().unwrap()]);
    line.extend(SMALL);
    pirouette(&line).unwrap();
    read(&json).unwrap()
}

fn model(of: &Report, device: &str, precision: &str, ms: f64) -> ModelReport {
    let mut model = of.models[0].clone();
    (model.device, model.precision, model.full_size) = (device.into(), precision.into(), true);
    for (t, batch) in model.batches.iter_mut().zip([1, 2]) {
        (t.p50_ms, t.workload.batch) = (ms, batch);
        (t.workload.prompt_tokens, t.workload.euler_steps) = (20, 10);
    }
    model
}

fn page_of(report: &Report, published: Option<&Published>) -> String {
    markdown(&super::page::page(report, published))
}

#[test]
fn precisions_of_one_gpu_are_told_apart() {
    let saved = saved();
    let of = |models| Report { models, ..saved.clone() };
    let at = |device, precision, ms| model(&saved, device, precision, ms);
    let (h100, h200) = ("cuda:0 NVIDIA H100 80GB HBM3", "cuda:0 NVIDIA H200");
    let both = of(vec![at(h200, "fp8", 8.0), at(h200, "bf16", 10.0)]);
    let page = super::page::page(&both, None);
    let text = markdown(&page);
    for title in ["## pi0 fp8 on cuda:0 NVIDIA H200\n", "## pi0 bf16 on cuda:0 NVIDIA H200\n"] {
        assert!(text.contains(title), "no {title}: {text}");
    }
    let drawn = super::html::html("t", &page);
    assert!(drawn.contains(">pi0 fp8</text>") && drawn.contains(">pi0 bf16</text>"));

    // Each with its own, whatever their order; what the other lacks is not compared.
    let compared = |a: &Report, b: &Report| markdown(&super::compare::page(a, b, ["a", "b"]));
    let ratios = |text: &str| {
        let rows = text.lines().filter(|l| l.starts_with("| batch 1 · 3 cameras · 20 prompt"));
        rows.map(|l| l.split(" | ").nth(3).unwrap().to_string()).collect::<Vec<_>>()
    };
    let turned = of(vec![at(h200, "bf16", 10.0), at(h200, "fp8", 8.0)]);
    let text = compared(&both, &turned);
    assert!(text.contains("## pi0 fp8\n") && text.contains("## pi0 bf16\n"), "{text}");
    assert_eq!(ratios(&text), ["1.00", "1.00"], "{text}");
    let one = of(vec![at(h200, "bf16", 10.0)]);
    let text = compared(&both, &one);
    assert!(text.contains("- pi0 fp8 on cuda:0 NVIDIA H200 is in A only"), "{text}");
    // Where there is nothing but the other precision, the comparison is of precisions, and says so.
    let text = compared(&one, &of(vec![at(h200, "fp8", 8.0)]));
    assert!(text.contains("## pi0 bf16 against pi0 fp8\n"), "{text}");
    assert_eq!(ratios(&text), ["1.25"]);
    let text = compared(&one, &of(vec![at(h100, "fp8", 8.0), at(h100, "bf16", 12.0)]));
    assert_eq!(ratios(&text), ["0.83"]);
    assert!(text.contains("- pi0 fp8 on cuda:0 NVIDIA H100 80GB HBM3 is in B only"), "{text}");

    // Others' H200 is compared with ours, in their precision.
    let order = [at(h100, "bf16", 12.0), at(h200, "fp8", 8.0), at(h200, "bf16", 10.0)];
    let others: Published = read(&testdata().join("../benchmarks/published.json")).unwrap();
    let text = page_of(&of(order.to_vec()), Some(&others));
    let row = text.lines().find(|l| l.contains("| 25.4 |")).expect("openpi's fork");
    assert!(row.contains("| bf16 on cuda:0 NVIDIA H200 |") && row.contains("| 2.5"), "{row}");
}

#[test]
fn models_of_several_files_keep_where_they_are_from() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let mut file = serde_json::to_value(saved()).unwrap();
    let machine = |cpu: &str| {
        serde_json::json!({"cpu": cpu, "cores": 8, "memory_bytes": 64e9 as u64,
            "load_average": "0.1"})
    };
    // As older files have it: once, at the head.
    file["models"][0].as_object_mut().unwrap().remove("provenance");
    for (name, commit, day) in [("a", "aaaa", "2026-11-01"), ("b", "bbbb", "2026-11-02")] {
        file["commit"] = commit.into();
        file["date"] = day.into();
        file["command"] = format!("pirouette report --markdown {name}").into();
        file["machine"] = machine(&format!("CPU of {name}"));
        std::fs::write(at(name), file.to_string()).unwrap();
    }
    let (text, merged, again) = (at("text"), at("merged"), at("again"));
    let (a, b) = (at("a"), at("b"));
    pirouette(&["report", "--from", &a, &b, "--markdown", &text, "--json", &merged]).unwrap();
    pirouette(&["report", "--from", &merged, "--markdown", &again]).unwrap();
    let text = std::fs::read_to_string(&text).unwrap();
    for part in [
        "Measured on 2026-11-01 by Pirouette",
        "commit aaaa",
        "commit bbbb",
        "Machine: CPU of a, 8 cores, 64.0 GB of memory, load average 0.1",
        "Machine: CPU of b",
        "Command: pirouette report --markdown b",
        "2026-11-02\n",
    ] {
        assert!(text.contains(part), "no {part}: {text}");
    }
    assert_eq!(std::fs::read_to_string(&again).unwrap(), text);
}
