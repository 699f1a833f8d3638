//! LeRobot's `config.json`, `policy_preprocessor.json`, `policy_postprocessor.json` and their
//! statistics → plain structs.

use std::collections::BTreeMap;
use std::path::Path;

use pirouette_model::{Family, Tensor};
use serde_json::{Map, Value};

use crate::error::{CheckpointError, Malformed};
use crate::safetensors::{Stored, TensorFiles};
use crate::{json_file, present};

/// Most steps of a processor and most features of a policy.
const MAX_ITEMS: usize = 1000;

/// `eps` of a step that names none.
const EPS: f64 = 1e-8;

const BEFORE: &str = "policy_preprocessor.json";
const AFTER: &str = "policy_postprocessor.json";

/// The step that makes actions relative, and its name in LeRobot 0.5, which has it in every
/// checkpoint.
const RELATIVE: &str = "relative_actions_processor";
const RELATIVE_BEFORE_0_6: &str = "delta_actions_processor";

/// What a feature holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureKind {
    /// A camera, shape [3, height, width].
    Visual,
    /// The robot's state.
    State,
    /// The simulator's state.
    Env,
    /// Actions.
    Action,
}

impl FeatureKind {
    /// LeRobot's spelling, also the key of a norm map.
    pub fn name(self) -> &'static str {
        match self {
            FeatureKind::Visual => "VISUAL",
            FeatureKind::State => "STATE",
            FeatureKind::Env => "ENV",
            FeatureKind::Action => "ACTION",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Visual, Self::State, Self::Env, Self::Action].into_iter().find(|k| k.name() == text)
    }
}

/// How a kind of feature is normalised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NormMode {
    /// Passed through.
    Identity,
    /// By mean and std.
    MeanStd,
    /// By min and max.
    MinMax,
    /// By q01 and q99.
    Quantiles,
    /// By q10 and q90.
    Quantile10,
}

impl NormMode {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "IDENTITY" => Self::Identity,
            "MEAN_STD" => Self::MeanStd,
            "MIN_MAX" => Self::MinMax,
            "QUANTILES" => Self::Quantiles,
            "QUANTILE10" => Self::Quantile10,
            _ => return None,
        })
    }
}

/// A named input or output of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// `observation.images.top`, `observation.state`, `action`, ….
    pub name: String,
    /// What it holds.
    pub kind: FeatureKind,
    /// Its shape, channels first for cameras.
    pub shape: Vec<usize>,
}

/// A (un)normaliser step: the last of its kind in a processor.
#[derive(Clone, Debug, PartialEq)]
pub struct Normaliser {
    /// Added to denominators.
    pub eps: f64,
    /// Observations it covers; `None`: it lists none, and covers all. Actions are not looked up.
    pub features: Option<Vec<Feature>>,
    /// Those of them that are normalised, if not all.
    pub observation_keys: Option<Vec<String>>,
    /// Mode per kind of feature; a kind that is absent is passed through. Where there is no
    /// processor file, `config.json`'s.
    pub norm_map: Vec<(FeatureKind, NormMode)>,
    /// Feature → statistic (`mean`, `q01`, …) → values. A feature without an entry is passed
    /// through.
    pub stats: BTreeMap<String, BTreeMap<String, Vec<f32>>>,
}

impl Default for Normaliser {
    fn default() -> Self {
        Normaliser {
            eps: EPS,
            features: None,
            observation_keys: None,
            norm_map: vec![],
            stats: BTreeMap::new(),
        }
    }
}

impl Normaliser {
    /// What is done to an observation, which the step may know as another kind than `config.json`.
    pub fn observation_mode(&self, observation: &Feature) -> NormMode {
        let name = &observation.name;
        let kind = match &self.features {
            None => Some(observation.kind),
            Some(list) => list.iter().find(|f| f.name == *name).map(|f| f.kind),
        };
        let chosen = self.observation_keys.as_ref().is_none_or(|keys| keys.contains(name));
        // As an action of the step's own it would be passed by.
        let kind = kind.filter(|&kind| chosen && kind != FeatureKind::Action);
        kind.map_or(NormMode::Identity, |kind| self.mode(kind))
    }

