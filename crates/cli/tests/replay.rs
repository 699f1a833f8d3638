//! The binary: serve a recorded checkpoint with `--record`, then `replay` what was asked.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pirouette_policy::config::named;
use pirouette_policy::sample_observation;
use pirouette_server::load::{self, LoadOptions};
use serde_json::Value;

#[path = "../src/stress/port.rs"]
mod port;
use port::Port;

const POLICY: &str = "pi0_libero";

fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path)
}

fn pirouette(command: &[&str], flags: &[&str]) -> Command {
    let mut pirouette = Command::new(env!("CARGO_BIN_EXE_pirouette"));
    pirouette.args(command).args([POLICY, "--device", "cpu"]);
    if !flags.contains(&"--precision") {
        pirouette.args(["--precision", "f32"]);
    }
    pirouette.arg("--checkpoint").arg(testdata(&format!("A_tiny/e2e/{POLICY}/checkpoint")));
    pirouette.arg("--tokenizer").arg(testdata("D_preprocess/tokenizer/tok_bpe.model"));
    pirouette.args(flags).stdin(Stdio::null());
    pirouette
}

/// Ended with the test, whatever becomes of it.
struct Served {
    child: Child,
    port: Port,
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    /// With `--port` and its number added to `command`, once it listens.
    fn start(command: &mut Command) -> Served {
        let port = Port::free().unwrap();
        let child = command.args(["--port", &port.number.to_string()]).spawn().unwrap();
        let mut served = Served { child, port };
        let started = Instant::now();
        while TcpStream::connect(("127.0.0.1", served.port.number)).is_err() {
            assert!(served.child.try_wait().unwrap().is_none(), "the server ended");
            assert!(started.elapsed() < Duration::from_secs(60), "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        served
    }
}

/// Two clients ask.
fn ask(served: &Served, requests: usize, seed: u64) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(load::run(&LoadOptions {
        url: format!("ws://127.0.0.1:{}", served.port.number),
        api_key: None,
        clients: 2,
        requests: requests / 2,
        warm_up: 0,
        duration: None,
        rate: None,
        deadline: None,
        observation: sample_observation(&named(POLICY).unwrap(), seed),
        timeout: Duration::from_secs(60),
    }));
    assert_eq!(report.unwrap().good as usize, requests);
}

fn record(dir: &Path, requests: usize) {
    let flags = ["--record", dir.to_str().unwrap()];
    let mut served = Served::start(&mut pirouette(&["serve"], &flags));
    for seed in 0..2 {
        ask(&served, requests / 2, seed);
    }
    let id = served.child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    assert!(served.child.wait().unwrap().success());
}

fn replay(dir: &Path, flags: &[&str]) -> (Output, Value) {
    let mut command = pirouette(&["replay", dir.to_str().unwrap()], flags);
    let output = command.args(["--json", "-"]).output().unwrap();
    let json = serde_json::from_slice(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = json.unwrap_or_else(|error| panic!("{error}: {log}"));
    (output, json)
}

fn file(dir: &Path, extension: &str) -> PathBuf {
    let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files.into_iter().find(|p| p.extension().is_some_and(|e| e == extension)).unwrap()
}

#[test]
fn a_recording_is_reproduced_bit_for_bit_and_a_flipped_bit_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let recording = dir.path().join("records");
    record(&recording, 8);
    let none = serde_json::json!({"lines": 0, "segments": 0});
    let (output, report) = replay(&recording, &[]);
    assert!(output.status.success(), "{report}");
    assert_eq!(report["left_out"], none, "{report}");
    assert_eq!((&report["compared"], &report["identical"]), (&8.into(), &8.into()), "{report}");
    assert_eq!(report["recorded_by"], Value::Array(vec![]), "the same fingerprint: {report}");
    assert_eq!(report["now"]["devices"][0]["fingerprint"].as_str().unwrap().len(), 16);

    // A device in a process of its own.
    let (output, report) = replay(&recording, &["--isolate", "always"]);
    assert!(output.status.success(), "{report}");
    assert_eq!(report["identical"], 8, "{report}");

    let (output, report) = replay(&recording, &["--steps", "3", "--limit", "5"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&report["compared"], &report["different"]), (&5.into(), &5.into()), "{report}");
    assert!(report["max_abs"].as_f64().unwrap() > 0.0, "{report}");
    assert_eq!(report["recorded_by"][0]["steps"], 10, "{report}");

    let other = ["--precision", "fp8", "--isolate", "always", "--limit", "4"];
    let (output, report) = replay(&recording, &other);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&report["compared"], &report["different"]), (&4.into(), &4.into()), "{report}");
    let name = |of: &Value| of["devices"][0]["name"].as_str().unwrap().to_string();
    let names = [&report["recorded_by"][0], &report["now"]].map(name);
    assert!(names[0].contains(", f32,") && names[1].contains(", fp8,"), "{names:?}");

    // One bit of the third recorded answer's actions.
    let index = std::fs::read_to_string(file(&recording, "jsonl")).unwrap();
    let line: Value = serde_json::from_str(index.lines().nth(3).unwrap()).unwrap();
    let at = line["reply"][0].as_u64().unwrap() as usize;
    let mut frames = std::fs::read(file(&recording, "frames")).unwrap();
    let data = frames[at..].windows(6).position(|w| w == b"\xc4\x04data").unwrap();
    frames[at + data + 40] ^= 1;
    std::fs::write(file(&recording, "frames"), frames).unwrap();
    let (output, report) = replay(&recording, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&report["identical"], &report["different"]), (&7.into(), &1.into()), "{report}");
    assert_eq!(report["first"]["request"], line["id"], "{report}");
    assert!(report["first"]["what"].as_str().unwrap().starts_with("1 of "), "{report}");

    // Damage ends it, and what came before is told.
    let damaged = index.lines().take(5).collect::<Vec<_>>().join("\n") + "\nno json\n";
    std::fs::write(file(&recording, "jsonl"), damaged).unwrap();
    let (output, report) = replay(&recording, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&report["compared"], &report["different"]), (&4.into(), &1.into()), "{report}");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("line 6 of ") && log.contains("this is no JSON"), "{log}");
}

