//! A listener → connections, until shutdown: accept, bound, drain.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::serve::{Listener, ListenerExt};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::http;
use crate::metrics::Metrics;
use crate::newest::Sessions;
use crate::options::ServeOptions;
use crate::service::Service;

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) service: Arc<dyn Service>,
    pub(crate) options: ServeOptions,
    pub(crate) metrics: Metrics,
    /// One permit per open websocket.
    pub(crate) slots: Arc<Semaphore>,
    /// Requests of which only the newest counts.
    pub(crate) sessions: Sessions,
}

impl Shared {
    /// Websockets open now.
    pub(crate) fn open_websockets(&self) -> usize {
        let limit = self.options.max_connections.min(Semaphore::MAX_PERMITS);
        limit.saturating_sub(self.slots.available_permits())
    }
}

/// What a websocket gets its life from; upgrading fails once the drain is over. The last life
/// gone ends the drain.
pub(crate) type WeakLife = mpsc::WeakSender<()>;

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

/// Serves until `shutdown` resolves, then drains: not ready, no new websockets, requests in
/// flight are answered, every connection is closed with 1001. Connections that do not end within
/// `drain_timeout` are dropped.
pub async fn serve<L: Listener>(
    mut listener: L,
    service: Arc<dyn Service>,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send,
) -> Served {
    let slots = Arc::new(Semaphore::new(options.max_connections.min(Semaphore::MAX_PERMITS)));
    let handshakes = Arc::new(Semaphore::new(options.max_handshakes.min(Semaphore::MAX_PERMITS)));
    let (metrics, sessions) = (Metrics::default(), Sessions::default());
    let shared = Arc::new(Shared { service, options, metrics, slots, sessions });
    let (drain, draining) = watch::channel(false);
    let (life, mut lives) = mpsc::channel::<()>(1);
    let mut tasks = tokio::task::JoinSet::new();
    tokio::pin!(shutdown);
    let weak = life.downgrade();
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
                tasks.spawn(converse(io, shared.clone(), draining.clone(), weak.clone(), permit));
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

/// The HTTP part of a connection. After an upgrade the websocket lives on in a task of its own.
async fn converse<Io>(
    io: Io,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    lives: WeakLife,
    _permit: OwnedSemaphorePermit,
) where
    Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let timeout = shared.options.handshake_timeout;
    let answer = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (shared, draining, lives) = (shared.clone(), draining.clone(), lives.clone());
        async move {
            let request: Request = request.map(axum::body::Body::new);
            let mut response = http::answer(request, shared, draining, lives).await;
            let name = HeaderValue::from_static(concat!("pirouette/", env!("CARGO_PKG_VERSION")));
            response.headers_mut().insert(header::SERVER, name);
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .max_buf_size(32 << 10)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(io), answer)
        .with_upgrades();
    if let Err(error) = connection.await {
        tracing::debug!(%error, "connection ended before a websocket was open");
    }
}
