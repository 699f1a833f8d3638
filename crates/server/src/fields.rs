//! The optional request keys openpi does not know: taken out of the observation, checked.

use std::time::{Duration, Instant};

use pirouette_policy::{NdArray, Scalar, Value};

use crate::newest::MAX_SESSION_BYTES;
use crate::service::{GivenNoise, RequestContext, ServiceError};

/// Longest deadline: a day.
const MAX_DEADLINE_MS: f64 = 86_400_000.0;

/// Elements a given matrix may have: far more than any model's chunk.
const MAX_MATRIX: usize = 1 << 20;

/// The optional keys; those of real-time chunking are [`crate::RtcFields`].
pub(crate) const KEYS: [&str; 7] = pirouette_policy::reserved::REQUEST;

/// Takes the optional keys, those of real-time chunking included, out of the observation. A key
/// that is nil counts as absent.
pub(crate) fn take(
    observation: &mut Vec<(String, Value)>,
    received: Instant,
) -> Result<RequestContext, ServiceError> {
    let mut context = RequestContext::new(received);
    let mut wrong = None;
    observation.retain(|(key, value)| {
        let result = match key.as_str() {
            _ if wrong.is_some() => return true,
            known if KEYS.contains(&known) && *value == Value::Nil => Ok(()),
            "seed" => integer(value, u64::MAX as i128).map(|n| context.seed = Some(n as u64)),
            "num_steps" => integer(value, 1000).map(|n| context.steps = Some(n as usize)),
            "deadline_ms" => milliseconds(value).map(|d| context.deadline = Some(received + d)),
            "noise" => noise(value).map(|n| context.noise = Some(n)),
            "explain" => boolean(value).map(|b| context.explain = b),
            "newest_wins" => boolean(value).map(|b| context.newest_wins = b),
            "session" => name(value).map(|n| context.session = Some(n)),
            key => match context.rtc.take(key, value) {
                Some(result) => result,
                None => return true,
            },
        };
        wrong = result.err().map(|want| format!("`{key}` must be {want}"));
        false
    });
    if wrong.is_none() && context.seed.is_some() && context.noise.is_some() {
        wrong = Some("`seed` and `noise` exclude each other: send one".into());
    }
    match wrong {
        Some(message) => Err(ServiceError::exception("ValueError", message)),
        None => Ok(context),
    }
}

/// A 0-d array or NumPy scalar counts as the number in it.
pub(crate) fn number(value: &Value) -> Option<Value> {
    match value {
        Value::Int(_) | Value::Float(_) => Some(value.clone()),
        Value::Scalar(_, inner) => number(inner),
        Value::Array(array) if array.shape.is_empty() => {
            let bytes = &array.data[..];
            let value = *array.to_f64()?.first()?;
            Some(match array.dtype {
                Scalar::Bool => return None,
                // Beyond 2⁵³ a float is another number.
                Scalar::I64 => Value::Int(i64::from_le_bytes(bytes.try_into().ok()?).into()),
                Scalar::U64 => Value::Int(u64::from_le_bytes(bytes.try_into().ok()?).into()),
                dtype if dtype.is_float() => Value::Float(value),
                _ => Value::Int(value as i128),
            })
        }
        _ => None,
    }
}

pub(crate) fn integer(value: &Value, max: i128) -> Result<i128, String> {
    match number(value) {
        Some(Value::Int(n)) if (0..=max).contains(&n) => Ok(n),
        _ => Err(format!("an integer from 0 to {max}")),
    }
}

pub(crate) fn boolean(value: &Value) -> Result<bool, String> {
    match value {
        Value::Bool(b) => Ok(*b),
        Value::Scalar(Scalar::Bool, inner) => boolean(inner),
        Value::Array(NdArray { dtype: Scalar::Bool, shape, data }) if shape.is_empty() => {
            Ok(data.first().is_some_and(|b| *b != 0))
        }
        _ => Err("true or false".into()),
    }
}

