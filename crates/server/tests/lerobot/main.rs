//! LeRobot's asynchronous inference over a real connection.

mod client;
#[path = "../rig/mod.rs"]
mod rig;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use client::*;
use pirouette_policy::config::from_toml;
use pirouette_policy::{NdArray, PolicyConfig, Value};
use pirouette_server::pickle::{TimedActions, write_actions};
use pirouette_server::{
    RecordOptions, Recorder, Recording, Reply, RequestContext, ServeOptions, Service, ServiceError,
    ServiceFuture, msgpack,
};
use rig::{Server, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

/// What a LeRobot checkpoint says of itself.
const POLICY: &str = "
    name = 'lerobot'
    family = 'pi05'
    horizon = 5
    processing = 'lerobot'
    [robot]
    kind = 'generic'
    output_dims = 6
    prompt_key = 'task'
    cameras = [
        { key = 'observation.images.front' },
        { key = 'observation.images.wrist', required = false },
    ]
    state = [{ key = 'observation.state', dims = 6 }]
";

/// Five actions that count up from the state; some tasks fail. It can be held.
#[derive(Default)]
struct Counting {
    seen: Mutex<Vec<Value>>,
    running: AtomicUsize,
    withdrawn: AtomicUsize,
    held: watch::Sender<bool>,
}

struct Running<'a>(&'a Counting, bool);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
        self.0.withdrawn.fetch_add(usize::from(!self.1), SeqCst);
    }
}

impl Service for Counting {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metadata(&self) -> Value {
        Value::Map(vec![])
    }

    fn infer(
        &self,
        observation: Value,
        _: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async move {
            self.running.fetch_add(1, SeqCst);
            let mut running = Running(self, false);
            self.seen.lock().unwrap().push(observation.clone());
            let _ = self.held.subscribe().wait_for(|held| !held).await;
            running.1 = true;
            match observation.get("task") {
                Some(Value::Str(s)) if s == "boom" => {
                    return Err(ServiceError::exception("ValueError", "no — like this"));
                }
                Some(Value::Str(s)) if s == "busy" => {
                    return Err(ServiceError::refusal("overloaded", "the queue is full"));
                }
                Some(Value::Str(s)) if s == "die" => panic!("a bug in the service"),
                _ => {}
            }
            let state = observation.get("observation.state").unwrap().to_array().unwrap();
            let actions = actions(&state.to_f64().unwrap());
            let actions = NdArray::from_f64(vec![5, 6], &actions).unwrap();
            Ok(Reply { actions, model_ms: 1.0, timing: None, extras: vec![], identity: None })
        })
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }

    fn policy_config(&self) -> Option<PolicyConfig> {
        Some(from_toml(POLICY).unwrap())
    }
}

fn actions(state: &[f64]) -> Vec<f64> {
    (0..5).flat_map(|i| state.iter().map(move |x| x + f64::from(i))).collect()
}

async fn start(options: ServeOptions) -> Server<Counting> {
    Server::with(Arc::default(), options, false).await
}

fn seen(timestep: u16, position: f64, must_go: bool, task: &str) -> Vec<u8> {
    Seen { timestep, must_go, position, task }.pickle()
}

/// The answer to an observation of [`Seen`]: three actions, as the setup wants.
fn answer(timestep: u16, position: f64) -> Vec<u8> {
    let mut state = [0.0; 6];
    state[0] = position;
    write_actions(&TimedActions {
        module: "lerobot.x",
        actions: &actions(&state)[..18],
        dims: 6,
        timestamp: 100.0,
        timestep: timestep.into(),
        period: 1.0 / 30.0,
    })
}

async fn metrics(server: &Server<Counting>) -> String {
    server.get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.2
}

