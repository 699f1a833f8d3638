//! zarr v2 metadata and chunks → one whole array.

use std::io::{BufReader, Read};
use std::sync::Mutex;

use half::{bf16, f16};
use pirouette_model::DType;
use pirouette_model::config::MAX_EXTENT;
use serde_json::Value;

use crate::error::Malformed;

/// Largest array accepted; the largest real one is the f32 gate and up stack, 4.8 GB.
pub const MAX_ARRAY_BYTES: usize = 16 << 30;
/// Most chunks of one array.
pub const MAX_CHUNKS: usize = 1 << 20;
/// Largest chunk that may exceed its array.
const LARGER_CHUNK_BYTES: usize = 64 << 20;
/// Most axes.
pub const MAX_RANK: usize = 8;
/// Decoded bytes handed on at a time: the decoder buffers what it is asked for.
const PIECE: usize = 1 << 20;
/// Decoded chunks held at once when they have to be scattered.
const IN_FLIGHT_BYTES: usize = 2 << 30;

/// What `.zarray` says.
#[derive(Clone, Debug, PartialEq)]
pub struct ArrayMeta {
    /// Extents.
    pub shape: Vec<usize>,
    /// Extents of a chunk.
    pub chunks: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// Whether chunks are zstd frames (else raw).
    pub zstd: bool,
    /// Value of absent chunks. Without one every chunk was written: TensorStore leaves out only
    /// chunks that equal it.
    pub fill: Option<f64>,
    /// Between the indices of a chunk's key: `.` or `/`.
    pub separator: char,
}

impl ArrayMeta {
    /// Bytes of the whole array.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bytes()
    }

    /// Bytes of one chunk; edge chunks are stored at full size.
    fn chunk_bytes(&self) -> usize {
        self.chunks.iter().product::<usize>() * self.dtype.bytes()
    }

    fn grid(&self) -> Vec<usize> {
        self.shape.iter().zip(&self.chunks).map(|(s, c)| s.div_ceil(*c)).collect()
    }

    fn key(&self, index: &[usize]) -> String {
        match index {
            [] => "0".into(),
            _ => {
                let parts: Vec<String> = index.iter().map(usize::to_string).collect();
                parts.join(&self.separator.to_string())
            }
        }
    }
}

/// Parses a `.zarray`.
pub fn parse_zarray(bytes: &[u8]) -> Result<ArrayMeta, Malformed> {
    let json: Value = serde_json::from_slice(bytes)
        .map_err(|e| Malformed::new(format!(".zarray is not JSON: {e}")))?;
    let bad = |what: &str| Malformed::new(format!(".zarray: {what}"));
    let unread = |what: &str| {
        let remedy = "save the weights again as float32 or bfloat16 with Orbax's defaults";
        Malformed::unread(format!(".zarray: {what}; {remedy}"))
    };
    if json["zarr_format"] != 2 {
        return Err(unread(&format!("zarr_format {} is not read, only 2", json["zarr_format"])));
    }
    let extents = |key: &str| -> Result<Vec<usize>, Malformed> {
        let list = json[key].as_array().ok_or_else(|| bad(&format!("no `{key}`")))?;
        if list.len() > MAX_RANK {
            return Err(bad(&format!("{} axes, the limit is {MAX_RANK}", list.len())));
        }
        list.iter()
            .map(|v| v.as_u64().filter(|&n| (1..=MAX_EXTENT as u64).contains(&n)))
            .map(|v| v.map(|n| n as usize))
            .collect::<Option<_>>()
            .ok_or_else(|| bad(&format!("`{key}` {} is not a list of sizes", json[key])))
    };
    let (shape, chunks) = (extents("shape")?, extents("chunks")?);
    if shape.len() != chunks.len() {
        return Err(bad(&format!("chunks {chunks:?} for shape {shape:?}")));
    }
    let dtype = match json["dtype"].as_str() {
        Some("<f4") => DType::F32,
        Some("<f2") => DType::F16,
        Some("bfloat16") => DType::Bf16,
        _ => {
            let what = format!("dtype {} is not read, only <f4, <f2, bfloat16", json["dtype"]);
            return Err(unread(&what));
        }
    };
    if json["order"] != "C" {
        return Err(unread(&format!("order {} is not read, only \"C\"", json["order"])));
    }
    if json["filters"].as_array().is_some_and(|f| !f.is_empty()) {
        return Err(unread("filters are not read"));
    }
    let zstd = match &json["compressor"] {
        Value::Null => false,
        c if c["id"] == "zstd" => true,
        c => return Err(unread(&format!("compressor {c} is not read, only zstd"))),
    };
    let fill = match &json["fill_value"] {
        Value::Null => None,
        v => Some(number(v).ok_or_else(|| bad(&format!("fill_value {v} is not a number")))?),
    };
    let separator = match json["dimension_separator"].as_str() {
        None | Some(".") => '.',
        Some("/") => '/',
        Some(s) => return Err(bad(&format!("dimension_separator {s:?}"))),
    };
    check_sizes(ArrayMeta { shape, chunks, dtype, zstd, fill, separator })
}

