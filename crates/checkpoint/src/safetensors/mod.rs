//! One `.safetensors` file, or several named by an index → tensors under their stored names.

mod header;

use std::collections::BTreeMap;
use std::io::ErrorKind::NotFound;
use std::path::{Path, PathBuf};

use serde_json::Value;

pub use header::{Entry, Header, MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS, Stored, parse_header};
use header::{header_length, parse_text};

use crate::error::{CheckpointError, Malformed, Mismatch};
use crate::file::WeightFile;
use crate::identity::Identity;
use crate::small_file;

/// Most shards of one checkpoint.
const MAX_SHARDS: usize = 1024;

struct Shard {
    path: PathBuf,
    file: WeightFile,
    header: Header,
}

/// Open tensor files. All shards together look like one.
pub struct TensorFiles {
    origin: PathBuf,
    shards: Vec<Shard>,
    /// Stored name → shard, entry.
    index: BTreeMap<String, (usize, usize)>,
}

impl TensorFiles {
    /// Opens one file, or every shard if the path is a `*.safetensors.index.json`.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut files = TensorFiles { origin: path.into(), shards: vec![], index: BTreeMap::new() };
        if path.extension().is_some_and(|e| e == "json") {
            let weight_map = weight_map(path)?;
            let mut shards: Vec<&String> = weight_map.values().collect();
            shards.sort();
            shards.dedup();
            if shards.len() > MAX_SHARDS {
                let what = format!("{} shards, the limit is {MAX_SHARDS}", shards.len());
                return Err(Malformed::new(what).at(path));
            }
            let folder = path.parent().unwrap_or(Path::new("."));
            for shard in shards {
                files.add(&folder.join(shard)).map_err(|error| match error {
                    CheckpointError::Io { error, .. } if error.kind() == NotFound => {
                        Malformed::new(format!("its shard `{shard}` is missing")).at(path)
                    }
                    other => other,
                })?;
            }
            let mismatches = weight_map
                .keys()
                .filter(|name| !files.index.contains_key(*name))
                .map(|name| Mismatch::Missing(name.clone()))
                .collect::<Vec<_>>();
            if !mismatches.is_empty() {
                return Err(CheckpointError::Tensors { origin: files.origin(), mismatches });
            }
        } else {
            files.add(path)?;
        }
        Ok(files)
    }

    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let file = WeightFile::open(path)?;
        let header = read_header(&file, path)?;
        let shard = self.shards.len();
        for (i, entry) in header.entries.iter().enumerate() {
            if let Some((other, _)) = self.index.insert(entry.name.clone(), (shard, i)) {
                let first = self.shards.get(other).map_or(path, |s| &s.path).display().to_string();
                let what = format!("tensor `{}` is also in {first}", entry.name);
                return Err(Malformed::new(what).at(path));
            }
        }
        self.shards.push(Shard { path: path.into(), file, header });
        Ok(())
    }

    /// Which files these are.
    pub fn identity(&self) -> Identity {
        let mut identity = Identity::default();
        for shard in &self.shards {
            identity.add(&shard.path, shard.file.stamp());
        }
        identity
    }

    /// The path that was opened.
    pub fn origin(&self) -> String {
        self.origin.display().to_string()
    }

    /// Every tensor, by stored name.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.index.values().map(|&(s, e)| &self.shards[s].header.entries[e])
    }

    /// A tensor's type and shape.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.index.get(name).map(|&(s, e)| &self.shards[s].header.entries[e])
    }

    /// Reads a tensor's bytes; `None` if it is not there.
    pub fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, CheckpointError> {
        let Some(&(s, e)) = self.index.get(name) else { return Ok(None) };
        let shard = &self.shards[s];
        let range = &shard.header.entries[e].range;
        shard.file.read(range.start as u64..range.end as u64).map(Some)
    }

    /// A part of a tensor's bytes, from `at` on.
    pub(crate) fn read_at(
        &self,
        name: &str,
        at: usize,
        out: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let Some(&(s, e)) = self.index.get(name) else {
            let mismatches = vec![Mismatch::Missing(name.into())];
            return Err(CheckpointError::Tensors { origin: self.origin(), mismatches });
        };
        let (file, entry) = (&self.shards[s].file, &self.shards[s].header.entries[e]);
        file.read_at((entry.range.start + at) as u64, out)
    }

    /// A `__metadata__` string.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.shards.iter().find_map(|s| s.header.metadata.get(key)).map(String::as_str)
    }
}

fn read_header(file: &WeightFile, path: &Path) -> Result<Header, CheckpointError> {
    let bytes = usize::try_from(file.length()).unwrap_or(usize::MAX);
    let first = file.read(0..file.length().min(8))?;
    let length = header_length(&first, bytes).map_err(|e| e.at(path))?;
    parse_text(&file.read(8..8 + length as u64)?, bytes).map_err(|e| e.at(path))
}

fn weight_map(path: &Path) -> Result<BTreeMap<String, String>, CheckpointError> {
    let bytes = small_file(path)?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Malformed::new(format!("not JSON: {e}")).at(path))?;
    let bad = |what: &str| Malformed::new(what).at(path);
    let map = json["weight_map"].as_object().ok_or_else(|| bad("no `weight_map` object"))?;
    let mut out = BTreeMap::new();
    for (name, file) in map {
        let file = file.as_str().unwrap_or_default();
        if !file.ends_with(".safetensors") || file.contains(['/', '\\']) {
            return Err(bad(&format!("`{name}` lies in `{file}`, which is no plain file name")));
        }
        out.insert(name.clone(), file.to_string());
    }
    Ok(out)
}
