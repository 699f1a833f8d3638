//! A checkpoint directory → its normalisation statistics files and tokenizer candidates.

use std::path::{Component, Path, PathBuf};

use crate::error::CheckpointError;
use crate::layout::parent;
use crate::small_file;

const FILE: &str = "norm_stats.json";
/// `physical-intelligence/libero` is two folders deep; nobody nests deeper than this.
const MAX_ASSET_DEPTH: usize = 4;
/// Most assets listed.
const MAX_ASSETS: usize = 1000;

/// A `norm_stats.json`, read but not parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormStatsFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Finds the statistics of `asset_id`. A file (or an assets folder) named explicitly decides;
/// else `root/assets`, then `../assets` of it: openpi's converter copies assets from there and
/// users leave them there.
pub(crate) fn norm_stats(
    root: &Path,
    asset_id: &str,
    explicit: Option<&Path>,
) -> Result<NormStatsFile, CheckpointError> {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if asset_id.is_empty() || !Path::new(asset_id).components().all(plain) {
        return Err(CheckpointError::BadAssetId(asset_id.into()));
    }
    let looked = match explicit {
        Some(path) if path.is_dir() => vec![path.join(asset_id).join(FILE), path.join(FILE)],
        Some(path) => vec![path.to_path_buf()],
        None => folders(root).iter().map(|f| f.join(asset_id).join(FILE)).collect(),
    };
    match looked.iter().find(|p| p.is_file()) {
        Some(path) => Ok(NormStatsFile { path: path.clone(), bytes: small_file(path)? }),
        None => {
            let present = asset_ids(root).into_iter().map(|(id, _)| id).collect();
            Err(CheckpointError::NoNormStats { asset_id: asset_id.into(), looked, present })
        }
    }
}

/// The folders that assets may lie in, in order.
fn folders(root: &Path) -> [PathBuf; 2] {
    [root.join("assets"), parent(root).join("assets")]
}

/// Every asset id with a `norm_stats.json`, and the file. One that is in both folders is listed
/// once, as it would be found.
pub fn asset_ids(root: &Path) -> Vec<(String, PathBuf)> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for folder in folders(root) {
        let mut ids = Vec::new();
        collect(&folder, String::new(), 0, &mut ids);
        ids.sort();
        for (id, path) in ids {
            if !found.iter().any(|(known, _)| *known == id) {
                found.push((id, path));
            }
        }
    }
    found
}

fn collect(folder: &Path, id: String, depth: usize, out: &mut Vec<(String, PathBuf)>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == FILE && depth > 0 && out.len() < MAX_ASSETS {
            out.push((id.clone(), path));
        } else if depth < MAX_ASSET_DEPTH && path.is_dir() {
            let below = if id.is_empty() { name } else { format!("{id}/{name}") };
            collect(&path, below, depth + 1, out);
        }
    }
}

/// Tokenizer files that exist, best first: in the checkpoint, then in openpi's cache
/// (`OPENPI_DATA_HOME`, default `~/.cache/openpi`).
pub fn tokenizer_candidates(root: &Path) -> Vec<PathBuf> {
    let mut candidates: Vec<PathBuf> = [
        "paligemma_tokenizer.model",
        "tokenizer.model",
        "tokenizer/tokenizer.model",
        "tokenizer/tokenizer.json",
        "tokenizer.json",
        "assets/paligemma_tokenizer.model",
    ]
    .iter()
    .map(|name| root.join(name))
    .collect();
    let home = std::env::var_os("OPENPI_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/openpi")));
    candidates.extend(home.map(|h| h.join("big_vision/paligemma_tokenizer.model")));
    candidates.retain(|path| path.is_file());
    candidates
}
