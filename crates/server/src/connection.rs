//! One websocket: metadata once warm, then request → answer, in order, until somebody closes.
//!
//! One task per connection. While it waits for the service it keeps reading, so that pings are
//! answered, closing clients are noticed, and their work is withdrawn. Requests are decoded as
//! they arrive: a newer one may make those before it pointless.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use pirouette_policy::Value;
use tokio::sync::watch;
use tokio::time::{timeout, timeout_at};
use tokio_tungstenite::tungstenite;

use crate::dialect::openpi::{self, Asked};
use crate::dialect::{self, Dialect, Frame, vla_eval};
use crate::msgpack;
use crate::newest::Session;
use crate::quota::Pass;
use crate::recent::RequestRecord;
use crate::serve::Shared;
use crate::service::{Failure, Reply, ServiceError};

/// openpi's own reason, byte for byte.
const ERROR_REASON: &str = "Internal server error. Traceback included in previous frame.";

/// How long a closing handshake may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection with unread data stays open after a close frame.
const LINGER: Duration = Duration::from_millis(250);

const GOING_AWAY: u16 = 1001;
const POLICY: u16 = 1008;
const TOO_BIG: u16 = 1009;
const INTERNAL_ERROR: u16 = 1011;

/// A request as it was read.
enum Request {
    Openpi(Result<openpi::Request, ServiceError>),
    VlaEval(Result<vla_eval::Envelope, ServiceError>),
}

/// A request in the order of its arrival.
struct Incoming {
    request: Request,
    received: Instant,
    decode_ms: f64,
    /// The message as it came; arrays of the request lie in the same bytes.
    message: Bytes,
}

/// A request on its way to its answer: what is remembered of it, and recorded.
struct Exchange {
    record: RequestRecord,
    outcome: &'static str,
    reply: Bytes,
}

impl Exchange {
    /// The service has answered. `seed`: the one that was asked for.
    fn inferred(&mut self, reply: &Reply, seed: Option<u64>) {
        self.record.inferred = Some(Instant::now());
        self.record.timing = reply.timing;
        self.record.seed = seed.or(reply.seed());
    }
}

/// Counts a request as being answered until it is dropped, however that ends.
struct Running(Arc<Shared>);

impl Running {
    fn begin(shared: Arc<Shared>) -> Self {
        shared.metrics.running.fetch_add(1, Relaxed);
        Running(shared)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.metrics.running.fetch_sub(1, Relaxed);
    }
}

/// Why a connection ends.
enum End {
    /// The peer closed, or the transport broke: nothing more can be said.
    Gone,
    /// We close, with a code and a reason.
    Close(u16, &'static str),
}

struct Connection {
    socket: WebSocket,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    /// Never [`Dialect::Auto`] once the client has been greeted or has spoken.
    dialect: Dialect,
    /// This connection's number, which is its session where requests name none.
    number: u64,
    /// vla-eval: actions of the last inference that are still to be handed out.
    chunk: vla_eval::Chunk,
    /// Read ahead, bounded.
    inbox: VecDeque<Incoming>,
    last_heard: Instant,
    last_request: Instant,
    pinged: Option<Instant>,
    /// Of the key it came with.
    pass: Option<Pass>,
    /// Messages answered so far, this one included.
    messages: u64,
}

/// Runs a connection to its end.
pub(crate) async fn run(
    socket: WebSocket,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    dialect: Dialect,
    pass: Option<Pass>,
) {
    let number = shared.metrics.opened.fetch_add(1, Relaxed) + 1;
    let now = Instant::now();
    let mut connection = Connection {
        socket,
        shared,
        draining,
        dialect,
        number,
        chunk: vla_eval::Chunk::default(),
        inbox: VecDeque::new(),
        last_heard: now,
        last_request: now,
        pinged: None,
        pass,
        messages: 0,
    };
    if let Err(End::Close(code, reason)) = connection.converse().await {
        connection.close(code, reason).await;
    }
}

impl Connection {
    /// Never returns `Ok`: a conversation ends with an [`End`].
    async fn converse(&mut self) -> Result<(), End> {
        let service = self.shared.service.clone();
        self.while_listening(service.warm()).await?;
        self.greet().await?;
        let mut previous_ms = None;
        loop {
            let began = Instant::now();
            let incoming = self.next_request().await?;
            self.last_request = incoming.received;
            self.messages += 1;
            let Incoming { request, received, decode_ms, message } = incoming;
            // What waited behind an earlier request was decoded meanwhile.
            let waited = received < began;
            let turn = if waited { Instant::now() } else { received };
            let mut record = RequestRecord::begin(self.number, message.len(), received, turn);
            let decoding = if waited { 0.0 } else { decode_ms };
            record.decoded = Some(turn + Duration::from_secs_f64(decoding / 1e3));
            let mut exchange = Exchange { record, outcome: "", reply: Bytes::new() };
            let running = Running::begin(self.shared.clone());
            let ended = match request {
                Request::Openpi(request) => self.answer(request, &mut exchange, previous_ms).await,
                Request::VlaEval(envelope) => self.act(envelope, &mut exchange, decode_ms).await,
            };
            if !exchange.outcome.is_empty() {
                let Exchange { record, outcome, reply } = exchange;
                self.shared.finished(record, outcome, message, reply);
            }
            drop(running);
            ended?;
            previous_ms = Some(ms(began));
        }
    }

