//! The log of the binary: where it listens, and what clients can't make of it.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pirouette_policy::Value;
use pirouette_policy::config::named;
use pirouette_policy::sample_observation;
use pirouette_server::load::{self, LoadOptions};

/// Ended with the test, whatever becomes of it.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
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
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let report = runtime.block_on(load::run(&LoadOptions {
        url: format!("ws://127.0.0.1:{port}"),
        api_key: None,
        clients: 2,
        requests: 100,
        warm_up: 0,
        duration: None,
        rate: None,
        deadline: None,
        observation: Value::Map(observation),
        timeout: Duration::from_secs(60),
    }));
    let seconds = report.unwrap().seconds as usize;
    served.0.kill().unwrap();
    let cut = log.filter(|line| line.contains("the prompt was cut")).count();
    assert!((1..=seconds + 2).contains(&cut), "{cut} lines in {seconds} s");
}
