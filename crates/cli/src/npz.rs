//! NumPy files: an `.npz` archive → an observation, actions → an `.npy`. Object arrays (pickles)
//! are refused.

use std::path::Path;

use anyhow::{Context, Result, bail};
use pirouette_policy::{NdArray, Scalar, Value};

/// Most bytes one array of an archive may take.
const MAX_ARRAY: usize = 256 << 20;
/// Most arrays of an archive.
const MAX_ENTRIES: usize = 256;

/// Reads an archive: array names become keys, `a|b` or `a.b` nothing special; a 0-d string array
/// becomes text.
pub fn read(bytes: &[u8]) -> Result<Value> {
    let mut map = Vec::new();
    for (name, data) in entries(bytes)? {
        let key = name.strip_suffix(".npy").unwrap_or(&name).to_string();
        let array = read_npy(&data).with_context(|| format!("array `{key}`"))?;
        let value = match (array.shape.as_slice(), array.dtype) {
            ([], Scalar::Unicode(_)) => Value::Str(array.to_text().context("not text")?),
            _ => Value::Array(array),
        };
        insert(&mut map, &key, value);
    }
    Ok(Value::Map(map))
}

/// `images|cam_high` is key `cam_high` of the map `images`: archives have no nesting.
fn insert(map: &mut Vec<(String, Value)>, key: &str, value: Value) {
    let Some((outer, inner)) = key.split_once('|') else {
        map.push((key.into(), value));
        return;
    };
    if let Some((_, Value::Map(nested))) = map.iter_mut().find(|(k, _)| k == outer) {
        insert(nested, inner, value);
        return;
    }
    let mut nested = Vec::new();
    insert(&mut nested, inner, value);
    map.push((outer.into(), Value::Map(nested)));
}

fn number(bytes: &[u8], at: usize, width: usize) -> Option<usize> {
    let part = bytes.get(at..at.checked_add(width)?)?;
    part.iter().rev().try_fold(0usize, |n, b| n.checked_mul(256)?.checked_add(*b as usize))
}

/// Files of a zip archive, by its central directory: stored or deflated.
fn entries(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let damaged = || anyhow::anyhow!("not a whole .npz archive");
    let end = bytes.windows(4).rposition(|w| w == b"PK\x05\x06").ok_or_else(damaged)?;
    if bytes.len() < end + 22 {
        return Err(damaged());
    }
    let field = |at, width| number(bytes, at, width).ok_or_else(damaged);
    let (count, mut at) = (field(end + 10, 2)?, field(end + 16, 4)?);
    if count > MAX_ENTRIES {
        bail!("{count} arrays, the limit is {MAX_ENTRIES}");
    }
    let mut out = Vec::new();
    for _ in 0..count {
        let (method, packed, size) = (field(at + 10, 2)?, field(at + 20, 4)?, field(at + 24, 4)?);
        let (name, extra, comment) = (field(at + 28, 2)?, field(at + 30, 2)?, field(at + 32, 2)?);
        let local = field(at + 42, 4)?;
        let text = bytes.get(at + 46..at + 46 + name).ok_or_else(damaged)?;
        let text = String::from_utf8_lossy(text).into_owned();
        let start = local + 30 + field(local + 26, 2)? + field(local + 28, 2)?;
        let data = start.checked_add(packed).and_then(|end| bytes.get(start..end));
        let data = data.ok_or_else(damaged)?;
        if size > MAX_ARRAY {
            bail!("`{text}` has {size} bytes, the limit is {MAX_ARRAY}");
        }
        let data = match method {
            0 => data.to_vec(),
            8 => miniz_oxide::inflate::decompress_to_vec_with_limit(data, size.max(1))
                .map_err(|_| damaged())?,
            other => bail!("`{text}` is packed with method {other}: use numpy.savez"),
        };
        out.push((text, data));
        at += 46 + name + extra + comment;
    }
    Ok(out)
}

