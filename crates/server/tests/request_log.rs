//! The request log; alone in its process, which has but one log.

mod rig;

use std::sync::{Arc, Mutex};

use pirouette_server::{ApiKeys, ServeOptions};
use rig::{Raw, Server, state};

const ARM: &str = "the-secret-of-an-arm";

/// Lines of a log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn the_request_log_names_keys_and_outcomes_and_no_secrets() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let api_keys = Some(ApiKeys::parse(&format!("arm {ARM} rate=0.001 burst=2\n")).unwrap());
    let server = Server::plain(ServeOptions { api_keys, ..Default::default() }).await;
    let mut arm = Raw(server.tcp().await);
    arm.upgrade(&format!("Authorization: Api-Key {ARM}\r\n")).await;
    assert_eq!(arm.frame().await.opcode, 2);
    for _ in 0..2 {
        arm.ask(&[state(1.0), ("prompt", rig::text("a private matter"))]).await;
        arm.frame().await;
    }
    arm.ask(&[]).await;
    arm.frame().await;
    let log = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let requests: Vec<serde_json::Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &serde_json::Value| line["target"] == "pirouette::request")
        .collect();
    let outcomes: Vec<_> = requests.iter().map(|r| r["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["ok", "ok", "quota"]);
    for (i, request) in requests.iter().enumerate() {
        assert_eq!((&request["key"], &request["level"]), (&"arm".into(), &"DEBUG".into()));
        assert_eq!((&request["connection"], &request["request"]), (&1.into(), &(i + 1).into()));
        assert!(request["ms"].as_f64().unwrap() >= 0.0);
    }
    for secret in [ARM, "a private matter"] {
        assert!(!log.contains(secret), "{log}");
    }
}
