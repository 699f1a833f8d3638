//! What a client sees: metadata, answers, order, pings, errors, optional keys.

mod rig;

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use pirouette_policy::Value;
use pirouette_server::ServeOptions;
use rig::{Server, eventually, first_action, number, state, text};

const REASON: &str = "Internal server error. Traceback included in previous frame.";

#[tokio::test]
async fn metadata_is_held_until_warm_and_pings_are_answered_meanwhile() {
    let metadata = Value::Map(vec![("name".into(), text("script"))]);
    let server = Server::start(metadata, false, ServeOptions::default()).await;
    let mut client = server.websocket().await;
    client.send(9, b"still there?").await;
    let pong = client.frame().await;
    assert_eq!((pong.opcode, &pong.payload[..]), (10, &b"still there?"[..]));
    // A request sent too early waits its turn.
    client.ask(&[state(5.0)]).await;
    client.send(9, b"2").await;
    assert_eq!(client.frame().await.opcode, 10, "no metadata yet");
    server.warm.send(true).unwrap();
    assert_eq!(client.frame().await.map(), [("name".to_string(), text("script"))]);
    assert_eq!(first_action(&client.frame().await.map()), 5.0);
}

#[tokio::test]
async fn pings_are_answered_during_an_inference() {
    let server = Server::plain(ServeOptions::default()).await;
    let mut client = server.client().await;
    client.ask(&[state(1.0), ("sleep_ms", Value::Int(400))]).await;
    let asked = Instant::now();
    for i in 0..5u8 {
        client.send(9, &[i]).await;
        let pong = client.frame().await;
        assert_eq!((pong.opcode, &pong.payload[..]), (10, &[i][..]));
    }
    assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
    assert_eq!(first_action(&client.frame().await.map()), 1.0);
    assert!(asked.elapsed() > Duration::from_millis(390));
}

#[tokio::test]
async fn one_connection_keeps_its_order_and_others_do_not_wait() {
    let server = Server::plain(ServeOptions::default()).await;
    let mut slow = server.client().await;
    let mut quick = server.client().await;
    // More than is read ahead.
    for i in 0..12 {
        let sleep = Value::Int(if i == 0 { 300 } else { 1 });
        slow.ask(&[state(i as f64), ("sleep_ms", sleep)]).await;
    }
    let asked = Instant::now();
    quick.ask(&[state(50.0)]).await;
    assert_eq!(first_action(&quick.frame().await.map()), 50.0);
    assert!(asked.elapsed() < Duration::from_millis(150), "{:?}", asked.elapsed());
    for i in 0..12 {
        assert_eq!(first_action(&slow.frame().await.map()), i as f64);
    }
    assert_eq!(server.script.running.load(SeqCst), 0);
}

#[tokio::test]
async fn timings_mean_what_openpis_mean() {
    let server = Server::plain(ServeOptions::default()).await;
    let mut client = server.client().await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    client.ask(&[state(0.0), ("sleep_ms", Value::Int(30))]).await;
    let first = client.frame().await.map();
    let keys: Vec<&str> = first.iter().map(|(k, _)| k.as_str()).collect();
    assert_eq!(keys, ["actions", "policy_timing", "server_timing"]);
    assert_eq!(number(&first, "policy_timing", "infer_ms"), Some(1.25));
    let infer_ms = number(&first, "server_timing", "infer_ms").unwrap();
    assert!((30.0..60.0).contains(&infer_ms), "{infer_ms}");
    assert_eq!(number(&first, "server_timing", "prev_total_ms"), None, "not in the first answer");
    client.ask(&[state(0.0)]).await;
    let second = client.frame().await.map();
    let previous = number(&second, "server_timing", "prev_total_ms").unwrap();
    assert!((88.0..200.0).contains(&previous), "think time included: {previous}");
    tokio::time::sleep(Duration::from_millis(40)).await;
    client.ask(&[state(0.0)]).await;
    let previous = number(&client.frame().await.map(), "server_timing", "prev_total_ms").unwrap();
    assert!(previous < 40.0, "the second request came at once: {previous}");
}

