//! One websocket: metadata once warm, then request → answer, in order, until somebody closes.
//!
//! One task per connection. While it waits for the service it keeps reading, so that pings are
//! answered, closing clients are noticed, and their work is withdrawn.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use axum::extract::ws::{CloseFrame, Message, WebSocket};
use bytes::Bytes;
use futures_util::FutureExt;
use pirouette_policy::Value;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite;

use crate::fields;
use crate::msgpack;
use crate::recent::RequestRecord;
use crate::serve::Shared;
use crate::service::{Failure, Reply, RequestContext, ServiceError};

/// openpi's own reason, byte for byte.
const ERROR_REASON: &str = "Internal server error. Traceback included in previous frame.";

/// How long a closing handshake may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection with unread data stays open after a close frame.
const LINGER: Duration = Duration::from_millis(250);

const GOING_AWAY: u16 = 1001;
const TOO_BIG: u16 = 1009;
const INTERNAL_ERROR: u16 = 1011;

/// A data message as it arrived.
enum Frame {
    Binary(Bytes),
    Text,
}

impl Frame {
    fn bytes(&self) -> usize {
        match self {
            Frame::Binary(bytes) => bytes.len(),
            Frame::Text => 0,
        }
    }

    /// The same bytes, for the recorder; nothing is copied.
    fn kept(&self) -> Bytes {
        match self {
            Frame::Binary(bytes) => bytes.clone(),
            Frame::Text => Bytes::new(),
        }
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
    /// Read ahead, bounded.
    inbox: VecDeque<(Frame, Instant)>,
    last_heard: Instant,
    last_request: Instant,
    pinged: Option<Instant>,
    /// Number of the connection.
    id: u64,
}

/// Runs a connection to its end.
pub(crate) async fn run(socket: WebSocket, shared: Arc<Shared>, draining: watch::Receiver<bool>) {
    let id = shared.metrics.opened.fetch_add(1, Relaxed) + 1;
    let now = Instant::now();
    let (last_heard, last_request) = (now, now);
    let inbox = VecDeque::new();
    let mut connection =
        Connection { socket, shared, draining, inbox, last_heard, last_request, pinged: None, id };
    if let Err(End::Close(code, reason)) = connection.converse().await {
        connection.close(code, reason).await;
    }
}

impl Connection {
    /// Never returns `Ok`: a conversation ends with an [`End`].
    async fn converse(&mut self) -> Result<(), End> {
        let service = self.shared.service.clone();
        self.while_listening(service.warm()).await?;
        let metadata = msgpack::encode(&service.metadata()).map_err(|error| {
            tracing::error!(%error, "the metadata can't be encoded");
            End::Close(INTERNAL_ERROR, ERROR_REASON)
        })?;
        self.send(Message::Binary(metadata.into())).await?;
        let mut previous_ms = None;
        loop {
            let began = Instant::now();
            let (frame, received) = self.next_frame().await?;
            self.last_request = received;
            let mut record = RequestRecord::begin(self.id, frame.bytes(), received);
            let running = Running::begin(self.shared.clone());
            let kept = frame.kept();
            match self.answer(frame, received, previous_ms, &mut record).await? {
                Ok(bytes) => {
                    let bytes = Bytes::from(bytes);
                    self.send(Message::Binary(bytes.clone())).await?;
                    self.shared.metrics.stage("total").record_ms(ms(received));
                    self.shared.metrics.outcome("ok");
                    self.shared.finished(record, "ok", kept, bytes);
                }
                Err(error) => {
                    self.shared.metrics.outcome(error.reason);
                    let text = error.text();
                    self.send(Message::Text(text.clone().into())).await?;
                    self.shared.finished(record, error.reason, kept, text.into());
                    if error.failure == Failure::Exception {
                        return Err(End::Close(INTERNAL_ERROR, ERROR_REASON));
                    }
                }
            }
            drop(running);
            previous_ms = Some(ms(began));
        }
    }

