//! Whose protocol a connection speaks: openpi's, or one of its relatives.
//!
//! The path of the websocket decides where it names one; everywhere else `--dialect` does, which
//! is openpi's unless said otherwise. Only [`Dialect::Auto`] looks at what a client says first.

pub(crate) mod openpi;
pub mod vla_eval;
pub(crate) mod vllm_omni;

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use bytes::Bytes;
use pirouette_policy::Value;

use crate::msgpack;
use crate::options::ServeOptions;
use crate::service::ServiceError;

/// A protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// openpi's, byte for byte; its clients need no change.
    #[default]
    Openpi,
    /// RoboArena's: metadata in the form of its `PolicyServerConfig`, `endpoint` in requests.
    Roboarena,
    /// vLLM-Omni's robot path: RoboArena's metadata and `endpoint`, a map as the answer to a
    /// reset; bare arrays, and maps as errors, for requests that only its clients send.
    VllmOmni,
    /// vla-eval's: typed envelopes, the client speaks first.
    VlaEval,
    /// RoboArena's, or vla-eval's where the client begins with a HELLO.
    Auto,
}

impl Dialect {
    const NAMES: [(&str, Dialect); 5] = [
        ("openpi", Dialect::Openpi),
        ("roboarena", Dialect::Roboarena),
        ("vllm-omni", Dialect::VllmOmni),
        ("vla-eval", Dialect::VlaEval),
        ("auto", Dialect::Auto),
    ];

    /// The dialect a path asks for: `/openpi`, `/roboarena`, `/vla-eval`, or vLLM-Omni's own
    /// `/v1/realtime/robot/openpi`.
    pub fn of_path(path: &str) -> Option<Dialect> {
        match path {
            "/openpi" => Some(Dialect::Openpi),
            "/roboarena" => Some(Dialect::Roboarena),
            "/vla-eval" => Some(Dialect::VlaEval),
            "/v1/realtime/robot/openpi" => Some(Dialect::VllmOmni),
            _ => None,
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(_, dialect)| dialect == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for Dialect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::NAMES.iter().find(|(name, _)| *name == text);
        known.map(|(_, dialect)| *dialect).ok_or_else(|| {
            let names = Self::NAMES.map(|(name, _)| name);
            format!("there is no dialect `{text}`; known are {}", names.join(", "))
        })
    }
}

/// How many observations a decoded request of openpi's dialect or RoboArena's holds (a reset
/// holds none), those that are wrong left out: for tools that look at recorded requests.
///
/// # Errors
/// The request is wrong as a whole.
pub fn observations_of(
    map: Vec<(String, Value)>,
    options: &ServeOptions,
) -> Result<usize, ServiceError> {
    let most = options.max_batch_observations;
    Ok(openpi::read(map, Instant::now(), most, true)?.contexts().len())
}

/// A data message as it arrived.
pub(crate) enum Frame {
    Binary(Bytes),
    Text,
}

impl Frame {
    /// Its bytes, not copied; none of a text, whatever it says.
    pub(crate) fn bytes(&self) -> Bytes {
        match self {
            Frame::Binary(bytes) => bytes.clone(),
            Frame::Text => Bytes::new(),
        }
    }
}

/// Decodes a message; whatever is wrong is what Python would have raised.
pub(crate) fn decode(
    frame: Frame,
    limits: &msgpack::Limits,
) -> Result<Vec<(String, Value)>, ServiceError> {
    let Frame::Binary(bytes) = frame else {
        let message = "a bytes-like object is required, not 'str'";
        return Err(ServiceError::exception("TypeError", message));
    };
    match msgpack::decode_with(&bytes, limits) {
        Ok(Value::Map(map)) => Ok(map),
        Ok(_) => Err(ServiceError::exception("TypeError", "the observation must be a map")),
        Err(error @ msgpack::DecodeError::Format { .. }) => {
            // Python's exception has no text; ours goes on the line before.
            let mut exception = ServiceError::exception(error.python_type(), "");
            exception.detail = Some(error.to_string());
            Err(exception)
        }
        Err(error) => Err(ServiceError::exception(error.python_type(), error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_requests_hold_what_they_were_packed_from() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/I_requests");
        let count = |name: &str| {
            let bytes = std::fs::read(format!("{folder}/{name}.msgpack")).unwrap();
            let map = decode(Frame::Binary(bytes.into()), &msgpack::Limits::default());
            observations_of(map.unwrap(), &ServeOptions::default()).map_err(|e| e.message)
        };
        for (name, want) in [("keys", 1), ("noise", 1), ("roboarena", 1), ("reset", 0)] {
            assert_eq!(count(name), Ok(want), "{name}");
        }
        // The third has noise and so no part in the seed, the fourth is no map.
        assert_eq!(count("batch"), Ok(3));
    }

    #[test]
    fn names_and_paths() {
        for (name, dialect) in Dialect::NAMES {
            assert_eq!((name.parse(), dialect.to_string()), (Ok(dialect), name.to_string()));
        }
        assert!("open-pi".parse::<Dialect>().unwrap_err().contains("vla-eval"));
        assert_eq!(Dialect::of_path("/v1/realtime/robot/openpi"), Some(Dialect::VllmOmni));
        for path in ["/", "/any/path", "/vla-eval/", "/v1/realtime/robot/openpi/x", ""] {
            assert_eq!(Dialect::of_path(path), None, "{path}");
        }
    }
}
