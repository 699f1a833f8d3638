//! What the clients saw → counts and percentiles.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{LoadError, LoadOptions};

/// Percentiles of a set of durations, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50_ms: f64,
    /// 90 %.
    pub p90_ms: f64,
    /// 99 %.
    pub p99_ms: f64,
    /// 99.9 %.
    pub p999_ms: f64,
    /// The longest.
    pub max_ms: f64,
    /// The mean.
    pub mean_ms: f64,
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct LoadReport {
    /// Requests sent.
    pub sent: u64,
    /// Requests that were due before the end, but whose client still waited for earlier answers:
    /// never sent, so not good.
    pub unsent: u64,
    /// Requests sent per second while they were, where a rate was asked for.
    pub sent_per_s: Option<f64>,
    /// Requests answered with actions.
    pub answered: u64,
    /// Of those, within the deadline (all, when there is none).
    pub good: u64,
    /// Requests that failed, by the last line's exception type or by transport error.
    pub errors: BTreeMap<String, u64>,
    /// First error, in full.
    pub first_error: Option<String>,
    /// Duration of the measurement.
    pub seconds: f64,
    /// From sending a request (or from when it was due) to having the answer's frame.
    pub latency: Percentiles,
    /// From sending to the answer, minus the server's `infer_ms`: wire, codec, scheduling.
    pub over_server: Percentiles,
    /// From sending to the answer, minus the model's `infer_ms`: everything but the model.
    pub over_model: Percentiles,
    /// Time until a refusal (an error text) arrived.
    pub refusal: Percentiles,
}

impl LoadReport {
    /// Good answers per second.
    pub fn goodput(&self) -> f64 {
        self.good as f64 / self.seconds.max(1e-9)
    }
}

impl Percentiles {
    /// Of any values; zeros for none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some(&max_ms) = values.last() else { return Percentiles::default() };
        let at = |q: f64| {
            let rank = (q * values.len() as f64).ceil() as usize;
            values[rank.clamp(1, values.len()) - 1]
        };
        Percentiles {
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p999_ms: at(0.999),
            max_ms,
            mean_ms: values.iter().sum::<f64>() / values.len() as f64,
        }
    }
}

/// One request's fate.
pub(super) enum Outcome {
    /// The latency counts from when it was due, the exchange from when it was sent.
    Answer {
        latency_ms: f64,
        exchange_ms: f64,
        server_ms: f64,
        model_ms: f64,
    },
    Refusal {
        latency_ms: f64,
        text: String,
    },
    Broken(String),
}

/// What one client saw.
pub(super) struct Seen {
    pub outcomes: Vec<Outcome>,
    pub unsent: u64,
    /// Until the last request was sent, and until the last answer.
    pub sending: Duration,
    pub took: Duration,
}

/// Adds up what the clients saw.
///
/// # Errors
/// When not a single request was answered.
pub(super) fn report(seen: Seen, options: &LoadOptions) -> Result<LoadReport, LoadError> {
    let sent = seen.outcomes.len() as u64;
    let mut report = LoadReport {
        sent,
        unsent: seen.unsent,
        // The last one, too, has its share of time: on time, this is the rate.
        sent_per_s: options.rate.map(|r| sent as f64 / (seen.sending.as_secs_f64() + 1.0 / r)),
        seconds: seen.took.as_secs_f64(),
        ..Default::default()
    };
    let limit_ms = options.deadline.map_or(f64::INFINITY, |d| d.as_secs_f64() * 1e3);
    let (mut latency, mut over_server, mut over_model) = (Vec::new(), Vec::new(), Vec::new());
    let mut refusal = Vec::new();
    for outcome in seen.outcomes {
        let (kind, text) = match outcome {
            Outcome::Answer { latency_ms, exchange_ms, server_ms, model_ms } => {
                report.answered += 1;
                report.good += u64::from(latency_ms <= limit_ms);
                latency.push(latency_ms);
                over_server.push(exchange_ms - server_ms);
                over_model.push(exchange_ms - model_ms);
                continue;
            }
            Outcome::Refusal { latency_ms, text } => {
                refusal.push(latency_ms);
                let last = text.lines().last().unwrap_or_default().to_owned();
                (last.split(':').next().unwrap_or_default().to_owned(), last)
            }
            Outcome::Broken(text) => ("transport".to_owned(), text),
        };
        *report.errors.entry(kind).or_default() += 1;
        report.first_error.get_or_insert(text);
    }
    report.latency = Percentiles::of(latency);
    report.over_server = Percentiles::of(over_server);
    report.over_model = Percentiles::of(over_model);
    report.refusal = Percentiles::of(refusal);
    if report.answered == 0 {
        let error = report.first_error.clone().unwrap_or_default();
        return Err(LoadError::Nothing { error, report: Box::new(report) });
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_values_seen() {
        let p = Percentiles::of((1..=1000).rev().map(f64::from).collect());
        assert_eq!((p.p50_ms, p.p90_ms, p.p99_ms, p.p999_ms), (500.0, 900.0, 990.0, 999.0));
        assert_eq!((p.max_ms, p.mean_ms), (1000.0, 500.5));
        assert_eq!(Percentiles::of(vec![3.0]).p999_ms, 3.0);
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
    }
}
