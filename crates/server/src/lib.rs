//! The server: openpi's websocket dialect, health, metrics.
//!
//! A frame comes in, [`msgpack`] makes a [`pirouette_policy::Value`] of it, a [`Service`] makes
//! actions of that, and they go back in the bytes openpi's own server would send. [`serve`] runs
//! it over any listener; [`load`] is the other side of the wire, for measurements.
//!
//! Plain HTTP on the same port: `/healthz` (as openpi's), `/livez`, `/readyz`, `/metrics`,
//! `/contract`; everything else asks for an upgrade.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod connection;
mod fields;
mod http;
mod keys;
pub mod load;
mod metrics;
pub mod msgpack;
mod options;
mod render;
mod rtc;
mod serve;
mod service;

pub use keys::{ApiKeys, KeyFileError};
pub use options::{ExposureError, ServeOptions, check_exposure};
pub use render::render_engine;
pub use rtc::{LeftOver, RtcFields, Space};
pub use serve::{Served, bind, serve, termination};
pub use service::{
    Failure, GivenNoise, Reply, RequestContext, Service, ServiceError, ServiceFuture,
};
