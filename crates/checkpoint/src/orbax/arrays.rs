//! A `params/` directory → its arrays by path, whether they lie in OCDBT or in folders.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pirouette_model::DType;
use serde_json::Value;

use super::ocdbt::Database;
use super::zarr::{ArrayMeta, parse_zarray, read_array};
use crate::error::{CheckpointError, Malformed};
use crate::file::{Section, Stamp, WeightFile};
use crate::identity::Identity;
use crate::{MAX_SMALL_FILE, present, small_file};

/// Most arrays of one checkpoint; π0.5 has 51, with LoRA 75.
const MAX_ARRAYS: usize = 10_000;

enum Store {
    Ocdbt(Database),
    Folders(PathBuf),
}

/// What lies under a key.
pub(super) enum Stored<'a> {
    Inline(&'a [u8]),
    In(Section),
}

impl Stored<'_> {
    fn length(&self) -> u64 {
        match self {
            Stored::Inline(bytes) => bytes.len() as u64,
            Stored::In(section) => section.length(),
        }
    }
}

impl Read for Stored<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        match self {
            Stored::Inline(bytes) => bytes.read(out),
            Stored::In(section) => section.read(out),
        }
    }
}

impl Store {
    fn get(&self, key: &str) -> Result<Option<Stored<'_>>, CheckpointError> {
        match self {
            Store::Ocdbt(db) => db.get(key),
            Store::Folders(root) => {
                let path = root.join(key);
                if !present(&path)? {
                    return Ok(None);
                }
                let file = WeightFile::open(&path)?;
                file.section(0..file.length()).map(|s| Some(Stored::In(s)))
            }
        }
    }

    /// Stored names of all arrays.
    fn names(&self) -> Result<Vec<String>, CheckpointError> {
        match self {
            Store::Ocdbt(db) => {
                Ok(db.keys().filter_map(|k| k.strip_suffix("/.zarray")).map(String::from).collect())
            }
            Store::Folders(root) => folders(root),
        }
    }
}

fn folders(root: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root).map_err(CheckpointError::io(root))? {
        let entry = entry.map_err(CheckpointError::io(root))?;
        if entry.path().join(".zarray").is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// One array of a checkpoint.
#[derive(Clone, Debug)]
pub struct ArrayEntry {
    /// Name in the store.
    pub stored: String,
    /// Shape, chunks, type.
    pub meta: ArrayMeta,
}

/// All arrays of a `params/` directory, under their paths: components joined by `/`, without the
/// leading `params` and without a trailing `value` that every leaf has.
pub struct Arrays {
    root: PathBuf,
    store: Store,
    entries: BTreeMap<String, ArrayEntry>,
    /// Whether chunks that hold nothing but the fill value were written, too.
    complete: bool,
}

impl Arrays {
    /// Opens the directory and reads every array's metadata.
    pub fn open(root: &Path) -> Result<Self, CheckpointError> {
        let complete = every_chunk_is_there(root)?;
        let store = match present(&root.join("manifest.ocdbt"))? {
            true => Store::Ocdbt(Database::open(root)?),
            false => Store::Folders(root.into()),
        };
        if let Store::Ocdbt(db) = &store
            && db.keys().any(|k| k.ends_with("/zarr.json"))
        {
            return Err(zarr3(root));
        }
        let names = store.names()?;
        if names.is_empty() {
            return Err(no_arrays(root));
        }
        if names.len() > MAX_ARRAYS {
            let what = format!("{} zarr arrays in it, expected about 50", names.len());
            return Err(Malformed::new(what).at(root));
        }
        let valued = names.iter().all(|n| n.ends_with(".value"));
        let mut entries = BTreeMap::new();
        for stored in names {
            let key = format!("{stored}/.zarray");
            let mut bytes = Vec::new();
            if let Some(found) = store.get(&key)? {
                let read = found.take(MAX_SMALL_FILE).read_to_end(&mut bytes);
                read.map_err(|e| inner(e, root))?;
            }
            let meta = parse_zarray(&bytes)
                .map_err(|e| e.within(&format!("array `{stored}`")).at(root))?;
            let name = stored.strip_suffix(".value").filter(|_| valued).unwrap_or(&stored);
            let path = name.strip_prefix("params.").unwrap_or(name).replace('.', "/");
            if let Some(other) = entries.get(&path).map(|e: &ArrayEntry| &e.stored) {
                let what = format!(
                    "arrays `{other}` and `{stored}` are both `{path}`; save the weights of one \
                     model alone"
                );
                return Err(Malformed::unread(what).at(root));
            }
            entries.insert(path, ArrayEntry { stored, meta });
        }
        Ok(Arrays { root: root.into(), store, entries, complete })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Which files these are.
    pub fn identity(&self) -> Result<Identity, CheckpointError> {
        let mut identity = Identity::default();
        match &self.store {
            Store::Ocdbt(db) => db.identify(&mut identity),
            Store::Folders(root) => {
                for entry in self.entries.values() {
                    let path = root.join(&entry.stored).join(".zarray");
                    let meta = std::fs::metadata(&path).map_err(CheckpointError::io(&path))?;
                    identity.add(&path, Stamp::of(&meta));
                }
            }
        }
        Ok(identity)
    }

    /// Paths and metadata, sorted by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &ArrayEntry)> {
        self.entries.iter().map(|(path, e)| (path.as_str(), e))
    }

    /// Metadata of one array.
    pub fn meta(&self, path: &str) -> Option<&ArrayMeta> {
        self.entries.get(path).map(|e| &e.meta)
    }

    /// Decodes a whole array: C order, little-endian, in its stored type.
    pub fn read(&self, path: &str) -> Result<(DType, Vec<u8>), CheckpointError> {
        let entry = self.entries.get(path).ok_or_else(|| {
            Malformed::new(format!("array `{path}` is not in the checkpoint")).at(&self.root)
        })?;
        // What went wrong with a file says more than that its chunk could not be decoded.
        let failed = Mutex::new(None);
        let chunk = |key: &str| {
            let stored = self.store.get(&format!("{}/{key}", entry.stored));
            let stored = stored.map_err(|e| Malformed::new(note(&failed, e)))?;
            if stored.is_none() && (self.complete || entry.meta.fill.is_none()) {
                return Err(Malformed::new(format!("chunk `{key}` is missing")));
            }
            Ok(stored.map(|stored| {
                (stored.length(), Noted { stored, root: &self.root, failed: &failed })
            }))
        };
        let data = read_array(&entry.meta, &chunk);
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let data =
            data.map_err(|e| e.within(&format!("array `{}`", entry.stored)).at(&self.root))?;
        Ok((entry.meta.dtype, data))
    }
}

/// Keeps the first error; returns its text.
fn note(failed: &Mutex<Option<CheckpointError>>, error: CheckpointError) -> String {
    let text = error.to_string();
    failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    text
}

/// The error of a [`Section`].
fn inner(error: io::Error, root: &Path) -> CheckpointError {
    error.downcast().unwrap_or_else(CheckpointError::io(root))
}

/// What lies under a key; the first error of reading any is kept.
struct Noted<'a> {
    stored: Stored<'a>,
    root: &'a Path,
    failed: &'a Mutex<Option<CheckpointError>>,
}

