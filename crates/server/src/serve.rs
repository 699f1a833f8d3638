//! A listener → connections, until shutdown: accept, bound, drain.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::serve::{Listener, ListenerExt};
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::admin;
use crate::busy;
use crate::http;
use crate::lerobot;
use crate::metrics::Metrics;
use crate::newest::Sessions;
use crate::options::ServeOptions;
use crate::preparation::Preparation;
use crate::recent::{Recent, RequestRecord};
use crate::record;
use crate::reload;
use crate::service::Service;

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
}

impl Shared {
    /// Remembers a request that is over; queues it with its frames where requests are recorded.
    pub(crate) fn finished(&self, record: RequestRecord, request: Bytes, reply: Bytes) {
        let record = self.recent.finished(record);
        if let Some(recorder) = &self.options.recorder {
            recorder.offer(record::Entry { record, request, reply });
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
    /// Whether all connections ended by themselves within the drain time.
    pub drained: bool,
}

/// Listens on an address with the socket options a request-response protocol wants.
///
/// # Errors
/// The address is taken or not ours.
pub async fn bind(
    address: SocketAddr,
) -> std::io::Result<impl Listener<Io = TcpStream, Addr = SocketAddr>> {
    let listener = TcpListener::bind(address).await?;
    Ok(listener.tap_io(|stream| {
        // Answers are one small packet: waiting for more would cost up to 40 ms. A socket that
        // refuses is served all the same.
        let _ = stream.set_nodelay(true);
    }))
}

/// Resolves at SIGTERM or Ctrl-C, for [`serve`]'s `shutdown`.
pub async fn termination() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                tokio::select! {
                    _ = interrupt => {}
                    _ = terminate.recv() => {}
                }
                return;
            }
            Err(error) => tracing::warn!(%error, "SIGTERM is not handled, Ctrl-C is"),
        }
    }
    // Without a handler nothing can ask us to stop gracefully.
    if interrupt.await.is_err() {
        std::future::pending::<()>().await;
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
/// flight are answered, every connection is closed with 1001. Connections that do not end within
/// `drain_timeout` are dropped.
pub async fn serve_doors<L: Listener>(
    doors: Doors<L>,
    service: Arc<dyn Service>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Served {
    let Doors { public: mut listener, admin, lerobot } = doors;
    let slots = Arc::new(Semaphore::new(options.max_connections.min(Semaphore::MAX_PERMITS)));
    let handshakes = Arc::new(Semaphore::new(options.max_handshakes.min(Semaphore::MAX_PERMITS)));
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
        stretching: Preparation::per_core(),
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
                drain.send_replace(true);
                give_up = Some(Instant::now() + shared.options.drain_timeout);
                life = None;
            }
            // All senders gone: every websocket has ended.
            _ = lives.recv(), if life.is_none() => return Served { drained: true },
            () = at(give_up) => return Served { drained: false },
            (io, _) = listener.accept() => {
                let Ok(permit) = handshakes.clone().try_acquire_owned() else {
                    shared.metrics.refused("handshakes");
                    continue;
                };
                let door = Door::Public(weak.clone());
                tasks.spawn(converse(io, shared.clone(), draining.clone(), door, permit));
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
    _permit: OwnedSemaphorePermit,
) where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let until = Instant::now() + shared.options.handshake_timeout;
    let Some(tls) = shared.options.tls.clone() else {
        return request(io, shared, draining, door, until).await;
    };
    match timeout_at(until, tls.accept(io)).await {
        Ok(Ok(stream)) => request(stream, shared, draining, door, until).await,
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
