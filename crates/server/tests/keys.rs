//! Keys with names and quotas, over real sockets: refusals, revocation, other keys in the file.

mod rig;

use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use pirouette_policy::Value;
use pirouette_server::{ApiKeys, ServeOptions};
use rig::{Raw, Server, eventually, first_action, state, upgrade_request};

const ARM: &str = "the-secret-of-an-arm";
const LEG: &str = "the-secret-of-a-leg";

fn header(key: &str) -> String {
    format!("Authorization: Api-Key {key}\r\n")
}

async fn keyed(text: &str) -> Server {
    let api_keys = Some(ApiKeys::parse(text).unwrap());
    Server::with_admin(ServeOptions { api_keys, ..Default::default() }).await
}

async fn client(server: &Server, key: &str) -> Raw {
    let mut raw = Raw(server.tcp().await);
    raw.upgrade(&header(key)).await;
    assert_eq!(raw.frame().await.opcode, 2);
    raw
}

async fn metrics(server: &Server) -> String {
    server.admin("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.2
}

async fn metric(server: &Server, line: &str) {
    let started = Instant::now();
    loop {
        let metrics = metrics(server).await;
        if metrics.lines().any(|l| l == line) {
            return;
        }
        assert!(started.elapsed() < rig::PATIENCE, "no `{line}` in\n{metrics}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn requests_over_the_rate_are_refused_and_the_socket_stays_open() {
    let server = keyed(&format!("arm {ARM} rate=0.001 burst=2\nleg {LEG}\n")).await;
    let mut arm = client(&server, ARM).await;
    let mut leg = client(&server, LEG).await;
    for i in 0..2 {
        arm.ask(&[state(i as f64)]).await;
        assert_eq!(first_action(&arm.frame().await.map()), i as f64);
    }
    // Another connection of the same key has no bucket of its own.
    let mut other = client(&server, ARM).await;
    for i in 0..3 {
        let raw = if i == 1 { &mut other } else { &mut arm };
        raw.ask(&[state(0.0)]).await;
        let refusal = raw.frame().await;
        let last = refusal.text().lines().last().unwrap().to_owned();
        let want = "RuntimeError: key `arm` may send 0.001 requests a second: try again in ";
        assert!(last.starts_with(want), "{last}");
    }
    for i in 0..10 {
        leg.ask(&[state(i as f64)]).await;
        assert_eq!(first_action(&leg.frame().await.map()), i as f64, "the neighbour is served");
    }
    metric(&server, "pirouette_key_refused_total{key=\"arm\",quota=\"rate\"} 3").await;
    metric(&server, "pirouette_key_requests_total{key=\"arm\"} 2").await;
    metric(&server, "pirouette_key_requests_total{key=\"leg\"} 10").await;
    metric(&server, "pirouette_requests_total{outcome=\"quota\"} 3").await;
    let text = metrics(&server).await;
    assert!(!text.contains(ARM) && !text.contains(LEG), "keys are never told");
}

#[tokio::test]
async fn requests_in_flight_are_counted_over_all_connections() {
    let server = keyed(&format!("arm {ARM} in_flight=1\n")).await;
    let mut busy = client(&server, ARM).await;
    let mut second = client(&server, ARM).await;
    busy.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
    eventually("running", || server.script.running.load(SeqCst) == 1).await;
    second.ask(&[state(2.0)]).await;
    let refusal = second.frame().await;
    let want = "RuntimeError: key `arm` may have 1 requests in flight: try again when one is \
                answered\n";
    assert!(refusal.text().ends_with(want), "{}", refusal.text());
    // Withdrawn work gives its place back.
    drop(busy);
    metric(&server, "pirouette_key_in_flight{key=\"arm\"} 0").await;
    second.ask(&[state(3.0)]).await;
    assert_eq!(first_action(&second.frame().await.map()), 3.0);
}

#[tokio::test]
async fn connections_of_a_key_are_counted() {
    let server = keyed(&format!("arm {ARM} connections=1\nleg {LEG}\n")).await;
    let first = client(&server, ARM).await;
    let (status, _, body) = server.get(&upgrade_request(&header(ARM))).await;
    assert_eq!(status, "HTTP/1.1 429 Too Many Requests");
    assert_eq!(body, "key `arm` has all of its 1 connections open: close one\n");
    let _neighbour = client(&server, LEG).await;
    metric(&server, "pirouette_key_connections{key=\"arm\"} 1").await;
    drop(first);
    metric(&server, "pirouette_key_connections{key=\"arm\"} 0").await;
    client(&server, ARM).await;
    metric(&server, "pirouette_connections_refused_total{reason=\"quota\"} 1").await;
}

async fn with_file(path: &Path, text: &str) -> Server {
    std::fs::write(path, text).unwrap();
    let options = ServeOptions {
        api_keys: Some(ApiKeys::read(path).unwrap()),
        reload_interval: Duration::from_millis(20),
        ..Default::default()
    };
    Server::with_admin(options).await
}

#[tokio::test]
async fn a_changed_file_adds_keys_and_revokes_those_that_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    let server = with_file(&path, &format!("arm {ARM}\nleg {LEG} rate=0.001\n")).await;
    let mut arm = client(&server, ARM).await;
    let mut busy = client(&server, ARM).await;
    let mut leg = client(&server, LEG).await;
    leg.ask(&[state(1.0)]).await;
    leg.frame().await.map();
    busy.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
    eventually("running", || server.script.running.load(SeqCst) == 1).await;

    // A file that can't be used changes nothing.
    std::fs::write(&path, "no key\n").unwrap();
    metric(&server, "pirouette_reloads_total{file=\"api_keys\",outcome=\"failed\"} 1").await;
    arm.ask(&[state(5.0)]).await;
    assert_eq!(first_action(&arm.frame().await.map()), 5.0);

    // The arm is gone, the leg has a new name and no quota, the eye is new.
    std::fs::write(&path, format!("left-leg {LEG}\neye the-secret-of-an-eye\n")).unwrap();
    for raw in [&mut arm, &mut busy] {
        let close = raw.frame().await;
        assert_eq!(close.close(), (1008, "the key of this connection was revoked"));
    }
    eventually("withdrawn", || server.script.withdrawn.load(SeqCst) == 1).await;
    assert!(server.get(&upgrade_request(&header(ARM))).await.0.contains(" 401 "));
    client(&server, "the-secret-of-an-eye").await;
    leg.ask(&[state(6.0)]).await;
    assert_eq!(first_action(&leg.frame().await.map()), 6.0, "a key that stays is not disturbed");
    metric(&server, "pirouette_key_requests_total{key=\"left-leg\"} 2").await;
    assert!(!metrics(&server).await.contains("key=\"arm\""));
}

#[cfg(unix)]
#[tokio::test]
async fn hangup_reads_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys");
    std::fs::write(&path, ARM).unwrap();
    let options = ServeOptions {
        api_keys: Some(ApiKeys::read(&path).unwrap()),
        reload_interval: Duration::from_secs(3600),
        ..Default::default()
    };
    let server = Server::with_admin(options).await;
    let _arm = client(&server, ARM).await;
    std::fs::write(&path, format!("{ARM}\n{LEG}\n")).unwrap();
    let kill = ["-HUP", &std::process::id().to_string()];
    assert!(std::process::Command::new("kill").args(kill).status().unwrap().success());
    metric(&server, "pirouette_reloads_total{file=\"api_keys\",outcome=\"ok\"} 1").await;
    client(&server, LEG).await;
}
