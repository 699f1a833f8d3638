//! What a client is told about a wrong request, and that nothing it sends makes us panic.

mod errors;
mod lerobot;
mod properties;
mod scene;

use pirouette_policy::config::named;
use pirouette_policy::norm::FeatureStats;
use pirouette_policy::{NormStats, Policy, PolicyConfig, Tokenizer, Value, sample_observation};
use std::path::PathBuf;
use std::sync::Arc;

fn tokenizer() -> Arc<Tokenizer> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    let path = folder.join("D_preprocess/tokenizer/tok_bpe.model");
    Arc::new(Tokenizer::from_file(&path).unwrap())
}

/// A policy with statistics that change nothing much.
fn policy_of(config: PolicyConfig, dims: usize) -> Policy {
    let mut feature = FeatureStats::default();
    for (name, value) in [("mean", 0.0), ("std", 1.0), ("q01", -1.0), ("q99", 1.0)] {
        feature.set(name, vec![value; dims]);
    }
    let mut stats = NormStats::default();
    stats.set("state", feature.clone());
    stats.set("actions", feature);
    Policy::new(config, &stats, tokenizer(), 56).unwrap()
}

fn policy(name: &str) -> Policy {
    let config = named(name).unwrap();
    let dims = config.robot.state_dims().unwrap();
    policy_of(config, dims)
}

/// The policy's sample, with one value changed (`None` removes it). `path` is `outer|inner`.
fn changed(policy: &Policy, path: &str, value: Option<Value>) -> Value {
    let mut observation = sample_observation(policy.config(), 1);
    let mut map = &mut observation;
    let mut keys: Vec<&str> = path.split('|').collect();
    let last = keys.pop().unwrap();
    for key in keys {
        let Value::Map(entries) = map else { panic!("{key}") };
        map = &mut entries.iter_mut().find(|(known, _)| known == key).unwrap().1;
    }
    let Value::Map(entries) = map else { panic!("{last}") };
    entries.retain(|(key, _)| key != last);
    entries.extend(value.map(|value| (last.to_string(), value)));
    observation
}