    /// What is done to actions, whether or not the step lists them.
    pub fn action_mode(&self) -> NormMode {
        self.mode(FeatureKind::Action)
    }

    fn mode(&self, kind: FeatureKind) -> NormMode {
        let found = self.norm_map.iter().find(|(known, _)| *known == kind);
        found.map_or(NormMode::Identity, |(_, mode)| *mode)
    }
}

/// One step of a processor.
#[derive(Clone, Debug, PartialEq)]
pub struct ProcessorStep {
    /// `registry_name`, as LeRobot calls the step today, or the class of an unregistered one.
    pub name: String,
    /// Its `config` object.
    pub config: Map<String, Value>,
    /// Its statistics file.
    pub state_file: Option<String>,
}

/// Actions that are relative to the state of the observation they answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelativeActions {
    /// Parts of the names of those that are absolute all the same.
    pub exclude_joints: Vec<String>,
    /// Names of the action's elements; without them all are relative.
    pub action_names: Option<Vec<String>>,
}

/// Everything a LeRobot checkpoint says besides the weights. LeRobot makes its processors from
/// their files without a look at `config.json`: where there is a file, the file counts.
#[derive(Clone, Debug, PartialEq)]
pub struct LeRobot {
    /// From `type`.
    pub family: Family,
    /// Inputs in the order of the file, which is the order of the cameras.
    pub input_features: Vec<Feature>,
    /// Outputs.
    pub output_features: Vec<Feature>,
    /// Actions per chunk (H).
    pub chunk_size: usize,
    /// Actions of a chunk that are executed.
    pub n_action_steps: usize,
    /// Width the state is padded to.
    pub max_state_dim: usize,
    /// Width the actions are padded to.
    pub max_action_dim: usize,
    /// Euler steps.
    pub num_inference_steps: usize,
    /// Shortest and longest period of the time embedding.
    pub periods: (f64, f64),
    /// Height and width of the model's images.
    pub image_resolution: (usize, usize),
    /// Cameras to be added that are always masked.
    pub empty_cameras: usize,
    /// Prompt length L: the tokenizer step's, or `config.json`'s if there is none.
    pub tokenizer_max_length: usize,
    /// Which actions are relative, if any.
    pub relative_actions: Option<RelativeActions>,
    /// Old key → new key, applied to observations.
    pub rename_map: Vec<(String, String)>,
    /// Name or folder of the tokenizer.
    pub tokenizer_name: Option<String>,
    /// Mode per kind of feature as in `config.json`; the processor's own map is the one applied.
    pub normalization_mapping: Vec<(FeatureKind, NormMode)>,
    /// Most leading actions a π0.5 model was trained to take as given; 0: it was not.
    pub rtc_training_max_delay: usize,
    /// The whole `rtc_config`, if not null.
    pub rtc: Option<Value>,
    /// Steps before the model; none where there is no file.
    pub preprocessor: Vec<ProcessorStep>,
    /// Steps after it. Where one of the two has none, numbers are normalised on one side alone:
    /// for whoever runs the policy to refuse.
    pub postprocessor: Vec<ProcessorStep>,
    /// The normaliser of the inputs.
    pub input_stats: Normaliser,
    /// The unnormaliser of the actions.
    pub output_stats: Normaliser,
}

impl LeRobot {
    /// Camera keys in the order in which the model gets them.
    pub fn cameras(&self) -> impl Iterator<Item = &str> {
        self.input_features.iter().filter(|f| f.kind == FeatureKind::Visual).map(|f| &*f.name)
    }

