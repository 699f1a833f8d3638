//! Reads numbers and text out of observation values the way `numpy.asarray` does, and builds
//! arrays for answers.

use crate::value::{NdArray, Scalar, Value};
use bytes::Bytes;
use half::f16;

/// Nesting of lists beyond which a value is refused (NumPy itself stops at 32 or 64 axes).
const MAX_RANK: usize = 16;

impl Scalar {
    /// Bytes of one element.
    pub fn item_bytes(self) -> usize {
        match self {
            Scalar::Bool | Scalar::I8 | Scalar::U8 => 1,
            Scalar::I16 | Scalar::U16 | Scalar::F16 => 2,
            Scalar::I32 | Scalar::U32 | Scalar::F32 => 4,
            Scalar::I64 | Scalar::U64 | Scalar::F64 => 8,
            Scalar::Unicode(n) => n.saturating_mul(4),
            Scalar::Bytes(n) => n,
        }
    }

    /// NumPy's `dtype.str`, for example `<f4`.
    pub fn type_string(self) -> String {
        match self {
            Scalar::Bool => "|b1".into(),
            Scalar::I8 => "|i1".into(),
            Scalar::I16 => "<i2".into(),
            Scalar::I32 => "<i4".into(),
            Scalar::I64 => "<i8".into(),
            Scalar::U8 => "|u1".into(),
            Scalar::U16 => "<u2".into(),
            Scalar::U32 => "<u4".into(),
            Scalar::U64 => "<u8".into(),
            Scalar::F16 => "<f2".into(),
            Scalar::F32 => "<f4".into(),
            Scalar::F64 => "<f8".into(),
            Scalar::Unicode(n) => format!("<U{n}"),
            Scalar::Bytes(n) => format!("|S{n}"),
        }
    }

    /// Whether the element is a floating-point number.
    pub fn is_float(self) -> bool {
        matches!(self, Scalar::F16 | Scalar::F32 | Scalar::F64)
    }

    /// Whether the element is text or raw bytes rather than a number.
    pub fn is_text(self) -> bool {
        matches!(self, Scalar::Unicode(_) | Scalar::Bytes(_))
    }
}

/// Number of elements of a shape, `None` on overflow.
pub fn element_count(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent))
}

impl NdArray {
    /// A float64 array. `None` unless `values.len()` is the product of `shape`.
    pub fn from_f64(shape: Vec<usize>, values: &[f64]) -> Option<NdArray> {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (element_count(&shape)? == values.len()).then(|| NdArray {
            dtype: Scalar::F64,
            shape,
            data: data.into(),
        })
    }

    /// A float32 array. `None` unless `values.len()` is the product of `shape`.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Option<NdArray> {
        let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        (element_count(&shape)? == values.len()).then(|| NdArray {
            dtype: Scalar::F32,
            shape,
            data: data.into(),
        })
    }

    /// A uint8 array that keeps the given bytes. `None` unless they are as many as `shape` asks.
    pub fn from_u8(shape: Vec<usize>, data: impl Into<Bytes>) -> Option<NdArray> {
        let data = data.into();
        (element_count(&shape)? == data.len()).then(|| NdArray { dtype: Scalar::U8, shape, data })
    }

    /// Whether `data` is as long as shape and type say.
    pub fn is_consistent(&self) -> bool {
        element_count(&self.shape).and_then(|n| n.checked_mul(self.dtype.item_bytes()))
            == Some(self.data.len())
    }

    /// The elements widened to float64, in C order. `None` for text and inconsistent arrays.
    pub fn to_f64(&self) -> Option<Vec<f64>> {
        if !self.is_consistent() {
            return None;
        }
        let data = &self.data[..];
        Some(match self.dtype {
            Scalar::Bool => data.iter().map(|&b| f64::from(u8::from(b != 0))).collect(),
            Scalar::U8 => data.iter().map(|&b| f64::from(b)).collect(),
            Scalar::I8 => data.iter().map(|&b| f64::from(b as i8)).collect(),
            Scalar::I16 => items(data, |b| f64::from(i16::from_le_bytes(b))),
            Scalar::U16 => items(data, |b| f64::from(u16::from_le_bytes(b))),
            Scalar::I32 => items(data, |b| f64::from(i32::from_le_bytes(b))),
            Scalar::U32 => items(data, |b| f64::from(u32::from_le_bytes(b))),
            Scalar::I64 => items(data, |b| i64::from_le_bytes(b) as f64),
            Scalar::U64 => items(data, |b| u64::from_le_bytes(b) as f64),
            Scalar::F16 => items(data, |b| f16::from_le_bytes(b).to_f64()),
            Scalar::F32 => items(data, |b| f64::from(f32::from_le_bytes(b))),
            Scalar::F64 => items(data, f64::from_le_bytes),
            Scalar::Unicode(_) | Scalar::Bytes(_) => return None,
        })
    }

    /// The elements rounded to float32, in the same shape. `None` where [`NdArray::to_f64`] is.
    pub fn to_f32(&self) -> Option<NdArray> {
        let values: Vec<f32> = self.to_f64()?.into_iter().map(|x| x as f32).collect();
        NdArray::from_f32(self.shape.clone(), &values)
    }

    /// The text of a one-element unicode array, without NumPy's zero padding. `None` for other
    /// types and sizes, and for code points that are no characters.
    pub fn to_text(&self) -> Option<String> {
        if !matches!(self.dtype, Scalar::Unicode(_))
            || !self.is_consistent()
            || element_count(&self.shape) != Some(1)
        {
            return None;
        }
        let points = items(&self.data, u32::from_le_bytes);
        let end = points.iter().rposition(|&p| p != 0).map_or(0, |last| last + 1);
        points[..end].iter().map(|&p| char::from_u32(p)).collect()
    }
}

