//! LeRobot checkpoints: names, settings, processor statistics, camera order.

mod support;

use std::path::Path;

use pirouette_checkpoint::lerobot::{FeatureKind, NormMode, RelativeActions};
use pirouette_checkpoint::names::openpi_torch::LM_HEAD;
use pirouette_checkpoint::{Checkpoint, CheckpointError, Format, open};
use pirouette_model::Family;
use pirouette_model::config::names::{EMBED, EXPERT};
use serde_json::{Value, json};
use support::{Stored, Tensors, encode, fixture, read};

fn config(family: &str) -> Value {
    json!({
        "type": family,
        "input_features": {
            "observation.images.wrist": {"type": "VISUAL", "shape": [3, 480, 640]},
            "observation.state": {"type": "STATE", "shape": [6]},
            "observation.images.front": {"type": "VISUAL", "shape": [3, 240, 320]},
            "observation.images.above": {"type": "VISUAL", "shape": [3, 240, 320]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [6]}},
        "chunk_size": 10, "n_action_steps": 8, "max_state_dim": 32, "max_action_dim": 32,
        "num_inference_steps": 10, "min_period": 0.004, "max_period": 4.0,
        "dtype": "float32", "image_resolution": [56, 56], "empty_cameras": 1,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "use_relative_actions": false, "relative_exclude_joints": ["gripper"],
        "action_feature_names": null, "rtc_config": null, "unknown_field": [1, 2],
        "vision": {"num_attention_heads": 4},
    })
}

fn processor(steps: Value) -> Value {
    json!({"name": "p", "steps": steps})
}

fn preprocessor() -> Value {
    let features = config("pi0")["input_features"].clone();
    processor(json!([
        {"registry_name": "rename_observations_processor",
         "config": {"rename_map": {"observation.images.a": "observation.images.front"}}},
        {"class": "my.module.Step", "config": {}},
        {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "tokenizer"}},
        {"registry_name": "normalizer_processor", "state_file": "pre_stats.safetensors",
         "config": {"eps": 1e-6, "features": features,
                    "norm_map": {"VISUAL": "IDENTITY", "STATE": "QUANTILES"}}},
    ]))
}

fn postprocessor() -> Value {
    processor(json!([
        {"registry_name": "unnormalizer_processor", "state_file": "post_stats.safetensors",
         "config": {"eps": 1e-8, "features": config("pi0")["output_features"],
                    "norm_map": {"ACTION": "MEAN_STD"}}},
    ]))
}

fn stats() -> Tensors {
    let six = |v: f32| Stored::f32(&[6], &[v; 6]);
    let count = Stored { dtype: "I64", shape: vec![1], bytes: vec![9, 0, 0, 0, 0, 0, 0, 0] };
    Tensors::from([
        ("observation.state.q01".into(), six(-1.0)),
        ("observation.state.q99".into(), six(1.0)),
        ("observation.state.count".into(), count),
        ("action.mean".into(), six(0.25)),
        ("action.std".into(), six(2.0)),
    ])
}

/// Writes a LeRobot checkpoint of the tiny weights.
fn write(dir: &Path, tensors: &Tensors, config: &Value) {
    let put = |name: &str, bytes: Vec<u8>| std::fs::write(dir.join(name), bytes).unwrap();
    put("model.safetensors", encode(tensors, &[]));
    put("config.json", config.to_string().into());
    put("policy_preprocessor.json", preprocessor().to_string().into());
    put("policy_postprocessor.json", postprocessor().to_string().into());
    put("pre_stats.safetensors", encode(&stats(), &[]));
    put("post_stats.safetensors", encode(&stats(), &[]));
    std::fs::create_dir_all(dir.join("tokenizer")).unwrap();
    put("tokenizer/tokenizer.json", b"{}".into());
}

fn tiny(family: &str) -> Tensors {
    read(&fixture(&format!("A_tiny/{family}/model.safetensors")))
}

fn prefixed(tensors: Tensors) -> Tensors {
    tensors.into_iter().map(|(name, t)| (format!("model.{name}"), t)).collect()
}

