//! What a policy takes and gives, as a card to print or serve, and observations made from it.

mod card;
mod samples;

use crate::config::{PolicyConfig, Processing};
use crate::image::Layout;
use crate::robots::Robot;
use crate::value::{NdArray, Value};
use pirouette_model::config::Family;
use serde::Serialize;

pub use samples::Samples;

/// Side of a sample's images: the one that needs no resizing.
const SAMPLE_SIDE: usize = 224;
/// Extent of a vector whose length nothing fixes.
const ANY_LENGTH: &str = "n";
/// Instruction of a sample for a policy without a prompt of its own.
const SAMPLE_PROMPT: &str = "do something";

/// The contract card of a policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Contract {
    /// Name of the configuration.
    pub policy: String,
    /// `pi0` or `pi05`.
    pub family: &'static str,
    /// `openpi` or `lerobot`.
    pub processing: &'static str,
    /// What a request holds.
    pub observation: Vec<Field>,
    /// What an answer holds.
    pub response: Vec<Field>,
    /// How the instruction becomes a prompt.
    pub prompt: PromptCard,
    /// How numbers are normalised.
    pub normalisation: NormalisationCard,
    /// Sizes of the model.
    pub model: ModelCard,
    /// Keys of the map sent when a client connects.
    pub metadata_keys: Vec<String>,
    /// Clients that send a request of this form.
    pub samples: Samples,
}

/// One value of a request or an answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Field {
    /// Keys from the outside in. A key may contain slashes; they do not nest.
    pub path: Vec<String>,
    /// What it is.
    pub kind: Kind,
    /// NumPy type.
    pub dtype: &'static str,
    /// Extents; names where any size will do.
    pub shape: Vec<String>,
    /// Whether a request without it is refused.
    pub required: bool,
    /// Meaning and units.
    pub meaning: String,
}

/// What a [`Field`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An RGB image.
    Image,
    /// Numbers.
    Numbers,
    /// Text.
    Text,
}

/// How the instruction becomes a prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PromptCard {
    /// The template.
    pub format: &'static str,
    /// Used when a request brings none.
    pub default: Option<String>,
    /// Most tokens; the head is kept.
    pub max_tokens: usize,
    /// Whether the state reaches the model at all.
    pub state_reaches_model: bool,
}

/// How numbers are normalised.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NormalisationCard {
    /// Mode of the state.
    pub state: &'static str,
    /// Numbers of the state that the statistics cover, once they are read.
    pub state_covered: Option<usize>,
    /// Mode of the actions.
    pub actions: &'static str,
    /// Columns of the actions that the statistics cover, once they are read.
    pub actions_covered: Option<usize>,
    /// Folder of the statistics below `assets/`.
    pub asset_id: Option<String>,
    /// Action columns to which the state is added.
    pub relative_columns: Vec<usize>,
}

/// Sizes of the model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelCard {
    /// Rows of a chunk.
    pub action_horizon: usize,
    /// Columns of the model's actions, before the robot's are cut out.
    pub action_dim: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Most cameras of a request.
    pub cameras: usize,
}

/// The contract card of a policy; [`crate::Policy::contract`] knows its statistics, too.
pub fn contract(config: &PolicyConfig) -> Contract {
    let text = |key: &str| Field {
        path: vec![key.into()],
        kind: Kind::Text,
        dtype: "str",
        shape: vec![],
        required: config.default_prompt.is_none(),
        meaning: "the instruction".into(),
    };
    let mut observation = observation_fields(&config.robot);
    observation.push(text(config.robot.prompt_key()));
    let timing = |outer: &str, inner: &str, meaning: &str| Field {
        path: vec![outer.into(), inner.into()],
        kind: Kind::Numbers,
        dtype: "float",
        shape: vec![],
        required: true,
        meaning: meaning.into(),
    };
    let lerobot = config.processing == Processing::Lerobot;
    let mut card = Contract {
        policy: config.name.clone(),
        family: config.family.name(),
        processing: if lerobot { "lerobot" } else { "openpi" },
        observation,
        response: vec![
            Field {
                path: vec!["actions".into()],
                kind: Kind::Numbers,
                dtype: "float64",
                shape: vec![config.horizon.to_string(), config.output_dims().to_string()],
                required: true,
                meaning: action_meaning(config),
            },
            timing("policy_timing", "infer_ms", "the model's share of the time"),
            timing("server_timing", "infer_ms", "the whole request"),
        ],
        prompt: PromptCard {
            format: match (config.discrete_state, lerobot) {
                (true, _) => "Task: {instruction}, State: {digits};\nAction: ",
                (false, false) => "{instruction}\n",
                (false, true) => "{instruction as it is}\n",
            },
            default: config.default_prompt.clone(),
            max_tokens: config.max_token_len,
            state_reaches_model: config.family == Family::Pi0 || config.discrete_state,
        },
        normalisation: NormalisationCard {
            state: config.state_norm.name(),
            state_covered: None,
            actions: config.action_norm.name(),
            actions_covered: None,
            asset_id: config.asset_id.clone(),
            relative_columns: (0..config.output_dims())
                .filter(|&column| config.absolute_mask.get(column) == Some(&true))
                .collect(),
        },
        model: ModelCard {
            action_horizon: config.horizon,
            action_dim: config.action_dim,
            steps: config.steps,
            cameras: config.robot.cameras(),
        },
        metadata_keys: config.metadata.iter().map(|(key, _)| key.clone()).collect(),
        samples: Samples { python: String::new(), cpp: String::new() },
    };
    card.samples = samples::samples(&card);
    card
}