    async fn next_frame(&mut self) -> Result<(Frame, Instant), End> {
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

    /// Frame → answer's bytes, or the error to tell; the outer error ends the connection.
    async fn answer(
        &mut self,
        frame: Frame,
        received: Instant,
        previous_ms: Option<f64>,
        record: &mut RequestRecord,
    ) -> Result<Result<Vec<u8>, ServiceError>, End> {
        let shared = self.shared.clone();
        let decoding = Instant::now();
        let decoded = observation(frame, &shared.options.limits)
            .and_then(|mut map| Ok((fields::take(&mut map, received)?, map)));
        let (context, map) = match decoded {
            Ok(decoded) => decoded,
            Err(error) => return Ok(Err(error)),
        };
        shared.metrics.stage("decode").record_ms(ms(decoding));
        record.decoded = Some(Instant::now());
        record.seed = context.seed;
        let asked = Instant::now();
        // A bug in a service must end like any exception, not with a vanished connection.
        let work = AssertUnwindSafe(shared.service.infer(Value::Map(map), context)).catch_unwind();
        let result = self.while_listening(work).await?.unwrap_or_else(|_| {
            let mut failure = ServiceError::exception("RuntimeError", "internal error");
            failure.reason = "internal";
            Err(failure)
        });
        let infer_ms = ms(asked);
        let reply = match result {
            Ok(reply) => reply,
            Err(error) => return Ok(Err(error)),
        };
        shared.metrics.stage("infer").record_ms(infer_ms);
        record.inferred = Some(Instant::now());
        record.timing = reply.timing;
        record.seed = record.seed.or(reply.seed());
        let encoding = Instant::now();
        let bytes = msgpack::encode(&response(reply, infer_ms, previous_ms)).map_err(|error| {
            let mut failure = ServiceError::exception("ValueError", error.to_string());
            failure.reason = "internal";
            failure
        });
        shared.metrics.stage("encode").record_ms(ms(encoding));
        record.encoded = Some(Instant::now());
        Ok(bytes)
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
        tokio::select! {
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
        self.inbox.push_back((frame, now));
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

/// A frame → what the service is asked.
pub(crate) fn decode(
    frame: &Bytes,
    limits: &msgpack::Limits,
    received: Instant,
) -> Result<(Value, RequestContext), ServiceError> {
    let mut map = observation(Frame::Binary(frame.clone()), limits)?;
    let context = fields::take(&mut map, received)?;
    Ok((Value::Map(map), context))
}

/// Decodes a request; whatever is wrong is what Python would have raised.
fn observation(
    frame: Frame,
    limits: &msgpack::Limits,
) -> Result<Vec<(String, Value)>, ServiceError> {
    let Frame::Binary(bytes) = frame else {
        let message = "a bytes-like object is required, not 'str'";
        return Err(ServiceError::exception("TypeError", message));
    };
    match msgpack::decode_with(&bytes, limits) {
        Ok(Value::Map(map)) => Ok(map),
        Ok(_) => Err(ServiceError::exception("TypeError", "the observation must be a map")),
        Err(error @ msgpack::DecodeError::Format { .. }) => {
            // Python's exception has no text; ours goes on the line before.
            let mut exception = ServiceError::exception(error.python_type(), "");
            exception.detail = Some(error.to_string());
            Err(exception)
        }
        Err(error) => Err(ServiceError::exception(error.python_type(), error.to_string())),
    }
}

/// openpi's keys in openpi's order, then ours.
fn response(reply: Reply, infer_ms: f64, previous_ms: Option<f64>) -> Value {
    let timing = |ms: f64| ("infer_ms".to_string(), Value::Float(ms));
    let mut server_timing = vec![timing(infer_ms)];
    if let Some(ms) = previous_ms {
        server_timing.push(("prev_total_ms".into(), Value::Float(ms)));
    }
    let mut map = vec![
        ("actions".to_string(), Value::Array(reply.actions)),
        ("policy_timing".into(), Value::Map(vec![timing(reply.model_ms)])),
        ("server_timing".into(), Value::Map(server_timing)),
    ];
    map.extend(reply.extras);
    Value::Map(map)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
