//! Flags and a checkpoint → the policy to serve: configuration, statistics, tokenizer.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Error, Result, bail};
use pirouette_checkpoint::lerobot::LeRobot;
use pirouette_checkpoint::{Checkpoint, NormStatsFile};
use pirouette_model::Config;
use pirouette_policy::config::{from_toml, named};
use pirouette_policy::norm::{LEROBOT_EPS, NormMode};
use pirouette_policy::tokenizer::find_tokenizer;
use pirouette_policy::{NormStats, Policy, PolicyConfig, SetupError, Tokenizer};

use crate::lerobot;

/// Which policy.
#[derive(clap::Args, Clone, Debug)]
pub struct ConfigArgs {
    /// A configuration's name or a TOML file (a LeRobot checkpoint describes itself). `serve` and
    /// `replay` also take openpi's `policy:checkpoint` and `policy:default`.
    #[arg(value_name = "CONFIG")]
    place: Option<String>,
    /// The same as a flag.
    #[arg(long = "config", value_name = "NAME|FILE.toml", conflicts_with = "place")]
    flag: Option<String>,
}

impl ConfigArgs {
    /// However it was given.
    pub fn name(&self) -> Option<&str> {
        self.place.as_deref().or(self.flag.as_deref())
    }
}

/// What a policy is set up from.
#[derive(clap::Args, Clone, Debug)]
pub struct PolicyArgs {
    /// SentencePiece file (default: looked for in the checkpoint, openpi's and Hugging Face's
    /// caches).
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// norm_stats.json, or a folder of assets (default: looked for in and beside the checkpoint).
    #[arg(long)]
    pub norm_stats: Option<PathBuf>,
    /// Prompt of requests that bring none; goes before the configuration's.
    #[arg(long, alias = "default_prompt")]
    pub default_prompt: Option<String>,
}

/// A shipped configuration by name, or a user's own from a `.toml` file.
pub fn policy_config(name: &str) -> Result<PolicyConfig> {
    if !name.ends_with(".toml") {
        return Ok(named(name)?);
    }
    let text = std::fs::read_to_string(name).with_context(|| format!("can't read {name}"))?;
    from_toml(&text).with_context(|| format!("policy {name}"))
}

/// The configuration to serve: the one named, or what a LeRobot checkpoint says of itself.
pub fn choose(name: Option<&str>, checkpoint: Option<&Checkpoint>) -> Result<PolicyConfig> {
    match (name, checkpoint.and_then(|c| c.lerobot.as_ref())) {
        (Some(name), _) => policy_config(name),
        (None, Some(lerobot)) => lerobot::policy_config(lerobot),
        (None, None) => bail!(
            "which policy? Give a configuration's name or a TOML file, for example \
             `pirouette serve pi05_droid --checkpoint DIR`"
        ),
    }
}

/// Sets the policy up for a model of these sizes. Warnings are for people.
pub fn policy(
    mut config: PolicyConfig,
    model: &Config,
    checkpoint: Option<&Checkpoint>,
    args: &PolicyArgs,
) -> Result<(Policy, Vec<String>)> {
    if config.family != model.family {
        bail!(
            "configuration {} is for {}, these weights are {}: choose the configuration the \
             checkpoint was trained with",
            config.name,
            config.family.name(),
            model.family.name()
        );
    }
    if let Some(lerobot) = checkpoint.and_then(|c| c.lerobot.as_ref()) {
        check_lerobot(lerobot)?;
    }
    let mut warnings = Vec::new();
    if config.action_dim != model.action_dim {
        let (said, width) = (config.action_dim, model.action_dim);
        match (config.action_dim_said, checkpoint) {
            (true, Some(_)) => bail!(
                "configuration {} says `action_dim = {said}`, these weights are {width} wide \
                 (`pirouette inspect`): name their checkpoint, or leave `action_dim` out; how many \
                 columns the robot receives is `output_dims`",
                config.name
            ),
            (true, None) => warnings
                .push(format!("random weights: {width} wide, not `action_dim = {said}` as said")),
            // The width belongs to the weights; what is not said assumes the released ones.
            (false, _) => {}
        }
        config.action_dim = width;
    }
    config.default_prompt = args.default_prompt.clone().or(config.default_prompt);
    let (stats, origin) = statistics(&config, checkpoint, args, &mut warnings)?.unzip();
    let stats = stats.unwrap_or_default();
    let tokenizer = tokenizer(checkpoint, args, model, &mut warnings)?;
    let policy = Policy::new(config, &stats, Arc::new(tokenizer), model.vision.image);
    let policy = policy.map_err(|error| match (error, &origin) {
        (SetupError::Norm(error), Some(origin)) => Error::new(error).context(origin.clone()),
        (error, _) => error.into(),
    })?;
    if origin.is_some() {
        warnings.extend(policy.warnings());
    }
    Ok((policy, warnings))
}