fn items<const N: usize, T>(data: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.chunks_exact(N)
        .map(|chunk| {
            let mut item = [0; N];
            item.copy_from_slice(chunk);
            read(item)
        })
        .collect()
}

impl Value {
    /// The value at a key of a map; the last one wins, as in a Python dict.
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Value::Map(entries) => entries.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// Name of the Python type a client would have sent.
    pub fn python_type(&self) -> &'static str {
        match self {
            Value::Nil => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::Bytes(_) => "bytes",
            Value::Array(_) => "ndarray",
            Value::Scalar(..) => "numpy scalar",
            Value::List(_) => "list",
            Value::Map(_) => "dict",
        }
    }

    /// `numpy.asarray` for numbers: arrays as they are, Python and NumPy scalars as 0-d arrays,
    /// nested lists of numbers as float64 or int64. `None` for text, maps, ragged lists.
    pub fn to_array(&self) -> Option<NdArray> {
        match self {
            Value::Array(array) => array.is_consistent().then(|| array.clone()),
            Value::Scalar(dtype, inner) => cast(inner, *dtype),
            Value::Bool(b) => Some(scalar_array(Scalar::Bool, &[u8::from(*b)])),
            Value::Int(i) => {
                let i = i64::try_from(*i).ok()?;
                Some(scalar_array(Scalar::I64, &i.to_le_bytes()))
            }
            Value::Float(f) => Some(scalar_array(Scalar::F64, &f.to_le_bytes())),
            Value::List(_) => {
                let (mut shape, mut values, mut float) = (Vec::new(), Vec::new(), false);
                flatten(self, 0, &mut shape, &mut values, &mut float)?;
                if float {
                    return NdArray::from_f64(shape, &values);
                }
                let data: Vec<u8> = values.iter().flat_map(|v| (*v as i64).to_le_bytes()).collect();
                (element_count(&shape)? == values.len()).then(|| NdArray {
                    dtype: Scalar::I64,
                    shape,
                    data: data.into(),
                })
            }
            Value::Nil | Value::Str(_) | Value::Bytes(_) | Value::Map(_) => None,
        }
    }
}

fn scalar_array(dtype: Scalar, bytes: &[u8]) -> NdArray {
    NdArray { dtype, shape: Vec::new(), data: Bytes::copy_from_slice(bytes) }
}

