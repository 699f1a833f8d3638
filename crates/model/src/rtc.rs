//! Real-time chunking: what is left of the chunk in execution → a weight for each new action and a
//! guidance strength for each step, as LeRobot computes them.
//!
//! While the network works the robot goes on with the previous chunk y. Each Euler step draws the
//! new chunk x towards it: with the velocity v at time t and the clean chunk it points at,
//! x̂ = x − t·v, the step takes v' = v − g·w∘(y − x̂) instead of v, where w weighs each action and
//! g = min(limit, [`strength`]) belongs to the step. (The published algorithm has the Jacobian of
//! x̂ in the last term; LeRobot's code evaluates v outside of the gradient, which makes that
//! Jacobian the identity.)
//!
//! Models that were trained so take the first actions as given instead: nothing pulls, the rows
//! are the previous chunk's from noise to end, and the network is told that they are clean.

use crate::config::Config;

/// How a program's chunks are tied to the ones before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rtc {
    /// Not at all.
    #[default]
    Off,
    /// Each Euler step is drawn towards `Inputs::previous`. A sample without a previous chunk has
    /// weights 0 and gets the bits it would get from a program without.
    Guided,
    /// The first actions are given: rows of a weight above 0 hold the previous chunk's in
    /// `Inputs::noise`, stay as they are, and have time 0 in the network. π0.5 models that were
    /// trained so ([`Config::rtc_max_delay`](crate::Config)).
    Trained,
}

/// How the weights fall off after the actions that will have been executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// A straight line to 0 at the execution horizon.
    #[default]
    Linear,
    /// That line u as u·(eᵘ − 1)/(e − 1).
    Exp,
    /// 1 up to the execution horizon.
    Ones,
    /// 0 right after the delay.
    Zeros,
}

impl Schedule {
    /// Every schedule.
    pub const ALL: [Schedule; 4] =
        [Schedule::Linear, Schedule::Exp, Schedule::Ones, Schedule::Zeros];

    /// LeRobot's name, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Linear => "linear",
            Schedule::Exp => "exp",
            Schedule::Ones => "ones",
            Schedule::Zeros => "zeros",
        }
    }

    /// The schedule of a name, whatever its case.
    pub fn named(name: &str) -> Option<Schedule> {
        Self::ALL.into_iter().find(|s| s.name().eq_ignore_ascii_case(name))
    }

    /// Weights of `horizon` actions: 1 for those the robot executes while the network works
    /// (`delay`), falling to 0 at `execution_horizon`.
    pub fn weights(self, delay: usize, execution_horizon: usize, horizon: usize) -> Vec<f32> {
        let end = execution_horizon.min(horizon);
        let start = delay.min(end);
        let middle = |i: usize| {
            let u = 1.0 - (i - start + 1) as f64 / (end - start + 1) as f64;
            match self {
                Schedule::Linear => u,
                Schedule::Exp => u * u.exp_m1() / 1f64.exp_m1(),
                Schedule::Ones => 1.0,
                Schedule::Zeros => 0.0,
            }
        };
        (0..horizon)
            .map(|i| match i {
                _ if i < start => 1.0,
                _ if i < end => middle(i) as f32,
                _ => 0.0,
            })
            .collect()
    }
}

/// (t² + (1 − t)²) / (t·(1 − t)): how hard a step at time t pulls before the limit; +∞ at t = 1.
pub fn strength(time: f32) -> f32 {
    let t = time as f64;
    if t >= 1.0 {
        return f32::INFINITY;
    }
    ((t * t + (1.0 - t).powi(2)) / (t * (1.0 - t))) as f32
}

/// Numbers that come with a left-over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Actions that will have been executed when the new chunk arrives (default 0).
    pub delay: usize,
    /// Actions after which the new chunk is free (default 10).
    pub execution_horizon: usize,
    /// How the weights fall off in between.
    pub schedule: Schedule,
    /// Upper limit of the guidance (default 10).
    pub limit: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { delay: 0, execution_horizon: 10, schedule: Schedule::Linear, limit: 10.0 }
    }
}

/// The previous chunk of one sample, as the model takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct PreviousChunk {
    /// What is made of it: [`Rtc::Guided`] or [`Rtc::Trained`].
    pub rtc: Rtc,
    /// `[horizon, action_dim]`, normalised, from the first action that was not yet executed on.
    pub chunk: Vec<f32>,
    /// `[horizon]`, 0 to 1.
    pub weights: Vec<f32>,
    /// Upper limit of the guidance.
    pub limit: f32,
}

/// Largest limit of the guidance that is taken: far above anything in use.
const MAX_LIMIT: f32 = 1000.0;

