//! `/trace`: what a viewer needs, of requests that really ran.

mod rig;

use std::collections::BTreeMap;

use pirouette_server::ServeOptions;
use rig::engine::EngineService;
use rig::{PATIENCE, Raw, Server, state, text};
use serde_json::Value as Json;
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

/// Asks until told to stop, one wrong request at the end.
async fn client(server: &Server<EngineService>, stop: &std::sync::atomic::AtomicBool) -> usize {
    let mut client = server.client().await;
    let mut asked = 0;
    while !stop.load(std::sync::atomic::Ordering::SeqCst) {
        client.ask(&[state(asked as f64)]).await;
        client.frame().await.map();
        asked += 1;
    }
    asked
}

async fn trace_under_load(server: &Server<EngineService>) -> (Json, usize) {
    let stop = std::sync::atomic::AtomicBool::new(false);
    let clients = async { tokio::join!(client(server, &stop), client(server, &stop)) };
    let tracing = async {
        let mut raw = Raw(server.tcp().await);
        raw.write(get("/trace?seconds=1").as_bytes()).await;
        // While it runs: another is refused; a request that fails is part of it.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        let (status, _, body) = server.get(&get("/trace?seconds=1")).await;
        assert!(status.contains("409") && body.contains("try again"), "{status} {body}");
        let mut wrong = server.client().await;
        wrong.ask(&[("prompt", text("no state"))]).await;
        assert!(wrong.frame().await.text().contains("KeyError"));
        let head = raw.head().await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        let mut body = String::new();
        timeout(PATIENCE, raw.0.read_to_string(&mut body)).await.unwrap().unwrap();
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        body
    };
    let (body, asked) = tokio::join!(tracing, clients);
    (serde_json::from_str(&body).unwrap(), asked.0 + asked.1)
}

/// Spans of every track, in order; checks that each is well formed and that they nest.
fn tracks(events: &[Json]) -> BTreeMap<(u64, u64), Vec<&Json>> {
    let mut tracks = BTreeMap::<(u64, u64), Vec<&Json>>::new();
    let mut last = 0.0;
    for event in events {
        let phase = event["ph"].as_str().unwrap();
        assert!(["M", "X", "s", "f"].contains(&phase), "{event}");
        let ts = event["ts"].as_f64().unwrap();
        assert!(ts >= last, "time goes forward: {event}");
        last = ts;
        let track = (event["pid"].as_u64().unwrap(), event["tid"].as_u64().unwrap());
        if phase == "X" {
            assert!(event["dur"].as_f64().unwrap() >= 0.0, "{event}");
            tracks.entry(track).or_default().push(event);
        }
    }
    for spans in tracks.values() {
        let mut open: Vec<f64> = Vec::new();
        for span in spans {
            let (from, ms) = (span["ts"].as_f64().unwrap(), span["dur"].as_f64().unwrap());
            // Half a nanosecond of rounding.
            while open.last().is_some_and(|end| *end <= from + 5e-4) {
                open.pop();
            }
            assert!(open.last().is_none_or(|end| from + ms <= end + 5e-4), "overlap: {span}");
            open.push(from + ms);
        }
    }
    tracks
}

#[tokio::test]
async fn a_trace_shows_requests_batches_and_stages() {
    let server = Server::with(EngineService::start(4.0), ServeOptions::default(), false).await;
    let (trace, asked) = trace_under_load(&server).await;
    let about = &trace["otherData"];
    assert_eq!((&about["dropped_requests"], &about["dropped_batches"]), (&0.into(), &0.into()));
    let events = trace["traceEvents"].as_array().unwrap();
    let tracks = tracks(events);
    let named = |what: &str| -> Vec<(u64, u64, &str)> {
        let names = events.iter().filter(|e| e["name"] == what);
        let of = |e: &'_ Json, key: &str| e[key].as_u64().unwrap();
        names.map(|e| (of(e, "pid"), of(e, "tid"), e["args"]["name"].as_str().unwrap())).collect()
    };
    let processes: Vec<&str> = named("process_name").iter().map(|n| n.2).collect();
    assert_eq!(processes, ["devices", "connections"]);
    let threads = named("thread_name");
    assert_eq!(threads[0].2, "device 0: staged <null> & \"co\"");
    assert_eq!(threads.len(), 4, "one device, three connections: {threads:?}");
    for (pid, tid, _) in threads {
        assert!(tracks.contains_key(&(pid, tid)), "a track without spans");
    }

    let named = |spans: &[&Json], prefix: &str| {
        spans.iter().filter(|s| s["name"].as_str().unwrap().starts_with(prefix)).count()
    };
    let device = &tracks[&(1, 1)];
    let batches = named(device, "batch ");
    assert!(batches > 5 && batches as u64 == about["batches"].as_u64().unwrap());
    for stage in ["gather", "vision", "prefill", "denoise"] {
        assert_eq!(named(device, stage), batches, "{stage} in every batch");
    }
    let mut requests = 0;
    let connections = tracks.iter().filter(|((pid, _), _)| *pid == 2).map(|(_, spans)| spans);
    let (failed, good): (Vec<_>, Vec<_>) = connections.partition(|s| s[0]["cat"] == "error");
    for spans in good {
        let n = named(spans, "request ");
        for part in ["decode", "infer", "prepare", "queue", "in batch", "finish", "encode"] {
            assert_eq!(named(spans, part), n, "{part} in every request");
        }
        requests += n;
    }
    assert!(requests > 5 && requests <= asked, "{requests} of {asked}");
    assert_eq!(failed.len(), 1);
    assert!(failed[0][0]["name"].as_str().unwrap().ends_with(": invalid"), "{}", failed[0][0]);

    let phase = |p: &str| events.iter().filter(|e| e["ph"] == p).collect::<Vec<_>>();
    let (starts, ends) = (phase("s"), phase("f"));
    assert_eq!((starts.len(), ends.len()), (requests, requests), "an arrow per request");
    for (start, end) in starts.iter().zip(&ends) {
        assert_eq!((&start["pid"], &end["pid"]), (&2.into(), &1.into()));
        let inside = device.iter().any(|span| {
            let (from, ms) = (span["ts"].as_f64().unwrap(), span["dur"].as_f64().unwrap());
            let at = end["ts"].as_f64().unwrap();
            span["cat"] == "batch" && (from..=from + ms).contains(&at)
        });
        assert!(inside, "the arrow ends at a batch: {end}");
    }
}

#[tokio::test]
async fn the_time_of_a_trace_is_bounded_and_a_quiet_server_has_an_empty_one() {
    let server = Server::plain(ServeOptions::default()).await;
    for path in ["/trace", "/trace?seconds=0", "/trace?seconds=61", "/trace?seconds=x"] {
        let (status, _, body) = server.get(&get(path)).await;
        assert_eq!(status, "HTTP/1.1 400 Bad Request", "{path}");
        assert!(body.contains("1 to 60"), "{body}");
    }
    let (status, _, body) = server.get(&get("/trace?seconds=1")).await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    let trace: Json = serde_json::from_str(&body).unwrap();
    assert_eq!(trace["traceEvents"], Json::Array(vec![]));
}