    /// Sends the metadata, unless the client is one that speaks first.
    async fn greet(&mut self) -> Result<(), End> {
        if self.dialect == Dialect::Auto {
            let until = tokio::time::Instant::now() + self.shared.options.hello_wait;
            while self.inbox.is_empty() {
                let Ok(heard) = timeout_at(until, self.listen()).await else { break };
                heard?;
            }
        }
        let service = &self.shared.service;
        let metadata = match self.dialect {
            Dialect::VlaEval => return Ok(()),
            Dialect::Openpi => service.metadata(),
            _ => service.roboarena().unwrap_or_else(|| service.metadata()),
        };
        if self.dialect == Dialect::Auto {
            self.dialect = Dialect::Roboarena;
        }
        let metadata = msgpack::encode(&metadata).map_err(|error| {
            tracing::error!(%error, "the metadata can't be encoded");
            End::Close(INTERNAL_ERROR, ERROR_REASON)
        })?;
        self.send(Message::Binary(metadata.into())).await
    }

    async fn next_request(&mut self) -> Result<Incoming, End> {
        loop {
            if let Some(next) = self.inbox.pop_front() {
                return Ok(next);
            }
            if *self.draining.borrow() {
                return Err(End::Close(GOING_AWAY, "server is shutting down"));
            }
            self.listen().await?;
        }
    }

    /// Decodes a message and gives it its place among the requests of its session.
    fn read(&mut self, frame: Frame, received: Instant) -> Incoming {
        let decoding = Instant::now();
        let options = &self.shared.options;
        let message = frame.bytes();
        let map = dialect::decode(frame, &options.limits);
        if self.dialect == Dialect::Auto {
            let hello = map.as_ref().is_ok_and(|map| vla_eval::is_hello(map));
            self.dialect = if hello { Dialect::VlaEval } else { Dialect::Roboarena };
        }
        if self.dialect == Dialect::VlaEval {
            let request = Request::VlaEval(map.and_then(vla_eval::read));
            return Incoming { request, received, decode_ms: ms(decoding), message };
        }
        let endpoints = self.dialect != Dialect::Openpi;
        let most = options.max_batch_observations;
        let mut request = map.and_then(|map| openpi::read(map, received, most, endpoints));
        let decode_ms = ms(decoding);
        let mut contexts = request.iter_mut().flat_map(openpi::Request::contexts).peekable();
        let ticket = contexts.peek().filter(|first| first.newest_wins).map(|first| {
            let session = match first.session.clone() {
                Some(name) => Session::Named(self.pass.as_ref().map(Pass::name), name),
                None => Session::Connection(self.number),
            };
            self.shared.sessions.arrive(session)
        });
        for context in contexts {
            (context.decode_ms, context.ticket) = (decode_ms, ticket.clone());
        }
        Incoming { request: Request::Openpi(request), received, decode_ms, message }
    }

