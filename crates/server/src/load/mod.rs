//! The other side of the wire: many clients, measured. Speaks openpi's dialect.

mod observe;
mod report;
pub mod socket;

use std::time::Duration;

use bytes::Bytes;
use pirouette_engine::draw_seed;
use pirouette_policy::{NdArray, Scalar, Value};
use tokio::time::{Instant, sleep_until, timeout};

use self::report::{Outcome, Seen, report};
use self::socket::{Address, Received, Socket, frame};
use crate::msgpack;

pub use self::observe::observation_of;
pub use self::report::{LoadReport, Percentiles};

/// How long a server may take to tell its contract.
const CONTRACT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a server may take to close a connection after an exception's text.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What to send, and how hard.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// `ws://host:port`.
    pub url: String,
    /// Sent as `Authorization: Api-Key …`.
    pub api_key: Option<String>,
    /// Connections, each with at most one request in flight, as a robot has.
    pub clients: usize,
    /// Requests per client that are measured, at most.
    pub requests: usize,
    /// No request is begun after this long.
    pub duration: Option<Duration>,
    /// Requests per client before that, not counted.
    pub warm_up: usize,
    /// Requests per second of all clients together, at fixed times, latencies counted from the
    /// time a request was due; `None`: each client sends as soon as it has its answer.
    pub rate: Option<f64>,
    /// Sent along as `deadline_ms`; later answers do not count as good.
    pub deadline: Option<Duration>,
    /// The observation every request carries, a map.
    pub observation: Value,
    /// An answer, or a connection, that takes longer is an error.
    pub timeout: Duration,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The address is no websocket address.
    #[error("`{url}` is no websocket address: {error}")]
    Url {
        /// What was given.
        url: String,
        /// Why.
        error: &'static str,
    },
    /// The observation can't be sent.
    #[error("the observation must be a map that msgpack can hold")]
    Observation,
    /// Nothing is there, or nothing that speaks HTTP.
    #[error("nothing answers at {url}: {error}; start a server there, or give the address of one")]
    Unreachable {
        /// What was given.
        url: String,
        /// Why.
        error: String,
    },
    /// The server does not tell what it takes.
    #[error("the server's /contract: {0}")]
    Contract(String),
    /// A client's task ended without telling what it saw.
    #[error("a client ended early: {0}")]
    Client(String),
    /// No client got through.
    #[error("no request was answered; first error: {error}")]
    Nothing {
        /// The first reason.
        error: String,
        /// What was counted all the same.
        report: Box<LoadReport>,
    },
}

/// Asks a server for its contract card, JSON text.
///
/// # Errors
/// [`LoadError::Unreachable`] when there is no such server, [`LoadError::Contract`] when it is one
/// without a contract (openpi's own).
pub async fn contract(url: &str, api_key: Option<&str>) -> Result<String, LoadError> {
    let address =
        Address::parse(url).map_err(|error| LoadError::Url { url: url.to_owned(), error })?;
    let asked = timeout(CONTRACT_TIMEOUT, socket::get(&address, "/contract", api_key)).await;
    let unreachable = |error| LoadError::Unreachable { url: url.to_owned(), error };
    match asked {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err(LoadError::Contract(error.to_string()))
        }
        Ok(Err(error)) => Err(unreachable(error.to_string())),
        Err(_) => Err(unreachable(format!("no answer within {CONTRACT_TIMEOUT:?}"))),
    }
}

/// An observation like DROID's: cameras of side × side RGB, a state, a prompt.
pub fn sample_observation(cameras: usize, side: usize) -> Value {
    let image = |camera: usize| {
        let pixels = (0..side * side * 3).map(|i| (i * 31 + camera * 97) as u8);
        let shape = vec![side, side, 3];
        Value::Array(NdArray { dtype: Scalar::U8, shape, data: pixels.collect::<Vec<_>>().into() })
    };
    let state: Vec<u8> = (0..8).flat_map(|i| (i as f32 / 8.0).to_le_bytes()).collect();
    let state = NdArray { dtype: Scalar::F32, shape: vec![8], data: state.into() };
    let mut map: Vec<(String, Value)> =
        (0..cameras).map(|c| (format!("observation/image_{c}"), image(c))).collect();
    map.push(("observation/state".into(), Value::Array(state)));
    map.push(("prompt".into(), Value::Str("pick up the red cup".into())));
    Value::Map(map)
}

/// Runs all clients and adds up what they saw.
///
/// # Errors
/// When not a single request was answered.
pub async fn run(options: &LoadOptions) -> Result<LoadReport, LoadError> {
    let address = Address::parse(&options.url)
        .map_err(|error| LoadError::Url { url: options.url.clone(), error })?;
    let mut observation = options.observation.clone();
    let Value::Map(map) = &mut observation else { return Err(LoadError::Observation) };
    if let Some(deadline) = options.deadline {
        map.push(("deadline_ms".into(), Value::Float(deadline.as_secs_f64() * 1e3)));
    }
    let payload = msgpack::encode(&observation).map_err(|_| LoadError::Observation)?;
    let request = frame(2, &payload, (draw_seed() as u32).to_be_bytes());
    let began = std::sync::Arc::new(tokio::sync::OnceCell::new());
    let barrier = std::sync::Arc::new(tokio::sync::Barrier::new(options.clients.max(1)));
    let mut clients = tokio::task::JoinSet::new();
    for index in 0..options.clients.max(1) {
        let (options, address, request) = (options.clone(), address.clone(), request.clone());
        let (barrier, began) = (barrier.clone(), began.clone());
        clients.spawn(async move {
            let mut client =
                Client { socket: None, refused: false, options: &options, address, request };
            for _ in 0..options.warm_up {
                client.ask(Instant::now()).await;
            }
            barrier.wait().await;
            let start = *began.get_or_init(async || Instant::now()).await;
            let seen = measured(&mut client, start, index).await;
            client.goodbye().await;
            seen
        });
    }
    let mut all =
        Seen { outcomes: vec![], unsent: 0, sending: Duration::ZERO, took: Duration::ZERO };
    while let Some(client) = clients.join_next().await {
        let seen = client.map_err(|e| LoadError::Client(e.to_string()))?;
        all.outcomes.extend(seen.outcomes);
        all.unsent += seen.unsent;
        all.sending = all.sending.max(seen.sending);
        all.took = all.took.max(seen.took);
    }
    report(all, options)
}

