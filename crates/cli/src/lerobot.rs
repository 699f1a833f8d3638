//! A LeRobot checkpoint's own description → a policy configuration and statistics.

use std::path::Path;

use anyhow::{Result, bail};
use pirouette_checkpoint::lerobot::{Feature, FeatureKind, LeRobot, NormMode as Stored};
use pirouette_policy::image::Layout;
use pirouette_policy::norm::NormMode;
use pirouette_policy::robots::{Camera, GenericRobot, Robot, StateKey};
use pirouette_policy::{NormStats, PolicyConfig, Processing};

/// Steps of LeRobot's own π0 and π0.5 processors: what [`Processing::Lerobot`] does.
const BEFORE: [&str; 8] = [
    "rename_observations_processor",
    "to_batch_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "tokenizer_processor",
    "device_processor",
    "relative_actions_processor",
    "normalizer_processor",
];
const AFTER: [&str; 3] =
    ["unnormalizer_processor", "absolute_actions_processor", "device_processor"];

/// The configuration: cameras in the file's order, one state vector, `task` as the prompt.
pub fn policy_config(l: &LeRobot) -> Result<PolicyConfig> {
    check_steps(l)?;
    let of = |kind: FeatureKind| -> Vec<&Feature> {
        l.input_features.iter().filter(|f| f.kind == kind).collect()
    };
    // Those that LeRobot adds itself no robot has: always masked, which is to leave them out.
    let mut cameras = of(FeatureKind::Visual);
    cameras.retain(|f| !f.name.starts_with("observation.images.empty_camera_"));
    let count = cameras.len();
    if count > 3 {
        bail!("config.json names {count} cameras: at most 3 are supported, beside empty ones");
    }
    let cameras = cameras
        .into_iter()
        .map(|f| Camera {
            slot: None,
            key: renamed(l, &f.name),
            // One at least, whichever it is.
            required: count == 1,
            layout: Layout::Auto,
            size: size(f),
        })
        .collect();
    let Some(state) = of(FeatureKind::State).first().copied() else {
        bail!("config.json names no STATE feature");
    };
    let Some(action) = l.output_features.iter().find(|f| f.kind == FeatureKind::Action) else {
        bail!("config.json names no ACTION feature");
    };
    let dims = action.shape.first().copied().unwrap_or(0);
    Ok(PolicyConfig {
        name: "lerobot".into(),
        family: l.family,
        horizon: l.chunk_size,
        max_token_len: l.tokenizer_max_length,
        action_dim: l.max_action_dim,
        action_dim_said: false,
        steps: l.num_inference_steps,
        asset_id: None,
        state_norm: norm_mode(l.input_stats.observation_mode(state)),
        action_norm: norm_mode(l.output_stats.action_mode()),
        robot: Robot::Generic(GenericRobot {
            cameras,
            state: vec![StateKey { key: renamed(l, &state.name), dims: state_dims(l, state) }],
            output_dims: dims,
            prompt_key: "task".into(),
            state_units: "as recorded in the dataset".into(),
            action_units: "as recorded in the dataset".into(),
        }),
        absolute_mask: absolute_mask(l, dims),
        discrete_state: l.family == pirouette_model::Family::Pi05,
        default_prompt: None,
        metadata: vec![],
        processing: Processing::Lerobot,
    })
}

/// Numbers of the robot's state. LeRobot does not look at the shape in `config.json`: a checkpoint
/// that was fine-tuned from a base may have the base's, which is the model's width, beside its own
/// statistics.
fn state_dims(l: &LeRobot, state: &Feature) -> Option<usize> {
    let normalised = l.input_stats.observation_mode(state) != Stored::Identity;
    let statistics = l.input_stats.stats.get(&state.name).filter(|_| normalised);
    let covered = statistics.and_then(|s| s.values().next()).map(Vec::len);
    let of_robot = state.shape.first().copied().filter(|&dims| dims != l.max_state_dim);
    covered.filter(|_| of_robot.is_none()).or(of_robot)
}

/// Height and width of a camera's images in training, if they are plausible.
fn size(camera: &Feature) -> Option<(usize, usize)> {
    match camera.shape[..] {
        [3, height @ 1..=4096, width @ 1..=4096] => Some((height, width)),
        _ => None,
    }
}

/// The key a robot sends for a feature: the rename map read backwards.
fn renamed(l: &LeRobot, feature: &str) -> String {
    let from = l.rename_map.iter().find(|(_, to)| to == feature);
    from.map_or_else(|| feature.to_string(), |(from, _)| from.clone())
}