fn opened(tensors: &Tensors, config: &Value) -> Result<Checkpoint, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), tensors, config);
    open(dir.path())
}

#[test]
fn prefixed_weights_are_the_same_weights() {
    for family in ["pi0", "pi05"] {
        let expected = open(&fixture(&format!("A_tiny/{family}"))).unwrap();
        let mut tensors = prefixed(tiny(family));
        // Current LeRobot does not tie: the head is there too, untrained.
        let table = tensors.remove(&format!("model.{LM_HEAD}")).unwrap();
        tensors.insert(format!("model.{LM_HEAD}"), Stored::zeros(&table.shape));
        tensors.insert(format!("model.{EMBED}"), table);
        let extra = "model.proprio_history_proj.weight".to_string();
        tensors.insert(extra.clone(), Stored::zeros(&[2, 2]));
        let found = opened(&tensors, &config(family)).unwrap();
        assert_eq!(found.format, Format::LeRobot);
        assert_eq!(found.config, expected.config);
        support::assert_same(&*found.source, &*expected.source, &|v| v);
        let skipped = found.inspect().skipped;
        assert_eq!(skipped.len(), 3, "{skipped:?}");
        assert!(skipped.iter().any(|s| s.name == extra));
    }
}

#[test]
fn weights_without_prefix_are_renamed_as_lerobot_does() {
    let expected = open(&fixture("A_tiny/pi05")).unwrap();
    let mut tensors = tiny("pi05");
    for part in ["in.weight", "in.bias", "out.weight", "out.bias"] {
        let t = tensors.remove(&format!("time_mlp_{part}")).unwrap();
        tensors.insert(format!("action_time_mlp_{part}"), t);
    }
    tensors.insert("state_proj.weight".into(), Stored::zeros(&[32, 32]));
    tensors.insert(format!("{EXPERT}norm.weight"), Stored::zeros(&[32]));
    let found = opened(&tensors, &config("pi05")).unwrap();
    support::assert_same(&*found.source, &*expected.source, &|v| v);

    let expected = open(&fixture("A_tiny/pi0")).unwrap();
    let mut tensors = tiny("pi0");
    for part in ["in.weight", "in.bias", "out.weight", "out.bias"] {
        let t = tensors.remove(&format!("action_time_mlp_{part}")).unwrap();
        tensors.insert(format!("time_mlp_{part}"), t);
    }
    let found = opened(&tensors, &config("pi0")).unwrap();
    support::assert_same(&*found.source, &*expected.source, &|v| v);
}

#[test]
fn a_trained_delay_is_pi05s() {
    for (family, want) in [("pi0", 0), ("pi05", 6)] {
        let mut json = config(family);
        json["rtc_training_max_delay"] = 6.into();
        let found = opened(&prefixed(tiny(family)), &json).unwrap();
        assert_eq!(found.config.rtc_max_delay, want, "{family}");
    }
}

#[test]
fn settings_and_statistics_are_read() {
    let checkpoint = opened(&prefixed(tiny("pi0")), &config("pi0")).unwrap();
    let policy = checkpoint.lerobot.as_ref().unwrap();
    assert_eq!(policy.family, Family::Pi0);
    let cameras: Vec<&str> = policy.cameras().collect();
    assert_eq!(
        cameras,
        ["observation.images.wrist", "observation.images.front", "observation.images.above"]
    );
    assert_eq!((policy.chunk_size, policy.n_action_steps), (10, 8));
    assert_eq!((policy.image_resolution, policy.empty_cameras), ((56, 56), 1));
    assert_eq!(policy.tokenizer_max_length, 48, "the default of π0");
    assert_eq!(policy.tokenizer_name.as_deref(), Some("tokenizer"));
    assert_eq!(
        policy.rename_map,
        [("observation.images.a".to_string(), "observation.images.front".to_string())]
    );
    assert_eq!(policy.relative_actions, None);
    assert_eq!(policy.preprocessor[1].name, "my.module.Step");

    let input = &policy.input_stats;
    assert_eq!(input.eps, 1e-6);
    assert_eq!(
        input.norm_map,
        [(FeatureKind::Visual, NormMode::Identity), (FeatureKind::State, NormMode::Quantiles)]
    );
    assert_eq!(input.stats["observation.state"]["q01"], [-1.0; 6]);
    assert!(!input.stats["observation.state"].contains_key("count"));
    assert_eq!(policy.output_stats.stats["action"]["std"], [2.0; 6]);
    assert_eq!(policy.output_stats.features.as_ref().unwrap()[0].shape, [6]);

    let report = checkpoint.inspect().to_string();
    for part in [
        "LeRobot",
        "observation.images.front VISUAL [3, 240, 320]",
        "observation.state STATE [6], with statistics",
        "before: my.module.Step",
        "after: unnormalizer_processor",
    ] {
        assert!(report.contains(part), "{report}\nlacks {part}");
    }
}

