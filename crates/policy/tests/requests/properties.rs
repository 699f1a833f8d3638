//! Random bytes and random values: an answer or an error, never a panic.

use crate::{policy, tokenizer};
use pirouette_policy::config::from_toml;
use pirouette_policy::prompt::{PromptFormat, clean, prompt_tokens};
use pirouette_policy::{NdArray, NormStats, Scalar, Tokenizer, Value};
use proptest::prelude::*;
use std::path::PathBuf;

fn model(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    std::fs::read(folder.join("D_preprocess/tokenizer").join(name)).unwrap()
}

fn array() -> impl Strategy<Value = Value> {
    let dtype = prop::sample::select(vec![
        Scalar::Bool,
        Scalar::U8,
        Scalar::I64,
        Scalar::F16,
        Scalar::F32,
        Scalar::F64,
        Scalar::Unicode(2),
        Scalar::Bytes(3),
    ]);
    let shape = prop::collection::vec(0usize..6, 0..4);
    let data = prop::collection::vec(any::<u8>(), 0..64);
    (dtype, shape, data, any::<bool>()).prop_map(|(dtype, shape, mut data, fits)| {
        if fits {
            data.resize(shape.iter().product::<usize>() * dtype.item_bytes(), 7);
        }
        Value::Array(NdArray { dtype, shape, data: data.into() })
    })
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::Bool),
        any::<i128>().prop_map(Value::Int),
        any::<f64>().prop_map(Value::Float),
        any::<String>().prop_map(Value::Str),
        array(),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::List),
            prop::collection::vec(("[a-z]{0,3}", inner), 0..4).prop_map(Value::Map),
        ]
    })
}

fn observation() -> impl Strategy<Value = Value> {
    let keys = prop::sample::select(vec![
        "observation/image",
        "observation/wrist_image",
        "observation/state",
        "observation/exterior_image_1_left",
        "observation/wrist_image_left",
        "observation/joint_position",
        "observation/gripper_position",
        "state",
        "images",
        "prompt",
    ]);
    prop::collection::vec((keys.prop_map(String::from), value()), 0..10).prop_map(Value::Map)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_models(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes) {
            tokenizer.encode("pick up");
        }
    }

    #[test]
    fn mutated_models(
        which in prop::sample::select(vec!["tok_bpe", "tok_bpe_nfkc", "tok_unigram"]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
        text in any::<String>(),
    ) {
        let mut bytes = model(&format!("{which}.model"));
        for (index, byte) in edits {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes) {
            let count = tokenizer.piece_count();
            for id in tokenizer.encode(&text) {
                prop_assert!((id as usize) < count);
            }
            tokenizer.encode("Task: fold the towel, State: 1 2 255;\nAction: ");
        }
    }

    #[test]
    fn mutated_statistics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let mut bytes = br#"{"norm_stats": {"state": {"mean": [1e3, NaN], "std": [2, -Infinity],
            "q01": null, "q99": [1.5, 0]}}}"#.to_vec();
        for (index, byte) in edits {
            let index = index.index(bytes.len());
            bytes[index] = byte;
        }
        let _ = NormStats::from_json(&bytes);
    }

    #[test]
    fn random_toml(text in any::<String>(), horizon in any::<i64>()) {
        let _ = from_toml(&text);
        let _ = from_toml(&format!(
            "name='x'\nfamily='pi0'\nhorizon={horizon}\nabsolute=[{}]\n[robot]\nkind='droid'",
            horizon as i32
        ));
    }

    #[test]
    fn random_prompts(text in any::<String>(), most in 0usize..100) {
        let tokenizer = tokenizer();
        for format in
            [PromptFormat::Instruction, PromptFormat::TaskAndState, PromptFormat::Lerobot]
        {
            let tokens = prompt_tokens(&tokenizer, format, &text, &[0.5, f64::NAN], most);
            prop_assert!(tokens.ids.len() <= most);
        }
        prop_assert!(!clean(&text).contains(['_', '\n']));
    }

    #[test]
    fn random_observations(observation in observation()) {
        for name in ["pi0_aloha", "pi05_droid", "pi0_libero"] {
            if let Err(error) = policy(name).prepare(&observation) {
                prop_assert!(error.wire_text().contains(error.exception()));
            }
        }
    }
}
