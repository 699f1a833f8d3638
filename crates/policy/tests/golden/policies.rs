//! Whole policies: raw observation to model input, model output to robot actions.

use crate::fixture::{self, Tensors, assert_exact, relative_difference};
use pirouette_policy::config::named;
use pirouette_policy::robots::{Robot, SLOTS};
use pirouette_policy::{NormStats, Policy, Tokenizer};
use serde_json::Value as Json;
use std::path::Path;
use std::sync::Arc;

fn policy(config: &str, stats: &Path) -> Policy {
    let path = fixture::path("D_preprocess/tokenizer/tok_bpe.model");
    let tokenizer = Arc::new(Tokenizer::from_file(&path).unwrap());
    let stats = NormStats::from_file(stats).unwrap();
    Policy::new(named(config).unwrap(), &stats, tokenizer, 224).unwrap()
}

/// The model's image as the fixtures keep it: channels first, perhaps every fourth pixel.
fn planes(image: &[u8], step: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for channel in 0..3 {
        for y in (0..224).step_by(step) {
            out.extend((0..224).step_by(step).map(|x| image[(y * 224 + x) * 3 + channel]));
        }
    }
    out
}

fn check_config(policy: &Policy, case: &Json) {
    let config = policy.config();
    assert_eq!(config.family.name(), case["model_type"]);
    assert_eq!(config.action_dim, case["action_dim"]);
    assert_eq!(config.horizon, case["action_horizon"]);
    assert_eq!(config.max_token_len, case["max_token_len"]);
    assert_eq!(config.discrete_state, case["discrete_state_input"]);
    let poses = case["metadata"].as_object().map_or(0, |map| map.len());
    assert_eq!(config.metadata.len(), poses);
    let absolute = case["output_transforms"].as_array().unwrap().len() == 3;
    assert_eq!(!config.absolute_mask.is_empty(), absolute);
}

#[test]
fn twelve_policies() {
    let folders: Vec<String> = fixture::list("D_preprocess/policies")
        .into_iter()
        .filter(|name| !name.ends_with(".safetensors"))
        .collect();
    assert_eq!(folders.len(), 12);
    let mut images = 0;
    for folder in folders {
        let folder = format!("D_preprocess/policies/{folder}");
        let case = fixture::json(&format!("{folder}/case.json"));
        let t = Tensors::open(&format!("{folder}/case.safetensors"));
        let stats = fixture::path(&format!("{folder}/norm_stats.json"));
        let policy = policy(case["config"].as_str().unwrap(), &stats);
        check_config(&policy, &case);
        let prepared = policy.prepare(&t.observation(case["prompt"].as_str())).unwrap();

        let mut seen = prepared.input.images.iter();
        for slot in SLOTS {
            if case["image_masks"][slot] == false {
                continue;
            }
            let image = seen.next().unwrap();
            let name = format!("model_in.image_uint8_chw.{slot}");
            let (expected, step) = match t.find(&name) {
                Some(whole) => (whole, 1),
                None => (t.array(&format!("{name}_every4th")), 4),
            };
            assert!(planes(image, step) == expected.data, "{folder} {slot}");
            images += 1;
        }
        assert!(seen.next().is_none(), "{folder}: a camera too many");

        let mask = t.numbers("model_in.token_mask");
        let valid = mask.iter().filter(|&&m| m == 1.0).count();
        let tokens: Vec<f64> = prepared.input.tokens.iter().map(|&id| id.into()).collect();
        assert_exact(&folder, &tokens, &t.numbers("model_in.tokens")[..valid]);
        assert_eq!(prepared.dropped_tokens, 0);

        let state = t.numbers("model_in.state");
        let difference = relative_difference(&prepared.state, &state);
        // ALOHA's gripper goes through arcsin, whose last place is the library's choice.
        let tolerance =
            if matches!(policy.config().robot, Robot::Aloha { .. }) { 1e-15 } else { 0.0 };
        assert!(difference <= tolerance, "{folder}: state {difference:e}");
        let narrow: Vec<f32> = state.iter().map(|&x| x as f32).collect();
        assert_eq!(prepared.input.state, narrow, "{folder}");

        let actions: Vec<f32> = t.numbers("in.model_actions").iter().map(|&x| x as f32).collect();
        let out = policy.finish(&prepared, &actions).unwrap();
        // And back: what is left of the chunk, as real-time chunking wants it.
        let (dims, columns) = (policy.config().output_dims(), policy.config().action_dim);
        let robot = out.to_f64().unwrap();
        let back = policy.model_actions(&prepared, &robot[dims..]).unwrap();
        let rows = actions.chunks(columns).skip(1).flat_map(|row| &row[..dims]);
        assert_eq!(back.len(), rows.clone().count());
        let worst = back.iter().zip(rows).map(|(b, a)| (b - a).abs()).fold(0.0, f32::max);
        assert!(worst < 2e-5, "{folder}: the way back is off by {worst}");
        let expected = t.array("out.actions");
        assert_eq!(out.shape, expected.shape);
        let (out, expected) = (out.to_f64().unwrap(), expected.to_f64().unwrap());
        if tolerance == 0.0 {
            assert_exact(&folder, &out, &expected);
        } else {
            let difference = relative_difference(&out, &expected);
            assert!(difference <= tolerance, "{folder}: actions {difference:e}");
        }
    }
    assert_eq!(images, 27);
}

#[test]
fn the_tiny_checkpoints_actions() {
    for (config, asset) in [
        ("pi0_libero", "physical-intelligence/libero"),
        ("pi05_droid", "droid"),
        ("pi0_aloha", "trossen"),
    ] {
        let folder = format!("A_tiny/e2e/{config}");
        let case = fixture::json(&format!("{folder}/case.json"));
        assert_eq!(named(config).unwrap().asset_id.as_deref(), Some(asset));
        let stats = format!("{folder}/checkpoint/assets/{asset}/norm_stats.json");
        let policy = policy(config, &fixture::path(&stats));
        let t = Tensors::open(&format!("{folder}/case.safetensors"));
        let prepared = policy.prepare(&t.observation(case["prompt"].as_str())).unwrap();
        for run in ["out", "out_bf16"] {
            let actions = t.numbers(&format!("{run}.model_actions"));
            let actions: Vec<f32> = actions.iter().map(|&x| x as f32).collect();
            let out = policy.finish(&prepared, &actions).unwrap().to_f64().unwrap();
            let difference = relative_difference(&out, &t.numbers(&format!("{run}.actions")));
            assert!(difference <= 1e-15, "{config} {run}: {difference:e}");
        }
    }
}
