//! Normalises states and un-normalises actions with a checkpoint's statistics.
//! openpi works in float64, LeRobot in float32; nothing clips.

mod stats;

pub use stats::{FeatureStats, NormStats};

use pirouette_model::config::Family;
use std::path::PathBuf;
use thiserror::Error;

/// openpi's guard against a zero spread.
const OPENPI_EPS: f64 = 1e-6;
/// LeRobot's guard against a zero spread, unless a processor names another.
pub const LEROBOT_EPS: f32 = 1e-8;

/// How one feature is normalised. x is raw, x' normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormMode {
    /// Unchanged.
    Identity,
    /// openpi, π0: x' = (x − mean) / (std + 1e-6), inverse x'·(std + 1e-6) + mean, in float64.
    OpenpiZScore,
    /// openpi, π0.5: x' = (x − q01) / (q99 − q01 + 1e-6)·2 − 1 and its inverse, in float64.
    OpenpiQuantile,
    /// LeRobot: x' = (x − mean) / (std + 1e-8), inverse x'·std + mean, in float32.
    MeanStd,
    /// LeRobot: 2(x − min) / (max − min) − 1, in float32.
    MinMax,
    /// LeRobot: 2(x − q01) / (q99 − q01) − 1, in float32.
    Quantiles,
    /// LeRobot: the same with q10 and q90.
    Quantile10,
}

impl NormMode {
    /// openpi's choice, which its configurations can't change: quantiles for all but π0.
    pub fn openpi(family: Family) -> NormMode {
        match family {
            Family::Pi0 => NormMode::OpenpiZScore,
            Family::Pi05 => NormMode::OpenpiQuantile,
        }
    }

    /// Name for contracts and messages, as in TOML.
    pub fn name(self) -> &'static str {
        match self {
            NormMode::Identity => "identity",
            NormMode::OpenpiZScore => "z_score",
            NormMode::OpenpiQuantile => "quantile",
            NormMode::MeanStd => "mean_std",
            NormMode::MinMax => "min_max",
            NormMode::Quantiles => "quantiles",
            NormMode::Quantile10 => "quantile10",
        }
    }

    /// The two statistics the mode needs.
    fn needs(self) -> [&'static str; 2] {
        match self {
            NormMode::Identity => ["", ""],
            NormMode::OpenpiZScore | NormMode::MeanStd => ["mean", "std"],
            NormMode::OpenpiQuantile | NormMode::Quantiles => ["q01", "q99"],
            NormMode::Quantile10 => ["q10", "q90"],
            NormMode::MinMax => ["min", "max"],
        }
    }
}

/// One feature's map and its inverse: a mode with its two statistics, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Normalizer {
    mode: NormMode,
    /// mean, or the lower bound.
    low: Vec<f64>,
    /// std, or the upper bound.
    high: Vec<f64>,
}

impl Normalizer {
    /// Leaves everything unchanged: a feature without statistics.
    pub fn identity() -> Normalizer {
        Normalizer { mode: NormMode::Identity, low: Vec::new(), high: Vec::new() }
    }

