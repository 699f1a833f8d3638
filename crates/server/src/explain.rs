//! Where the milliseconds of one request went → the map `timing` of its answer.

use std::time::Duration;

use pirouette_engine::Timing;
use pirouette_policy::Value;

use crate::service::RequestContext;

/// What happened to a request outside the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spans {
    /// Waiting for a preprocessing thread.
    pub prepare_wait: Duration,
    /// Images decoded and resized, state normalised, prompt tokenised.
    pub prepare: Duration,
    /// Model actions turned into the robot's.
    pub finish: Duration,
}

/// `timing`, an extra key of the answer to a request with `"explain": true`: milliseconds as
/// floats (a stage the device does not time apart is zero), then `batch`, `slots` and `device` as
/// integers. Never arrays: openpi's chunk broker slices them.
pub fn timing(context: &RequestContext, spans: &Spans, engine: &Timing) -> (String, Value) {
    let span = |duration: Duration| duration.as_secs_f64() * 1e3;
    let run = &engine.run;
    let stages = [
        ("decode_ms", context.decode_ms),
        ("prepare_wait_ms", span(spans.prepare_wait)),
        ("prepare_ms", span(spans.prepare)),
        ("queue_ms", engine.queue_ms),
        ("batch_wait_ms", engine.batch_wait_ms),
        ("gather_ms", engine.gather_ms),
        ("copy_in_ms", run.copy_in_ms),
        ("vision_ms", run.vision_ms),
        ("prefill_ms", run.prefill_ms),
        ("denoise_ms", run.denoise_ms),
        ("copy_out_ms", run.copy_out_ms),
        ("run_ms", run.total_ms),
        ("finish_ms", span(spans.finish)),
    ];
    let counts = [("batch", engine.batch), ("slots", engine.slots), ("device", engine.device)];
    let stages = stages.map(|(name, ms)| (name.to_string(), Value::Float(ms)));
    let counts = counts.map(|(name, n)| (name.to_string(), Value::Int(n as i128)));
    ("timing".into(), Value::Map(stages.into_iter().chain(counts).collect()))
}
