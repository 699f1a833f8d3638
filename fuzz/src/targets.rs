//! The parsers of outside bytes, and the real files each starts from.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;

use anyhow::{Result, bail};
use pirouette_checkpoint::{orbax, safetensors};
use pirouette_policy::config::{from_toml, named};
use pirouette_policy::image::{Encoding, MAX_PIXELS};
use pirouette_policy::{NormStats, Policy, Tokenizer, Value};
use pirouette_server::{ServeOptions, dialect, msgpack, pickle};
use pirouette_testing::fixture::testdata;

/// One parser.
pub struct Target {
    /// Its name on the command line.
    pub name: &'static str,
    /// Folders below `testdata` and the file endings (or whole names) taken from them.
    seeds: &'static [(&'static str, &'static str)],
    /// Runs it; a panic is a finding.
    pub run: fn(&[u8]),
}

/// Seeds larger than this would be copied more than parsed.
const MAX_SEED: u64 = 256 << 10;

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "msgpack", seeds: &[("E_wire", ".msgpack")], run: decode },
    Target { name: "observation", seeds: &[("E_wire", ".msgpack")], run: observe },
    Target { name: "request", seeds: &[("I_requests", ".msgpack")], run: request },
    Target { name: "vla_eval", seeds: &[("H_vla_eval", ".msgpack")], run: vla_eval },
    Target { name: "pickle", seeds: &[("lerobot_grpc", ".pickle")], run: unpickle },
    Target { name: "jpeg", seeds: &[("G_images", ".jpg")], run: image },
    Target { name: "png", seeds: &[("G_images", ".png")], run: image },
    Target { name: "safetensors", seeds: &[("", ".safetensors")], run: safetensors_header },
    Target { name: "ocdbt_manifest", seeds: &[("", "manifest.ocdbt")], run: manifest },
    Target { name: "ocdbt_node", seeds: &[("", "/d/")], run: node },
    Target { name: "zarr", seeds: &[("", ".zarray")], run: zarr },
    Target {
        name: "norm_stats",
        seeds: &[("", "norm_stats.json"), ("", "no_quantiles.json")],
        run: stats,
    },
    Target { name: "tokenizer", seeds: &[("D_preprocess/tokenizer", ".model")], run: tokenizer },
    Target { name: "policy_toml", seeds: &[("../examples", ".toml")], run: toml },
];

/// The seed files of a target.
pub fn corpus(target: &Target) -> Result<Vec<Vec<u8>>> {
    let mut out = Vec::new();
    for (folder, ending) in target.seeds {
        let mut files = Vec::new();
        walk(&testdata().join(folder), 0, &mut files);
        files.sort();
        for file in files {
            let text = file.to_string_lossy();
            let wanted =
                if ending.ends_with('/') { text.contains(ending) } else { text.ends_with(ending) };
            if wanted && file.metadata().is_ok_and(|m| m.len() <= MAX_SEED) {
                out.push(std::fs::read(file)?);
            }
        }
    }
    if out.is_empty() {
        bail!("no seeds for {} under {}", target.name, testdata().display());
    }
    Ok(out)
}

fn walk(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && depth < 10 {
            walk(&path, depth + 1, files);
        } else if path.is_file() {
            files.push(path);
        }
    }
}

/// What decodes must encode, and decode again to the same.
fn decode(input: &[u8]) {
    let Ok(value) = msgpack::decode(&bytes::Bytes::copy_from_slice(input)) else { return };
    if let Ok(encoded) = msgpack::encode(&value) {
        let again = msgpack::decode(&encoded.into());
        // NaN is not equal to itself; the text form is.
        assert_eq!(again.map(|v| format!("{v:?}")).ok(), Some(format!("{value:?}")));
    }
}

/// What LeRobot's client sends; what is read is no larger than the limits say.
fn unpickle(input: &[u8]) {
    fn count(value: &Value) -> usize {
        1 + match value {
            Value::List(items) => items.iter().map(count).sum(),
            Value::Map(map) => map.iter().map(|(_, value)| count(value)).sum(),
            _ => 0,
        }
    }
    let limits = pickle::Limits::default();
    if let Ok(read) = pickle::read(&bytes::Bytes::copy_from_slice(input), &limits) {
        assert!(read.fields.iter().map(|(_, value)| count(value)).sum::<usize>() < limits.values);
    }
}

/// Every robot, no model.
fn policies() -> &'static [Policy] {
    static POLICIES: OnceLock<Vec<Policy>> = OnceLock::new();
    POLICIES.get_or_init(|| {
        let path = testdata().join("D_preprocess/tokenizer/tok_bpe.model");
        let tokenizer = Arc::new(Tokenizer::from_file(&path).expect("a fixture"));
        let policy = |name: &str| {
            let config = named(name).expect("a shipped policy");
            Policy::new(config, &NormStats::default(), tokenizer.clone(), 224).expect("it is sound")
        };
        ["pi05_droid", "pi0_libero", "pi0_aloha"].map(policy).into()
    })
}

/// A frame through a policy's input side.
fn observe(input: &[u8]) {
    if let Ok(value) = msgpack::decode(&bytes::Bytes::copy_from_slice(input)) {
        for policy in policies() {
            let _ = policy.prepare(&value);
        }
    }
}

/// The optional keys, batches and endpoints of a frame.
fn request(input: &[u8]) {
    if let Ok(Value::Map(map)) = msgpack::decode(&bytes::Bytes::copy_from_slice(input)) {
        let options = ServeOptions::default();
        if let Ok(count) = dialect::observations_of(map, &options) {
            assert!(count <= options.max_batch_observations);
        }
    }
    observe(input);
}

/// An envelope and the scene in it.
fn vla_eval(input: &[u8]) {
    let value = msgpack::decode(&bytes::Bytes::copy_from_slice(input));
    let Ok(Value::Map(map)) = value else { return };
    let Ok(envelope) = dialect::vla_eval::read(map) else { return };
    if let dialect::vla_eval::Kind::Observation(scene) = envelope.kind {
        for policy in policies() {
            let _ = policy.prepare_scene(Value::Map(scene.clone()));
        }
    }
}

/// The bytes of an image file. Sizes they claim must not be believed.
fn image(input: &[u8]) {
    let Some(encoding) = Encoding::of(input) else { return };
    if let Ok(decoded) = encoding.decode(input) {
        assert!(decoded.height * decoded.width <= MAX_PIXELS);
        assert_eq!(decoded.rgb.len(), decoded.height * decoded.width * 3);
    }
}

fn safetensors_header(input: &[u8]) {
    let _ = safetensors::parse_header(input);
}

fn manifest(input: &[u8]) {
    let _ = orbax::ocdbt::parse_manifest(input);
}

fn node(input: &[u8]) {
    let _ = orbax::ocdbt::parse_node(input, "d/");
}

fn zarr(input: &[u8]) {
    let _ = orbax::zarr::parse_zarray(input);
}

fn stats(input: &[u8]) {
    let _ = NormStats::from_json(input);
}

fn tokenizer(input: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_bytes(input) {
        let ids = tokenizer.encode("Task: pick up the red cup, State: 12 255;\nAction: ");
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.piece_count()));
    }
}

fn toml(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        let _ = from_toml(text);
    }
}