    /// Answers a request of openpi's or a relative of its.
    async fn answer(
        &mut self,
        request: Result<openpi::Request, ServiceError>,
        exchange: &mut Exchange,
        previous_ms: Option<f64>,
    ) -> Result<(), End> {
        let asked = Instant::now();
        let response = match request {
            Err(error) => return self.tell(error, exchange).await,
            Ok(openpi::Request::Reset) => {
                self.done("reset", exchange);
                return self.send(reset(self.dialect)).await;
            }
            Ok(openpi::Request::Infer(one)) => {
                self.shared.metrics.stage("decode").record_ms(one.1.decode_ms);
                let seed = one.1.seed;
                match self.infer(vec![Ok(*one)]).await?.remove(0) {
                    Ok(reply) => {
                        exchange.inferred(&reply, seed);
                        self.done("ok", exchange);
                        openpi::response(reply, ms(asked), previous_ms)
                    }
                    Err(error) => return self.tell(error, exchange).await,
                }
            }
            Ok(openpi::Request::Batch(observations)) => {
                let results = self.infer(observations).await?;
                if let Some(reply) = results.iter().flatten().next() {
                    exchange.inferred(reply, None);
                }
                for result in &results {
                    let outcome = result.as_ref().map_or_else(|error| error.reason, |_| "ok");
                    self.done(outcome, exchange);
                }
                let failed = results.iter().find_map(|result| result.as_ref().err());
                exchange.outcome = failed.map_or("ok", |error| error.reason);
                openpi::batch_response(results, ms(asked), previous_ms)
            }
        };
        self.shared.metrics.stage("infer").record_ms(ms(asked));
        match self.encode(&response) {
            Ok(bytes) => self.reply(bytes, exchange).await?,
            Err(error) => return self.tell(error, exchange).await,
        }
        self.shared.metrics.stage("total").record_ms(ms(exchange.record.received));
        Ok(())
    }

    /// Answers a message of vla-eval's. Errors leave the connection open, unless the message
    /// could not be read at all.
    async fn act(
        &mut self,
        message: Result<vla_eval::Envelope, ServiceError>,
        exchange: &mut Exchange,
        decode_ms: f64,
    ) -> Result<(), End> {
        let (response, unreadable) = match message {
            Err(error) => {
                self.done(error.reason, exchange);
                (vla_eval::failure("message_failed", &error, 0), true)
            }
            Ok(vla_eval::Envelope { kind, seq }) => match kind {
                vla_eval::Kind::Hello => (vla_eval::hello(seq), false),
                vla_eval::Kind::Observation(map) => {
                    let acted = self.next_action(map, seq, exchange, decode_ms).await?;
                    let response = acted.unwrap_or_else(|error| {
                        self.done(error.reason, exchange);
                        vla_eval::failure("observation_failed", &error, seq)
                    });
                    (response, false)
                }
                vla_eval::Kind::EpisodeStart | vla_eval::Kind::EpisodeEnd => {
                    self.chunk.clear();
                    return Ok(());
                }
                vla_eval::Kind::Other => return Ok(()),
            },
        };
        let bytes = self.encode(&response).map_err(|error| {
            tracing::error!(%error, "an answer can't be encoded");
            End::Close(INTERNAL_ERROR, ERROR_REASON)
        })?;
        self.reply(bytes, exchange).await?;
        if unreadable { Err(End::Close(INTERNAL_ERROR, "message not understood")) } else { Ok(()) }
    }

    /// The next action of the chunk, which is a new one when the last is used up.
    async fn next_action(
        &mut self,
        observation: Vec<(String, Value)>,
        seq: i128,
        exchange: &mut Exchange,
        decode_ms: f64,
    ) -> Result<Result<Value, ServiceError>, End> {
        if let Some(action) = self.chunk.pop(seq) {
            self.done("from_chunk", exchange);
            return Ok(Ok(action));
        }
        let received = exchange.record.received;
        let context = vla_eval::context(received, decode_ms);
        self.shared.metrics.stage("decode").record_ms(decode_ms);
        let asked = Instant::now();
        let reply = match self.infer(vec![Ok((Value::Map(observation), context))]).await?.remove(0)
        {
            Ok(reply) => reply,
            Err(error) => return Ok(Err(error)),
        };
        self.shared.metrics.stage("infer").record_ms(ms(asked));
        exchange.inferred(&reply, None);
        if let Err(error) = self.chunk.fill(&reply.actions, self.shared.options.vla_eval_actions) {
            return Ok(Err(error));
        }
        self.shared.metrics.stage("total").record_ms(ms(received));
        self.done("ok", exchange);
        let action = self.chunk.pop(seq);
        Ok(action.ok_or_else(|| ServiceError::exception("RuntimeError", "an empty chunk")))
    }

