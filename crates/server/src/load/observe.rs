//! A server's contract card → an observation it accepts.

use pirouette_policy::{NdArray, Scalar, Value};
use serde_json::Value as Json;

use super::LoadError;

/// Most elements of one array: far above any camera.
const MAX_ELEMENTS: usize = 1 << 26;

/// Makes an observation from a contract card: images of `side` × `side` pixels, or `encoded`
/// (the bytes of a JPEG or PNG file) in their place; zeros for numbers; an instruction.
///
/// # Errors
/// When the card is not one.
pub fn observation_of(
    card: &str,
    side: usize,
    encoded: Option<&bytes::Bytes>,
) -> Result<Value, LoadError> {
    let wrong = |what: &str| LoadError::Contract(what.to_owned());
    let card: Json = serde_json::from_str(card).map_err(|e| wrong(&e.to_string()))?;
    let fields = card["observation"].as_array().ok_or_else(|| wrong("it lists no observation"))?;
    let mut root = Vec::new();
    for (index, field) in fields.iter().enumerate() {
        let path: Option<Vec<&str>> =
            field["path"].as_array().map(|keys| keys.iter().filter_map(Json::as_str).collect());
        let path = path.ok_or_else(|| wrong("a field has no path"))?;
        let extents = field["shape"].as_array().map(Vec::as_slice).unwrap_or_default();
        // An extent is a number or a name for any.
        let any = if field["kind"] == "numbers" { 1 } else { side };
        let extent = |e: &Json| e.as_str().and_then(|e| e.parse().ok()).unwrap_or(any);
        let shape: Vec<usize> = extents.iter().map(extent).collect();
        let count = shape.iter().try_fold(1usize, |n, e| n.checked_mul(*e));
        let count = count.filter(|n| *n <= MAX_ELEMENTS).ok_or_else(|| wrong("a field is huge"))?;
        let value = match (field["kind"].as_str(), encoded) {
            (Some("image"), Some(bytes)) => Value::Bytes(bytes.clone()),
            (Some("image"), None) => {
                let pixels: Vec<u8> = (0..count).map(|i| (i * 31 + index * 97) as u8).collect();
                Value::Array(NdArray { dtype: Scalar::U8, shape, data: pixels.into() })
            }
            (Some("numbers"), _) => {
                let data = vec![0u8; count * 4].into();
                Value::Array(NdArray { dtype: Scalar::F32, shape, data })
            }
            _ => Value::Str(card["prompt"]["default"].as_str().unwrap_or("do something").into()),
        };
        insert(&mut root, &path, value);
    }
    Ok(Value::Map(root))
}

fn insert(map: &mut Vec<(String, Value)>, path: &[&str], value: Value) {
    match path {
        [] => {}
        [key] => map.push(((*key).into(), value)),
        [key, inner @ ..] => {
            let at = map.iter().position(|(known, _)| known == key).unwrap_or_else(|| {
                map.push(((*key).into(), Value::Map(Vec::new())));
                map.len() - 1
            });
            if let Value::Map(nested) = &mut map[at].1 {
                insert(nested, inner, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pirouette_policy::config::named;
    use pirouette_policy::{NormStats, Policy, Tokenizer, contract};

    use super::*;

    #[test]
    fn every_shipped_policy_accepts_what_its_card_asks_for() {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/D_preprocess/tokenizer");
        let tokenizer = Tokenizer::from_file(&std::path::Path::new(root).join("tok_bpe.model"));
        let tokenizer = std::sync::Arc::new(tokenizer.unwrap());
        for name in ["pi0_aloha", "pi0_libero", "pi05_droid"] {
            let config = named(name).unwrap();
            let card = serde_json::to_string(&contract(&config)).unwrap();
            let observation = observation_of(&card, 32, None).unwrap();
            let policy =
                Policy::new(config, &NormStats::default(), tokenizer.clone(), 224).unwrap();
            policy.prepare(&observation).unwrap_or_else(|e| panic!("{name}: {}", e.message()));
        }
        let free = r#"{"observation": [{"path": ["q"], "kind": "numbers", "shape": ["n"]}]}"#;
        let free = observation_of(free, 32, None).unwrap();
        assert_eq!(free.get("q").and_then(Value::to_array).unwrap().shape, [1]);
        assert!(observation_of("{}", 32, None).is_err());
        let huge =
            r#"{"observation": [{"path": ["x"], "kind": "image", "shape": ["99999999999"]}]}"#;
        assert!(observation_of(huge, 32, None).is_err());
    }
}
