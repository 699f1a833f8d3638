//! The admin listener: pages and changes, apart from the robots' port.
//!
//! It has its own bound on connections, so that a full public port can still be looked into, and
//! its own keys. Health is open on it as on the public port.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::Request;
use axum::http::{Method as HttpMethod, StatusCode, header};
use axum::response::Response;
use axum::serve::Listener;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::dashboard;
use crate::http::{page_request, plain, probe, rendered, unauthorized};
use crate::pages::{self, Method, Page};
use crate::places::Places;
use crate::quota::Pass;
use crate::serve::{Door, Shared, converse};

/// Connections at once: a scraper, a dashboard, an operator, and some room.
const MAX_CONNECTIONS: usize = 64;

/// Largest body of a `POST`.
const MAX_BODY_BYTES: usize = 64 << 10;

/// Accepts for as long as the server lives, the drain included.
pub(crate) async fn listen<L: Listener>(
    mut listener: L,
    shared: Arc<Shared>,
    draining: watch::Receiver<bool>,
) {
    let mut places = Places::new(MAX_CONNECTIONS);
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            (io, _) = listener.accept() => {
                let (own, draining) = (shared.clone(), draining.clone());
                let converse = |place| converse(io, own, draining, Door::Admin, place);
                if !places.spawn(&mut tasks, converse) {
                    shared.metrics.refused("admin_connections");
                }
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Answers one request that came through the admin listener.
pub(crate) async fn answer(
    request: Request,
    shared: &Shared,
    draining: &watch::Receiver<bool>,
) -> Response {
    let (parts, body) = request.into_parts();
    let method = match parts.method {
        HttpMethod::GET => Method::Get,
        HttpMethod::POST => Method::Post,
        _ => return plain(StatusCode::METHOD_NOT_ALLOWED, "GET and POST are known here\n"),
    };
    if method == Method::Get {
        if parts.uri.path() == "/healthz" {
            return plain(StatusCode::OK, "OK\n");
        }
        if let Some(response) = probe(parts.uri.path(), shared, draining).await {
            return response;
        }
    }
    if method == Method::Get && parts.uri.path() == dashboard::PATH {
        return rendered(Page::html(dashboard::PAGE));
    }
    // Held until the page is there, as a robot's request is.
    let mut _admitted = None;
    if let Some(keys) = &shared.options.admin_keys {
        let given = parts.headers.get(header::AUTHORIZATION).map(|v| v.as_bytes());
        let Some(account) = keys.identify(given) else {
            shared.metrics.refused("admin_unauthorized");
            return unauthorized();
        };
        let admit = |pass: Pass| match pass.admit(Instant::now(), 1) {
            Ok(admission) => Ok((pass, admission)),
            Err(error) => Err(error.message + "\n"),
        };
        match account.connect().and_then(admit) {
            Ok(admitted) => _admitted = Some(admitted),
            Err(why) => {
                shared.metrics.refused("admin_quota");
                return plain(StatusCode::TOO_MANY_REQUESTS, why);
            }
        }
    }
    let mut content = Bytes::new();
    if method == Method::Post {
        // Browsers name the page a POST comes from: no web page, of whatever site, may change
        // anything here just because its reader can reach this port.
        if parts.headers.contains_key(header::ORIGIN) {
            return plain(StatusCode::FORBIDDEN, "changes are not taken from web pages\n");
        }
        let reading = axum::body::to_bytes(body, MAX_BODY_BYTES);
        content = match tokio::time::timeout(shared.options.handshake_timeout, reading).await {
            Ok(Ok(content)) => content,
            Ok(Err(_)) => {
                return plain(StatusCode::PAYLOAD_TOO_LARGE, "the body is cut or above 64 KiB\n");
            }
            Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "the body took too long\n"),
        };
    }
    match pages::page(shared, page_request(method, &parts.uri, content)).await {
        Some(page) => rendered(page),
        None => plain(StatusCode::NOT_FOUND, "there is no such page: try /metrics\n"),
    }
}