/// [`Contract::sample`] of a policy whose statistics are not read. The same seed gives the same
/// one.
pub fn sample_observation(config: &PolicyConfig, seed: u64) -> Value {
    contract(config).sample(seed)
}

impl Contract {
    /// An observation that the policy accepts: random images of 224 × 224 pixels, a state of
    /// zeros, an instruction. The same seed gives the same one.
    pub fn sample(&self, seed: u64) -> Value {
        let mut random = SplitMix(seed);
        let mut root = Vec::new();
        for field in &self.observation {
            let shape = field.sample_shape();
            let count = shape.iter().product();
            let value = match field.kind {
                Kind::Image => NdArray::from_u8(shape, random.bytes(count)).map(Value::Array),
                Kind::Numbers => NdArray::from_f64(shape, &vec![0.0; count]).map(Value::Array),
                Kind::Text => {
                    let prompt = self.prompt.default.as_deref().unwrap_or(SAMPLE_PROMPT);
                    Some(Value::Str(prompt.into()))
                }
            };
            let Some(value) = value else { continue };
            insert(&mut root, &field.path, value);
        }
        Value::Map(root)
    }

    /// Where the statistics of the state are read and one key of it has any length, that length
    /// follows: the two must agree.
    pub(crate) fn measure_state(&mut self) {
        let Some(covered) = self.normalisation.state_covered else { return };
        let numbers = |field: &&mut Field| field.kind == Kind::Numbers;
        let state = self.observation.iter_mut().filter(numbers).flat_map(|f| &mut f.shape);
        let (mut free, fixed): (Vec<_>, Vec<_>) = state.partition(|e| *e == ANY_LENGTH);
        let fixed: usize = fixed.iter().filter_map(|extent| extent.parse::<usize>().ok()).sum();
        let ([free], Some(length)) = (&mut free[..], covered.checked_sub(fixed)) else { return };
        **free = length.to_string();
        self.samples = samples::samples(self);
    }
}

impl Field {
    /// Extents of a sample: where any size will do, the one that needs no resizing, and one number.
    fn sample_shape(&self) -> Vec<usize> {
        let any = if self.kind == Kind::Image { SAMPLE_SIDE } else { 1 };
        self.shape.iter().map(|extent| extent.parse().unwrap_or(any)).collect()
    }
}

fn insert(map: &mut Vec<(String, Value)>, path: &[String], value: Value) {
    match path {
        [] => {}
        [key] => map.push((key.clone(), value)),
        [key, inner @ ..] => {
            let known = map.iter().position(|(known, _)| known == key);
            let index = known.unwrap_or_else(|| {
                map.push((key.clone(), Value::Map(Vec::new())));
                map.len() - 1
            });
            if let Value::Map(nested) = &mut map[index].1 {
                insert(nested, inner, value);
            }
        }
    }
}

