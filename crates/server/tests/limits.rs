//! Bounds: keys, sizes, connections, time, shutdown; and that nobody suffers for others.

mod rig;

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use pirouette_policy::Value;
use pirouette_server::load::{LoadOptions, run, sample_observation};
use pirouette_server::{
    ApiKeys, Dialect, Reply, RequestContext, ServeOptions, Service, ServiceError, ServiceFuture,
};
use rig::{Raw, Server, eventually, first_action, state, text};
use tokio::io::AsyncWriteExt;

const KEY: &str = "a-key-of-sixteen";

fn defaults() -> ServeOptions {
    ServeOptions::default()
}

fn get(path: &str, header: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n")
}

#[tokio::test]
async fn keys_guard_everything_but_health() {
    let options = ServeOptions { api_keys: Some(ApiKeys::parse(KEY).unwrap()), ..defaults() };
    let server = Server::plain(options).await;
    let upgrade = "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n";
    let good = format!("Authorization: Bearer {KEY}\r\n");
    let bad = "Authorization: Bearer a-key-of-sixteeN\r\n";
    let table = [
        ("/healthz", "", 200),
        ("/livez", "", 200),
        ("/readyz", "", 200),
        ("/health", "", 200),
        ("/metrics", "", 401),
        ("/metrics", bad, 401),
        ("/metrics", &good, 200),
        ("/contract", "", 401),
        ("/contract", &good, 200),
        ("/", "", 401),
        ("/", &good, 426),
        ("/", upgrade, 401),
        ("/livez", upgrade, 401),
    ];
    for (path, headers, want) in table {
        let (status, _, _) = server.get(&get(path, headers)).await;
        assert!(status.starts_with(&format!("HTTP/1.1 {want} ")), "{path} {headers}: {status}");
    }
    let mut raw = Raw(server.tcp().await);
    raw.write(get("/livez", &(upgrade.to_string() + &good)).as_bytes()).await;
    assert!(raw.head().await.starts_with("HTTP/1.1 101 "), "an upgrade wins on any path");
    let (_, _, metrics) = server.get(&get("/metrics", &good)).await;
    assert!(metrics.contains("refused_total{reason=\"unauthorized\"} 6"), "{metrics}");
}

