//! What tells one policy from another: sizes, normalisation, robot, prompt. Shipped ones by name
//! ([`named`]), a lab's own from TOML ([`from_toml`]).

mod shipped;
mod toml_form;

pub use shipped::{Environment, UNSERVED, environment, named, names};
pub use toml_form::from_toml;

use crate::norm::NormMode;
use crate::robots::Robot;
use crate::value::Value;
use pirouette_model::Shape;
use pirouette_model::config::Family;
use thiserror::Error;

/// Denoising steps of every shipped policy.
pub const STEPS: usize = 10;

/// Whose pre- and post-processing a checkpoint was trained with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processing {
    /// openpi: Pillow's filtered resize, float64 statistics.
    Openpi,
    /// LeRobot: unfiltered bilinear resize, float32 statistics, its own prompt for π0.
    Lerobot,
}

/// Everything a policy needs besides weights, statistics and a tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyConfig {
    /// openpi's name, or the user's own.
    pub name: String,
    /// π0 or π0.5.
    pub family: Family,
    /// Rows of an action chunk (H).
    pub horizon: usize,
    /// Most prompt tokens (L), BOS included.
    pub max_token_len: usize,
    /// Columns of the model's state and actions (A): the weights' width, not the robot's.
    pub action_dim: usize,
    /// Whether the user said so: then weights of another width are not those that were meant.
    /// Otherwise it is assumed, and the weights decide.
    pub action_dim_said: bool,
    /// Denoising steps.
    pub steps: usize,
    /// Folder of the statistics below `assets/`; may contain slashes.
    pub asset_id: Option<String>,
    /// How the state is normalised.
    pub state_norm: NormMode,
    /// How actions are un-normalised.
    pub action_norm: NormMode,
    /// Names and shapes of the robot's observation and actions.
    pub robot: Robot,
    /// Action columns that are relative to the state: the state is added to them at the output.
    /// May be shorter than the actions; empty if none are.
    pub absolute_mask: Vec<bool>,
    /// Whether the normalised state is written into the prompt (π0.5).
    pub discrete_state: bool,
    /// Prompt used when a request brings none.
    pub default_prompt: Option<String>,
    /// Map sent to a client when it connects.
    pub metadata: Vec<(String, Value)>,
    /// Whose pre- and post-processing.
    pub processing: Processing,
}

impl PolicyConfig {
    /// Columns of the actions a robot receives.
    pub fn output_dims(&self) -> usize {
        self.robot.output_dims()
    }

    /// Checks what would otherwise fail at the first request. A caller that changes fields (a
    /// shorter horizon, a smaller test model) checks again; [`crate::Policy::new`] does too.
    pub fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field, problem: String| {
            Err(ConfigError::Field { name: self.name.clone(), field, problem })
        };
        for (field, value, most) in [
            ("horizon", self.horizon, Shape::MAX_HORIZON),
            ("max_token_len", self.max_token_len, Shape::MAX_PROMPT),
            ("action_dim", self.action_dim, 4096),
            ("steps", self.steps, Shape::MAX_STEPS),
        ] {
            if !(1..=most).contains(&value) {
                return wrong(field, format!("is {value}; it must be 1 to {most}"));
            }
        }
        let (dims, columns) = (self.output_dims(), self.action_dim);
        if dims == 0 || dims > columns {
            return wrong("robot.output_dims", format!("is {dims}; it must be 1 to {columns}"));
        }
        self.robot.check().or_else(|problem| wrong("robot", problem))?;
        // Absolute columns beyond what the robot receives say nothing.
        if let Some(last) = self.absolute_mask.iter().rposition(|&relative| relative)
            && last >= dims
        {
            let problem =
                format!("makes column {last} relative, the robot receives {dims} (`output_dims`)");
            return wrong("absolute", problem);
        }
        self.check_relative().or_else(|problem| wrong("absolute", problem))?;
        if self.discrete_state && self.family == Family::Pi0 {
            return wrong(
                "discrete_state",
                "needs family \"pi05\": π0 reads the state itself".into(),
            );
        }
        let asset = self.asset_id.as_deref().unwrap_or("");
        if asset.starts_with('/') || asset.split(['/', '\\']).any(|part| part == "..") {
            return wrong("asset_id", format!("is `{asset}`; it must be a path below assets/"));
        }
        let numbers = self.robot.exact_state_dims().unwrap_or(0);
        if self.family == Family::Pi0 && numbers > columns {
            let problem = format!(
                "has {numbers} numbers, of which pi0 reads `action_dim`, {columns}, at most"
            );
            return wrong("robot.state", problem);
        }
        Ok(())
    }

    /// A difference must not reach a robot as a target. openpi pads the state to the model's
    /// width, LeRobot adds it as it is.
    fn check_relative(&self) -> Result<(), String> {
        let Some(last) = self.absolute_mask.iter().rposition(|&relative| relative) else {
            return Ok(());
        };
        match self.robot.state_dims() {
            Some(dims) if last < dims => Ok(()),
            // The statistics say how long it is.
            None if self.processing == Processing::Openpi => Ok(()),
            Some(dims) => Err(format!(
                "makes action column {last} relative to the state, which has {dims} numbers; leave \
                 the column out (in a LeRobot checkpoint: name the columns in `action_names` and \
                 this one in `exclude_joints`)"
            )),
            None => {
                Err("makes actions relative to a state of unknown length; say `dims` of every \
                         key in robot.state"
                    .into())
            }
        }
    }
}

