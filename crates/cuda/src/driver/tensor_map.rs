//! Tensor maps: how Hopper's copy engine reads boxes of a matrix.

use pirouette_model::BackendError;

use super::Context;

/// `CUtensorMap`: opaque, aligned to 128 bytes since CUDA 13.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap([u64; 16]);

// SAFETY: an array of integers whose size is its alignment: no padding, any bits are valid.
unsafe impl bytemuck::Zeroable for TensorMap {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for TensorMap {}

/// How the copy engine permutes 16-byte pieces in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Swizzle {
    /// As they lie.
    None = 0,
    /// Within 32 bytes.
    B32 = 1,
    /// Within 64 bytes.
    B64 = 2,
    /// Within 128 bytes.
    B128 = 3,
}

/// What a tensor's elements are to the copy engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Stored {
    /// Bytes.
    U8 = 0,
    /// bf16
    Bf16 = 9,
}

/// A tensor of up to five axes, innermost first.
#[derive(Clone, Debug)]
pub struct TensorMapSpec<'a> {
    /// Device address, a multiple of 16.
    pub address: u64,
    /// Extents, innermost first.
    pub extents: &'a [u64],
    /// Bytes from one index to the next of every axis but the innermost; multiples of 16.
    pub strides_bytes: &'a [u64],
    /// Extents of a box.
    pub boxes: &'a [u32],
    /// Permutation in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// Encodes a map of bf16.
    pub fn bf16(context: &Context, spec: &TensorMapSpec<'_>) -> Result<Self, BackendError> {
        Self::new(context, Stored::Bf16, spec)
    }

    /// Encodes a map; what lies outside the extents reads as zero and is not written.
    pub fn new(
        context: &Context,
        stored: Stored,
        spec: &TensorMapSpec<'_>,
    ) -> Result<Self, BackendError> {
        let rank = spec.extents.len();
        assert!((1..=5).contains(&rank) && spec.boxes.len() == rank);
        assert_eq!(spec.strides_bytes.len(), rank - 1);
        const PROMOTE_256: i32 = 3;
        let steps = [1u32; 5];
        let mut map = TensorMap([0; 16]);
        // SAFETY: the arrays have `rank` (strides: rank − 1) elements as asserted and outlive the
        // call; the address is only stored.
        let code = unsafe {
            (context.cuda().tensor_map)(
                &mut map,
                stored as i32,
                rank as u32,
                spec.address as *mut _,
                spec.extents.as_ptr(),
                spec.strides_bytes.as_ptr(),
                spec.boxes.as_ptr(),
                steps.as_ptr(),
                0,
                spec.swizzle as i32,
                PROMOTE_256,
                0,
            )
        };
        context.check(&format!("cuTensorMapEncodeTiled of {spec:?}"), code)?;
        Ok(map)
    }
}