/// A left-over that does not fit the model.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RtcError {
    /// Rows or columns.
    #[error(
        "the previous chunk has shape [{rows}, {cols}], the model takes at most \
         [{horizon}, {action_dim}]"
    )]
    Shape {
        /// Rows given.
        rows: usize,
        /// Columns given.
        cols: usize,
        /// Rows of the model's chunk.
        horizon: usize,
        /// Columns of the model's chunk.
        action_dim: usize,
    },
    /// NaN, infinity, or out of range.
    #[error("{what} {index} of the previous chunk is {value}, it must be {want}")]
    Value {
        /// `value`, `weight` or `guidance limit`.
        what: &'static str,
        /// Its index.
        index: usize,
        /// The value.
        value: f32,
        /// What it may be.
        want: &'static str,
    },
    /// More actions given than the model was trained for, or than there are.
    #[error(
        "{delay} actions can't be given: the model was trained for {trained} at most, the chunk \
         has {horizon} and the left-over {rows}"
    )]
    Delay {
        /// Actions to be given.
        delay: usize,
        /// Most the model was trained for.
        trained: usize,
        /// Rows of the model's chunk.
        horizon: usize,
        /// Rows left over.
        rows: usize,
    },
}

impl PreviousChunk {
    /// From the left-over actions, `[rows, cols]`, for a model of these sizes. Missing rows and
    /// columns are 0, as in LeRobot: missing columns are drawn towards it, missing rows are free.
    pub fn new(
        left_over: &[f32],
        [rows, cols]: [usize; 2],
        settings: &Settings,
        [horizon, action_dim]: [usize; 2],
    ) -> Result<Self, RtcError> {
        let chunk = padded(left_over, [rows, cols], [horizon, action_dim])?;
        let end = settings.execution_horizon.min(rows);
        let weights = settings.schedule.weights(settings.delay, end, horizon);
        let previous = PreviousChunk { rtc: Rtc::Guided, chunk, weights, limit: settings.limit };
        check_values(&previous.chunk, &previous.weights, &[previous.limit])?;
        Ok(previous)
    }

    /// The first `delay` of the left-over actions as given, for a model trained for up to
    /// `trained` of them.
    pub fn given(
        left_over: &[f32],
        [rows, cols]: [usize; 2],
        delay: usize,
        trained: usize,
        [horizon, action_dim]: [usize; 2],
    ) -> Result<Self, RtcError> {
        let chunk = padded(left_over, [rows, cols], [horizon, action_dim])?;
        if delay > trained.min(rows) || delay >= horizon {
            return Err(RtcError::Delay { delay, trained, horizon, rows });
        }
        let weights = Schedule::Zeros.weights(delay, delay, horizon);
        let previous = PreviousChunk { rtc: Rtc::Trained, chunk, weights, limit: 0.0 };
        check_values(&previous.chunk, &previous.weights, &[previous.limit])?;
        Ok(previous)
    }

    /// Whether sizes and values are what a model takes.
    pub fn check(&self, config: &Config, horizon: usize) -> Result<(), RtcError> {
        let (rows, action_dim) = (self.weights.len(), config.action_dim);
        if rows != horizon || self.chunk.len() != horizon * action_dim {
            let cols = self.chunk.len() / rows.max(1);
            return Err(RtcError::Shape { rows, cols, horizon, action_dim });
        }
        check_values(&self.chunk, &self.weights, &[self.limit])?;
        let (delay, trained) = (self.given_rows(), config.rtc_max_delay);
        if self.rtc == Rtc::Trained && (delay > trained || delay >= horizon) {
            return Err(RtcError::Delay { delay, trained, horizon, rows });
        }
        Ok(())
    }

    /// Puts given actions where the denoising starts; guided ones are no business of the noise.
    pub fn give(&self, noise: &mut [f32]) {
        if self.rtc == Rtc::Trained {
            let values = self.given_rows() * (self.chunk.len() / self.weights.len().max(1));
            noise[..values].copy_from_slice(&self.chunk[..values]);
        }
    }

    fn given_rows(&self) -> usize {
        self.weights.iter().take_while(|w| **w > 0.0).count()
    }
}

/// A left-over in a chunk of zeros.
fn padded(
    left_over: &[f32],
    [rows, cols]: [usize; 2],
    [horizon, action_dim]: [usize; 2],
) -> Result<Vec<f32>, RtcError> {
    let fits = (1..=action_dim).contains(&cols)
        && rows <= horizon
        && rows.checked_mul(cols) == Some(left_over.len());
    if !fits {
        return Err(RtcError::Shape { rows, cols, horizon, action_dim });
    }
    let mut chunk = vec![0.0; horizon * action_dim];
    for (to, from) in chunk.chunks_exact_mut(action_dim).zip(left_over.chunks_exact(cols)) {
        to[..cols].copy_from_slice(from);
    }
    Ok(chunk)
}

