//! A listener → connections, until shutdown: accept, bound, drain.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::serve::Listener;
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pirouette_engine::EngineError;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::admin;
use crate::busy;
use crate::http;
use crate::lerobot;
use crate::metrics::Metrics;
use crate::newest::Sessions;
use crate::options::ServeOptions;
use crate::places::{Place, Places};
use crate::preparation::Preparation;
use crate::recent::{Recent, RequestRecord};
use crate::record;
use crate::reload;
use crate::seldom::Seldom;
use crate::service::{Service, ServiceError};

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) service: Arc<dyn Service>,
    pub(crate) options: ServeOptions,
    pub(crate) metrics: Metrics,
    pub(crate) recent: Recent,
    /// One trace at a time.
    pub(crate) tracing: Semaphore,
    /// One permit per open websocket or LeRobot connection.
    pub(crate) slots: Arc<Semaphore>,
    /// Whether the pages have a listener of their own.
    pub(crate) admin: bool,
    /// On the thread that stays awake, where there is one.
    pub(crate) busy: Option<busy::Places>,
    /// Requests of which only the newest counts.
    pub(crate) sessions: Sessions,
    /// Images of LeRobot clients that are stretched first.
    pub(crate) stretching: Preparation,
    draining_since: OnceLock<Instant>,
    /// Whether the drain left a request without its answer.
    cut: AtomicBool,
}

/// What is left of the drain when requests that still run are given up.
const FAREWELL: Duration = Duration::from_millis(500);

impl Shared {
    /// Remembers a request that is over; queues it with its frames where requests are recorded and
    /// somebody was answered.
    pub(crate) fn finished(
        &self,
        record: RequestRecord,
        [request, reply]: [Bytes; 2],
        identity: Option<serde_json::Value>,
    ) {
        let record = self.recent.finished(record);
        if let Some(recorder) = self.options.recorder.as_ref().filter(|_| !reply.is_empty()) {
            recorder.offer(record::Entry { record, request, reply, identity });
        }
    }

    /// Awaits a service until just before the drain gives up: time is left to say so, and to close.
    pub(crate) async fn before_the_end<T>(
        &self,
        mut draining: watch::Receiver<bool>,
        work: impl Future<Output = T>,
    ) -> Result<T, ServiceError> {
        let end = async {
            // The channel closes only when the server is dropped.
            let _ = draining.wait_for(|draining| *draining).await;
            let began = self.draining_since.get().copied().unwrap_or_else(Instant::now);
            let time = self.options.drain_timeout;
            sleep_until(began + time - FAREWELL.min(time / 4)).await;
        };
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = end => {
                self.cut.store(true, Relaxed);
                Err(EngineError::Draining.into())
            }
        }
    }

    /// Websockets and LeRobot connections open now.
    pub(crate) fn open_websockets(&self) -> usize {
        let limit = self.options.max_connections.min(Semaphore::MAX_PERMITS);
        limit.saturating_sub(self.slots.available_permits())
    }
}

/// What a websocket gets its life from; upgrading fails once the drain is over. The last life
/// gone ends the drain.
pub(crate) type WeakLife = mpsc::WeakSender<()>;

/// Where the server is reached.
#[derive(Debug)]
pub struct Doors<L> {
    /// Websockets and health; the pages too if they have no listener of their own.
    pub public: L,
    /// The pages, and all that changes something.
    pub admin: Option<L>,
    /// LeRobot's clients: gRPC, without keys and without TLS.
    pub lerobot: Option<L>,
}

/// By which of them a connection came.
#[derive(Clone)]
pub(crate) enum Door {
    Public(WeakLife),
    Admin,
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// Whether all requests were answered and all connections ended within the drain time.
    pub drained: bool,
}

/// Listens on an address with the socket options a request-response protocol wants.
///
/// # Errors
/// The address is taken or not ours.
pub async fn bind(
    address: SocketAddr,
) -> std::io::Result<impl Listener<Io = TcpStream, Addr = SocketAddr>> {
    Ok(Bound(TcpListener::bind(address).await?))
}

/// How long a listener that can't accept waits: for another connection to give its file back.
const NO_FILES: Duration = Duration::from_millis(200);

struct Bound(TcpListener);

