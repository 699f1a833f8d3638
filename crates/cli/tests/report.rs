//! `report`, `verify` and `golden` as programs: where pages go, and what files say of themselves.

use std::path::Path;
use std::process::Command;

fn tiny() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/A_tiny/pi0");
    path.to_str().unwrap().into()
}

/// Standard output of a command that ran in a folder.
fn told(folder: &Path, words: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pirouette"));
    let output = command.args(words).current_dir(folder).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_dash_is_standard_output_and_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = tiny();
    let mut words = vec!["report", "--checkpoint", &tiny, "--device", "cpu", "--no-ladder"];
    words.extend(["--runs", "1", "--warmup", "0", "--steps", "1", "--threads", "2"]);
    told(folder.path(), &[&words[..], &["--json", "saved.json"]].concat());
    let from = ["report", "--from", "saved.json"];
    for (flag, start) in [("--html", "<!doctype html>"), ("--markdown", "# Pirouette report\n")] {
        let page = told(folder.path(), &[&from[..], &[flag, "-"]].concat());
        assert!(page.starts_with(start), "{flag}: {page}");
        assert!(!folder.path().join("-").exists(), "{flag} wrote a file of that name");
    }
}

#[test]
fn checks_say_what_they_ran_on() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = tiny();
    let on = ["--device", "cpu", "--threads", "2", "--precision", "bf16", "--json", "-"];
    let golden = told(folder.path(), &[&["golden"], &on[..]].concat());
    let verify = told(folder.path(), &[&["verify", &tiny, "--steps", "1"], &on[..]].concat());
    let golden: serde_json::Value = serde_json::from_str(&golden).unwrap();
    let verify: serde_json::Value = serde_json::from_str(&verify).unwrap();
    let rows = golden.as_array().unwrap().iter();
    for told in rows.chain([&verify]) {
        assert!(told["device"].as_str().unwrap().starts_with("cpu"), "{told}");
        assert_eq!(told["precision"], "bf16", "{told}");
        assert!(told["date"].is_string() && told["machine"]["cores"].is_u64(), "{told}");
    }
}
