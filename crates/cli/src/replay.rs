//! `pirouette replay`: recorded requests → the same requests again, and where answers differ.
//!
//! The policy is loaded as `serve` loads it, the requests run one at a time with the recorded
//! seeds, and actions are compared bit for bit.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Result, bail};
use pirouette_policy::{NdArray, Scalar};
use pirouette_server::{LeftOut, Recorded, Recording, Service};
use serde::Serialize;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::log;
use crate::opening::{self, OpenArgs};
use crate::service::PolicyService;
use crate::text::{writable, write_json};

/// Arguments of `replay`.
#[derive(clap::Args)]
pub struct ReplayArgs {
    /// The folder that `serve --record` wrote.
    pub dir: PathBuf,
    #[command(flatten)]
    pub open: OpenArgs,
    /// Stop once this many observations are compared.
    #[arg(long)]
    pub limit: Option<NonZeroUsize>,
    /// Write the report as JSON to this file (`-` for standard output).
    #[arg(long)]
    pub json: Option<PathBuf>,
}

/// What came of a replay.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Observations that ran again.
    compared: usize,
    /// Of those, with the same actions bit for bit.
    identical: usize,
    /// With others, or with none.
    different: usize,
    /// Recorded requests that had no answer: nothing to compare.
    unanswered: usize,
    /// What could not be compared; null where the recording could not be read to its end.
    left_out: Option<Missing>,
    /// Largest difference of an action.
    max_abs: f64,
    first: Option<Difference>,
    /// What computed the recorded answers, as far as it is not what computes now.
    recorded_by: Vec<Value>,
    now: Value,
}

/// What was recorded and is not there.
#[derive(Debug, Serialize)]
struct Missing {
    lines: usize,
    segments: usize,
}

/// Where an answer is another.
#[derive(Debug, Serialize)]
struct Difference {
    segment: String,
    request: u64,
    /// Requests in its batch when it was recorded; here each runs alone.
    batch: Option<u64>,
    what: String,
}

