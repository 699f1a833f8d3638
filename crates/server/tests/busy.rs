//! The thread that stays awake for its connections: who is served there, and that it sleeps again.

mod rig;

use std::time::Duration;

use pirouette_policy::{Value, sample_observation};
use pirouette_server::ServeOptions;
use rig::Raw;
use rig::arm::Served;
use tokio::net::TcpStream;

async fn served(patience: Duration) -> Served {
    let options = ServeOptions { busy_poll: patience, ..ServeOptions::default() };
    Served::start("pi05_libero", options).await
}

/// A gauge or counter without labels, if the server has it.
async fn metric(served: &Served, name: &str) -> Option<u64> {
    let mut raw = Raw(TcpStream::connect(served.address).await.unwrap());
    raw.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let page = raw.response().await.2;
    page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

async fn looks(served: &Served) -> u64 {
    metric(served, "pirouette_busy_looks_total").await.unwrap()
}

/// Looks that were made, once there are none any more.
async fn asleep(served: &Served) -> u64 {
    let mut before = looks(served).await;
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = looks(served).await;
        if now == before {
            return now;
        }
        before = now;
    }
    panic!("the thread never slept: {before} looks");
}

async fn answered(served: &Served, client: &mut Raw, seed: i128) -> Value {
    let sample = sample_observation(served.arm.policy.config(), 3);
    let Value::Map(mut map) = sample else { panic!("a map") };
    map.push(("seed".into(), Value::Int(seed)));
    let map: Vec<(&str, Value)> = map.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    client.ask(&map).await;
    client.frame().await.map().swap_remove(0).1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_awake_while_robots_ask_and_asleep_afterwards() {
    let served = served(Duration::from_millis(60)).await;
    let mut client = served.client().await;
    assert_eq!(metric(&served, "pirouette_busy_connections").await, Some(1));
    assert_eq!(asleep(&served).await, 0, "nobody has asked yet");
    let mut before = 0;
    let mut actions = None;
    // On a machine that is busy the thread may not get a core while it is to be awake.
    for turn in 0..50 {
        let again = answered(&served, &mut client, 7).await;
        assert_eq!(*actions.get_or_insert(again.clone()), again);
        let after = asleep(&served).await;
        if after > before && turn >= 2 {
            before = after;
            break;
        }
        before = after;
        assert!(turn < 49, "it never looked out for the next: {after}");
    }
    // Pings and closes are a socket's as anywhere.
    client.send(9, b"ping").await;
    assert_eq!(client.frame().await.opcode, 10);
    client.send(8, &1000u16.to_be_bytes()).await;
    assert_eq!(client.frame().await.close().0, 1000);
    client.closed().await;
    let left = async {
        while metric(&served, "pirouette_busy_connections").await != Some(0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), left).await.expect("its place comes back");
    assert_eq!(looks(&served).await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_sockets_keep_nobody_awake_and_the_rest_is_served_as_ever() {
    let served = served(Duration::from_millis(60)).await;
    let mut clients = Vec::new();
    for _ in 0..24 {
        clients.push(served.client().await);
    }
    assert_eq!(metric(&served, "pirouette_busy_connections").await, Some(16));
    assert_eq!(looks(&served).await, 0);
    // The last ones found no place: their requests wake nobody there.
    let alone = answered(&served, &mut clients[23], 5).await;
    assert_eq!(looks(&served).await, 0);
    for client in &mut clients {
        assert_eq!(answered(&served, client, 5).await, alone);
    }
    assert!(asleep(&served).await > 0);
}

#[tokio::test]
async fn without_it_there_is_no_such_thread() {
    let served = served(Duration::ZERO).await;
    assert_eq!(metric(&served, "pirouette_busy_connections").await, None);
}