/// Cameras and state of a robot; the prompt is the same for all.
fn observation_fields(robot: &Robot) -> Vec<Field> {
    match robot {
        Robot::Aloha { .. } => {
            let camera = |key: &str, required, meaning| {
                image(&["images", key], Layout::Chw, required, meaning)
            };
            let meaning = "left six joints (rad), left gripper (0 closed to 1 open), then the \
                right arm's seven";
            vec![
                numbers("state", Some(14), meaning),
                camera("cam_high", true, "camera above the table"),
                camera("cam_left_wrist", false, "camera on the left wrist"),
                camera("cam_right_wrist", false, "camera on the right wrist"),
            ]
        }
        Robot::Droid => {
            let camera = |key, meaning| image(&[key], Layout::Auto, true, meaning);
            vec![
                camera("observation/exterior_image_1_left", "camera beside the robot"),
                camera("observation/wrist_image_left", "camera on the wrist"),
                numbers("observation/joint_position", Some(7), "joint angles (rad)"),
                numbers("observation/gripper_position", Some(1), "0 open to 1 closed"),
            ]
        }
        Robot::Libero => {
            let camera = |key, meaning| image(&[key], Layout::Auto, true, meaning);
            let meaning = "end effector: position (m, 3), orientation as axis times angle (rad, \
                3), the two fingers' positions (m, 2)";
            vec![
                camera("observation/image", "the scene, turned by 180° as in training"),
                camera("observation/wrist_image", "camera on the wrist, turned by 180°"),
                numbers("observation/state", Some(8), meaning),
            ]
        }
        Robot::Generic(robot) => {
            let cameras = robot.cameras.iter().enumerate().map(|(i, camera)| {
                let meaning = camera.slot.clone().unwrap_or_else(|| format!("camera {i}"));
                image(&[&camera.key], camera.layout, camera.required, &meaning)
            });
            let state =
                robot.state.iter().map(|key| numbers(&key.key, key.dims, &robot.state_units));
            cameras.chain(state).collect()
        }
    }
}

fn image(path: &[&str], layout: Layout, required: bool, meaning: &str) -> Field {
    let shape = match layout {
        Layout::Chw => ["3", "height", "width"],
        Layout::Hwc | Layout::Auto => ["height", "width", "3"],
    };
    Field {
        path: path.iter().map(|key| (*key).into()).collect(),
        kind: Kind::Image,
        dtype: "uint8",
        shape: shape.map(String::from).into(),
        required,
        meaning: meaning.into(),
    }
}

fn numbers(key: &str, dims: Option<usize>, meaning: &str) -> Field {
    Field {
        path: vec![key.into()],
        kind: Kind::Numbers,
        dtype: "float64",
        shape: vec![dims.map_or_else(|| ANY_LENGTH.into(), |dims| dims.to_string())],
        required: true,
        meaning: meaning.into(),
    }
}

fn action_meaning(config: &PolicyConfig) -> String {
    let joints = config.absolute_mask.iter().any(|&relative| relative);
    match &config.robot {
        Robot::Aloha { .. } => "targets: left six joints (rad), left gripper, then the right \
            arm's seven"
            .into(),
        Robot::Droid if joints => "seven joint targets (rad), gripper (0 open to 1 closed)".into(),
        Robot::Droid => "seven joint velocities, gripper (0 open to 1 closed)".into(),
        Robot::Libero => "end effector: motion (3), rotation (3), gripper (−1 open to 1 \
            closed)"
            .into(),
        Robot::Generic(robot) => robot.action_units.clone(),
    }
}

/// Steele, Lea and Flood's generator: enough for test images.
struct SplitMix(u64);

impl SplitMix {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            bytes.extend((z ^ z >> 31).to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{named, names};

    #[test]
    fn samples_fit_their_contract_and_repeat() {
        for name in names() {
            let config = named(name).unwrap();
            let sample = sample_observation(&config, 3);
            assert_eq!(sample, sample_observation(&config, 3));
            assert_ne!(sample, sample_observation(&config, 4));
            let input = config.robot.read(&sample, config.processing).unwrap();
            assert_eq!(input.cameras.len(), config.robot.cameras(), "{name}");
            assert_eq!(Some(input.state.len()), config.robot.state_dims());
        }
    }

    #[test]
    fn the_card_is_json() {
        let card = contract(&named("pi05_libero").unwrap());
        let json = serde_json::to_value(&card).unwrap();
        assert_eq!(json["response"][0]["shape"], serde_json::json!(["10", "7"]));
        assert_eq!(json["prompt"]["state_reaches_model"], false);
        assert_eq!(json["prompt"]["format"], "{instruction}\n");
        let card = contract(&named("pi0_aloha").unwrap());
        assert_eq!(card.normalisation.relative_columns.len(), 12);
        assert_eq!(card.observation[1].path, ["images", "cam_high"]);
        assert_eq!(card.metadata_keys, ["reset_pose"]);
    }
}
