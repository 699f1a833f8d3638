//! The recorded network on CPU cores: weights packed once at load, the program interpreted by one
//! pool of threads that walk its steps together. In f32, bf16, or bf16 with some operands rounded
//! to E4M3 ([`Precision`]).
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
