//! Bytes of a `.safetensors` file → names, types, shapes and byte ranges.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use pirouette_model::DType;
use serde_json::{Map, Value};

use crate::error::Malformed;

/// Largest header accepted; a π0.5 header has 0.1 MB.
pub const MAX_HEADER_BYTES: usize = 32 << 20;
/// Most tensors accepted in one file; π0.5 has 813.
pub const MAX_TENSORS: usize = 100_000;
/// Most axes of a tensor.
pub const MAX_RANK: usize = 8;

/// How elements are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// A type weights may have.
    Float(DType),
    /// Any other type, by its name in the file.
    Other(String),
}

impl Stored {
    /// The spelling of the file.
    pub fn name(&self) -> &str {
        match self {
            Stored::Float(DType::F32) => "F32",
            Stored::Float(DType::Bf16) => "BF16",
            Stored::Float(DType::F16) => "F16",
            Stored::Other(name) => name,
        }
    }
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub stored: Stored,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<usize>,
}

/// A parsed header.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// Tensors in the order of the header.
    pub entries: Vec<Entry>,
    /// The `__metadata__` strings.
    pub metadata: BTreeMap<String, String>,
}

/// Length of the header that follows the first 8 bytes of a file.
pub(super) fn header_length(file: &[u8], file_bytes: usize) -> Result<usize, Malformed> {
    let Some(length) = file.first_chunk::<8>() else {
        return Err(Malformed::new(format!("{file_bytes} bytes are no safetensors file")));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(Malformed::new(format!(
            "header claims {length} bytes, the limit is {MAX_HEADER_BYTES}"
        )));
    }
    if length > file_bytes - 8 {
        return Err(Malformed::new(format!(
            "header claims {length} bytes but the file ends after {}",
            file_bytes - 8
        )));
    }
    Ok(length)
}

/// Parses the header of a whole file and checks that the tensors tile the rest of it exactly.
pub fn parse_header(file: &[u8]) -> Result<Header, Malformed> {
    let length = header_length(file, file.len())?;
    parse_text(&file[8..8 + length], file.len())
}

/// The same for the header's text and the length of the file it is of.
pub(super) fn parse_text(text: &[u8], file_bytes: usize) -> Result<Header, Malformed> {
    let data = 8 + text.len();
    let json: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|e| Malformed::new(format!("header is not a JSON object: {e}")))?;
    if json.len() > MAX_TENSORS {
        return Err(Malformed::new(format!("{} tensors, the limit is {MAX_TENSORS}", json.len())));
    }
    let mut header = Header::default();
    for (name, value) in json {
        if name == "__metadata__" {
            header.metadata = metadata(&value)?;
        } else {
            let entry = entry(&name, &value, data, file_bytes)
                .map_err(|e| e.within(&format!("tensor `{name}`")))?;
            header.entries.push(entry);
        }
    }
    check_tiling(&header.entries, data, file_bytes)?;
    Ok(header)
}

fn metadata(value: &Value) -> Result<BTreeMap<String, String>, Malformed> {
    let bad = || Malformed::new("`__metadata__` is not a map of strings");
    let mut out = BTreeMap::new();
    for (key, v) in value.as_object().ok_or_else(bad)? {
        out.insert(key.clone(), v.as_str().ok_or_else(bad)?.to_string());
    }
    Ok(out)
}

fn entry(name: &str, value: &Value, data: usize, end: usize) -> Result<Entry, Malformed> {
    let text = value["dtype"].as_str().ok_or_else(|| Malformed::new("no `dtype`"))?;
    let (stored, bits) = dtype(text)?;
    let axes = value["shape"].as_array().ok_or_else(|| Malformed::new("no `shape`"))?;
    if axes.len() > MAX_RANK {
        return Err(Malformed::new(format!("{} axes, the limit is {MAX_RANK}", axes.len())));
    }
    let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
    let shape = axes
        .iter()
        .map(|v| number(v).ok_or_else(|| Malformed::new(format!("extent {v} is no size"))))
        .collect::<Result<Vec<_>, _>>()?;
    let (start, stop) = match value["data_offsets"].as_array().map(Vec::as_slice) {
        Some([a, b]) => number(a).zip(number(b)),
        _ => None,
    }
    .ok_or_else(|| Malformed::new("`data_offsets` is not a pair of sizes"))?;
    let size = shape
        .iter()
        .try_fold(bits, |n, &e| n.checked_mul(e))
        .filter(|n| n % 8 == 0)
        .ok_or_else(|| Malformed::new(format!("shape {shape:?} of {text} overflows")))?
        / 8;
    let range = data.checked_add(start).zip(data.checked_add(stop));
    let Some((first, last)) = range.filter(|(a, b)| a <= b && *b <= end) else {
        return Err(Malformed::new(format!(
            "bytes {start}..{stop} reach outside the file, which holds {} bytes of data",
            end - data
        )));
    };
    if last - first != size {
        return Err(Malformed::new(format!(
            "{} bytes for shape {shape:?} of {text}, which needs {size}",
            last - first
        )));
    }
    Ok(Entry { name: name.to_string(), stored, shape, range: first..last })
}

/// Element type and its bits.
fn dtype(name: &str) -> Result<(Stored, usize), Malformed> {
    let other = |bits| Ok((Stored::Other(name.to_string()), bits));
    match name {
        "F32" => Ok((Stored::Float(DType::F32), 32)),
        "BF16" => Ok((Stored::Float(DType::Bf16), 16)),
        "F16" => Ok((Stored::Float(DType::F16), 16)),
        "F64" | "I64" | "U64" | "C64" => other(64),
        "I32" | "U32" => other(32),
        "I16" | "U16" => other(16),
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => other(8),
        "F4" => other(4),
        _ => Err(Malformed::new(format!("unknown dtype `{name}`"))),
    }
}

fn check_tiling(entries: &[Entry], data: usize, end: usize) -> Result<(), Malformed> {
    let order: BTreeSet<(usize, usize, &str)> =
        entries.iter().map(|e| (e.range.start, e.range.end, e.name.as_str())).collect();
    let mut at = data;
    for (start, stop, name) in order {
        if start != at {
            return Err(Malformed::new(format!(
                "tensor `{name}` starts at byte {start}, the one before it ends at {at}"
            )));
        }
        at = stop;
    }
    if at != end {
        return Err(Malformed::new(format!("{end} bytes in the file, its tensors end at {at}")));
    }
    Ok(())
}