/// A number, or the name of one that JSON does not have.
fn number(v: &Value) -> Option<f64> {
    match v.as_str() {
        None => v.as_f64(),
        Some("NaN") => Some(f64::NAN),
        Some("Infinity") => Some(f64::INFINITY),
        Some("-Infinity") => Some(f64::NEG_INFINITY),
        Some(_) => None,
    }
}

fn check_sizes(meta: ArrayMeta) -> Result<ArrayMeta, Malformed> {
    let product = |list: &[usize]| list.iter().try_fold(1usize, |n, &e| n.checked_mul(e));
    for (what, list) in [("shape", &meta.shape), ("chunks", &meta.chunks)] {
        let bytes = product(list).and_then(|n| n.checked_mul(meta.dtype.bytes()));
        if bytes.is_none_or(|n| n > MAX_ARRAY_BYTES) {
            let limit = MAX_ARRAY_BYTES >> 30;
            return Err(Malformed::new(format!(".zarray: {what} {list:?} exceeds {limit} GiB")));
        }
    }
    let (chunk, limit) = (meta.chunk_bytes(), meta.bytes().max(LARGER_CHUNK_BYTES));
    if chunk > limit {
        let what = format!(".zarray: chunks {:?} for shape {:?}", meta.chunks, meta.shape);
        return Err(Malformed::new(what));
    }
    match product(&meta.grid()) {
        Some(n) if n <= MAX_CHUNKS => Ok(meta),
        _ => Err(Malformed::new(format!(".zarray: more than {MAX_CHUNKS} chunks"))),
    }
}

/// Opens what is stored under a chunk key and tells its length; `None` if it is absent.
pub type OpenChunk<'a, R> = dyn Fn(&str) -> Result<Option<(u64, R)>, Malformed> + Sync + 'a;

/// Decodes an array.
///
/// Uses plain threads: callers may wait for the result inside a rayon task, which must not be
/// handed another task that waits for the same array.
pub fn read_array<R: Read>(
    meta: &ArrayMeta,
    chunk: &OpenChunk<'_, R>,
) -> Result<Vec<u8>, Malformed> {
    let mut out = filled(meta);
    let grid = meta.grid();
    let split_first_only = grid.iter().skip(1).all(|&n| n == 1)
        && meta.chunks.iter().skip(1).eq(meta.shape.iter().skip(1));
    if split_first_only {
        let slab = meta.chunk_bytes().min(meta.bytes());
        let jobs = out.chunks_mut(slab).enumerate().collect();
        in_parallel(jobs, |(i, slab)| {
            let index: Vec<usize> = (0..grid.len()).map(|a| if a == 0 { i } else { 0 }).collect();
            let key = meta.key(&index);
            match chunk(&key)? {
                Some((length, stored)) => decode(meta, length, stored, slab)
                    .map_err(|e| e.within(&format!("chunk `{key}`"))),
                None => Ok(()),
            }
        })?;
        return Ok(out);
    }

    let indices: Vec<Vec<usize>> = (0..grid.iter().product()).map(|i| unravel(i, &grid)).collect();
    let at_once = (IN_FLIGHT_BYTES / meta.chunk_bytes()).clamp(1, 2 * threads());
    for batch in indices.chunks(at_once) {
        let mut decoded: Vec<Option<Vec<u8>>> = batch.iter().map(|_| None).collect();
        let jobs = batch.iter().zip(&mut decoded).collect();
        in_parallel(jobs, |(index, slot)| {
            let key = meta.key(index);
            if let Some((length, stored)) = chunk(&key)? {
                let mut whole = vec![0; meta.chunk_bytes()];
                decode(meta, length, stored, &mut whole)
                    .map_err(|e| e.within(&format!("chunk `{key}`")))?;
                *slot = Some(whole);
            }
            Ok(())
        })?;
        for (index, whole) in batch.iter().zip(&decoded) {
            if let Some(whole) = whole {
                scatter(meta, index, whole, &mut out);
            }
        }
    }
    Ok(out)
}

fn filled(meta: &ArrayMeta) -> Vec<u8> {
    let mut out = vec![0; meta.bytes()];
    let fill = meta.fill.unwrap_or(0.0);
    if fill != 0.0 {
        let single = (fill as f32).to_le_bytes();
        let brain = bf16::from_f64(fill).to_le_bytes();
        let half = f16::from_f64(fill).to_le_bytes();
        let value: &[u8] = match meta.dtype {
            DType::F32 => &single,
            DType::Bf16 => &brain,
            DType::F16 => &half,
        };
        out.chunks_exact_mut(value.len()).for_each(|c| c.copy_from_slice(value));
    }
    out
}