    /// Reads everything beside the weights in `root`; `config` is its parsed `config.json`.
    pub fn read(root: &Path, config: &Value) -> Result<Self, CheckpointError> {
        let path = root.join("config.json");
        let family = family(config, &path)?;
        let fields = Fields { json: config };
        let damaged = |e: Malformed| e.at(&path);
        let pre = steps(root, BEFORE)?;
        let post = steps(root, AFTER)?;
        let tokenizer = step(&pre, "tokenizer_processor");
        let rename = step(&pre, "rename_observations_processor")
            .and_then(|s| s.config.get("rename_map")?.as_object());
        let tokenizer_settings = settings(tokenizer);
        let default_tokens = if family == Family::Pi0 { 48 } else { 200 };
        let tokens = fields.size("tokenizer_max_length", default_tokens).map_err(damaged)?;
        let tokens = Fields { json: &tokenizer_settings }.size("max_length", tokens);
        let tokens = tokens.map_err(|e| e.within("step `tokenizer_processor`"));
        let tokenizer_max_length = tokens.map_err(|e| e.at(root.join(BEFORE)))?;
        let relative_actions = relative_actions(root, &fields, &pre, &post)?;
        let build = || -> Result<LeRobot, Malformed> {
            Ok(LeRobot {
                family,
                input_features: features(&config["input_features"], "input_features")?,
                output_features: features(&config["output_features"], "output_features")?,
                chunk_size: fields.size("chunk_size", 50)?,
                n_action_steps: fields.size("n_action_steps", 50)?,
                max_state_dim: fields.size("max_state_dim", 32)?,
                max_action_dim: fields.size("max_action_dim", 32)?,
                num_inference_steps: fields.size("num_inference_steps", 10)?,
                periods: (fields.float("min_period", 0.004)?, fields.float("max_period", 4.0)?),
                image_resolution: fields.resolution()?,
                empty_cameras: fields.size("empty_cameras", 0)?,
                tokenizer_max_length,
                relative_actions,
                rename_map: rename
                    .into_iter()
                    .flatten()
                    .filter_map(|(from, to)| Some((from.clone(), to.as_str()?.to_string())))
                    .collect(),
                tokenizer_name: tokenizer
                    .and_then(|s| s.config.get("tokenizer_name")?.as_str())
                    .map(String::from),
                normalization_mapping: norm_map(&config["normalization_mapping"])?,
                rtc_training_max_delay: match family {
                    Family::Pi0 => 0,
                    Family::Pi05 => fields.size("rtc_training_max_delay", 0)?,
                },
                rtc: Some(config["rtc_config"].clone()).filter(|v| !v.is_null()),
                preprocessor: vec![],
                postprocessor: vec![],
                input_stats: Normaliser::default(),
                output_stats: Normaliser::default(),
            })
        };
        let mut policy = build().map_err(damaged)?;
        let mapping = &policy.normalization_mapping;
        policy.input_stats = normaliser(root, BEFORE, &pre, mapping)?;
        policy.output_stats = normaliser(root, AFTER, &post, mapping)?;
        policy.preprocessor = pre;
        policy.postprocessor = post;
        Ok(policy)
    }
}

/// The family, or why a policy of this kind can't be run.
fn family(config: &Value, path: &Path) -> Result<Family, CheckpointError> {
    let refuse = |what: String| Err(CheckpointError::Unsupported { path: path.into(), what });
    for (flag, what) in [
        ("use_peft", "PEFT adapters; merge them into the weights and save again"),
        ("use_visual_memory", "visual memory, which is not implemented"),
        ("use_proprioceptive_memory", "proprioceptive memory, which is not implemented"),
    ] {
        if config[flag] == true {
            return refuse(format!("the policy uses {what}"));
        }
    }
    match config["type"].as_str() {
        Some("pi0") => Ok(Family::Pi0),
        Some("pi05") => Ok(Family::Pi05),
        _ => refuse(format!("policy type {} is not pi0 or pi05", config["type"])),
    }
}

struct Fields<'a> {
    json: &'a Value,
}

