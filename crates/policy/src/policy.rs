//! A policy's two sides: observation to model input, model output to robot actions.

use crate::ModelInput;
use crate::array::element_count;
use crate::config::{ConfigError, PolicyConfig, Processing};
use crate::contract::{Contract, contract};
use crate::error::PolicyError;
use crate::light::is_light;
use crate::norm::{NormError, NormMode, NormStats, Normalizer};
use crate::prompt::{PromptFormat, prompt_tokens};
use crate::robots::{RobotInput, broadcast_error};
use crate::tokenizer::Tokenizer;
use crate::value::{NdArray, Scalar, Value};
use pirouette_model::config::Family;
use std::sync::Arc;
use thiserror::Error;

/// Longest instruction accepted, in bytes. The model reads some hundred at most.
const MAX_PROMPT_BYTES: usize = 1 << 16;

/// One robot's policy without its model. Shared freely between connections.
#[derive(Clone, Debug)]
pub struct Policy {
    config: PolicyConfig,
    tokenizer: Arc<Tokenizer>,
    image_side: usize,
    state: Normalizer,
    actions: Normalizer,
}

/// One observation, ready for the model, with what its actions need afterwards.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// What the model gets.
    pub input: ModelInput,
    /// Prompt tokens that did not fit. Not zero deserves a warning: the model misses the end.
    pub dropped_tokens: usize,
    /// Normalised state in float64, zero-padded to the model's width (openpi's PyTorch path
    /// keeps it for the output side).
    pub state: Vec<f64>,
    /// State in the model's convention before normalisation; LeRobot adds it to the actions.
    raw_state: Vec<f64>,
}

/// A policy that can't be started.
#[derive(Debug, Error)]
pub enum SetupError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its statistics.
    #[error(transparent)]
    Norm(#[from] NormError),
    /// The model reads images of no size.
    #[error("a policy's images must be 1 to 4096 pixels wide, not {0}")]
    ImageSide(usize),
}

impl Policy {
    /// `image_side` is the model's image size (224). Empty statistics mean that numbers pass
    /// unchanged (random weights).
    pub fn new(
        config: PolicyConfig,
        stats: &NormStats,
        tokenizer: Arc<Tokenizer>,
        image_side: usize,
    ) -> Result<Policy, SetupError> {
        config.check()?;
        if !(1..=4096).contains(&image_side) {
            return Err(SetupError::ImageSide(image_side));
        }
        if let Some(other) = stats.features().find(|f| !["state", "actions"].contains(f)) {
            return Err(NormError::UnknownFeature(other.into()).into());
        }
        let normalizer = |feature: &str, mode, limit: Option<usize>| match stats.get(feature) {
            None => Ok(Normalizer::identity()),
            Some(stats) => {
                let norm = Normalizer::new(mode, feature, stats)?;
                match norm.covered() {
                    Some(len) if limit.is_some_and(|most| len > most) => Err(NormError::TooLong {
                        feature: feature.into(),
                        len,
                        action_dim: config.action_dim,
                    }),
                    _ => Ok(norm),
                }
            }
        };
        let state = normalizer("state", config.state_norm, longest_state(&config))?;
        let actions = normalizer("actions", config.action_norm, Some(config.action_dim))?;
        let robot = &config.robot;
        if config.processing == Processing::Lerobot {
            for (feature, covered, dims) in [
                ("state", state.covered(), robot.state_dims()),
                ("actions", actions.covered(), Some(robot.output_dims())),
            ] {
                if let (Some(len), Some(dims)) = (covered, dims)
                    && len != dims
                {
                    return Err(NormError::NotOneEach { feature, len, dims }.into());
                }
            }
        }
        if let (Some(len), Some(dims)) = (state.covered(), robot.exact_state_dims())
            && len < dims
        {
            return Err(NormError::TooShort { len, dims }.into());
        }
        state.check_finite("state", robot.state_dims().unwrap_or(usize::MAX))?;
        actions.check_finite("actions", robot.output_dims())?;
        Ok(Policy { config, tokenizer, image_side, state, actions })
    }

    /// What the statistics leave out, for people: openpi says nothing of it.
    pub fn warnings(&self) -> Vec<String> {
        let config = &self.config;
        let mut warnings = Vec::new();
        for (feature, norm, mode) in [
            ("state", &self.state, config.state_norm),
            ("actions", &self.actions, config.action_norm),
        ] {
            if mode != NormMode::Identity && norm.mode() == NormMode::Identity {
                warnings.push(format!(
                    "the statistics have no `{feature}`: not normalised, though {} is wanted",
                    mode.name()
                ));
            }
        }
        let wanted = config.output_dims();
        if let Some(len) = self.actions.covered().filter(|&len| len < wanted) {
            warnings.push(format!(
                "the statistics of `actions` cover {len} of the robot's {wanted} columns: the \
                 others leave as the model gives them"
            ));
        }
        if let (Some(len), Some(dims)) = (self.state.covered(), config.robot.state_dims())
            && len < dims
        {
            warnings.push(format!(
                "the statistics of `state` cover {len} numbers, {}'s state has {dims}: only \
                 requests of {len} are answered",
                config.robot.name()
            ));
        }
        warnings
    }

