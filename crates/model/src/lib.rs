//! π0 and π0.5 as one recorded program: sizes, weights table, steps. No I/O, threads or unsafe.
//!
//! [`record`] writes the network down as a flat list of named steps over an arena of buffers:
//! images and prompt → `vision` → `prefill` → `denoise` → actions. A backend ([`Device`]) loads the
//! [`weights::WeightTable`] once and compiles any number of programs against it.
#![deny(missing_docs)]
#![forbid(unsafe_code)]

pub mod arena;
pub mod backend;
mod check;
pub mod config;
pub mod cost;
mod denoise;
mod fold;
pub mod fp8;
mod prefill;
pub mod program;
mod record;
pub mod rtc;
pub mod schedule;
pub mod source;
mod vision;
pub mod weights;

pub use backend::{BackendError, Device, Executable, Images, Inputs, Previous, StageTimes};
pub use check::Defect;
pub use config::{Config, Family};
pub use fold::WeightRows;
pub use program::{Program, Shape};
pub use record::{ShapeError, record, record_with};
pub use rtc::{PreviousChunk, Rtc};
pub use source::{DType, MemorySource, OpenTensor, ReadBytes, SourceError, Tensor, TensorSource};
pub use weights::WeightTable;