/// Decodes one chunk: its first `out.len()` bytes are kept, the rest (beyond the array's edge)
/// only counted.
fn decode(
    meta: &ArrayMeta,
    length: u64,
    mut stored: impl Read,
    out: &mut [u8],
) -> Result<(), Malformed> {
    let want = meta.chunk_bytes();
    if !meta.zstd {
        if length != want as u64 {
            return Err(Malformed::new(format!("{length} bytes, expected {want}")));
        }
        return stored.read_exact(out).map_err(|e| Malformed::new(e.to_string()));
    }
    let bad = |e: String| Malformed::new(format!("zstd: {e}"));
    // The decoder asks for a few bytes at a time.
    let stored = BufReader::with_capacity(PIECE, stored);
    let mut stream =
        ruzstd::decoding::StreamingDecoder::new(stored).map_err(|e| bad(e.to_string()))?;
    let short = |e: std::io::Error| bad(format!("fewer than {want} bytes: {e}"));
    for piece in out.chunks_mut(PIECE) {
        stream.read_exact(piece).map_err(short)?;
    }
    let mut rest = want - out.len();
    let mut sink = vec![0; rest.clamp(1, PIECE)];
    while rest > 0 {
        let n = rest.min(PIECE);
        stream.read_exact(&mut sink[..n]).map_err(short)?;
        rest -= n;
    }
    match stream.read(&mut sink[..1]).map_err(|e| bad(e.to_string()))? {
        0 => {}
        _ => return Err(bad(format!("more than {want} bytes"))),
    }
    let sums = (stream.decoder.get_checksum_from_data(), stream.decoder.get_calculated_checksum());
    match sums {
        (Some(stored), Some(computed)) if stored != computed => {
            return Err(bad(format!("checksum {computed:08x}, recorded {stored:08x}")));
        }
        _ => {}
    }
    match stream.get_mut().read(&mut sink[..1]).map_err(|e| bad(e.to_string()))? {
        0 => Ok(()),
        _ => Err(bad("more bytes after the end of the frame".into())),
    }
}

/// Position `i` of a C-ordered grid as one index per axis.
fn unravel(mut i: usize, grid: &[usize]) -> Vec<usize> {
    let mut index = vec![0; grid.len()];
    for (axis, &extent) in grid.iter().enumerate().rev() {
        index[axis] = i % extent;
        i /= extent;
    }
    index
}

/// Copies the part of a decoded chunk that lies inside the array to its place.
fn scatter(meta: &ArrayMeta, index: &[usize], chunk: &[u8], out: &mut [u8]) {
    let Some(last) = meta.shape.len().checked_sub(1) else { return };
    let first: Vec<usize> = index.iter().zip(&meta.chunks).map(|(i, c)| i * c).collect();
    let inside: Vec<usize> =
        (0..=last).map(|a| meta.chunks[a].min(meta.shape[a] - first[a])).collect();
    let size = meta.dtype.bytes();
    let run = inside[last] * size;
    for row in 0..inside[..last].iter().product() {
        let at = unravel(row, &inside[..last]);
        let (mut from, mut to) = (0, 0);
        for axis in 0..last {
            from = (from + at[axis]) * meta.chunks[axis + 1];
            to = (to + first[axis] + at[axis]) * meta.shape[axis + 1];
        }
        let (from, to) = (from * size, (to + first[last]) * size);
        out[to..to + run].copy_from_slice(&chunk[from..from + run]);
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(64)
}

/// Runs the jobs on up to one thread per core; returns the first error found.
fn in_parallel<J: Send>(
    jobs: Vec<J>,
    run: impl Fn(J) -> Result<(), Malformed> + Sync,
) -> Result<(), Malformed> {
    let workers = threads().min(jobs.len());
    if workers <= 1 {
        return jobs.into_iter().try_for_each(run);
    }
    let queue = Mutex::new(jobs.into_iter());
    let failure = Mutex::new(None);
    let work = || {
        loop {
            // A worker that panicked poisons the lock; the others then stop and the scope
            // passes the panic on.
            let Some(job) = queue.lock().ok().and_then(|mut jobs| jobs.next()) else { return };
            if let Err(e) = run(job) {
                if let Ok(mut slot) = failure.lock() {
                    slot.get_or_insert(e);
                }
                return;
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(work);
        }
    });
    match failure.into_inner() {
        Ok(Some(e)) => Err(e),
        _ => Ok(()),
    }
}
