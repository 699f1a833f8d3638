//! Milliseconds per step → a trace for Perfetto or chrome://tracing.

use pirouette_model::cost::Rates;
use pirouette_model::{Program, StageTimes};
use serde_json::{Value, json};

use super::breakdown::category;
use super::meter::STAGES;

const PROCESS: u32 = 1;
const HOST: u32 = 1;
const STAGE: u32 = 2;
const DEVICE: u32 = 3;

/// The trace's JSON: a host track (copies, the run), a track of stages and one of steps. Steps
/// are laid end to end in their order; times within a run's gaps are not shown.
pub fn trace(
    program: &Program,
    device: &str,
    rates: &Rates,
    run: &StageTimes,
    step_ms: &[f64],
) -> Value {
    let mut events = vec![
        name_of("process_name", HOST, &format!("pirouette {}", program.config.family.name())),
        name_of("thread_name", HOST, "host"),
        name_of("thread_name", STAGE, &format!("{device}: stages")),
        name_of("thread_name", DEVICE, &format!("{device}: steps")),
    ];
    let begin = run.copy_in_ms;
    let busy: f64 = step_ms.iter().sum();
    events.push(event("copy in", "copy", HOST, 0.0, begin, json!({})));
    let what = json!({
        "measured_end_to_end_ms": run.total_ms,
        "sum_of_steps_ms": busy,
    });
    events.push(event("run", "run", HOST, begin, busy, what));
    events.push(event("copy out", "copy", HOST, begin + busy, run.copy_out_ms, json!({})));
    let mut at = begin;
    let mut stages = [(f64::INFINITY, 0.0f64); 3];
    for (step, &ms) in program.steps.iter().zip(step_ms) {
        let cost = program.cost(step);
        let limit_us = cost.limit_ms(rates) * 1e3;
        let args = json!({
            "shape": program.shape_text(step),
            "flops": cost.flops,
            "weight_bytes": cost.weight_bytes(rates),
            "limit_us": limit_us,
            "of_limit": if ms > 0.0 { limit_us / (ms * 1e3) } else { 0.0 },
        });
        events.push(event(&step.name, category(step), DEVICE, at, ms, args));
        if let Some(i) = STAGES.iter().position(|(stage, _)| *stage == step.stage()) {
            stages[i] = (stages[i].0.min(at), at + ms);
        }
        at += ms;
    }
    for ((stage, name), (from, to)) in STAGES.into_iter().zip(stages) {
        if to > from {
            let limit = json!({ "limit_ms": program.stage_limit_ms(stage, rates) });
            events.push(event(name, "stage", STAGE, from, to - from, limit));
        }
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}

/// A complete event; times in milliseconds, as the trace wants them in microseconds.
fn event(name: &str, cat: &str, tid: u32, at: f64, ms: f64, args: Value) -> Value {
    json!({
        "name": name, "cat": cat, "ph": "X", "pid": PROCESS, "tid": tid,
        "ts": at * 1e3, "dur": ms * 1e3, "args": args,
    })
}

fn name_of(what: &str, tid: u32, name: &str) -> Value {
    json!({
        "name": what, "ph": "M", "ts": 0.0, "pid": PROCESS, "tid": tid,
        "args": { "name": name },
    })
}

#[cfg(test)]
mod tests {
    use pirouette_model::{Config, Rtc, Shape, record};

    use super::*;

    #[test]
    fn every_event_is_valid_and_no_two_steps_overlap() {
        let shape =
            Shape { batch: 1, cameras: 1, prompt_tokens: 4, horizon: 5, steps: 2, rtc: Rtc::Off };
        let program = record(&Config::pi05(), shape).unwrap();
        let ms = vec![0.25; program.steps.len()];
        let run = StageTimes { copy_in_ms: 0.5, copy_out_ms: 0.1, ..StageTimes::default() };
        let value = trace(&program, "cpu", &Rates::H200, &run, &ms);
        let text = serde_json::to_string(&value).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        let events = value["traceEvents"].as_array().unwrap();
        let mut end = 0.0;
        let mut steps = 0;
        for e in events {
            let ph = e["ph"].as_str().unwrap();
            assert!(matches!(ph, "X" | "M") && e["name"].is_string());
            assert!(e["pid"].is_u64() && e["tid"].is_u64());
            let ts = e["ts"].as_f64().unwrap();
            if ph == "X" && e["tid"] == DEVICE {
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
