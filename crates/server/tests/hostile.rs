//! Half-open, slow and hostile clients, with and without TLS, beside good ones.

mod rig;

use std::time::{Duration, Instant};

use bytes::Bytes;
use pirouette_policy::Value;
use pirouette_server::ServeOptions;
use rig::secure::{client, connect, first};
use rig::{Raw, Server, first_action, state};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::rustls::version::TLS13;

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

/// Half-open sockets of this process, both ends of which cost a descriptor.
fn half_open() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let open_files = limits.lines().find(|line| line.starts_with("Max open files"));
    let limit = open_files.and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    let most = limit.unwrap_or(256usize).saturating_sub(200) / 2;
    if most < 1000 {
        println!("{most} half-open sockets instead of 1000: the limit on descriptors is low");
    }
    most.min(1000)
}

async fn wait_for(server: &Server, line: &str) {
    let started = Instant::now();
    loop {
        let connector = client("ca.pem", &TLS13);
        let mut raw = connect(&connector, server.admin_address).await.unwrap();
        raw.write(get("/metrics").as_bytes()).await;
        let (_, _, metrics) = raw.response().await;
        if metrics.lines().any(|l| l == line) {
            return;
        }
        assert!(started.elapsed() < rig::PATIENCE, "no `{line}` in\n{metrics}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_thousand_half_open_sockets_beside_good_clients() {
    let handshake_timeout = Duration::from_secs(600);
    let options = ServeOptions { handshake_timeout, max_handshakes: 1100, ..first() };
    let mut server = Server::with_admin(options).await;
    let connector = client("ca.pem", &TLS13);
    let mut silent = Vec::new();
    let mut encrypted = Vec::new();
    for i in 0..half_open() {
        match i % 10 {
            0 => {
                let mut raw = connect(&connector, server.address).await.unwrap();
                raw.write(b"GET / HTTP/1.1\r\nHost: ").await;
                encrypted.push(raw);
            }
            1..5 => {
                let mut raw = Raw(server.tcp().await);
                raw.write(&[0x16, 3, 1, 2, 0, 1, 0]).await;
                silent.push(raw);
            }
            _ => silent.push(Raw(server.tcp().await)),
        }
    }
    let mut robots = tokio::task::JoinSet::new();
    for robot in 0..16 {
        let (connector, address) = (connector.clone(), server.address);
        robots.spawn(async move {
            let mut raw = connect(&connector, address).await.unwrap();
            raw.upgrade("").await;
            assert_eq!(raw.frame().await.opcode, 2);
            for i in 0..20 {
                raw.ask(&[state(f64::from(robot * 100 + i))]).await;
                let answer = raw.frame().await.map();
                assert_eq!(first_action(&answer), f64::from(robot * 100 + i));
            }
            raw
        });
    }
    let robots = robots.join_all().await;
    wait_for(&server, "pirouette_connections 16").await;
    drop(robots);
    wait_for(&server, "pirouette_connections 0").await;
    // They do not hold up a shutdown either.
    server.shut_down();
    let served = tokio::time::timeout(rig::PATIENCE, &mut server.task).await.unwrap().unwrap();
    assert!(served.drained);
    drop((silent, encrypted));
}

#[tokio::test]
async fn headers_are_bounded_in_bytes_and_number_and_time() {
    let limit = Duration::from_millis(600);
    let server = Server::plain(ServeOptions { handshake_timeout: limit, ..Default::default() });
    let server = server.await;
    // The bound is 32 KiB; what one read brings beyond it is still looked at.
    let long = format!("GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(256 << 10));
    let many = format!("GET / HTTP/1.1\r\nHost: x\r\n{}\r\n", "A: b\r\n".repeat(200));
    for request in [long, many] {
        let mut raw = Raw(server.tcp().await);
        // It may be refused before all of it is written.
        let _ = raw.0.write_all(request.as_bytes()).await;
        let mut answer = Vec::new();
        let reading = raw.0.read_to_end(&mut answer);
        let _ = tokio::time::timeout(rig::PATIENCE, reading).await.expect("an end");
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "), "{answer:?}");
    }
    // A byte now and then buys no time.
    let mut drip = server.tcp().await;
    drip.write_all(b"GET / HTTP/1.1\r\nHost: ").await.unwrap();
    let began = Instant::now();
    while drip.write_all(b"x").await.is_ok() {
        assert!(began.elapsed() < rig::PATIENCE, "the drip goes on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut good = server.client().await;
    good.ask(&[state(1.0)]).await;
    assert_eq!(first_action(&good.frame().await.map()), 1.0);
}

#[tokio::test]
async fn a_body_that_never_comes_is_not_waited_for() {
    let limit = Duration::from_millis(300);
    let options = ServeOptions { handshake_timeout: limit, ..Default::default() };
    let server = Server::with_admin(options).await;
    let mut raw = Raw(TcpStream::connect(server.admin_address).await.unwrap());
    raw.write(b"POST /note HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf").await;
    let (status, _, _) = raw.response().await;
    assert_eq!(status, "HTTP/1.1 408 Request Timeout");
}

#[tokio::test]
async fn a_page_nobody_reads_is_dropped() {
    let options = ServeOptions {
        write_timeout: Duration::from_millis(300),
        max_handshakes: 1,
        ..Default::default()
    };
    let server = Server::plain(options).await;
    // More than the sockets hold.
    *server.script.note.lock().unwrap() = Bytes::from(vec![b'x'; 32 << 20]);
    let mut lazy = Raw(server.tcp().await);
    lazy.write(get("/note").as_bytes()).await;
    assert!(lazy.head().await.contains("200 OK"));
    let started = Instant::now();
    loop {
        // The one place is taken, until it is given back.
        let mut raw = server.tcp().await;
        let _ = raw.write_all(get("/livez").as_bytes()).await;
        let mut answer = String::new();
        let _ = raw.read_to_string(&mut answer).await;
        if answer.ends_with("alive\n") {
            break;
        }
        assert!(started.elapsed() < rig::PATIENCE, "the place never returned");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn pings_are_answered_and_slow_readers_dropped_through_tls() {
    let options = ServeOptions { write_timeout: Duration::from_millis(300), ..first() };
    let server = Server::with_admin(options).await;
    let connector = client("ca.pem", &TLS13);
    let mut good = connect(&connector, server.address).await.unwrap();
    good.upgrade("").await;
    assert_eq!(good.frame().await.opcode, 2);
    let mut lazy = connect(&connector, server.address).await.unwrap();
    lazy.upgrade("").await;
    for _ in 0..6 {
        lazy.ask(&[state(0.0), ("rows", Value::Int(100_000))]).await;
    }
    good.ask(&[state(1.0), ("sleep_ms", Value::Int(200))]).await;
    good.send(9, b"are you there").await;
    let pong = good.frame().await;
    assert_eq!((pong.opcode, &pong.payload[..]), (10, &b"are you there"[..]));
    assert_eq!(first_action(&good.frame().await.map()), 1.0);
    wait_for(&server, "pirouette_requests_total{outcome=\"slow_reader\"} 1").await;
    wait_for(&server, "pirouette_connections 1").await;
}