impl Fields<'_> {
    fn get<T>(&self, key: &str, default: T, read: fn(&Value) -> Option<T>) -> Result<T, Malformed> {
        match &self.json[key] {
            Value::Null => Ok(default),
            v => read(v).ok_or_else(|| Malformed::new(format!("`{key}` is {v}"))),
        }
    }

    fn size(&self, key: &str, default: usize) -> Result<usize, Malformed> {
        self.get(key, default, |v| v.as_u64().filter(|&n| n <= 1 << 20).map(|n| n as usize))
    }

    fn float(&self, key: &str, default: f64) -> Result<f64, Malformed> {
        self.get(key, default, Value::as_f64)
    }

    fn resolution(&self) -> Result<(usize, usize), Malformed> {
        self.get("image_resolution", (224, 224), |v| match &sizes(v)?[..] {
            &[height, width] => Some((height, width)),
            _ => None,
        })
    }

    fn strings(&self, key: &str) -> Result<Option<Vec<String>>, Malformed> {
        self.get(key, None, |v| {
            let list = v.as_array()?.iter().map(|s| s.as_str().map(String::from));
            list.collect::<Option<Vec<_>>>().map(Some)
        })
    }
}

fn sizes(v: &Value) -> Option<Vec<usize>> {
    v.as_array()?.iter().map(|n| n.as_u64().filter(|&n| n <= 1 << 20).map(|n| n as usize)).collect()
}

fn features(json: &Value, what: &str) -> Result<Vec<Feature>, Malformed> {
    let bad = |what: String| Malformed::new(what);
    let map = match json {
        Value::Null => return Ok(vec![]),
        v => v.as_object().filter(|m| m.len() <= MAX_ITEMS),
    }
    .ok_or_else(|| bad(format!("`{what}` is not a map of features")))?;
    map.iter()
        .map(|(name, v)| {
            let kind = v["type"].as_str().and_then(FeatureKind::parse);
            let kind =
                kind.ok_or_else(|| bad(format!("feature `{name}` has type {}", v["type"])))?;
            let shape = sizes(&v["shape"]);
            let shape =
                shape.ok_or_else(|| bad(format!("feature `{name}` has shape {}", v["shape"])))?;
            Ok(Feature { name: name.clone(), kind, shape })
        })
        .collect()
}

fn norm_map(json: &Value) -> Result<Vec<(FeatureKind, NormMode)>, Malformed> {
    json.as_object()
        .into_iter()
        .flatten()
        .map(|(kind, mode)| {
            FeatureKind::parse(kind)
                .zip(mode.as_str().and_then(NormMode::parse))
                .ok_or_else(|| Malformed::new(format!("normalisation of {kind} is {mode}")))
        })
        .collect()
}

/// The steps of a processor file; none if the file is absent (old base checkpoints).
fn steps(root: &Path, file: &str) -> Result<Vec<ProcessorStep>, CheckpointError> {
    let path = root.join(file);
    if !present(&path)? {
        return Ok(vec![]);
    }
    let json = json_file(&path)?;
    let list = json["steps"].as_array().filter(|l| l.len() <= MAX_ITEMS);
    let list = list.ok_or_else(|| Malformed::new("no list of `steps`").at(&path))?;
    list.iter()
        .map(|v| {
            let name = v["registry_name"].as_str().or(v["class"].as_str());
            let name = name.ok_or_else(|| {
                Malformed::new("a step has neither `registry_name` nor `class`").at(&path)
            })?;
            let name = if name == RELATIVE_BEFORE_0_6 { RELATIVE } else { name };
            let state_file = v["state_file"].as_str().map(String::from);
            if let Some(state) = &state_file
                && state.contains(['/', '\\'])
            {
                let what = format!("state file `{state}` is no plain file name");
                return Err(Malformed::new(what).at(&path));
            }
            let config = v["config"].as_object().cloned().unwrap_or_default();
            Ok(ProcessorStep { name: name.into(), config, state_file })
        })
        .collect()
}

fn step<'a>(steps: &'a [ProcessorStep], name: &str) -> Option<&'a ProcessorStep> {
    steps.iter().rfind(|s| s.name == name)
}

/// Its `config` object; null without the step.
fn settings(step: Option<&ProcessorStep>) -> Value {
    step.map_or(Value::Null, |step| Value::Object(step.config.clone()))
}

