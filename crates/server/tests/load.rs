//! `load` against servers that refuse: whose reasons it tells, and what it counts.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use pirouette_policy::{NdArray, Value};
use pirouette_server::load::{self, LoadError, LoadOptions};
use pirouette_server::{Reply, RequestContext, ServeOptions, Service, ServiceError, ServiceFuture};
use rig::Server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Answers, raises, refuses, and so on.
struct InTurn(AtomicUsize);

impl Service for InTurn {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metadata(&self) -> Value {
        Value::Map(vec![])
    }

    fn infer(&self, _: Value, _: RequestContext) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        let turn = self.0.fetch_add(1, SeqCst) % 3;
        Box::pin(async move {
            match turn {
                0 => {
                    let actions = NdArray::from_f64(vec![1, 1], &[0.5]).unwrap();
                    Ok(Reply {
                        actions,
                        model_ms: 1.0,
                        timing: None,
                        extras: vec![],
                        identity: None,
                    })
                }
                1 => Err(ServiceError::exception("KeyError", "'state'")),
                _ => Err(ServiceError::refusal("overloaded", "the queue is full")),
            }
        })
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

/// One answer at a time, each after 50 ms.
struct Slow(tokio::sync::Mutex<()>);

impl Service for Slow {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metadata(&self) -> Value {
        Value::Map(vec![])
    }

    fn infer(&self, _: Value, _: RequestContext) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async {
            let _turn = self.0.lock().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            let actions = NdArray::from_f64(vec![1, 1], &[0.5]).unwrap();
            Ok(Reply { actions, model_ms: 50.0, timing: None, extras: vec![], identity: None })
        })
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(async { Ok(()) })
    }
}

fn options(address: std::net::SocketAddr, requests: usize) -> LoadOptions {
    LoadOptions {
        url: format!("ws://{address}"),
        api_key: None,
        clients: 1,
        requests,
        duration: None,
        warm_up: 0,
        rate: None,
        deadline: None,
        observation: Value::Map(vec![("x".into(), Value::Int(1))]),
        timeout: Duration::from_secs(5),
    }
}

#[tokio::test]
async fn each_request_is_counted_once_with_the_servers_reason() {
    let service = Arc::new(InTurn(AtomicUsize::new(0)));
    let server = Server::with(service.clone(), ServeOptions::default(), false).await;
    let report = load::run(&options(server.address, 12)).await.unwrap();
    let errors = [("KeyError".to_string(), 4), ("RuntimeError".to_string(), 4)];
    assert_eq!(report.errors, errors.into(), "{report:?}");
    assert_eq!((report.sent, report.answered), (12, 4));
    assert_eq!(service.0.load(SeqCst), 12, "every request reached the service");
    assert_eq!(report.first_error.as_deref(), Some("KeyError: 'state'"));
}

/// Three warm-up requests that nobody counts took the reason with them.
#[tokio::test]
async fn a_server_that_always_raises_is_quoted() {
    let server = Server::plain(ServeOptions::default()).await;
    let asked = LoadOptions { warm_up: 3, ..options(server.address, 4) };
    let error = load::run(&asked).await.unwrap_err().to_string();
    assert_eq!(error, "no request was answered; first error: KeyError: 'state'");
}

#[tokio::test]
async fn a_server_without_a_contract_is_told_from_none() {
    let ask = async |address| load::contract(&format!("ws://{address}"), None).await.unwrap_err();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let other = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 1024];
        let _ = stream.read(&mut head).await.unwrap();
        stream.write_all(b"HTTP/1.1 404 Not Found\r\n\r\n").await.unwrap();
    });
    let error = ask(address).await;
    assert!(matches!(&error, LoadError::Contract(why) if why.contains("404")), "{error}");
    other.await.unwrap();
    // Nobody listens there any more.
    let error = ask(address).await;
    assert!(matches!(&error, LoadError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("nothing answers at ws://127.0.0.1:"), "{error}");
}

/// It went on until each due request was sent: ten times as long.
#[tokio::test]
async fn a_rate_above_what_the_server_does_still_ends_in_time() {
    let service = Arc::new(Slow(tokio::sync::Mutex::new(())));
    let server = Server::with(service, ServeOptions::default(), false).await;
    let asked = LoadOptions {
        clients: 2,
        rate: Some(200.0),
        duration: Some(Duration::from_secs(1)),
        ..options(server.address, usize::MAX)
    };
    let report = load::run(&asked).await.unwrap();
    assert!(report.seconds < 1.3, "{report:?}");
    assert!(report.unsent > 0 && report.sent + report.unsent == 200, "{report:?}");
    let sent = report.sent_per_s.unwrap();
    assert!(sent > 0.0 && sent < 50.0, "{report:?}");
    // Late from when they were due, but not on the wire.
    assert!(report.latency.max_ms > 500.0, "{report:?}");
    assert!(report.over_server.p50_ms < 50.0, "{report:?}");
}

#[tokio::test]
async fn a_rate_that_the_server_does_is_sent_whole() {
    let service = Arc::new(Slow(tokio::sync::Mutex::new(())));
    let server = Server::with(service, ServeOptions::default(), false).await;
    let asked = LoadOptions {
        rate: Some(5.0),
        duration: Some(Duration::from_secs(1)),
        ..options(server.address, usize::MAX)
    };
    let report = load::run(&asked).await.unwrap();
    assert_eq!((report.sent, report.unsent), (5, 0), "{report:?}");
}
