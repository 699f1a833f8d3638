//! The admin listener: pages and changes, apart from the robots' port.

mod rig;

use pirouette_server::{ApiKeys, ServeOptions};
use rig::Server;

const ROBOT: &str = "the-key-of-a-robot";
const SCRAPER: &str = "the-key-of-a-scraper";
const ADMIN: &str = "the-key-of-an-admin";

fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    )
}

fn get(path: &str) -> String {
    request("GET", path, "", "")
}

#[tokio::test]
async fn the_public_port_keeps_to_websockets_and_health() {
    let server = Server::with_admin(ServeOptions::default()).await;
    for path in ["/healthz", "/livez", "/readyz", "/health"] {
        assert!(server.get(&get(path)).await.0.contains(" 200 "), "{path}");
        assert!(server.admin(&get(path)).await.0.contains(" 200 "), "{path}");
    }
    for path in ["/metrics", "/contract", "/note"] {
        let (status, _, body) = server.get(&get(path)).await;
        assert!(status.contains(" 426 ") && body.contains("WebSocket"), "{path}: {status}");
        assert!(server.admin(&get(path)).await.0.contains(" 200 "), "{path}");
    }
    let mut client = server.client().await;
    client.ask(&[rig::state(2.0)]).await;
    assert_eq!(rig::first_action(&client.frame().await.map()), 2.0);
    let (_, _, metrics) = server.admin(&get("/metrics")).await;
    assert!(metrics.contains("\npirouette_connections 1\n"), "{metrics}");
    let (status, _, body) = server.admin(&get("/nothing")).await;
    assert!(status.contains(" 404 ") && body.contains("no such page"), "{status} {body}");
}

#[tokio::test]
async fn changes_come_by_post_through_the_admin_listener_alone() {
    let server = Server::with_admin(ServeOptions::default()).await;
    let post = request("POST", "/note?tag=a", "", "remember");
    assert!(server.get(&post).await.0.contains(" 405 "));
    let (status, _, body) = server.admin(&post).await;
    assert_eq!((status.as_str(), body.as_str()), ("HTTP/1.1 202 Accepted", r#"{"tag":"a"}"#));
    assert_eq!(server.admin(&get("/note")).await.2, "remember");

    let from_a_page = request("POST", "/note", "Origin: http://x\r\n", "forged");
    assert!(server.admin(&from_a_page).await.0.contains(" 403 "));
    let long = "x".repeat((64 << 10) + 1);
    assert!(server.admin(&request("POST", "/note", "", &long)).await.0.contains(" 413 "));
    assert!(server.admin(&request("PUT", "/note", "", "")).await.0.contains(" 405 "));
    assert!(server.admin(&request("POST", "/metrics", "", "")).await.0.contains(" 404 "));
    assert_eq!(server.admin(&get("/note")).await.2, "remember");

    // Without an admin listener reading is done on the public port, changing nowhere.
    let server = Server::plain(ServeOptions::default()).await;
    assert!(server.get(&get("/note")).await.0.contains(" 200 "));
    assert!(server.get(&post).await.0.contains(" 405 "));
}

#[tokio::test]
async fn the_two_listeners_have_keys_of_their_own() {
    let keys = |text: &str| Some(ApiKeys::parse(text).unwrap());
    let options = ServeOptions {
        api_keys: keys(ROBOT),
        admin_keys: keys(&format!("{ADMIN}\nscraper {SCRAPER} rate=0.001\n")),
        ..ServeOptions::default()
    };
    let server = Server::with_admin(options).await;
    let with =
        |key: &str| request("GET", "/metrics", &format!("Authorization: Bearer {key}\r\n"), "");
    assert!(server.admin(&get("/readyz")).await.0.contains(" 200 "), "health needs no key");
    assert!(server.admin(&get("/metrics")).await.0.contains(" 401 "));
    assert!(server.admin(&with(ROBOT)).await.0.contains(" 401 "));
    let (status, _, metrics) = server.admin(&with(ADMIN)).await;
    assert!(status.contains(" 200 "), "{status}");
    assert!(metrics.contains("{reason=\"admin_unauthorized\"} 2"), "{metrics}");
    assert!(server.get(&with(ADMIN)).await.0.contains(" 401 "));
    assert!(server.admin(&with(SCRAPER)).await.0.contains(" 200 "));
    let (status, _, body) = server.admin(&with(SCRAPER)).await;
    assert!(status.contains(" 429 ") && body.contains("key `scraper` may send"), "{body}");
}

#[tokio::test]
async fn a_full_admin_listener_touches_neither_the_robots_nor_who_asks() {
    let server = Server::with_admin(ServeOptions::default()).await;
    let mut held = Vec::new();
    for _ in 0..64 {
        let stream = tokio::net::TcpStream::connect(server.admin_address).await.unwrap();
        held.push(rig::Raw(stream));
    }
    // Accepted in order, so the next one finds the listener full, and the first makes room.
    let (status, _, _) = server.admin(&get("/livez")).await;
    assert!(status.contains(" 200 "), "{status}");
    held.remove(0).closed().await;
    let mut client = server.client().await;
    client.ask(&[rig::state(3.0)]).await;
    assert_eq!(rig::first_action(&client.frame().await.map()), 3.0);
}