#[tokio::test]
async fn recorded_clients_get_the_actions_they_asked_for() {
    let server = start(ServeOptions::default()).await;
    for protocol in ["p4", "p5"] {
        let robot = Client::connect(server.lerobot_address).await;
        assert_eq!(robot.call("Ready", &framed(b"")).await.unwrap(), "");
        robot.set_up(&fixture(&format!("setup.{protocol}"))).await.unwrap();
        let sent = fixture(&format!("observation.numpy2.{protocol}"));
        assert_eq!(robot.observe(&sent).await.unwrap(), "");
        let state: Vec<f64> = (0..6).map(|i| f64::from(i) * 10.5 - 20.0).collect();
        let want = write_actions(&TimedActions {
            module: "lerobot.async_inference.helpers",
            actions: &actions(&state)[..18],
            dims: 6,
            timestamp: 1764000000.25 + 7.0 / 30.0,
            timestep: 7,
            period: 1.0 / 30.0,
        });
        assert_eq!(robot.actions().await.unwrap(), want);
        let observation = server.script.seen.lock().unwrap().pop().unwrap();
        let Value::Map(map) = &observation else { panic!("a map") };
        let keys: Vec<&str> = map.iter().map(|(key, _)| &**key).collect();
        let images = ["observation.images.front", "observation.images.wrist"];
        assert_eq!(keys, ["observation.state", images[0], images[1], "task"]);
        for (key, height) in images.into_iter().zip([28, 21]) {
            let pixels: Vec<u8> = (0..height * 84).map(|i| ((i * 7 + 5) % 251) as u8).collect();
            let image = NdArray::from_u8(vec![height, 28, 3], pixels).unwrap();
            assert_eq!(observation.get(key), Some(&Value::Array(image)));
        }
        assert_eq!(observation.get("task"), Some(&Value::Str("put the cube into the box".into())));
    }
    let metrics = metrics(&server).await;
    assert!(metrics.contains("pirouette_requests_total{outcome=\"ok\"} 2"), "{metrics}");
    let queued = "pirouette_lerobot_observations_total{outcome=\"queued\"} 2";
    assert!(metrics.contains(queued), "{metrics}");
}

#[tokio::test]
async fn observations_in_pieces_and_how_they_go_wrong() {
    let options = ServeOptions { max_frame_bytes: 100_000, ..ServeOptions::default() };
    let server = start(options).await;
    let robot = Client::ready(server.lerobot_address).await;
    let pickle = seen(3, 4.0, true, "x");
    let cut = pickle.chunks(1500).collect::<Vec<_>>();
    let [first, middle @ .., last] = &cut[..] else { panic!("at least two") };
    assert!(!middle.is_empty());
    // What began before is forgotten.
    let mut body = [piece(1, b"something else"), piece(1, first)].concat();
    middle.iter().for_each(|part| body.extend(piece(2, part)));
    body.extend(piece(3, last));
    robot.call("SendObservations", &body).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(3, 4.0));

    let big = [piece(1, &[0; 60_000]), piece(2, &[0; 60_000])].concat();
    let huge = [&[0], &(5u32 << 20).to_be_bytes()[..]].concat();
    for (body, code, want) in [
        (big, RESOURCE_EXHAUSTED, "above 100000 bytes"),
        (huge, RESOURCE_EXHAUSTED, "at most 4194304 are read"),
        (piece(0, b"x"), INVALID_ARGUMENT, "transfer state 0 is unknown"),
        (piece(1, b"x"), INVALID_ARGUMENT, "the observation has no end"),
        (vec![], INVALID_ARGUMENT, "the observation has no end"),
        (b"\0\0\0\0\x05ab".to_vec(), INVALID_ARGUMENT, "ends within a message"),
        (framed(b"\x12\xff"), INVALID_ARGUMENT, "no protobuf of LeRobot's"),
        (b"\x01\0\0\0\x01x".to_vec(), UNIMPLEMENTED, "compressed"),
        (piece(3, b"cos\nsystem\n."), INVALID_ARGUMENT, "pickle protocol 99"),
        (piece(3, &fixture("refused.call.p4")), INVALID_ARGUMENT, "`posix.system`"),
        (piece(3, &fixture("setup.p4")), INVALID_ARGUMENT, "a TimedObservation was expected"),
        (piece(3, &fixture("misc.p4")), INVALID_ARGUMENT, "has no `shoulder_pan.pos`"),
    ] {
        let (found, text) = robot.call("SendObservations", &body).await.unwrap_err();
        assert!(found == code && text.contains(want), "{found} {text}");
    }
    let metrics = metrics(&server).await;
    for line in ["\"invalid\"} 10", "\"queued\"} 1", "\"too_big\"} 2"] {
        let line = format!("pirouette_lerobot_observations_total{{outcome={line}");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
}

