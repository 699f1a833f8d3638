//! The codec against what openpi's own packer wrote.

use std::path::PathBuf;

use bytes::Bytes;
use pirouette_policy::Value;
use pirouette_server::msgpack::{decode, encode};
use serde_json::Value as Json;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/E_wire/msgpack")
}

fn cases() -> Vec<String> {
    let index = std::fs::read(folder().join("index.json")).unwrap();
    let index: Json = serde_json::from_slice(&index).unwrap();
    index.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap().into()).collect()
}

fn bytes(case: &str) -> Bytes {
    std::fs::read(folder().join(format!("{case}.msgpack"))).unwrap().into()
}

fn hex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digit).collect()
}

fn has_big_endian(json: &Json) -> bool {
    match json {
        Json::Object(map) => map.values().any(has_big_endian),
        Json::Array(items) => items.iter().any(has_big_endian),
        Json::String(text) => text.starts_with(">"),
        _ => false,
    }
}

/// Whether a decoded value is the one described.
fn check(path: &str, want: &Json, got: &Value) {
    let text = |key: &str| want[key].as_str().unwrap();
    match (text("kind"), got) {
        ("nil", Value::Nil) => {}
        ("bool", Value::Bool(b)) => assert_eq!(want["value"].as_bool(), Some(*b), "{path}"),
        ("int", Value::Int(n)) => assert_eq!(want["value"].to_string(), n.to_string(), "{path}"),
        ("float", Value::Float(v)) => {
            let want: f64 = text("value").parse().unwrap();
            // A float64 NumPy scalar and a nan keep their bits.
            assert!(want.to_bits() == v.to_bits() || want.is_nan() && v.is_nan(), "{path}: {v}");
        }
        ("str", Value::Str(s)) => assert_eq!(text("value"), s, "{path}"),
        ("bytes", Value::Bytes(b)) => assert_eq!(hex(text("hex")), b[..], "{path}"),
        ("array", Value::List(items)) => {
            let want = want["items"].as_array().unwrap();
            assert_eq!(want.len(), items.len(), "{path}");
            for (i, (w, g)) in want.iter().zip(items).enumerate() {
                check(&format!("{path}[{i}]"), w, g);
            }
        }
        ("map", Value::Map(entries)) => {
            let want = want["items"].as_array().unwrap();
            assert_eq!(want.len(), entries.len(), "{path}");
            for (w, (key, g)) in want.iter().zip(entries) {
                assert_eq!(w[0]["value"].as_str().unwrap(), key, "{path}");
                check(&format!("{path}.{key}"), &w[1], g);
            }
        }
        ("ndarray", Value::Array(array)) => {
            let shape: Vec<usize> = serde_json::from_value(want["shape"].clone()).unwrap();
            assert_eq!(shape, array.shape, "{path}");
            let mut data = hex(text("data_hex"));
            if text("dtype") == ">f4" {
                data.chunks_exact_mut(4).for_each(|c| c.reverse());
            }
            assert_eq!(data, array.data[..], "{path}");
            let packed = encode(got).unwrap();
            let dtype = text("dtype").replace('>', "<");
            assert!(packed.windows(dtype.len()).any(|w| w == dtype.as_bytes()), "{path}: {dtype}");
        }
        ("npgeneric", Value::Scalar(_, value)) => {
            let want = text("value");
            match &**value {
                Value::Bool(b) => assert_eq!(want, if *b { "True" } else { "False" }, "{path}"),
                Value::Int(n) => assert_eq!(want, n.to_string(), "{path}"),
                Value::Float(v) => {
                    let want: f64 = want.parse().unwrap();
                    assert!(want == *v || want.is_nan() && v.is_nan(), "{path}: {v}");
                }
                other => panic!("{path}: {other:?}"),
            }
        }
        (kind, got) => panic!("{path}: {kind} expected, got {got:?}"),
    }
}

#[test]
fn every_case_decodes_to_what_python_decodes_and_back_to_the_same_bytes() {
    let mut swapped = 0;
    let cases = cases();
    assert_eq!(cases.len(), 16);
    for case in cases {
        let packed = bytes(&case);
        let value = decode(&packed).unwrap_or_else(|e| panic!("{case}: {e}"));
        let mut big_endian = false;
        if let Ok(text) = std::fs::read(folder().join(format!("{case}.json"))) {
            let json: Json = serde_json::from_slice(&text).unwrap();
            check(&case, &json["value_decoded"], &value);
            big_endian = has_big_endian(&json["value_decoded"]);
        }
        let again = encode(&value).unwrap();
        if big_endian {
            // The one thing that is normalised: arrays leave in little-endian order.
            swapped += 1;
            assert_eq!(again.len(), packed.len());
            assert_eq!(decode(&again.into()).unwrap(), value);
        } else {
            assert!(again == packed[..], "{case}: {} bytes differ", again.len());
        }
    }
    assert_eq!(swapped, 1);
}

#[test]
fn a_big_image_stays_in_its_frame() {
    let packed = bytes("big_image");
    let range = packed.as_ptr_range();
    fn arrays<'a>(value: &'a Value, found: &mut Vec<&'a Bytes>) {
        match value {
            Value::Array(a) => found.push(&a.data),
            Value::Map(m) => m.iter().for_each(|(_, v)| arrays(v, found)),
            _ => {}
        }
    }
    let value = decode(&packed).unwrap();
    let mut found = Vec::new();
    arrays(&value, &mut found);
    assert!(!found.is_empty());
    for data in found {
        assert!(range.contains(&data.as_ptr()), "no copy");
    }
}

#[test]
fn errors_are_pythons() {
    let text = std::fs::read(folder().join("errors_and_edges.json")).unwrap();
    let recorded: Json = serde_json::from_slice(&text).unwrap();
    let key = &recorded["non_string_key"];
    let error = decode(&hex(key["pack_hex"].as_str().unwrap()).into()).unwrap_err();
    assert_eq!(error.python_type(), key["type"].as_str().unwrap());
    assert!(error.to_string().starts_with(key["text"].as_str().unwrap()), "{error}");
    let too_big = encode(&Value::Int(1 << 64)).unwrap_err();
    assert_eq!(recorded["int_too_big"]["type"], "OverflowError");
    assert!(too_big.to_string().contains("18446744073709551616"));
}