/// One `.npy`: magic, version, header text `{'descr': '<f4', 'fortran_order': False, 'shape': …}`.
fn read_npy(bytes: &[u8]) -> Result<NdArray> {
    if bytes.get(..6) != Some(b"\x93NUMPY") {
        bail!("not an .npy file");
    }
    let short = bytes.get(6) == Some(&1);
    let (at, width) = if short { (10usize, 2) } else { (12, 4) };
    let length = number(bytes, 8, width).context("header cut off")?;
    let header = bytes.get(at..at.saturating_add(length)).context("header cut off")?;
    let header = std::str::from_utf8(header).context("header is not text")?;
    let after =
        |key: &str| header.split_once(&format!("'{key}':")).map(|(_, rest)| rest.trim_start());
    let descr =
        after("descr").and_then(|r| r.strip_prefix('\'')).and_then(|r| r.split('\'').next());
    let descr = descr.context("no plain dtype (pickled objects are not read)")?;
    if after("fortran_order").is_some_and(|r| r.starts_with("True")) {
        bail!("Fortran order: save numpy.ascontiguousarray of it");
    }
    let shape = after("shape").and_then(|r| r.strip_prefix('(')).and_then(|r| r.split(')').next());
    let shape: Option<Vec<usize>> = shape
        .context("no shape")?
        .split(',')
        .map(str::trim)
        .filter(|s| !s.is_empty())
        .map(|s| s.parse().ok())
        .collect();
    let dtype = scalar(descr).with_context(|| format!("dtype {descr}: not supported"))?;
    let shape = shape.context("shape is no list of sizes")?;
    let data = bytes[at + length..].to_vec().into();
    let array = NdArray { dtype, shape, data };
    if !array.is_consistent() {
        bail!("{} bytes do not fill shape {:?} of {descr}", array.data.len(), array.shape);
    }
    Ok(array)
}

fn scalar(descr: &str) -> Option<Scalar> {
    let count = |s: &str| s.parse::<usize>().ok().filter(|n| *n <= 1 << 16);
    Some(match descr {
        "|b1" => Scalar::Bool,
        "|i1" => Scalar::I8,
        "<i2" => Scalar::I16,
        "<i4" => Scalar::I32,
        "<i8" => Scalar::I64,
        "|u1" => Scalar::U8,
        "<u2" => Scalar::U16,
        "<u4" => Scalar::U32,
        "<u8" => Scalar::U64,
        "<f2" => Scalar::F16,
        "<f4" => Scalar::F32,
        "<f8" => Scalar::F64,
        _ => match descr.split_at_checked(2)? {
            ("<U", n) => Scalar::Unicode(count(n)?),
            ("|S", n) => Scalar::Bytes(count(n)?),
            _ => return None,
        },
    })
}

/// Writes one array as `.npy`.
pub fn write_npy(path: &Path, array: &NdArray) -> Result<()> {
    std::fs::write(path, npy(array)).with_context(|| format!("can't write {}", path.display()))
}

/// The bytes of an `.npy`, version 1.
fn npy(array: &NdArray) -> Vec<u8> {
    let shape: String = array.shape.iter().map(|n| format!("{n}, ")).collect();
    let mut header = format!(
        "{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}",
        array.dtype.type_string(),
        shape.trim_end()
    );
    // Magic, version, length, header and newline fill a multiple of 64 bytes.
    let fill = 63 - (10 + header.len()) % 64;
    header.push_str(&" ".repeat(fill));
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(&array.data[..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn npy_round_trip() {
        let array = NdArray::from_f64(vec![2, 3], &[1.0, 2.0, 3.0, -4.0, 5.5, 6.0]).unwrap();
        let bytes = npy(&array);
        assert_eq!((bytes.len() - 48) % 64, 0);
        assert_eq!(read_npy(&bytes).unwrap(), array);
        for cut in 0..bytes.len() {
            assert!(read_npy(&bytes[..cut]).is_err(), "{cut}");
        }
    }

    /// A stored archive of one array, written by hand.
    #[test]
    fn a_stored_archive_is_an_observation() {
        let array = NdArray::from_f32(vec![2], &[1.0, 2.0]).unwrap();
        let data = npy(&array);
        let name = b"images|cam_high.npy";
        let mut zip = b"PK\x03\x04".to_vec();
        zip.resize(26, 0);
        zip.extend((name.len() as u16).to_le_bytes());
        zip.extend([0, 0]);
        zip.extend(name);
        zip.extend(&data);
        let directory = zip.len();
        let mut entry = b"PK\x01\x02".to_vec();
        entry.resize(46, 0);
        for at in [20, 24] {
            entry[at..at + 4].copy_from_slice(&(data.len() as u32).to_le_bytes());
        }
        entry[28..30].copy_from_slice(&(name.len() as u16).to_le_bytes());
        zip.extend(&entry);
        zip.extend(name);
        let mut end = b"PK\x05\x06".to_vec();
        end.resize(22, 0);
        end[10] = 1;
        end[16..20].copy_from_slice(&(directory as u32).to_le_bytes());
        zip.extend(&end);

        let value = read(&zip).unwrap();
        let nested = value.get("images").and_then(|v| v.get("cam_high"));
        assert_eq!(nested, Some(&Value::Array(array)));
        for cut in 0..zip.len() {
            assert!(read(&zip[..cut]).is_err(), "{cut}");
        }
    }
}