impl Read for Noted<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.stored.read(out);
        read.map_err(|e| io::Error::other(note(self.failed, inner(e, self.root))))
    }
}

/// Why there is none, as far as the folder tells.
fn no_arrays(root: &Path) -> CheckpointError {
    let entries = || std::fs::read_dir(root).into_iter().flatten().flatten();
    if entries().any(|e| e.path().join("zarr.json").is_file()) {
        return zarr3(root);
    }
    if root.join("manifest.ocdbt").is_file() {
        return Malformed::new("no zarr array in it, expected about 50").at(root);
    }
    if entries().any(|e| e.file_name().to_string_lossy().starts_with("ocdbt.process_")) {
        let what = "there are `ocdbt.process_*` folders but no `manifest.ocdbt` that joins them: \
                    the save was not finished, or not all of it was copied";
        return Malformed::new(what).at(root);
    }
    if root.join("checkpoint").is_file() {
        let what = "the arrays are in one `checkpoint` file (msgpack), which is not read; save \
                    them again with Orbax without `aggregate`";
        return Malformed::unread(what).at(root);
    }
    Malformed::new("no zarr array in it, expected about 50").at(root)
}

fn zarr3(root: &Path) -> CheckpointError {
    let what = "the arrays are stored as zarr v3, which openpi does not write; save them again \
                with Orbax's `use_zarr3=False`";
    CheckpointError::Unsupported { path: root.into(), what: what.into() }
}

/// `_METADATA` is optional; what matters in it is whether the codec is the known one, and whether
/// a chunk that is not there is one that was lost: without a word on it, it holds the fill value,
/// if the array has one.
fn every_chunk_is_there(root: &Path) -> Result<bool, CheckpointError> {
    let path = root.join("_METADATA");
    if !present(&path)? {
        return Ok(false);
    }
    let bytes: Cow<'_, [u8]> = small_file(&path)?.into();
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Malformed::new(format!("not JSON: {e}")).at(&path))?;
    if json["use_zarr3"] == true {
        return Err(zarr3(root));
    }
    Ok(json["store_array_data_equal_to_fill_value"] == true)
}
