//! The log of the binary: where it listens, what clients can't make of it, and that nothing waits
//! for whoever should read it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pirouette_policy::Value;
use pirouette_policy::config::named;
use pirouette_policy::sample_observation;
use pirouette_server::load::{self, LoadOptions, LoadReport};

#[cfg(unix)]
#[path = "../src/stress/port.rs"]
mod port;

/// Ended with the test, whatever becomes of it.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Two clients ask.
fn ask(port: u16, requests: usize, observation: Value) -> LoadReport {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(load::run(&LoadOptions {
        url: format!("ws://127.0.0.1:{port}"),
        api_key: None,
        clients: 2,
        requests: requests / 2,
        warm_up: 0,
        duration: None,
        rate: None,
        deadline: None,
        observation,
        timeout: Duration::from_secs(60),
    }));
    report.unwrap()
}

/// The server's own limits are above what these files allow.
#[cfg(unix)]
#[test]
fn connections_that_find_no_file_are_told() {
    use std::net::TcpStream;
    let port = port::Port::free().unwrap();
    let number = port.number.to_string();
    let binary = env!("CARGO_BIN_EXE_pirouette");
    let mut child = Command::new("sh")
        .args(["-c", "ulimit -n 48; exec \"$0\" \"$@\"", binary, "serve", "pi0_libero"])
        .args(["--device", "null", "--port", &number])
        .env_remove("PIROUETTE_LOG")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let _served = Served(child);
    assert!(log.any(|line| line.contains("ready after")));
    let _held: Vec<_> =
        (0..60).map(|_| TcpStream::connect(("127.0.0.1", port.number)).unwrap()).collect();
    assert!(log.any(|line| line.contains("none can be accepted") && line.contains("ulimit -n")));
}

#[test]
fn the_port_is_told_that_the_system_chose_and_long_prompts_do_not_fill_the_log() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pirouette"))
        .args(["serve", "pi0_libero", "--device", "null", "--port", "0", "--admin-port", "0"])
        .env_remove("PIROUETTE_LOG")
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut served = Served(child);
    let mut port = |before: &str| -> u16 {
        let line = log.find(|line| line.contains(before)).unwrap();
        assert!(!line.contains('\x1b'), "colours in a file: {line}");
        let digits = line.rsplit(before).next().unwrap();
        digits.split(';').next().unwrap().trim().parse().unwrap()
    };
    let port = [port("listening on ws://127.0.0.1:"), port("admin pages on http://127.0.0.1:")][0];
    assert_ne!(port, 0);
    let Value::Map(mut observation) = sample_observation(&named("pi0_libero").unwrap(), 0) else {
        panic!("a map")
    };
    observation.retain(|(key, _)| key != "prompt");
    observation.push(("prompt".into(), Value::Str("pick it up ".repeat(100))));
    let report = ask(port, 100, Value::Map(observation));
    let seconds = report.seconds as usize;
    served.0.kill().unwrap();
    let cut = log.filter(|line| line.contains("the prompt was cut")).count();
    assert!((1..=seconds + 2).contains(&cut), "{cut} lines in {seconds} s");
}

#[cfg(unix)]
mod unread {
    use std::io::{PipeReader, PipeWriter, Write, pipe};
    use std::net::TcpStream;
    use std::time::Instant;

    use super::*;
    use crate::port::Port;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A pipe that is full.
    fn full_pipe() -> (PipeReader, PipeWriter) {
        let (reader, writer) = pipe().unwrap();
        let mut filler = writer.try_clone().unwrap();
        // As much as a pipe holds; where one holds less, the thread waits until nobody can read.
        std::thread::spawn(move || filler.write_all(&[b'\n'; 65536]));
        (reader, writer)
    }

    #[test]
    fn a_log_that_nobody_reads_stops_neither_requests_nor_the_end() {
        let (unread, stderr) = full_pipe();
        let port = Port::free().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_pirouette"))
            .args(["serve", "pi0_libero", "--device", "null", "--isolate", "always"])
            .args(["--port", &port.number.to_string()])
            .env("PIROUETTE_LOG", "debug")
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut served = Served(child);
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", port.number)).is_err() {
            assert!(begun.elapsed() < PATIENCE, "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        let report = ask(port.number, 100, sample_observation(&named("pi0_libero").unwrap(), 0));
        assert_eq!(report.good, 100);
        let id = served.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        let told = Instant::now();
        let status = loop {
            if let Some(status) = served.0.try_wait().unwrap() {
                break status;
            }
            assert!(told.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}");
        drop(unread);
    }

    #[test]
    fn a_mistake_is_no_reason_to_wait_for_a_reader() {
        let (unread, stderr) = full_pipe();
        let begun = Instant::now();
        let child = Command::new(env!("CARGO_BIN_EXE_pirouette"))
            .args(["serve", "no_such_policy", "--device", "null"])
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut served = Served(child);
        while served.0.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < PATIENCE, "the server does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(unread);
    }
}