    /// Takes what `mode` needs out of a feature's statistics. `feature` is for messages.
    pub fn new(
        mode: NormMode,
        feature: &str,
        stats: &FeatureStats,
    ) -> Result<Normalizer, NormError> {
        if mode == NormMode::Identity {
            return Ok(Normalizer::identity());
        }
        let [low, high] = mode.needs();
        let take = |name: &'static str| {
            stats.get(name).cloned().ok_or_else(|| NormError::MissingStatistic {
                feature: feature.into(),
                statistic: name,
                mode: mode.name(),
            })
        };
        let (low, high) = (take(low)?, take(high)?);
        if low.len() != high.len() {
            return Err(NormError::Lengths {
                feature: feature.into(),
                a: low.len(),
                b: high.len(),
            });
        }
        Ok(Normalizer { mode, low, high })
    }

    /// Number of dimensions the statistics cover; `None` for identity, which covers any.
    pub fn covered(&self) -> Option<usize> {
        (self.mode != NormMode::Identity).then_some(self.low.len())
    }

    /// What is done; [`NormMode::Identity`] where there are no statistics.
    pub fn mode(&self) -> NormMode {
        self.mode
    }

    /// Fails at a statistic of the first `columns` that is no finite number.
    pub(crate) fn check_finite(&self, feature: &str, columns: usize) -> Result<(), NormError> {
        for (statistic, values) in self.mode.needs().into_iter().zip([&self.low, &self.high]) {
            let mut used = values.iter().take(columns).enumerate();
            if let Some((index, &value)) = used.find(|(_, value)| !value.is_finite()) {
                let feature = feature.into();
                return Err(NormError::NotFinite { feature, statistic, index, value });
            }
        }
        Ok(())
    }

    /// Raw to normalised; `x` may be shorter than the statistics, which are then cut.
    /// `None` if it is longer (a broadcast error in NumPy).
    pub fn normalize(&self, x: &[f64]) -> Option<Vec<f64>> {
        if self.covered().is_some_and(|n| x.len() > n) {
            return None;
        }
        if self.mode == NormMode::Identity {
            return Some(x.to_vec());
        }
        let bounds = self.low.iter().zip(&self.high);
        Some(x.iter().zip(bounds).map(|(&x, (&low, &high))| self.forward(x, low, high)).collect())
    }

    /// Normalised to raw, for one row. Dimensions beyond the statistics: openpi's z-score
    /// multiplies them by 1 + 1e-6, all other modes leave them.
    pub fn unnormalize(&self, x: &[f64]) -> Vec<f64> {
        self.rows(x, |x, low, high| self.inverse(x, low, high))
    }

    /// As [`Normalizer::unnormalize`] for a float32 row: NumPy keeps `(x + 1) / 2` in float32
    /// before the float64 statistics widen it.
    pub fn unnormalize_f32(&self, x: &[f32]) -> Vec<f64> {
        let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        if self.mode != NormMode::OpenpiQuantile {
            return self.unnormalize(&wide);
        }
        self.rows(&wide, |x, low, high| {
            f64::from((x as f32 + 1.0) / 2.0) * (high - low + OPENPI_EPS) + low
        })
    }

    fn rows(&self, x: &[f64], inverse: impl Fn(f64, f64, f64) -> f64) -> Vec<f64> {
        let beyond = match self.mode {
            NormMode::OpenpiZScore => 1.0 + OPENPI_EPS,
            _ => 1.0,
        };
        let bounds = self.low.iter().zip(&self.high).map(Some).chain(std::iter::repeat(None));
        x.iter()
            .zip(bounds)
            .map(|(&x, bounds)| match bounds {
                Some((&low, &high)) => inverse(x, low, high),
                None => x * beyond,
            })
            .collect()
    }

    fn forward(&self, x: f64, low: f64, high: f64) -> f64 {
        match self.mode {
            NormMode::Identity => x,
            NormMode::OpenpiZScore => (x - low) / (high + OPENPI_EPS),
            NormMode::OpenpiQuantile => (x - low) / (high - low + OPENPI_EPS) * 2.0 - 1.0,
            NormMode::MeanStd => {
                let (x, mean, std) = (x as f32, low as f32, high as f32);
                f64::from((x - mean) / (std + LEROBOT_EPS))
            }
            NormMode::MinMax | NormMode::Quantiles | NormMode::Quantile10 => {
                let (x, low) = (x as f32, low as f32);
                f64::from(2.0 * (x - low) / spread(low, high as f32) - 1.0)
            }
        }
    }

    fn inverse(&self, x: f64, low: f64, high: f64) -> f64 {
        match self.mode {
            NormMode::Identity => x,
            NormMode::OpenpiZScore => x * (high + OPENPI_EPS) + low,
            NormMode::OpenpiQuantile => (x + 1.0) / 2.0 * (high - low + OPENPI_EPS) + low,
            NormMode::MeanStd => f64::from(x as f32 * high as f32 + low as f32),
            NormMode::MinMax | NormMode::Quantiles | NormMode::Quantile10 => {
                let (x, low) = (x as f32, low as f32);
                f64::from((x + 1.0) * spread(low, high as f32) / 2.0 + low)
            }
        }
    }
}

/// LeRobot's range: eps only where it would be exactly zero.
fn spread(low: f32, high: f32) -> f32 {
    let d = high - low;
    if d == 0.0 { LEROBOT_EPS } else { d }
}