/// The requests of one client that count.
async fn measured(client: &mut Client<'_>, start: Instant, index: usize) -> Seen {
    let options = client.options;
    let due = |i: usize, rate: f64| {
        let place = (i * options.clients.max(1) + index) as f64;
        start + Duration::from_secs_f64(place / rate.max(1e-6))
    };
    let end = options.duration.map(|d| start + d);
    let over = |at: Instant| end.is_some_and(|end| at >= end);
    let (mut outcomes, mut sending) = (Vec::new(), Duration::ZERO);
    for i in 0..options.requests {
        let now = Instant::now();
        let begins = options.rate.map_or(now, |rate| due(i, rate));
        if over(begins) || over(now) {
            break;
        }
        if options.rate.is_some() {
            sleep_until(begins).await;
        }
        sending = start.elapsed();
        outcomes.push(client.ask(begins).await);
    }
    let took = start.elapsed();
    let unsent = options.rate.filter(|_| end.is_some()).map_or(0, |rate| {
        (outcomes.len()..options.requests).take_while(|&i| !over(due(i, rate))).count() as u64
    });
    Seen { outcomes, unsent, sending, took }
}

struct Client<'a> {
    socket: Option<Socket>,
    /// Its last answer was an error's text, after which a server may close it.
    refused: bool,
    options: &'a LoadOptions,
    address: Address,
    request: Bytes,
}

impl Client<'_> {
    /// One request; a broken connection is reopened at the next one.
    async fn ask(&mut self, due: Instant) -> Outcome {
        let (limit, sent) = (self.options.timeout, Instant::now());
        match timeout(limit, self.exchange()).await {
            Ok(Ok(Received::Answer(bytes))) => {
                let [latency_ms, exchange_ms] =
                    [due, sent].map(|from| from.elapsed().as_secs_f64() * 1e3);
                match timings(&bytes) {
                    Some((server_ms, model_ms)) => {
                        Outcome::Answer { latency_ms, exchange_ms, server_ms, model_ms }
                    }
                    None => Outcome::Broken("the answer is not openpi's".into()),
                }
            }
            Ok(Ok(Received::Refusal(text))) => {
                let latency_ms = due.elapsed().as_secs_f64() * 1e3;
                self.leave(&text).await;
                Outcome::Refusal { latency_ms, text }
            }
            Ok(Err(error)) => self.broken(error.to_string()),
            Err(_) => self.broken(format!("no answer within {limit:?}")),
        }
    }

    fn broken(&mut self, why: String) -> Outcome {
        self.socket = None;
        Outcome::Broken(why)
    }

    /// After an exception's text the server closes the connection. The close is read here: at the
    /// next request it would be taken for that one's fate, and the reason would be lost.
    async fn leave(&mut self, text: &str) {
        let last = text.lines().last().unwrap_or_default();
        // Refusals of this server leave it open.
        let open = ["RuntimeError:", "TimeoutError:"].iter().any(|kind| last.starts_with(kind));
        self.refused = open;
        if !open && let Some(mut socket) = self.socket.take() {
            // Whatever comes, or nothing: this connection is over.
            let _ = timeout(CLOSE_TIMEOUT, socket.receive()).await;
        }
    }

    /// One exchange. openpi's own server closes after every error's text, and that close is no
    /// answer to the request that finds it: it is asked again on a new connection.
    async fn exchange(&mut self) -> std::io::Result<Received> {
        let refused = std::mem::take(&mut self.refused);
        match self.exchange_once().await {
            Err(_) if refused => {
                self.socket = None;
                self.exchange_once().await
            }
            other => other,
        }
    }

    async fn exchange_once(&mut self) -> std::io::Result<Received> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            None => {
                let key = self.options.api_key.as_deref();
                let mut socket = Socket::connect(&self.address, key).await?;
                match socket.receive().await? {
                    Received::Answer(_metadata) => self.socket.insert(socket),
                    refusal => return Ok(refusal),
                }
            }
        };
        socket.send(&self.request).await?;
        socket.receive().await
    }

    async fn goodbye(mut self) {
        if let Some(socket) = &mut self.socket {
            let close = frame(8, &1000u16.to_be_bytes(), [0; 4]);
            // The measurement is over; a server that is gone does not change it.
            let _ = timeout(Duration::from_secs(1), socket.send(&close)).await;
        }
    }
}

/// The two `infer_ms` of an answer in milliseconds: the server's and the model's. `None` if it is
/// no answer of openpi's dialect.
pub fn timings(answer: &Bytes) -> Option<(f64, f64)> {
    let Value::Map(map) = msgpack::decode(answer).ok()? else { return None };
    let get = |map: &[(String, Value)], key: &str| {
        map.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())
    };
    let infer_ms = |key: &str| match get(&map, key)? {
        Value::Map(timing) => match get(&timing, "infer_ms")? {
            Value::Float(ms) => Some(ms),
            _ => None,
        },
        _ => None,
    };
    Some((infer_ms("server_timing")?, infer_ms("policy_timing")?))
}