#[tokio::test]
async fn calls_out_of_order_and_robots_that_do_not_fit() {
    let server = start(ServeOptions::default()).await;
    let robot = Client::connect(server.lerobot_address).await;
    let early = robot.observe(&seen(0, 0.0, true, "x")).await.unwrap_err();
    assert!(early.0 == FAILED_PRECONDITION && early.1.contains("restart the robot client"));
    let setup = fixture("setup.p4");
    let replaced = |from: &[u8], to: &[u8]| {
        let at = setup.windows(from.len()).position(|window| window == from).unwrap();
        [&setup[..at], to, &setup[at + from.len()..]].concat()
    };
    for (pickle, want) in [
        (replaced(b"pi05", b"pi00"), "of type pi05, not pi00"),
        (replaced(b"images.front", b"images.fornt"), "needs camera `observation.images.front`"),
        (replaced(b"images.wrist", b"images.wrong"), "no camera `observation.images.wrong`"),
        (replaced(b"RemotePolicyConfig", b"RemotePolicyKonfig"), "RemotePolicyKonfig"),
        (fixture("observation.numpy2.p4"), "a RemotePolicyConfig was expected"),
    ] {
        let (code, text) = robot.set_up(&pickle).await.unwrap_err();
        assert!(code == INVALID_ARGUMENT && text.contains(want), "{code} {text}");
    }
    let path = "/transport.LearnerService/Ready";
    let (code, text) = robot.post(path, "application/grpc", &framed(b"")).await.unwrap_err();
    assert!(code == UNIMPLEMENTED && text.contains(path), "{code} {text}");
    let (status, _) = robot.post("/", "text/plain", b"").await.unwrap();
    assert_eq!(status, 415);
    // None of it has harmed the connection.
    robot.set_up(&setup).await.unwrap();
    robot.observe(&seen(0, 1.0, true, "x")).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(0, 1.0));
}

#[tokio::test]
async fn the_newest_observation_is_answered_once_it_is_asked_for() {
    let server = start(ServeOptions::default()).await;
    let robot = Client::ready(server.lerobot_address).await;
    assert_eq!(robot.actions().await.unwrap(), "", "nothing came within two seconds");
    robot.observe(&seen(0, 1.0, false, "x")).await.unwrap();
    robot.observe(&seen(1, 2.0, false, "x")).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(1, 2.0));
    // The same step, and hardly moved: neither is answered.
    robot.observe(&seen(1, 9.0, false, "x")).await.unwrap();
    robot.observe(&seen(2, 2.5, false, "x")).await.unwrap();
    let waiting = tokio::spawn({
        let robot = robot.clone();
        async move { robot.actions().await }
    });
    robot.observe(&seen(2, 3.0, false, "x")).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), answer(2, 3.0));
    robot.observe(&seen(2, 3.0, true, "x")).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(2, 3.0), "it had to go");
    // `Ready` clears what waits and what was.
    robot.observe(&seen(7, 7.0, true, "x")).await.unwrap();
    robot.call("Ready", &framed(b"")).await.unwrap();
    robot.observe(&seen(2, 3.0, false, "x")).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(2, 3.0));
    let metrics = metrics(&server).await;
    for line in ["\"old_step\"} 1", "\"same_state\"} 1", "\"replaced_older\"} 1"] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}

