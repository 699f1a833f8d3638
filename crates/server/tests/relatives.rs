//! openpi's relatives: RoboArena, vLLM-Omni's path, vla-eval, and telling them apart.

mod rig;

use std::path::PathBuf;
use std::time::Duration;

use pirouette_policy::{Value, sample_observation};
use pirouette_server::{Dialect, ServeOptions, msgpack};
use rig::arm::Served;
use rig::{Raw, text};

fn with(dialect: Dialect) -> ServeOptions {
    ServeOptions { dialect, vla_eval_actions: 2, ..ServeOptions::default() }
}

fn get<'a>(map: &'a [(String, Value)], key: &str) -> &'a Value {
    let found = map.iter().find(|(known, _)| known == key);
    found.map(|(_, value)| value).unwrap_or_else(|| panic!("no {key} in {map:?}"))
}

fn keys(map: &[(String, Value)]) -> Vec<&str> {
    map.iter().map(|(key, _)| key.as_str()).collect()
}

const CONFIG_KEYS: [&str; 6] = [
    "image_resolution",
    "needs_wrist_camera",
    "n_external_cameras",
    "needs_stereo_camera",
    "needs_session_id",
    "action_space",
];

/// What RoboArena's evaluator sends, with its camera numbered from 0.
fn roboarena(served: &Served, endpoint: Option<&str>) -> Value {
    let Value::Map(mut map) = sample_observation(served.arm.policy.config(), 1) else { panic!() };
    for (key, _) in &mut map {
        if key == "observation/exterior_image_1_left" {
            *key = "observation/exterior_image_0_left".into();
        }
    }
    let cartesian = Value::List(vec![Value::Float(0.0); 6]);
    map.push(("observation/cartesian_position".into(), cartesian));
    map.push(("session_id".into(), text("38DSA3hd3")));
    map.extend(endpoint.map(|name| ("endpoint".to_string(), text(name))));
    Value::Map(map)
}

async fn ask(client: &mut Raw, value: &Value) {
    client.send(2, &msgpack::encode(value).unwrap()).await;
}

fn reset() -> Value {
    Value::Map(vec![("endpoint".into(), text("reset")), ("session_id".into(), text("s"))])
}

#[tokio::test]
async fn roboarena_asks_and_resets() {
    let served = Served::start("pi05_droid", with(Dialect::Roboarena)).await;
    let mut client = served.open("/").await;
    let metadata = client.frame().await.map();
    assert_eq!(keys(&metadata), CONFIG_KEYS);
    assert_eq!(*get(&metadata, "action_space"), text("joint_velocity"));
    for endpoint in [Some("infer"), Some("infer"), None] {
        ask(&mut client, &roboarena(&served, endpoint)).await;
        let answer = client.frame().await.map();
        assert!(matches!(get(&answer, "actions"), Value::Array(a) if a.shape == [15, 8]));
    }
    ask(&mut client, &reset()).await;
    assert_eq!(client.frame().await.text(), "reset successful");
    ask(&mut client, &roboarena(&served, Some("infer"))).await;
    client.frame().await.map();
    ask(&mut client, &roboarena(&served, Some("dance"))).await;
    assert!(client.frame().await.text().contains("`endpoint` must be"));
    assert_eq!(client.frame().await.close().0, 1011);
}

#[tokio::test]
async fn openpi_is_untouched_and_paths_choose() {
    let served = Served::start("pi05_droid", ServeOptions::default()).await;
    for path in ["/", "/any/path?x=1", "/openpi", "/vla-eval/x"] {
        let mut client = served.open(path).await;
        assert_eq!(client.frame().await.payload, [0x80], "{path}: DROID's metadata is empty");
        ask(&mut client, &sample_observation(served.arm.policy.config(), 1)).await;
        assert_eq!(
            keys(&client.frame().await.map()),
            ["actions", "policy_timing", "server_timing"]
        );
        // A reset is an observation without its keys.
        ask(&mut client, &reset()).await;
        assert!(client.frame().await.text().contains("KeyError: 'observation/gripper_position'"));
    }
    let mut client = served.open("/roboarena").await;
    assert_eq!(keys(&client.frame().await.map()), CONFIG_KEYS);
    let mut client = served.open("/v1/realtime/robot/openpi").await;
    assert_eq!(keys(&client.frame().await.map()), CONFIG_KEYS);
    ask(&mut client, &sample_observation(served.arm.policy.config(), 1)).await;
    assert_eq!(keys(&client.frame().await.map()), ["actions", "policy_timing", "server_timing"]);
    ask(&mut client, &reset()).await;
    assert_eq!(client.frame().await.map(), [("status".to_string(), text("reset successful"))]);
}