/// What processor files say of relative actions and of the prompt's length counts, since LeRobot
/// looks at nothing else; without files `config.json` does.
#[test]
fn processor_files_go_before_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let names = json!(["arm.pos", "Gripper.pos"]);
    let read = |relative: bool, steps: Option<(bool, Value)>| {
        let mut config = config("pi0");
        config["use_relative_actions"] = json!(relative);
        config["action_feature_names"] = names.clone();
        config.as_object_mut().unwrap().remove("relative_exclude_joints");
        config["tokenizer_max_length"] = json!(12);
        write(dir.path(), &prefixed(tiny("pi0")), &config);
        let (pre, post) = match steps {
            None => {
                for name in ["policy_preprocessor.json", "policy_postprocessor.json"] {
                    std::fs::remove_file(dir.path().join(name)).unwrap();
                }
                return open(dir.path());
            }
            Some((enabled, before)) => (
                processor(before),
                processor(json!([{"registry_name": "absolute_actions_processor",
                                  "config": {"enabled": enabled}}])),
            ),
        };
        std::fs::write(dir.path().join("policy_preprocessor.json"), pre.to_string()).unwrap();
        std::fs::write(dir.path().join("policy_postprocessor.json"), post.to_string()).unwrap();
        open(dir.path())
    };
    let named = |name: &str, joints: Value| {
        json!([
            {"registry_name": "tokenizer_processor", "config": {"max_length": 60}},
            {"registry_name": name,
             "config": {"enabled": false, "exclude_joints": joints, "action_names": null}},
        ])
    };
    let before = |excluded: &str| named("relative_actions_processor", json!([excluded]));
    let lerobot = |checkpoint: Checkpoint| checkpoint.lerobot.unwrap();
    let names = vec!["arm.pos".to_string(), "Gripper.pos".into()];
    let relative = |joint: &str, action_names| {
        Some(RelativeActions { exclude_joints: vec![joint.into()], action_names })
    };

    let found = lerobot(read(true, None).unwrap());
    assert_eq!(found.relative_actions, relative("gripper", Some(names)), "LeRobot's default joint");
    assert_eq!(found.tokenizer_max_length, 12);
    assert_eq!(lerobot(read(false, None).unwrap()).relative_actions, None);
    let found = lerobot(read(false, Some((true, before("thumb")))).unwrap());
    assert_eq!(found.relative_actions, relative("thumb", None));
    assert_eq!(found.tokenizer_max_length, 60);
    let found = lerobot(read(true, Some((false, before("thumb")))).unwrap());
    assert_eq!(found.relative_actions, None);
    let without = json!([{"registry_name": "device_processor", "config": {}}]);
    let error = read(true, Some((true, without))).map(drop).unwrap_err();
    assert!(matches!(&error, CheckpointError::Unsupported { path, .. }
        if path.ends_with("policy_preprocessor.json")));
    assert!(error.to_string().contains("it has no relative_actions_processor"), "{error}");

    // LeRobot 0.5's name for it.
    for (enabled, want) in [(true, relative("thumb", None)), (false, None)] {
        let old = named("delta_actions_processor", json!(["thumb"]));
        let found = lerobot(read(enabled, Some((enabled, old))).unwrap());
        assert_eq!(found.relative_actions, want);
        assert_eq!(found.preprocessor[1].name, "relative_actions_processor");
    }

    // The file that holds a value is the one that is named.
    let broken = read(false, Some((true, named("relative_actions_processor", json!("thumb")))));
    let error = broken.map(drop).unwrap_err().to_string();
    let step = "policy_preprocessor.json is damaged: step `relative_actions_processor`: \
                `exclude_joints` is \"thumb\"";
    assert!(error.contains(step), "{error}");
    let tokens = json!([{"registry_name": "tokenizer_processor", "config": {"max_length": "x"}}]);
    let error = read(false, Some((false, tokens))).map(drop).unwrap_err().to_string();
    let step = "policy_preprocessor.json is damaged: step `tokenizer_processor`: `max_length`";
    assert!(error.contains(step), "{error}");
}

