//! What lies beside the weights: norm stats, and the report on it.

mod support;

use std::path::Path;

use pirouette_checkpoint::{Checkpoint, CheckpointError, NormStatsFile, open};
use support::fixture;

fn put(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn tiny(at: &Path) -> Checkpoint {
    support::copy(&fixture("A_tiny/pi0"), at);
    open(at).unwrap()
}

#[test]
fn norm_stats_are_found_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("converted");
    let checkpoint = tiny(&root);
    let id = "physical-intelligence/libero";
    let file = format!("{id}/norm_stats.json");
    let text = |found: Result<NormStatsFile, CheckpointError>| {
        let found = found.unwrap();
        assert_eq!(found.bytes, std::fs::read(&found.path).unwrap());
        String::from_utf8(found.bytes).unwrap()
    };

    let Err(CheckpointError::NoNormStats { looked, .. }) = checkpoint.norm_stats(id) else {
        panic!("found");
    };
    assert_eq!(looked, [root.join("assets").join(&file), dir.path().join("assets").join(&file)]);
    put(&dir.path().join("assets").join(&file), "beside");
    assert_eq!(text(checkpoint.norm_stats(id)), "beside");
    put(&root.join("assets").join(&file), "inside");
    assert_eq!(text(checkpoint.norm_stats(id)), "inside");
    #[cfg(unix)]
    {
        // Those beside are another robot's, perhaps.
        let own = root.join("assets").join(&file);
        std::fs::remove_file(&own).unwrap();
        std::os::unix::fs::symlink("nowhere", &own).unwrap();
        let e = checkpoint.norm_stats(id).unwrap_err().to_string();
        assert!(e.contains("can't read") && e.contains("converted/assets"), "{e}");
    }
    let explicit = dir.path().join("mine.json");
    put(&explicit, "explicit");
    for asset_id in [Some(id), None] {
        assert_eq!(text(NormStatsFile::at(&explicit, asset_id)), "explicit");
    }
    let folder = dir.path().join("folder");
    put(&folder.join(&file), "in a folder");
    assert_eq!(text(NormStatsFile::at(&folder, Some(id))), "in a folder");

    let e = checkpoint.norm_stats("droid").unwrap_err().to_string();
    assert!(e.contains("droid/norm_stats.json") && e.contains(id), "{e}");
    for asset_id in [Some("droid"), None] {
        let e = NormStatsFile::at(&folder, asset_id).unwrap_err().to_string();
        assert!(e.contains("folder") && e.contains(id), "{e}");
    }
    put(&folder.join("norm_stats.json"), "of the folder");
    for asset_id in [Some("droid"), None] {
        assert_eq!(text(NormStatsFile::at(&folder, asset_id)), "of the folder");
    }
    let missing = dir.path().join("nowhere.json");
    for asset_id in [Some(id), None] {
        let e = NormStatsFile::at(&missing, asset_id).unwrap_err().to_string();
        assert!(e.contains("nowhere.json"), "{e}");
    }
}

#[cfg(unix)]
#[test]
fn a_folder_that_can_not_be_listed_is_not_empty() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = tiny(&dir.path().join("c"));
    assert_eq!(checkpoint.asset_ids().unwrap(), []);
    // Root lists any folder, but nobody gets through a link to itself.
    let assets = dir.path().join("c/assets");
    symlink("assets", &assets).unwrap();
    for e in [checkpoint.asset_ids().map(drop), checkpoint.norm_stats("droid").map(drop)] {
        let e = e.unwrap_err().to_string();
        assert!(e.starts_with(&format!("can't read {}", assets.display())), "{e}");
    }
    let report = checkpoint.inspect().to_string();
    assert!(report.contains("norm stats   ?: can't read") && !report.contains("none"), "{report}");
}

#[test]
fn asset_ids_stay_inside() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = tiny(&dir.path().join("c"));
    for id in ["", "..", "../assets/x", "/etc", "a/../b"] {
        for e in [checkpoint.norm_stats(id), NormStatsFile::at(dir.path(), Some(id))] {
            assert!(matches!(e, Err(CheckpointError::BadAssetId(_))), "{id}: {e:?}");
        }
    }
}

#[test]
fn report_of_a_jax_checkpoint() {
    let report = open(&fixture("B_jax/ckpt_pi05_bf16")).unwrap().inspect();
    assert_eq!((report.family, report.tensors), ("pi05", 111));
    assert_eq!(report.types.keys().collect::<Vec<_>>(), ["BF16"]);
    assert_eq!(report.types["BF16"].elements, report.parameters);
    assert_eq!(report.bytes, 2 * report.parameters);
    let found = &report.norm_stats[0];
    assert_eq!(found.asset_id, "physical-intelligence/libero");
    assert_eq!(found.problem, None);
    assert_eq!(found.dims.keys().collect::<Vec<_>>(), ["actions", "state"]);
    assert!(found.dims.values().all(|&n| n > 0));
    let text = report.to_string();
    for part in ["openpi JAX (Orbax)", "pi05", "physical-intelligence/libero: actions"] {
        assert!(text.contains(part), "{text}\nlacks {part}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["sizes"]["vision_heads"], 4);
}

#[test]
fn report_of_a_torch_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("c");
    tiny(&root);
    put(&root.join("assets/nan/norm_stats.json"), r#"{"norm_stats":{"state":{"mean":[NaN,1]}}}"#);
    put(&root.join("assets/bad/norm_stats.json"), "{");
    let report = open(&root).unwrap().inspect();
    assert_eq!(report.skipped.len(), 1);
    assert!(report.skipped[0].name.contains("gemma_expert.lm_head"));
    assert_eq!(report.types["F32"].tensors, report.tensors);
    let [bad, nan] = &report.norm_stats[..] else { panic!("{:?}", report.norm_stats) };
    assert!(bad.problem.as_ref().unwrap().contains("not JSON"));
    assert_eq!(nan.dims["state"], 2);
    assert!(report.to_string().contains("bad: not JSON"));
}

/// Somebody else's folder among the assets hides none of them.
#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_read_hides_no_other() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("c");
    tiny(&root);
    put(&root.join("assets/a/norm_stats.json"), r#"{"norm_stats":{"state":{"mean":[1]}}}"#);
    let locked = root.join("assets/lost+found");
    std::fs::create_dir(&locked).unwrap();
    let mode = |mode| std::fs::set_permissions(&locked, PermissionsExt::from_mode(mode)).unwrap();
    mode(0);
    if std::fs::read_dir(&locked).is_ok() {
        return println!("skipped: whoever runs this may read everything");
    }
    let report = open(&root).unwrap().inspect();
    mode(0o700);
    let [a, lost] = &report.norm_stats[..] else { panic!("{:?}", report.norm_stats) };
    assert_eq!((a.dims["state"], &a.problem), (1, &None));
    assert!(lost.problem.as_ref().unwrap().contains("lost+found"), "{lost:?}");
}

/// A checkpoint in the current directory has its assets beside it in `..`.
#[test]
fn relative_paths_work() {
    let dir = tempfile::tempdir().unwrap();
    tiny(&dir.path().join("c"));
    put(&dir.path().join("assets/droid/norm_stats.json"), "beside");
    std::env::set_current_dir(dir.path().join("c")).unwrap();
    for path in [".", "model.safetensors", "./model.safetensors"] {
        let found = open(Path::new(path)).unwrap().norm_stats("droid").unwrap();
        assert_eq!(found.bytes, b"beside", "{path}");
    }
    std::env::set_current_dir("..").unwrap();
    assert!(open(Path::new("c")).unwrap().norm_stats("droid").is_ok());
}