    /// The contract card, with what is done to the numbers by the statistics that were found.
    pub fn contract(&self) -> Contract {
        let mut card = contract(&self.config);
        let norm = &mut card.normalisation;
        (norm.state, norm.state_covered) = (self.state.mode().name(), self.state.covered());
        (norm.actions, norm.actions_covered) = (self.actions.mode().name(), self.actions.covered());
        card.measure_state();
        card
    }

    /// The configuration it was made from.
    pub fn config(&self) -> &PolicyConfig {
        &self.config
    }

    /// The tokenizer; its piece count must not exceed the rows of the model's embedding table.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Side of the model's images in pixels.
    pub fn image_side(&self) -> usize {
        self.image_side
    }

    /// Whether [`Policy::prepare`] takes microseconds: `observation` is short but for images that
    /// are as the model reads them.
    pub fn is_light(&self, observation: &Value) -> bool {
        is_light(observation, self.image_side)
    }

    /// Observation to model input: robot transform, normalise, resize, tokenise, pad.
    pub fn prepare(&self, observation: &Value) -> Result<Prepared, PolicyError> {
        let config = &self.config;
        let RobotInput { cameras, state: raw_state } =
            config.robot.read(observation, config.processing)?;
        let mut state = self.normalize(&raw_state)?;
        let images: Result<Vec<bytes::Bytes>, PolicyError> = cameras
            .iter()
            .map(|seen| seen.image.fit(&seen.key, self.image_side, config.processing))
            .collect();
        let images = images?;
        let instruction = self.instruction(observation)?;
        let format = match (config.processing, config.family, config.discrete_state) {
            (_, Family::Pi05, true) => PromptFormat::TaskAndState,
            (Processing::Lerobot, ..) => PromptFormat::Lerobot,
            _ => PromptFormat::Instruction,
        };
        let most = config.max_token_len;
        let tokens = prompt_tokens(&self.tokenizer, format, &instruction, &state, most);
        state.resize(config.action_dim, 0.0);
        let input = ModelInput {
            images,
            tokens: tokens.ids,
            state: state.iter().map(|&x| x as f32).collect(),
        };
        Ok(Prepared { input, dropped_tokens: tokens.dropped, state, raw_state })
    }

    /// Model output (`[horizon, action_dim]`, float32, row-major) to the robot's actions, a
    /// float64 array `[horizon, robot dims]`. NaN and infinities never leave.
    pub fn finish(&self, prepared: &Prepared, actions: &[f32]) -> Result<NdArray, PolicyError> {
        let (rows, columns) = (self.config.horizon, self.config.action_dim);
        if Some(actions.len()) != element_count(&[rows, columns]) {
            return Err(PolicyError::Output {
                message: format!("the model gave {} numbers", actions.len()),
                remedy: format!(
                    "this policy needs {rows} × {columns}; is it the right checkpoint?"
                ),
            });
        }
        let state = self.origin(prepared);
        let dims = self.config.output_dims();
        let mut out = Vec::with_capacity(rows * dims);
        for row in actions.chunks_exact(columns) {
            let mut row = match self.config.processing {
                Processing::Openpi => self.actions.unnormalize_f32(row),
                // LeRobot cuts the row to the robot's columns first; statistics cover just these.
                Processing::Lerobot => self.actions.unnormalize_f32(&row[..dims]),
            };
            for ((x, relative), origin) in
                row.iter_mut().zip(&self.config.absolute_mask).zip(&state)
            {
                if *relative {
                    *x = self.add(*x, *origin);
                }
            }
            out.extend(self.config.robot.write(&row));
        }
        if let Some(index) = out.iter().position(|x| !x.is_finite()) {
            return Err(PolicyError::Output {
                message: format!(
                    "action column {} of step {} is {}",
                    index % dims,
                    index / dims,
                    out[index]
                ),
                remedy: "nothing was sent to the robot; check weights and statistics".into(),
            });
        }
        NdArray::from_f64(vec![rows, dims], &out).ok_or_else(|| PolicyError::Output {
            message: format!("{} actions do not fill {rows} × {dims}", out.len()),
            remedy: "the robot's transform lost columns".into(),
        })
    }

    /// The robot's actions (`[rows, robot dims]`) as the model would have given them, without the
    /// columns no robot sees: the inverse of [`Policy::finish`]. What is left of an earlier chunk
    /// becomes relative to the state of `prepared`, the observation of now.
    pub fn model_actions(
        &self,
        prepared: &Prepared,
        actions: &[f64],
    ) -> Result<Vec<f32>, PolicyError> {
        let (dims, state) = (self.config.output_dims(), self.origin(prepared));
        let mut out = Vec::with_capacity(actions.len());
        for row in actions.chunks(dims) {
            let mut row = self.config.robot.read_action(row);
            for ((x, relative), origin) in
                row.iter_mut().zip(&self.config.absolute_mask).zip(&state)
            {
                if *relative {
                    *x = self.add(*x, -*origin);
                }
            }
            let normalized = self.actions.normalize(&row).ok_or_else(|| {
                let covered = self.actions.covered().unwrap_or(0);
                PolicyError::value(
                    format!("the robot has {dims} action columns, the statistics cover {covered}"),
                    "send the left-over in the model's space",
                )
            })?;
            out.extend(normalized.into_iter().map(|x| x as f32));
        }
        Ok(out)
    }

