//! What vLLM-Omni's clients are answered with: actions as a bare array, errors as a map.
//!
//! The path is openpi's too, whose clients get openpi's frames. The request tells them apart.

use pirouette_policy::{NdArray, Value};

use crate::service::ServiceError;

/// Whether a request is one of vLLM-Omni's or DreamZero's clients, which name their session or
/// the endpoint. openpi's never do.
pub(crate) fn asks(map: &[(String, Value)]) -> bool {
    map.iter().any(|(key, value)| match key.as_str() {
        "session_id" => *value != Value::Nil,
        "endpoint" => *value == Value::Str("infer".into()),
        _ => false,
    })
}

/// The actions and nothing else, float32.
pub(crate) fn response(actions: NdArray) -> Value {
    Value::Array(actions.to_f32().unwrap_or(actions))
}

/// An error; the connection stays open.
pub(crate) fn failure(error: &ServiceError) -> Value {
    let entries = [("type", "error".to_string()), ("message", error.line())];
    Value::Map(entries.map(|(key, text)| (key.into(), Value::Str(text))).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_known_by_its_session_or_endpoint() {
        let with = |key: &str, value: Value| asks(&[("x".into(), Value::Nil), (key.into(), value)]);
        let text = |text: &str| Value::Str(text.into());
        assert!(with("session_id", text("a")) && with("session_id", Value::Int(1)));
        assert!(with("endpoint", text("infer")));
        assert!(!with("session_id", Value::Nil) && !with("endpoint", text("reset")));
        assert!(!with("session", text("a")) && !with("prompt", text("infer")));
    }
}
