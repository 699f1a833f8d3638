//! Some seconds of a running server → a Chrome trace: tracks of devices (batches and the stages
//! inside), tracks of connections (requests and what they spent their time on), arrows from a
//! request to its batch.
//!
//! Nothing is recorded for it: [`crate::recent`] and the engine remember the last requests and
//! batches anyway, and a trace reads along. So nobody pays for it while nobody traces.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use pirouette_engine::{BatchRecord, Timing};
use serde_json::json;

use crate::chrome_trace::{ChromeTrace, Track};
use crate::recent::{RequestRecord, ms_between};
use crate::serve::Shared;

/// Longest trace, in seconds.
pub(crate) const MAX_SECONDS: u64 = 60;

/// Most requests, and most batches, of a trace: some 30 MB of JSON. What comes after is counted.
const MOST: usize = 20_000;

/// Time between looks at what is remembered.
const LOOK: Duration = Duration::from_millis(50);

const DEVICES: u32 = 1;
const CONNECTIONS: u32 = 2;

/// What was seen of the time traced.
#[derive(Debug, Default)]
struct Seen {
    requests: Vec<RequestRecord>,
    batches: Vec<BatchRecord>,
    dropped_requests: u64,
    dropped_batches: u64,
}

/// Watches for that long and writes down what ended meanwhile.
pub(crate) async fn collect(shared: &Shared, time: Duration) -> String {
    let mut request = shared.recent.requests.newest();
    let mut batch = shared.service.stats().map_or(0, |stats| stats.newest_batch);
    let mut seen = Seen::default();
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        tokio::time::sleep(left.min(LOOK)).await;
        // Requests first: the batch of a request that is over is over too.
        let (requests, missed) = shared.recent.requests.after(request);
        request = requests.last().map_or(request, |r| r.id);
        seen.dropped_requests += missed + keep(&mut seen.requests, requests);
        let (batches, missed) = shared.service.batches_after(batch);
        batch = batches.last().map_or(batch, |b| b.id);
        seen.dropped_batches += missed + keep(&mut seen.batches, batches);
        if left.is_zero() {
            break;
        }
    }
    let devices = shared.service.stats().map(|stats| stats.devices).unwrap_or_default();
    let names: Vec<String> = devices.into_iter().map(|device| device.name).collect();
    write(&seen, &names, time)
}

/// Appends what there is room for; says how much was left out.
fn keep<T>(all: &mut Vec<T>, mut new: Vec<T>) -> u64 {
    let room = MOST.saturating_sub(all.len()).min(new.len());
    let dropped = new.len() - room;
    new.truncate(room);
    all.append(&mut new);
    dropped as u64
}

fn write(seen: &Seen, devices: &[String], time: Duration) -> String {
    let begins = seen.requests.iter().map(|r| r.began);
    let queued = seen.batches.iter().map(|b| b.taken);
    let Some(zero) = begins.chain(queued).min() else {
        return ChromeTrace::new().finish(&about(seen, time));
    };
    let mut trace = ChromeTrace::new();
    trace.process(DEVICES, "devices");
    trace.process(CONNECTIONS, "connections");
    for device in seen.batches.iter().map(|b| b.device).collect::<BTreeSet<_>>() {
        let name = devices.get(device).map_or("", String::as_str);
        trace.track(device_track(device), &format!("device {device}: {name}"));
    }
    let mut counts = BTreeMap::<u64, usize>::new();
    for request in &seen.requests {
        *counts.entry(request.connection).or_default() += 1;
    }
    for (connection, n) in counts {
        let plural = if n == 1 { "" } else { "s" };
        let name = format!("connection {connection} ({n} request{plural})");
        trace.track(connection_track(connection), &name);
    }
    for batch in &seen.batches {
        draw_batch(&mut trace, batch, zero);
    }
    let batches: HashMap<u64, &BatchRecord> = seen.batches.iter().map(|b| (b.id, b)).collect();
    for request in &seen.requests {
        let batch = request.timing.and_then(|t| Some((t, *batches.get(&t.batch_id)?)));
        draw_request(&mut trace, request, batch, zero);
    }
    trace.finish(&about(seen, time))
}

fn about(seen: &Seen, time: Duration) -> serde_json::Value {
    json!({
        "program": concat!("pirouette ", env!("CARGO_PKG_VERSION")),
        "seconds": time.as_secs_f64(),
        "requests": seen.requests.len(),
        "batches": seen.batches.len(),
        "dropped_requests": seen.dropped_requests,
        "dropped_batches": seen.dropped_batches,
    })
}

