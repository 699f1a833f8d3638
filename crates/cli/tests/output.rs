//! Where results go: standard output and files that can't be written, and notes that nobody reads.
#![cfg(unix)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn testdata(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path);
    path.to_str().unwrap().into()
}

/// A command on the tiny checkpoint, with one run where it measures.
fn command(name: &str, flags: &[&str]) -> Command {
    let checkpoint = testdata("A_tiny/e2e/pi05_droid/checkpoint");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pirouette"));
    match name {
        "infer" => {
            let tokenizer = testdata("D_preprocess/tokenizer/tok_bpe.model");
            command.args([name, "pi05_droid", "--tokenizer", &tokenizer, "--device", "cpu"]);
            command.args(["--checkpoint", &checkpoint]);
        }
        "bench" | "profile" | "ladder" | "report" => {
            command.args([name, "--device", "cpu", "--threads", "1", "--checkpoint", &checkpoint]);
            command.args(["--runs", "1", "--warmup", "0", "--horizon", "4", "--steps", "1"]);
        }
        _ => {
            command.arg(name);
        }
    }
    command.args(flags).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(command: &mut Command) -> Output {
    command.spawn().unwrap().wait_with_output().unwrap()
}

/// What nobody reads. Shut down rather than closed: a process that is being started may hold a
/// copy of it.
fn unread() -> Stdio {
    let (reader, writer) = UnixStream::pair().unwrap();
    reader.shutdown(std::net::Shutdown::Both).unwrap();
    OwnedFd::from(writer).into()
}

/// What stands for a full disk.
fn full() -> Option<Stdio> {
    let file = std::fs::File::options().write(true).open("/dev/full");
    if file.is_err() {
        println!("skipped: no /dev/full here to stand for a full disk");
    }
    file.ok().map(Stdio::from)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(file: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

#[test]
fn notes_that_nobody_reads_cost_no_results() {
    let output = run(command("infer", &[]).stderr(unread()));
    assert!(output.status.success(), "{}", output.status);
    assert_eq!(text(&output.stdout).lines().count(), 15);
    let folder = tempfile::tempdir().unwrap();
    for (name, list) in [("bench", "results"), ("ladder", "ladders")] {
        let file = folder.path().join(name);
        let flags = ["--json", file.to_str().unwrap()];
        let output = run(command(name, &flags).stdout(unread()).stderr(unread()));
        assert!(output.status.success(), "{name}: {}", output.status);
        assert!(!json(&file)[list].as_array().unwrap().is_empty());
    }
}

#[test]
fn a_full_standard_output_is_one_line_and_no_panic() {
    let stress = &["--short", "--only", "interleavings"];
    for (name, flags) in
        [("plan", &["pi05", "--all"][..]), ("doctor", &[]), ("infer", &[]), ("stress", stress)]
    {
        let Some(full) = full() else { return };
        let output = run(command(name, flags).stdout(full));
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{name}: {told}");
        assert!(!told.contains("panicked"), "{name}: {told}");
        let last = told.lines().last().unwrap_or_default();
        let want = "pirouette: can't write to standard output: No space left on device";
        assert!(last.starts_with(want), "{name}: {told}");
    }
}

#[test]
fn where_results_go_is_tried_before_anything_is_measured() {
    for name in ["bench", "golden", "verify", "profile", "ladder", "report", "stress", "infer"] {
        cant_write(name, &["--json"]);
    }
    // Neither a server nor a recording is there.
    cant_write("load", &["ws://127.0.0.1:1", "--json"]);
    cant_write("replay", &["/no/recording", "--json"]);
    for (name, flag) in
        [("profile", "--trace"), ("report", "--html"), ("report", "--markdown"), ("infer", "--out")]
    {
        cant_write(name, &[flag]);
    }
}

#[track_caller]
fn cant_write(name: &str, flags: &[&str]) {
    let output = run(command(name, flags).arg("/no/such/folder/x"));
    let want = "pirouette: can't write /no/such/folder/x: No such file or directory (os error 2)\n";
    assert_eq!(text(&output.stderr), want, "{name} {flags:?}");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), String::new()));
}

#[test]
fn a_command_that_fails_leaves_files_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| folder.path().join(name));
    std::fs::write(&old, "kept").unwrap();
    for file in [&old, &new] {
        let flags = ["ws://127.0.0.1:1", "--json", file.to_str().unwrap()];
        assert_eq!(run(&mut command("load", &flags)).status.code(), Some(1));
    }
    assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
    assert!(!new.exists());
}

#[test]
fn json_takes_the_place_of_tables_and_those_of_stress_stay_beside_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let stress = &["--short", "--only", "interleavings"][..];
    for (name, flags, list) in
        [("bench", &[][..], "results"), ("profile", &[], "stages"), ("stress", stress, "rows")]
    {
        let there = run(command(name, flags).args(["--json", "-"]));
        let whole: serde_json::Value = serde_json::from_slice(&there.stdout).unwrap();
        let file = folder.path().join(name);
        let beside = text(&run(command(name, flags).arg("--json").arg(&file)).stdout);
        assert_eq!(beside.contains("held   interleavings"), name == "stress", "{beside}");
        assert_eq!(beside.is_empty(), name != "stress", "{beside}");
        for written in [whole, json(&file)] {
            assert!(!written[list].as_array().unwrap().is_empty(), "{name}: {written}");
        }
    }
}