    /// Asks the service for every observation at once: the engine makes batches of them. One
    /// result each, in their order.
    async fn infer(
        &mut self,
        observations: Vec<Asked>,
    ) -> Result<Vec<Result<Reply, ServiceError>>, End> {
        let service = self.shared.service.clone();
        let service = &service;
        let n = observations.len();
        let pass = self.pass.as_ref();
        let _admission = match pass.map(|pass| pass.admit(Instant::now(), n)).transpose() {
            Ok(admission) => admission,
            Err(error) => return Ok(vec![Err(error); n]),
        };
        let one = |asked: Asked| async move {
            let (observation, context) = asked?;
            if context.ticket.as_ref().is_some_and(|ticket| ticket.is_superseded()) {
                return Err(ServiceError::superseded());
            }
            // A bug in a service must end like any exception, not with a vanished connection.
            let work = AssertUnwindSafe(service.infer(observation, context)).catch_unwind();
            work.await.unwrap_or_else(|_| {
                let mut failure = ServiceError::exception("RuntimeError", "internal error");
                failure.reason = "internal";
                Err(failure)
            })
        };
        self.while_listening(join_all(observations.into_iter().map(one))).await
    }

    /// Counts a request by what became of it, and adds a line to the request log: never what was
    /// asked or answered, never a key.
    fn done(&self, outcome: &'static str, exchange: &mut Exchange) {
        exchange.outcome = outcome;
        self.shared.metrics.outcome(outcome);
        if tracing::enabled!(target: "pirouette::request", tracing::Level::DEBUG) {
            let key = self.pass.as_ref().map(Pass::name);
            tracing::debug!(
                target: "pirouette::request",
                connection = self.number,
                request = self.messages,
                dialect = %self.dialect,
                key = key.as_deref().unwrap_or("-"),
                outcome,
                ms = (ms(exchange.record.received) * 1e3).round() / 1e3,
            );
        }
    }

    fn encode(&self, response: &Value) -> Result<Vec<u8>, ServiceError> {
        let encoding = Instant::now();
        let bytes = msgpack::encode(response).map_err(|error| {
            let mut failure = ServiceError::exception("ValueError", error.to_string());
            failure.reason = "internal";
            failure
        });
        self.shared.metrics.stage("encode").record_ms(ms(encoding));
        bytes
    }

    /// Sends an error as text; one that openpi's server would have raised ends the connection.
    async fn tell(&mut self, error: ServiceError, exchange: &mut Exchange) -> Result<(), End> {
        self.done(error.reason, exchange);
        let text = error.text();
        exchange.reply = Bytes::from(text.clone());
        self.send(Message::Text(text.into())).await?;
        match error.failure {
            Failure::Exception => Err(End::Close(INTERNAL_ERROR, ERROR_REASON)),
            Failure::Refusal => Ok(()),
        }
    }

    async fn reply(&mut self, bytes: Vec<u8>, exchange: &mut Exchange) -> Result<(), End> {
        exchange.record.encoded = Some(Instant::now());
        exchange.reply = bytes.into();
        self.send(Message::Binary(exchange.reply.clone())).await
    }

