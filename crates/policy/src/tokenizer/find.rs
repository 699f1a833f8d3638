//! Where the tokenizer's file may lie on a robot's or a lab's machine.

use super::TokenizerError;
use std::path::{Path, PathBuf};

/// Most snapshots of one Hugging Face repository looked into.
const MAX_SNAPSHOTS: usize = 32;
/// The repositories whose `tokenizer.model` is PaliGemma's.
const HUGGING_FACE: [&str; 3] =
    ["paligemma-3b-pt-224", "paligemma-3b-mix-224", "paligemma-3b-pt-448"];

/// Caches to look into; [`SearchPlaces::from_env`] fills it from the environment.
#[derive(Clone, Debug, Default)]
pub struct SearchPlaces {
    /// `$OPENPI_DATA_HOME`, default `~/.cache/openpi`.
    pub openpi_home: Option<PathBuf>,
    /// `$HF_HOME`, default `~/.cache/huggingface`.
    pub hf_home: Option<PathBuf>,
}

impl SearchPlaces {
    /// As openpi and Hugging Face resolve them.
    pub fn from_env() -> SearchPlaces {
        let variable = |name: &str| {
            std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
        };
        let home = variable("HOME");
        let cache = |name: &str| home.as_ref().map(|home| home.join(".cache").join(name));
        let expand = |path: PathBuf| match (path.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => path,
        };
        SearchPlaces {
            openpi_home: variable("OPENPI_DATA_HOME").map(expand).or_else(|| cache("openpi")),
            hf_home: variable("HF_HOME").or_else(|| cache("huggingface")),
        }
    }
}

/// The tokenizer's file: the flag if given (and nothing else then), else the checkpoint
/// directory, openpi's cache, Hugging Face's cache. The error lists every place.
pub fn find_tokenizer(
    flag: Option<&Path>,
    checkpoint: Option<&Path>,
) -> Result<PathBuf, TokenizerError> {
    find_tokenizer_in(flag, checkpoint, &SearchPlaces::from_env())
}

/// As [`find_tokenizer`] with the caches given.
pub fn find_tokenizer_in(
    flag: Option<&Path>,
    checkpoint: Option<&Path>,
    places: &SearchPlaces,
) -> Result<PathBuf, TokenizerError> {
    let mut looked = Vec::new();
    let mut note = String::new();
    if let Some(flag) = flag {
        looked.push(flag.to_path_buf());
        if flag.is_dir() {
            looked = ["paligemma_tokenizer.model", "tokenizer.model"].map(|n| flag.join(n)).into();
        }
    } else {
        if let Some(directory) = checkpoint {
            for folder in ["", "tokenizer", "assets", "assets/tokenizer"] {
                for name in ["paligemma_tokenizer.model", "tokenizer.model"] {
                    looked.push(directory.join(folder).join(name));
                }
            }
            let json = directory.join("tokenizer").join("tokenizer.json");
            if json.is_file() {
                note = format!("; {} is there, but in a format not read", json.display());
            }
        }
        if let Some(home) = &places.openpi_home {
            looked.push(home.join("big_vision").join("paligemma_tokenizer.model"));
        }
        if let Some(home) = &places.hf_home {
            for name in HUGGING_FACE {
                looked.extend(snapshots(&home.join("hub").join(format!("models--google--{name}"))));
            }
        }
    }
    match looked.iter().position(|path| path.is_file()) {
        Some(index) => Ok(looked.swap_remove(index)),
        None => Err(TokenizerError::NotFound { looked, note }),
    }
}

/// `tokenizer.model` of every snapshot; of a repository that is not there, the pattern.
fn snapshots(repository: &Path) -> Vec<PathBuf> {
    let folder = repository.join("snapshots");
    let Ok(entries) = std::fs::read_dir(&folder) else {
        return vec![folder.join("*").join("tokenizer.model")];
    };
    let mut found: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .take(MAX_SNAPSHOTS)
        .map(|entry| entry.path().join("tokenizer.model"))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: &Path) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"x").unwrap();
    }

    #[test]
    fn the_order_is_flag_checkpoint_openpi_hugging_face() {
        let root = tempfile::tempdir().unwrap();
        let places = SearchPlaces {
            openpi_home: Some(root.path().join("openpi")),
            hf_home: Some(root.path().join("hf")),
        };
        let checkpoint = root.path().join("checkpoint");
        let find = |flag: Option<&Path>| find_tokenizer_in(flag, Some(&checkpoint), &places);

        let text = find(None).unwrap_err().to_string();
        for place in ["checkpoint", "openpi/big_vision", "paligemma-3b-pt-224", "gsutil"] {
            assert!(text.contains(place), "{text}");
        }
        let hf = "hf/hub/models--google--paligemma-3b-pt-224/snapshots/ab/tokenizer.model";
        for path in [
            hf,
            "openpi/big_vision/paligemma_tokenizer.model",
            "checkpoint/assets/tokenizer.model",
            "checkpoint/paligemma_tokenizer.model",
        ] {
            let path = root.path().join(path);
            touch(&path);
            assert_eq!(find(None).unwrap(), path);
        }
        let flag = root.path().join("mine.model");
        assert!(find(Some(&flag)).is_err());
        touch(&flag);
        assert_eq!(find(Some(&flag)).unwrap(), flag);
    }

    #[test]
    fn a_hugging_face_json_is_mentioned() {
        let root = tempfile::tempdir().unwrap();
        touch(&root.path().join("tokenizer/tokenizer.json"));
        let error = find_tokenizer_in(None, Some(root.path()), &SearchPlaces::default());
        assert!(error.unwrap_err().to_string().contains("tokenizer.json is there"));
    }
}
