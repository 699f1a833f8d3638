//! The extra forms of a request, on a real policy: image files, batches, explained timing, newest
//! wins.

mod rig;

use std::path::PathBuf;

use pirouette_policy::{NdArray, Value, sample_observation};
use pirouette_server::ServeOptions;
use rig::arm::Served;
use rig::{Raw, eventually, text};

const SUPERSEDED: &str = "RuntimeError: superseded by a newer request of the session";

fn file(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/G_images");
    std::fs::read(folder.join(name)).unwrap()
}

async fn libero() -> Served {
    Served::start("pi05_libero", ServeOptions::default()).await
}

/// A LIBERO observation, with some keys changed or added.
fn observation(served: &Served, changes: &[(&str, Value)]) -> Vec<(String, Value)> {
    let sample = sample_observation(served.arm.policy.config(), 3);
    let Value::Map(mut map) = sample else { panic!("a map") };
    map.retain(|(key, _)| changes.iter().all(|(changed, _)| changed != key));
    map.extend(changes.iter().map(|(key, value)| (key.to_string(), value.clone())));
    map
}

async fn send(client: &mut Raw, map: Vec<(String, Value)>) {
    let map: Vec<(&str, Value)> = map.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    client.ask(&map).await;
}

fn get<'a>(map: &'a [(String, Value)], key: &str) -> Option<&'a Value> {
    map.iter().find(|(known, _)| known == key).map(|(_, value)| value)
}

fn actions(map: &[(String, Value)]) -> NdArray {
    match get(map, "actions") {
        Some(Value::Array(actions)) => actions.clone(),
        other => panic!("no actions but {other:?} in {map:?}"),
    }
}

