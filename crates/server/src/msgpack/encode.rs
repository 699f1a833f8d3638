//! [`Value`] → bytes, the same as Python's `msgpack_numpy.packb`.

use pirouette_policy::{Scalar, Value};

use super::ndarray::dtype_name;

/// Why a value can't be encoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// msgpack has integers from −2⁶³ to 2⁶⁴ − 1.
    #[error("integer {0} does not fit msgpack")]
    Integer(i128),
    /// msgpack has 32-bit lengths.
    #[error("{0} bytes or elements in one value do not fit msgpack")]
    Length(usize),
}

/// Encodes a value.
///
/// # Errors
/// When a number or a length does not fit the format.
pub fn encode(value: &Value) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::with_capacity(size_hint(value));
    put(&mut out, value)?;
    Ok(out)
}

/// Enough for the arrays, which are what makes messages long.
fn size_hint(value: &Value) -> usize {
    match value {
        Value::Array(array) => array.data.len() + 96,
        Value::Bytes(bytes) => bytes.len() + 5,
        Value::Str(text) => text.len() + 5,
        Value::List(items) => items.iter().map(size_hint).sum::<usize>() + 5,
        Value::Map(entries) => {
            entries.iter().map(|(k, v)| k.len() + 5 + size_hint(v)).sum::<usize>() + 5
        }
        Value::Scalar(..) => 64,
        Value::Nil | Value::Bool(_) | Value::Int(_) | Value::Float(_) => 9,
    }
}

fn put(out: &mut Vec<u8>, value: &Value) -> Result<(), EncodeError> {
    match value {
        Value::Nil => out.push(0xc0),
        Value::Bool(b) => out.push(0xc2 + *b as u8),
        Value::Int(n) => integer(out, *n)?,
        Value::Float(v) => {
            out.push(0xcb);
            out.extend(v.to_be_bytes());
        }
        Value::Str(text) => string(out, text)?,
        Value::Bytes(bytes) => binary(out, bytes)?,
        Value::Array(array) => {
            length(out, 4, 0x80, 0xde)?;
            binary(out, b"__ndarray__")?;
            out.push(0xc3);
            binary(out, b"data")?;
            binary(out, &array.data)?;
            binary(out, b"dtype")?;
            string(out, &dtype_name(array.dtype))?;
            binary(out, b"shape")?;
            length(out, array.shape.len(), 0x90, 0xdc)?;
            for extent in &array.shape {
                integer(out, *extent as i128)?;
            }
        }
        // A float64 scalar is a Python float, a string scalar a str or bytes: Python's encoder
        // never sees them as NumPy values.
        Value::Scalar(Scalar::F64 | Scalar::Unicode(_) | Scalar::Bytes(_), value) => {
            put(out, value)?;
        }
        Value::Scalar(dtype, value) => {
            length(out, 3, 0x80, 0xde)?;
            binary(out, b"__npgeneric__")?;
            out.push(0xc3);
            binary(out, b"data")?;
            put(out, value)?;
            binary(out, b"dtype")?;
            string(out, &dtype_name(*dtype))?;
        }
        Value::List(items) => {
            length(out, items.len(), 0x90, 0xdc)?;
            for item in items {
                put(out, item)?;
            }
        }
        Value::Map(entries) => {
            length(out, entries.len(), 0x80, 0xde)?;
            for (key, value) in entries {
                string(out, key)?;
                put(out, value)?;
            }
        }
    }
    Ok(())
}

/// The shortest form that holds the number, unsigned from 0 on.
fn integer(out: &mut Vec<u8>, n: i128) -> Result<(), EncodeError> {
    let mut tagged = |tag: u8, bytes: &[u8]| {
        out.push(tag);
        out.extend(bytes);
    };
    match n {
        0..=0x7f => out.push(n as u8),
        -32..=-1 => out.push(n as i8 as u8),
        0x80..=0xff => tagged(0xcc, &[n as u8]),
        0x100..=0xffff => tagged(0xcd, &(n as u16).to_be_bytes()),
        0x1_0000..=0xffff_ffff => tagged(0xce, &(n as u32).to_be_bytes()),
        0x1_0000_0000..=0xffff_ffff_ffff_ffff => tagged(0xcf, &(n as u64).to_be_bytes()),
        -0x80..=-33 => tagged(0xd0, &(n as i8).to_be_bytes()),
        -0x8000..=-0x81 => tagged(0xd1, &(n as i16).to_be_bytes()),
        -0x8000_0000..=-0x8001 => tagged(0xd2, &(n as i32).to_be_bytes()),
        -0x8000_0000_0000_0000..=-0x8000_0001 => tagged(0xd3, &(n as i64).to_be_bytes()),
        _ => return Err(EncodeError::Integer(n)),
    }
    Ok(())
}

/// Head of a list or map: up to 15 entries in one byte, then 16 or 32 bits after `wide`.
fn length(out: &mut Vec<u8>, n: usize, short: u8, wide: u8) -> Result<(), EncodeError> {
    if n < 16 {
        out.push(short | n as u8);
    } else if let Ok(n) = u16::try_from(n) {
        out.push(wide);
        out.extend(n.to_be_bytes());
    } else {
        out.push(wide + 1);
        out.extend(u32::try_from(n).map_err(|_| EncodeError::Length(n))?.to_be_bytes());
    }
    Ok(())
}

/// Head of a string or byte string: 8, 16 or 32 bits of length after `first`.
fn long(out: &mut Vec<u8>, n: usize, first: u8) -> Result<(), EncodeError> {
    if let Ok(n) = u8::try_from(n) {
        out.extend([first, n]);
    } else if let Ok(n) = u16::try_from(n) {
        out.push(first + 1);
        out.extend(n.to_be_bytes());
    } else {
        out.push(first + 2);
        out.extend(u32::try_from(n).map_err(|_| EncodeError::Length(n))?.to_be_bytes());
    }
    Ok(())
}

fn string(out: &mut Vec<u8>, text: &str) -> Result<(), EncodeError> {
    match text.len() {
        n @ 0..32 => out.push(0xa0 | n as u8),
        n => long(out, n, 0xd9)?,
    }
    out.extend(text.as_bytes());
    Ok(())
}

fn binary(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), EncodeError> {
    long(out, bytes.len(), 0xc4)?;
    out.extend(bytes);
    Ok(())
}