/// A NumPy scalar as a 0-d array of its own type.
fn cast(inner: &Value, dtype: Scalar) -> Option<NdArray> {
    let number = match inner {
        Value::Bool(b) => f64::from(u8::from(*b)),
        Value::Int(i) => *i as f64,
        Value::Float(f) => *f,
        _ => return None,
    };
    // Integers become float64 whatever their width: numbers are all that callers read.
    Some(match dtype {
        Scalar::F16 => scalar_array(dtype, &f16::from_f64(number).to_le_bytes()),
        Scalar::F32 => scalar_array(dtype, &(number as f32).to_le_bytes()),
        Scalar::Bool => scalar_array(dtype, &[u8::from(number != 0.0)]),
        Scalar::Unicode(_) | Scalar::Bytes(_) => return None,
        _ => scalar_array(Scalar::F64, &number.to_le_bytes()),
    })
}

fn flatten(
    value: &Value,
    depth: usize,
    shape: &mut Vec<usize>,
    out: &mut Vec<f64>,
    float: &mut bool,
) -> Option<()> {
    match value {
        Value::List(elements) => {
            if depth >= MAX_RANK || (depth < shape.len() && shape[depth] != elements.len()) {
                return None;
            }
            if depth == shape.len() {
                // The first branch fixes the shape; numbers seen before this depth are ragged.
                if !out.is_empty() {
                    return None;
                }
                shape.push(elements.len());
            }
            elements.iter().try_for_each(|e| flatten(e, depth + 1, shape, out, float))
        }
        _ if depth != shape.len() => None,
        Value::Bool(b) => push(out, f64::from(u8::from(*b))),
        Value::Int(i) => push(out, *i as f64),
        Value::Float(f) => {
            *float = true;
            push(out, *f)
        }
        Value::Scalar(dtype, inner) => {
            *float |= dtype.is_float();
            match **inner {
                Value::Int(i) => push(out, i as f64),
                Value::Float(f) => push(out, f),
                Value::Bool(b) => push(out, f64::from(u8::from(b))),
                _ => None,
            }
        }
        Value::Array(array) if array.shape.is_empty() => {
            *float |= array.dtype.is_float();
            push(out, *array.to_f64()?.first()?)
        }
        _ => None,
    }
}

fn push(out: &mut Vec<f64>, number: f64) -> Option<()> {
    out.push(number);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_become_arrays_and_ragged_lists_do_not() {
        let list = Value::List(vec![Value::Int(1), Value::Float(2.5)]);
        let array = list.to_array().unwrap();
        assert_eq!((array.dtype, array.shape.as_slice()), (Scalar::F64, &[2][..]));
        assert_eq!(array.to_f64().unwrap(), [1.0, 2.5]);
        let nested = Value::List(vec![list.clone(), list.clone()]);
        assert_eq!(nested.to_array().unwrap().shape, [2, 2]);
        assert!(Value::List(vec![list.clone(), Value::Int(1)]).to_array().is_none());
        assert!(Value::List(vec![Value::Int(1), list]).to_array().is_none());
        assert!(Value::List(vec![Value::Str("x".into())]).to_array().is_none());
    }

    #[test]
    fn deep_lists_are_refused() {
        let mut value = Value::Int(1);
        for _ in 0..100 {
            value = Value::List(vec![value]);
        }
        assert!(value.to_array().is_none());
    }

    #[test]
    fn a_numpy_float32_scalar_is_rounded_to_its_type() {
        let scalar = Value::Scalar(Scalar::F32, Box::new(Value::Float(0.1)));
        assert_eq!(scalar.to_array().unwrap().to_f64().unwrap(), [f64::from(0.1f32)]);
    }

    #[test]
    fn inconsistent_arrays_give_nothing() {
        let array = NdArray {
            dtype: Scalar::F32,
            shape: vec![usize::MAX, 3],
            data: Bytes::from_static(&[0; 4]),
        };
        assert!(array.to_f64().is_none());
        assert!(Value::Array(array).to_array().is_none());
    }

    #[test]
    fn unicode_arrays_lose_their_padding() {
        let mut data: Vec<u8> = "né".chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
        data.extend([0; 8]);
        let array = NdArray { dtype: Scalar::Unicode(4), shape: vec![], data: data.into() };
        assert_eq!(array.to_text().unwrap(), "né");
        let surrogate = NdArray {
            dtype: Scalar::Unicode(1),
            shape: vec![],
            data: 0xd800u32.to_le_bytes().to_vec().into(),
        };
        assert!(surrogate.to_text().is_none());
    }
}
