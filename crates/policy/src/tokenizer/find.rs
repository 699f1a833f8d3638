//! Where the tokenizer's file may lie on a robot's or a lab's machine.

use super::TokenizerError;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Most snapshots of one Hugging Face repository looked into.
const MAX_SNAPSHOTS: usize = 32;
/// The repositories whose `tokenizer.model` is PaliGemma's.
const HUGGING_FACE: [&str; 3] =
    ["paligemma-3b-pt-224", "paligemma-3b-mix-224", "paligemma-3b-pt-448"];

/// Names of PaliGemma's SentencePiece file.
const NAMES: [&str; 2] = ["paligemma_tokenizer.model", "tokenizer.model"];
/// Where it lies in a checkpoint.
const FOLDERS: [&str; 4] = ["", "tokenizer", "assets", "assets/tokenizer"];

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
        Self::resolve(|name| std::env::var_os(name))
    }

    fn resolve(variable: impl Fn(&str) -> Option<OsString>) -> SearchPlaces {
        let variable =
            |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = variable("HOME");
        let cache = |name: &str| home.as_ref().map(|home| home.join(".cache").join(name));
        let expand = |path: PathBuf| match (path.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => path,
        };
        SearchPlaces {
            openpi_home: variable("OPENPI_DATA_HOME").map(expand).or_else(|| cache("openpi")),
            hf_home: variable("HF_HOME").map(expand).or_else(|| cache("huggingface")),
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
    let mut looked = match flag {
        Some(flag) if flag.is_dir() => NAMES.map(|name| flag.join(name)).into(),
        Some(flag) => vec![flag.to_path_buf()],
        None => usual_places(checkpoint, places),
    };
    let own = if flag.is_some() { flag } else { checkpoint };
    match looked.iter().position(|path| is_there(path, own)) {
        Some(index) => Ok(looked.swap_remove(index)),
        None => {
            let unread = checkpoint.filter(|_| flag.is_none()).map(unread_tokenizers);
            let note = unread.iter().flatten().next().map_or_else(String::new, |json| {
                format!("; {} is there, but in a format not read", json.display())
            });
            Err(TokenizerError::NotFound { looked, note })
        }
    }
}

/// Every tokenizer file where [`find_tokenizer`] looks, the one it takes first.
pub fn tokenizers(checkpoint: &Path) -> Vec<PathBuf> {
    let mut found = usual_places(Some(checkpoint), &SearchPlaces::from_env());
    found.retain(|path| is_there(path, Some(checkpoint)));
    found
}

/// Whether something of that name is there. In `own`, what the user named, a link to nowhere and
/// what may not be looked at count, too: it was meant, so whoever reads it says what is wrong.
/// Caches are often pruned, or somebody else's.
fn is_there(path: &Path, own: Option<&Path>) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    if !own.is_some_and(|own| path.starts_with(own)) {
        return path.is_file();
    }
    let found = std::fs::symlink_metadata(path);
    found.map_or_else(|e| !matches!(e.kind(), NotFound | NotADirectory), |_| true)
}

/// Tokenizers of a checkpoint in Hugging Face's format, which is not read.
pub fn unread_tokenizers(checkpoint: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        FOLDERS.iter().map(|folder| checkpoint.join(folder).join("tokenizer.json")).collect();
    found.retain(|path| path.is_file());
    found
}

/// In the checkpoint, then in the caches.
fn usual_places(checkpoint: Option<&Path>, places: &SearchPlaces) -> Vec<PathBuf> {
    let mut looked = Vec::new();
    for folder in checkpoint.into_iter().flat_map(|root| FOLDERS.map(|folder| root.join(folder))) {
        looked.extend(NAMES.map(|name| folder.join(name)));
    }
    if let Some(home) = &places.openpi_home {
        looked.push(home.join("big_vision").join("paligemma_tokenizer.model"));
    }
    if let Some(home) = &places.hf_home {
        for name in HUGGING_FACE {
            looked.extend(snapshots(&home.join("hub").join(format!("models--google--{name}"))));
        }
    }
    looked
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

        #[cfg(unix)]
        {
            // Another tokenizer than the checkpoint's own would be taken without a word.
            let own = checkpoint.join("paligemma_tokenizer.model");
            std::fs::remove_file(&own).unwrap();
            std::os::unix::fs::symlink("nowhere", &own).unwrap();
            assert_eq!(find(None).unwrap(), own);
            let error = crate::Tokenizer::from_file(&own).unwrap_err().to_string();
            assert!(
                error.contains("checkpoint/paligemma_tokenizer.model can't be read"),
                "{error}"
            );
        }
    }

    #[test]
    fn caches_are_resolved_as_openpi_does() {
        let resolve = |home: &str, openpi: &str| {
            let value = |name: &str| match name {
                "HOME" => Some(home.into()),
                "OPENPI_DATA_HOME" => Some(openpi.into()),
                _ => None,
            };
            SearchPlaces::resolve(value).openpi_home
        };
        assert_eq!(resolve("/h", "/data").unwrap(), Path::new("/data"));
        assert_eq!(resolve("/h", "~/data").unwrap(), Path::new("/h/data"));
        assert_eq!(resolve("/h", "").unwrap(), Path::new("/h/.cache/openpi"));
        assert_eq!(resolve("", ""), None);
    }

    #[test]
    fn a_hugging_face_json_is_mentioned() {
        let root = tempfile::tempdir().unwrap();
        let json = root.path().join("tokenizer/tokenizer.json");
        touch(&json);
        assert_eq!(unread_tokenizers(root.path()), [json]);
        let error = find_tokenizer_in(None, Some(root.path()), &SearchPlaces::default());
        assert!(error.unwrap_err().to_string().contains("tokenizer.json is there"));
    }
}