    /// What relative actions are relative to.
    fn origin(&self, prepared: &Prepared) -> Vec<f64> {
        match self.config.processing {
            Processing::Openpi => self.state.unnormalize(&prepared.state),
            Processing::Lerobot => prepared.raw_state.clone(),
        }
    }

    fn add(&self, x: f64, origin: f64) -> f64 {
        match self.config.processing {
            Processing::Openpi => x + origin,
            Processing::Lerobot => f64::from(x as f32 + origin as f32),
        }
    }

    /// The normalised state. openpi cuts longer statistics silently; here a state is only
    /// accepted if it is as long as the robot's kind says or as the statistics are.
    fn normalize(&self, raw: &[f64]) -> Result<Vec<f64>, PolicyError> {
        let robot = &self.config.robot;
        let covered = self.state.covered();
        let expected = || match covered {
            Some(len) => format!("{}; the statistics cover {len} numbers", robot.schema()),
            None => robot.schema(),
        };
        let normalized = self
            .state
            .normalize(raw)
            .ok_or_else(|| broadcast_error(&[raw.len()], &[covered.unwrap_or(0)], expected()))?;
        let known = [robot.state_dims(), covered];
        if known.iter().any(Option::is_some) && !known.contains(&Some(raw.len())) {
            return Err(PolicyError::value(
                format!("the state has {} numbers", raw.len()),
                expected(),
            ));
        }
        if let Some(most) = longest_state(&self.config).filter(|most| raw.len() > *most) {
            let n = raw.len();
            return Err(PolicyError::value(
                format!("the state has {n} numbers, the model reads {most}"),
                expected(),
            ));
        }
        if let Some(index) = normalized.iter().position(|&x| !(x as f32).is_finite()) {
            return Err(PolicyError::value(
                format!("state number {index} is {:e} after normalisation", normalized[index]),
                format!("it was {:e}; check the robot's units and the statistics", raw[index]),
            ));
        }
        Ok(normalized)
    }

    /// The request's instruction, else the configuration's.
    fn instruction(&self, observation: &Value) -> Result<String, PolicyError> {
        let key = self.config.robot.prompt_key();
        let required = || {
            PolicyError::value(
                "Prompt is required",
                format!("send '{key}' (a string), or start the server with --default-prompt"),
            )
        };
        let Some(value) = observation.get(key) else {
            return self.config.default_prompt.clone().ok_or_else(required);
        };
        let not_text = |kind: &str, attribute: &str| PolicyError::Attribute {
            message: format!("'{kind}' object has no attribute '{attribute}'"),
            remedy: format!("'{key}' must be a string"),
        };
        let bytes_allowed = matches!(self.config.robot, crate::robots::Robot::Droid);
        let text = match value {
            Value::Nil => return Err(required()),
            Value::Str(text) => text.clone(),
            Value::Bytes(bytes) if bytes_allowed => {
                String::from_utf8(bytes.to_vec()).map_err(|e| {
                    PolicyError::value(
                        format!("'{key}' is no UTF-8: {}", e.utf8_error()),
                        "send text, or its UTF-8 bytes",
                    )
                })?
            }
            Value::Scalar(Scalar::Unicode(_), inner) => match &**inner {
                Value::Str(text) => text.clone(),
                other => return Err(not_text(other.python_type(), "strip")),
            },
            Value::Array(array) => match array.to_text() {
                Some(text) => text,
                None if element_count(&array.shape) != Some(1) => {
                    return Err(PolicyError::value(
                        "can only convert an array of size 1 to a Python scalar",
                        format!("'{key}' must be one string"),
                    ));
                }
                None => return Err(not_text(item_type(array.dtype), "strip")),
            },
            Value::Scalar(dtype, _) => return Err(not_text(item_type(*dtype), "strip")),
            other => return Err(not_text(other.python_type(), "item")),
        };
        if text.len() > MAX_PROMPT_BYTES {
            return Err(PolicyError::value(
                format!("'{key}' is {} bytes long", text.len()),
                format!("an instruction may have {MAX_PROMPT_BYTES}; the model reads far less"),
            ));
        }
        Ok(text)
    }
}

/// Most numbers of a state, if they are limited: π0 reads them in the columns of its actions, π0.5
/// as text or not at all.
fn longest_state(config: &PolicyConfig) -> Option<usize> {
    match config.family {
        Family::Pi0 => Some(config.action_dim),
        Family::Pi05 => None,
    }
}

/// Python type of what `.item()` of an array gives.
fn item_type(dtype: Scalar) -> &'static str {
    match dtype {
        Scalar::Bool => "bool",
        Scalar::F16 | Scalar::F32 | Scalar::F64 => "float",
        Scalar::Unicode(_) => "str",
        Scalar::Bytes(_) => "bytes",
        _ => "int",
    }
}
