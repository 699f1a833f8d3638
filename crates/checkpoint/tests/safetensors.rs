//! openpi PyTorch checkpoints: every tensor used or named.

mod support;

use std::path::Path;

use pirouette_checkpoint::names::openpi_torch::{EXPERT_HEAD, LM_HEAD};
use pirouette_checkpoint::{CheckpointError, Format, expected_tensors, open, open_fixture};
use pirouette_model::config::{Gemma, Vision, names};
use pirouette_model::{Config, DType, Family};
use support::{Stored, Tensors, encode, file_of, fixture, folder, read};

fn tiny(family: Family) -> Config {
    Config {
        family,
        vision: Vision { width: 48, depth: 2, mlp: 96, heads: 4, patch: 14, image: 56 },
        prefix: Gemma { width: 64, mlp: 128 },
        expert: Gemma { width: 32, mlp: 64 },
        depth: 3,
        heads: 4,
        head_dim: 16,
        vocab: 512,
        action_dim: 32,
        rope_bf16: false,
        rtc_max_delay: 0,
    }
}

fn error(result: Result<pirouette_checkpoint::Checkpoint, CheckpointError>) -> String {
    match result {
        Ok(_) => panic!("opened"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn tiny_models_open_with_every_tensor() {
    for (dir, family) in [("A_tiny/pi0", Family::Pi0), ("A_tiny/pi05", Family::Pi05)] {
        let checkpoint = open(&fixture(dir)).unwrap();
        assert_eq!(checkpoint.format, Format::OpenpiTorch);
        assert_eq!(checkpoint.config, tiny(family));
        let mut expected: Vec<String> =
            expected_tensors(&checkpoint.config).into_iter().map(|t| t.name).collect();
        expected.sort();
        assert_eq!(checkpoint.source.names(), expected);
        let stored = read(&fixture(dir).join("model.safetensors"));
        assert_eq!(stored.len(), expected.len() + 1, "the expert's head is the only other tensor");
        for name in expected {
            let tensor = checkpoint.source.load(&name).unwrap();
            let key = if name == names::EMBED { LM_HEAD } else { &name };
            assert_eq!(tensor.data, stored[key].bytes, "{name}");
            assert_eq!(tensor.dtype, DType::F32);
        }
        assert!(checkpoint.source.load(EXPERT_HEAD).is_err());
        let file = fixture(dir).join("model.safetensors");
        assert_eq!(open(&file).unwrap().config, checkpoint.config);
    }
}

#[test]
fn loader_fixtures_record_their_vision_heads() {
    for name in ["tiny_pi0", "tiny_pi05"] {
        let path = fixture(&format!("F_loader/{name}.safetensors"));
        let checkpoint = open_fixture(&path, &["input.", "expected."]).unwrap();
        assert_eq!(checkpoint.config.vision.heads, 2);
        assert_eq!(checkpoint.config.vision.image, 28);
        assert_eq!(checkpoint.config.action_dim, 6);
        let text = error(open(&path));
        assert!(text.contains("unexpected `expected.") && !text.contains("has type"), "{text}");
    }
}

#[test]
fn token_table_under_either_name() {
    let base = read(&fixture("A_tiny/pi0/model.safetensors"));
    let table = base[LM_HEAD].clone();

    let mut renamed = base.clone();
    renamed.remove(LM_HEAD);
    renamed.insert(names::EMBED.into(), table.clone());
    let dir = folder(&renamed);
    assert_eq!(open(dir.path()).unwrap().source.load(names::EMBED).unwrap().data, table.bytes);

    let mut both = renamed.clone();
    both.insert(LM_HEAD.into(), Stored::zeros(&table.shape));
    let dir = folder(&both);
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.source.load(names::EMBED).unwrap().data, table.bytes);
    assert!(checkpoint.inspect().skipped.iter().any(|s| s.name == LM_HEAD));

    let mut neither = base;
    neither.remove(LM_HEAD);
    let text = error(open(folder(&neither).path()));
    assert!(text.contains(names::EMBED), "{text}");
}

#[test]
fn shards_of_an_index_are_one_checkpoint() {
    let base = read(&fixture("A_tiny/pi05/model.safetensors"));
    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    for shard in 0..3 {
        let part: Tensors = base
            .iter()
            .enumerate()
            .filter(|(i, _)| i % 3 == shard)
            .map(|(_, (name, t))| (name.clone(), t.clone()))
            .collect();
        let file = format!("model-0000{}-of-00003.safetensors", shard + 1);
        std::fs::write(dir.path().join(&file), encode(&part, &[])).unwrap();
        map.extend(part.keys().map(|name| (name.clone(), file.clone().into())));
    }
    let write = |map: &serde_json::Map<String, serde_json::Value>| {
        let index = serde_json::json!({"metadata": {}, "weight_map": map});
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    };
    write(&map);
    let whole = open(&fixture("A_tiny/pi05")).unwrap();
    let sharded = open(dir.path()).unwrap();
    support::assert_same(&*sharded.source, &*whole.source, &|v| v);

    let mut wrong = map.clone();
    wrong.insert("nowhere.weight".into(), "model-00001-of-00003.safetensors".into());
    write(&wrong);
    assert!(error(open(dir.path())).contains("missing `nowhere.weight`"));
    map.insert("state".into(), "../model.safetensors".into());
    write(&map);
    assert!(error(open(dir.path())).contains("no plain file name"));
    map.insert("state".into(), "model-00004-of-00003.safetensors".into());
    write(&map);
    let missing = error(open(dir.path()));
    assert!(missing.contains("its shard `model-00004-of-00003.safetensors` is missing; copy"));
}

#[test]
fn of_a_training_run_the_last_step_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for step in ["000900", "001000"] {
        let folder = dir.path().join(step).join("pretrained_model");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(fixture("A_tiny/pi0/model.safetensors"), folder.join("model.safetensors"))
            .unwrap();
    }
    let error = error(open(dir.path()));
    assert!(error.ends_with(&dir.path().join("001000").display().to_string()), "{error}");
    assert!(open(&dir.path().join("001000")).is_ok());
}

#[test]
fn f16_and_bf16_are_served_as_stored() {
    let mut tensors = read(&fixture("A_tiny/pi0/model.safetensors"));
    let name = "action_in_proj.weight";
    for (dtype, bytes, value) in [("BF16", [0x80, 0x3f], 1.0), ("F16", [0x00, 0x3c], 1.0f32)] {
        let t = tensors.get_mut(name).unwrap();
        let n: usize = t.shape.iter().product();
        *t = Stored { dtype, shape: t.shape.clone(), bytes: bytes.repeat(n) };
        let dir = folder(&tensors);
        let checkpoint = open(dir.path()).unwrap();
        let loaded = checkpoint.source.load(name).unwrap();
        assert_ne!(loaded.dtype, DType::F32);
        assert_eq!(loaded.to_f32(), vec![value; n]);
        assert_eq!(checkpoint.inspect().types[dtype].tensors, 1);
    }
}

/// Each change of the tiny model, and what the error must say.
#[test]
fn wrong_tensors_are_named() {
    let base = read(&fixture("A_tiny/pi0/model.safetensors"));
    let q1 = format!("{}layers.1.self_attn.q_proj.weight", names::PREFIX);
    let gate = format!("{}layers.2.mlp.gate_proj.weight", names::EXPERT);
    let fc1 = format!("{}encoder.layers.0.mlp.fc1.weight", names::VISION);
    type Change<'a> = Box<dyn Fn(&mut Tensors) + 'a>;
    let remove = |name: &str| -> Change<'_> {
        let name = name.to_string();
        Box::new(move |t| drop(t.remove(&name).unwrap()))
    };
    let put = |name: &str, stored: Stored| -> Change<'_> {
        let name = name.to_string();
        Box::new(move |t| drop(t.insert(name.clone(), stored.clone())))
    };
    let integers = Stored { dtype: "I64", shape: vec![32], bytes: vec![0; 256] };
    let cases: Vec<(Change<'_>, Vec<String>)> = vec![
        (remove("action_out_proj.bias"), vec!["missing `action_out_proj.bias`".into()]),
        (remove(&q1), vec![format!("missing `{q1}`")]),
        (remove(&gate), vec![format!("missing `{gate}`")]),
        (remove(&fc1), vec![format!("missing `{fc1}`")]),
        (remove("state_proj.weight"), vec!["state_proj.weight".into(), "missing".into()]),
        (put("debris", Stored::zeros(&[1])), vec!["unexpected `debris`".into()]),
        (put("counter", integers.clone()), vec!["unexpected `counter`".into()]),
        (
            put(&gate, Stored::zeros(&[64, 31])),
            vec![format!("`{gate}` has shape [64, 31], the rest of the model needs [64, 32]")],
        ),
        (put("action_in_proj.bias", integers), vec!["`action_in_proj.bias` has type I64".into()]),
        (
            put("state_proj.bias", Stored::zeros(&[1 << 25])),
            vec!["`state_proj.bias` has shape [33554432]".into()],
        ),
    ];
    for (change, parts) in cases {
        let mut tensors = base.clone();
        change(&mut tensors);
        let dir = folder(&tensors);
        let text = error(open(dir.path()));
        for part in parts {
            assert!(text.contains(&part), "{text}\nlacks {part}");
        }
    }
}

