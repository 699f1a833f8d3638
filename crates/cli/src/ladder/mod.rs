//! `pirouette ladder`: what each choice is worth — the same model with choices off, then on, one
//! after the other, each rung keeping what the rungs before it switched on.

mod cpu;
mod cuda;

use std::sync::Arc;

use anyhow::Result;
use pirouette_model::{Config, Family, Shape, WeightTable, record_with};
use serde::{Deserialize, Serialize};

use crate::args::{DeviceArgs, LadderArgs};
use crate::device::{self, Opened};
use crate::log;
use crate::profile::{Repeats, Timing, compile, milliseconds, time};
use crate::provenance::Provenance;
use crate::text::{table, writable, write_json};
use crate::weights::Weights;

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rung {
    /// `AVX-512`, `2 threads`, ….
    pub name: String,
    /// What was changed against the rung before, in full.
    pub change: String,
    /// Its times.
    #[serde(flatten)]
    pub timing: Timing,
}

/// Rungs that build on each other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ladder {
    /// What is varied.
    pub title: String,
    /// What the milliseconds cover.
    pub clock: String,
    /// From everything off to everything on.
    pub rungs: Vec<Rung>,
}

#[derive(Serialize)]
struct Output {
    #[serde(flatten)]
    provenance: Provenance,
    weights: String,
    model: &'static str,
    device: String,
    precision: &'static str,
    ladders: Vec<Ladder>,
}

/// What the clock of a whole run covers.
pub const WHOLE: &str = "inputs in host memory to actions in host memory";

/// Climbs and prints, or writes.
pub fn run(args: &LadderArgs) -> Result<()> {
    writable(&args.json)?;
    let weights = Weights::open(&args.weights)?;
    let shape = args.shape.shape(1);
    let (device, ladders) = climb(&weights, &args.device, shape, args.runs, args.warmup)?;
    let (model, precision) = (weights.config.family.name(), args.device.precision.name());
    match &args.json {
        Some(path) => {
            let (provenance, weights) = (Provenance::here(), weights.origin);
            write_json(path, &Output { provenance, weights, model, device, precision, ladders })
        }
        None => {
            println!("{model} · {precision} · {device} · {}", weights.origin);
            for ladder in &ladders {
                println!("\n{}\nmilliseconds, {}\n", ladder.title, ladder.clock);
                print!("{}", table(&HEADER, &rows(ladder)));
                for rung in &ladder.rungs {
                    println!("  {}: {}", rung.name, rung.change);
                }
            }
            Ok(())
        }
    }
}

/// The device's name, and every ladder that it has, measured.
pub fn climb(
    weights: &Weights,
    args: &DeviceArgs,
    shape: Shape,
    runs: Option<usize>,
    warmup: Option<usize>,
) -> Result<(String, Vec<Ladder>)> {
    let mut opened = device::open(args, weights.config, shape.steps, weights.source())?;
    let name = opened.device().name();
    let mut repeats = Repeats::choose(&name, runs, warmup)?;
    if let (Opened::Cpu(_), None) = (&opened, runs) {
        repeats.runs = 3;
    }
    let work = work(&mut opened, &weights.config, shape, repeats)?;
    let choices = match opened {
        Opened::Cpu(device) => {
            // Its rungs load the weights anew: one copy at a time.
            drop(device);
            cpu::choices(weights, args, shape, repeats)?
        }
        Opened::Cuda(mut device) => {
            cuda::choices(device.as_mut(), &weights.config, shape, repeats)?
        }
    };
    Ok((name, vec![choices, work]))
}

/// Padding computed → dropped, with everything else on.
fn work(opened: &mut Opened, config: &Config, shape: Shape, repeats: Repeats) -> Result<Ladder> {
    let table = Arc::new(WeightTable::new(*config, shape.steps));
    let mut rungs = Vec::new();
    for work in work_shapes(config.family, shape) {
        log::note(format_args!("ladder: {}", work.name));
        let program = Arc::new(record_with(table.clone(), work.shape)?);
        let mut meter = compile(opened, program)?;
        let timing = time(meter.as_mut(), config, work.shape, repeats)?;
        rungs.push(Rung { name: work.name.into(), change: work.change, timing });
    }
    let title = "A two-camera robot's request: what is computed".into();
    Ok(Ladder { title, clock: WHOLE.into(), rungs })
}

