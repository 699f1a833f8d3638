//! One websocket: metadata once warm, then request → answer, in order, until somebody closes.
//!
//! One task per connection. While it waits for the service it keeps reading, so that pings are
//! answered, closing clients are noticed, and their work is withdrawn. Requests are decoded as
//! they arrive: a newer one may make those before it pointless.

mod exchange;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio::time::{Sleep, sleep_until, timeout, timeout_at};
use tungstenite::protocol::frame::coding::Data;

pub(crate) use self::exchange::Running;

use self::exchange::Exchange;
use crate::busy::Place;
use crate::carry;
use crate::dialect::openpi;
use crate::dialect::{self, Dialect, Frame, vla_eval, vllm_omni};
use crate::msgpack;
use crate::newest::Session;
use crate::quota::Pass;
use crate::recent::RequestRecord;
use crate::seldom::Seldom;
use crate::serve::Shared;
use crate::service::ServiceError;
use crate::socket::{Fault, Message, Socket};

/// openpi's own reason, byte for byte.
const ERROR_REASON: &str = "Internal server error. Traceback included in previous frame.";

/// Reason of a close at shutdown.
const STOPS: &str = "server is shutting down";

/// How long a closing handshake may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection with unread data stays open after a close frame.
const LINGER: Duration = Duration::from_millis(250);

const GOING_AWAY: u16 = 1001;
const PROTOCOL: u16 = 1002;
const NOT_TEXT: u16 = 1007;
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
    /// Answered as vLLM-Omni answers.
    bare: bool,
    /// The message as it came; arrays of the request lie in the same bytes.
    message: Bytes,
}

/// Why a connection ends.
enum End {
    /// The peer closed, or the transport broke: nothing more can be said.
    Gone,
    /// We close, with a code and a reason.
    Close(u16, &'static str),
}

/// What a connection comes with.
pub(crate) struct Terms {
    pub(crate) shared: Arc<Shared>,
    pub(crate) draining: watch::Receiver<bool>,
    pub(crate) dialect: Dialect,
    pub(crate) pass: Option<Pass>,
    /// On the thread that stays awake.
    pub(crate) place: Option<Place>,
}

struct Connection<S> {
    socket: Socket<S>,
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
    /// Goes off when silence has lasted, or before. It is moved when it goes off, not whenever
    /// something is heard: a timer that is set anew with every message wakes the runtime for it.
    alarm: Pin<Box<Sleep>>,
    /// Of the key it came with.
    pass: Option<Pass>,
    place: Option<Place>,
    /// Messages answered so far, this one included.
    messages: u64,
}

/// Runs a connection to its end.
pub(crate) async fn run<S: AsyncRead + AsyncWrite>(socket: Socket<S>, terms: Terms) {
    let Terms { shared, draining, dialect, pass, place } = terms;
    let number = shared.metrics.opened.fetch_add(1, Relaxed) + 1;
    let now = Instant::now();
    let alarm = Box::pin(sleep_until((now + shared.options.keepalive_interval).into()));
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
        alarm,
        pass,
        place,
        messages: 0,
    };
    if let Err(End::Close(code, reason)) = connection.converse().await {
        connection.close(code, reason).await;
    }
}

impl<S: AsyncRead + AsyncWrite> Connection<S> {
    /// Never returns `Ok`: a conversation ends with an [`End`].
    async fn converse(&mut self) -> Result<(), End> {
        self.warm().await?;
        self.greet().await?;
        let mut previous_ms = None;
        loop {
            let began = Instant::now();
            let incoming = self.next_request().await?;
            self.last_request = incoming.received;
            self.messages += 1;
            let Incoming { request, received, decode_ms, bare, message } = incoming;
            // What waited behind an earlier request was decoded meanwhile.
            let waited = received < began;
            let turn = if waited { Instant::now() } else { received };
            let mut record = RequestRecord::begin(self.number, message.len(), received, turn);
            let decoding = if waited { 0.0 } else { decode_ms };
            record.decoded = Some(turn + Duration::from_secs_f64(decoding / 1e3));
            let reply = Bytes::new();
            let mut exchange = Exchange { record, bare, outcome: "", reply, identity: None };
            let running = Running::begin(self.shared.clone());
            let busy = self.place.as_ref().map(Place::busy);
            let ended = match request {
                Request::Openpi(request) => {
                    self.answer(request, &mut exchange, decode_ms, previous_ms).await
                }
                Request::VlaEval(envelope) => self.act(envelope, &mut exchange, decode_ms).await,
            };
            let Exchange { mut record, outcome, reply, identity, .. } = exchange;
            (record.sent, record.outcome) = (Instant::now(), outcome);
            drop((running, busy));
            previous_ms = Some(ms(began));
            carry::hand_back().await;
            if !outcome.is_empty() {
                self.shared.finished(record, [message, reply], identity);
            }
            ended?;
        }
    }

    /// Waits until the service is warm, or says goodbye where the server stops before.
    async fn warm(&mut self) -> Result<(), End> {
        let (service, mut draining) = (self.shared.service.clone(), self.draining.clone());
        let warm = async {
            tokio::select! {
                biased;
                () = service.warm() => Ok(()),
                // The channel closes only when the server is dropped.
                _ = draining.wait_for(|draining| *draining) => Err(End::Close(GOING_AWAY, STOPS)),
            }
        };
        self.while_listening(warm).await?
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
        self.send(Data::Binary, &metadata).await
    }