/// A 0-d array or NumPy scalar counts as the text in it.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::Str(text) => Some(text.clone()),
        Value::Scalar(Scalar::Unicode(_), inner) => text(inner),
        Value::Array(array) if array.shape.is_empty() => array.to_text(),
        _ => None,
    }
}

fn name(value: &Value) -> Result<String, String> {
    text(value)
        .filter(|text| (1..=MAX_SESSION_BYTES).contains(&text.len()))
        .ok_or_else(|| format!("a string of 1 to {MAX_SESSION_BYTES} bytes"))
}

fn milliseconds(value: &Value) -> Result<Duration, String> {
    let ms = match number(value) {
        Some(Value::Int(n)) => n as f64,
        Some(Value::Float(v)) => v,
        _ => f64::NAN,
    };
    if ms > 0.0 && ms <= MAX_DEADLINE_MS {
        Ok(Duration::from_secs_f64(ms / 1e3))
    } else {
        Err(format!("a number of milliseconds above 0, at most {MAX_DEADLINE_MS:.0}"))
    }
}

fn noise(value: &Value) -> Result<GivenNoise, String> {
    let want = || "an array of floats [horizon, action_dim], all finite".to_string();
    let Value::Array(array) = value else { return Err(want()) };
    let (shape, values) = matrix(array).ok_or_else(want)?;
    Ok(GivenNoise { shape, values: values.into_iter().map(|v| v as f32).collect() })
}

