//! NumPy's tagged maps ↔ [`NdArray`] and scalars: dtype strings, byte order, sizes.

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};

/// NumPy's own limit on dimensions.
const MAX_RANK: usize = 32;

/// The array or scalar a map with bin keys stands for; `None` when it has neither tag.
pub(super) fn from_tags(tags: &[(Bytes, Value)]) -> Option<Result<Value, String>> {
    let get = |name: &[u8]| tags.iter().find(|(k, _)| *k == name).map(|(_, v)| v);
    if get(b"__ndarray__").is_some() {
        Some(array(get(b"data"), get(b"dtype"), get(b"shape")))
    } else if get(b"__npgeneric__").is_some() {
        Some(scalar(get(b"data"), get(b"dtype")))
    } else {
        None
    }
}

/// An array from its parts, wherever they were written; checked.
pub(crate) fn array(
    data: Option<&Value>,
    dtype: Option<&Value>,
    shape: Option<&Value>,
) -> Result<Value, String> {
    let Some(Value::Bytes(data)) = data else { return Err("`data` must be bytes".into()) };
    let Some(Value::List(extents)) = shape else {
        return Err("`shape` must be a list of integers".into());
    };
    if extents.len() > MAX_RANK {
        return Err(format!("{} dimensions, at most {MAX_RANK} are accepted", extents.len()));
    }
    let extent = |v: &Value| match v {
        Value::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    };
    let shape: Option<Vec<usize>> = extents.iter().map(extent).collect();
    let shape = shape.ok_or("`shape` must hold integers from 0 on")?;
    let (dtype, big_endian) = dtype_of(dtype)?;
    let bytes = shape.iter().try_fold(item_size(dtype), |n, extent| n.checked_mul(*extent));
    // With a zero extent NumPy still refuses sizes it could not address without it.
    let addressable = shape
        .iter()
        .filter(|e| **e != 0)
        .try_fold(item_size(dtype), |n, extent| n.checked_mul(*extent))
        .is_some_and(|n| isize::try_from(n).is_ok());
    if !addressable || bytes != Some(data.len()) {
        let (name, got) = (dtype_name(dtype), data.len());
        return Err(format!("shape {shape:?} of {name} does not fit its {got} bytes of data"));
    }
    let data = if big_endian { swapped(data, swap_width(dtype)) } else { data.clone() };
    Ok(Value::Array(NdArray { dtype, shape, data }))
}

fn scalar(data: Option<&Value>, dtype: Option<&Value>) -> Result<Value, String> {
    let data = data.ok_or("`data` is missing")?;
    let (dtype, _) = dtype_of(dtype)?;
    let range = |min: i128, max: i128| match data {
        Value::Int(n) if (min..=max).contains(n) => Some(Value::Int(*n)),
        _ => None,
    };
    let value = match dtype {
        Scalar::Bool => matches!(data, Value::Bool(_)).then(|| data.clone()),
        Scalar::I8 => range(i8::MIN.into(), i8::MAX.into()),
        Scalar::I16 => range(i16::MIN.into(), i16::MAX.into()),
        Scalar::I32 => range(i32::MIN.into(), i32::MAX.into()),
        Scalar::I64 => range(i64::MIN.into(), i64::MAX.into()),
        Scalar::U8 => range(0, u8::MAX.into()),
        Scalar::U16 => range(0, u16::MAX.into()),
        Scalar::U32 => range(0, u32::MAX.into()),
        Scalar::U64 => range(0, u64::MAX.into()),
        Scalar::F16 | Scalar::F32 | Scalar::F64 => match data {
            Value::Float(v) => Some(Value::Float(*v)),
            Value::Int(n) => Some(Value::Float(*n as f64)),
            _ => None,
        },
        Scalar::Unicode(_) => matches!(data, Value::Str(_)).then(|| data.clone()),
        Scalar::Bytes(_) => matches!(data, Value::Bytes(_)).then(|| data.clone()),
    };
    let value = value.ok_or_else(|| format!("`data` is no value of {}", dtype_name(dtype)))?;
    Ok(Value::Scalar(dtype, Box::new(value)))
}

/// Bytes of one element.
fn item_size(dtype: Scalar) -> usize {
    match dtype {
        Scalar::Bool | Scalar::I8 | Scalar::U8 => 1,
        Scalar::I16 | Scalar::U16 | Scalar::F16 => 2,
        Scalar::I32 | Scalar::U32 | Scalar::F32 => 4,
        Scalar::I64 | Scalar::U64 | Scalar::F64 => 8,
        // Bounded where the dtype is read.
        Scalar::Unicode(n) => n * 4,
        Scalar::Bytes(n) => n,
    }
}

/// What a change of byte order swaps: whole numbers, single code points, nothing in byte strings.
fn swap_width(dtype: Scalar) -> usize {
    match dtype {
        Scalar::Unicode(_) => 4,
        Scalar::Bytes(_) => 1,
        number => item_size(number),
    }
}

fn swapped(data: &Bytes, width: usize) -> Bytes {
    if width < 2 {
        return data.clone();
    }
    let mut bytes = data.to_vec();
    bytes.chunks_exact_mut(width).for_each(|item| item.reverse());
    bytes.into()
}

/// The element type behind a dtype string, and whether it is big-endian.
fn dtype_of(text: Option<&Value>) -> Result<(Scalar, bool), String> {
    let text = match text {
        Some(Value::Str(text)) => text.as_str(),
        _ => return Err("`dtype` must be a string".into()),
    };
    let refuse = || {
        let shown: String = text.chars().take(40).collect();
        format!("dtype `{shown}` is not supported: b1, i1–i8, u1–u8, f2–f8, U and S are")
    };
    let (order, rest) = match text.as_bytes() {
        [order @ (b'<' | b'>' | b'|' | b'='), ..] => (*order, &text[1..]),
        _ => (b'|', text),
    };
    let kind = rest.as_bytes().first().copied().ok_or_else(refuse)?;
    let digits = rest.get(1..).filter(|d| d.len() <= 9 && d.bytes().all(|b| b.is_ascii_digit()));
    let n: usize = digits.and_then(|d| d.parse().ok()).ok_or_else(refuse)?;
    let dtype = match (kind, n) {
        (b'b', 1) => Scalar::Bool,
        (b'i', 1) => Scalar::I8,
        (b'i', 2) => Scalar::I16,
        (b'i', 4) => Scalar::I32,
        (b'i', 8) => Scalar::I64,
        (b'u', 1) => Scalar::U8,
        (b'u', 2) => Scalar::U16,
        (b'u', 4) => Scalar::U32,
        (b'u', 8) => Scalar::U64,
        (b'f', 2) => Scalar::F16,
        (b'f', 4) => Scalar::F32,
        (b'f', 8) => Scalar::F64,
        // Items without bytes could be there in any number at no cost: none are accepted.
        (b'U', 1..) => Scalar::Unicode(n),
        (b'S', 1..) => Scalar::Bytes(n),
        _ => return Err(refuse()),
    };
    Ok((dtype, order == b'>'))
}

/// NumPy's `dtype.str` of a little-endian array.
pub(super) fn dtype_name(dtype: Scalar) -> String {
    match dtype {
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
