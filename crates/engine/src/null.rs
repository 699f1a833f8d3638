//! A device that computes nothing: it takes a given time and returns actions that are a simple
//! function of the inputs. For tests, for load experiments, and to see what everything but the
//! model costs.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pirouette_model::{BackendError, Device, Executable, Inputs, Program, StageTimes};

use crate::lookout;

/// Longest run that can be asked for: a day.
const MAX_MS: f64 = 86_400_000.0;

/// Milliseconds of a run by batch size: ascending pairs, interpolated between, extended by the
/// last step beyond.
#[derive(Clone, Debug, PartialEq)]
pub struct NullTimes(pub Vec<(usize, f64)>);

impl NullTimes {
    /// The same time for every batch size.
    pub fn constant(ms: f64) -> Self {
        NullTimes(vec![(1, ms)])
    }

    /// Time of one run.
    pub fn of(&self, batch: usize) -> Duration {
        let table = &self.0;
        let after = table.iter().position(|(b, _)| *b >= batch).unwrap_or(table.len());
        let ms = match (after.checked_sub(1).map(|i| table[i]), table.get(after)) {
            (_, Some((b, ms))) if *b == batch => *ms,
            (Some((b0, m0)), Some((b1, m1))) => {
                m0 + (m1 - m0) * (batch - b0) as f64 / (b1 - b0) as f64
            }
            (Some((b0, m0)), None) => match table.len().checked_sub(2).map(|i| table[i]) {
                Some((b, m)) => m0 + (m0 - m) * (batch - b0) as f64 / (b0 - b) as f64,
                None => m0,
            },
            (None, Some((_, ms))) => *ms,
            (None, None) => 0.0,
        };
        Duration::from_secs_f64(ms.max(0.0) / 1e3)
    }
}

/// `30` (the same for every batch) or `1:30,8:60` (batch:ms, ascending).
impl FromStr for NullTimes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |part: &str, want: &str| Err(format!("`{part}` in `{text}`: {want}"));
        let form = "give milliseconds, or batch:ms pairs as in 1:30,8:60";
        let mut table: Vec<(usize, f64)> = Vec::new();
        for part in text.split(',') {
            let (batch, ms) = part.split_once(':').unwrap_or(("1", part));
            let (Ok(batch), Ok(ms)) = (batch.parse::<usize>(), ms.parse::<f64>()) else {
                return wrong(part, form);
            };
            if batch == 0 {
                return wrong(part, "batches begin at 1, as in 1:30,8:60");
            }
            if !(0.0..=MAX_MS).contains(&ms) {
                return wrong(part, &format!("give 0 to {MAX_MS} ms, as in 1:30,8:60"));
            }
            if table.last().is_some_and(|(before, _)| *before >= batch) {
                return wrong(part, "name batches in ascending order, each once, as in 1:30,8:60");
            }
            table.push((batch, ms));
        }
        Ok(NullTimes(table))
    }
}

/// What goes wrong in a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// The device thread panics.
    Panic,
    /// The device reports this failure.
    Error(String),
    /// The run takes this long.
    Hang(Duration),
    /// The actions of this slot are NaN.
    Nan(usize),
    /// One bit of the first action is wrong.
    Flip,
}

/// How long before the end of a run its thread wakes, where cores are to spare: one that waits for
/// a GPU is awake all the while, and a sleep may last a tenth of a millisecond too long.
const AWAKE: Duration = Duration::from_micros(300);

type FaultPlan = Arc<dyn Fn(u64) -> Option<Fault> + Send + Sync>;

/// The null device.
#[derive(Clone)]
pub struct NullDevice {
    times: NullTimes,
    awake: Duration,
    faults: Option<FaultPlan>,
    sensitive: bool,
    runs: Arc<AtomicU64>,
}

impl fmt::Debug for NullDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NullDevice").field("times", &self.times).finish_non_exhaustive()
    }
}

impl NullDevice {
    /// A device with these run times.
    pub fn new(times: NullTimes) -> Self {
        let awake = if lookout::spare_cores() { AWAKE } else { Duration::ZERO };
        NullDevice { times, awake, faults: None, sensitive: false, runs: Arc::default() }
    }

    fn wait_until(&self, end: Instant) {
        let asleep = end.saturating_duration_since(Instant::now()).saturating_sub(self.awake);
        std::thread::sleep(asleep);
        while Instant::now() < end {
            std::thread::yield_now();
        }
    }

    /// With faults: the plan is asked at every run, which it is told the number of (from 0,
    /// counted across clones, that is, across restarts).
    pub fn with_faults(self, plan: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static) -> Self {
        NullDevice { faults: Some(Arc::new(plan)), ..self }
    }

    /// With answers that depend on the program's shape too, in the last bits, as those of real
    /// kernels do.
    pub fn sensitive_to_shape(self) -> Self {
        NullDevice { sensitive: true, ..self }
    }