#[tokio::test]
async fn image_files_give_the_actions_of_their_pixels() {
    let served = libero().await;
    let mut client = served.client().await;
    let png = file("camera.png");
    let pixels = pirouette_policy::image::Encoding::Png.decode(&png).unwrap();
    let array = NdArray::from_u8(vec![40, 56, 3], pixels.rgb).map(Value::Array).unwrap();
    let flat = NdArray::from_u8(vec![png.len()], png.clone()).map(Value::Array).unwrap();
    let mut answers = Vec::new();
    for image in [array, Value::Bytes(png.clone().into()), flat] {
        let changes = [("observation/image", image), ("seed", Value::Int(5))];
        send(&mut client, observation(&served, &changes)).await;
        answers.push(actions(&client.frame().await.map()));
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
    let jpeg = Value::Bytes(file("camera.jpg").into());
    let changes = [("observation/wrist_image", jpeg), ("seed", Value::Int(5))];
    send(&mut client, observation(&served, &changes)).await;
    assert_ne!(actions(&client.frame().await.map()), answers[0], "the image matters");
    let cut = Value::Bytes(png[..png.len() / 2].to_vec().into());
    send(&mut client, observation(&served, &[("observation/wrist_image", cut)])).await;
    let error = client.frame().await;
    let last = error.text().lines().last().unwrap();
    assert!(
        last.starts_with("ValueError: 'observation/wrist_image' is a PNG that can't"),
        "{last}"
    );
    assert_eq!(client.frame().await.close().0, 1011);
}

#[tokio::test]
async fn a_batch_is_answered_one_by_one_and_runs_as_one() {
    let served = libero().await;
    let mut client = served.client().await;
    let mut first = served.client().await;
    // Something runs, so that the batch waits and is taken as a whole.
    served.hold();
    send(&mut first, observation(&served, &[])).await;
    eventually("running", || served.busy()).await;
    let good = |seed: i128| Value::Map(observation(&served, &[("seed", Value::Int(seed))]));
    let bad = Value::Map(vec![("prompt".into(), text("no images"))]);
    let broken = Value::Map(observation(&served, &[("seed", text("x"))]));
    let four = vec![good(1), bad, good(2), good(1), broken, good(3)];
    client.ask(&[("batch", Value::List(four)), ("explain", Value::Bool(true))]).await;
    eventually("queued", || served.queued() == 4).await;
    served.release();
    first.frame().await.map();
    let answer = client.frame().await.map();
    let keys: Vec<&str> = answer.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["batch", "server_timing"]);
    let Value::List(results) = &answer[0].1 else { panic!("a list") };
    let results: Vec<&Vec<(String, Value)>> = results
        .iter()
        .map(|result| match result {
            Value::Map(map) => map,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(results.len(), 6);
    let keys: Vec<&str> = results[0].iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["actions", "policy_timing", "timing"]);
    assert_eq!(actions(results[0]), actions(results[3]), "the same seed");
    assert_ne!(actions(results[0]), actions(results[2]));
    assert_eq!(get(results[1], "error"), Some(&text("KeyError: 'observation/image'")));
    let Some(Value::Str(error)) = get(results[4], "error") else { panic!("an error") };
    assert!(error.starts_with("ValueError: `seed` must be an integer"), "{error}");
    let Some(Value::Map(timing)) = get(results[5], "timing") else { panic!("timing") };
    assert_eq!(get(timing, "batch"), Some(&Value::Int(4)));
    // The connection is still good, and a batch that is wrong as a whole ends it.
    send(&mut client, observation(&served, &[])).await;
    actions(&client.frame().await.map());
    client.ask(&[("batch", Value::Int(3))]).await;
    let error = client.frame().await;
    assert!(error.text().trim_end().ends_with("`batch` must be a list of observations"));
    assert_eq!(client.frame().await.close().0, 1011);
}

#[tokio::test]
async fn a_batch_that_meets_an_idle_device_runs_as_one() {
    let served = Served::taking(300.0, "pi05_libero", ServeOptions::default()).await;
    let mut client = served.client().await;
    // From now on it is known what a run takes.
    send(&mut client, observation(&served, &[])).await;
    actions(&client.frame().await.map());
    let good = Value::Map(observation(&served, &[]));
    let bad = Value::Map(vec![("prompt".into(), text("no images"))]);
    let five = vec![good.clone(), good.clone(), bad, good.clone(), good];
    client.ask(&[("batch", Value::List(five)), ("explain", Value::Bool(true))]).await;
    let answer = client.frame().await.map();
    let Some(Value::List(results)) = get(&answer, "batch") else { panic!("{answer:?}") };
    let together = |result: &Value| result.get("timing")?.get("batch").cloned();
    let four = Some(Value::Int(4));
    let batches: Vec<Option<Value>> = results.iter().map(together).collect();
    assert_eq!(batches, [four.clone(), four.clone(), None, four.clone(), four]);
}

#[tokio::test]
async fn explained_answers_hold_scalars_alone() {
    let served = libero().await;
    let mut client = served.client().await;
    send(&mut client, observation(&served, &[("explain", Value::Bool(true))])).await;
    let answer = client.frame().await.map();
    let Some(Value::Map(timing)) = get(&answer, "timing") else { panic!("{answer:?}") };
    let names: Vec<&str> = timing.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "decode_ms",
            "prepare_wait_ms",
            "prepare_ms",
            "queue_ms",
            "batch_wait_ms",
            "gather_ms",
            "copy_in_ms",
            "vision_ms",
            "prefill_ms",
            "denoise_ms",
            "copy_out_ms",
            "run_ms",
            "finish_ms",
            "batch",
            "slots",
            "device"
        ]
    );
    for (name, value) in timing {
        match value {
            Value::Float(ms) => assert!(name.ends_with("_ms") && *ms >= 0.0, "{name} {ms}"),
            Value::Int(n) => assert!((0..=1).contains(n), "{name} {n}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    let ms = |name: &str| match get(timing, name) {
        Some(Value::Float(ms)) => *ms,
        other => panic!("{name}: {other:?}"),
    };
    assert!(ms("prepare_ms") > 0.0 && ms("decode_ms") > 0.0);
    send(&mut client, observation(&served, &[("explain", Value::Bool(false))])).await;
    assert_eq!(get(&client.frame().await.map(), "timing"), None);
}

#[tokio::test]
async fn the_newest_of_a_named_session_wins_across_connections() {
    let served = libero().await;
    let (mut busy, mut old, mut new) =
        (served.client().await, served.client().await, served.client().await);
    let named = |name: &str| [("newest_wins", Value::Bool(true)), ("session", text(name))];
    served.hold();
    send(&mut busy, observation(&served, &named("left"))).await;
    eventually("running", || served.busy()).await;
    send(&mut old, observation(&served, &named("left"))).await;
    eventually("queued", || served.queued() == 1).await;
    // Another session, and a request that did not ask for it, supersede nothing.
    let mut other = served.client().await;
    send(&mut other, observation(&served, &named("right"))).await;
    eventually("queued", || served.queued() == 2).await;
    send(&mut new, observation(&served, &named("left"))).await;
    let refusal = old.frame().await;
    assert_eq!(refusal.text().lines().last(), Some(SUPERSEDED));
    served.release();
    for client in [&mut busy, &mut other, &mut new] {
        actions(&client.frame().await.map());
    }
    // The connection that was refused is open.
    send(&mut old, observation(&served, &named("left"))).await;
    actions(&old.frame().await.map());
}

#[tokio::test]
async fn one_connection_keeps_its_order_when_the_newest_wins() {
    let served = libero().await;
    let mut client = served.client().await;
    let newest = [("newest_wins", Value::Bool(true))];
    served.hold();
    for i in 0..4 {
        send(&mut client, observation(&served, &newest)).await;
        if i == 0 {
            eventually("running", || served.busy()).await;
        }
    }
    // All four are read when the pong comes.
    client.send(9, b"read?").await;
    assert_eq!(client.frame().await.opcode, 10);
    served.release();
    actions(&client.frame().await.map());
    for _ in 0..2 {
        assert_eq!(client.frame().await.text().lines().last(), Some(SUPERSEDED));
    }
    actions(&client.frame().await.map());
    // Without the key nothing is dropped.
    for _ in 0..3 {
        send(&mut client, observation(&served, &[])).await;
    }
    for _ in 0..3 {
        actions(&client.frame().await.map());
    }
}