#[tokio::test]
async fn failures_are_told_and_the_next_observation_passes() {
    let server = start(ServeOptions::default()).await;
    let robot = Client::ready(server.lerobot_address).await;
    for (task, code, want) in [
        ("boom", INVALID_ARGUMENT, "ValueError: no %E2%80%94 like this"),
        ("busy", RESOURCE_EXHAUSTED, "RuntimeError: the queue is full"),
        ("die", INTERNAL, "RuntimeError: internal error"),
    ] {
        robot.observe(&seen(4, 0.0, false, task)).await.unwrap();
        assert_eq!(robot.actions().await.unwrap_err(), (code, want.into()));
    }
    // The client has not moved and believes its observation is on its way.
    robot.observe(&seen(4, 0.0, false, "x")).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(4, 0.0));
    let metrics = metrics(&server).await;
    for line in ["\"invalid\"} 1", "\"overloaded\"} 1", "\"internal\"} 1", "\"ok\"} 1"] {
        let line = format!("pirouette_requests_total{{outcome={line}");
        assert!(metrics.contains(&line), "{line}: {metrics}");
    }
}

#[tokio::test]
async fn robots_do_not_see_each_other_and_one_that_leaves_withdraws_its_request() {
    let server = start(ServeOptions::default()).await;
    let (one, two) =
        (Client::ready(server.lerobot_address).await, Client::ready(server.lerobot_address).await);
    one.observe(&seen(1, 10.0, true, "x")).await.unwrap();
    two.observe(&seen(2, 20.0, true, "x")).await.unwrap();
    assert_eq!(two.actions().await.unwrap(), answer(2, 20.0));
    assert_eq!(one.actions().await.unwrap(), answer(1, 10.0));

    server.script.held.send_replace(true);
    one.observe(&seen(3, 30.0, true, "x")).await.unwrap();
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { one.actions().await }
    });
    eventually("a request", || server.script.running.load(SeqCst) == 1).await;
    one.connection.abort();
    eventually("it is withdrawn", || server.script.withdrawn.load(SeqCst) == 1).await;
    assert!(waiting.await.unwrap().is_err());
    server.script.held.send_replace(false);
    two.observe(&seen(4, 40.0, true, "x")).await.unwrap();
    assert_eq!(two.actions().await.unwrap(), answer(4, 40.0));
}

/// gRPC gives all clients of a process one connection to a server.
#[tokio::test]
async fn a_robot_that_would_share_anothers_connection_is_refused() {
    let server = start(ServeOptions::default()).await;
    let one = Client::ready(server.lerobot_address).await;
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { one.actions().await }
    });
    // What the server answers to this it has read after that call.
    one.post("/transport.AsyncInference/None", "application/grpc", b"").await.unwrap_err();
    let (code, why) = one.call("Ready", &framed(b"")).await.unwrap_err();
    assert_eq!(code, FAILED_PRECONDITION);
    assert!(why.contains("a process of its own"), "{why}");
    // The first one has lost nothing by it.
    one.observe(&seen(1, 10.0, true, "x")).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), answer(1, 10.0));
    // One that left may come again: its call is withdrawn.
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { one.actions().await }
    });
    one.post("/transport.AsyncInference/None", "application/grpc", b"").await.unwrap_err();
    waiting.abort();
    one.call("Ready", &framed(b"")).await.unwrap();
    one.observe(&seen(2, 20.0, true, "x")).await.unwrap();
    assert_eq!(one.actions().await.unwrap(), answer(2, 20.0));
}