    /// The actions of one sample: half its noise plus a number in [0, 1) that depends on every
    /// pixel, token and state value of the sample and on nothing else. A program with real-time
    /// chunking moves each towards the previous chunk's by its weight.
    pub fn actions<'a>(
        images: impl IntoIterator<Item = &'a [u8]>,
        tokens: &[u32],
        state: &[f32],
        noise: &[f32],
        actions: &mut [f32],
    ) {
        const PRIME: u64 = 0x9E37_79B9_7F4A_7C15;
        let mix = |h: u64, v: u64| (h ^ v).wrapping_mul(PRIME).rotate_left(23);
        let word = |c: &[u8]| c.iter().rev().fold(0u64, |w, b| w << 8 | *b as u64);
        let words = images.into_iter().flat_map(|image| image.chunks(8));
        let mut hash = words.fold(PRIME, |h, c| mix(h, word(c)));
        hash = tokens.iter().fold(hash, |h, t| mix(h, *t as u64));
        hash = state.iter().fold(hash, |h, s| mix(h, s.to_bits() as u64));
        let offset = (hash >> 40) as f32 / (1u32 << 24) as f32;
        for (action, noise) in actions.iter_mut().zip(noise) {
            *action = noise * 0.5 + offset;
        }
    }
}

impl Device for NullDevice {
    fn name(&self) -> String {
        "null (no model, made-up actions)".into()
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        Ok(Box::new(NullExecutable { program, device: self.clone() }))
    }

    fn weight_bytes(&self) -> u64 {
        0
    }
}

struct NullExecutable {
    program: Arc<Program>,
    device: NullDevice,
}

impl Executable for NullExecutable {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        let started = Instant::now();
        inputs.check(&self.program)?;
        let (shape, config) = (&self.program.shape, &self.program.config);
        let run = self.device.runs.fetch_add(1, Relaxed);
        let fault = self.device.faults.as_ref().and_then(|plan| plan(run));
        let image = config.vision.image * config.vision.image * 3;
        let row = shape.horizon * config.action_dim;
        for (b, actions) in actions.chunks_mut(row).enumerate() {
            let real = 0..inputs.cameras[b] as usize;
            NullDevice::actions(
                real.map(|camera| inputs.images.get(b * shape.cameras + camera, image)),
                &inputs.tokens[b * shape.prompt_tokens..][..inputs.prompt_len[b] as usize],
                &inputs.state[b * config.action_dim..][..config.action_dim],
                &inputs.noise[b * row..][..row],
                actions,
            );
            for (i, actions) in actions.chunks_mut(config.action_dim).enumerate() {
                let Some(previous) = inputs.previous else { break };
                let (chunk, weight, _) = previous.row(b, i);
                let pull = |(action, to): (&mut f32, &f32)| *action += weight * (to - *action);
                actions.iter_mut().zip(chunk).for_each(pull);
            }
        }
        if self.device.sensitive {
            let slots = shape.batch * 31 + shape.prompt_tokens * 7 + shape.cameras;
            actions.iter_mut().for_each(|a| *a += slots as f32 * 1e-6);
        }
        self.device.wait_until(started + self.device.times.of(shape.batch));
        match fault {
            Some(Fault::Panic) => panic!("the null device was told to"),
            Some(Fault::Error(text)) => return Err(BackendError::Device(text)),
            Some(Fault::Hang(time)) => std::thread::sleep(time),
            Some(Fault::Nan(slot)) => actions[slot * row + row / 2] = f32::NAN,
            Some(Fault::Flip) => actions[0] = f32::from_bits(actions[0].to_bits() ^ 1),
            None => {}
        }
        let total_ms = started.elapsed().as_secs_f64() * 1e3;
        Ok(StageTimes { total_ms, ..StageTimes::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_interpolated_and_extended() {
        let times = NullTimes(vec![(1, 10.0), (4, 16.0), (8, 32.0)]);
        for (batch, ms) in [(1, 10.0), (2, 12.0), (4, 16.0), (6, 24.0), (8, 32.0), (16, 64.0)] {
            let got = times.of(batch).as_secs_f64() * 1e3;
            assert!((got - ms).abs() < 1e-6, "batch {batch}: {got} ms");
        }
        assert_eq!(NullTimes::constant(3.0).of(64), Duration::from_millis(3));
        assert_eq!(NullTimes(vec![]).of(1), Duration::ZERO);
    }

    #[test]
    fn tables_are_read_from_text() {
        assert_eq!("30".parse(), Ok(NullTimes::constant(30.0)));
        assert_eq!("1:9.5,8:60".parse(), Ok(NullTimes(vec![(1, 9.5), (8, 60.0)])));
        for wrong in ["", "x", "1:", "0:3", "8:1,1:2", "1:-1", "1:nan", "1:inf", "1:2,", "1:1e9"] {
            let error = wrong.parse::<NullTimes>().unwrap_err();
            assert!(error.contains("1:30,8:60"), "{wrong}: {error}");
        }
        for (wrong, want) in [
            ("8:5,1:9", "`1:9` in `8:5,1:9`: name batches in ascending order"),
            ("1:5,1:9", "each once"),
            ("5,9", "`9` in `5,9`"),
            ("0:3", "batches begin at 1"),
            ("1:-1", "give 0 to"),
        ] {
            let error = wrong.parse::<NullTimes>().unwrap_err();
            assert!(error.contains(want), "{wrong}: {error}");
        }
    }
}
