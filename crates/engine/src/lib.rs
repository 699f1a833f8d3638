//! Requests in, actions out: queue → batch → device thread.
//!
//! [`Engine::start`] gives every device one thread of its own. Requests wait in one bounded queue,
//! earliest deadline first; a device that becomes free takes the head and whatever fits into a
//! batch with it. A device that fails, panics or hangs answers its requests with an error and is
//! reopened; nothing stale, partial or non-finite ever leaves.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod batches;
mod bucket;
mod canary;
mod engine;
mod finish;
mod leisure;
mod lookout;
mod noise;
mod null;
mod options;
mod queue;
mod request;
mod ring;
mod session;
mod shared;
mod staging;
mod stats;
mod swap;
mod times;
mod worker;

pub use batches::BatchRecord;
pub use bucket::{Bucket, BucketRule};
pub use canary::CanaryOptions;
pub use engine::{Engine, Pending};
pub use leisure::take_leisure;
pub use noise::{draw_seed, standard_normal};
pub use null::{Fault, NullDevice, NullTimes};
pub use options::{DeviceFactory, EngineOptions};
pub use request::{Answer, Company, EngineError, Noise, Request, Timing};
pub use ring::Ring;
pub use shared::{DeviceStatus, Phase};
pub use stats::{HISTOGRAM_BOUNDS_MS, Histogram, Stage, StatsSnapshot};
pub use swap::{SwapError, SwapReport};
