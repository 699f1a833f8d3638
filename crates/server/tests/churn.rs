//! Ten thousand clients that connect and are killed; alone in its process, so that the
//! descriptors and the memory it counts are its own.
#![cfg(target_os = "linux")]

mod rig;

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use pirouette_policy::Value;
use pirouette_server::ServeOptions;
use rig::secure::{client, connect, first};
use rig::{Raw, Server, eventually, first_action, state, upgrade_request};
use tokio_rustls::rustls::version::TLS13;

/// Cycles of each server: set to 100000 for the long form.
fn cycles() -> usize {
    std::env::var("PIROUETTE_CHURN").ok().and_then(|n| n.parse().ok()).unwrap_or(10_000)
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// One client, killed with a reset at some point of its life.
async fn plain(server: &Server, cycle: usize) {
    let stream = server.tcp().await;
    stream.set_zero_linger().unwrap();
    let mut raw = Raw(stream);
    let request = upgrade_request("");
    match cycle % 5 {
        0 => {}
        1 => raw.write(&request.as_bytes()[..request.len() / 2]).await,
        2 => raw.write(request.as_bytes()).await,
        3 => raw.upgrade("").await,
        _ => {
            raw.upgrade("").await;
            assert_eq!(raw.frame().await.opcode, 2);
            raw.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
        }
    }
}

async fn settled(server: &Server) {
    let started = Instant::now();
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
    while !server.admin(request).await.2.contains("\npirouette_connections 0\n") {
        assert!(started.elapsed() < Duration::from_secs(60), "slots never returned");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eventually("no request runs", || server.script.running.load(SeqCst) == 0).await;
}

#[tokio::test]
async fn killed_clients_leave_no_descriptor_slot_or_memory_behind() {
    // Slots for a few dozen only: one lost in a hundred cycles would be noticed.
    let options = ServeOptions { max_connections: 64, max_handshakes: 64, ..Default::default() };
    let server = Server::with_admin(options).await;
    let churn = async |cycles: usize| {
        for cycle in 0..cycles {
            plain(&server, cycle).await;
            if cycle % 32 == 0 {
                // The server shares our thread: let it see the ends.
                settled(&server).await;
            }
        }
        settled(&server).await;
    };
    churn(1000).await;
    let (files, memory) = (descriptors(), resident());
    churn(cycles()).await;
    let started = Instant::now();
    while descriptors() > files {
        assert!(started.elapsed() < rig::PATIENCE, "{} descriptors, {files} before", descriptors());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let grown = resident().saturating_sub(memory);
    assert!(grown < 16 << 20, "{grown} bytes more than before");
    let mut good = server.client().await;
    good.ask(&[state(2.0)]).await;
    assert_eq!(first_action(&good.frame().await.map()), 2.0);
    drop(good);
    encrypted(cycles() / 20).await;
}

/// The same through TLS, where a handshake costs a thousand times a connection.
async fn encrypted(cycles: usize) {
    let options = ServeOptions { max_connections: 64, max_handshakes: 64, ..first() };
    let server = Server::plain(options).await;
    let connector = client("ca.pem", &TLS13);
    let files = descriptors();
    for cycle in 0..cycles {
        if cycle % 4 == 0 {
            let mut raw = Raw(server.tcp().await);
            raw.0.set_zero_linger().unwrap();
            raw.write(&[0x16, 3, 1, 2, 0, 1, 0]).await;
            continue;
        }
        let mut raw = connect(&connector, server.address).await.unwrap();
        raw.0.get_ref().0.set_zero_linger().unwrap();
        if cycle % 4 > 1 {
            raw.upgrade("").await;
        }
        if cycle % 4 > 2 {
            raw.ask(&[state(1.0), ("sleep_ms", Value::Int(60_000))]).await;
        }
    }
    eventually("all descriptors return", || descriptors() <= files).await;
    eventually("no request runs", || server.script.running.load(SeqCst) == 0).await;
}
