//! What the server remembers and counts → `/stats`, and the page at `/` that draws it.

use axum::http::{HeaderMap, header};
use pirouette_engine::{BatchRecord, DeviceStatus, Phase};
use serde_json::{Value, json};

use crate::recent::{RequestRecord, ms_between};
use crate::serve::Shared;
use crate::service::GpuReading;
use crate::trace::stages;

/// Where the page is.
pub(crate) const PATH: &str = "/";

/// The page: nothing in it but what it needs; it asks `/stats` once a second.
pub(crate) const PAGE: &str = include_str!("dashboard.html");

/// Answered requests, others, and batches told by `/stats`: a flood of refusals must not hide the
/// answers.
const ANSWERED: usize = 12;
const OTHERS: usize = 4;
const BATCHES: u64 = 48;

/// Whether a browser asks for the page.
pub(crate) fn wanted(path: &str, headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    path == PATH && accept.contains("text/html")
}

/// Reads the service's GPUs off the socket's threads.
pub(crate) async fn gpus(shared: &Shared) -> Vec<GpuReading> {
    let service = shared.service.clone();
    // A reading that panics is one that is not there.
    tokio::task::spawn_blocking(move || service.gpus()).await.unwrap_or_default()
}

/// The JSON of `/stats`.
pub(crate) async fn stats(shared: &Shared) -> String {
    let gpus = gpus(shared).await;
    let [outcomes, refused] = shared.metrics.counts();
    let (answers, quantiles) = shared.recent.quantiles_ms([0.5, 0.9, 0.99]);
    let (remembered, _) = shared.recent.requests.after(0);
    let last = |ok: bool, most: usize| {
        remembered.iter().rev().filter(move |r| (r.outcome == "ok") == ok).take(most)
    };
    let mut requests: Vec<_> = last(true, ANSWERED).chain(last(false, OTHERS)).collect();
    requests.sort_by_key(|r| r.id);
    let load =
        |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": shared.recent.uptime_s(),
        "connections": {
            "open": shared.open_websockets(),
            "total": load(&shared.metrics.opened),
            "limit": shared.options.max_connections,
            "refused": refused,
        },
        "requests": {
            "running": load(&shared.metrics.running),
            "outcomes": outcomes,
            "recent": requests.into_iter().map(request).collect::<Vec<_>>(),
        },
        "last_minute": {
            "answers": answers,
            "p50_ms": quantiles.map(|q| q[0]),
            "p90_ms": quantiles.map(|q| q[1]),
            "p99_ms": quantiles.map(|q| q[2]),
        },
        "engine": engine(shared),
        "gpus": gpus.iter().map(gpu).collect::<Vec<_>>(),
    })
    .to_string()
}

/// A request and the parts its time went to.
fn request(r: &RequestRecord) -> Value {
    let span = |from, to: Option<_>| to.map(|to| ms_between(from, to));
    let timing = r.timing.unwrap_or_default();
    let infer = r.decoded.and_then(|decoded| span(decoded, r.inferred));
    // What of `infer` is neither queue nor device: both sides of the policy.
    let inside = timing.queue_ms + timing.batch_wait_ms + timing.gather_ms + timing.run.total_ms;
    json!({
        "id": r.id,
        "connection": r.connection,
        "outcome": r.outcome,
        "bytes": r.bytes,
        "total_ms": r.total_ms(),
        "batch": r.timing.map(|t| t.batch),
        "parts_ms": {
            "decode": span(r.began, r.decoded),
            "prepare": infer.map(|ms| (ms - inside).max(0.0)),
            "queue": r.timing.map(|t| t.queue_ms + t.batch_wait_ms),
            "device": r.timing.map(|t| t.gather_ms + t.run.total_ms),
            "encode": r.inferred.and_then(|inferred| span(inferred, r.encoded)),
        },
    })
}

fn engine(shared: &Shared) -> Value {
    let Some(stats) = shared.service.stats() else { return Value::Null };
    let (batches, _) = shared.service.batches_after(stats.newest_batch.saturating_sub(BATCHES));
    let sizes: Vec<Value> =
        stats.batches.iter().map(|(size, n)| json!({ "size": size, "batches": n })).collect();
    json!({
        "queue_depth": stats.queue_depth,
        "accepted": stats.accepted,
        "completed": stats.completed,
        "cancelled": stats.cancelled,
        "canaries": stats.canaries,
        "rejected": stats.errors,
        "batch_sizes": sizes,
        "batches": batches.iter().map(batch).collect::<Vec<_>>(),
        "devices": stats.devices.iter().map(device).collect::<Vec<_>>(),
    })
}

fn batch(batch: &BatchRecord) -> Value {
    let told = stages(batch).into_iter().filter(|(_, ms)| *ms > 0.0);
    json!({
        "id": batch.id,
        "device": batch.device,
        "requests": batch.requests,
        "slots": batch.slots,
        "cameras": batch.bucket.cameras,
        "prompt_tokens": batch.bucket.prompt_tokens,
        "steps": batch.bucket.steps,
        "ms": ms_between(batch.taken, batch.done),
        "stages_ms": told.map(|(name, ms)| (name.to_string(), json!(ms)))
            .collect::<serde_json::Map<_, _>>(),
    })
}

/// Why a device failed is for the log: it may name files.
fn device(status: &DeviceStatus) -> Value {
    let phase = match status.phase {
        Phase::Opening => "loading weights",
        Phase::Warming => "warming up",
        Phase::Ready => "ready",
        Phase::Failed(_) => "failed",
        Phase::Stopped => "stopped",
    };
    json!({
        "name": status.name,
        "phase": phase,
        "busy": status.busy,
        "restarts": status.restarts,
        "weight_bytes": status.weight_bytes,
        "canary_age_s": status.canary_age.map(|age| age.as_secs_f64()),
        "fingerprint": status.fingerprint.map(|f| format!("{f:016x}")),
    })
}

fn gpu(gpu: &GpuReading) -> Value {
    json!({
        "name": gpu.name,
        "power_watts": gpu.power_watts,
        "sm_mhz": gpu.sm_mhz,
        "memory_mhz": gpu.memory_mhz,
        "temperature_celsius": gpu.temperature_celsius,
        "memory_used_bytes": gpu.memory_used_bytes,
    })
}
