//! Answers that the device's own thread makes and sends, and those that it leaves to others.

mod rig;

use pirouette_policy::{Value, sample_observation};
use pirouette_server::ServeOptions;
use rig::arm::Served;
use rig::{Raw, eventually};
use tokio::net::TcpStream;

async fn carried(served: &Served) -> u64 {
    let mut raw = Raw(TcpStream::connect(served.address).await.unwrap());
    raw.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let page = raw.response().await.2;
    let line = page.lines().find_map(|l| l.strip_prefix("pirouette_answers_carried_total "));
    line.expect("the counter is there").parse().unwrap()
}

async fn ask(served: &Served, client: &mut Raw, seed: i128) {
    let sample = sample_observation(served.arm.policy.config(), 3);
    let Value::Map(mut map) = sample else { panic!("a map") };
    map.push(("seed".into(), Value::Int(seed)));
    let map: Vec<(&str, Value)> = map.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
    client.ask(&map).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_gets_its_answers_from_the_device_thread_in_order() {
    let served = Served::start("pi05_libero", ServeOptions::default()).await;
    let mut client = served.client().await;
    let mut first = None;
    for turn in 1.. {
        served.hold();
        ask(&served, &mut client, 7).await;
        eventually("it runs", || served.busy()).await;
        // Read ahead meanwhile: the second is nobody's before the first is answered.
        ask(&served, &mut client, 8).await;
        served.release();
        let actions = async |client: &mut Raw| client.frame().await.map().swap_remove(0);
        let (one, two) = (actions(&mut client).await, actions(&mut client).await);
        assert_ne!(one, two);
        assert_eq!(*first.get_or_insert((one.clone(), two.clone())), (one, two), "in order");
        // The runtime may be at the connection at the very moment, but not every time.
        if carried(&served).await > 0 {
            break;
        }
        assert!(turn < 200, "no answer was ever carried");
    }
    // And it goes on: a ping is answered, a close is too.
    client.send(9, b"still there").await;
    assert_eq!(client.frame().await.opcode, 10);
    client.send(8, &1000u16.to_be_bytes()).await;
    assert_eq!(client.frame().await.close().0, 1000);
    client.closed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_with_more_to_do_leaves_answers_to_others() {
    let served = Served::start("pi05_libero", ServeOptions::default()).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(served.client().await);
    }
    served.hold();
    ask(&served, &mut clients[0], 1).await;
    eventually("the first runs", || served.busy() && served.queued() == 0).await;
    ask(&served, &mut clients[1], 2).await;
    ask(&served, &mut clients[2], 3).await;
    eventually("two wait", || served.queued() == 2).await;
    served.release();
    for client in &mut clients {
        assert_eq!(client.frame().await.opcode, 2);
    }
    assert_eq!(carried(&served).await, 0);
}