/// A map with more entries.
fn and(map: Value, entries: &[(&str, Value)]) -> Value {
    let Value::Map(mut map) = map else { panic!("a map") };
    map.extend(entries.iter().map(|(key, value)| (key.to_string(), value.clone())));
    Value::Map(map)
}

#[tokio::test]
async fn vllm_omnis_clients_get_bare_arrays_and_maps_as_errors() {
    let served = Served::start("pi05_droid", ServeOptions::default()).await;
    let mut client = served.open("/v1/realtime/robot/openpi").await;
    client.frame().await.map();
    let sample = || sample_observation(served.arm.policy.config(), 1);
    let seed = || ("seed", Value::Int(3));
    let session = || ("session_id", text("a"));
    ask(&mut client, &and(sample(), &[seed()])).await;
    let answer = client.frame().await.map();
    let Value::Array(openpis) = get(&answer, "actions") else { panic!("{answer:?}") };
    for mark in [session(), ("endpoint", text("infer"))] {
        ask(&mut client, &and(sample(), &[seed(), mark])).await;
        let frame = client.frame().await;
        assert_eq!(frame.opcode, 2);
        let bare = msgpack::decode(&frame.payload.into()).unwrap();
        assert_eq!(bare, Value::Array(openpis.to_f32().unwrap()));
    }
    // Whatever is wrong, before the service is asked or by it.
    let wrong =
        [and(sample(), &[session(), ("seed", text("x"))]), and(Value::Map(vec![]), &[session()])];
    for (request, want) in wrong.iter().zip(["ValueError: `seed` must be", "KeyError: 'obs"]) {
        ask(&mut client, request).await;
        let error = client.frame().await.map();
        assert_eq!((keys(&error), get(&error, "type")), (vec!["type", "message"], &text("error")));
        assert!(
            matches!(get(&error, "message"), Value::Str(e) if e.starts_with(want)),
            "{error:?}"
        );
    }
    // Batches answer each for itself, in maps; and the connection is still there.
    let batch = Value::List(vec![sample()]);
    ask(&mut client, &and(Value::Map(vec![]), &[("batch", batch), session()])).await;
    assert_eq!(keys(&client.frame().await.map()), ["batch", "server_timing"]);
    // What can't be read has no session: openpi's way.
    client.send(2, b"\xc1").await;
    assert!(client.frame().await.text().starts_with("Traceback"));
    assert_eq!(client.frame().await.close().0, 1011);
    // Elsewhere a session is a key among others.
    let mut client = served.open("/roboarena").await;
    client.frame().await.map();
    ask(&mut client, &and(sample(), &[session()])).await;
    assert_eq!(keys(&client.frame().await.map())[0], "actions");
}

/// A message as the PyPI package packed it.
fn recorded(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/H_vla_eval");
    std::fs::read(folder.join(name).with_extension("msgpack")).unwrap()
}

/// Type, number and payload of an answer.
async fn envelope(client: &mut Raw) -> (String, i128, Vec<(String, Value)>) {
    let map = client.frame().await.map();
    assert_eq!(keys(&map), ["type", "payload", "seq", "timestamp"]);
    match (get(&map, "type"), get(&map, "seq"), get(&map, "payload"), get(&map, "timestamp")) {
        (Value::Str(kind), Value::Int(seq), Value::Map(payload), Value::Float(_)) => {
            (kind.clone(), *seq, payload.clone())
        }
        other => panic!("{other:?}"),
    }
}

/// An action's numbers as they lie in the message.
async fn action(client: &mut Raw, seq: i128) -> Vec<u8> {
    let (kind, number, payload) = envelope(client).await;
    assert_eq!((kind.as_str(), number), ("action", seq), "{payload:?}");
    let Value::Map(array) = get(&payload, "actions") else { panic!("{payload:?}") };
    assert_eq!(keys(array), ["__ndarray__", "data", "dtype", "shape"]);
    assert_eq!(*get(array, "dtype"), text("<f4"));
    assert_eq!(*get(array, "shape"), Value::List(vec![Value::Int(7)]));
    match get(array, "data") {
        Value::Bytes(data) if data.len() == 28 => data.to_vec(),
        other => panic!("{other:?}"),
    }
}

