//! openpi JAX checkpoints: every layout of the same weights yields the same tensors, bit for bit.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use pirouette_checkpoint::orbax::Arrays;
use pirouette_checkpoint::{CheckpointError, Format, open};
use pirouette_model::{DType, Tensor, TensorSource};
use serde_json::Value;
use support::{fixture, golden, numbers, write_zarr};

fn rounded(v: f32) -> f32 {
    bf16::from_f32(v).to_f32()
}

/// Opens an Orbax tree of the tiny weights and compares all tensors with the safetensors file.
fn check_tree(dir: &Path) {
    let name = dir.file_name().unwrap().to_string_lossy().into_owned();
    let model = if name.contains("pi05") { "A_tiny/pi05" } else { "A_tiny/pi0" };
    let expected = open(&fixture(model)).unwrap();
    let found = open(dir).unwrap();
    assert_eq!(found.format, Format::OpenpiJax);
    assert_eq!(found.config, expected.config, "{name}");
    let round: &dyn Fn(f32) -> f32 = if name.contains("bf16") { &rounded } else { &|v| v };
    support::assert_same(&*found.source, &*expected.source, round);
}

#[test]
fn every_layout_yields_the_tiny_weights() {
    for name in [
        "ckpt_pi0_bf16",
        "ckpt_pi05_bf16",
        "ckpt_pi0_fp32_sharded4",
        "ckpt_pi0_fp32_noocdbt",
        "ckpt_pi0_fp32_plaindict",
    ] {
        check_tree(&fixture("B_jax").join(name));
    }
    let Some(golden) = golden() else { return println!("no golden folder: small set only") };
    for name in ["ckpt_pi0_fp32", "ckpt_pi05_fp32"] {
        check_tree(&golden.join("B_jax").join(name));
    }
}

#[test]
fn params_folder_opens_too() {
    let dir = fixture("B_jax/ckpt_pi0_bf16");
    let (whole, params) = (open(&dir).unwrap(), open(&dir.join("params")).unwrap());
    assert_eq!(whole.config, params.config);
    assert_eq!(params.root, dir);
    assert!(params.norm_stats("droid").is_ok());
    let folders = open(&fixture("B_jax/ckpt_pi0_fp32_noocdbt/params")).unwrap();
    assert_eq!(folders.config, whole.config);
}

#[test]
fn raw_arrays_match_their_recorded_summaries() {
    for name in ["ckpt_pi0_bf16", "ckpt_pi05_bf16", "ckpt_pi0_fp32_sharded4"] {
        let arrays = Arrays::open(&fixture("B_jax").join(name).join("params")).unwrap();
        let text = std::fs::read(fixture(&format!("B_jax/{name}.tensors.json"))).unwrap();
        let recorded: Value = serde_json::from_slice(&text).unwrap();
        let recorded = recorded.as_object().unwrap();
        assert_eq!(arrays.iter().count(), recorded.len());
        for (path, entry) in recorded {
            let (shape, values) = floats(&arrays, path);
            assert_eq!(serde_json::json!(shape), entry["shape"], "{path}");
            for (v, e) in values.iter().zip(entry["first4"].as_array().unwrap()) {
                assert_eq!(*v, e.as_f64().unwrap() as f32, "{path}");
            }
            let sum: f64 = values.iter().map(|v| f64::from(*v)).sum();
            let expected = entry["sum"].as_f64().unwrap();
            assert!((sum - expected).abs() <= 1e-6 * (1.0 + expected.abs()), "{path}: {sum}");
        }
    }
}

fn floats(arrays: &Arrays, path: &str) -> (Vec<usize>, Vec<f32>) {
    let shape = arrays.meta(path).unwrap_or_else(|| panic!("{path}")).shape.clone();
    let (dtype, bytes) = arrays.read(path).unwrap();
    let tensor = Tensor { shape: shape.clone(), dtype, data: bytes.into() };
    (shape, tensor.to_f32())
}