/// LeRobot's normaliser goes through its own features, and of those only through the keys that it
/// names, if it does; actions it takes as they come.
#[test]
fn a_normaliser_says_what_it_covers() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &prefixed(tiny("pi0")), &config("pi0"));
    let mode = |change: &dyn Fn(&mut Value)| {
        for (file, mut json, step) in [
            ("policy_preprocessor.json", preprocessor(), 3),
            ("policy_postprocessor.json", postprocessor(), 0),
        ] {
            change(&mut json["steps"][step]["config"]);
            std::fs::write(dir.path().join(file), json.to_string()).unwrap();
        }
        let policy = open(dir.path()).map_err(|e| e.to_string())?.lerobot.unwrap();
        let state = policy.input_features.iter().find(|f| f.kind == FeatureKind::State).unwrap();
        assert_eq!(policy.output_stats.action_mode(), NormMode::MeanStd);
        Ok::<_, String>(policy.input_stats.observation_mode(state))
    };
    let keys = "normalize_observation_keys";
    let other = json!({"observation.other": {"type": "STATE", "shape": [6]}});
    let env = json!({"observation.state": {"type": "ENV", "shape": [6]}});
    type Case<'a> = (&'a dyn Fn(&mut Value), NormMode);
    let cases: [Case<'_>; 7] = [
        (&|_| (), NormMode::Quantiles),
        (&|c| drop(c.as_object_mut().unwrap().remove("features")), NormMode::Quantiles),
        (&|c| c["features"] = other.clone(), NormMode::Identity),
        (&|c| c["features"] = env.clone(), NormMode::Identity),
        (&|c| c[keys] = Value::Null, NormMode::Quantiles),
        (&|c| c[keys] = json!(["observation.state"]), NormMode::Quantiles),
        (&|c| c[keys] = json!(["observation.other"]), NormMode::Identity),
    ];
    for (i, (change, want)) in cases.into_iter().enumerate() {
        assert_eq!(mode(change), Ok(want), "case {i}");
    }
    let error = mode(&|c| c[keys] = json!("observation.state")).unwrap_err();
    let says = "policy_preprocessor.json is damaged: step `normalizer_processor`: \
                `normalize_observation_keys` is \"observation.state\"";
    assert!(error.contains(says), "{error}");
}