    /// Awaits something while the connection stays alive. An end of the connection drops it.
    async fn while_listening<T>(&mut self, work: impl Future<Output = T>) -> Result<T, End> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                heard = self.listen() => heard?,
            }
        }
    }

    /// Waits for one event and deals with it: a message goes to the inbox, silence leads to a
    /// ping, then to the end. Returns early when draining begins. Safe to drop at any point.
    async fn listen(&mut self) -> Result<(), End> {
        let room = self.inbox.len() < self.shared.options.read_ahead.max(1);
        let (wake, draining) = (self.wake_at(), *self.draining.borrow());
        let pass = &mut self.pass;
        let revoked = async {
            match pass {
                Some(pass) => pass.revoked().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = revoked => Err(End::Close(POLICY, "the key of this connection was revoked")),
            received = self.socket.recv(), if room => self.heard(received),
            () = tokio::time::sleep_until(wake.into()) => self.silence().await,
            changed = self.draining.changed(), if !draining => {
                // The channel closes only when the server is dropped.
                changed.map_err(|_| End::Close(GOING_AWAY, "server is shutting down"))
            }
        }
    }

    fn heard(&mut self, received: Option<Result<Message, axum::Error>>) -> Result<(), End> {
        let now = Instant::now();
        self.last_heard = now;
        self.pinged = None;
        let frame = match received {
            Some(Ok(Message::Binary(bytes))) => Frame::Binary(bytes),
            Some(Ok(Message::Text(_))) => Frame::Text,
            // Pongs to pings are sent by the socket itself.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => return Ok(()),
            // The socket answers a close by itself when it is read on; see `close`.
            Some(Ok(Message::Close(_))) => return Err(End::Close(0, "")),
            Some(Err(error)) => return Err(self.broken(error)),
            None => return Err(End::Gone),
        };
        let incoming = self.read(frame, now);
        self.inbox.push_back(incoming);
        Ok(())
    }

    fn broken(&self, error: axum::Error) -> End {
        let inner = error.into_inner();
        match inner.downcast_ref::<tungstenite::Error>() {
            Some(tungstenite::Error::Capacity(_)) => {
                self.shared.metrics.outcome("too_big");
                End::Close(TOO_BIG, "the message is longer than this server accepts")
            }
            Some(tungstenite::Error::Protocol(error)) => {
                tracing::debug!(%error, "websocket protocol error");
                End::Close(1002, "protocol error")
            }
            Some(tungstenite::Error::Utf8(_)) => End::Close(1007, "text is not UTF-8"),
            _ => End::Gone,
        }
    }

    fn wake_at(&self) -> Instant {
        let options = &self.shared.options;
        let alive = match self.pinged {
            Some(pinged) => pinged + options.keepalive_timeout,
            None => self.last_heard + options.keepalive_interval,
        };
        match options.idle_timeout {
            Some(idle) => alive.min(self.last_request + idle),
            None => alive,
        }
    }

    async fn silence(&mut self) -> Result<(), End> {
        let options = &self.shared.options;
        let now = Instant::now();
        if options.idle_timeout.is_some_and(|idle| now >= self.last_request + idle) {
            return Err(End::Close(GOING_AWAY, "no request for too long"));
        }
        if self.inbox.len() >= options.read_ahead.max(1) {
            // We are not listening, so silence says nothing.
            self.last_heard = now;
            return Ok(());
        }
        match self.pinged {
            Some(pinged) if now >= pinged + options.keepalive_timeout => {
                Err(End::Close(INTERNAL_ERROR, "keepalive ping timeout"))
            }
            Some(_) => Ok(()),
            None if now >= self.last_heard + options.keepalive_interval => {
                self.pinged = Some(now);
                self.send(Message::Ping(Bytes::from_static(b"pirouette"))).await
            }
            None => Ok(()),
        }
    }

    /// Sends a message. A client that does not take it in time is dropped: nothing piles up.
    async fn send(&mut self, message: Message) -> Result<(), End> {
        match timeout(self.shared.options.write_timeout, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Gone),
            Err(_) => {
                self.shared.metrics.outcome("slow_reader");
                Err(End::Gone)
            }
        }
    }

    /// The closing handshake; code 0 only finishes the one the peer began.
    async fn close(&mut self, code: u16, reason: &'static str) {
        let goodbye = async {
            if code != 0 {
                let frame = CloseFrame { code, reason: reason.into() };
                self.socket.send(Message::Close(Some(frame))).await?;
            }
            while let Some(message) = self.socket.recv().await {
                message?;
            }
            if code == TOO_BIG {
                // What the peer still sends stays unread, which resets the connection when it is
                // dropped: leave it a moment to read why.
                tokio::time::sleep(LINGER).await;
            }
            Ok::<(), axum::Error>(())
        };
        // However it ends, the connection is over.
        let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
    }
}

/// What a reset is answered with.
fn reset(dialect: Dialect) -> Message {
    const DONE: &str = "reset successful";
    if dialect != Dialect::VllmOmni {
        return Message::Text(DONE.into());
    }
    let map = Value::Map(vec![("status".into(), Value::Str(DONE.into()))]);
    // Two short strings always fit.
    Message::Binary(msgpack::encode(&map).unwrap_or_default().into())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
