//! vla-eval's envelopes ↔ maps: `{type, payload, seq, timestamp}`, protocol version 1.
//!
//! Arrays are maps tagged with the str key `__ndarray__`, images with `__image__` (raw, PNG or
//! JPEG). Observations become `images`, `task_description` and `states` or `state`; the policy
//! turns those into its robot's keys. A chunk is handed out one action per observation, as
//! vla-eval's own servers do.

use std::collections::VecDeque;
use std::time::{Instant, UNIX_EPOCH};

use pirouette_policy::{NdArray, Value};

use crate::msgpack;
use crate::service::{RequestContext, ServiceError};

/// The version of the protocol spoken here.
const PROTOCOL_VERSION: i128 = 1;

/// A message of a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// What it says.
    pub kind: Kind,
    /// Its number; an answer repeats it.
    pub seq: i128,
}

/// What a client says.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// The first message; answered with what the server is.
    Hello,
    /// A new episode: what is left of a chunk is dropped. Not answered.
    EpisodeStart,
    /// Answered with an action.
    Observation(Vec<(String, Value)>),
    /// Not answered.
    EpisodeEnd,
    /// An error of the client, or a message only servers send: not answered.
    Other,
}

/// Whether a map is a client's first message. openpi's observations have no such keys.
pub(crate) fn is_hello(map: &[(String, Value)]) -> bool {
    let kind = get(map, "type");
    matches!(kind, Some(Value::Str(kind)) if kind == "hello")
        && matches!(get(map, "payload"), Some(Value::Map(_)))
        && get(map, "seq").is_some()
}

fn get<'a>(map: &'a [(String, Value)], key: &str) -> Option<&'a Value> {
    map.iter().find(|(known, _)| known == key).map(|(_, value)| value)
}

/// Reads a message.
///
/// # Errors
/// It is no envelope, or an array or image in it is broken.
pub fn read(mut map: Vec<(String, Value)>) -> Result<Envelope, ServiceError> {
    let wrong = |message: String| ServiceError::exception("ValueError", message);
    let required = ["type", "payload", "seq", "timestamp"];
    let missing: Vec<&str> = required.into_iter().filter(|k| get(&map, k).is_none()).collect();
    if !missing.is_empty() {
        return Err(wrong(format!("Message missing required fields: {missing:?}")));
    }
    let Some(Value::Int(seq)) = get(&map, "seq") else {
        return Err(wrong("`seq` must be an integer".into()));
    };
    let seq = *seq;
    let Some(Value::Str(kind)) = get(&map, "type").cloned() else {
        return Err(wrong("`type` must be a string".into()));
    };
    let payload = map.iter_mut().find(|(key, _)| key == "payload");
    let Some(Value::Map(payload)) = payload.map(|(_, v)| std::mem::replace(v, Value::Nil)) else {
        return Err(wrong("`payload` must be a map".into()));
    };
    let kind = match kind.as_str() {
        "hello" => Kind::Hello,
        "episode_start" => Kind::EpisodeStart,
        "episode_end" => Kind::EpisodeEnd,
        "action" | "error" => Kind::Other,
        "observation" => {
            let untagged = payload.into_iter().map(|(key, value)| {
                let value = untag(value).map_err(|why| wrong(format!("`{key}`: {why}")))?;
                Ok((key, value))
            });
            Kind::Observation(untagged.collect::<Result<_, ServiceError>>()?)
        }
        other => {
            let shown: String = other.chars().take(40).collect();
            return Err(wrong(format!("Unknown message type: '{shown}'")));
        }
    };
    Ok(Envelope { kind, seq })
}

/// Arrays and images out of their tagged maps; an encoded image becomes its bytes, to be decoded
/// where images are. Nesting is bounded by the decoder.
fn untag(value: Value) -> Result<Value, String> {
    match value {
        Value::Map(map) if get(&map, "__image__").is_some() => image(&map),
        Value::Map(map) if get(&map, "__ndarray__").is_some() => array(&map),
        Value::Map(map) => {
            let entries = map.into_iter().map(|(key, value)| Ok((key, untag(value)?)));
            Ok(Value::Map(entries.collect::<Result<_, String>>()?))
        }
        Value::List(items) => {
            Ok(Value::List(items.into_iter().map(untag).collect::<Result<_, String>>()?))
        }
        other => Ok(other),
    }
}

