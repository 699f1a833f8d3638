//! Milliseconds per step → a trace for Perfetto or chrome://tracing.

use pirouette_model::cost::Rates;
use pirouette_model::{Program, StageTimes};
use pirouette_server::{ChromeTrace, Track};
use serde_json::json;

use super::breakdown::category;
use super::meter::STAGES;

const HOST: Track = Track { pid: 1, tid: 1 };
const STAGE: Track = Track { pid: 1, tid: 2 };
const DEVICE: Track = Track { pid: 1, tid: 3 };

/// The trace's JSON: a host track (copies, the run), a track of stages and one of steps. Steps
/// are laid end to end in their order; times within a run's gaps are not shown.
pub fn trace(
    program: &Program,
    device: &str,
    rates: &Rates,
    run: &StageTimes,
    step_ms: &[f64],
) -> String {
    let mut trace = ChromeTrace::new();
    trace.process(HOST.pid, &format!("pirouette {}", program.config.family.name()));
    trace.track(HOST, "host");
    trace.track(STAGE, &format!("{device}: stages"));
    trace.track(DEVICE, &format!("{device}: steps"));
    let begin = run.copy_in_ms;
    let busy: f64 = step_ms.iter().sum();
    trace.span(HOST, "copy in", "copy", (0.0, begin), json!({}));
    let what = json!({
        "measured_end_to_end_ms": run.total_ms,
        "sum_of_steps_ms": busy,
    });
    trace.span(HOST, "run", "run", (begin, busy), what);
    trace.span(HOST, "copy out", "copy", (begin + busy, run.copy_out_ms), json!({}));
    let mut at = begin;
    let span = |&ms: &f64| {
        let from = at;
        at += ms;
        Some((from, at))
    };
    let spans: Vec<Option<(f64, f64)>> = step_ms.iter().map(span).collect();
    steps(&mut trace, program, rates, &spans, [STAGE, DEVICE]);
    trace.finish(&json!({ "program": program.config.family.name() }))
}

/// Every step that has a span (from, to) on the second track, with its cost; on the first the
/// stages that they make up.
pub(super) fn steps(
    trace: &mut ChromeTrace,
    program: &Program,
    rates: &Rates,
    spans: &[Option<(f64, f64)>],
    [stage_track, step_track]: [Track; 2],
) {
    let mut stages = [(f64::INFINITY, 0.0f64); 3];
    for (step, span) in program.steps.iter().zip(spans) {
        let &Some((from, to)) = span else { continue };
        let cost = program.cost(step);
        let limit_us = cost.limit_ms(rates) * 1e3;
        let args = json!({
            "shape": program.shape_text(step),
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes(rates),
            "limit_us": limit_us,
            "of_limit": if to > from { limit_us / ((to - from) * 1e3) } else { 0.0 },
        });
        trace.span(step_track, &step.name, category(step), (from, to - from), args);
        if let Some(i) = STAGES.iter().position(|(stage, _)| *stage == step.stage()) {
            stages[i] = (stages[i].0.min(from), stages[i].1.max(to));
        }
    }
    for ((stage, name), (from, to)) in STAGES.into_iter().zip(stages) {
        if to > from {
            let limit = json!({ "limit_ms": program.stage_limit_ms(stage, rates) });
            trace.span(stage_track, name, "stage", (from, to - from), limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use pirouette_model::{Config, Rtc, Shape, record};

    use serde_json::Value;

    use super::*;

    #[test]
    fn every_event_is_valid_and_no_two_steps_overlap() {
        let shape =
            Shape { batch: 1, cameras: 1, prompt_tokens: 4, horizon: 5, steps: 2, rtc: Rtc::Off };
        let program = record(&Config::pi05(), shape).unwrap();
        let ms = vec![0.25; program.steps.len()];
        let run = StageTimes { copy_in_ms: 0.5, copy_out_ms: 0.1, ..StageTimes::default() };
        let text = trace(&program, "cpu", &Rates::H200, &run, &ms);
        let value: Value = serde_json::from_str(&text).unwrap();
        let events = value["traceEvents"].as_array().unwrap();
        let mut end = 0.0;
        let mut steps = 0;
        for e in events {
            let ph = e["ph"].as_str().unwrap();
            assert!(matches!(ph, "X" | "M") && e["name"].is_string());
            assert!(e["pid"].is_u64() && e["tid"].is_u64());
            let ts = e["ts"].as_f64().unwrap();
            if ph == "X" && e["tid"] == DEVICE.tid {
                assert!(ts >= end - 1e-6, "{e}");
                end = ts + e["dur"].as_f64().unwrap();
                assert!(e["args"]["shape"].is_string() && e["args"]["limit_us"].is_number());
                steps += 1;
            }
        }
        assert_eq!(steps, program.steps.len());
        let stage = |e: &&Value| e["cat"] == "stage";
        let stages: Vec<&Value> = events.iter().filter(stage).collect();
        assert_eq!(stages.len(), 3);
        let sum: f64 = stages.iter().map(|e| e["dur"].as_f64().unwrap()).sum();
        assert!((sum - 250.0 * steps as f64).abs() < 1e-6);
    }
}
