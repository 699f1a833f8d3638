//! One HTTP request → an upgrade, or one of the plain answers.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header, request};
use axum::response::Response;
use bytes::Bytes;
use hyper::upgrade::{OnUpgrade, Parts, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tungstenite::handshake::derive_accept_key;

use crate::busy::Places;
use crate::carry;
use crate::connection::{self, Terms};
use crate::dashboard;
use crate::dialect::Dialect;
use crate::pages::{self, Method, Page, PageRequest};
use crate::quota::Account;
use crate::serve::{Shared, WeakLife};
use crate::socket::Socket;

/// Answers one request. A websocket holds a `life` for as long as it lives.
pub(crate) async fn answer(
    request: Request,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    lives: WeakLife,
) -> Response {
    let (mut parts, _body) = request.into_parts();
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
    if parts.method != axum::http::Method::GET {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is known here\n");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    // openpi's server answers this path before it looks at anything else.
    if path == "/healthz" {
        return plain(StatusCode::OK, "OK\n");
    }
    let fault = handshake_fault(&parts.headers);
    if fault.is_some()
        && let Some(response) = probe(&path, &shared, &draining).await
    {
        return response;
    }
    // The page itself says nothing of this server; what fills it is asked for with a key. Whoever
    // does not ask for HTML gets openpi's answer on this path.
    let browser = fault.is_some() && dashboard::wanted(&path, &parts.headers);
    if browser && !shared.admin {
        return rendered(Page::html(dashboard::PAGE));
    }
    let mut account = None;
    if let Some(keys) = &shared.options.api_keys {
        let given = parts.headers.get(header::AUTHORIZATION).map(|v| v.as_bytes());
        account = keys.identify(given);
        if account.is_none() {
            shared.metrics.refused("unauthorized");
            return unauthorized();
        }
    }
    let Some((status, why)) = fault else {
        return upgrade(&mut parts, shared, draining, lives, account).await;
    };
    if !shared.admin && path != dashboard::PATH {
        let request = page_request(Method::Get, &parts.uri, Bytes::new());
        if let Some(page) = pages::page(&shared, request).await {
            return rendered(page);
        }
    }
    refuse_handshake(status, &why)
}

/// A request for a page.
pub(crate) fn page_request(method: Method, uri: &Uri, body: Bytes) -> PageRequest {
    let query = uri.query().unwrap_or_default().to_owned();
    PageRequest { method, path: uri.path().to_owned(), query, body }
}

/// Answers a probe; `None` if the path is none.
pub(crate) async fn probe(
    path: &str,
    shared: &Shared,
    draining: &watch::Receiver<bool>,
) -> Option<Response> {
    match path {
        "/livez" => Some(liveness(shared)),
        "/readyz" => Some(match readiness(shared, draining).await {
            Ok(()) => plain(StatusCode::OK, "ready\n"),
            Err(why) => plain(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        }),
        // The same as vla-eval's servers say it.
        "/health" => Some(rendered(match readiness(shared, draining).await {
            Ok(()) => Page::json(200, r#"{"status": "ok"}"#),
            Err(why) => {
                let status = serde_json::json!({ "status": format!("not ready: {why}") });
                Page::json(503, status.to_string())
            }
        })),
        _ => None,
    }
}

fn liveness(shared: &Shared) -> Response {
    match shared.service.alive() {
        Ok(()) => plain(StatusCode::OK, "alive\n"),
        Err(why) => {
            tracing::warn!(%why, "liveness probe");
            plain(StatusCode::SERVICE_UNAVAILABLE, "it does not recover by itself: see the log\n")
        }
    }
}

/// Whether requests would be answered; if not, why.
async fn readiness(shared: &Shared, draining: &watch::Receiver<bool>) -> Result<(), &'static str> {
    if *draining.borrow() {
        return Err("shutting down");
    }
    let probe = shared.service.readiness();
    match tokio::time::timeout(shared.options.readiness_timeout, probe).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(why)) => {
            // Device errors may name files; the log has them, the network does not.
            tracing::warn!(%why, "readiness probe");
            Err("no device is ready")
        }
        Err(_) => Err("the canary forward takes too long"),
    }
}

async fn upgrade(
    parts: &mut request::Parts,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
    lives: WeakLife,
    account: Option<Arc<Account>>,
) -> Response {
    let life = if *draining.borrow() { None } else { lives.upgrade() };
    let Some(life) = life else {
        shared.metrics.refused("draining");
        return plain(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down\n");
    };
    let Ok(slot) = shared.slots.clone().try_acquire_owned() else {
        shared.metrics.refused("connections");
        let limit = shared.options.max_connections;
        let text = format!("all {limit} connections of this server are taken\n");
        return plain(StatusCode::SERVICE_UNAVAILABLE, text);
    };
    let pass = match account.map(|account| account.connect()).transpose() {
        Ok(pass) => pass,
        Err(why) => {
            shared.metrics.refused("quota");
            return plain(StatusCode::TOO_MANY_REQUESTS, why);
        }
    };
    let key = parts.headers.get(header::SEC_WEBSOCKET_KEY).map(|key| key.as_bytes());
    let accept = key.and_then(|key| HeaderValue::try_from(derive_accept_key(key)).ok());
    let (Some(accept), Some(upgrade)) = (accept, parts.extensions.remove::<OnUpgrade>()) else {
        return refuse_handshake(StatusCode::BAD_REQUEST, "this request can't be upgraded");
    };
    let dialect = Dialect::of_path(parts.uri.path()).unwrap_or(shared.options.dialect);
    let terms = Terms { shared, draining, dialect, pass, place: None };
    tokio::spawn(async move {
        // A client that left meanwhile has no upgrade.
        if let Ok(upgraded) = upgrade.await {
            converse(upgraded, terms, (slot, life)).await;
        }
    });
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    response
}

/// A websocket's connection: on the thread that stays awake, if there is one with a free place and
/// the stream is TCP alone. `held` is let go when it is over.
async fn converse(upgraded: Upgraded, mut terms: Terms, held: impl Send + 'static) {
    let limit = terms.shared.options.max_frame_bytes;
    let place = terms.shared.busy.as_ref().and_then(Places::take);
    let upgraded = match (place, upgraded) {
        (None, upgraded) => upgraded,
        (Some(place), upgraded) => match upgraded.downcast::<TokioIo<TcpStream>>() {
            Err(upgraded) => upgraded,
            Ok(Parts { io, read_buf, .. }) => {
                let Ok(stream) = io.into_inner().into_std() else { return };
                let runtime = place.runtime.clone();
                terms.place = Some(place);
                runtime.spawn(async move {
                    let Ok(stream) = TcpStream::from_std(stream) else { return };
                    let socket = Socket::new(stream, limit, read_buf);
                    // Awake as the device thread, and warmer: nobody need carry its answers.
                    connection::run(socket, terms).await;
                    drop(held);
                });
                return;
            }
        },
    };
    let socket = Socket::new(TokioIo::new(upgraded), limit, Bytes::new());
    carry::carried(connection::run(socket, terms)).await;
    drop(held);
}

/// What is wrong with a websocket handshake, if anything, checked in the order and told in the
/// words of the library openpi uses.
fn handshake_fault(headers: &HeaderMap) -> Option<(StatusCode, String)> {
    let all = |name: HeaderName| -> Vec<String> {
        let values = headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok());
        values.flat_map(|v| v.split(',')).map(|t| t.trim().to_owned()).collect()
    };
    let fault = |name: &str, values: &[String]| match values.join(", ") {
        _ if values.is_empty() => format!("missing {name} header"),
        text if text.is_empty() => format!("empty {name} header"),
        text => format!("invalid {name} header: {text}"),
    };
    let connection = all(header::CONNECTION);
    if !connection.iter().any(|t| t.eq_ignore_ascii_case("upgrade")) {
        return Some((StatusCode::UPGRADE_REQUIRED, fault("Connection", &connection)));
    }
    let protocols = all(header::UPGRADE);
    if protocols.len() != 1 || !protocols[0].eq_ignore_ascii_case("websocket") {
        return Some((StatusCode::UPGRADE_REQUIRED, fault("Upgrade", &protocols)));
    }
    let key = all(header::SEC_WEBSOCKET_KEY);
    // 16 bytes in base64.
    if key.len() != 1 || key[0].len() != 24 || !key[0].ends_with("==") {
        return Some((StatusCode::BAD_REQUEST, fault("Sec-WebSocket-Key", &key)));
    }
    let version = all(header::SEC_WEBSOCKET_VERSION);
    if version != ["13"] {
        return Some((StatusCode::BAD_REQUEST, fault("Sec-WebSocket-Version", &version)));
    }
    None
}

fn refuse_handshake(status: StatusCode, why: &str) -> Response {
    let text = format!("Failed to open a WebSocket connection: {why}.\n");
    if status != StatusCode::UPGRADE_REQUIRED {
        return plain(status, text);
    }
    let hint = "\nYou cannot access a WebSocket server directly with a browser. \
                You need a WebSocket client.\n";
    let mut response = plain(status, text + hint);
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    response
}

pub(crate) fn unauthorized() -> Response {
    let mut response = plain(
        StatusCode::UNAUTHORIZED,
        "a key is needed: `Authorization: Api-Key KEY` or `Authorization: Bearer KEY`\n",
    );
    let schemes = HeaderValue::from_static("Api-Key, Bearer");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, schemes);
    response
}

pub(crate) fn plain(status: StatusCode, text: impl Into<String>) -> Response {
    rendered(Page::text(status.as_u16(), text.into()))
}

/// Every plain answer ends its connection, as with openpi's server.
pub(crate) fn rendered(page: Page) -> Response {
    let mut response = Response::new(Body::from(page.body));
    *response.status_mut() =
        StatusCode::from_u16(page.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}