fn device_track(device: usize) -> Track {
    Track { pid: DEVICES, tid: device as u32 + 1 }
}

fn connection_track(connection: u64) -> Track {
    // Viewers want small numbers; after four billion connections two may share a track.
    Track { pid: CONNECTIONS, tid: connection as u32 }
}

fn draw_batch(trace: &mut ChromeTrace, batch: &BatchRecord, zero: Instant) {
    let track = device_track(batch.device);
    let at = |instant| ms_between(zero, instant);
    let (taken, started, done) = (at(batch.taken), at(batch.started), at(batch.done));
    let bucket = batch.bucket;
    let name = format!("batch {}: {} of {} slots", batch.id, batch.requests, batch.slots);
    let args = json!({
        "requests": batch.requests, "slots": batch.slots, "cameras": bucket.cameras,
        "prompt_tokens": bucket.prompt_tokens, "horizon": bucket.horizon, "steps": bucket.steps,
        "run_ms": batch.run.total_ms,
    });
    trace.span(track, &name, "batch", (taken, done - taken), args);
    trace.span(track, "gather", "stage", (taken, started - taken), json!({}));
    let mut from = started;
    for (stage, ms) in stages(batch) {
        // Laid end to end; a device's clock may be a little ahead of ours.
        let ms = ms.min(done - from);
        if ms > 0.0 {
            trace.span(track, stage, "stage", (from, ms), json!({}));
            from += ms;
        }
    }
}

/// The stages a device tells, in order; zero when it does not.
pub(crate) fn stages(batch: &BatchRecord) -> [(&'static str, f64); 5] {
    let run = &batch.run;
    [
        ("copy in", run.copy_in_ms),
        ("vision", run.vision_ms),
        ("prefill", run.prefill_ms),
        ("denoise", run.denoise_ms),
        ("copy out", run.copy_out_ms),
    ]
}

fn draw_request(
    trace: &mut ChromeTrace,
    request: &RequestRecord,
    batch: Option<(Timing, &BatchRecord)>,
    zero: Instant,
) {
    let track = connection_track(request.connection);
    let at = |instant| ms_between(zero, instant);
    let (began, sent) = (at(request.began), at(request.sent));
    let ok = request.outcome == "ok";
    let mut name = format!("request {}", request.id);
    if !ok {
        name = format!("{name}: {}", request.outcome);
    }
    let args = json!({
        "outcome": request.outcome, "bytes": request.bytes,
        "behind_earlier_ms": ms_between(request.received, request.began),
        "batch": batch.map(|(_, b)| b.id),
    });
    let category = if ok { "request" } else { "error" };
    trace.span(track, &name, category, (began, sent - began), args);
    let mut from = began;
    let parts =
        [("decode", request.decoded), ("infer", request.inferred), ("encode", request.encoded)];
    for (part, end) in parts {
        let Some(end) = end.map(at) else { break };
        trace.span(track, part, "part", (from, end - from), json!({}));
        if let ("infer", Some((timing, batch))) = (part, batch) {
            draw_wait(trace, request, (from, end), (timing, batch), zero);
        }
        from = end;
    }
    if request.encoded.is_some() {
        trace.span(track, "send", "part", (from, sent - from), json!({}));
    }
}

/// Inside `infer`: preparation, the queue, the batch, the policy's output side.
fn draw_wait(
    trace: &mut ChromeTrace,
    request: &RequestRecord,
    (from, end): (f64, f64),
    (timing, batch): (Timing, &BatchRecord),
    zero: Instant,
) {
    let track = connection_track(request.connection);
    let inside = |ms: f64| ms.clamp(from, end);
    let taken = ms_between(zero, batch.taken);
    let queued = inside(taken - timing.queue_ms - timing.batch_wait_ms);
    let (taken, done) = (inside(taken), inside(ms_between(zero, batch.done)));
    let mut span = |name: &str, from: f64, to: f64| {
        trace.span(track, name, "wait", (from, to - from), json!({}));
    };
    span("prepare", from, queued);
    span("queue", queued, taken);
    span(&format!("in batch {}", batch.id), taken, done);
    span("finish", done, end);
    let to = (device_track(batch.device), ms_between(zero, batch.taken));
    trace.arrow(request.id, "joins", (track, queued), to);
}