#[test]
fn both_small_trees_hold_the_expected_arrays() {
    let expected = support::read(&fixture("F_loader/orbax_expected_f32.safetensors"));
    for dir in ["orbax_release_style", "orbax_train_style/7"] {
        let arrays = Arrays::open(&fixture("F_loader").join(dir).join("params")).unwrap();
        let paths: Vec<&str> = arrays.iter().map(|(path, _)| path).collect();
        assert_eq!(paths, expected.keys().collect::<Vec<_>>(), "{dir}");
        for (path, stored) in &expected {
            let (shape, values) = floats(&arrays, path);
            assert_eq!(shape, stored.shape, "{dir} {path}");
            let bf16 = arrays.meta(path).unwrap().dtype == DType::Bf16;
            let wanted: Vec<f32> = stored
                .bytes
                .chunks(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .map(|v| if bf16 { rounded(v) } else { v })
                .collect();
            let differs = values.iter().zip(&wanted).position(|(v, w)| v != w);
            assert_eq!(differs, None, "{dir} {path}");
        }
    }
}

#[test]
fn a_part_of_a_model_is_refused() {
    let Err(e) = open(&fixture("F_loader/orbax_train_style/7")) else { panic!("opened") };
    assert!(e.to_string().contains("state_proj.weight"), "{e}");
}

#[test]
fn zarr3_is_refused() {
    let dir = fixture("B_jax/ckpt_pi0_fp32_zarr3");
    let copy = tempfile::tempdir().unwrap();
    support::copy(&dir, copy.path());
    let check = |dir: &Path| match open(dir) {
        Err(e @ CheckpointError::Unsupported { .. }) => {
            assert!(e.to_string().contains("use_zarr3=False"), "{e}");
        }
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("opened"),
    };
    check(&dir);
    // The data is not part of the fixture; without `_METADATA` the keys have to tell.
    std::fs::remove_file(copy.path().join("params/_METADATA")).unwrap();
    if let Some(golden) = golden() {
        let full = tempfile::tempdir().unwrap();
        support::copy(&golden.join("B_jax/ckpt_pi0_fp32_zarr3"), full.path());
        std::fs::remove_file(full.path().join("params/_METADATA")).unwrap();
        check(full.path());
    } else {
        assert!(open(copy.path()).is_err());
    }
}

#[test]
fn chunk_grids_edges_and_absent_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let shapes: [(&[usize], &[usize]); 6] = [
        (&[5], &[2]),
        (&[7, 6], &[7, 6]),
        (&[7, 6], &[3, 6]),
        (&[7, 6], &[7, 4]),
        (&[5, 4, 9], &[2, 3, 4]),
        (&[3, 4], &[5, 8]),
    ];
    for (i, (shape, chunks)) in shapes.into_iter().enumerate() {
        let values = numbers(i as u64, shape.iter().product());
        for zstd in [false, true] {
            let root = dir.path().join(format!("{i}{zstd}"));
            let path = root.join("params.a.b");
            write_zarr(&path, shape, chunks, &values, zstd, &|_| false);
            let arrays = Arrays::open(&root).unwrap();
            assert_eq!(floats(&arrays, "a/b"), (shape.to_vec(), values.clone()), "{shape:?}");

            std::fs::remove_dir_all(&path).unwrap();
            write_zarr(&path, shape, chunks, &values, zstd, &|index| index[0] == 0);
            let arrays = Arrays::open(&root).unwrap();
            let holes: Vec<f32> = (0..values.len())
                .map(|i| match support::unravel(i, shape)[0] < chunks[0] {
                    true => 0.0,
                    false => values[i],
                })
                .collect();
            assert_eq!(floats(&arrays, "a/b").1, holes, "{shape:?}");
        }
    }
}

