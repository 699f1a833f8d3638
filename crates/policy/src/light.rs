//! An observation → whether preparing it is a matter of microseconds.

use crate::value::{Scalar, Value};

/// Bytes of numbers and text a light observation may have: a state and an instruction.
const LIGHT_BYTES: usize = 512;

/// Whether `observation` has nothing that takes long to prepare: images are arrays of the model's
/// size, of which no pixel is touched, and the rest is short. What may be a JPEG or PNG file is
/// not light, however small.
pub(crate) fn is_light(observation: &Value, side: usize) -> bool {
    fits(observation, side, &mut { LIGHT_BYTES })
}

fn fits(value: &Value, side: usize, left: &mut usize) -> bool {
    let bytes = match value {
        Value::Map(map) => return map.iter().all(|(_, value)| fits(value, side, left)),
        Value::List(items) => return items.iter().all(|value| fits(value, side, left)),
        Value::Array(array) if array.dtype == Scalar::U8 => return array.shape == [side, side, 3],
        Value::Array(array) => array.data.len(),
        Value::Str(text) => text.len(),
        Value::Scalar(_, inner) => return fits(inner, side, left),
        Value::Bytes(_) => return false,
        Value::Nil | Value::Bool(_) | Value::Int(_) | Value::Float(_) => size_of::<f64>(),
    };
    let rest = left.checked_sub(bytes);
    *left = rest.unwrap_or(0);
    rest.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::value::NdArray;

    fn array(dtype: Scalar, shape: &[usize], bytes: usize) -> Value {
        Value::Array(NdArray { dtype, shape: shape.to_vec(), data: vec![0; bytes].into() })
    }

    #[test]
    fn light_is_what_has_no_pixel_to_touch() {
        let image = array(Scalar::U8, &[8, 8, 3], 192);
        let light = |extra: Value| {
            let inner = Value::Map(vec![("image".into(), image.clone()), ("extra".into(), extra)]);
            let state = array(Scalar::F32, &[8], 32);
            let text = Value::Str("pick up the fork".into());
            let map = [("observation", inner), ("state", state), ("prompt", text)];
            is_light(&Value::Map(map.map(|(key, value)| (key.into(), value)).into()), 8)
        };
        assert!(light(image.clone()) && light(Value::Float(0.5)) && light(Value::List(vec![])));
        for heavy in [
            array(Scalar::U8, &[9, 8, 3], 216),
            array(Scalar::U8, &[3, 8, 8], 192),
            array(Scalar::U8, &[192], 192),
            array(Scalar::F32, &[8, 8, 3], 768),
            Value::Bytes(vec![1].into()),
            Value::Scalar(Scalar::Bytes(1), Box::new(Value::Bytes(vec![1].into()))),
            Value::Str("x".repeat(LIGHT_BYTES)),
            Value::List(vec![Value::Int(1); LIGHT_BYTES / 8]),
        ] {
            assert!(!light(heavy.clone()), "{heavy:?}");
        }
    }
}