/// Shape and values of a matrix of floats that is not empty, not huge, and finite in float32.
pub(crate) fn matrix(array: &NdArray) -> Option<([usize; 2], Vec<f64>)> {
    let [rows, cols] = array.shape[..] else { return None };
    rows.checked_mul(cols).filter(|n| (1..=MAX_MATRIX).contains(n))?;
    let values = array.dtype.is_float().then(|| array.to_f64())??;
    values.iter().all(|v| (*v as f32).is_finite()).then_some(([rows, cols], values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(key: &str, value: Value) -> Result<RequestContext, ServiceError> {
        let mut observation =
            vec![("state".into(), Value::Int(1)), (key.into(), value), ("x".into(), Value::Nil)];
        let context = take(&mut observation, Instant::now())?;
        let keys: Vec<&str> = observation.iter().map(|(k, _)| k.as_str()).collect();
        assert_eq!(keys, ["state", "x"]);
        Ok(context)
    }

    fn array(dtype: Scalar, shape: &[usize], data: &[u8]) -> Value {
        Value::Array(NdArray { dtype, shape: shape.to_vec(), data: data.to_vec().into() })
    }

    #[test]
    fn known_keys_are_taken_and_others_left() {
        assert_eq!(with("seed", Value::Int(u64::MAX.into())).unwrap().seed, Some(u64::MAX));
        let scalar = Value::Scalar(Scalar::I64, Box::new(Value::Int(7)));
        assert_eq!(with("seed", scalar).unwrap().seed, Some(7));
        let zero_d = array(Scalar::I32, &[], &9i32.to_le_bytes());
        assert_eq!(with("num_steps", zero_d).unwrap().steps, Some(9));
        for (dtype, bytes) in [
            (Scalar::I8, &[9][..]),
            (Scalar::U8, &[9]),
            (Scalar::I16, &[9, 0]),
            (Scalar::U16, &[9, 0]),
            (Scalar::U32, &[9, 0, 0, 0]),
        ] {
            let steps = with("num_steps", array(dtype, &[], bytes)).unwrap().steps;
            assert_eq!(steps, Some(9), "{dtype:?}");
        }
        let last = array(Scalar::U64, &[], &u64::MAX.to_le_bytes());
        assert_eq!(with("seed", last).unwrap().seed, Some(u64::MAX));
        let half = array(Scalar::F16, &[], &0x5FD0u16.to_le_bytes());
        let context = with("deadline_ms", half).unwrap();
        assert_eq!(context.deadline.unwrap() - context.received, Duration::from_millis(500));
        let context = with("deadline_ms", Value::Float(12.5)).unwrap();
        let left = context.deadline.unwrap() - context.received;
        assert_eq!(left, Duration::from_micros(12_500));
        let pair = [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat();
        let given = with("noise", array(Scalar::F32, &[1, 2], &pair)).unwrap().noise.unwrap();
        assert_eq!((given.shape, given.values), ([1, 2], vec![1.5, -2.0]));
        let half = array(Scalar::F16, &[1, 1], &0x3800u16.to_le_bytes());
        assert_eq!(with("noise", half).unwrap().noise.unwrap().values, [0.5]);
        let double = array(Scalar::F64, &[1, 1], &0.25f64.to_le_bytes());
        assert_eq!(with("noise", double).unwrap().noise.unwrap().values, [0.25]);
        let absent = with("seed", Value::Nil).unwrap();
        assert_eq!(absent.seed, None);
        assert!(with("explain", Value::Bool(true)).unwrap().explain);
        let scalar = Value::Scalar(Scalar::Bool, Box::new(Value::Bool(true)));
        assert!(with("newest_wins", scalar).unwrap().newest_wins);
        assert!(!with("newest_wins", array(Scalar::Bool, &[], &[0])).unwrap().newest_wins);
        let named = with("session", Value::Str("left arm".into())).unwrap();
        assert_eq!(named.session.as_deref(), Some("left arm"));
        let numpy = Value::Scalar(Scalar::Unicode(1), Box::new(Value::Str("a".into())));
        assert_eq!(with("session", numpy).unwrap().session.as_deref(), Some("a"));
    }

    #[test]
    fn wrong_values_are_refused_by_key() {
        let nan = array(Scalar::F32, &[1, 1], &f32::NAN.to_le_bytes());
        let table = [
            ("seed", Value::Int(-1)),
            ("seed", Value::Int(1 << 64)),
            ("seed", Value::Float(1.0)),
            ("seed", Value::Str("1".into())),
            ("num_steps", Value::Int(1001)),
            ("num_steps", Value::Bool(true)),
            ("num_steps", array(Scalar::Bool, &[], &[1])),
            ("num_steps", array(Scalar::I16, &[], &(-1i16).to_le_bytes())),
            ("num_steps", array(Scalar::I16, &[], &[1])),
            ("num_steps", array(Scalar::I16, &[1], &[9, 0])),
            ("deadline_ms", Value::Int(0)),
            ("deadline_ms", Value::Float(f64::NAN)),
            ("deadline_ms", Value::Float(f64::INFINITY)),
            ("deadline_ms", Value::Int(i64::MAX.into())),
            ("noise", Value::Int(1)),
            ("noise", array(Scalar::F32, &[1], &[0; 4])),
            ("noise", array(Scalar::U8, &[1, 1], &[0])),
            ("noise", array(Scalar::F32, &[0, 4], &[])),
            ("noise", nan),
            ("explain", Value::Int(1)),
            ("newest_wins", Value::Str("yes".into())),
            ("session", Value::Int(3)),
            ("session", Value::Str(String::new())),
            ("session", Value::Str("x".repeat(129))),
        ];
        for (key, value) in table {
            let shown = format!("{key}: {value:?}");
            let mut observation = vec![(key.to_string(), value)];
            let error = take(&mut observation, Instant::now()).expect_err(&shown);
            assert_eq!((error.python_type.as_str(), error.reason), ("ValueError", "invalid"));
            assert!(error.message.starts_with(&format!("`{key}` must be")), "{shown}: {error}");
        }
        let noise = array(Scalar::F32, &[1, 1], &[0; 4]);
        let mut both = vec![("seed".into(), Value::Int(1)), ("noise".into(), noise)];
        assert!(take(&mut both, Instant::now()).unwrap_err().message.contains("exclude"));
    }
}
