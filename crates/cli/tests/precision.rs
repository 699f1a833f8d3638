//! `--precision`: what is promised of each, and that it is named where numbers are kept.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn run(command: &[&str]) -> Output {
    let mut pirouette = Command::new(env!("CARGO_BIN_EXE_pirouette"));
    pirouette.args(command).stdin(Stdio::null()).output().unwrap()
}

fn json(command: &[&str]) -> Value {
    let output = run(&[command, &["--json", "-"]].concat());
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {log}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn tiny_models_are_within_the_bar_of_every_precision() {
    let [f32, bf16, fp8] = ["f32", "bf16", "fp8"].map(|precision| {
        let rows = json(&["golden", "--device", "cpu", "--precision", precision]);
        let rows = rows.as_array().unwrap();
        assert_eq!(rows.len(), 10);
        assert!(rows.iter().all(|row| row["holds"] == true), "{precision}: {rows:?}");
        rows.iter().map(|row| row["relative_l2"].as_f64().unwrap()).collect::<Vec<_>>()
    });
    for (case, ((f32, bf16), fp8)) in f32.iter().zip(&bf16).zip(&fp8).enumerate() {
        assert!(10.0 * f32 < *bf16 && 1.5 * bf16 < *fp8, "case {case}: {f32} {bf16} {fp8}");
    }
}

#[test]
fn a_plan_counts_a_byte_for_each_e4m3_weight_and_half_its_time() {
    let plan = |precision| json(&["plan", "pi0", "--precision", precision]);
    let [f32, bf16, fp8] = ["f32", "bf16", "fp8"].map(plan);
    let at_rest = |plan: &Value| plan["weight_bytes"].as_u64().unwrap();
    let elements = 17 * 3 * 2048 * 16384;
    assert_eq!(at_rest(&bf16) - at_rest(&fp8), elements);
    assert!(at_rest(&f32) > at_rest(&bf16));
    let step = |plan: &Value, name: &str, key: &str| {
        let steps = plan["steps"].as_array().unwrap();
        steps.iter().find(|s| s["name"] == name).unwrap()[key].as_f64().unwrap()
    };
    for key in ["weight_bytes", "limit_us"] {
        for (name, share) in [
            ("prefill.0.up", 0.5),
            ("prefill.16.down", 0.5),
            ("prefill.0.out", 1.0),
            ("denoise.step0.0.up", 1.0),
        ] {
            let [bf16, fp8] = [&bf16, &fp8].map(|plan| step(plan, name, key));
            assert_eq!(fp8, share * bf16, "{name} {key}");
        }
    }
    assert_eq!(
        [&f32, &bf16, &fp8].map(|plan| plan["precision"].as_str().unwrap()),
        ["f32", "bf16", "fp8"]
    );
    let text = String::from_utf8(run(&["plan", "pi0", "--precision", "fp8"]).stdout).unwrap();
    assert!(text.contains("790 TFLOP/s (E4M3 twice that)"), "{text}");
}

#[test]
fn measurements_and_comparisons_name_fp8() {
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/A_tiny/e2e/pi05_droid/checkpoint");
    let checkpoint = checkpoint.to_str().unwrap();
    let device = ["--device", "cpu", "--threads", "1", "--precision", "fp8"];
    let small = ["--horizon", "4", "--steps", "1"];
    let runs = ["--checkpoint", checkpoint, "--runs", "1", "--warmup", "0"];
    for command in ["bench", "profile", "ladder"] {
        let kept = json(&[&[command][..], &device, &small, &runs].concat());
        assert_eq!(kept["precision"], "fp8", "{command}: {kept}");
    }
    let kept = json(&[&["verify", checkpoint][..], &device, &small].concat());
    assert!(kept["device"].as_str().unwrap().contains(", fp8,"), "{kept}");
    let error = kept["actions_relative_l2"].as_f64().unwrap();
    assert!((1e-3..0.1).contains(&error), "{kept}");
}

#[test]
fn others_are_refused_with_those_there_are() {
    let output = run(&["plan", "pi0", "--precision", "fp4"]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("[possible values: f32, bf16, fp8]"), "{text}");
}
