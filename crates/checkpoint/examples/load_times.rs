//! Times of the loader's parts on full-size tensors: synthetic weights, transposition, zstd.
//!
//! `cargo run --release -p pirouette-checkpoint --example load_times`

use std::path::Path;
use std::time::Instant;

use pirouette_checkpoint::Synthetic;
use pirouette_checkpoint::orbax::permute::permuted;
use pirouette_checkpoint::orbax::zarr::{parse_zarray, read_array};
use pirouette_model::config::names;
use pirouette_model::{Config, TensorSource};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads = rayon::current_num_threads();
    println!("{threads} threads");

    // One layer's worth of the largest matrix, repeated to 256 Mi elements.
    let source = Synthetic::new(&Config::pi0(), 1);
    let start = Instant::now();
    let mut elements = 0;
    let mut layer = Vec::new();
    for i in 0..8 {
        let tensor = source.load(&format!("{}layers.{i}.mlp.gate_proj.weight", names::PREFIX))?;
        elements += tensor.len();
        layer = tensor.data.into_owned();
    }
    let rate = elements as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!(
        "synthetic bf16: {elements} elements, {rate:.0} M/s, {:.0} M/s per thread, \
         {:.1} s for full-size π0",
        rate / threads as f64,
        3238.0 / rate
    );

    for (size, what) in [(2, "bf16"), (4, "f32")] {
        let block = layer.repeat(size / 2);
        let best = (0..5)
            .map(|_| {
                let start = Instant::now();
                let out = permuted(&block, &[2048, 16384], &[1, 0], size);
                assert_eq!(out[..2], block[..2]);
                start.elapsed()
            })
            .min()
            .unwrap_or_default();
        println!("transpose 2048 x 16384 {what}: {:.1} ms", best.as_secs_f64() * 1e3);
    }

    // A chunk that TensorStore wrote.
    let array = "B_jax/ckpt_pi0_fp32_noocdbt/params/params.PaliGemma.llm.layers.mlp.gating_einsum";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(array);
    let meta = parse_zarray(&std::fs::read(folder.join(".zarray"))?)?;
    let frame = std::fs::read(folder.join("0.0.0.0"))?;
    let start = Instant::now();
    let mut bytes = 0;
    for _ in 0..500 {
        bytes += read_array(&meta, &|_: &str| Ok(Some((frame.len() as u64, &frame[..]))))?.len();
    }
    let rate = bytes as f64 / start.elapsed().as_secs_f64() / 1e6;
    println!("zstd f32: {} -> {} bytes, {rate:.0} MB/s on one thread", frame.len(), meta.bytes());
    Ok(())
}
