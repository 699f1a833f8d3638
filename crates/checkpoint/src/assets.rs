//! A checkpoint directory → its normalisation statistics files.

use std::path::{Component, Path, PathBuf};

use crate::error::CheckpointError;
use crate::layout::parent;
use crate::{present, small_file};

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

impl NormStatsFile {
    /// The statistics at a path given explicitly: a file, or a folder that holds one or has one
    /// below for each asset id.
    ///
    /// # Errors
    /// There is no such file, or a folder of assets is given without an asset id.
    pub fn at(path: &Path, asset_id: Option<&str>) -> Result<Self, CheckpointError> {
        if !path.is_dir() {
            return Self::read(path);
        }
        let direct = path.join(FILE);
        let Some(asset_id) = asset_id else {
            return match present(&direct)? {
                true => Self::read(&direct),
                false => Err(CheckpointError::NoAssetId {
                    folder: path.into(),
                    present: ids_below(path)?.into_iter().map(|(id, _)| id).collect(),
                }),
            };
        };
        let looked = vec![path.join(plain(asset_id)?).join(FILE), direct];
        Self::first(asset_id, looked, || ids_below(path))
    }

    fn first(
        asset_id: &str,
        looked: Vec<PathBuf>,
        others: impl FnOnce() -> Result<Vec<(String, PathBuf)>, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        for path in &looked {
            if present(path)? {
                return Self::read(path);
            }
        }
        Err(CheckpointError::NoNormStats {
            asset_id: asset_id.into(),
            looked,
            present: others()?.into_iter().map(|(id, _)| id).collect(),
        })
    }

    fn read(path: &Path) -> Result<Self, CheckpointError> {
        Ok(NormStatsFile { path: path.into(), bytes: small_file(path)? })
    }
}

/// Finds the statistics of `asset_id`: in `root/assets`, then in `../assets` of it, where openpi's
/// converter copies assets from and users leave them.
pub(crate) fn norm_stats(root: &Path, asset_id: &str) -> Result<NormStatsFile, CheckpointError> {
    let id = plain(asset_id)?;
    let looked = folders(root).iter().map(|f| f.join(id).join(FILE)).collect();
    NormStatsFile::first(asset_id, looked, || asset_ids(root))
}

/// An asset id that stays inside its folder.
fn plain(asset_id: &str) -> Result<&Path, CheckpointError> {
    let (id, plain) = (Path::new(asset_id), |c: Component<'_>| matches!(c, Component::Normal(_)));
    match !asset_id.is_empty() && id.components().all(plain) {
        true => Ok(id),
        false => Err(CheckpointError::BadAssetId(asset_id.into())),
    }
}

/// The folders that assets may lie in, in order.
fn folders(root: &Path) -> [PathBuf; 2] {
    [root.join("assets"), parent(root).join("assets")]
}

/// Every asset id with a `norm_stats.json`, and the file. One that is in both folders is listed
/// once, as it would be found.
///
/// # Errors
/// A folder of assets can't be listed: what is in it must not be taken for absent. A folder in it
/// that can't be is taken for an asset of its name, whose file then says why it can't be read.
pub fn asset_ids(root: &Path) -> Result<Vec<(String, PathBuf)>, CheckpointError> {
    let mut found: Vec<(String, PathBuf)> = Vec::new();
    for folder in folders(root) {
        for (id, path) in ids_below(&folder)? {
            if !found.iter().any(|(known, _)| *known == id) {
                found.push((id, path));
            }
        }
    }
    Ok(found)
}

/// Asset ids of one folder, sorted, with their files.
fn ids_below(folder: &Path) -> Result<Vec<(String, PathBuf)>, CheckpointError> {
    let mut ids = Vec::new();
    if !folder.is_file() && present(folder)? {
        collect(folder, String::new(), 0, &mut ids)?;
    }
    ids.sort();
    Ok(ids)
}

fn collect(
    folder: &Path,
    id: String,
    depth: usize,
    out: &mut Vec<(String, PathBuf)>,
) -> Result<(), CheckpointError> {
    let entries = match std::fs::read_dir(folder) {
        Err(_) if depth > 0 => {
            out.push((id, folder.join(FILE)));
            return Ok(());
        }
        entries => entries.map_err(CheckpointError::io(folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(CheckpointError::io(folder))?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == FILE && depth > 0 && out.len() < MAX_ASSETS {
            out.push((id.clone(), path));
        } else if depth < MAX_ASSET_DEPTH && path.is_dir() {
            let below = if id.is_empty() { name } else { format!("{id}/{name}") };
            collect(&path, below, depth + 1, out)?;
        }
    }
    Ok(())
}
