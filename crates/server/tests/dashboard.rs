//! The page at `/` and the numbers behind it.

mod rig;

use pirouette_policy::Value;
use pirouette_server::{ApiKeys, ServeOptions};
use rig::engine::EngineService;
use rig::{Server, eventually, state, text};
use serde_json::Value as Json;

const BROWSER: &str = "Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8\r\n";

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n")
}

#[tokio::test]
async fn the_page_needs_nothing_from_elsewhere() {
    let server = Server::plain(ServeOptions::default()).await;
    let (status, headers, page) = server.get(&get("/", BROWSER)).await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    assert!(headers.contains(&"Content-Type: text/html; charset=utf-8".into()), "{headers:?}");
    assert!(page.starts_with("<!doctype html>") && page.contains("default-src 'none'"));
    for forbidden in ["innerHTML", "document.write", "outerHTML", "insertAdjacent", "eval("] {
        assert!(!page.contains(forbidden), "{forbidden}: what is shown must be text");
    }
    let outside = page.replace("http://www.w3.org/2000/svg", "");
    assert!(
        !outside.contains("http://") && !outside.contains("https://") && !outside.contains("src=")
    );
    let (status, _, body) = server.get(&get("/", "Accept: */*\r\n")).await;
    assert_eq!(status, "HTTP/1.1 426 Upgrade Required", "what is no browser gets openpi's answer");
    assert!(body.starts_with("Failed to open a WebSocket connection"));
}

#[tokio::test]
async fn the_page_is_open_and_its_numbers_are_not() {
    let keys = Some(ApiKeys::parse("0123456789abcdef").unwrap());
    let options = ServeOptions { api_keys: keys.clone(), ..ServeOptions::default() };
    let server = Server::plain(options.clone()).await;
    assert!(server.get(&get("/", BROWSER)).await.0.contains("200"));
    assert!(server.get(&get("/stats", BROWSER)).await.0.contains("401"));
    assert!(server.get(&get("/trace?seconds=1", BROWSER)).await.0.contains("401"));
    let key = "Authorization: Api-Key 0123456789abcdef\r\n";
    assert!(server.get(&get("/stats", key)).await.0.contains("200"));
    let admin = Server::with_admin(ServeOptions { api_keys: None, ..options }).await;
    assert!(admin.get(&get("/", BROWSER)).await.0.contains("426"), "moved to the admin listener");
    assert!(admin.get(&get("/stats", "")).await.0.contains("426"));
    let mut raw = rig::Raw(tokio::net::TcpStream::connect(admin.admin_address).await.unwrap());
    raw.write(get("/", "").as_bytes()).await;
    assert!(raw.response().await.2.starts_with("<!doctype html>"));
}

#[tokio::test]
async fn stats_tell_what_happened() {
    let server = Server::with(EngineService::start(2.0), ServeOptions::default(), false).await;
    let mut client = server.client().await;
    for i in 0..30 {
        client.ask(&[state(i as f64)]).await;
        client.frame().await.map();
    }
    let mut wrong = server.client().await;
    wrong.ask(&[("prompt", text("no state"))]).await;
    assert!(wrong.frame().await.text().contains("KeyError"));
    client.ask(&[state(0.0), ("deadline_ms", Value::Float(0.01))]).await;
    assert!(client.frame().await.text().contains("TimeoutError"));
    drop(wrong);
    let engine = &server.script.engine;
    eventually("idle", || !engine.stats().devices[0].busy).await;
    let mut stats = Json::Null;
    // A connection that was closed takes a moment to be over.
    for _ in 0..500 {
        let (status, _, body) = server.get(&get("/stats", "")).await;
        assert_eq!(status, "HTTP/1.1 200 OK");
        stats = serde_json::from_str(&body).unwrap();
        if stats["connections"]["open"] == 1 && stats["requests"]["running"] == 0 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(stats["connections"]["total"], 2);
    assert_eq!(
        (&stats["connections"]["open"], &stats["requests"]["running"]),
        (&1.into(), &0.into())
    );
    let outcomes = serde_json::json!({ "deadline": 1, "invalid": 1, "ok": 30 });
    assert_eq!(stats["requests"]["outcomes"], outcomes);
    let minute = &stats["last_minute"];
    let quantile = |q: &str| minute[q].as_f64().unwrap();
    assert_eq!(minute["answers"], 30);
    assert!(quantile("p50_ms") >= 2.0 && quantile("p50_ms") <= quantile("p90_ms"));
    assert!(quantile("p90_ms") <= quantile("p99_ms"));
    let recent = stats["requests"]["recent"].as_array().unwrap();
    assert_eq!((recent.len(), &recent[13]["outcome"]), (14, &"deadline".into()));
    assert_eq!(recent.iter().filter(|r| r["outcome"] == "ok").count(), 12);
    // The other connection's request may be told of before the one that was answered before it.
    let last = recent.iter().rfind(|r| r["outcome"] == "ok").unwrap();
    let parts = &last["parts_ms"];
    assert!(parts["device"].as_f64().unwrap() >= 2.0, "{parts}");
    let sum: f64 = ["decode", "prepare", "queue", "device", "encode"]
        .map(|part| parts[part].as_f64().unwrap())
        .iter()
        .sum();
    assert!(sum <= last["total_ms"].as_f64().unwrap() + 0.5, "{last}");
    let engine = &stats["engine"];
    assert_eq!(engine["batch_sizes"], serde_json::json!([{ "size": 1, "batches": 30 }]));
    assert_eq!(engine["batches"].as_array().unwrap().len(), 30);
    assert_eq!(engine["batches"][0]["stages_ms"].as_object().unwrap().len(), 3);
    assert_eq!(engine["devices"][0]["name"], "staged <null> & \"co\"");
    assert_eq!(engine["devices"][0]["phase"], "ready");
    assert_eq!(engine["rejected"]["deadline"], 1);
    assert_eq!(stats["gpus"], serde_json::json!([]));
}