/// Whether the step after the model adds the state, and what the step before it, from which it has
/// the state, says of the elements.
fn relative_actions(
    root: &Path,
    config: &Fields<'_>,
    pre: &[ProcessorStep],
    post: &[ProcessorStep],
) -> Result<Option<RelativeActions>, CheckpointError> {
    let read = |fields: &Fields<'_>, joints: &str, names: &str| {
        Ok((fields.strings(joints)?, fields.strings(names)?))
    };
    if post.is_empty() {
        if config.json["use_relative_actions"] != true {
            return Ok(None);
        }
        let found = read(config, "relative_exclude_joints", "action_feature_names");
        let (joints, action_names) =
            found.map_err(|e: Malformed| e.at(root.join("config.json")))?;
        let exclude_joints = joints.unwrap_or_else(|| vec!["gripper".into()]);
        return Ok(Some(RelativeActions { exclude_joints, action_names }));
    }
    let enabled = settings(step(post, "absolute_actions_processor"))["enabled"] == true;
    // Without any step before the model nothing of this is run.
    if !enabled || pre.is_empty() {
        return Ok(None);
    }
    let path = root.join(BEFORE);
    let Some(relative) = step(pre, RELATIVE) else {
        let what = format!(
            "it has no {RELATIVE}, from which the absolute_actions_processor in {AFTER} has the \
             state: save the policy again with both"
        );
        return Err(CheckpointError::Unsupported { path, what });
    };
    let relative = settings(Some(relative));
    let found = read(&Fields { json: &relative }, "exclude_joints", "action_names");
    let found = found.map_err(|e| e.within(&format!("step `{RELATIVE}`")));
    let (joints, action_names) = found.map_err(|e| e.at(path))?;
    Ok(Some(RelativeActions { exclude_joints: joints.unwrap_or_default(), action_names }))
}

fn normaliser(
    root: &Path,
    file: &str,
    steps: &[ProcessorStep],
    mapping: &[(FeatureKind, NormMode)],
) -> Result<Normaliser, CheckpointError> {
    let name = if file == BEFORE { "normalizer_processor" } else { "unnormalizer_processor" };
    let Some(step) = step(steps, name) else {
        let norm_map = if steps.is_empty() { mapping.to_vec() } else { vec![] };
        return Ok(Normaliser { norm_map, ..Normaliser::default() });
    };
    let settings = settings(Some(step));
    let fields = Fields { json: &settings };
    let at = |e: Malformed| e.within(&format!("step `{name}`")).at(root.join(file));
    let listed = match &settings["features"] {
        Value::Null => None,
        list => Some(features(list, "features").map_err(at)?),
    };
    Ok(Normaliser {
        eps: fields.float("eps", EPS).map_err(at)?,
        features: listed,
        observation_keys: fields.strings("normalize_observation_keys").map_err(at)?,
        norm_map: norm_map(&settings["norm_map"]).map_err(at)?,
        stats: match &step.state_file {
            Some(file) => statistics(&root.join(file))?,
            None => BTreeMap::new(),
        },
    })
}

/// `<feature>.<stat>` tensors, split at the last dot. Integer counts are left out.
fn statistics(
    path: &Path,
) -> Result<BTreeMap<String, BTreeMap<String, Vec<f32>>>, CheckpointError> {
    let files = TensorFiles::open(path)?;
    let mut out: BTreeMap<String, BTreeMap<String, Vec<f32>>> = BTreeMap::new();
    for entry in files.entries() {
        let Some((feature, stat)) = entry.name.rsplit_once('.') else {
            let what = format!("`{}` is not named <feature>.<statistic>", entry.name);
            return Err(Malformed::new(what).at(path));
        };
        let values = match &entry.stored {
            Stored::Float(dtype) => {
                let data = files.bytes(&entry.name)?.unwrap_or_default().into();
                Tensor { shape: entry.shape.clone(), dtype: *dtype, data }.to_f32()
            }
            Stored::Other(_) if stat == "count" => continue,
            Stored::Other(found) => {
                let what = format!("`{}` has type {found}, expected F32", entry.name);
                return Err(Malformed::new(what).at(path));
            }
        };
        out.entry(feature.into()).or_default().insert(stat.into(), values);
    }
    Ok(out)
}
