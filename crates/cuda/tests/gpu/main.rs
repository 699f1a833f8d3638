//! What needs a GPU, in one binary that can be carried to one (fixtures: `PIROUETTE_TESTDATA`).
//! Each test prints why it skips where there is none.

#[path = "../../../cpu/tests/fixture/mod.rs"]
mod fixture;
#[path = "../../../cpu/tests/reference/mod.rs"]
mod reference;

mod beside;
mod choices;
mod company;
mod conformance;
#[cfg(feature = "fault-injection")]
mod fault;
mod golden_full;
mod golden_tiny;
mod limits;
mod soak;
mod tiers;
mod trace;

use pirouette_cuda::driver::Driver;
use pirouette_cuda::{CudaDevice, Precision};
use pirouette_model::Config;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;

/// Whether there is a GPU; says why not.
///
/// # Panics
/// If there is one that can't be used: a test must not pass by skipping on a broken device.
fn has_gpu() -> bool {
    match Driver::open() {
        Ok(driver) if driver.device_count() > 0 => {
            if let Err(error) = driver.context(0) {
                panic!("there is a GPU, but it can't be used: {error}");
            }
            true
        }
        Ok(_) => {
            println!("skipped: the driver sees no device");
            false
        }
        Err(error) => {
            println!("skipped: {error}");
            false
        }
    }
}

/// Whether this is the GPU that the Hopper kernels' shapes were measured on, an H100 SXM or H200:
/// others with fewer multiprocessors, and other kinds, launch other kernels.
fn is_measured_gpu(device: &CudaDevice) -> bool {
    let properties = &device.context().properties;
    let measured = properties.capability == (9, 0) && properties.sms == 132;
    if !measured {
        println!("{}: which kernels run is not checked here", properties.name);
    }
    measured
}

/// Both models, and one at the other precision.
fn models() -> [(Config, Precision); 3] {
    let (pi0, pi05) = (Config::pi0(), Config::pi05());
    [(pi0, Precision::Bf16), (pi05, Precision::Bf16), (pi0, Precision::Fp8)]
}

/// Whether long loops and lists of shapes are cut, for tools that slow every kernel down
/// (`PIROUETTE_QUICK=1`).
fn quick() -> bool {
    std::env::var_os("PIROUETTE_QUICK").is_some_and(|v| !v.is_empty())
}

/// ‖got − want‖ / ‖want‖; infinite for anything that is no number.
fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let parts: Vec<_> =
        got.par_chunks(1 << 16).zip(want.par_chunks(1 << 16)).map(squares).collect();
    let (off, norm) = parts.iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    let error = (off / norm).sqrt();
    if error.is_finite() { error } else { f64::INFINITY }
}

/// ‖got − want‖² and ‖want‖².
fn squares((got, want): (&[f32], &[f32])) -> (f64, f64) {
    got.iter().zip(want).fold((0.0, 0.0), |(off, norm), (g, w)| {
        (off + (*g as f64 - *w as f64).powi(2), norm + (*w as f64).powi(2))
    })
}

/// A small generator: the same numbers everywhere.
struct Random(u64);

impl Random {
    /// Uniform in 0..1.
    fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 40) as f32 / (1 << 24) as f32
    }

    /// Uniform in 0..n.
    fn below(&mut self, n: usize) -> usize {
        ((self.unit() * n as f32) as usize).min(n - 1)
    }

    /// About normal, rounded to bf16.
    fn value(&mut self) -> f32 {
        let sum: f32 = (0..4).map(|_| self.unit() - 0.5).sum();
        half::bf16::from_f32(sum * 1.7).to_f32()
    }
}