/// Statistics that can't be used.
#[derive(Debug, Error)]
pub enum NormError {
    /// The file is not there.
    #[error(
        "Norm stats file not found at: {0}; copy the training run's assets/ folder beside the \
         weights (converters often lose it), or check the policy's asset_id"
    )]
    NotFound(PathBuf),
    /// The file can't be read.
    #[error("norm stats at {path} can't be read: {error}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The text is no statistics file.
    #[error("these are no norm stats: {0}; expected {{\"norm_stats\": {{\"state\": …}}}}")]
    Malformed(String),
    /// A statistic that the normalisation needs is absent or null.
    #[error(
        "norm stats: `{feature}` has no `{statistic}`, which normalisation `{mode}` needs; \
         recompute the statistics with a current openpi, or choose another normalisation"
    )]
    MissingStatistic {
        /// `state` or `actions`.
        feature: String,
        /// The statistic.
        statistic: &'static str,
        /// The mode.
        mode: &'static str,
    },
    /// Two statistics of one feature have different lengths.
    #[error("norm stats: two statistics of `{feature}` have {a} and {b} numbers; they must agree")]
    Lengths {
        /// `state` or `actions`.
        feature: String,
        /// One length.
        a: usize,
        /// The other.
        b: usize,
    },
    /// Fewer dimensions than the robot's state, so that every request would fail.
    #[error(
        "norm stats: `state` covers {len} numbers, this robot's state has {dims}; these are \
         another robot's statistics"
    )]
    TooShort {
        /// Length of its statistics.
        len: usize,
        /// Length of the state.
        dims: usize,
    },
    /// LeRobot's statistics of another robot. Those of one number PyTorch would take for every
    /// column.
    #[error(
        "norm stats: `{feature}` covers {len} numbers, this robot has {dims}; LeRobot's statistics \
         have one number for each: these are another robot's{}", one_for_all(*.len)
    )]
    NotOneEach {
        /// `state` or `actions`.
        feature: &'static str,
        /// Length of its statistics.
        len: usize,
        /// Length of the robot's state or actions.
        dims: usize,
    },
    /// A statistic that spoils every number it meets.
    #[error(
        "norm stats: `{feature}.{statistic}` is {value} at index {index}; recompute the \
         statistics, without the frames that are not finite"
    )]
    NotFinite {
        /// `state` or `actions`.
        feature: String,
        /// The statistic.
        statistic: &'static str,
        /// Where in it.
        index: usize,
        /// NaN or an infinity.
        value: f64,
    },
    /// More dimensions than the model has.
    #[error(
        "norm stats: `{feature}` covers {len} dimensions, the model has {action_dim}; these are \
         another robot's statistics"
    )]
    TooLong {
        /// `state` or `actions`.
        feature: String,
        /// Length of its statistics.
        len: usize,
        /// Columns of the model.
        action_dim: usize,
    },
    /// openpi would fail at every request.
    #[error(
        "Selector key {0} not found in tree: norm stats may cover only `state` and `actions`; \
         remove the others from the file"
    )]
    UnknownFeature(String),
}

fn one_for_all(len: usize) -> &'static str {
    if len == 1 { ", or one number for all, which must be written once for each" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(low: &[f64], high: &[f64]) -> FeatureStats {
        let mut stats = FeatureStats::default();
        for name in ["mean", "q01", "q10", "min"] {
            stats.set(name, low.to_vec());
        }
        for name in ["std", "q99", "q90", "max"] {
            stats.set(name, high.to_vec());
        }
        stats
    }

    #[test]
    fn every_mode_inverts_itself() {
        let stats = stats(&[-1.0, 0.5, 2.0], &[3.0, 0.75, 2.5]);
        for mode in [
            NormMode::Identity,
            NormMode::OpenpiZScore,
            NormMode::OpenpiQuantile,
            NormMode::MeanStd,
            NormMode::MinMax,
            NormMode::Quantiles,
            NormMode::Quantile10,
        ] {
            let norm = Normalizer::new(mode, "state", &stats).unwrap();
            let x = [0.25, -7.0, 2.25];
            let back = norm.unnormalize(&norm.normalize(&x).unwrap());
            for (x, back) in x.iter().zip(back) {
                assert!((x - back).abs() < 1e-5, "{mode:?}: {x} {back}");
            }
        }
    }

    #[test]
    fn lerobots_guards() {
        // Equal bounds: the spread becomes 1e-8, nothing is clipped; the inverse of MEAN_STD has
        // no eps.
        let flat = stats(&[1.0], &[1.0]);
        let norm = Normalizer::new(NormMode::Quantiles, "state", &flat).unwrap();
        assert_eq!(norm.normalize(&[1.0]).unwrap(), [-1.0]);
        assert!(norm.normalize(&[1.5]).unwrap()[0] > 1e7);
        let still = stats(&[2.0], &[0.0]);
        let norm = Normalizer::new(NormMode::MeanStd, "state", &still).unwrap();
        assert_eq!(norm.unnormalize(&[1e9]), [2.0]);
        let norm = Normalizer::new(NormMode::OpenpiZScore, "state", &still).unwrap();
        assert!(norm.unnormalize(&[1e9])[0] > 1000.0);
    }

    #[test]
    fn dimensions_beyond_the_statistics() {
        let short = stats(&[0.0], &[1.0]);
        let z = Normalizer::new(NormMode::OpenpiZScore, "actions", &short).unwrap();
        assert_eq!(z.unnormalize(&[0.0, 1.0]), [0.0, 1.000001]);
        let q = Normalizer::new(NormMode::OpenpiQuantile, "actions", &short).unwrap();
        assert_eq!(q.unnormalize(&[-1.0, 1.0]), [0.0, 1.0]);
        assert!(z.normalize(&[0.0, 1.0]).is_none());
        assert_eq!(q.normalize(&[]).unwrap(), [0.0; 0]);
    }

    #[test]
    fn a_missing_statistic_is_named() {
        let mut only = FeatureStats::default();
        only.set("mean", vec![0.0]);
        only.set("std", vec![1.0]);
        let error = Normalizer::new(NormMode::OpenpiQuantile, "state", &only).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("state") && text.contains("q01"), "{text}");
        only.set("std", vec![1.0, 2.0]);
        assert!(Normalizer::new(NormMode::OpenpiZScore, "state", &only).is_err());
    }
}
