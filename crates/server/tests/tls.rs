//! TLS over real sockets: websockets, pages, bad files, hostile handshakes, new certificates.

mod rig;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use pirouette_server::{ServeOptions, Tls, TlsError};
use rig::secure::{client, connect, file, first, tls};
use rig::{Raw, Server, first_action, state};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::version::{TLS12, TLS13};

fn certificate(raw: &Raw<TlsStream<TcpStream>>) -> CertificateDer<'static> {
    raw.0.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

/// A page through TLS.
async fn page(connector: &TlsConnector, address: SocketAddr, path: &str) -> (String, String) {
    let mut raw = connect(connector, address).await.unwrap();
    raw.write(get(path).as_bytes()).await;
    let (status, _, body) = raw.response().await;
    (status, body)
}

async fn metric(connector: &TlsConnector, server: &Server, line: &str) {
    let started = Instant::now();
    loop {
        let (_, metrics) = page(connector, server.address, "/metrics").await;
        if metrics.lines().any(|l| l == line) {
            return;
        }
        assert!(started.elapsed() < rig::PATIENCE, "no `{line}` in\n{metrics}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn websockets_and_pages_of_both_listeners() {
    let server = Server::with_admin(first()).await;
    for version in [&TLS13, &TLS12] {
        let connector = client("ca.pem", version);
        let mut raw = connect(&connector, server.address).await.unwrap();
        raw.upgrade("").await;
        assert_eq!(raw.frame().await.opcode, 2, "metadata");
        // An answer of many TLS records.
        raw.ask(&[state(4.0), ("rows", pirouette_policy::Value::Int(20_000))]).await;
        assert_eq!(first_action(&raw.frame().await.map()), 4.0);
        assert_eq!(page(&connector, server.address, "/healthz").await.1, "OK\n");
        let (status, metrics) = page(&connector, server.admin_address, "/metrics").await;
        assert_eq!(status, "HTTP/1.1 200 OK");
        let expiry = "pirouette_certificate_expires_seconds 4733510400\n";
        assert!(metrics.contains(expiry), "{metrics}");
    }
    let stranger = client("second.pem", &TLS13);
    assert!(connect(&stranger, server.address).await.is_err(), "an authority it does not know");
}

#[tokio::test]
async fn shutdown_says_goodbye_through_tls() {
    let mut server = Server::plain(first()).await;
    let mut raw = connect(&client("ca.pem", &TLS13), server.address).await.unwrap();
    raw.upgrade("").await;
    assert_eq!(raw.frame().await.opcode, 2);
    server.shut_down();
    assert_eq!(raw.frame().await.close().0, 1001);
    raw.send(8, &1001u16.to_be_bytes()).await;
    assert!(tokio::time::timeout(rig::PATIENCE, &mut server.task).await.unwrap().unwrap().drained);
}

#[test]
fn bad_files_are_named_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let text = |name: &str| std::fs::read_to_string(file(name)).unwrap();
    let (good, key) = (file("first.pem"), file("first.key"));
    let cut = write("cut.pem", &text("first.pem").as_bytes()[..300]);
    let noise = write("noise.pem", text("first.pem").replace("MII", "M!I").as_bytes());
    let noise_key = write("noise.key", text("first.key").replace("MI", "!!").as_bytes());
    let no_x509 = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let no_x509 = write("no_x509.pem", no_x509);
    let sealed = text("first.key").replace("PRIVATE", "ENCRYPTED PRIVATE");
    let sealed = write("sealed.key", sealed.as_bytes());
    let empty = write("empty", b"");
    let large = write("large", &vec![b'\n'; 2 << 20]);
    let missing = folder.path().join("missing");
    let table: [(&Path, &Path, &str); 12] = [
        (&missing, &key, "missing` can't be read: No such file"),
        (&good, &missing, "missing` can't be read: No such file"),
        (folder.path(), &key, "can't be read: "),
        (&large, &key, "larger than 1 MiB"),
        (&empty, &key, "empty` holds no certificate: --tls-cert takes"),
        (&key, &key, "first.key` holds no certificate"),
        (&good, &good, "first.pem` holds no private key: --tls-key takes"),
        (&good, &sealed, "sealed.key` holds no private key"),
        (&cut, &key, "cut.pem` is no PEM file: an END line is missing"),
        (&noise, &key, "noise.pem` is no PEM file: "),
        (&good, &noise_key, "noise.key` is no PEM file: "),
        (&no_x509, &key, "no_x509.pem` can't be used: "),
    ];
    for (certificate, key, want) in table {
        let error = Tls::read(certificate, key).expect_err(want).to_string();
        assert!(error.contains(want), "{want}: {error}");
        assert!(!error.contains("MIG"), "no piece of a key: {error}");
    }
    let other = tls("first.pem", "second.key").unwrap_err();
    assert!(matches!(other, TlsError::OtherKey { .. }), "{other}");
    assert!(other.to_string().contains("second.key") && other.to_string().contains("first.pem"));
    // Another form of the same key; a certificate that is only too old.
    tls("first.pem", "first.sec1.key").unwrap();
    tls("expired.pem", "first.key").unwrap();
}

#[tokio::test]
async fn handshakes_that_do_not_come_to_an_end_are_ended() {
    let limit = Duration::from_millis(800);
    let server = Server::plain(ServeOptions { handshake_timeout: limit, ..first() }).await;
    let connector = client("ca.pem", &TLS13);
    let began = Instant::now();
    // Nothing at all; the first bytes of a client hello; TLS and half a request.
    let mut silent = Raw(server.tcp().await);
    let mut begun = Raw(server.tcp().await);
    begun.write(&[0x16, 3, 1, 2, 0, 1, 0]).await;
    let mut half = connect(&connector, server.address).await.unwrap();
    half.write(b"GET / HTTP/1.1\r\nHost: ").await;
    let drip = tokio::spawn(async move {
        // A header a byte at a time buys no time.
        use tokio::io::AsyncWriteExt;
        while half.0.write_all(b"x").await.is_ok() && half.0.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    silent.closed().await;
    begun.closed().await;
    tokio::time::timeout(rig::PATIENCE, drip).await.expect("the drip ends").unwrap();
    assert!(began.elapsed() >= limit);
    metric(&connector, &server, "pirouette_connections_refused_total{reason=\"tls_timeout\"} 2")
        .await;

    // What is no TLS is told so and dropped.
    let mut plain = Raw(server.tcp().await);
    plain.write(get("/healthz").as_bytes()).await;
    let mut answer = Vec::new();
    let reading = tokio::io::AsyncReadExt::read_to_end(&mut plain.0, &mut answer);
    let _ = tokio::time::timeout(rig::PATIENCE, reading).await.expect("dropped");
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
    metric(&connector, &server, "pirouette_connections_refused_total{reason=\"tls\"} 1").await;
}

#[tokio::test]
async fn a_new_certificate_is_taken_and_a_bad_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let (pem, key) = (folder.path().join("tls.crt"), folder.path().join("tls.key"));
    let put = |name: &str, to: &Path| assert!(std::fs::copy(file(name), to).unwrap() > 0);
    put("first.pem", &pem);
    put("first.key", &key);
    let options = ServeOptions {
        tls: Some(Tls::read(&pem, &key).unwrap()),
        reload_interval: Duration::from_millis(20),
        ..Default::default()
    };
    let server = Server::plain(options).await;
    let connector = client("ca.pem", &TLS13);
    let served = |name: &str| CertificateDer::from_pem_file(file(name)).unwrap();
    let mut old = connect(&connector, server.address).await.unwrap();
    assert_eq!(certificate(&old), served("first.pem"));
    old.upgrade("").await;
    assert_eq!(old.frame().await.opcode, 2);

    // Half of a change is refused, and what was in use stays.
    put("second.pem", &pem);
    let line = "pirouette_reloads_total{file=\"certificate\",outcome=\"failed\"} 1";
    metric(&connector, &server, line).await;
    let still = connect(&connector, server.address).await.unwrap();
    assert_eq!(certificate(&still), served("first.pem"));

    put("second.key", &key);
    let line = "pirouette_reloads_total{file=\"certificate\",outcome=\"ok\"} 1";
    metric(&connector, &server, line).await;
    let new = connect(&connector, server.address).await.unwrap();
    assert_eq!(certificate(&new), served("second.pem"));
    old.ask(&[state(9.0)]).await;
    assert_eq!(first_action(&old.frame().await.map()), 9.0, "open connections live on");
}
