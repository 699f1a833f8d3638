//! π0 and π0.5 on NVIDIA GPUs: weights packed once, a program captured into one graph.
//!
//! Opens the driver at run time ([`driver::Driver::open`]), so that the binary starts without it.
//! Hopper runs hand-written kernels; every GPU from Ampere on runs the portable tier.

pub mod attention;
pub mod bind;
mod cubins;
pub mod denoise;
pub mod denoise_pack;
mod device;
pub mod driver;
mod executable;
pub mod gauge;
pub mod gemm;
pub mod gemm_tiles;
mod inspect;
pub mod layout;
pub mod load;
pub mod portable;
mod tier_beside;
mod tier_hopper;
mod tier_loop;
mod tier_portable;
mod trace;
mod trace_order;

pub use device::{Choices, CudaDevice, Tier};
pub use executable::{CudaExecutable, TimedRun};
pub use load::Precision;
pub use trace::{ReplayTrace, TracedNode};