    async fn next_request(&mut self) -> Result<Incoming, End> {
        loop {
            if let Some(next) = self.inbox.pop_front() {
                return Ok(next);
            }
            if *self.draining.borrow() {
                return Err(End::Close(GOING_AWAY, STOPS));
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
            return Incoming { request, received, decode_ms: ms(decoding), bare: false, message };
        }
        let bare =
            self.dialect == Dialect::VllmOmni && map.as_ref().is_ok_and(|map| vllm_omni::asks(map));
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
        Incoming { request: Request::Openpi(request), received, decode_ms, bare, message }
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
        let (wake, draining) = (self.wake_at().into(), *self.draining.borrow());
        if wake < self.alarm.deadline() || self.alarm.is_elapsed() {
            self.alarm.as_mut().reset(wake);
        }
        let pass = &mut self.pass;
        let revoked = async {
            match pass {
                Some(pass) => pass.revoked().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = revoked => Err(End::Close(POLICY, "the key of this connection was revoked")),
            received = self.socket.receive(), if room => self.heard(received),
            () = &mut self.alarm => self.silence().await,
            changed = self.draining.changed(), if !draining => {
                // The channel closes only when the server is dropped.
                changed.map_err(|_| End::Close(GOING_AWAY, STOPS))
            }
        }
    }

    fn heard(&mut self, received: Result<Message, Fault>) -> Result<(), End> {
        let now = Instant::now();
        self.last_heard = now;
        self.pinged = None;
        let frame = match received {
            Ok(Message::Binary(bytes)) => Frame::Binary(bytes),
            Ok(Message::Text) => Frame::Text,
            Ok(Message::Alive) => return Ok(()),
            // The socket answers a close by itself when it is read on; see `close`.
            Ok(Message::Close) => return Err(End::Close(0, "")),
            Err(fault) => return Err(self.broken(fault)),
        };
        let incoming = self.read(frame, now);
        self.inbox.push_back(incoming);
        Ok(())
    }

    fn broken(&self, fault: Fault) -> End {
        match fault {
            Fault::Gone | Fault::Unread => End::Gone,
            Fault::TooBig => {
                self.shared.metrics.outcome("too_big");
                End::Close(TOO_BIG, "the message is longer than this server accepts")
            }
            Fault::Protocol(error) => {
                tracing::debug!(%error, "websocket protocol error");
                End::Close(PROTOCOL, "protocol error")
            }
            Fault::Utf8 => End::Close(NOT_TEXT, "text is not UTF-8"),
        }
    }

    /// How long a ping may stay unanswered.
    fn keepalive_timeout(&self) -> Duration {
        match self.dialect {
            Dialect::VlaEval => self.shared.options.vla_eval_keepalive_timeout,
            _ => self.shared.options.keepalive_timeout,
        }
    }

    fn wake_at(&self) -> Instant {
        let options = &self.shared.options;
        let alive = match self.pinged {
            Some(pinged) => pinged + self.keepalive_timeout(),
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
            Some(pinged) if now >= pinged + self.keepalive_timeout() => {
                Err(End::Close(INTERNAL_ERROR, "keepalive ping timeout"))
            }
            Some(_) => Ok(()),
            None if now >= self.last_heard + options.keepalive_interval => {
                self.pinged = Some(now);
                self.in_time(async |socket| socket.ping().await).await
            }
            None => Ok(()),
        }
    }

    /// Sends a message. A client that does not take it in time is dropped: nothing piles up.
    async fn send(&mut self, kind: Data, payload: &[u8]) -> Result<(), End> {
        self.in_time(async |socket| socket.send(kind, payload).await).await
    }

    async fn in_time(
        &mut self,
        send: impl AsyncFnOnce(&mut Socket<S>) -> Result<(), Fault>,
    ) -> Result<(), End> {
        let outcome = match timeout(self.shared.options.write_timeout, send(&mut self.socket)).await
        {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(Fault::Unread)) => "unread",
            Ok(Err(_)) => return Err(End::Gone),
            Err(_) => "slow_reader",
        };
        self.shared.metrics.outcome(outcome);
        static LINE: Seldom = Seldom::new();
        if let Some(unsaid) = LINE.pass() {
            let connection = self.number;
            tracing::warn!(connection, outcome, unsaid, "dropped: answers are not taken in time");
        }
        Err(End::Gone)
    }

    /// The closing handshake; code 0 only finishes the one the peer began.
    async fn close(&mut self, code: u16, reason: &'static str) {
        let goodbye = async {
            if code != 0 {
                self.socket.close(code, reason).await?;
            }
            while self.socket.receive().await.is_ok() {}
            if code == TOO_BIG {
                // What the peer still sends stays unread, which resets the connection when it is
                // dropped: leave it a moment to read why.
                tokio::time::sleep(LINGER).await;
            }
            Ok::<(), Fault>(())
        };
        // However it ends, the connection is over.
        let _ = timeout(CLOSE_TIMEOUT, goodbye).await;
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