/// Runs a recording again.
pub fn run(args: &ReplayArgs) -> Result<()> {
    writable(&args.json)?;
    log::start(args.open.log_format)?;
    let recording = Recording::open(&args.dir)?;
    let service = opening::load(&args.open, args.open.config.name(), 1, |_| Ok(()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ready = runtime.block_on(service.model().engine.wait_ready());
    ready.map_err(|why| anyhow::anyhow!("the model could not be loaded: {why}"))?;
    let mut report = Report { now: service.identity(), ..Report::default() };
    let read = recording.for_each(|recorded| {
        report.take(&recorded, &service, &runtime);
        let enough = args.limit.is_some_and(|limit| report.compared >= limit.get());
        if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    report.left_out = read.as_ref().ok().map(|left_out| {
        let LeftOut { lines, segments, .. } = *left_out;
        Missing { lines, segments }
    });
    // What was found before the recording could not be read on is worth telling, too.
    match &args.json {
        Some(path) => write_json(path, &report)?,
        None => report.print(),
    }
    let damaged = read?.damaged;
    if !damaged.is_empty() {
        bail!(
            "frames are missing in {}, although its server recorded on after it: copy the folder \
             again",
            damaged.join(", ")
        );
    }
    match (report.compared, report.different) {
        (0, _) => bail!("the recording holds no answered request"),
        (_, 0) => Ok(()),
        (all, n) => bail!("{n} of {all} answers differ"),
    }
}

impl Report {
    fn take(&mut self, recorded: &Recorded, service: &PolicyService, runtime: &Runtime) {
        let answered = match recorded.answered() {
            Ok(answered) if !answered.is_empty() => answered,
            Ok(_) => {
                self.unanswered += 1;
                return;
            }
            Err(error) => return self.differs(recorded, error.to_string()),
        };
        if recorded.identity != self.now && !self.recorded_by.contains(&recorded.identity) {
            self.recorded_by.push(recorded.identity.clone());
        }
        for (observation, context, want) in answered {
            self.compared += 1;
            let got = runtime.block_on(service.infer(observation, context));
            match got.map(|reply| compare(&want, &reply.actions)) {
                Ok(None) => self.identical += 1,
                Ok(Some((what, max_abs))) => {
                    self.max_abs = self.max_abs.max(max_abs);
                    self.differs(recorded, what);
                }
                Err(error) => self.differs(recorded, error.to_string()),
            }
        }
    }

    fn differs(&mut self, recorded: &Recorded, what: String) {
        self.different += 1;
        self.first.get_or_insert_with(|| Difference {
            segment: recorded.segment.clone(),
            request: recorded.id,
            batch: recorded.batch,
            what,
        });
    }

    fn print(&self) {
        println!(
            "{} observations compared: {} identical bit for bit, {} different; \
             {} requests had no answer",
            self.compared, self.identical, self.different, self.unanswered
        );
        if let Some(Missing { lines: lines @ 1.., segments }) = self.left_out {
            println!("left out: {lines} lines at the ends of {segments} segments, which were cut");
        }
        if let Some(first) = &self.first {
            let batch = first.batch.map_or(String::new(), |n| format!(", then in a batch of {n}"));
            println!(
                "first: request {} of {}{batch}: {}",
                first.request, first.segment, first.what
            );
            println!("largest difference of an action: {:e}", self.max_abs);
        }
        for by in &self.recorded_by {
            println!("recorded by  {by}\nreplayed by  {}", self.now);
        }
    }
}

/// What differs, in words, and by how much at most; `None` when every bit is the same, or of
/// actions that were answered as float32, every bit of that.
fn compare(want: &NdArray, got: &NdArray) -> Option<(String, f64)> {
    let rounded = if want.dtype == Scalar::F32 { got.to_f32() } else { None };
    let got = rounded.as_ref().unwrap_or(got);
    if want == got {
        return None;
    }
    let values = want.to_f64().zip(got.to_f64());
    let Some((want_values, got_values)) = values.filter(|_| want.shape == got.shape) else {
        return Some((format!("{:?} actions, {:?} recorded", got.shape, want.shape), 0.0));
    };
    let pairs = || want_values.iter().zip(&got_values);
    let count = pairs().filter(|(w, g)| w.to_bits() != g.to_bits()).count();
    let max_abs = pairs().map(|(w, g)| (w - g).abs()).fold(0.0, f64::max);
    let at = pairs().position(|(w, g)| w.to_bits() != g.to_bits()).unwrap_or(0);
    let columns = want.shape.last().copied().unwrap_or(1).max(1);
    let (total, row, column) = (want_values.len(), at / columns, at % columns);
    let (w, g) = (want_values[at], got_values[at]);
    let what = format!(
        "{count} of {total} values, at most {max_abs:e} off; the first is [{row}, {column}]: {g} \
         now, {w} recorded"
    );
    Some((what, max_abs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_is_a_difference() {
        let array = |values: &[f64]| NdArray::from_f64(vec![2, 2], values).unwrap();
        let want = array(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(compare(&want, &want), None);
        let bit = f64::from_bits(3.0f64.to_bits() + 1);
        let (what, max_abs) = compare(&want, &array(&[1.0, 2.0, bit, 4.0])).unwrap();
        assert!(what.starts_with("1 of 4 values") && what.contains("[1, 0]"), "{what}");
        assert_eq!(max_abs, bit - 3.0);
        let (what, _) = compare(&array(&[0.0; 4]), &array(&[-0.0, 0.0, 0.0, 0.0])).unwrap();
        assert!(what.starts_with("1 of 4"), "signs of zeros count: {what}");
        let third = array(&[1.0, 2.0, 3.0, 1.0 / 3.0]);
        let answered = third.to_f32().unwrap();
        assert_eq!(compare(&answered, &third), None, "sent as float32");
        assert!(compare(&answered, &want).is_some());
        let other = NdArray::from_f64(vec![4, 1], &[1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(compare(&want, &other).unwrap().0, "[4, 1] actions, [2, 2] recorded");
    }
}