fn array(map: &[(String, Value)]) -> Result<Value, String> {
    msgpack::array(get(map, "data"), get(map, "dtype"), get(map, "shape"))
}

fn image(map: &[(String, Value)]) -> Result<Value, String> {
    match (get(map, "format"), get(map, "data")) {
        (Some(Value::Str(format)), _) if format == "raw" => array(map),
        (Some(Value::Str(format)), Some(Value::Bytes(data)))
            if format == "png" || format == "jpeg" =>
        {
            Ok(Value::Bytes(data.clone()))
        }
        _ => Err("an image needs a `format` (raw, png or jpeg) and its `data`".into()),
    }
}

/// What is left of the current chunk.
#[derive(Debug, Default)]
pub(crate) struct Chunk(VecDeque<Vec<f32>>);

impl Chunk {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Takes in the first `most` actions of a new chunk.
    pub(crate) fn fill(&mut self, actions: &NdArray, most: usize) -> Result<(), ServiceError> {
        let columns = actions.shape.get(1).copied().unwrap_or(0).max(1);
        let values = actions.to_f64().unwrap_or_default();
        self.0 = values
            .chunks_exact(columns)
            .take(most.max(1))
            .map(|row| row.iter().map(|x| *x as f32).collect())
            .collect();
        match self.0.is_empty() {
            true => Err(ServiceError::exception("RuntimeError", "the policy gave no actions")),
            false => Ok(()),
        }
    }

    /// The next action as the message that carries it.
    pub(crate) fn pop(&mut self, seq: i128) -> Option<Value> {
        let action = self.0.pop_front()?;
        let data: Vec<u8> = action.iter().flat_map(|x| x.to_le_bytes()).collect();
        let array = vec![
            ("__ndarray__".to_string(), Value::Bool(true)),
            ("data".into(), Value::Bytes(data.into())),
            ("dtype".into(), Value::Str("<f4".into())),
            ("shape".into(), Value::List(vec![Value::Int(action.len() as i128)])),
        ];
        Some(envelope("action", vec![("actions".into(), Value::Map(array))], seq))
    }
}

/// The context of an observation; none of the optional keys are known here.
pub(crate) fn context(received: Instant, decode_ms: f64) -> RequestContext {
    RequestContext { scene: true, decode_ms, ..RequestContext::new(received) }
}

/// The answer to HELLO: what observations must hold, and that nothing is promised about units.
pub(crate) fn hello(seq: i128) -> Value {
    let text = |text: &str| Value::Str(text.into());
    let spec = |name: &str, format: &str| {
        let map = [("name", text(name)), ("dims", Value::Int(0)), ("format", text(format))];
        Value::Map(map.map(|(key, value)| (key.to_string(), value)).into())
    };
    let map = |entries: Vec<(&str, Value)>| {
        Value::Map(entries.into_iter().map(|(key, value)| (key.to_string(), value)).collect())
    };
    let Value::Map(payload) = map(vec![
        ("harness_version", text(concat!("pirouette ", env!("CARGO_PKG_VERSION")))),
        ("protocol_version", Value::Int(PROTOCOL_VERSION)),
        ("model_server", text("pirouette")),
        ("capabilities", map(vec![])),
        (
            "observation_params",
            map(vec![("send_wrist_image", Value::Bool(true)), ("send_state", Value::Bool(true))]),
        ),
        ("action_spec", map(vec![("actions", spec("raw", "raw"))])),
        (
            "observation_spec",
            map(vec![
                ("image", spec("image", "rgb_hwc_uint8")),
                ("state", spec("raw", "raw")),
                ("language", spec("language", "language")),
            ]),
        ),
    ]) else {
        unreachable!("a map was just made");
    };
    envelope("hello", payload, seq)
}

/// An error; the connection stays open.
pub(crate) fn failure(stage: &str, error: &ServiceError, seq: i128) -> Value {
    let text = format!("{stage}: {}", error.line());
    envelope("error", vec![("error".into(), Value::Str(text))], seq)
}

