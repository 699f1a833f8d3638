//! A model's full-size random weights → a checkpoint as openpi's PyTorch code writes it, in bf16:
//! `model.safetensors`, 6.5 GB. For what depends on files: start-up, hot swap, `inspect`.
//!
//! `cargo run --release -p pirouette-checkpoint --example write_random -- DIR [pi0|pi05]`

use std::error::Error;
use std::fs::{File, create_dir_all};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use pirouette_checkpoint::Synthetic;
use pirouette_model::{Config, TensorSource};
use serde_json::{Map, json};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or("usage: write_random DIR [pi0|pi05]")?);
    let config = match arguments.next().as_deref() {
        None | Some("pi0") => Config::pi0(),
        Some("pi05") => Config::pi05(),
        Some(other) => return Err(format!("no model {other}: pi0 or pi05").into()),
    };
    let source = Synthetic::new(&config, 1);
    let names = source.names();
    let (mut header, mut end) = (Map::new(), 0);
    for name in &names {
        let shape = source.shape(name).unwrap_or_default();
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, end] });
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header)?;
    create_dir_all(&folder)?;
    let mut file = BufWriter::new(File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for name in &names {
        file.write_all(&source.load(name)?.data)?;
    }
    file.flush()?;
    println!("{} tensors, {end} bytes in {}", names.len(), folder.display());
    Ok(())
}
