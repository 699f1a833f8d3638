//! The recorded network on CPU cores: weights packed once at load, the program interpreted by one
//! pool of threads that walk its steps together.
#![deny(missing_docs)]

mod device;
mod driver;
mod executable;
mod gemm;
mod plan;
pub mod probe;
mod weights;

pub use device::{CpuDevice, Options, Precision, features, load, load_table};
pub use executable::{Arena, CpuExecutable, Observer};
pub use gemm::Isa;
