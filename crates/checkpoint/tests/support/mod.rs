//! Fixture paths, and writers for small safetensors files and zarr folders.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pirouette_checkpoint::safetensors::TensorFiles;
use pirouette_model::TensorSource;

/// A file or folder of the fixtures in the repository.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path)
}

/// The full golden folder, if there is one: `PIROUETTE_GOLDEN`, or `shared/golden` next to the
/// repository.
pub fn golden() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden");
    let root = std::env::var_os("PIROUETTE_GOLDEN").map_or(beside, PathBuf::from);
    root.is_dir().then_some(root)
}

/// One tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Stored { dtype: "F32", shape: shape.to_vec(), bytes }
    }

    pub fn zeros(shape: &[usize]) -> Self {
        Self::f32(shape, &vec![0.0; shape.iter().product()])
    }
}

pub type Tensors = BTreeMap<String, Stored>;

/// All tensors of an f32 safetensors file.
pub fn read(path: &Path) -> Tensors {
    let files = TensorFiles::open(path).unwrap();
    files
        .entries()
        .map(|e| {
            assert_eq!(e.stored.name(), "F32", "{}", e.name);
            let bytes = files.bytes(&e.name).unwrap().unwrap();
            (e.name.clone(), Stored { dtype: "F32", shape: e.shape.clone(), bytes })
        })
        .collect()
}

/// The bytes of a safetensors file.
pub fn encode(tensors: &Tensors, metadata: &[(&str, &str)]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, t) in tensors {
        let offsets = [data.len(), data.len() + t.bytes.len()];
        let entry =
            serde_json::json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
        data.extend_from_slice(&t.bytes);
    }
    if !metadata.is_empty() {
        let map: serde_json::Map<_, _> =
            metadata.iter().map(|(k, v)| (k.to_string(), (*v).into())).collect();
        header.insert("__metadata__".into(), map.into());
    }
    file_of(&serde_json::to_string(&header).unwrap(), &data)
}

/// A safetensors file from a header's text and the data behind it.
pub fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A checkpoint folder with these tensors and nothing else.
pub fn folder(tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), encode(tensors, &[])).unwrap();
    dir
}

/// Copies a folder.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::write(&target, std::fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

/// Files below a folder.
pub fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            out.extend(files_below(&path));
        } else {
            out.push(path);
        }
    }
    out.sort();
    out
}

/// Writes an f32 array as a zarr v2 folder with the given chunks; `skip` leaves chunks out.
pub fn write_zarr(
    dir: &Path,
    shape: &[usize],
    chunks: &[usize],
    values: &[f32],
    zstd: bool,
    skip: &dyn Fn(&[usize]) -> bool,
) {
    std::fs::create_dir_all(dir).unwrap();
    let compressor = match zstd {
        true => serde_json::json!({"id": "zstd", "level": 1}),
        false => serde_json::Value::Null,
    };
    let meta = serde_json::json!({
        "zarr_format": 2, "shape": shape, "chunks": chunks, "dtype": "<f4", "order": "C",
        "compressor": compressor, "filters": null, "fill_value": 0.0, "dimension_separator": ".",
    });
    std::fs::write(dir.join(".zarray"), meta.to_string()).unwrap();
    let grid: Vec<usize> = shape.iter().zip(chunks).map(|(s, c)| s.div_ceil(*c)).collect();
    for i in 0..grid.iter().product() {
        let index = unravel(i, &grid);
        if skip(&index) {
            continue;
        }
        let mut bytes = Vec::new();
        for j in 0..chunks.iter().product() {
            let inner = unravel(j, chunks);
            let at: Vec<usize> =
                (0..shape.len()).map(|a| index[a] * chunks[a] + inner[a]).collect();
            let inside = at.iter().zip(shape).all(|(a, s)| a < s);
            // What lies beyond the edge is arbitrary.
            let value = if inside { values[ravel(&at, shape)] } else { f32::NAN };
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        if zstd {
            let level = ruzstd::encoding::CompressionLevel::Fastest;
            bytes = ruzstd::encoding::compress_to_vec(&bytes[..], level);
        }
        let key: Vec<String> = index.iter().map(usize::to_string).collect();
        std::fs::write(dir.join(key.join(".")), bytes).unwrap();
    }
}

/// Flat position → index per axis, C order.
pub fn unravel(mut i: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (axis, &extent) in shape.iter().enumerate().rev() {
        index[axis] = i % extent;
        i /= extent;
    }
    index
}

/// Index per axis → flat position, C order.
pub fn ravel(index: &[usize], shape: &[usize]) -> usize {
    index.iter().zip(shape).fold(0, |at, (i, e)| at * e + i)
}

/// Reproducible numbers in (-1, 1).
pub fn numbers(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2) + 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Asserts that two sources hold the same names and shapes, and `expected`'s f32 values passed
/// through `round`.
pub fn assert_same(
    found: &dyn TensorSource,
    expected: &dyn TensorSource,
    round: &dyn Fn(f32) -> f32,
) {
    assert_eq!(found.names(), expected.names());
    for name in expected.names() {
        assert_eq!(found.shape(&name), expected.shape(&name), "{name}");
        let (f, e) = (found.load(&name).unwrap(), expected.load(&name).unwrap());
        assert_eq!(f.shape, e.shape, "{name}");
        assert_eq!(f.data.len(), f.len() * f.dtype.bytes(), "{name}");
        let same =
            f.to_f32().iter().zip(e.to_f32()).position(|(f, e)| f.to_bits() != round(e).to_bits());
        assert_eq!(same, None, "{name}: first difference");
    }
}