/// Them and where they lie; `None`, and why, where none are to be had.
fn statistics(
    config: &PolicyConfig,
    checkpoint: Option<&Checkpoint>,
    args: &PolicyArgs,
    warnings: &mut Vec<String>,
) -> Result<Option<(NormStats, String)>> {
    let parsed = |file: NormStatsFile| {
        let origin = file.path.display().to_string();
        let stats = NormStats::from_json(&file.bytes).with_context(|| origin.clone())?;
        Ok(Some((stats, origin)))
    };
    if let Some(path) = &args.norm_stats {
        return parsed(NormStatsFile::at(path, config.asset_id.as_deref())?);
    }
    let Some(checkpoint) = checkpoint else {
        warnings.push("random weights: states and actions are not normalised".into());
        return Ok(None);
    };
    if let Some(lerobot) = &checkpoint.lerobot {
        let origin = lerobot::statistics_origin(lerobot, &checkpoint.root);
        return Ok(Some((lerobot::statistics(lerobot)?, origin)));
    }
    let Some(asset_id) = &config.asset_id else {
        if [config.state_norm, config.action_norm] == [NormMode::Identity; 2] {
            return Ok(None);
        }
        let ids: Vec<String> = checkpoint.asset_ids()?.into_iter().map(|(id, _)| id).collect();
        bail!(
            "Asset id is required to load norm stats: {} names none; set `asset_id` (in this \
             checkpoint: {}), name the statistics with --norm-stats FILE, or say that nothing is \
             normalised (norm = \"identity\")",
            config.name,
            if ids.is_empty() { "none".into() } else { ids.join(", ") }
        );
    };
    parsed(checkpoint.norm_stats(asset_id)?)
}

fn tokenizer(
    checkpoint: Option<&Checkpoint>,
    args: &PolicyArgs,
    model: &Config,
    warnings: &mut Vec<String>,
) -> Result<Tokenizer> {
    let root = checkpoint.map(|c| c.root.as_path());
    let tokenizer = match find_tokenizer(args.tokenizer.as_deref(), root) {
        Ok(path) => Tokenizer::from_file(&path)?,
        Err(_) if checkpoint.is_none() && args.tokenizer.is_none() => {
            warnings.push("no tokenizer file: prompts are read byte by byte".into());
            Tokenizer::from_bytes(&byte_model())?
        }
        Err(e) => return Err(e.into()),
    };
    if tokenizer.piece_count() > model.vocab {
        bail!(
            "the tokenizer has {} pieces, the model's table {} rows: it belongs to another model \
             (--tokenizer FILE)",
            tokenizer.piece_count(),
            model.vocab
        );
    }
    Ok(tokenizer)
}