/// Whether all values are usable: finite actions, weights of 0 to 1, limits of 0 to 1000.
pub(crate) fn check_values(chunk: &[f32], weights: &[f32], limits: &[f32]) -> Result<(), RtcError> {
    let find = |values: &[f32], what, want, ok: &dyn Fn(f32) -> bool| match values
        .iter()
        .position(|v| !ok(*v))
    {
        Some(index) => Err(RtcError::Value { what, index, value: values[index], want }),
        None => Ok(()),
    };
    find(chunk, "value", "finite", &f32::is_finite)?;
    find(weights, "weight", "from 0 to 1", &|w| (0.0..=1.0).contains(&w))?;
    find(limits, "guidance limit", "from 0 to 1000", &|l| (0.0..=MAX_LIMIT).contains(&l))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: &[f32], want: &[f64], tolerance: f64) {
        assert_eq!(got.len(), want.len());
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((*g as f64 - w).abs() <= tolerance, "{i}: {g} {w} in {got:?}");
        }
    }

    /// Values printed by LeRobot.
    #[test]
    fn weights_are_lerobots() {
        let linear = [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0];
        assert_eq!(Schedule::Linear.weights(2, 5, 8), linear);
        let exp = [1.0, 1.0, 0.48755, 0.18877, 0.04132, 0.0, 0.0, 0.0];
        near(&Schedule::Exp.weights(2, 5, 8), &exp, 5e-6);
        let middle = [0.8571, 0.7143, 0.5714, 0.4286, 0.2857, 0.1429];
        near(&Schedule::Linear.weights(4, 10, 12)[4..10], &middle, 5e-5);
        assert_eq!(Schedule::Ones.weights(2, 5, 8), [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(Schedule::Zeros.weights(2, 5, 8), [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn delays_and_horizons_beyond_the_chunk_are_cut() {
        for schedule in Schedule::ALL {
            assert_eq!(schedule.weights(9, 5, 8), Schedule::Ones.weights(0, 5, 8), "{schedule:?}");
            assert_eq!(schedule.weights(9, 99, 4), [1.0; 4]);
            assert_eq!(schedule.weights(3, 0, 4), [0.0; 4]);
            assert_eq!(Schedule::named(&schedule.name().to_uppercase()), Some(schedule));
        }
        assert_eq!(Schedule::named("cosine"), None);
    }

    /// Values printed by LeRobot, with its limit of 10.
    #[test]
    fn strengths_are_lerobots() {
        for (t, want) in
            [(0.9, 9.111), (0.7, 2.762), (0.5, 2.0), (0.1, 9.111), (0.05, 10.0), (1.0, 10.0)]
        {
            let got = strength(t).min(10.0);
            assert!((got - want).abs() < 5e-4, "{t}: {got} {want}");
        }
    }

    #[test]
    fn a_left_over_is_padded_and_bounds_the_execution_horizon() {
        let settings = Settings { delay: 1, ..Default::default() };
        let p = PreviousChunk::new(&[1.0, 2.0, 3.0, 4.0], [2, 2], &settings, [4, 3]).unwrap();
        assert_eq!(p.chunk, [1.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(p.weights, [1.0, 0.5, 0.0, 0.0], "two actions are left, whatever the horizon");
        let none = PreviousChunk::new(&[], [0, 2], &settings, [4, 3]).unwrap();
        assert_eq!(none.weights, [0.0; 4]);
    }

    #[test]
    fn given_actions_replace_the_noise_and_stay_within_what_was_trained() {
        let values = [1.0, 2.0, 3.0, 4.0];
        let given = |delay, trained| PreviousChunk::given(&values, [2, 2], delay, trained, [4, 3]);
        let p = given(2, 3).unwrap();
        assert_eq!((p.rtc, &p.weights[..]), (Rtc::Trained, &[1.0, 1.0, 0.0, 0.0][..]));
        let mut noise = [9.0; 12];
        p.give(&mut noise);
        assert_eq!(noise[..7], [1.0, 2.0, 0.0, 3.0, 4.0, 0.0, 9.0]);
        for (delay, trained) in [(2, 1), (3, 9), (1, 0)] {
            let error = given(delay, trained).unwrap_err().to_string();
            assert!(error.contains(&format!("{delay} actions can't be given")), "{error}");
        }
        let all = PreviousChunk::given(&[0.0; 4], [4, 1], 4, 9, [4, 3]).unwrap_err();
        assert!(matches!(all, RtcError::Delay { horizon: 4, .. }));
        let trained = Config { action_dim: 3, rtc_max_delay: 2, ..Config::pi05() };
        assert_eq!(p.check(&trained, 4), Ok(()));
        let other = Config { rtc_max_delay: 1, ..trained };
        assert!(matches!(p.check(&other, 4), Err(RtcError::Delay { trained: 1, .. })));
    }

    #[test]
    fn left_overs_that_do_not_fit_are_refused_by_name() {
        let new = |values: &[f32], shape, settings: Settings| {
            PreviousChunk::new(values, shape, &settings, [4, 3]).unwrap_err().to_string()
        };
        let plain = Settings::default();
        assert!(new(&[0.0; 5], [5, 1], plain).contains("[5, 1], the model takes at most [4, 3]"));
        assert!(new(&[0.0; 4], [1, 4], plain).contains("[1, 4]"));
        assert!(new(&[0.0; 3], [2, 2], plain).contains("[2, 2]"));
        assert!(new(&[], [1, 0], plain).contains("[1, 0]"));
        let nan = new(&[0.0, f32::NAN], [1, 2], plain);
        assert!(nan.contains("value 1 of the previous chunk is NaN"), "{nan}");
        for limit in [-1.0, f32::NAN, f32::INFINITY, 1001.0] {
            let text = new(&[0.0], [1, 1], Settings { limit, ..plain });
            assert!(text.contains("guidance limit"), "{text}");
        }
    }
}
