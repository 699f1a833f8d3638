//! What happens at the server's rim, counted; and Prometheus' text form.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use pirouette_engine::Histogram;

use crate::render::{header, histogram, sample};

const STAGES: [&str; 4] = ["decode", "infer", "encode", "total"];

/// Counters of one server.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) opened: AtomicU64,
    /// Requests that are being answered.
    pub(crate) running: AtomicU64,
    /// Answers that the device's own thread made and sent.
    pub(crate) carried: AtomicU64,
    outcomes: Mutex<BTreeMap<&'static str, u64>>,
    refused: Mutex<BTreeMap<&'static str, u64>>,
    /// Of LeRobot's clients, by what became of them before they were asked for.
    observations: Mutex<BTreeMap<&'static str, u64>>,
    reloads: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    stages: [Histogram; STAGES.len()],
}

impl Metrics {
    /// Counts a request by what became of it.
    pub(crate) fn outcome(&self, outcome: &'static str) {
        let mut counts = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(outcome).or_default() += 1;
    }

    /// Counts a connection that never became a websocket, by reason.
    pub(crate) fn refused(&self, reason: &'static str) {
        let mut counts = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(reason).or_default() += 1;
    }

    /// Counts an observation of a LeRobot client by what became of it on arrival.
    pub(crate) fn observation(&self, outcome: &'static str) {
        let mut counts = self.observations.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(outcome).or_default() += 1;
    }

    /// Counts an attempt to read a file again.
    pub(crate) fn reloaded(&self, file: &'static str, read: bool) {
        let outcome = if read { "ok" } else { "failed" };
        let mut counts = self.reloads.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((file, outcome)).or_default() += 1;
    }

    /// Requests by outcome, and connections that got no websocket by reason.
    pub(crate) fn counts(&self) -> [BTreeMap<&'static str, u64>; 2] {
        [&self.outcomes, &self.refused]
            .map(|counts| counts.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// The histogram of a stage: `decode`, `infer`, `encode` or `total`.
    pub(crate) fn stage(&self, name: &'static str) -> &Histogram {
        let index = STAGES.iter().position(|s| *s == name).unwrap_or(STAGES.len() - 1);
        &self.stages[index]
    }

    pub(crate) fn render(&self, open: usize, out: &mut String) {
        header(out, "pirouette_requests_total", "counter", "Requests by outcome.");
        let labelled = |out: &mut String, name: &str, label: &str, counts: &Mutex<_>| {
            let counts: &BTreeMap<&'static str, u64> =
                &counts.lock().unwrap_or_else(PoisonError::into_inner);
            for (value, n) in counts {
                sample(out, name, &[(label, value)], *n as f64);
            }
        };
        labelled(out, "pirouette_requests_total", "outcome", &self.outcomes);
        header(
            out,
            "pirouette_connections_refused_total",
            "counter",
            "Connections that got no websocket, by reason.",
        );
        labelled(out, "pirouette_connections_refused_total", "reason", &self.refused);
        let name = "pirouette_lerobot_observations_total";
        let help = "Observations of LeRobot clients, by what became of them on arrival.";
        header(out, name, "counter", help);
        labelled(out, name, "outcome", &self.observations);
        let name = "pirouette_reloads_total";
        header(out, name, "counter", "Times keys or certificate were read again.");
        let reloads = self.reloads.lock().unwrap_or_else(PoisonError::into_inner);
        for ((file, outcome), n) in &*reloads {
            sample(out, name, &[("file", file), ("outcome", outcome)], *n as f64);
        }
        drop(reloads);
        header(out, "pirouette_connections_total", "counter", "Connections opened so far.");
        let _ = writeln!(out, "pirouette_connections_total {}", self.opened.load(Relaxed));
        header(
            out,
            "pirouette_connections",
            "gauge",
            "Websockets and LeRobot connections open now.",
        );
        let _ = writeln!(out, "pirouette_connections {open}");
        let name = "pirouette_answers_carried_total";
        header(out, name, "counter", "Answers made and sent by the device's own thread.");
        let _ = writeln!(out, "{name} {}", self.carried.load(Relaxed));
        header(out, "pirouette_requests_running", "gauge", "Requests being answered now.");
        let _ = writeln!(out, "pirouette_requests_running {}", self.running.load(Relaxed));
        header(
            out,
            "pirouette_request_seconds",
            "histogram",
            "Time of answered requests in the server, by stage.",
        );
        for (name, h) in STAGES.iter().zip(&self.stages) {
            let labels = [("stage", *name)];
            histogram(out, "pirouette_request_seconds", &labels, &h.bins(), h.sum_ms());
        }
    }
}
