//! The binary: devices in processes of their own, one of which is killed under load; what signals
//! and the end of the server mean to them.
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

#[path = "../src/stress/port.rs"]
mod port;
use port::Port;

const PATIENCE: Duration = Duration::from_secs(120);

struct Server {
    child: Child,
    port: Port,
    log: Arc<Mutex<Vec<String>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Two devices without a model, 20 ms a run, each a process.
    fn start() -> Self {
        let two = ["--device", "null:1:20,4:20", "--replicas", "2", "--max-batch", "4"];
        Self::with(&two)
    }

    /// Once it is ready.
    fn with(flags: &[&str]) -> Self {
        let server = Self::spawn(flags);
        server.until("ready", || server.get("/readyz").starts_with("HTTP/1.1 200"));
        server
    }

    fn spawn(flags: &[&str]) -> Self {
        let port = Port::free().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_pirouette"))
            .args(["serve", "pi0_libero", "--isolate", "always"])
            .args(["--port", &port.number.to_string()])
            .args(flags)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, stderr) = (log.clone(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        Server { child, port, log }
    }

    fn until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            let log = || self.log.lock().unwrap().join("\n");
            assert!(begun.elapsed() < PATIENCE, "not {what}: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn get(&self, path: &str) -> String {
        self.ask("GET", path, "")
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> String {
        let mut answer = String::new();
        if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port.number)) {
            let head = format!("Host: x\r\nConnection: close\r\nContent-Length: {}", body.len());
            let ask = format!("{method} {path} HTTP/1.1\r\n{head}\r\n\r\n{body}");
            // What could not be asked or read has no answer.
            let _ = stream.write_all(ask.as_bytes());
            let _ = stream.read_to_string(&mut answer);
        }
        answer
    }

    /// Processes started so far.
    fn workers(&self) -> Vec<i32> {
        let log = self.log.lock().unwrap();
        let id = |line: &String| line.split("is served by process ").nth(1)?.trim().parse().ok();
        log.iter().filter_map(id).collect()
    }

    fn ready_devices(&self) -> usize {
        let metrics = self.get("/metrics");
        let ready = |l: &&str| l.starts_with("pirouette_device_ready") && l.ends_with(" 1");
        metrics.lines().filter(ready).count()
    }