#[test]
fn a_base_checkpoint_may_lack_processors() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &prefixed(tiny("pi0")), &config("pi0"));
    for name in ["policy_preprocessor.json", "policy_postprocessor.json"] {
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    let policy = open(dir.path()).unwrap().lerobot.unwrap();
    for normaliser in [&policy.input_stats, &policy.output_stats] {
        assert_eq!(normaliser.norm_map, policy.normalization_mapping);
        assert_eq!((normaliser.eps, normaliser.stats.len()), (1e-8, 0));
    }
    // A processor without the step says that nothing is normalised.
    let steps = processor(json!([{"registry_name": "device_processor", "config": {}}]));
    std::fs::write(dir.path().join("policy_preprocessor.json"), steps.to_string()).unwrap();
    let report = open(dir.path()).unwrap().inspect().to_string();
    assert!(report.contains("before: device_processor"), "one alone can be looked at: {report}");
    std::fs::write(dir.path().join("policy_postprocessor.json"), steps.to_string()).unwrap();
    let policy = open(dir.path()).unwrap().lerobot.unwrap();
    assert!(policy.input_stats.norm_map.is_empty());

    let outer = tempfile::tempdir().unwrap();
    support::copy(dir.path(), &outer.path().join("pretrained_model"));
    assert_eq!(open(outer.path()).unwrap().format, Format::LeRobot);

    // Its weights may be in shards, here one.
    let inner = outer.path().join("pretrained_model");
    std::fs::rename(inner.join("model.safetensors"), inner.join("part.safetensors")).unwrap();
    let names = prefixed(tiny("pi0")).into_keys();
    let map: serde_json::Map<_, _> = names.map(|n| (n, "part.safetensors".into())).collect();
    let index = json!({ "weight_map": map }).to_string();
    std::fs::write(inner.join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(open(outer.path()).unwrap().root, inner);
}

/// Each change of the settings, and what the error must say.
/// The weights file alone, without its `config.json`.
#[test]
fn lerobot_weights_need_their_config() {
    let dir = support::folder(&prefixed(tiny("pi0")));
    let e = open(dir.path()).map(drop).unwrap_err();
    assert!(matches!(e, CheckpointError::Unsupported { .. }), "{e}");
    assert!(e.to_string().contains("config.json: the tensors have LeRobot's names"), "{e}");
}

#[test]
fn policies_that_cannot_run_are_refused() {
    let cases = [
        ("type", json!("pi0_fast"), "\"pi0_fast\" is not pi0 or pi05"),
        ("type", json!("pi05"), "missing"),
        ("use_peft", json!(true), "PEFT"),
        ("use_visual_memory", json!(true), "visual memory"),
        ("use_proprioceptive_memory", json!(true), "proprioceptive memory"),
        ("chunk_size", json!(-1), "`chunk_size` is -1"),
        ("image_resolution", json!([224]), "`image_resolution` is [224]"),
        ("input_features", json!([]), "`input_features` is not a map"),
        ("input_features", json!({"a": {"type": "SOUND", "shape": [1]}}), "`a` has type \"SOUND\""),
        ("input_features", json!({"a": {"type": "STATE", "shape": "x"}}), "`a` has shape"),
        ("normalization_mapping", json!({"STATE": "LOG"}), "normalisation of STATE is \"LOG\""),
    ];
    let tensors = tiny("pi0");
    for (key, value, part) in cases {
        let mut config = config("pi0");
        config[key] = value;
        let Err(e) = opened(&tensors, &config) else { panic!("opened: {part}") };
        assert!(e.to_string().contains(part), "{e}\nlacks {part}");
    }
    let Err(e) = opened(&prefixed(tensors), &config("pi05")) else { panic!("opened") };
    assert!(e.to_string().contains("its `type` is pi05"), "{e}");
}

#[test]
fn damaged_processors_are_named() {
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("policy_preprocessor.json", b"{".into(), "policy_preprocessor.json is damaged: not JSON"),
        ("policy_preprocessor.json", b"{}".into(), "no list of `steps`"),
        ("policy_preprocessor.json", br#"{"steps":[{}]}"#.into(), "neither `registry_name`"),
        ("pre_stats.safetensors", vec![1; 40], "pre_stats.safetensors is damaged"),
        (
            "policy_preprocessor.json",
            br#"{"steps":[{"registry_name":"n","state_file":"../x"}]}"#.into(),
            "`../x` is no plain file name",
        ),
    ];
    for (file, bytes, part) in cases {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &prefixed(tiny("pi0")), &config("pi0"));
        std::fs::write(dir.path().join(file), bytes).unwrap();
        let Err(e) = open(dir.path()) else { panic!("opened: {part}") };
        assert!(e.to_string().contains(part), "{e}\nlacks {part}");
    }
}