/// A checkpoint of these sizes, all of it zeros that take no room on the disk.
fn zeros(config: &Config) -> tempfile::TempDir {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for tensor in expected_tensors(config) {
        let begin = end;
        end += 2 * tensor.elements();
        let offsets = [begin, end];
        let entry = serde_json::json!(
            {"dtype": "BF16", "shape": tensor.shape, "data_offsets": offsets}
        );
        header.insert(tensor.name, entry);
    }
    let bytes = file_of(&serde_json::to_string(&header).unwrap(), &[]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::write(&path, &bytes).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(bytes.len() as u64 + end).unwrap();
    dir
}

/// A tower as wide as the released ones is as deep as they are.
#[test]
fn layers_lost_at_the_end_of_a_tower_are_missed() {
    let wide = |vision: bool, prefix: bool, expert: bool, depth: usize| {
        let mut config = tiny(Family::Pi05);
        config.depth = depth;
        if vision {
            config.vision = Vision { width: 1152, depth: depth + 9, heads: 16, ..config.vision };
        }
        config.prefix.width = if prefix { 2048 } else { 64 };
        config.expert.width = if expert { 1024 } else { 32 };
        config
    };
    let whole = wide(true, true, true, 18);
    assert_eq!(open(zeros(&whole).path()).unwrap().config, whole);
    for (config, prefix, last) in [
        (wide(true, false, false, 17), format!("{}encoder.layers.", names::VISION), "1 of the 27"),
        (wide(false, true, false, 16), format!("{}layers.", names::PREFIX), "2 of the 18"),
        (wide(false, false, true, 17), format!("{}layers.", names::EXPERT), "1 of the 18"),
    ] {
        let text = error(open(zeros(&config).path()));
        let says = format!("\n  missing the last {last} layers `{prefix}*`");
        assert!(text.ends_with(&says), "{text}\nlacks {says}");
    }
    let mut tensors = read(&fixture("A_tiny/pi0/model.safetensors"));
    tensors.retain(|name, _| !name.starts_with(&format!("{}layers.2.", names::PREFIX)));
    let text = error(open(folder(&tensors).path()));
    let says = "2 prefix layers but 3 expert layers: the last layers of one of them are missing";
    assert!(text.contains(says) && text.contains("download"), "{text}");
}

#[test]
fn a_long_list_is_cut_and_counted() {
    let mut tensors = read(&fixture("A_tiny/pi0/model.safetensors"));
    for i in 0..25 {
        tensors.insert(format!("debris.{i:02}"), Stored::zeros(&[1]));
    }
    let dir = folder(&tensors);
    let Err(CheckpointError::Tensors { mismatches, .. }) = open(dir.path()) else {
        panic!("opened");
    };
    assert_eq!(mismatches.len(), 25);
    let text = error(open(dir.path()));
    assert!(text.contains("debris.09") && !text.contains("debris.10"), "{text}");
    assert!(text.contains("25 in all"), "{text}");
}

#[test]
fn damaged_headers_are_described() {
    let entry = |shape: &str, offsets: &str| {
        format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    let good = file_of(&entry("[2]", "[0,8]"), &[0; 8]);
    let mut long = good.clone();
    long[7] = 1;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "0 bytes are no safetensors file"),
        (long, "header claims"),
        (good[..20].to_vec(), "the file ends after"),
        (good[..good.len() - 1].to_vec(), "reach outside the file"),
        ([&good[..], &[0]].concat(), "its tensors end at"),
        (file_of("[]", &[]), "not a JSON object"),
        (file_of(&"[".repeat(4000), &[]), "not a JSON object"),
        (file_of(&entry("[3]", "[0,8]"), &[0; 8]), "which needs 12"),
        (file_of(&entry("[2]", "[8,0]"), &[0; 8]), "reach outside"),
        (file_of(&entry("[-2]", "[0,8]"), &[0; 8]), "extent -2"),
        (file_of(&entry("[4611686018427387904,16]", "[0,8]"), &[0; 8]), "overflows"),
        (file_of(&entry("[1,1,1,1,1,1,1,1,2]", "[0,8]"), &[0; 8]), "9 axes"),
        (file_of(r#"{"t":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]), "F33"),
        (file_of(r#"{"t":{"shape":[2],"data_offsets":[0,8]}}"#, &[0; 8]), "no `dtype`"),
        (file_of(r#"{"t":7}"#, &[]), "tensor `t`"),
        (file_of(r#"{"__metadata__":{"a":1}}"#, &[]), "__metadata__"),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for (bytes, part) in cases {
        std::fs::write(&path, &bytes).unwrap();
        let text = error(open(dir.path()));
        assert!(text.contains(part), "{text}\nlacks {part}");
        assert!(text.contains("model.safetensors"), "{text}");
    }
}

#[test]
fn other_paths_get_a_hint() {
    assert!(error(open(Path::new("/nonexistent/x"))).contains("/nonexistent/x"));
    assert!(error(open(&fixture("A_tiny/pi0/config.json"))).contains("some other file"));
    assert!(error(open(&fixture("A_tiny"))).contains("not a checkpoint"));
    let run = tempfile::tempdir().unwrap();
    for step in ["900", "10000"] {
        support::copy(&fixture("F_loader/orbax_train_style/7"), &run.path().join(step));
    }
    let text = error(open(run.path()));
    assert!(text.contains("one of its steps") && text.contains("/10000"), "{text}");
}

#[cfg(unix)]
#[test]
fn only_regular_files_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        let path = dir.path().join(name);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let text = error(open(dir.path()));
        let says = format!("can't read {}: not a regular file", path.display());
        assert!(text.contains(&says), "{text}");
        drop(listener);
        std::fs::remove_file(path).unwrap();
    }
    let endless = pirouette_checkpoint::NormStatsFile::at(Path::new("/dev/zero"), None);
    assert!(endless.unwrap_err().to_string().ends_with("/dev/zero: not a regular file"));
}
