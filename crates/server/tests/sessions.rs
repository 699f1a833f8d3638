//! Recorded sessions of openpi's own client, played back byte for byte.

mod rig;

use std::collections::BTreeSet;

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};
use pirouette_server::{ApiKeys, ServeOptions, msgpack};
use rig::{Frame, Raw, Server, session};
use serde_json::Value as Json;

struct Recording {
    name: &'static str,
    json: Json,
    client: Vec<u8>,
}

impl Recording {
    fn load(name: &'static str) -> Self {
        let json = std::fs::read(session(name).join("session.json")).unwrap();
        let client = std::fs::read(session(name).join("client_to_server.bin")).unwrap();
        Recording { name, json: serde_json::from_slice(&json).unwrap(), client }
    }

    fn lines(&self, key: &str) -> Vec<String> {
        let lines = self.json[key].as_array().unwrap().iter();
        lines.map(|l| l.as_str().unwrap().to_owned()).filter(|l| !l.is_empty()).collect()
    }

    /// Recorded server frames: opcode name, payload if it was kept, and the JSON.
    fn frames(&self) -> &Vec<Json> {
        self.json["server_frames"].as_array().unwrap()
    }

    fn payload(&self, frame: &Json) -> Vec<u8> {
        std::fs::read(session(self.name).join(frame["payload_file"].as_str().unwrap())).unwrap()
    }

    fn metadata(&self) -> Value {
        let bytes = Bytes::from(self.payload(&self.frames()[0]));
        msgpack::decode(&bytes).unwrap()
    }

    /// Plays the client's bytes in the recorded chunks, waiting where it waited. Returns the
    /// server's head and frames.
    async fn play(&self, server: &Server) -> (String, Vec<Frame>) {
        let mut raw = Raw(server.tcp().await);
        let (mut sent, mut received) = (0, 0);
        let (mut head, mut frames) = (String::new(), Vec::new());
        for event in self.json["events_in_order"].as_array().unwrap() {
            let n = event["bytes"].as_u64().unwrap_or(0) as usize;
            if event["dir"] == "client->server" {
                raw.write(&self.client[sent..sent + n]).await;
                sent += n;
                continue;
            }
            received += n;
            if head.is_empty() {
                head = raw.head().await;
            }
            let ends = |f: &Json| {
                let number = |key: &str| f[key].as_u64().unwrap() as usize;
                number("offset") + number("header_bytes") + number("payload_len")
            };
            let due = self.frames().iter().filter(|f| ends(f) <= received).count();
            while frames.len() < due {
                frames.push(raw.frame().await);
            }
        }
        assert_eq!(sent, self.client.len());
        raw.closed().await;
        (head, frames)
    }
}

/// Header lines that can be compared: all but the date, the software's name, our title case.
fn comparable(lines: impl IntoIterator<Item = String>) -> BTreeSet<String> {
    let normal = |line: String| {
        let (name, value) = line.split_once(": ")?;
        let name = name.to_lowercase();
        let value = if name == "connection" || name == "upgrade" {
            value.to_lowercase()
        } else {
            value.to_owned()
        };
        (name != "date" && name != "server").then(|| format!("{name}: {value}"))
    };
    lines.into_iter().filter_map(normal).collect()
}

/// Keys, nesting and array types of an answer, without its numbers.
fn outline(value: &Value) -> String {
    match value {
        Value::Map(map) => {
            let parts: Vec<String> =
                map.iter().map(|(k, v)| format!("{k}={}", outline(v))).collect();
            format!("{{{}}}", parts.join(" "))
        }
        Value::Array(NdArray { dtype, shape, .. }) => format!("{dtype:?}{shape:?}"),
        Value::Float(_) => "float".into(),
        other => format!("{other:?}"),
    }
}

