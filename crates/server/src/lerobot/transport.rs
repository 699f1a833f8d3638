//! HTTP/2 connections → calls, bounded and drained as websockets are.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use axum::serve::Listener;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::calls::{Robot, failed};
use super::wire::{Answer, MAX_MESSAGE_BYTES, Messages, Status};
use crate::serve::{Shared, WeakLife};

/// Calls of one connection at once: an observation, a wait for actions, and room for retries.
const MAX_STREAMS: u32 = 8;

/// Bytes of all calls of a connection that may be on their way unread.
const WINDOW: u32 = 1 << 20;

/// Accepts for as long as the server lives. A connection holds a life from its beginning on, a
/// place among those that shake hands at first, and one among the connections from the first call
/// on that finds one free.
pub(crate) async fn listen<L: Listener>(
    mut listener: L,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    lives: WeakLife,
) {
    let limit = shared.options.max_handshakes.min(Semaphore::MAX_PERMITS);
    let handshakes = Arc::new(Semaphore::new(limit));
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            (io, _) = listener.accept() => {
                let Ok(permit) = handshakes.clone().try_acquire_owned() else {
                    shared.metrics.refused("handshakes");
                    continue;
                };
                let Some(life) = lives.upgrade().filter(|_| !*draining.borrow()) else {
                    shared.metrics.refused("draining");
                    continue;
                };
                let (shared, draining) = (shared.clone(), draining.clone());
                tasks.spawn(async move {
                    converse(io, shared, draining, permit).await;
                    drop(life);
                });
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// What lets a connection in: a place to shake hands, then one among the connections.
struct Admission {
    handshake: Option<OwnedSemaphorePermit>,
    slot: Option<OwnedSemaphorePermit>,
}

struct Link {
    shared: Arc<Shared>,
    robot: Robot,
    admission: Mutex<Admission>,
    /// Whether it has a place among the connections.
    admitted: AtomicBool,
}

/// A connection to its end.
async fn converse<Io>(
    io: Io,
    shared: Arc<Shared>,
    mut draining: watch::Receiver<bool>,
    permit: OwnedSemaphorePermit,
) where
    Io: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let options = &shared.options;
    let admitted_by = Instant::now() + options.handshake_timeout;
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_header_list_size(16 << 10)
        .max_send_buf_size(MAX_MESSAGE_BYTES)
        .keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout);
    let number = shared.metrics.opened.fetch_add(1, Relaxed) + 1;
    let robot = Robot::new(shared.clone(), draining.clone(), number);
    let admission = Mutex::new(Admission { handshake: Some(permit), slot: None });
    let link = Arc::new(Link { shared, robot, admission, admitted: AtomicBool::new(false) });
    let answering = link.clone();
    let answer = service_fn(move |request| {
        let link = answering.clone();
        async move { Ok::<_, Infallible>(link.answer(request).await) }
    });
    let connection = builder.serve_connection(TokioIo::new(io), answer);
    tokio::pin!(connection);
    let mut leaving = false;
    loop {
        tokio::select! {
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a LeRobot connection broke");
                }
                return;
            }
            () = sleep_until(admitted_by), if !link.admitted.load(Relaxed) => {
                if !link.admitted.load(Relaxed) {
                    link.shared.metrics.refused("handshake_timeout");
                    return;
                }
            }
            // Calls under way are answered, new ones go elsewhere.
            _ = draining.wait_for(|draining| *draining), if !leaving => {
                connection.as_mut().graceful_shutdown();
                leaving = true;
            }
        }
    }
}

impl Link {
    async fn answer(&self, request: Request<Incoming>) -> Response<Answer> {
        let grpc = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        if request.method() != Method::POST || !grpc.is_some_and(is_grpc) {
            let mut response = Response::new(Answer::none());
            *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return response;
        }
        let path = request.uri().path().to_owned();
        let answered = match self.admit() {
            Ok(()) => self.robot.call(&path, Messages::new(request.into_body())).await,
            Err(status) => Err(status),
        };
        let body = match &answered {
            Ok(message) => Answer::message(message),
            Err(_) => Answer::none(),
        };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        if let Err(status) = answered {
            failed(&path, &status);
            status.headers(headers);
        }
        response
    }

    /// A call takes a place among the connections, if it has none, and gives that of the handshake
    /// back. Without one the handshake goes on, with its own bound and end.
    fn admit(&self) -> Result<(), Status> {
        let mut admission = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        if admission.slot.is_none() {
            let Ok(slot) = self.shared.slots.clone().try_acquire_owned() else {
                self.shared.metrics.refused("connections");
                let limit = self.shared.options.max_connections;
                let text = format!("all {limit} connections of this server are taken");
                return Err(Status::unavailable(text, "overloaded"));
            };
            admission.slot = Some(slot);
            admission.handshake = None;
            self.admitted.store(true, Relaxed);
        }
        Ok(())
    }
}

/// `application/grpc`, perhaps with the form of its messages.
fn is_grpc(content_type: &[u8]) -> bool {
    content_type
        .strip_prefix(b"application/grpc")
        .is_some_and(|rest| matches!(rest, [] | [b';', ..]) || rest == b"+proto")
}
