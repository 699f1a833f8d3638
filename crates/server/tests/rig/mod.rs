//! A scripted service, a running server, and a client that speaks raw bytes.
#![allow(dead_code)] // each test file uses its part

pub mod arm;
pub mod engine;
pub mod secure;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};
use pirouette_server::{
    Doors, Method, Page, PageRequest, Reply, RequestContext, ServeOptions, Served, Service,
    ServiceError, ServiceFuture, msgpack, serve_doors,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

pub const PATIENCE: Duration = Duration::from_secs(5);

/// Behaves like the fake policy of the recordings, and some more:
/// no `state` → KeyError; prompt `boom` → ValueError; prompt `busy` → refused; `sleep_ms` waits.
pub struct Script {
    pub metadata: Value,
    pub warm: watch::Receiver<bool>,
    pub running: AtomicUsize,
    pub withdrawn: AtomicUsize,
    pub ready: Result<(), String>,
    pub note: Mutex<Bytes>,
}

/// Counts an inference as withdrawn unless it ends.
struct Withdrawal<'a>(&'a Script, bool);

impl Drop for Withdrawal<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, SeqCst);
        self.0.withdrawn.fetch_add(!self.1 as usize, SeqCst);
    }
}

impl Service for Script {
    fn warm(&self) -> ServiceFuture<'_, ()> {
        let mut warm = self.warm.clone();
        Box::pin(async move {
            let _ = warm.wait_for(|w| *w).await;
        })
    }

    fn metadata(&self) -> Value {
        self.metadata.clone()
    }

    fn infer(
        &self,
        observation: Value,
        context: RequestContext,
    ) -> ServiceFuture<'_, Result<Reply, ServiceError>> {
        Box::pin(async move {
            self.running.fetch_add(1, SeqCst);
            let mut guard = Withdrawal(self, false);
            let Value::Map(map) = observation else { panic!("the server promised a map") };
            let get = |key: &str| map.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone());
            let note = String::from_utf8_lossy(&self.note.lock().unwrap()).into_owned();
            let identity = context.identify.then(|| serde_json::json!({ "note": note }));
            if let Some(Value::Int(ms)) = get("sleep_ms") {
                tokio::time::sleep(Duration::from_millis(ms as u64)).await;
            }
            guard.1 = true;
            match get("prompt") {
                Some(Value::Str(s)) if s == "boom" => {
                    let text = format!("bad prompt: {s} — é");
                    return Err(ServiceError::exception("ValueError", text));
                }
                Some(Value::Str(s)) if s == "busy" => {
                    return Err(ServiceError::refusal("overloaded", "the queue is full"));
                }
                Some(Value::Str(s)) if s == "die" => panic!("a bug in the service"),
                _ => {}
            }
            let Some(state) = get("state") else {
                return Err(ServiceError::exception("KeyError", "'state'"));
            };
            let first = match state {
                Value::Array(a) if a.dtype == Scalar::F32 && a.data.len() >= 4 => {
                    f32::from_le_bytes([a.data[0], a.data[1], a.data[2], a.data[3]]) as f64
                }
                Value::Float(v) => v,
                _ => 0.0,
            };
            let rows = match get("rows") {
                Some(Value::Int(n)) => n as usize,
                _ => 10,
            };
            let data: Vec<u8> =
                (0..rows * 7).flat_map(|i| (first + i as f64).to_le_bytes()).collect();
            let actions = NdArray { dtype: Scalar::F64, shape: vec![rows, 7], data: data.into() };
            let extras = context.seed.map(|s| ("seed".to_string(), Value::Int(s.into())));
            let extras = extras.into_iter().collect();
            Ok(Reply { actions, model_ms: 1.25, timing: None, extras, identity })
        })
    }

    fn readiness(&self) -> ServiceFuture<'_, Result<(), String>> {
        Box::pin(async { self.ready.clone() })
    }

    fn contract(&self) -> String {
        r#"{"config":"script"}"#.into()
    }

    /// `/note` keeps what is posted to it.
    fn page(&self, request: PageRequest) -> ServiceFuture<'_, Option<Page>> {
        Box::pin(async move {
            let mut note = self.note.lock().unwrap();
            match (request.method, request.path.as_str()) {
                (Method::Get, "/note") => Some(Page::text(200, note.clone())),
                (Method::Post, "/note") => {
                    *note = request.body.clone();
                    let tag = request.parameter("tag").unwrap_or("none").to_owned();
                    Some(Page::json(202, format!(r#"{{"tag":"{tag}"}}"#)))
                }
                _ => None,
            }
        })
    }
}

/// A server on a port of its own.
pub struct Server<S = Script> {
    pub address: SocketAddr,
    pub admin_address: SocketAddr,
    pub lerobot_address: SocketAddr,
    pub script: Arc<S>,
    pub warm: watch::Sender<bool>,
    shutdown: Option<oneshot::Sender<()>>,
    pub task: JoinHandle<Served>,
}

impl Server {
    pub async fn start(metadata: Value, warm: bool, options: ServeOptions) -> Server {
        Server::with_doors(metadata, warm, options, false).await
    }

    /// With an admin listener.
    pub async fn with_admin(options: ServeOptions) -> Server {
        Server::with_doors(Value::Map(vec![]), true, options, true).await
    }

    async fn with_doors(metadata: Value, warm: bool, options: ServeOptions, admin: bool) -> Server {
        let (sender, receiver) = watch::channel(warm);
        let script = Arc::new(Script {
            metadata,
            warm: receiver,
            running: AtomicUsize::new(0),
            withdrawn: AtomicUsize::new(0),
            ready: Ok(()),
            note: Mutex::default(),
        });
        let server = Server::with(script, options, admin).await;
        Server { warm: sender, ..server }
    }

    /// Warm, without metadata.
    pub async fn plain(options: ServeOptions) -> Server {
        Server::start(Value::Map(vec![]), true, options).await
    }
}

impl<S: Service> Server<S> {
    /// Any service.
    pub async fn with(script: Arc<S>, options: ServeOptions, admin: bool) -> Server<S> {
        let bind = || pirouette_server::bind("127.0.0.1:0".parse().unwrap());
        let (listener, admin_listener) = (bind().await.unwrap(), bind().await.unwrap());
        let lerobot = bind().await.unwrap();
        let lerobot_address = axum::serve::Listener::local_addr(&lerobot).unwrap();
        let address = axum::serve::Listener::local_addr(&listener).unwrap();
        let admin_address = axum::serve::Listener::local_addr(&admin_listener).unwrap();
        let admin = admin.then_some(admin_listener);
        let doors = Doors { public: listener, admin, lerobot: Some(lerobot) };
        let (shutdown, stop) = oneshot::channel();
        let service: Arc<dyn Service> = script.clone();
        let task = tokio::spawn(serve_doors(doors, service, options, async move {
            let _ = stop.await;
        }));
        let warm = watch::channel(true).0;
        Server {
            address,
            admin_address,
            lerobot_address,
            script,
            warm,
            shutdown: Some(shutdown),
            task,
        }
    }

    pub fn shut_down(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
    }

    pub async fn tcp(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A websocket after the handshake; the metadata is still to come.
    pub async fn websocket(&self) -> Raw {
        let mut raw = Raw(self.tcp().await);
        raw.upgrade("").await;
        raw
    }

    /// A websocket that has its metadata.
    pub async fn client(&self) -> Raw {
        let mut raw = self.websocket().await;
        assert_eq!(raw.frame().await.opcode, 2);
        raw
    }

    /// A plain GET: status line, header lines, body.
    pub async fn get(&self, request: &str) -> (String, Vec<String>, String) {
        self.plain_http(self.address, request).await
    }

    /// The same through the admin listener.
    pub async fn admin(&self, request: &str) -> (String, Vec<String>, String) {
        self.plain_http(self.admin_address, request).await
    }

    async fn plain_http(
        &self,
        address: SocketAddr,
        request: &str,
    ) -> (String, Vec<String>, String) {
        let mut raw = Raw(TcpStream::connect(address).await.unwrap());
        raw.write(request.as_bytes()).await;
        raw.response().await
    }
}

/// One frame from the server.
#[derive(Debug, PartialEq)]
pub struct Frame {
    pub opcode: u8,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn close(&self) -> (u16, &str) {
        assert_eq!(self.opcode, 8, "{self:?}");
        let code = u16::from_be_bytes([self.payload[0], self.payload[1]]);
        (code, std::str::from_utf8(&self.payload[2..]).unwrap())
    }

    pub fn text(&self) -> &str {
        assert_eq!(self.opcode, 1, "{self:?}");
        std::str::from_utf8(&self.payload).unwrap()
    }

    pub fn map(&self) -> Vec<(String, Value)> {
        assert_eq!(self.opcode, 2, "{}", String::from_utf8_lossy(&self.payload));
        match msgpack::decode(&Bytes::from(self.payload.clone())).unwrap() {
            Value::Map(map) => map,
            other => panic!("{other:?}"),
        }
    }
}

/// A client without a library in between.
pub struct Raw<S = TcpStream>(pub S);

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    pub async fn write(&mut self, bytes: &[u8]) {
        timeout(PATIENCE, self.0.write_all(bytes)).await.expect("write").unwrap();
    }

    pub async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(PATIENCE, self.0.read_u8()).await.expect("head").unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    /// The websocket's handshake, with further header lines.
    pub async fn upgrade(&mut self, headers: &str) {
        self.write(upgrade_request(headers).as_bytes()).await;
        let head = self.head().await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    }

    pub async fn response(&mut self) -> (String, Vec<String>, String) {
        let head = self.head().await;
        let mut lines = head.lines().map(str::to_owned);
        let status = lines.next().unwrap();
        let headers: Vec<String> = lines.filter(|l| !l.is_empty()).collect();
        let mut body = String::new();
        timeout(PATIENCE, self.0.read_to_string(&mut body)).await.expect("closed").unwrap();
        (status, headers, body)
    }

    pub async fn frame(&mut self) -> Frame {
        timeout(PATIENCE, self.try_frame()).await.expect("a frame in time").unwrap()
    }

    pub async fn try_frame(&mut self) -> std::io::Result<Frame> {
        let mut head = [0; 2];
        self.0.read_exact(&mut head).await?;
        assert_eq!(head[0] & 0xf0, 0x80, "final, nothing reserved");
        assert_eq!(head[1] & 0x80, 0, "servers do not mask");
        let n = match head[1] {
            126 => self.0.read_u16().await? as usize,
            127 => self.0.read_u64().await? as usize,
            n => n as usize,
        };
        let mut payload = vec![0; n];
        self.0.read_exact(&mut payload).await?;
        Ok(Frame { opcode: head[0] & 0x0f, payload })
    }

    pub async fn send(&mut self, opcode: u8, payload: &[u8]) {
        self.write(&masked(opcode, payload)).await;
    }

    pub async fn ask(&mut self, map: &[(&str, Value)]) {
        let map = map.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
        self.send(2, &msgpack::encode(&Value::Map(map)).unwrap()).await;
    }

    pub async fn closed(&mut self) {
        let end = timeout(PATIENCE, self.0.read_u8()).await.expect("the connection ends");
        assert!(end.is_err(), "nothing more is sent");
    }
}

/// What asks for a websocket.
pub fn upgrade_request(headers: &str) -> String {
    format!(
        "GET /any/path?x=1 HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Version: 13\r\n{headers}\r\n"
    )
}

/// A client frame.
pub fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x12, 0x34, 0x56, 0x78];
    let mut out = vec![0x80 | opcode];
    match payload.len() {
        n @ 0..126 => out.push(0x80 | n as u8),
        n @ 126..65536 => {
            out.push(0x80 | 126);
            out.extend((n as u16).to_be_bytes());
        }
        n => {
            out.push(0x80 | 127);
            out.extend((n as u64).to_be_bytes());
        }
    }
    out.extend(mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
    out
}

pub fn state(value: f64) -> (&'static str, Value) {
    ("state", Value::Float(value))
}

pub fn text(value: &str) -> Value {
    Value::Str(value.into())
}

pub fn number(map: &[(String, Value)], outer: &str, inner: &str) -> Option<f64> {
    let Value::Map(map) = &map.iter().find(|(k, _)| k == outer)?.1 else { return None };
    match map.iter().find(|(k, _)| k == inner)?.1 {
        Value::Float(v) => Some(v),
        _ => None,
    }
}

pub fn first_action(map: &[(String, Value)]) -> f64 {
    let Value::Array(a) = &map[0].1 else { panic!("{map:?}") };
    assert_eq!((map[0].0.as_str(), a.dtype), ("actions", Scalar::F64));
    f64::from_le_bytes(a.data[..8].try_into().unwrap())
}

pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub fn session(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/E_wire/sessions").join(name)
}