#[test]
fn what_a_cut_recording_lacks_is_told_and_is_an_error_in_the_middle_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let recording = dir.path().join("records");
    record(&recording, 4);
    let paths = ["jsonl", "frames"].map(|extension| file(&recording, extension));
    let whole = std::fs::read(&paths[1]).unwrap();
    std::fs::write(&paths[1], &whole[..whole.len() - 1]).unwrap();
    let one = serde_json::json!({"lines": 1, "segments": 1});
    let (output, report) = replay(&recording, &["--limit", "100"]);
    assert!(output.status.success(), "{report}");
    assert_eq!((&report["identical"], &report["left_out"]), (&3.into(), &one), "{report}");
    let told = pirouette(&["replay", recording.to_str().unwrap()], &[]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.contains("left out: 1 lines at the ends of 1 segments"), "{told}");

    // The same server's next segment.
    std::fs::copy(&paths[0], recording.join("90000000000000-000002.jsonl")).unwrap();
    std::fs::write(recording.join("90000000000000-000002.frames"), &whole).unwrap();
    let (output, report) = replay(&recording, &[]);
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert_eq!((&report["identical"], &report["left_out"]), (&7.into(), &one), "{report}");
    let log = String::from_utf8_lossy(&output.stderr);
    let name = paths[0].file_stem().unwrap().to_str().unwrap();
    assert!(log.contains(&format!("frames are missing in {name}, although")), "{log}");
}

#[test]
fn it_starts_no_server_and_has_no_flags_of_one() {
    let output = pirouette(&["replay", "records"], &["--help"]).output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    let has = |flag: &str| help.lines().any(|line| line.trim_start().starts_with(flag));
    assert!(has("--checkpoint") && has("--isolate"), "{help}");
    for flag in ["--port", "--host", "--tls-cert", "--api-key-file", "--insecure", "--record"] {
        assert!(!has(flag), "{flag}: {help}");
    }
}

#[test]
fn what_is_no_recording_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let output = pirouette(&["replay", dir.path().to_str().unwrap()], &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("holds no recording"), "{log}");
}

#[test]
fn a_folder_is_recorded_into_by_one_server_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--device", "null", "--isolate", "always", "--record"];
    let serve = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pirouette"));
        command.args(["serve", POLICY]).args(flags).arg(dir.path()).stdin(Stdio::null());
        command
    };
    let mut first = Served::start(&mut serve());
    ask(&first, 2, 0);
    let child = serve().args(["--port", "0"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut second = Served { child, port: Port::free().unwrap() };
    let started = Instant::now();
    let status = loop {
        if let Some(status) = second.child.try_wait().unwrap() {
            break status;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "a second server records into it");
        std::thread::sleep(Duration::from_millis(20));
    };
    let log = std::io::read_to_string(second.child.stderr.take().unwrap()).unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    let folder = format!("can't record into {}: another server", dir.path().display());
    assert!(log.contains(&folder) && log.contains("another --record DIR"), "{log}");
    // The lock goes with the process, and not with those it has started.
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    ask(&Served::start(&mut serve()), 2, 0);
}

/// What `/metrics` says of `name`.
#[cfg(unix)]
fn metric(served: &Served, name: &str) -> u64 {
    use std::io::{Read, Write};
    let mut stream = TcpStream::connect(("127.0.0.1", served.port.number)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut metrics = String::new();
    stream.read_to_string(&mut metrics).unwrap();
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name}: {metrics}")).trim().parse().unwrap()
}

/// A limit on the size of files stands for a full disk: files are made, and writing fails, that of
/// the log, too.
#[cfg(unix)]
#[test]
fn a_full_disk_costs_no_files_and_is_not_tried_with_every_request() {
    // The lock's file, and those of a segment.
    for (blocks, files) in [(0, 1), (8, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let limit = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &limit, env!("CARGO_BIN_EXE_pirouette"), "serve", POLICY]);
        command.args(["--device", "null", "--record"]).arg(dir.path());
        command.stdin(Stdio::null()).stderr(tempfile::tempfile().unwrap());
        let served = Served::start(&mut command);
        ask(&served, 8, 0);
        let started = Instant::now();
        while metric(&served, "pirouette_record_dropped_total{reason=\"failed\"}") < 8 {
            assert!(started.elapsed() < Duration::from_secs(60), "requests are not dropped");
            std::thread::sleep(Duration::from_millis(20));
        }
        let found: Vec<u64> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .collect();
        assert_eq!(found.len(), files, "{found:?}");
        assert_eq!(metric(&served, "pirouette_record_bytes"), found.iter().sum::<u64>());
        drop(served);
    }
}