fn envelope(kind: &str, payload: Vec<(String, Value)>, seq: i128) -> Value {
    let timestamp = UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64());
    Value::Map(vec![
        ("type".into(), Value::Str(kind.into())),
        ("payload".into(), Value::Map(payload)),
        ("seq".into(), Value::Int(seq)),
        ("timestamp".into(), Value::Float(timestamp)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use pirouette_policy::Scalar;

    fn map(entries: &[(&str, Value)]) -> Vec<(String, Value)> {
        entries.iter().map(|(key, value)| (key.to_string(), value.clone())).collect()
    }

    fn text(value: &str) -> Value {
        Value::Str(value.into())
    }

    fn message(kind: &str, payload: Vec<(String, Value)>) -> Vec<(String, Value)> {
        map(&[
            ("type", text(kind)),
            ("payload", Value::Map(payload)),
            ("seq", Value::Int(4)),
            ("timestamp", Value::Float(1.5)),
        ])
    }

    #[test]
    fn observations_lose_their_tags() {
        let tagged = |tag: &str, more: &[(&str, Value)]| {
            let mut entries = map(&[(tag, Value::Bool(true))]);
            entries.extend(map(more));
            Value::Map(entries)
        };
        let shape = |n| Value::List(vec![Value::Int(n)]);
        let bytes = |b: &'static [u8]| Value::Bytes(b.into());
        let state = tagged(
            "__ndarray__",
            &[("data", bytes(&[0; 8])), ("dtype", text("<f4")), ("shape", shape(2))],
        );
        let png = tagged("__image__", &[("format", text("png")), ("data", bytes(b"\x89PNG"))]);
        let raw = tagged(
            "__image__",
            &[
                ("format", text("raw")),
                ("data", bytes(b"abc")),
                ("dtype", text("|u1")),
                ("shape", shape(3)),
            ],
        );
        let images = Value::Map(map(&[("a", png), ("b", raw)]));
        let payload = map(&[("images", images), ("states", state), ("note", text("x"))]);
        let read = read(message("observation", payload)).unwrap();
        assert_eq!(read.seq, 4);
        let Kind::Observation(observation) = read.kind else { panic!("an observation") };
        let Some(Value::Map(images)) = get(&observation, "images") else { panic!("images") };
        assert_eq!(images[0].1, bytes(b"\x89PNG"));
        assert!(matches!(&images[1].1, Value::Array(a) if a.shape == [3]));
        assert!(matches!(get(&observation, "states"), Some(Value::Array(a))
            if a.dtype == Scalar::F32 && a.shape == [2]));
        assert_eq!(get(&observation, "note"), Some(&text("x")));
    }

    #[test]
    fn what_is_no_envelope_is_named() {
        let broken = Value::Map(map(&[("__ndarray__", Value::Bool(true)), ("data", text("x"))]));
        let unformed = Value::Map(map(&[("__image__", Value::Bool(true))]));
        let with = |value: &Value| message("observation", map(&[("states", value.clone())]));
        for (map, want) in [
            (vec![], "Message missing required fields: [\"type\", \"payload\", \"seq\""),
            (message("dance", vec![]), "Unknown message type: 'dance'"),
            (with(&broken), "`states`: `data` must be bytes"),
            (with(&unformed), "`states`: an image needs a `format`"),
            (
                map(&[
                    ("type", text("hello")),
                    ("payload", Value::Nil),
                    ("seq", Value::Int(0)),
                    ("timestamp", Value::Int(0)),
                ]),
                "`payload` must be a map",
            ),
        ] {
            let error = read(map).unwrap_err();
            assert!(error.message.starts_with(want), "{error}");
        }
        assert!(is_hello(&message("hello", vec![])) && !is_hello(&message("observation", vec![])));
    }

    #[test]
    fn a_chunk_is_handed_out_action_by_action() {
        let rows: Vec<f64> = (0..12).map(f64::from).collect();
        let actions = NdArray::from_f64(vec![4, 3], &rows).unwrap();
        let mut chunk = Chunk::default();
        chunk.fill(&actions, 2).unwrap();
        let Some(Value::Map(first)) = chunk.pop(8) else { panic!("an action") };
        assert_eq!(get(&first, "seq"), Some(&Value::Int(8)));
        let Some(Value::Map(payload)) = get(&first, "payload") else { panic!("a payload") };
        let Ok(Value::Array(action)) = untag(payload[0].1.clone()) else { panic!("an array") };
        assert_eq!((action.dtype, action.shape.clone()), (Scalar::F32, vec![3]));
        assert_eq!(action.to_f64().unwrap(), [0.0, 1.0, 2.0]);
        assert!(chunk.pop(9).is_some() && chunk.pop(10).is_none());
        let none = NdArray::from_f64(vec![0, 3], &[]).unwrap();
        assert!(chunk.fill(&none, 2).is_err());
    }
}
