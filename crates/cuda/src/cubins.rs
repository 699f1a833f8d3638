//! The compiled kernels this crate carries, and their sources where other GPUs may need them.

use std::sync::Arc;

use pirouette_model::BackendError;

use crate::driver::nvrtc::{self, Source};
use crate::driver::{Context, Module};

/// One compiled file of `kernels/`.
struct Cubin {
    stem: &'static str,
    sm_90a: &'static [u8],
    /// The portable tier's source, for NVRTC; `None` for kernels that need Hopper.
    source: Option<&'static str>,
}

macro_rules! hopper {
    ($stem:literal) => {
        Cubin {
            stem: $stem,
            sm_90a: include_bytes!(concat!("../cubin/", $stem, ".sm_90a.cubin")),
            source: None,
        }
    };
}

macro_rules! portable {
    ($stem:literal) => {
        Cubin { source: Some(include_str!(concat!("../kernels/", $stem, ".cu"))), ..hopper!($stem) }
    };
}

static CUBINS: &[Cubin] = &[
    hopper!("attention_prefill_sm90"),
    hopper!("attention_suffix"),
    hopper!("attention_vision_sm90"),
    hopper!("denoise_beside"),
    hopper!("denoise_edge"),
    hopper!("denoise_load"),
    hopper!("denoise_product"),
    hopper!("denoise_rim_load"),
    hopper!("denoise_wide"),
    hopper!("embed"),
    hopper!("gemm_e4m3_sm90"),
    hopper!("gemm_loop_sm90"),
    hopper!("gemm_sm90"),
    hopper!("patchify"),
    portable!("portable_attention"),
    portable!("portable_guide"),
    portable!("portable_linear"),
    portable!("portable_rim"),
    portable!("portable_rows"),
    hopper!("rows_e4m3"),
    #[cfg(feature = "fault-injection")]
    portable!("portable_fault"),
];

/// Headers the portable sources include.
static HEADERS: &[(&str, &str)] = &[("portable.cuh", include_str!("../kernels/portable.cuh"))];

/// Whether the Hopper kernels run on this device.
pub(crate) fn is_hopper(context: &Context) -> bool {
    context.properties.capability == (9, 0)
}

/// Loads `kernels/<stem>.cu`: the embedded cubin on Hopper, else compiled for the device at hand.
pub(crate) fn load(context: &Arc<Context>, stem: &str) -> Result<Arc<Module>, BackendError> {
    let cubin = CUBINS.iter().find(|c| c.stem == stem);
    let missing = || BackendError::Unavailable(format!("no kernel file `{stem}` was built in"));
    let cubin = cubin.ok_or_else(missing)?;
    if is_hopper(context) {
        return Module::load(context, stem, cubin.sm_90a);
    }
    let text = cubin.source.ok_or_else(|| {
        BackendError::Unavailable(format!("the kernels of `{stem}` need a Hopper GPU"))
    })?;
    let name = format!("{stem}.cu");
    let source = Source { name: &name, text, headers: HEADERS };
    Module::load(context, stem, &nvrtc::cubin(&source, context.properties.capability)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_sources_compile_for_every_generation() {
        for cubin in CUBINS {
            let Some(text) = cubin.source else { continue };
            let name = format!("{}.cu", cubin.stem);
            let source = Source { name: &name, text, headers: HEADERS };
            for capability in [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)] {
                match nvrtc::compile_uncached(&source, capability) {
                    Some(compiled) => assert!(compiled.unwrap().starts_with(b"\x7fELF")),
                    None => return println!("skipped: NVRTC is not installed"),
                }
            }
        }
    }
}