#[tokio::test]
async fn plain_paths() {
    let server = Server::plain(defaults()).await;
    let (status, headers, body) = server.get(&get("/contract", "")).await;
    assert_eq!((status.as_str(), body.as_str()), ("HTTP/1.1 200 OK", r#"{"config":"script"}"#));
    assert!(headers.contains(&"Content-Type: application/json".to_string()), "{headers:?}");
    let (status, headers, body) = server.get(&get("/health", "")).await;
    assert_eq!((status.as_str(), body.as_str()), ("HTTP/1.1 200 OK", r#"{"status": "ok"}"#));
    assert!(headers.contains(&"Content-Type: application/json".to_string()), "{headers:?}");
    for path in ["/healthz?x", "/healthz/", "/nothing", "/metricsx"] {
        let (status, headers, body) = server.get(&get(path, "")).await;
        assert_eq!(status, "HTTP/1.1 426 Upgrade Required", "{path}");
        assert!(headers.contains(&"Upgrade: websocket".to_string()), "{headers:?}");
        assert!(body.starts_with("Failed to open a WebSocket connection: missing Connection"));
    }
    let upgrade = "Connection: upgrade\r\n";
    let (status, _, body) = server.get(&get("/", upgrade)).await;
    assert_eq!(status, "HTTP/1.1 426 Upgrade Required");
    assert!(body.contains("missing Upgrade header"), "{body}");
    let keyless = "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";
    let (status, _, body) = server.get(&get("/", keyless)).await;
    assert_eq!(status, "HTTP/1.1 400 Bad Request");
    assert!(body.contains("missing Sec-WebSocket-Key header"), "{body}");
    let (status, _, _) =
        server.get("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(status, "HTTP/1.1 405 Method Not Allowed");
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused_before_it_is_read() {
    let server = Server::plain(ServeOptions { max_frame_bytes: 1000, ..defaults() }).await;
    let mut client = server.client().await;
    client.ask(&[state(1.0), ("pad", text(&"x".repeat(900)))]).await;
    assert_eq!(first_action(&client.frame().await.map()), 1.0);
    // Only the head of a frame that claims a terabyte.
    let mut head = vec![0x82, 0x80 | 127];
    head.extend((1u64 << 40).to_be_bytes());
    head.extend([0; 4]);
    client.write(&head).await;
    assert_eq!(client.frame().await.close().0, 1009);
    // Fragments are added up.
    let mut client = server.client().await;
    let mut fragment = rig::masked(0, &[0; 600]);
    fragment[0] = 0x02;
    client.write(&fragment).await;
    client.send(0, &[0; 600]).await;
    assert_eq!(client.frame().await.close().0, 1009);
}

#[tokio::test]
async fn connections_are_counted_and_their_slots_return() {
    let server = Server::plain(ServeOptions { max_connections: 2, ..defaults() }).await;
    let first = server.client().await;
    let _second = server.client().await;
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n";
    let (status, _, body) = server.get(&get("/", upgrade)).await;
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body, "all 2 connections of this server are taken\n");
    let (_, _, metrics) = server.get(&get("/metrics", "")).await;
    assert!(metrics.contains("\npirouette_connections 2\n"), "health has a way in: {metrics}");
    drop(first);
    let started = Instant::now();
    loop {
        let mut raw = Raw(server.tcp().await);
        raw.write(get("/", upgrade).as_bytes()).await;
        if raw.head().await.starts_with("HTTP/1.1 101 ") {
            break;
        }
        assert!(started.elapsed() < rig::PATIENCE, "the slot never returned");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn half_open_connections_end_and_do_not_hurt_the_others() {
    let options = ServeOptions {
        handshake_timeout: Duration::from_millis(700),
        max_handshakes: 300,
        ..defaults()
    };
    let server = Server::plain(options).await;
    let mut half_open = Vec::new();
    for i in 0..250 {
        let mut stream = server.tcp().await;
        if i % 2 == 0 {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
        }
        half_open.push(Raw(stream));
    }
    let mut client = server.client().await;
    let mut slowest = Duration::ZERO;
    for i in 0..50 {
        let asked = Instant::now();
        client.ask(&[state(i as f64)]).await;
        assert_eq!(first_action(&client.frame().await.map()), i as f64);
        slowest = slowest.max(asked.elapsed());
    }
    assert!(slowest < Duration::from_millis(250), "{slowest:?}");
    let mut last = half_open.pop().unwrap();
    last.closed().await;
    let mut first = half_open.swap_remove(0);
    // hyper may say 408 before it closes a request that was begun.
    let mut rest = Vec::new();
    let read = tokio::io::AsyncReadExt::read_to_end(&mut first.0, &mut rest);
    tokio::time::timeout(rig::PATIENCE, read).await.expect("closed").unwrap();
}

#[tokio::test]
async fn too_many_half_open_connections_are_dropped_and_keep_nobody_out() {
    let server = Server::plain(ServeOptions { max_handshakes: 3, ..defaults() }).await;
    let mut robot = server.client().await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(Raw(server.tcp().await));
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    for oldest in 0..3 {
        let (status, _, _) = server.get(&get("/livez", "")).await;
        assert_eq!(status, "HTTP/1.1 200 OK", "the oldest made room");
        if oldest == 0 {
            held.remove(0).closed().await;
            held.push(Raw(server.tcp().await));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    // As many as come at once.
    for _ in 0..20 {
        held.push(Raw(server.tcp().await));
    }
    let asked = Instant::now();
    assert_eq!(server.get(&get("/livez", "")).await.0, "HTTP/1.1 200 OK");
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    robot.ask(&[state(1.0)]).await;
    assert_eq!(first_action(&robot.frame().await.map()), 1.0);
    let (_, _, metrics) = server.get(&get("/metrics", "")).await;
    assert!(metrics.contains("refused_total{reason=\"handshakes\"} "), "{metrics}");
}

#[tokio::test]
async fn a_reader_that_does_not_read_is_dropped_and_costs_one_answer() {
    let options = ServeOptions { write_timeout: Duration::from_millis(200), ..defaults() };
    let server = Server::plain(options).await;
    let mut lazy = server.client().await;
    let mut good = server.client().await;
    // Answers of 5.6 MB, of which the sockets hold but some.
    for _ in 0..6 {
        lazy.ask(&[state(0.0), ("rows", Value::Int(100_000))]).await;
    }
    for i in 0..20 {
        good.ask(&[state(i as f64)]).await;
        assert_eq!(first_action(&good.frame().await.map()), i as f64);
    }
    let started = Instant::now();
    loop {
        let (_, _, metrics) = server.get(&get("/metrics", "")).await;
        if metrics.contains("outcome=\"slow_reader\"} 1")
            && metrics.contains("\npirouette_connections 1\n")
        {
            break;
        }
        assert!(started.elapsed() < rig::PATIENCE, "{metrics}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_answer_of_many_megabytes_is_sent() {
    let server = Server::plain(defaults()).await;
    let mut client = server.client().await;
    let one =
        Value::Map(vec![("state".into(), Value::Float(1.0)), ("rows".into(), Value::Int(100_000))]);
    client.ask(&[("batch", Value::List(vec![one; 3]))]).await;
    let answer = client.frame().await;
    assert!(answer.payload.len() > 3 * 5_600_000);
    let (_, Value::List(results)) = &answer.map()[0] else { panic!("a batch") };
    assert_eq!(results.len(), 3);
    assert!(results.iter().all(|result| result.get("actions").is_some()));
}

#[tokio::test]
async fn silence_is_pinged_and_then_ended() {
    let options = ServeOptions {
        keepalive_interval: Duration::from_millis(100),
        keepalive_timeout: Duration::from_millis(150),
        ..defaults()
    };
    let server = Server::plain(options).await;
    let mut client = server.client().await;
    for _ in 0..3 {
        let ping = client.frame().await;
        assert_eq!(ping.opcode, 9);
        client.send(10, &ping.payload).await;
    }
    assert_eq!(client.frame().await.opcode, 9);
    let unanswered = Instant::now();
    assert_eq!(client.frame().await.close(), (1011, "keepalive ping timeout"));
    assert!(unanswered.elapsed() > Duration::from_millis(100), "{:?}", unanswered.elapsed());
}

/// A simulator that steps for minutes answers no ping meanwhile, and no message waits for it.
#[tokio::test]
async fn silence_of_vla_evals_clients_is_ended_much_later() {
    let options = ServeOptions {
        dialect: Dialect::VlaEval,
        keepalive_interval: Duration::from_millis(50),
        keepalive_timeout: Duration::from_millis(50),
        vla_eval_keepalive_timeout: Duration::from_millis(700),
        ..defaults()
    };
    let server = Server::plain(options).await;
    let mut client = server.websocket().await;
    let say = |kind: &str, payload: Vec<(String, Value)>| {
        [
            ("type", text(kind)),
            ("payload", Value::Map(payload)),
            ("seq", Value::Int(1)),
            ("timestamp", Value::Float(0.0)),
        ]
    };
    client.ask(&say("hello", vec![])).await;
    assert_eq!(client.frame().await.map()[0].1, text("hello"));
    assert_eq!(client.frame().await.opcode, 9);
    tokio::time::sleep(Duration::from_millis(300)).await;
    client.ask(&say("observation", vec![("state".into(), Value::Float(1.0))])).await;
    assert_eq!(client.frame().await.map()[0].1, text("action"), "not ended, and pinged once");
    assert_eq!(client.frame().await.opcode, 9);
    let pinged = Instant::now();
    assert_eq!(client.frame().await.close(), (1011, "keepalive ping timeout"));
    assert!(pinged.elapsed() > Duration::from_millis(600), "{:?}", pinged.elapsed());
}

#[tokio::test]
async fn idleness_is_ended_only_when_asked_for() {
    let idle = Some(Duration::from_millis(150));
    let server = Server::plain(ServeOptions { idle_timeout: idle, ..defaults() }).await;
    let mut client = server.client().await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(80)).await;
        client.ask(&[state(1.0)]).await;
        client.frame().await.map();
    }
    assert_eq!(client.frame().await.close(), (1001, "no request for too long"));
}

/// Whose devices are beyond help.
struct Lost;

impl Service for Lost {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metadata(&self) -> Value {
        Value::Map(vec![])
    }

    fn infer(&self, _: Value, _: RequestContext) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async { Err(ServiceError::refusal("unavailable", "no device is ready")) })
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(async { self.alive() })
    }

    fn alive(&self) -> Result<(), String> {
        Err("/dev/nvidia0 hung 3 times: restart the process".into())
    }
}

#[tokio::test]
async fn a_process_that_can_not_answer_again_says_that_it_should_be_restarted() {
    let server = Server::with(std::sync::Arc::new(Lost), defaults(), true).await;
    let (status, _, body) = server.get(&get("/livez", "")).await;
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body, "it does not recover by itself: see the log\n", "the reason is the log's");
    assert!(server.admin(&get("/livez", "")).await.0.contains(" 503 "));
    for (status, _, body) in
        [server.get(&get("/health", "")).await, server.admin(&get("/health", "")).await]
    {
        assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
        assert_eq!(body, r#"{"status":"not ready: no device is ready"}"#);
    }
    assert!(server.get(&get("/healthz", "")).await.0.contains(" 200 "));
}

#[tokio::test]
async fn shutdown_answers_what_runs_then_says_goodbye() {
    let mut server = Server::plain(defaults()).await;
    let mut busy = server.client().await;
    let mut idle = server.client().await;
    busy.ask(&[state(1.0), ("sleep_ms", Value::Int(300))]).await;
    eventually("running", || server.script.running.load(SeqCst) == 1).await;
    server.shut_down();
    assert_eq!(idle.frame().await.close(), (1001, "server is shutting down"));
    idle.send(8, &1001u16.to_be_bytes()).await;
    idle.closed().await;
    let (status, _, body) = server.get(&get("/readyz", "")).await;
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body, "not ready: shutting down\n");
    let (status, _, body) = server.get(&get("/health", "")).await;
    assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body, r#"{"status":"not ready: shutting down"}"#);
    assert!(server.get(&get("/livez", "")).await.0.contains("200"));
    let upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n";
    assert!(server.get(&get("/", upgrade)).await.0.contains("503"));
    assert_eq!(first_action(&busy.frame().await.map()), 1.0);
    assert_eq!(busy.frame().await.close().0, 1001);
    busy.send(8, &1001u16.to_be_bytes()).await;
    let served = tokio::time::timeout(rig::PATIENCE, &mut server.task).await.unwrap().unwrap();
    assert!(served.drained);
}

#[tokio::test]
async fn shutdown_says_goodbye_to_those_who_wait_for_a_model() {
    let mut server = Server::start(Value::Map(vec![]), false, defaults()).await;
    let mut waiting = server.websocket().await;
    // Whoever has spoken already is not answered either.
    let mut early = server.websocket().await;
    early.ask(&[state(1.0)]).await;
    server.shut_down();
    for client in [&mut waiting, &mut early] {
        assert_eq!(client.frame().await.close(), (1001, "server is shutting down"));
        client.send(8, &1001u16.to_be_bytes()).await;
        client.closed().await;
    }
    let served = tokio::time::timeout(rig::PATIENCE, &mut server.task).await.unwrap().unwrap();
    assert!(served.drained);
}

#[tokio::test]
async fn a_drain_that_takes_too_long_is_given_up() {
    let options = ServeOptions { drain_timeout: Duration::from_millis(200), ..defaults() };
    let mut server = Server::plain(options).await;
    let mut busy = server.client().await;
    for _ in 0..2 {
        busy.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
    }
    eventually("running", || server.script.running.load(SeqCst) == 1).await;
    // A half-open connection does not hold up anything.
    let _half_open = server.tcp().await;
    server.shut_down();
    let started = Instant::now();
    // The one that runs, and the one that was read ahead, are told before the connection ends.
    for _ in 0..2 {
        let frame = busy.frame().await;
        let told = frame.text();
        assert!(told.ends_with("RuntimeError: the server is shutting down\n"), "{told}");
    }
    assert_eq!(busy.frame().await.close(), (1001, "server is shutting down"));
    busy.send(8, &1001u16.to_be_bytes()).await;
    let served = tokio::time::timeout(rig::PATIENCE, &mut server.task).await.unwrap().unwrap();
    assert!(!served.drained && started.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn stages_are_counted_of_what_is_answered_and_requests_of_what_was_asked() {
    let server = Server::plain(defaults()).await;
    let mut client = server.client().await;
    let one = Value::Map(vec![("state".into(), Value::Float(1.0))]);
    client.ask(&[state(1.0)]).await;
    client.frame().await.map();
    client.ask(&[("batch", Value::List(vec![one; 3]))]).await;
    client.frame().await.map();
    client.ask(&[("prompt", text("busy"))]).await;
    client.frame().await.text();
    let asked = [state(1.0), ("sleep_ms", Value::Int(60_000))];
    client.ask(&asked).await;
    eventually("running", || server.script.running.load(SeqCst) == 1).await;
    drop(client);
    eventually("withdrawn", || server.script.running.load(SeqCst) == 0).await;
    let (_, _, metrics) = server.get(&get("/metrics", "")).await;
    for stage in ["decode", "infer", "encode", "total"] {
        let count = format!("pirouette_request_seconds_count{{stage=\"{stage}\"}} 2\n");
        assert!(metrics.contains(&count), "{count}{metrics}");
    }
    for (outcome, count) in [("ok", 4), ("overloaded", 1), ("gone", 1)] {
        let line = format!("pirouette_requests_total{{outcome=\"{outcome}\"}} {count}\n");
        assert!(metrics.contains(&line), "{line}{metrics}");
    }
}

#[tokio::test]
async fn sixty_four_clients_are_all_served() {
    let server = Server::plain(defaults()).await;
    let Value::Map(mut observation) = sample_observation(1, 64) else { panic!() };
    observation.push(("state".into(), Value::Float(1.0)));
    observation.push(("sleep_ms".into(), Value::Int(3)));
    let options = LoadOptions {
        url: format!("ws://{}", server.address),
        api_key: None,
        clients: 64,
        requests: 20,
        duration: None,
        warm_up: 1,
        rate: None,
        deadline: None,
        observation: Value::Map(observation),
        timeout: Duration::from_secs(20),
    };
    let report = run(&options).await.unwrap();
    assert_eq!((report.sent, report.answered, report.good), (1280, 1280, 1280));
    assert!(report.errors.is_empty(), "{report:?}");
    assert!(report.latency.p50_ms >= 3.0 && report.over_server.p50_ms > 0.0);
}

#[tokio::test]
async fn killed_clients_leave_nothing_behind() {
    let server = Server::plain(defaults()).await;
    for round in 0..300u32 {
        match round % 3 {
            0 => drop(server.tcp().await),
            1 => drop(server.websocket().await),
            _ => {
                let mut client = server.client().await;
                client.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
                eventually("running", || server.script.running.load(SeqCst) == 1).await;
                drop(client);
                eventually("withdrawn", || server.script.running.load(SeqCst) == 0).await;
            }
        }
    }
    assert_eq!(server.script.withdrawn.load(SeqCst), 100);
    let started = Instant::now();
    while !server.get(&get("/metrics", "")).await.2.contains("\npirouette_connections 0\n") {
        assert!(started.elapsed() < rig::PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn mutated_requests_hurt_nobody_else() {
    let server = Server::plain(defaults()).await;
    let mut good = server.client().await;
    let request = std::fs::read(rig::session("good_three_inferences").join("client_0.msgpack"));
    let request = request.unwrap();
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    let (mut answered, mut refused) = (0, 0);
    for round in 0..500 {
        let mut client = server.client().await;
        let mut payload = request.clone();
        for _ in 0..next() % 4 + 1 {
            // Mostly in the structure, which lies at the ends.
            let at = if next() % 2 == 0 { next() % 40 } else { payload.len() - 1 - next() % 40 };
            payload[at] = next() as u8;
        }
        client.send(2, &payload).await;
        let answer = client.frame().await;
        match answer.opcode {
            2 => answered += 1,
            _ => {
                assert!(answer.text().starts_with("Traceback"), "{}", answer.text());
                assert_eq!(client.frame().await.close().0, 1011);
                refused += 1;
            }
        }
        good.ask(&[state(round as f64)]).await;
        assert_eq!(first_action(&good.frame().await.map()), round as f64);
    }
    assert!(answered > 20 && refused > 100, "{answered} answered, {refused} refused");
}
