//! The wire format of openpi: msgpack with NumPy arrays and scalars as tagged maps.
//!
//! An array is a map with the *bin* keys `__ndarray__` (true), `data` (bin, C order), `dtype` (str)
//! and `shape` (integers); a scalar one with `__npgeneric__` (true), `data`, `dtype`. Everything
//! else is plain msgpack as Python writes it: shortest integers, every float as float64.

mod decode;
mod encode;
mod ndarray;

pub use decode::{DecodeError, Limits, decode, decode_with};
pub use encode::{EncodeError, encode};
pub(crate) use ndarray::array;
