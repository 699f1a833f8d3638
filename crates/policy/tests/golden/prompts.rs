//! Tokens of odd prompts with three SentencePiece models, and the state's digits.

use crate::fixture;
use pirouette_policy::Tokenizer;
use pirouette_policy::prompt::{PromptFormat, clean, prompt_tokens, state_digits};
use serde_json::Value as Json;
use std::collections::HashMap;

fn floats(json: &Json) -> Vec<f64> {
    json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(json: &Json) -> Vec<u32> {
    serde_json::from_value(json.clone()).unwrap()
}

#[test]
fn every_case_of_every_model() {
    let file = fixture::json("D_preprocess/tokenizer/tokenizer_cases.json");
    let mut models = HashMap::new();
    let cases = file["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 189);
    for case in cases {
        let name = case["model"].as_str().unwrap();
        let tokenizer = models.entry(name).or_insert_with(|| {
            let path = format!("D_preprocess/tokenizer/{name}.model");
            Tokenizer::from_file(&fixture::path(&path)).unwrap()
        });
        assert_eq!(tokenizer.piece_count(), 1000);
        let prompt = case["prompt"].as_str().unwrap();
        let (format, state) = match case["state"].as_str().unwrap() {
            "none" => (PromptFormat::Instruction, vec![]),
            key => (PromptFormat::TaskAndState, floats(&file["states"][key]["values"])),
        };
        let what = format!("{name} {format:?} {prompt:?}");
        // The text itself, before any tokenizer.
        let text = case["texts_passed_to_sentencepiece"][0]["text"].as_str().unwrap();
        match format {
            PromptFormat::Instruction => assert_eq!(clean(prompt), text, "{what}"),
            _ => {
                let (task, digits) = (clean(prompt), state_digits(&state));
                assert_eq!(format!("Task: {task}, State: {digits};\nAction: "), text, "{what}");
            }
        }
        let most = case["max_len"].as_u64().unwrap() as usize;
        let whole = prompt_tokens(tokenizer, format, prompt, &state, usize::MAX);
        assert_eq!(whole.ids, ids(&case["untruncated_ids"]), "{what}");
        let cut = prompt_tokens(tokenizer, format, prompt, &state, most);
        assert_eq!(cut.ids.len(), case["n_valid"].as_u64().unwrap() as usize, "{what}");
        assert_eq!(cut.dropped > 0, case["truncated"].as_bool().unwrap(), "{what}");
        let mut padded = cut.ids;
        padded.resize(most, 0);
        assert_eq!(padded, ids(&case["tokens"]), "{what}");
    }
    assert_eq!(models.len(), 3);
}

#[test]
fn digits_at_every_edge() {
    let file = fixture::json("D_preprocess/tokenizer/state_strings.json");
    let file = file.as_object().unwrap();
    assert_eq!(file.len(), 8);
    for (name, case) in file {
        let state: Vec<f64> = case["bits_hex"]
            .as_array()
            .unwrap()
            .iter()
            .map(|hex| {
                // Little-endian bytes.
                let bits = u64::from_str_radix(hex.as_str().unwrap(), 16).unwrap().swap_bytes();
                match case["dtype"].as_str().unwrap() {
                    "float64" => f64::from_bits(bits),
                    _ => f64::from(f32::from_bits((bits >> 32) as u32)),
                }
            })
            .collect();
        let text = format!("Task: go, State: {};\nAction: ", state_digits(&state));
        assert_eq!(text, case["prompt_string"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn long_and_empty_prompts() {
    let path = fixture::path("D_preprocess/tokenizer/tok_bpe.model");
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    let tokens =
        |text: &str| prompt_tokens(&tokenizer, PromptFormat::TaskAndState, text, &[0.0; 8], 200);
    let long = tokens(&"pick up the red cup ".repeat(250));
    assert_eq!(long.ids.len(), 200);
    assert!(long.dropped > 1000, "{}", long.dropped);
    let short = tokens("pick up the red cup pick up the red cup");
    assert_eq!(long.ids[..10], short.ids[..10], "the head is kept");
    assert_eq!(tokens("").dropped, 0);
    let empty = prompt_tokens(&tokenizer, PromptFormat::Instruction, "", &[], 48);
    assert_eq!(empty.ids, [&[tokenizer.bos()][..], &tokenizer.encode("\n")].concat());
    assert!(tokenizer.encode("").is_empty());
}

#[test]
fn lerobots_instruction_keeps_its_form() {
    let path = fixture::path("D_preprocess/tokenizer/tok_bpe.model");
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    for text in ["  fold_the towel", "  fold_the towel\n"] {
        let tokens = prompt_tokens(&tokenizer, PromptFormat::Lerobot, text, &[], 48);
        assert_eq!(tokens.ids[0], tokenizer.bos());
        assert_eq!(tokens.ids[1..], tokenizer.encode("  fold_the towel\n"));
    }
}