/// Expands openpi's mask notation: a positive n is n times true, a negative one n times false.
/// `[6, -1]` is six true and one false.
pub fn make_bool_mask(runs: &[i32]) -> Vec<bool> {
    runs.iter()
        .flat_map(|&run| std::iter::repeat_n(run > 0, run.unsigned_abs().min(4096) as usize))
        .collect()
}

/// A configuration that can't be had.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// No configuration of that name.
    #[error(
        "there is no policy `{name}`; {near}all names: {all}; a robot of your own is a TOML file \
         (examples/so101.toml shows one)"
    )]
    Unknown {
        /// The name asked for.
        name: String,
        /// "did you mean …; ", or nothing.
        near: String,
        /// Every name, comma separated.
        all: String,
    },
    /// openpi has it, but nobody can serve it.
    #[error("policy `{name}` can't be served: {reason}")]
    Unserved {
        /// The name asked for.
        name: String,
        /// Why, and what to use instead.
        reason: &'static str,
    },
    /// Not an environment of openpi's server.
    #[error("there is no environment `{0}`; openpi's are ALOHA, ALOHA_SIM, DROID and LIBERO")]
    Environment(String),
    /// A field has a value that can't work.
    #[error("policy `{name}`: `{field}` {problem}")]
    Field {
        /// Name of the configuration.
        name: String,
        /// The field.
        field: &'static str,
        /// What is wrong and what is allowed.
        problem: String,
    },
    /// The TOML text can't be read.
    #[error("the policy's TOML can't be read: {0}")]
    Toml(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shipped_policy_passes_its_own_check() {
        assert_eq!(names().count(), 17);
        for name in names() {
            let config = named(name).unwrap();
            config.check().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(config.name, name);
        }
    }

    #[test]
    fn check_names_the_field() {
        let mut config = named("pi0_droid").unwrap();
        config.action_dim = 7;
        assert!(config.check().unwrap_err().to_string().contains("robot.output_dims"));
        let mut config = named("pi0_droid").unwrap();
        config.discrete_state = true;
        assert!(config.check().unwrap_err().to_string().contains("discrete_state"));
        let mut config = named("pi0_droid").unwrap();
        config.asset_id = Some("a/../../b".into());
        assert!(config.check().unwrap_err().to_string().contains("asset_id"));
        let mut config = named("pi0_droid").unwrap();
        config.horizon = 0;
        assert!(config.check().unwrap_err().to_string().contains("horizon"));
    }

    /// What no program can be made for is refused when it is read, not at the first request.
    #[test]
    fn sizes_end_where_the_models_do() {
        let shape = |horizon, prompt_tokens, steps| {
            let rtc = pirouette_model::Rtc::Off;
            Shape { batch: 1, cameras: 1, prompt_tokens, horizon, steps, rtc }.check().is_ok()
        };
        for (horizon, tokens, steps) in
            [(1024, 4096, 1000), (1025, 48, 10), (50, 4097, 10), (50, 48, 1001)]
        {
            let mut config = named("pi0_droid").unwrap();
            (config.horizon, config.max_token_len, config.steps) = (horizon, tokens, steps);
            assert_eq!(config.check().is_ok(), shape(horizon, tokens, steps), "{config:?}");
        }
    }
}