/// A chunk that can't be read, or that the checkpoint says was written, is not the fill value.
#[cfg(unix)]
#[test]
fn lost_chunks_are_no_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let values = numbers(1, 42);
    let path = dir.path().join("params.a.b");
    write_zarr(&path, &[7, 6], &[3, 6], &values, false, &|_| false);
    let error = || Arrays::open(dir.path()).unwrap().read("a/b").unwrap_err().to_string();
    std::fs::remove_file(path.join("1.0")).unwrap();
    assert!(Arrays::open(dir.path()).unwrap().read("a/b").is_ok(), "the fill value");
    // Without one there is none to stand for it.
    let meta = std::fs::read_to_string(path.join(".zarray")).unwrap();
    let without = meta.replace(r#""fill_value":0.0"#, r#""fill_value":null"#);
    assert_ne!(meta, without);
    std::fs::write(path.join(".zarray"), without).unwrap();
    let lost = error();
    assert!(lost.contains("array `params.a.b`: chunk `1.0` is missing"), "{lost}");
    std::fs::write(path.join(".zarray"), meta).unwrap();
    let says = |stored: bool| format!(r#"{{"store_array_data_equal_to_fill_value": {stored}}}"#);
    std::fs::write(dir.path().join("_METADATA"), says(false)).unwrap();
    assert!(Arrays::open(dir.path()).unwrap().read("a/b").is_ok());
    std::fs::write(dir.path().join("_METADATA"), says(true)).unwrap();
    let lost = error();
    assert!(lost.contains("array `params.a.b`: chunk `1.0` is missing"), "{lost}");
    std::fs::remove_file(dir.path().join("_METADATA")).unwrap();
    std::os::unix::fs::symlink("nowhere", path.join("1.0")).unwrap();
    let dangling = error();
    assert!(dangling.contains("can't read") && dangling.contains("1.0"), "{dangling}");
}

/// Adds rank-3 factors beside every einsum of the tiny model and compares with the definition.
#[test]
fn lora_is_merged_as_defined() {
    let dir = tempfile::tempdir().unwrap();
    support::copy(&fixture("B_jax/ckpt_pi0_fp32_noocdbt"), dir.path());
    let params = dir.path().join("params");
    std::fs::remove_file(params.join("_METADATA")).unwrap();
    let base = Arrays::open(&params).unwrap();
    let mut factors = BTreeMap::new();
    for suffix in ["", "_1"] {
        let layers = "PaliGemma/llm/layers";
        for (path, a, b) in [
            (format!("{layers}/attn/q_einsum{suffix}/w"), "lora_a", "lora_b"),
            (format!("{layers}/attn/kv_einsum{suffix}/w"), "lora_a", "lora_b"),
            (format!("{layers}/attn/attn_vec_einsum{suffix}/w"), "lora_a", "lora_b"),
            (format!("{layers}/mlp{suffix}/gating_einsum"), "_lora_a", "_lora_b"),
            (format!("{layers}/mlp{suffix}/linear"), "_lora_a", "_lora_b"),
        ] {
            let stem = path.strip_suffix('w').unwrap_or(&path).to_string();
            let shape = &base.meta(&path).unwrap().shape;
            let (lead, matrix) = shape.split_at(shape.len() - 2);
            let mut pair = Vec::new();
            for (name, last) in [(a, [matrix[0], 3]), (b, [3, matrix[1]])] {
                let shape = [lead, &last].concat();
                let values = numbers(factors.len() as u64 + 7, shape.iter().product());
                let stored = format!("params/{stem}{name}").replace('/', ".");
                write_zarr(&params.join(stored), &shape, &shape, &values, true, &|_| false);
                pair.push((shape, values));
            }
            factors.insert(path, pair);
        }
    }
    let plain = open(&fixture("A_tiny/pi0")).unwrap();
    let merged = open(dir.path()).unwrap();
    assert_eq!(merged.config, plain.config);
    assert_eq!(merged.inspect().lora_merged.len(), 10);
    let mut changed = 0;
    for name in plain.source.names() {
        let before = plain.source.load(&name).unwrap();
        let after = merged.source.load(&name).unwrap();
        let delta = delta_of(&name, &before.shape, &factors);
        changed += usize::from(delta.is_some());
        let zeros = vec![0.0; before.len()];
        for (i, ((w, d), found)) in before
            .to_f32()
            .iter()
            .zip(delta.as_ref().unwrap_or(&zeros))
            .zip(after.to_f32())
            .enumerate()
        {
            let expected = f64::from(*w) + d;
            let error = (expected - f64::from(found)).abs();
            assert!(error <= 2e-6 * (1.0 + expected.abs()), "{name}[{i}]: {found} {expected}");
        }
    }
    assert_eq!(changed, 2 * 3 * 7);
}

type Pairs = BTreeMap<String, Vec<(Vec<usize>, Vec<f32>)>>;

/// ΔW of a canonical tensor in f64, element by element from the einsum definitions of model.md.
fn delta_of(name: &str, shape: &[usize], factors: &Pairs) -> Option<Vec<f64>> {
    let suffix = if name.contains("gemma_expert") { "_1" } else { "" };
    let layer: usize = name.split_once(".layers.")?.1.split('.').next()?.parse().ok()?;
    if name.contains("vision_tower") {
        return None;
    }
    let kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let kind = kinds.into_iter().find(|kind| name.contains(kind))?;
    let path = match kind {
        "q_proj" => format!("attn/q_einsum{suffix}/w"),
        "k_proj" | "v_proj" => format!("attn/kv_einsum{suffix}/w"),
        "o_proj" => format!("attn/attn_vec_einsum{suffix}/w"),
        "gate_proj" | "up_proj" => format!("mlp{suffix}/gating_einsum"),
        _ => format!("mlp{suffix}/linear"),
    };
    let pair = &factors[&format!("PaliGemma/llm/layers/{path}")];
    let get = |which: usize, index: &[usize]| -> f64 {
        let (shape, values) = &pair[which];
        f64::from(values[support::ravel(index, shape)])
    };
    let head = 16; // width of a tiny head
    let element = |out: usize, input: usize| -> f64 {
        (0..3)
            .map(|r| match kind {
                "q_proj" => {
                    let (n, h) = (out / head, out % head);
                    get(0, &[layer, n, input, r]) * get(1, &[layer, n, r, h])
                }
                "k_proj" => get(0, &[layer, 0, 0, input, r]) * get(1, &[layer, 0, 0, r, out]),
                "v_proj" => get(0, &[layer, 1, 0, input, r]) * get(1, &[layer, 1, 0, r, out]),
                "o_proj" => {
                    let (n, h) = (input / head, input % head);
                    let b: f64 = (0..4).map(|m| get(1, &[layer, m, r, out])).sum();
                    get(0, &[layer, n, h, r]) * b
                }
                "gate_proj" => get(0, &[layer, 0, input, r]) * get(1, &[layer, 0, r, out]),
                "up_proj" => get(0, &[layer, 1, input, r]) * get(1, &[layer, 1, r, out]),
                _ => get(0, &[layer, input, r]) * get(1, &[layer, r, out]),
            })
            .sum()
    };
    let (rows, cols) = (shape[0], shape[1]);
    Some((0..rows * cols).map(|i| element(i / cols, i % cols)).collect())
}

/// Each change of a folder tree, and what the error must say.
#[test]
fn wrong_arrays_are_named() {
    let llm = "params.PaliGemma.llm";
    let q = format!("{llm}.layers.attn.q_einsum.w");
    let kv = format!("{llm}.layers.attn.kv_einsum.w");
    let lora = format!("{llm}.layers.attn.q_einsum.lora_a");
    type Change<'a> = &'a dyn Fn(&Path);
    let array = |params: &Path, name: &str, shape: &[usize]| {
        let _ = std::fs::remove_dir_all(params.join(name));
        let values = vec![0.0; shape.iter().product()];
        write_zarr(&params.join(name), shape, shape, &values, false, &|_| false);
    };
    let cases: [(Change<'_>, &str); 8] = [
        (
            &|p| std::fs::remove_dir_all(p.join(&q)).unwrap(),
            "missing `PaliGemma/llm/layers/attn/q_einsum/w`",
        ),
        (
            &|p| {
                let name = "params.PaliGemma.img.Transformer.encoderblock.LayerNorm_1.scale";
                std::fs::remove_dir_all(p.join(name)).unwrap();
            },
            "missing `PaliGemma/img/Transformer/encoderblock/LayerNorm_1/scale`",
        ),
        (&|p| array(p, "params.debris", &[3]), "unexpected `debris`"),
        (&|p| array(p, &q, &[3, 4, 64]), "`PaliGemma/llm/layers/attn/q_einsum/w` has shape"),
        (&|p| array(p, &kv, &[3, 2, 2, 64, 16]), "whose number 2 has extent 1"),
        (
            &|p| array(p, &lora, &[3, 4, 64, 2]),
            "missing `PaliGemma/llm/layers/attn/q_einsum/lora_b`",
        ),
        (
            &|p| {
                array(p, &lora, &[3, 4, 64, 2]);
                array(p, &lora.replace("lora_a", "lora_b"), &[3, 4, 3, 16]);
            },
            "q_einsum/lora_b` has shape [3, 4, 3, 16], the rest of the model needs [3, 4, 2, 16]",
        ),
        (
            &|p| array(p, "params.state_proj.bias", &[31]),
            "`state_proj.bias, stored as state_proj/bias` has shape [31]",
        ),
    ];
    for (change, part) in cases {
        let dir = tempfile::tempdir().unwrap();
        support::copy(&fixture("B_jax/ckpt_pi0_fp32_noocdbt"), dir.path());
        change(&dir.path().join("params"));
        let Err(e) = open(dir.path()) else { panic!("opened: {part}") };
        assert!(e.to_string().contains(part), "{e}\nlacks {part}");
    }
}

/// A folder without arrays, or with two of one name, says what it is and what helps.
#[test]
fn trees_that_are_no_arrays_are_explained() {
    let error = |files: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join("params").join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        }
        open(dir.path()).map(drop).unwrap_err()
    };
    for (files, part, damaged) in [
        (&["params.a/zarr.json"][..], "use_zarr3=False", false),
        (&["ocdbt.process_0/manifest.ocdbt"], "the save was not finished", true),
        (&["checkpoint", "_METADATA"], "without `aggregate`", false),
        (&["_METADATA"], "no zarr array", true),
        (&["params/manifest.ocdbt"], "one level deeper, open", false),
    ] {
        let e = error(files);
        assert!(e.to_string().contains(part), "{e}\nlacks {part}");
        assert_eq!(matches!(e, CheckpointError::Damaged { .. }), damaged, "{e}");
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["a.b", "params.a.b"] {
        write_zarr(&dir.path().join(name), &[2], &[2], &[1.0, 2.0], true, &|_| false);
    }
    let text = Arrays::open(dir.path()).map(drop).unwrap_err().to_string();
    assert!(text.contains("`a.b` and `params.a.b` are both `a/b`"), "{text}");
}

/// What is not read is not called damaged: another copy of the same would not help.
#[test]
fn unread_arrays_are_not_damaged_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("params.a/.zarray");
    write_zarr(path.parent().unwrap(), &[2], &[2], &[1.0, 2.0], true, &|_| false);
    let good = std::fs::read_to_string(&path).unwrap();
    for (from, to) in [("<f4", "<f8"), ("<f4", "<i4"), ("zstd", "blosc"), (r#""C""#, r#""F""#)] {
        std::fs::write(&path, good.replace(from, to)).unwrap();
        let e = Arrays::open(dir.path()).map(drop).unwrap_err();
        assert!(matches!(e, CheckpointError::Unsupported { .. }), "{e}");
        let text = e.to_string();
        assert!(text.contains("array `params.a`") && text.contains("save the weights"), "{text}");
    }
}

#[test]
fn unread_kinds_of_zarr_are_named() {
    let good = serde_json::json!({
        "zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "<f4", "order": "C",
        "compressor": null, "filters": null, "fill_value": null, "dimension_separator": ".",
    });
    let cases = [
        ("zarr_format", serde_json::json!(3), "zarr_format 3"),
        ("dtype", serde_json::json!("<f8"), "<f8"),
        ("dtype", serde_json::json!(">f4"), ">f4"),
        ("order", serde_json::json!("F"), "order"),
        ("compressor", serde_json::json!({"id": "blosc"}), "blosc"),
        ("filters", serde_json::json!([{"id": "delta"}]), "filters"),
        ("chunks", serde_json::json!([2, 2]), "chunks [2, 2]"),
        ("chunks", serde_json::json!([0]), "`chunks` [0]"),
        ("shape", serde_json::json!([-1]), "`shape` [-1]"),
        ("fill_value", serde_json::json!("x"), "fill_value"),
    ];
    assert!(pirouette_checkpoint::orbax::zarr::parse_zarray(good.to_string().as_bytes()).is_ok());
    for (key, value, part) in cases {
        let mut json = good.clone();
        json[key] = value;
        let text = json.to_string();
        let e = pirouette_checkpoint::orbax::zarr::parse_zarray(text.as_bytes()).unwrap_err();
        assert!(e.to_string().contains(part), "{e}\nlacks {part}");
    }
    for (text, wanted) in [("NaN", f64::NAN), ("-Infinity", f64::NEG_INFINITY)] {
        let mut json = good.clone();
        json["fill_value"] = text.into();
        let meta = pirouette_checkpoint::orbax::zarr::parse_zarray(json.to_string().as_bytes());
        assert_eq!(meta.unwrap().fill.map(f64::to_bits), Some(wanted.to_bits()));
    }
    let mut json = good.clone();
    json["chunks"] = serde_json::json!([16777216]); // 64 MiB
    assert!(pirouette_checkpoint::orbax::zarr::parse_zarray(json.to_string().as_bytes()).is_ok());
    (json["shape"], json["chunks"]) = (serde_json::json!([2, 2]), serde_json::json!([5000, 5000]));
    let e = pirouette_checkpoint::orbax::zarr::parse_zarray(json.to_string().as_bytes());
    let e = e.unwrap_err().to_string();
    assert!(e.contains("chunks [5000, 5000] for shape [2, 2]"), "{e}");
    let huge = r#"{"zarr_format":2,"shape":[16777216,16777216,16777216],"chunks":[1,1,1],
        "dtype":"<f4","order":"C","compressor":null}"#;
    let e = pirouette_checkpoint::orbax::zarr::parse_zarray(huge.as_bytes()).unwrap_err();
    assert!(e.to_string().contains("exceeds 16 GiB"), "{e}");
}

/// Loads from several threads at once agree with loads in sequence.
#[test]
fn loading_threads_share_decoded_arrays() {
    use rayon::prelude::*;
    let dir = fixture("B_jax/ckpt_pi0_fp32_sharded4");
    let source: Box<dyn TensorSource> = open(&dir).unwrap().source;
    let expected = open(&fixture("A_tiny/pi0")).unwrap().source;
    let names = source.names();
    (0..4).into_par_iter().for_each(|turn| {
        names.par_iter().for_each(|name| {
            let (a, b) = (source.load(name).unwrap(), expected.load(name).unwrap());
            assert_eq!(a.data, b.data, "{name} turn {turn}");
        });
    });
}