impl Listener for Bound {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        use std::io::ErrorKind::{ConnectionAborted, ConnectionReset};
        loop {
            match self.0.accept().await {
                Ok((stream, address)) => {
                    // Answers are one small packet: waiting for more would cost up to 40 ms. A
                    // socket that refuses is served all the same.
                    let _ = stream.set_nodelay(true);
                    return (stream, address);
                }
                Err(error) if matches!(error.kind(), ConnectionAborted | ConnectionReset) => {}
                Err(error) => {
                    static LINE: Seldom = Seldom::new();
                    if let Some(unsaid) = LINE.pass() {
                        tracing::error!(
                            %error,
                            unsaid,
                            "connections wait, since none can be accepted: if open files are too \
                             many, raise their limit (`ulimit -n`, systemd's LimitNOFILE)"
                        );
                    }
                    tokio::time::sleep(NO_FILES).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// [`serve_doors`] with one listener for everything.
pub async fn serve<L: Listener>(
    listener: L,
    service: Arc<dyn Service>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Served {
    serve_doors(Doors { public: listener, admin: None, lerobot: None }, service, options, shutdown)
        .await
}

/// Serves until `shutdown` resolves, then drains: not ready, no new websockets, requests in
/// flight are answered, every connection is closed with 1001. What still runs shortly before
/// `drain_timeout` is refused; connections that do not end within it are dropped.
pub async fn serve_doors<L: Listener>(
    doors: Doors<L>,
    service: Arc<dyn Service>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Served {
    let Doors { public: mut listener, admin, lerobot } = doors;
    let slots = Arc::new(Semaphore::new(options.max_connections.min(Semaphore::MAX_PERMITS)));
    let mut handshakes = Places::new(options.max_handshakes);
    // The thread ends with this function.
    let (_thread, busy) = match options.busy_poll {
        Duration::ZERO => (None, None),
        patience => match busy::start(patience) {
            Ok((thread, places)) => (Some(thread), Some(places)),
            Err(error) => {
                tracing::error!(%error, "no thread stays awake for connections");
                (None, None)
            }
        },
    };
    // A LeRobot connection has one observation stretched at a time.
    let stretching = Preparation::per_core(options.max_connections);
    let shared = Arc::new(Shared {
        service,
        options,
        metrics: Metrics::default(),
        recent: Recent::default(),
        tracing: Semaphore::new(1),
        slots,
        admin: admin.is_some(),
        busy,
        sessions: Sessions::default(),
        stretching,
        draining_since: OnceLock::new(),
        cut: AtomicBool::new(false),
    });
    let (drain, draining) = watch::channel(false);
    let (life, mut lives) = mpsc::channel::<()>(1);
    let mut tasks = tokio::task::JoinSet::new();
    let ServeOptions { tls, api_keys, admin_keys, .. } = &shared.options;
    if tls.is_some() || api_keys.is_some() || admin_keys.is_some() {
        tasks.spawn(reload::watch(shared.clone()));
    }
    if let Some(listener) = admin {
        tasks.spawn(admin::listen(listener, shared.clone(), draining.clone()));
    }
    tokio::pin!(shutdown);
    let weak = life.downgrade();
    if let Some(listener) = lerobot {
        tasks.spawn(lerobot::listen(listener, shared.clone(), draining.clone(), weak.clone()));
    }
    let mut life = Some(life);
    let mut give_up = None;
    loop {
        tokio::select! {
            () = &mut shutdown, if life.is_some() => {
                let now = *shared.draining_since.get_or_init(Instant::now);
                drain.send_replace(true);
                give_up = Some(now + shared.options.drain_timeout);
                life = None;
            }
            // All senders gone: every websocket has ended.
            _ = lives.recv(), if life.is_none() => {
                return Served { drained: !shared.cut.load(Relaxed) };
            }
            () = at(give_up) => return Served { drained: false },
            (io, _) = listener.accept() => {
                let door = Door::Public(weak.clone());
                let (own, draining) = (shared.clone(), draining.clone());
                let converse = |place| converse(io, own, draining, door, place);
                if !handshakes.spawn(&mut tasks, converse) {
                    shared.metrics.refused("handshakes");
                }
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// A connection up to its end or its upgrade: TLS if it is on, one HTTP request, one answer.
/// TLS and the request share one `handshake_timeout`.
pub(crate) async fn converse<Io>(
    io: Io,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    door: Door,
    place: Place,
) where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let until = Instant::now() + shared.options.handshake_timeout;
    let Some(tls) = shared.options.tls.clone() else {
        return request(io, shared, draining, door, place, until).await;
    };
    match timeout_at(until, tls.accept(io)).await {
        Ok(Ok(stream)) => request(stream, shared, draining, door, place, until).await,
        Ok(Err(error)) => {
            shared.metrics.refused("tls");
            tracing::debug!(%error, "TLS handshake failed");
        }
        Err(_) => shared.metrics.refused("tls_timeout"),
    }
}

/// The HTTP part of a connection. After an upgrade the websocket lives on in a task of its own.
async fn request<Io>(
    io: Io,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    door: Door,
    place: Place,
    until: Instant,
) where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let write_timeout = shared.options.write_timeout;
    let answered = Arc::new(Notify::new());
    let taken_late = {
        let answered = answered.clone();
        async move {
            answered.notified().await;
            tokio::time::sleep(write_timeout).await;
        }
    };
    let answer = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        place.asked();
        let (shared, draining, door) = (shared.clone(), draining.clone(), door.clone());
        let answered = answered.clone();
        async move {
            let request: Request = request.map(axum::body::Body::new);
            let mut response = match door {
                Door::Public(lives) => http::answer(request, shared, draining, lives).await,
                Door::Admin => admin::answer(request, &shared, &draining).await,
            };
            let name = HeaderValue::from_static(concat!("pirouette/", env!("CARGO_PKG_VERSION")));
            response.headers_mut().insert(header::SERVER, name);
            answered.notify_one();
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(until.saturating_duration_since(Instant::now()))
        .max_buf_size(32 << 10)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(io), answer)
        .with_upgrades();
    tokio::select! {
        ended = connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended before a websocket was open");
            }
        }
        () = taken_late => tracing::debug!("connection dropped: its answer was not read in time"),
    }
}
