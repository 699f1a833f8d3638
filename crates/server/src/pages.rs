//! A plain HTTP request → a page: `/metrics`, `/contract`, `/trace`, and whatever the service adds.
//!
//! Pages are answered on the public port, or, once there is an admin listener, on that alone.
//! Whatever changes something is a `POST`, and those are known to the admin listener only.

use std::time::Duration;

use bytes::Bytes;

use crate::dashboard;
use crate::quota;
use crate::render::{header, render_gpus, sample};
use crate::serve::Shared;
use crate::tls::Tls;
use crate::trace;

/// The two methods pages are asked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Reads; answered on the public port too when there is no admin listener.
    Get,
    /// Changes; answered by the admin listener alone.
    Post,
}

/// What is asked for. The keys of the listener have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Reading or changing.
    pub method: Method,
    /// Without the query: `/trace`.
    pub path: String,
    /// What follows the `?`: `seconds=2`; empty if nothing does.
    pub query: String,
    /// Of a `POST`, at most 64 KiB.
    pub body: Bytes,
}

impl PageRequest {
    /// The value of a parameter of the query, as it was sent (nothing is unescaped).
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let pairs = self.query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value).next()
    }
}

/// An answer. It must hold no secrets; paths only where `--admin-port` is the only way to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// HTTP's: 200, 400, 404, 409, ….
    pub status: u16,
    /// MIME type.
    pub content_type: &'static str,
    /// The text.
    pub body: Bytes,
}

impl Page {
    /// Plain text.
    pub fn text(status: u16, body: impl Into<Bytes>) -> Self {
        Page { status, content_type: "text/plain; charset=utf-8", body: body.into() }
    }

    /// JSON.
    pub fn json(status: u16, body: impl Into<Bytes>) -> Self {
        Page { status, content_type: "application/json", body: body.into() }
    }

    /// A page for people.
    pub fn html(body: impl Into<Bytes>) -> Self {
        Page { status: 200, content_type: "text/html; charset=utf-8", body: body.into() }
    }
}

/// Answers a request, or `None` when nobody knows the path: the server's own pages come first.
pub(crate) async fn page(shared: &Shared, request: PageRequest) -> Option<Page> {
    match (request.method, request.path.as_str()) {
        (Method::Get, "/metrics") => {
            let mut text = String::with_capacity(16 << 10);
            shared.metrics.render(shared.open_websockets(), &mut text);
            if let Some(places) = &shared.busy {
                let name = "pirouette_busy_connections";
                header(&mut text, name, "gauge", "Websockets of the thread that stays awake.");
                sample(&mut text, name, &[], places.taken() as f64);
                let name = "pirouette_busy_looks_total";
                header(&mut text, name, "counter", "Looks of that thread instead of sleep.");
                sample(&mut text, name, &[], places.looks() as f64);
            }
            if let Some(keys) = &shared.options.api_keys {
                quota::render(&keys.accounts(), &mut text);
            }
            if let Some(at) = shared.options.tls.as_ref().and_then(Tls::expires) {
                let name = "pirouette_certificate_expires_seconds";
                header(&mut text, name, "gauge", "When the certificate expires, since 1970.");
                sample(&mut text, name, &[], at as f64);
            }
            shared.service.metrics(&mut text);
            if let Some(recorder) = &shared.options.recorder {
                recorder.render(&mut text);
            }
            render_gpus(&dashboard::gpus(shared).await, &mut text);
            let content_type = "text/plain; version=0.0.4; charset=utf-8";
            Some(Page { status: 200, content_type, body: text.into() })
        }
        (Method::Get, "/stats") => Some(Page::json(200, dashboard::stats(shared).await)),
        (Method::Get, "/trace") => Some(trace(shared, &request).await),
        (Method::Get, "/contract") => Some(Page::json(200, shared.service.contract())),
        _ => shared.service.page(request).await,
    }
}

/// `/trace?seconds=N`: answers after N seconds.
async fn trace(shared: &Shared, request: &PageRequest) -> Page {
    let seconds = request.parameter("seconds").and_then(|n| n.parse().ok());
    let Some(seconds) = seconds.filter(|s| (1..=trace::MAX_SECONDS).contains(s)) else {
        let most = trace::MAX_SECONDS;
        return Page::text(400, format!("/trace?seconds=N traces for N seconds, 1 to {most}\n"));
    };
    let Ok(_one) = shared.tracing.try_acquire() else {
        return Page::text(409, "a trace is being taken: try again when it is over\n");
    };
    Page::json(200, trace::collect(shared, Duration::from_secs(seconds)).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_a_query() {
        let query = "seconds=2&x=&seconds=3&flag&=4".to_string();
        let (path, body) = ("/trace".to_string(), Bytes::new());
        let request = PageRequest { method: Method::Get, path, query, body };
        assert_eq!(request.parameter("seconds"), Some("2"));
        assert_eq!(request.parameter("x"), Some(""));
        assert_eq!((request.parameter("flag"), request.parameter("second")), (None, None));
    }
}