async fn replay(name: &'static str, options: ServeOptions) {
    let recording = Recording::load(name);
    let server = Server::start(recording.metadata(), true, options).await;
    let (head, frames) = recording.play(&server).await;
    let recorded = recording.lines("server_http");
    assert_eq!(head.lines().next().unwrap(), recorded[0], "{name}");
    let ours = comparable(head.lines().skip(1).map(str::to_owned));
    assert_eq!(ours, comparable(recorded.into_iter().skip(1)), "{name}: response headers");
    assert_eq!(frames.len(), recording.frames().len(), "{name}: {frames:?}");
    for (i, (got, want)) in frames.iter().zip(recording.frames()).enumerate() {
        match want["opcode"].as_str().unwrap() {
            "binary" if i == 0 => {
                assert_eq!((got.opcode, &got.payload), (2, &recording.payload(want)), "{name}");
            }
            "binary" => {
                let recorded = msgpack::decode(&recording.payload(want).into()).unwrap();
                let ours = Value::Map(got.map());
                assert_eq!(outline(&ours), outline(&recorded), "{name} frame {i}");
                assert_eq!(got.payload.len(), want["payload_len"], "{name} frame {i}");
            }
            "text" => {
                let want = String::from_utf8(recording.payload(want)).unwrap();
                let text = got.text();
                assert!(text.starts_with("Traceback (most recent call last):\n"), "{text}");
                assert_eq!(text.lines().last(), want.lines().last(), "{name}");
                assert!(text.ends_with('\n') && !text.contains('/'), "no paths: {text}");
            }
            "pong" => {
                assert_eq!(got.opcode, 10, "{name}");
                let hex: String = got.payload.iter().map(|b| format!("{b:02x}")).collect();
                assert_eq!(hex, want["payload_hex"].as_str().unwrap(), "{name}");
            }
            "close" => {
                let code = want["close_code"].as_u64().unwrap() as u16;
                assert_eq!(got.close(), (code, want["close_reason"].as_str().unwrap()), "{name}");
            }
            other => panic!("{name}: {other}"),
        }
    }
}

#[tokio::test]
async fn inferences_and_metadata() {
    replay("good_three_inferences", ServeOptions::default()).await;
    replay("empty_metadata", ServeOptions::default()).await;
}

#[tokio::test]
async fn exceptions() {
    replay("failing_missing_key", ServeOptions::default()).await;
    replay("failing_value_error", ServeOptions::default()).await;
    replay("garbage_msgpack", ServeOptions::default()).await;
    replay("text_request", ServeOptions::default()).await;
}

#[tokio::test]
async fn fragments_pings_and_long_frames() {
    replay("fragmented_and_ping", ServeOptions::default()).await;
    replay("api_key_big_frame", ServeOptions::default()).await;
}

#[tokio::test]
async fn the_recorded_key_header_is_understood() {
    // The recorded key is too short for a key file, so the header is checked with a longer one.
    let keys = ApiKeys::parse("secret-key-of-a-robot").unwrap();
    let options = ServeOptions { api_keys: Some(keys), ..ServeOptions::default() };
    let server = Server::plain(options).await;
    let upgrade = |key: &str| {
        let http = Recording::load("api_key_big_frame").lines("client_http").join("\r\n");
        http.replace("secret-key", key) + "\r\n\r\n"
    };
    let mut good = Raw(server.tcp().await);
    good.write(upgrade("secret-key-of-a-robot").as_bytes()).await;
    assert!(good.head().await.starts_with("HTTP/1.1 101 "));
    assert_eq!(good.frame().await, Frame { opcode: 2, payload: vec![0x80] });
    let (status, headers, _) = server.get(&upgrade("secret-key-of-a-thief")).await;
    assert_eq!(status, "HTTP/1.1 401 Unauthorized");
    assert!(headers.iter().any(|h| h.eq_ignore_ascii_case("www-authenticate: api-key, bearer")));
}

#[tokio::test]
async fn plain_http() {
    let server = Server::plain(ServeOptions::default()).await;
    for name in ["healthz", "plain_http_other_path"] {
        let recording = Recording::load(name);
        let request = String::from_utf8(recording.client.clone()).unwrap();
        let (status, headers, body) = server.get(&request).await;
        let recorded = recording.lines("server_http");
        assert_eq!(status, recorded[0], "{name}");
        assert_eq!(comparable(headers), comparable(recorded.into_iter().skip(1)), "{name}");
        assert_eq!(body, recording.json["server_http_body"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn the_recorded_answers_are_float64() {
    let recording = Recording::load("good_three_inferences");
    let bytes = Bytes::from(recording.payload(&recording.frames()[1]));
    let Value::Map(map) = msgpack::decode(&bytes).unwrap() else { panic!() };
    assert!(matches!(&map[0].1, Value::Array(a) if a.dtype == Scalar::F64));
    assert_eq!(msgpack::encode(&Value::Map(map)).unwrap(), bytes);
}