async fn inferences(served: &Served) -> u64 {
    served.arm.engine.stats().completed
}

#[tokio::test]
async fn vla_eval_completes_an_episode() {
    let served = Served::start("pi05_libero", with(Dialect::VlaEval)).await;
    let mut client = served.open("/").await;
    client.send(2, &recorded("hello")).await;
    let (kind, seq, payload) = envelope(&mut client).await;
    assert_eq!((kind.as_str(), seq), ("hello", 1));
    assert_eq!(*get(&payload, "protocol_version"), Value::Int(1));
    let Value::Map(wanted) = get(&payload, "observation_params") else { panic!("{payload:?}") };
    assert_eq!(keys(wanted), ["send_wrist_image", "send_state"]);
    client.send(2, &recorded("episode_start")).await;
    client.send(2, &recorded("observation_png")).await;
    let first = action(&mut client, 3).await;
    assert_eq!(inferences(&served).await, 1);
    client.send(2, &recorded("observation_jpeg")).await;
    assert_ne!(action(&mut client, 4).await, first, "the next row of the chunk");
    assert_eq!(inferences(&served).await, 1, "two actions of a chunk are executed");
    client.send(2, &recorded("observation_raw")).await;
    action(&mut client, 5).await;
    assert_eq!(inferences(&served).await, 2);
    // A new episode never sees the old one's chunk.
    client.send(2, &recorded("episode_end")).await;
    client.send(2, &recorded("episode_start")).await;
    client.send(2, &recorded("observation_raw")).await;
    action(&mut client, 5).await;
    assert_eq!(inferences(&served).await, 3);
}

#[tokio::test]
async fn vla_eval_errors_leave_the_connection_open() {
    let served = Served::start("pi05_libero", with(Dialect::VlaEval)).await;
    let mut client = served.open("/").await;
    let message = |payload: Vec<(String, Value)>| {
        Value::Map(vec![
            ("type".into(), text("observation")),
            ("payload".into(), Value::Map(payload)),
            ("seq".into(), Value::Int(9)),
            ("timestamp".into(), Value::Float(0.0)),
        ])
    };
    ask(&mut client, &message(vec![])).await;
    let (kind, seq, payload) = envelope(&mut client).await;
    assert_eq!((kind.as_str(), seq), ("error", 9));
    assert_eq!(*get(&payload, "error"), text("observation_failed: KeyError: 'images'"));
    ask(&mut client, &message(vec![("images".into(), Value::Map(vec![]))])).await;
    let missing = "camera 'observation/image' is missing: `images` holds []";
    let (_, _, payload) = envelope(&mut client).await;
    let told = text(&format!("observation_failed: ValueError: {missing}"));
    assert_eq!(*get(&payload, "error"), told);
    client.send(2, &recorded("observation_png")).await;
    action(&mut client, 3).await;
    ask(&mut client, &sample_observation(served.arm.policy.config(), 1)).await;
    let (kind, _, payload) = envelope(&mut client).await;
    assert_eq!(kind, "error");
    assert!(matches!(get(&payload, "error"), Value::Str(e) if e.contains("missing required")));
    assert_eq!(client.frame().await.close().0, 1011);
}

#[tokio::test]
async fn auto_listens_before_it_speaks() {
    // Long enough for a loaded machine: who says HELLO is never met with metadata.
    let options = ServeOptions { hello_wait: Duration::from_secs(30), ..with(Dialect::Auto) };
    let served = Served::start("pi05_droid", options).await;
    let mut client = served.open("/").await;
    client.send(2, &recorded("hello")).await;
    assert_eq!(envelope(&mut client).await.0, "hello");
    // An observation sent at once is one, too.
    let mut client = served.open("/").await;
    ask(&mut client, &roboarena(&served, Some("infer"))).await;
    assert_eq!(keys(&client.frame().await.map()), CONFIG_KEYS);
    assert_eq!(keys(&client.frame().await.map())[0], "actions");
    let options = ServeOptions { hello_wait: Duration::from_millis(10), ..with(Dialect::Auto) };
    let served = Served::start("pi0_aloha", options).await;
    let mut client = served.open("/").await;
    assert_eq!(keys(&client.frame().await.map()), ["reset_pose"], "no RoboArena robot");
    ask(&mut client, &sample_observation(served.arm.policy.config(), 1)).await;
    assert_eq!(keys(&client.frame().await.map())[0], "actions");
}