    fn load(&self, seconds: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_pirouette"))
            .args(["load", &format!("ws://127.0.0.1:{}", self.port.number)])
            .args(["--config", "pi0_libero", "--clients", "6", "--seconds", seconds])
            .args(["--json", "-"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }
}

fn report(load: Child) -> Value {
    serde_json::from_slice(&load.wait_with_output().unwrap().stdout).unwrap()
}

fn kill(signal: &str, id: i32) {
    let killed = Command::new("kill").args([signal, &id.to_string()]).status().unwrap();
    assert!(killed.success());
}

#[test]
fn a_killed_process_costs_what_it_held_and_comes_back() {
    let server = Server::start();
    server.until("two processes", || server.workers().len() == 2);
    server.until("both ready", || server.ready_devices() == 2);
    let load = server.load("3");
    std::thread::sleep(Duration::from_secs(1));
    kill("-KILL", server.workers()[1]);
    let report = report(load);
    let (good, sent) = (report["good"].as_u64().unwrap(), report["sent"].as_u64().unwrap());
    assert!(good > 20 && sent - good <= 4, "a batch was lost at most: {report}");
    server.until("the third process", || server.workers().len() == 3);
    server.until("both ready again", || server.ready_devices() == 2);
}

#[test]
fn processes_outlive_the_signal_to_drain_and_end_with_the_server() {
    let mut server = Server::start();
    server.until("two processes", || server.workers().len() == 2);
    let workers = server.workers();
    for id in &workers {
        kill("-TERM", *id);
        kill("-INT", *id);
    }
    let answered = report(server.load("1"));
    assert_eq!(answered["sent"], answered["good"], "{answered}");
    assert_eq!(server.workers(), workers, "none was started anew");
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    server.until("all ended", || workers.iter().all(|id| is_gone(*id)));
}

#[test]
fn a_process_in_the_middle_of_a_long_run_ends_with_the_server() {
    let mut server = Server::spawn(&["--device", "null:1:60000"]);
    server.until("a process that warms up", || server.workers().len() == 1);
    let worker = server.workers()[0];
    std::thread::sleep(Duration::from_millis(200));
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let killed = Instant::now();
    server.until("ended", || is_gone(worker));
    assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
}

/// Nobody asks anything: the server looks by itself.
#[test]
fn a_process_that_is_killed_while_idle_comes_back() {
    let server = Server::with(&["--device", "null:1:20"]);
    server.until("a process", || server.workers().len() == 1);
    kill("-KILL", server.workers()[0]);
    let killed = Instant::now();
    server.until("not ready", || !server.get("/readyz").starts_with("HTTP/1.1 200"));
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
    server.until("another", || server.workers().len() == 2);
    server.until("ready", || server.get("/readyz").starts_with("HTTP/1.1 200"));
}

/// A worker that is started anew once the checkpoint was replaced: it does not serve the new one
/// beside devices that serve the old, says what to do, and is not started again.
#[test]
fn a_replaced_checkpoint_is_not_opened_again() {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    let from = testdata.join("A_tiny/e2e/pi0_libero/checkpoint");
    let dir = tempfile::tempdir().unwrap();
    copy(&from, dir.path());
    let tokenizer = testdata.join("D_preprocess/tokenizer/tok_bpe.model").display().to_string();
    let checkpoint = dir.path().display().to_string();
    let flags = ["--device", "cpu", "--precision", "f32", "--tokenizer", &tokenizer];
    let admin = Port::free().unwrap();
    let number = admin.number.to_string();
    let more = ["--checkpoint", &checkpoint, "--admin-port", &number];
    let mut server = Server::with(&[&flags[..], &more].concat());
    let weights = dir.path().join("model.safetensors");
    std::fs::copy(&weights, dir.path().join("new")).unwrap();
    std::fs::rename(dir.path().join("new"), &weights).unwrap();
    kill("-KILL", server.workers()[0]);
    server.until("refused", || {
        let log = server.log.lock().unwrap().join("\n");
        let named = format!("{} is not what it was", weights.display());
        log.contains(&named) && log.contains("POST /swap to serve the new files, or restart")
    });
    server.until("beyond help", || server.get("/livez").starts_with("HTTP/1.1 503"));
    assert!(server.get("/readyz").starts_with("HTTP/1.1 503"));
    // A second try would come within half a second.
    std::thread::sleep(Duration::from_secs(2));
    let log = server.log.lock().unwrap().join("\n");
    for told in ["device is reopened", "device is not opened again"] {
        assert_eq!(log.matches(told).count(), 1, "{told}: {log}");
    }
    let public = std::mem::replace(&mut server.port, admin);
    let answer = server.ask("POST", "/swap", "{}");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("\"other_weights\":false"), "the same bytes: {answer}");
    server.port = public;
    assert!(server.get("/livez").starts_with("HTTP/1.1 200"));
    assert!(server.get("/readyz").starts_with("HTTP/1.1 200"));
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &to),
            false => drop(std::fs::copy(&path, &to).unwrap()),
        }
    }
}

#[test]
fn a_swapped_checkpoint_ends_the_process_of_the_old_one() {
    let testdata = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    let checkpoint = testdata.join("A_tiny/e2e/pi0_libero/checkpoint").display().to_string();
    let tokenizer = testdata.join("D_preprocess/tokenizer/tok_bpe.model").display().to_string();
    let admin = Port::free().unwrap();
    let mut server = Server::with(&[
        "--device",
        "cpu",
        "--precision",
        "f32",
        "--checkpoint",
        &checkpoint,
        "--tokenizer",
        &tokenizer,
        "--admin-port",
        &admin.number.to_string(),
    ]);
    let public = std::mem::replace(&mut server.port, admin);
    let answer = server.ask("POST", "/swap", &format!("{{\"checkpoint\": {checkpoint:?}}}"));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.port = public;
    server.until("two processes", || server.workers().len() == 2);
    let [old, new] = server.workers()[..] else { panic!("two processes") };
    server.until("the old one ended", || !Path::new(&format!("/proc/{old}")).exists());
    assert!(!is_gone(new));
    assert!(server.get("/readyz").starts_with("HTTP/1.1 200"));
}

/// Ended, whether or not anybody has waited for it.
fn is_gone(id: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"));
    stat.is_ok_and(|s| s.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
        || !Path::new(&format!("/proc/{id}")).exists()
}

#[test]
fn a_worker_by_itself_says_what_it_is_for() {
    let output = Command::new(env!("CARGO_BIN_EXE_pirouette"))
        .arg("worker")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("what `serve` starts"));
}