/// A SentencePiece model of the four special pieces and 256 bytes: what random weights speak.
fn byte_model() -> Vec<u8> {
    let field = |number: u8, body: &[u8]| -> Vec<u8> {
        let mut out = vec![number << 3 | 2, body.len() as u8];
        out.extend(body);
        out
    };
    let piece = |text: &str, kind: u8| -> Vec<u8> {
        let mut body = field(1, text.as_bytes());
        body.extend([3 << 3, kind]);
        field(1, &body)
    };
    let mut model = Vec::new();
    for (text, kind) in [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2)] {
        model.extend(piece(text, kind));
    }
    for byte in 0..=255u8 {
        model.extend(piece(&format!("<0x{byte:02X}>"), 6));
    }
    // trainer: BPE (3), byte fallback (35), unk 3 (40), bos 2 (41), eos 1 (42), pad 0 (43)
    let trainer: [u8; 17] =
        [0x18, 2, 0x98, 0x02, 1, 0xC0, 0x02, 3, 0xC8, 0x02, 2, 0xD0, 0x02, 1, 0xD8, 0x02, 0];
    model.extend(field(2, &trainer));
    // normaliser: no dummy prefix, white space kept, spaces escaped
    model.extend(field(3, &[0x18, 0, 0x20, 0, 0x28, 1]));
    model
}

/// For a line of a log: the robot's cameras, dimensions and asset of a policy.
pub fn describe(policy: &Policy) -> String {
    let c = policy.config();
    format!(
        "{} ({}): robot {}, {} × {} actions, prompt ≤ {} tokens",
        c.name,
        c.family.name(),
        c.robot.name(),
        c.horizon,
        c.output_dims(),
        c.max_token_len
    )
}