#[tokio::test]
async fn exceptions_close_and_refusals_do_not() {
    let server = Server::plain(ServeOptions::default()).await;
    let mut client = server.client().await;
    for _ in 0..3 {
        client.ask(&[state(1.0), ("prompt", text("busy"))]).await;
        let refusal = client.frame().await;
        assert_eq!(refusal.text().lines().last(), Some("RuntimeError: the queue is full"));
        client.ask(&[state(2.0)]).await;
        assert_eq!(first_action(&client.frame().await.map()), 2.0);
    }
    client.ask(&[("prompt", text("no state"))]).await;
    assert_eq!(client.frame().await.text().lines().last(), Some("KeyError: 'state'"));
    assert_eq!(client.frame().await.close(), (1011, REASON));
    client.send(8, &1011u16.to_be_bytes()).await;
    client.closed().await;
}

#[tokio::test]
async fn a_service_that_panics_is_an_exception_for_one_client() {
    let server = Server::plain(ServeOptions::default()).await;
    let (mut victim, mut other) = (server.client().await, server.client().await);
    victim.ask(&[state(1.0), ("prompt", text("die"))]).await;
    assert_eq!(victim.frame().await.text().lines().last(), Some("RuntimeError: internal error"));
    assert_eq!(victim.frame().await.close(), (1011, REASON));
    other.ask(&[state(3.0)]).await;
    assert_eq!(first_action(&other.frame().await.map()), 3.0);
}

#[tokio::test]
async fn optional_keys_reach_the_service_and_wrong_ones_are_named() {
    let server = Server::plain(ServeOptions::default()).await;
    let mut client = server.client().await;
    client.ask(&[state(1.0), ("seed", Value::Int(u64::MAX.into()))]).await;
    let answer = client.frame().await.map();
    assert_eq!(answer.last().unwrap(), &("seed".to_string(), Value::Int(u64::MAX.into())));
    client.ask(&[state(1.0), ("seed", text("one"))]).await;
    let error = client.frame().await;
    let last = error.text().lines().last().unwrap();
    assert!(last.starts_with("ValueError: `seed` must be an integer"), "{last}");
}

#[tokio::test]
async fn requests_that_are_no_map_are_type_errors() {
    let server = Server::plain(ServeOptions::default()).await;
    for payload in [&b"\xc0"[..], b"\x93\x01\x02\x03", b"\x05"] {
        let mut client = server.client().await;
        client.send(2, payload).await;
        let error = client.frame().await;
        let last = error.text().lines().last().unwrap();
        assert_eq!(last, "TypeError: the observation must be a map");
        assert_eq!(client.frame().await.close(), (1011, REASON));
    }
}

#[tokio::test]
async fn malformed_messages_have_pythons_exception_types() {
    let server = Server::plain(ServeOptions::default()).await;
    let deep: Vec<u8> = vec![0x91; 40];
    let table: [(&[u8], &str); 8] = [
        (b"\xc1", "msgpack.exceptions.FormatError"),
        (b"\xd4\x01\x02", "msgpack.exceptions.FormatError"),
        (b"", "ValueError: the message ends at byte 0"),
        (b"\x81\xa1", "ValueError: the message ends at byte 2"),
        (b"\x80\x80", "msgpack.exceptions.ExtraData: 1 bytes follow"),
        (b"\x81\xa1\xff\x01", "UnicodeDecodeError: "),
        (b"\x81\x01\x02", "ValueError: int is not allowed for map key when strict_map_key=True"),
        (&deep, "msgpack.exceptions.StackError: more than 16 nested"),
    ];
    for (payload, want) in table {
        let mut client = server.client().await;
        client.send(2, payload).await;
        let error = client.frame().await;
        let last = error.text().lines().last().unwrap();
        assert!(last.starts_with(want), "{last}");
        assert_eq!(client.frame().await.close(), (1011, REASON));
    }
}

#[tokio::test]
async fn a_client_that_leaves_withdraws_its_request() {
    let server = Server::plain(ServeOptions::default()).await;
    for goodbye in [false, true] {
        let before = server.script.withdrawn.load(SeqCst);
        let mut client = server.client().await;
        client.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
        eventually("running", || server.script.running.load(SeqCst) == 1).await;
        if goodbye {
            client.send(8, &1000u16.to_be_bytes()).await;
            assert_eq!(client.frame().await.close().0, 1000);
        }
        drop(client);
        eventually("withdrawn", || server.script.withdrawn.load(SeqCst) == before + 1).await;
        eventually("stopped", || server.script.running.load(SeqCst) == 0).await;
    }
}
