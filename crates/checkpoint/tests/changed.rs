//! Files that change between opening and loading: an error that names the file, in this process.

mod support;

use std::fs::{File, FileTimes, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use pirouette_checkpoint::{Checkpoint, Identity, open};
use pirouette_model::WeightTable;
use support::{copy, files_below, fixture};

fn opened(from: &str) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture(from), dir.path());
    let checkpoint = open(dir.path()).unwrap();
    (dir, checkpoint)
}

/// The first error of loading every weight, as a backend does.
fn load(checkpoint: &Checkpoint) -> Result<(), String> {
    let table = WeightTable::new(checkpoint.config, 10);
    for id in table.loading_order() {
        let rows = table.open(id, &*checkpoint.source).map_err(|e| e.to_string())?;
        let mut out = vec![0.0; rows.rows * rows.cols];
        rows.fill(0, &mut out).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn cut(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
}

/// Other bytes in the same file.
fn rewrite(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    File::create(path).unwrap().write_all(&bytes).unwrap();
    later(path);
}

fn replace(path: &Path) {
    let beside = path.with_extension("new");
    std::fs::copy(path, &beside).unwrap();
    later(&beside);
    std::fs::rename(beside, path).unwrap();
}

/// Written at another time, also for a file system whose clock is coarse.
fn later(path: &Path) {
    let later = FileTimes::new().set_modified(SystemTime::now() + Duration::from_secs(5));
    OpenOptions::new().write(true).open(path).unwrap().set_times(later).unwrap();
}

fn assert_named(result: Result<(), String>, path: &Path) {
    let text = result.unwrap_err();
    let says = format!("{} changed while it was read", path.display());
    assert!(text.contains(&says) && !text.contains("damaged"), "{text}");
}

#[test]
fn a_file_that_shrinks_or_is_written_to_is_an_error() {
    for change in [cut, rewrite] {
        let (dir, checkpoint) = opened("A_tiny/pi0");
        let weights = dir.path().join("model.safetensors");
        change(&weights);
        assert_named(load(&checkpoint), &weights);
        let whole = checkpoint.source.load("action_in_proj.weight").map(drop);
        assert_named(whole.map_err(|e| e.to_string()), &weights);
    }
}

#[test]
fn one_that_is_replaced_or_removed_is_read_to_its_end() {
    let (dir, checkpoint) = opened("A_tiny/pi0");
    let weights = dir.path().join("model.safetensors");
    replace(&weights);
    load(&checkpoint).unwrap();
    std::fs::remove_file(&weights).unwrap();
    load(&checkpoint).unwrap();
}

#[test]
fn files_of_a_database_are_watched_too() {
    for change in [cut, rewrite, replace] {
        let (dir, checkpoint) = opened("B_jax/ckpt_pi0_bf16");
        let files = files_below(&dir.path().join("params/ocdbt.process_0/d"));
        let largest = files.iter().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
        change(largest);
        assert_named(load(&checkpoint), largest);
    }
}

/// The files of a checkpoint, each change of one of them, and what is no change.
#[test]
fn an_identity_tells_one_opening_from_another() {
    for (from, weights) in [
        ("A_tiny/pi0", "model.safetensors"),
        ("B_jax/ckpt_pi0_bf16", "params/manifest.ocdbt"),
        ("B_jax/ckpt_pi0_bf16", "params/ocdbt.process_0/d"),
        ("B_jax/ckpt_pi0_fp32_noocdbt", "params/params.state_proj.kernel/.zarray"),
    ] {
        for change in [rewrite, replace] {
            let (dir, first) = opened(from);
            let again = open(dir.path()).unwrap().identity;
            assert_eq!(first.identity.difference(&again), None);
            let mut changed = dir.path().join(weights);
            if changed.is_dir() {
                changed = files_below(&changed).remove(0);
            }
            change(&changed);
            let other = open(dir.path()).unwrap().identity;
            let found = first.identity.difference(&other).unwrap();
            assert!(changed.starts_with(found), "{found}, {}", changed.display());
            let json = serde_json::to_string(&other).unwrap();
            assert_eq!(serde_json::from_str::<Identity>(&json).unwrap(), other);
        }
    }
    let (dir, first) = opened("B_jax/ckpt_pi0_fp32_noocdbt");
    std::fs::write(dir.path().join("params/params.state_proj.kernel/stray"), "x").unwrap();
    let again = open(dir.path()).unwrap().identity;
    assert_eq!(first.identity.difference(&again), None, "a folder's time says nothing");
}