/// A shape for which more is computed, and what a rung down to the next one is called.
pub struct Work {
    /// Name of the rung.
    pub name: &'static str,
    /// What was changed.
    pub change: String,
    /// The program's shape.
    pub shape: Shape,
}

/// A two-camera robot's request, as padded as openpi computes it, then less and less.
pub fn work_shapes(family: Family, shape: Shape) -> Vec<Work> {
    let slots = match family {
        Family::Pi0 => 48,
        Family::Pi05 => 200,
    };
    let slots = slots.max(shape.prompt_tokens);
    let all = Shape { cameras: 3, prompt_tokens: slots, ..shape };
    let exact = Shape { cameras: 3, ..shape };
    let real = Shape { cameras: 2, ..shape };
    let baseline = format!(
        "all 3 camera slots and all {slots} prompt slots go through the network, as if the \
         request filled them"
    );
    let prompt = format!("the program is recorded for {} prompt tokens", shape.prompt_tokens);
    let camera = "the program is recorded for 2 cameras; the masked third is not computed";
    vec![
        Work { name: "everything padded", change: baseline, shape: all },
        Work { name: "exact prompt", change: prompt, shape: exact },
        Work { name: "masked camera dropped", change: camera.into(), shape: real },
    ]
}

/// Header of [`rows`].
pub const HEADER: [&str; 7] =
    ["choice", "p50 ms", "vision", "prefill", "denoise", "× previous", "× first"];

/// Rows of a ladder's table.
pub fn rows(ladder: &Ladder) -> Vec<Vec<String>> {
    let times = |from: Option<&Rung>, to: &Rung| {
        let ratio = from.map(|f| f.timing.p50_ms / to.timing.p50_ms);
        ratio.map_or("–".into(), |r| format!("{r:.2}"))
    };
    let row = |(i, rung): (usize, &Rung)| {
        let [vision, prefill, denoise] = rung.timing.stage_ms.map(|ms| {
            // A rung whose stages were not timed apart says so.
            if ms > 0.0 { milliseconds(ms) } else { "–".into() }
        });
        let previous = i.checked_sub(1).and_then(|p| ladder.rungs.get(p));
        let first = if i == 0 { None } else { ladder.rungs.first() };
        vec![
            rung.name.clone(),
            milliseconds(rung.timing.p50_ms),
            vision,
            prefill,
            denoise,
            times(previous, rung),
            times(first, rung),
        ]
    };
    ladder.rungs.iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use pirouette_model::Rtc;

    use super::*;
    use crate::profile::Workload;

    #[test]
    fn factors_compare_with_the_rung_before_and_the_first() {
        let shape = Shape {
            batch: 1,
            cameras: 3,
            prompt_tokens: 20,
            horizon: 10,
            steps: 10,
            rtc: Rtc::Off,
        };
        let rung = |name: &str, p50_ms: f64| Rung {
            name: name.into(),
            change: String::new(),
            timing: Timing {
                workload: Workload::from(shape),
                runs: 1,
                p50_ms,
                mean_ms: p50_ms,
                p99_ms: p50_ms,
                min_ms: p50_ms,
                device_ms: None,
                samples_per_s: 1e3 / p50_ms,
                stage_ms: [0.0, 1.0, 2.0],
            },
        };
        let rungs = vec![rung("a", 80.0), rung("b", 40.0), rung("c", 10.0)];
        let rows = rows(&Ladder { title: String::new(), clock: String::new(), rungs });
        assert_eq!(rows[0][5..], ["–", "–"]);
        assert_eq!(rows[2][5..], ["4.00", "8.00"]);
        assert_eq!(rows[1][2], "–");
    }

    #[test]
    fn each_rung_computes_less() {
        let shape = Shape {
            batch: 1,
            cameras: 3,
            prompt_tokens: 20,
            horizon: 10,
            steps: 10,
            rtc: Rtc::Off,
        };
        for family in [Family::Pi0, Family::Pi05] {
            let work = work_shapes(family, shape);
            let size = |w: &Work| w.shape.cameras * 256 + w.shape.prompt_tokens;
            assert!(work.windows(2).all(|w| size(&w[0]) > size(&w[1])));
        }
    }
}
