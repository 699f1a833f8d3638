//! The server: openpi's websocket dialect and its relatives, health, metrics.
//!
//! A frame comes in, [`msgpack`] makes a [`pirouette_policy::Value`] of it, a [`Service`] makes
//! actions of that, and they go back in the bytes openpi's own server would send. [`serve`] runs
//! it over any listener; [`load`] is the other side of the wire, for measurements.
//!
//! Plain HTTP on the same port: `/healthz` (as openpi's), `/livez`, `/readyz`, `/health` (as
//! vla-eval's), and the pages of [`Page`] unless they have a listener of their own; everything
//! else asks for an upgrade.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod admin;
mod busy;
mod carry;
mod chrome_trace;
mod connection;
mod dashboard;
pub mod dialect;
mod explain;
mod fields;
mod http;
mod keys;
mod lerobot;
pub mod load;
mod metrics;
pub mod msgpack;
mod newest;
mod options;
mod pages;
pub mod pickle;
mod places;
mod preparation;
mod quota;
mod recent;
mod record;
mod reload;
mod render;
mod rtc;
mod seldom;
mod serve;
mod service;
mod socket;
mod termination;
mod tls;
mod trace;
mod validity;

pub use axum::serve::Listener;
pub use chrome_trace::{ChromeTrace, Track};
pub use dialect::Dialect;
pub use explain::{Spans, timing};
pub use keys::{ApiKeys, KeyFileError};
pub use newest::Ticket;
pub use options::{
    ExposureError, ServeOptions, check_admin_exposure, check_exposure, check_lerobot_exposure,
};
pub use pages::{Method, Page, PageRequest};
pub use preparation::{Preparation, Prepared};
pub use record::{LeftOut, RecordOptions, Recorded, Recorder, Recording, RecordingError};
pub use reload::expect_hangup;
pub use render::render_engine;
pub use rtc::{LeftOver, RtcFields, Space};
pub use seldom::Seldom;
pub use serve::{Doors, Served, bind, serve, serve_doors};
pub use service::{
    Failure, GivenNoise, GpuReading, Reply, RequestContext, Service, ServiceError, ServiceFuture,
};
pub use termination::Termination;
pub use tls::{Tls, TlsError};