fn norm_mode(stored: Stored) -> NormMode {
    match stored {
        Stored::Identity => NormMode::Identity,
        Stored::MeanStd => NormMode::MeanStd,
        Stored::MinMax => NormMode::MinMax,
        Stored::Quantiles => NormMode::Quantiles,
        Stored::Quantile10 => NormMode::Quantile10,
    }
}

/// Statistics of one processor without those of the other are worse than none.
fn check_sides(l: &LeRobot) -> Result<()> {
    if l.preprocessor.is_empty() != l.postprocessor.is_empty() {
        bail!(
            "one of policy_preprocessor.json and policy_postprocessor.json has no steps or is \
             missing: numbers would be normalised on one side alone; copy both beside config.json"
        );
    }
    Ok(())
}

/// Refuses what a robot would feel and nothing here does: a step of somebody's own, normalised
/// images, a prompt from elsewhere.
fn check_steps(l: &LeRobot) -> Result<()> {
    check_sides(l)?;
    for (file, steps, known) in [
        ("policy_preprocessor.json", &l.preprocessor, &BEFORE[..]),
        ("policy_postprocessor.json", &l.postprocessor, &AFTER[..]),
    ] {
        if let Some(step) = steps.iter().find(|step| !known.contains(&step.name.as_str())) {
            bail!(
                "{file} has a step `{}`, which is none of LeRobot's own for π0 and π0.5 and is \
                 not implemented: describe what the robot sends and gets in a TOML file instead \
                 (--config FILE.toml)",
                step.name
            );
        }
    }
    for camera in l.input_features.iter().filter(|f| f.kind == FeatureKind::Visual) {
        let (name, mode) = (&camera.name, l.input_stats.observation_mode(camera));
        if mode != Stored::Identity && l.input_stats.stats.contains_key(name) {
            bail!("normalizer_processor: `{name}` is normalised ({mode:?}): not supported");
        }
    }
    let tokenizer = l.preprocessor.iter().rfind(|step| step.name == "tokenizer_processor");
    for (key, own) in [("task_key", "task"), ("padding_side", "right")] {
        if let Some(found) = tokenizer.and_then(|step| step.config.get(key)).filter(|v| *v != own) {
            bail!(
                "tokenizer_processor: `{key}` is {found}, only LeRobot's own \"{own}\" is supported"
            );
        }
    }
    Ok(())
}

/// Relative actions: all columns, except those whose name contains an excluded joint.
fn absolute_mask(l: &LeRobot, dims: usize) -> Vec<bool> {
    let Some(relative) = &l.relative_actions else { return vec![] };
    let joints: Vec<String> = relative.exclude_joints.iter().map(|j| j.to_lowercase()).collect();
    let excluded = |name: &String| {
        let name = name.to_lowercase();
        joints.iter().any(|joint| !joint.is_empty() && name.contains(joint))
    };
    let names = relative.action_names.iter().flatten();
    let mut mask: Vec<bool> = names.take(dims).map(|name| !excluded(name)).collect();
    mask.resize(dims, true);
    mask
}

/// Where they lie, for messages: the files in the checkpoint's folder that the two steps name.
pub fn statistics_origin(l: &LeRobot, root: &Path) -> String {
    let steps = l.preprocessor.iter().chain(&l.postprocessor);
    let steps =
        steps.filter(|s| ["normalizer_processor", "unnormalizer_processor"].contains(&&*s.name));
    let mut files: Vec<&str> = steps.filter_map(|step| step.state_file.as_deref()).collect();
    files.dedup();
    let folder = root.display();
    if files.is_empty() { folder.to_string() } else { format!("{folder} ({})", files.join(", ")) }
}

/// The processors' statistics under the policy's names.
pub fn statistics(l: &LeRobot) -> Result<NormStats> {
    check_sides(l)?;
    let tensors = |stats: &pirouette_checkpoint::lerobot::Normaliser, feature: &'static str| {
        let found = stats.stats.get(feature).cloned().unwrap_or_default();
        found.into_iter().map(move |(name, values)| (format!("{feature}.{name}"), values))
    };
    let all: Vec<(String, Vec<f32>)> = tensors(&l.input_stats, "observation.state")
        .chain(tensors(&l.output_stats, "action"))
        .collect();
    Ok(NormStats::from_lerobot(all.iter().map(|(n, v)| (n.as_str(), v.clone())))?)
}