#[tokio::test]
async fn connections_are_bounded_in_number_and_patience() {
    let options = ServeOptions {
        max_connections: 1,
        max_handshakes: 4,
        handshake_timeout: Duration::from_secs(2),
        keepalive_timeout: Duration::from_secs(2),
        ..ServeOptions::default()
    };
    let server = start(options).await;
    // One that says nothing, and one that says nothing sensible.
    let mut silent = tokio::net::TcpStream::connect(server.lerobot_address).await.unwrap();
    let mut other = tokio::net::TcpStream::connect(server.lerobot_address).await.unwrap();
    other.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    for stream in [&mut silent, &mut other] {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "closed or reset");
    }
    let robot = Client::ready(server.lerobot_address).await;
    // Those that find no place keep that of their handshake, which ends them.
    let mut refused = Vec::new();
    for _ in 0..4 {
        let client = Client::connect(server.lerobot_address).await;
        let (code, text) = client.call("Ready", &framed(b"")).await.unwrap_err();
        assert!(code == UNAVAILABLE && text.contains("all 1 connections"), "{code} {text}");
        refused.push(client);
    }
    let mut fifth = tokio::net::TcpStream::connect(server.lerobot_address).await.unwrap();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(PATIENCE, fifth.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "closed or reset");
    let all = metrics(&server).await;
    assert!(all.contains("refused_total{reason=\"handshakes\"} 1"), "{all}");
    eventually("they end", || refused.iter().all(|client| client.connection.is_finished())).await;
    // An observation that never ends is given up; the robot is served on.
    let request = axum::http::Request::post("http://x/transport.AsyncInference/SendObservations")
        .header("content-type", "application/grpc");
    let mut send = robot.sender().ready().await.unwrap();
    let (response, mut stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
    stream.send_data(piece(1, b"x").into(), false).unwrap();
    let head = tokio::time::timeout(PATIENCE, response).await.unwrap().unwrap();
    assert_eq!(head.headers()["grpc-status"], DEADLINE_EXCEEDED.to_string().as_str());
    robot.observe(&seen(0, 1.0, true, "x")).await.unwrap();
    assert_eq!(robot.actions().await.unwrap(), answer(0, 1.0));
    robot.connection.abort();
    // Its place is free in the end, also for one that was refused before.
    let second = Client::connect(server.lerobot_address).await;
    for _ in 0..500 {
        if second.call("Ready", &framed(b"")).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the place is never free");
}

#[tokio::test]
async fn a_drain_answers_what_runs_and_ends_what_waits() {
    let mut server = start(ServeOptions::default()).await;
    let (busy, waiting) =
        (Client::ready(server.lerobot_address).await, Client::ready(server.lerobot_address).await);
    server.script.held.send_replace(true);
    busy.observe(&seen(1, 1.0, true, "x")).await.unwrap();
    let ask = |robot: Client| tokio::spawn(async move { robot.actions().await });
    let (busy, asked) = (ask(busy), ask(waiting.clone()));
    eventually("a request", || server.script.running.load(SeqCst) == 1).await;
    // Calls of a connection begin in their order: the one before this has.
    waiting.post("/transport.AsyncInference/None", "application/grpc", b"").await.unwrap_err();
    server.shut_down();
    assert_eq!(asked.await.unwrap().unwrap(), "");
    server.script.held.send_replace(false);
    assert_eq!(busy.await.unwrap().unwrap(), answer(1, 1.0));
    let served = tokio::time::timeout(PATIENCE, &mut server.task).await.unwrap().unwrap();
    assert!(served.drained);
}

#[tokio::test]
async fn what_is_recorded_is_no_pickle() {
    let folder = tempfile::tempdir().unwrap();
    let options = RecordOptions { dir: folder.path().to_owned(), limit_bytes: 1 << 30 };
    let recorder = Arc::new(Recorder::start(&options, || serde_json::json!({})).unwrap());
    let options = ServeOptions { recorder: Some(recorder.clone()), ..ServeOptions::default() };
    let server = start(options).await;
    let robot = Client::ready(server.lerobot_address).await;
    robot.observe(&seen(1, 1.0, true, "x")).await.unwrap();
    assert!(!robot.actions().await.unwrap().is_empty());
    recorder.finish();
    let mut frames = Vec::new();
    let recording = Recording::open(folder.path()).unwrap();
    recording
        .for_each(|recorded| {
            frames.push((recorded.request, recorded.reply));
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(frames.len(), 1);
    let request = msgpack::decode(&frames[0].0).unwrap();
    assert_eq!(Some(&request), server.script.seen.lock().unwrap().first());
    let reply = msgpack::decode(&frames[0].1).unwrap();
    let Some(Value::Array(found)) = reply.get("actions") else { panic!("{reply:?}") };
    assert_eq!(found.shape, [5, 6]);
}