/// Where LeRobot's own facts contradict the program's fixed ones.
fn check_lerobot(lerobot: &LeRobot) -> Result<()> {
    for (step, normaliser) in
        [("normalizer", &lerobot.input_stats), ("unnormalizer", &lerobot.output_stats)]
    {
        let eps = normaliser.eps;
        if eps as f32 != LEROBOT_EPS {
            bail!(
                "{step}_processor: `eps` is {eps}, only LeRobot's own {LEROBOT_EPS:e} is supported"
            );
        }
    }
    let (low, high) = lerobot.periods;
    if (low - 4e-3).abs() > 1e-9 || (high - 4.0).abs() > 1e-9 {
        bail!("min_period {low} and max_period {high} differ from 0.004 and 4: not supported");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pirouette_checkpoint::lerobot::{
        Feature, FeatureKind, NormMode as Stored, ProcessorStep, RelativeActions,
    };
    use pirouette_policy::robots::Robot;
    use pirouette_testing::fixture::testdata;

    use super::*;

    const MEANS: &str = r#"{"norm_stats": {
        "state": {"mean": [1, 2], "std": [1, 1]}, "actions": {"mean": [3, 4], "std": [1, 1]}}}"#;

    fn put(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// The tiny π0 as a LeRobot directory without processors.
    fn lerobot_directory() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let weights = "model.safetensors";
        std::fs::copy(testdata().join("A_tiny/pi0").join(weights), folder.path().join(weights))
            .unwrap();
        let config = serde_json::json!({
            "type": "pi0",
            "input_features": {
                "observation.images.top": {"type": "VISUAL", "shape": [3, 48, 64]},
                "observation.state": {"type": "STATE", "shape": [2]},
            },
            "output_features": {"action": {"type": "ACTION", "shape": [2]}},
            "normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "MIN_MAX"},
            "vision": {"num_attention_heads": 4},
        });
        put(&folder.path().join("config.json"), &config.to_string());
        folder
    }

    fn lerobot_directory_read() -> LeRobot {
        pirouette_checkpoint::open(lerobot_directory().path()).unwrap().lerobot.unwrap()
    }

    fn args(norm_stats: Option<PathBuf>) -> PolicyArgs {
        PolicyArgs { tokenizer: None, norm_stats, default_prompt: None }
    }

    /// The statistics of a configuration without an asset id.
    fn found(checkpoint: &Checkpoint, norm_stats: PathBuf) -> Result<Option<NormStats>> {
        let mut config = match &checkpoint.lerobot {
            Some(lerobot) => lerobot::policy_config(lerobot)?,
            None => named("pi0_droid")?,
        };
        config.asset_id = None;
        let found = statistics(&config, Some(checkpoint), &args(Some(norm_stats)), &mut vec![]);
        Ok(found?.map(|(stats, _)| stats))
    }

    #[test]
    fn statistics_named_by_a_flag_are_used_without_an_asset_id() {
        let folder = lerobot_directory();
        let file = folder.path().join("mine/my/arm/norm_stats.json");
        put(&file, MEANS);
        let want = NormStats::from_json(MEANS.as_bytes()).unwrap();
        for dir in [folder.path(), &testdata().join("A_tiny/pi0")] {
            let checkpoint = pirouette_checkpoint::open(dir).unwrap();
            let got = found(&checkpoint, file.clone()).unwrap();
            assert_eq!(got.as_ref(), Some(&want), "{}", dir.display());
            let error = found(&checkpoint, folder.path().join("mine")).unwrap_err().to_string();
            assert!(error.contains("asset ids there: my/arm"), "{error}");
        }
    }

    #[test]
    fn a_width_that_is_said_must_be_the_weights() {
        let checkpoint = testdata().join("A_tiny/e2e/pi05_droid/checkpoint");
        let checkpoint = pirouette_checkpoint::open(&checkpoint).unwrap();
        let tokenizer = Some(testdata().join("D_preprocess/tokenizer/tok_bpe.model"));
        let args = PolicyArgs { tokenizer, ..args(None) };
        let width = checkpoint.config.action_dim;
        let set_up = |line: &str, checkpoint: Option<&Checkpoint>, model: &Config| {
            let config = from_toml(&format!(
                "name='arm'\nfamily='pi05'\nhorizon=15\nasset_id='droid'\n{line}\n[robot]\n\
                 kind='droid'\n"
            ));
            policy(config.unwrap(), model, checkpoint, &args)
        };
        let model = checkpoint.config;
        for line in ["", &format!("action_dim={width}")] {
            let (policy, _) = set_up(line, Some(&checkpoint), &model).unwrap();
            assert_eq!(policy.config().action_dim, width);
        }
        let error = set_up("action_dim=8", Some(&checkpoint), &model).map(drop).unwrap_err();
        let says = format!("says `action_dim = 8`, these weights are {width} wide");
        assert!(error.to_string().contains(&says), "{error}");
        let (policy, warnings) = set_up("action_dim=8", None, &model).unwrap();
        assert_eq!(policy.config().action_dim, width);
        assert!(warnings[0].contains("not `action_dim = 8` as said"), "{warnings:?}");
    }

    #[test]
    fn without_an_asset_id_nothing_is_served_unnormalised_unless_said_so() {
        let folder = lerobot_directory();
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        put(&folder.path().join("config.json"), r#"{"vision": {"num_attention_heads": 4}}"#);
        put(&folder.path().join("assets/my/arm/norm_stats.json"), MEANS);
        let checkpoint = pirouette_checkpoint::open(folder.path()).unwrap();
        let mut config = named("pi0_droid").unwrap();
        config.asset_id = None;
        let mut warnings = vec![];
        let mut ask = |config: &PolicyConfig| {
            statistics(config, Some(&checkpoint), &args(None), &mut warnings)
        };
        let error = ask(&config).unwrap_err().to_string();
        assert!(error.starts_with("Asset id is required to load norm stats"), "{error}");
        assert!(error.contains("in this checkpoint: my/arm"), "{error}");
        (config.state_norm, config.action_norm) = (NormMode::Identity, NormMode::Identity);
        assert_eq!(ask(&config).unwrap(), None);
    }

    #[test]
    fn a_lerobot_directory_without_processors_keeps_its_normalisation() {
        let mut lerobot = lerobot_directory_read();
        let config = lerobot::policy_config(&lerobot).unwrap();
        assert_eq!((config.state_norm, config.action_norm), (NormMode::MeanStd, NormMode::MinMax));
        lerobot.output_stats.eps = 1e-6;
        let error = check_lerobot(&lerobot).unwrap_err().to_string();
        assert!(error.contains("unnormalizer_processor: `eps` is 0.000001"), "{error}");
    }

    /// What LeRobot's loader would do and this program does not must not be left out in silence.
    #[test]
    fn lerobot_steps_that_are_not_implemented_are_refused() {
        let read = lerobot_directory_read;
        let step = |name: &str, key: &str, value: &str| {
            let config = serde_json::json!({key: value}).as_object().unwrap().clone();
            ProcessorStep { name: name.into(), config, state_file: None }
        };
        let with = |before: ProcessorStep, after: ProcessorStep| {
            let (preprocessor, postprocessor) = (vec![before], vec![after]);
            LeRobot { preprocessor, postprocessor, ..read() }
        };
        let device = || step("device_processor", "device", "cpu");
        let before = with(step("mylab.Crop", "x", "y"), device());
        let after = with(device(), step("ee_so3_relative_actions_processor", "x", "y"));
        let side = with(step("tokenizer_processor", "padding_side", "left"), device());
        let task = with(step("tokenizer_processor", "task_key", "goal"), device());
        let mut one = read();
        one.preprocessor = vec![device()];
        let error = lerobot::statistics(&one).unwrap_err().to_string();
        assert!(error.contains("on one side alone"), "with a configuration's name, too: {error}");
        let mut images = read();
        images.input_stats.norm_map = vec![(FeatureKind::Visual, Stored::MeanStd)];
        assert!(lerobot::policy_config(&images).is_ok(), "no statistics: nothing happens");
        let stats = &mut images.input_stats.stats;
        stats.insert("observation.images.top".into(), Default::default());
        for (policy, part) in [
            (before, "policy_preprocessor.json has a step `mylab.Crop`"),
            (after, "policy_postprocessor.json has a step `ee_so3_relative_actions_processor`"),
            (side, "`padding_side` is \"left\""),
            (task, "`task_key` is \"goal\""),
            (one, "normalised on one side alone"),
            (images, "`observation.images.top` is normalised (MeanStd)"),
        ] {
            let error = lerobot::policy_config(&policy).unwrap_err().to_string();
            assert!(error.contains(part), "{error}\nlacks {part}");
        }
    }

    /// A robot has none of the cameras that LeRobot adds, and may lack some of the others.
    #[test]
    fn any_of_three_cameras_beside_empty_ones() {
        let mut lerobot = lerobot_directory_read();
        let mut with = |cameras: &[&str]| {
            let state = lerobot.input_features.iter().find(|f| f.kind == FeatureKind::State);
            let mut features = vec![state.unwrap().clone()];
            features.extend(cameras.iter().map(|name| Feature {
                name: format!("observation.images.{name}"),
                kind: FeatureKind::Visual,
                shape: vec![3, 48, 64],
            }));
            lerobot.input_features = features;
            let config = lerobot::policy_config(&lerobot).map_err(|e| e.to_string())?;
            let Robot::Generic(robot) = config.robot else { panic!("generic") };
            let cameras = robot.cameras.into_iter();
            Ok::<_, String>(cameras.map(|c| (c.key, c.required)).collect::<Vec<_>>())
        };
        let key = |name: &str, required| (format!("observation.images.{name}"), required);
        assert_eq!(with(&["a", "empty_camera_0"]), Ok(vec![key("a", true)]));
        let three = ["b", "a", "empty_camera_0", "empty_camera_1", "c"];
        assert_eq!(with(&three), Ok(vec![key("b", false), key("a", false), key("c", false)]));
        assert!(with(&["a", "b", "c", "d"]).unwrap_err().contains("names 4 cameras"));
    }

    /// A fine-tuned checkpoint may have its base's shape, which is the model's width.
    #[test]
    fn a_lerobot_state_is_as_long_as_its_statistics_where_its_shape_is_the_models() {
        let mut lerobot = lerobot_directory_read();
        let mut dims = |shape: usize, covered: Option<usize>| {
            let state = lerobot.input_features.iter_mut().find(|f| f.kind == FeatureKind::State);
            let state = state.unwrap();
            state.shape = vec![shape];
            let mean = covered.map(|len| ("mean".to_string(), vec![0.0; len]));
            lerobot.input_stats.stats.insert(state.name.clone(), mean.into_iter().collect());
            let Robot::Generic(robot) = lerobot::policy_config(&lerobot).unwrap().robot else {
                panic!("generic")
            };
            robot.state[0].dims
        };
        assert_eq!(dims(6, Some(6)), Some(6));
        assert_eq!(dims(6, Some(7)), Some(6), "refused later");
        assert_eq!(dims(32, Some(6)), Some(6));
        assert_eq!(dims(32, None), None);
    }

    #[test]
    fn the_files_of_a_lerobot_checkpoints_statistics_are_named() {
        let mut lerobot = lerobot_directory_read();
        let origin = |l: &LeRobot| lerobot::statistics_origin(l, Path::new("arm"));
        assert_eq!(origin(&lerobot), "arm");
        let step = |name: &str, file: &str| ProcessorStep {
            name: name.into(),
            config: Default::default(),
            state_file: Some(file.into()),
        };
        lerobot.preprocessor = vec![step("normalizer_processor", "in.safetensors")];
        lerobot.postprocessor = vec![step("unnormalizer_processor", "out.safetensors")];
        assert_eq!(origin(&lerobot), "arm (in.safetensors, out.safetensors)");
    }

    /// LeRobot 0.5 calls the step that makes actions relative by another name, and always has it.
    #[test]
    fn policies_of_lerobot_0_5_are_served() {
        let folder = lerobot_directory();
        let processor = |name: &str, enabled: bool| {
            let step = serde_json::json!({"registry_name": name, "config": {"enabled": enabled}});
            serde_json::json!({ "steps": [step] }).to_string()
        };
        for enabled in [false, true] {
            let pre = processor("delta_actions_processor", enabled);
            put(&folder.path().join("policy_preprocessor.json"), &pre);
            let post = processor("absolute_actions_processor", enabled);
            put(&folder.path().join("policy_postprocessor.json"), &post);
            let checkpoint = pirouette_checkpoint::open(folder.path()).unwrap();
            let config = lerobot::policy_config(&checkpoint.lerobot.unwrap()).unwrap();
            assert_eq!(config.absolute_mask, vec![true; if enabled { 2 } else { 0 }]);
        }
    }

    #[test]
    fn relative_actions_are_all_but_the_named() {
        let mut policy = lerobot_directory_read();
        policy.output_features[0].shape = vec![4];
        let mut mask = |exclude: &[&str], names: Option<&[&str]>| {
            let strings = |list: &[&str]| list.iter().map(|s| s.to_string()).collect();
            policy.relative_actions = Some(RelativeActions {
                exclude_joints: strings(exclude),
                action_names: names.map(strings),
            });
            lerobot::policy_config(&policy).unwrap().absolute_mask
        };
        assert_eq!(mask(&["gripper"], None), [true; 4]);
        let names = ["left.Gripper", "arm", "grip", "x"];
        assert_eq!(mask(&["gripper"], Some(&names)), [false, true, true, true]);
        assert_eq!(mask(&["", "ARM"], Some(&names)), [true, false, true, true]);
        assert_eq!(mask(&["arm"], Some(&names[..2])), [true, false, true, true], "too few names");
    }

    #[test]
    fn the_byte_model_reads_any_text() {
        let t = Tokenizer::from_bytes(&byte_model()).unwrap();
        assert_eq!((t.bos(), t.piece_count()), (2, 260));
        let plain = t.encode("pick");
        assert_eq!(plain, [b'p', b'i', b'c', b'k'].map(|b| b as u32 + 4));
        assert!(t.encode("löffel ▁ 🤖").iter().all(|&id| (4..260).contains(&id)));
    }
}
