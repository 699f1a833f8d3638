//! A traced replay of a graph → a trace for Perfetto or chrome://tracing: what the host did, and
//! on the device the stages, the steps, and each kernel from start to end.

use pirouette_cuda::ReplayTrace;
use pirouette_model::Program;
use pirouette_model::cost::Rates;
use pirouette_server::{ChromeTrace, Track};
use serde_json::json;

use super::kernels::work;
use super::trace;

const HOST: Track = Track { pid: 1, tid: 1 };
const STAGE: Track = Track { pid: 2, tid: 1 };
const STEP: Track = Track { pid: 2, tid: 2 };
/// The first of the tracks of kernels: dependent launches overlap, and a track can't show that.
const KERNELS: Track = Track { pid: 2, tid: 3 };

/// The trace's JSON. Zero is the first event of host or device.
pub fn trace(program: &Program, device: &str, rates: &Rates, replay: &ReplayTrace) -> String {
    let mut trace = ChromeTrace::new();
    let family = program.config.family.name();
    trace.process(HOST.pid, &format!("pirouette {family}: host"));
    trace.process(STAGE.pid, &format!("{device}: one replay of the graph"));
    trace.track(HOST, "host");
    trace.track(STAGE, "stages");
    trace.track(STEP, "steps, on the critical path");
    let zero = replay.host_ms[0].min(0.0);
    let [launch, launched, done] = replay.host_ms.map(|ms| ms - zero);
    let about = json!({ "replay_ms": replay.replay_ms, "replays": replay.replays });
    trace.span(HOST, "launch the graph", "host", (launch, launched - launch), about);
    trace.span(HOST, "wait for the actions", "host", (launched, done - launched), json!({}));
    kernels(&mut trace, program, replay, zero);
    let spans = spans(program, replay, zero);
    trace::steps(&mut trace, program, rates, &spans, [STAGE, STEP]);
    trace.finish(&json!({ "program": family, "cupti": replay.version }))
}

/// Each kernel on the first track that is free.
fn kernels(trace: &mut ChromeTrace, program: &Program, replay: &ReplayTrace, zero: f64) {
    let mut busy_until: Vec<f64> = Vec::new();
    for node in &replay.nodes {
        let (from, to) = (node.span_ms.0 - zero, node.span_ms.1 - zero);
        let lane = busy_until.iter().position(|&until| until <= from).unwrap_or_else(|| {
            busy_until.push(0.0);
            busy_until.len() - 1
        });
        busy_until[lane] = to;
        let step = node.step.and_then(|at| program.steps.get(at));
        let args = json!({
            "step": step.map(|s| s.name.as_str()),
            "median_us": node.busy_ms * 1e3,
            "critical_path_us": node.share_ms * 1e3,
        });
        let track = Track { tid: KERNELS.tid + lane as u32, ..KERNELS };
        trace.span(track, &node.name, work(node), (from, to - from), args);
    }
    for lane in 0..busy_until.len() {
        let track = Track { tid: KERNELS.tid + lane as u32, ..KERNELS };
        trace.track(track, if lane == 0 { "kernels" } else { "kernels that overlap" });
    }
}

/// (from, to) of each step that has kernels: from the end of what came before, or from its own
/// first start if that is later, to its own end.
fn spans(program: &Program, replay: &ReplayTrace, zero: f64) -> Vec<Option<(f64, f64)>> {
    let mut spans: Vec<Option<(f64, f64)>> = vec![None; program.steps.len()];
    let mut reached = replay.nodes.first().map_or(0.0, |n| n.span_ms.0);
    for node in &replay.nodes {
        let end = reached.max(node.span_ms.1);
        if let Some(span) = node.step.and_then(|at| spans.get_mut(at)) {
            let from = span.map_or(reached.max(node.span_ms.0) - zero, |(from, _)| from);
            *span = Some((from, end - zero));
        }
        reached = end;
    }
    spans
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use pirouette_cuda::TracedNode;
    use pirouette_model::{Config, Rtc, Shape, record};
    use serde_json::Value;

    use super::*;

    /// Every kernel begins before the one in front of it ends, as dependent launches do.
    #[test]
    fn overlapping_kernels_lie_on_tracks_of_their_own() {
        let shape =
            Shape { batch: 1, cameras: 1, prompt_tokens: 4, horizon: 5, steps: 2, rtc: Rtc::Off };
        let program = record(&Config::pi05(), shape).unwrap();
        let node = |at: usize| TracedNode {
            step: Some(at),
            name: format!("kernel{at}"),
            span_ms: (at as f64 - 0.4 + 1.0, at as f64 + 2.0),
            busy_ms: 1.4,
            share_ms: 1.0,
        };
        let mut nodes = vec![TracedNode {
            step: None,
            name: "copy in".into(),
            span_ms: (0.0, 0.5),
            busy_ms: 0.5,
            share_ms: 0.5,
        }];
        // The second step's work is done by another's kernel.
        nodes.extend((0..program.steps.len()).filter(|&at| at != 1).map(node));
        let count = nodes.len();
        let host_ms = [-0.25, -0.125, 400.0];
        let replay = ReplayTrace { nodes, host_ms, replays: 20, ..ReplayTrace::default() };
        let text = trace(&program, "cuda:0", &Rates::H200, &replay);
        let value: Value = serde_json::from_str(&text).unwrap();
        let mut ends: BTreeMap<(u64, u64), f64> = BTreeMap::new();
        let mut counts: BTreeMap<(u64, u64), usize> = BTreeMap::new();
        for e in value["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X") {
            let track = (e["pid"].as_u64().unwrap(), e["tid"].as_u64().unwrap());
            let (ts, dur) = (e["ts"].as_f64().unwrap(), e["dur"].as_f64().unwrap());
            let end = ends.entry(track).or_insert(0.0);
            assert!(ts >= *end - 1e-6 && dur >= 0.0, "{e} begins before {end}");
            *end = ts + dur;
            *counts.entry(track).or_default() += 1;
        }
        assert_eq!(counts[&(1, 1)], 2);
        assert_eq!(counts[&(2, 1)], 3);
        assert_eq!(counts[&(2, 2)], program.steps.len() - 1);
        assert_eq!(counts[&(2, 3)] + counts[&(2, 4)], count);
        assert!(!counts.contains_key(&(2, 5)));
    }
}
