//! `cargo run --release -p pirouette-cpu --example step_times [threads] [runs]`: π0 on made-up
//! weights → milliseconds of each kind of step.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use pirouette_checkpoint::Synthetic;
use pirouette_cpu::{Options, load};
use pirouette_model::{
    Config, DType, Executable, Images, Inputs, Rtc, Shape, SourceError, Tensor, TensorSource,
    record,
};

/// The tensors of a model, filled with one short sequence over and over: quick to make.
struct Repeated {
    shapes: Synthetic,
    sequence: Vec<u8>,
}

impl TensorSource for Repeated {
    fn origin(&self) -> String {
        "a repeated sequence".into()
    }
    fn names(&self) -> Vec<String> {
        self.shapes.names()
    }
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.shape(name)
    }
    fn load(&self, name: &str) -> Result<Tensor<'_>, SourceError> {
        let Some(shape) = self.shape(name) else { return self.shapes.load(name) };
        let bytes = 2 * shape.iter().product::<usize>();
        let mut data = Vec::with_capacity(bytes + self.sequence.len());
        while data.len() < bytes {
            data.extend_from_slice(&self.sequence);
        }
        data.truncate(bytes);
        Ok(Tensor { shape, dtype: DType::Bf16, data: Cow::Owned(data) })
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let number = |at: usize| std::env::args().nth(at).and_then(|a| a.parse::<usize>().ok());
    let (threads, runs) = (number(1), number(2).unwrap_or(3));
    let config = Config::pi0();
    let sequence = (0..999_983u64)
        .flat_map(|i| {
            let z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let v = ((z ^ z >> 29) as u16 as f32 / 32768.0 - 1.0) * 0.03;
            ((v.to_bits() >> 16) as u16).to_le_bytes()
        })
        .collect();
    let source = Repeated { shapes: Synthetic::new(&config, 1), sequence };
    let start = Instant::now();
    let options = Options { threads, ..Options::default() };
    let mut device = load(config, 10, &source, options, &mut |_, _| {})?;
    println!("loaded in {:.1} s", start.elapsed().as_secs_f64());
    let shape =
        Shape { batch: 1, cameras: 3, prompt_tokens: 20, horizon: 10, steps: 10, rtc: Rtc::Off };
    let program = Arc::new(record(&config, shape)?);
    let images: Vec<u8> = (0..3 * 224 * 224 * 3).map(|i| (i * 7 % 251) as u8).collect();
    let noise: Vec<f32> = (0..10 * 32).map(|i| (i % 13) as f32 / 6.0 - 1.0).collect();
    let (state, tokens) = (vec![0.1; 32], vec![7; 20]);
    let (prompt_len, cameras) = ([20], [3]);
    let inputs = Inputs {
        images: Images::Packed(&images),
        cameras: &cameras,
        tokens: &tokens,
        prompt_len: &prompt_len,
        state: &state,
        noise: &noise,
        previous: None,
    };
    let mut actions = vec![0.0; noise.len()];
    let mut executable = device.compile_cpu(program.clone())?;
    executable.time_steps(true);
    for _ in 0..=runs {
        let t = executable.run(&inputs, &mut actions)?;
        println!(
            "{:.0} ms: vision {:.0}, prefill {:.0}, denoise {:.0}",
            t.total_ms, t.vision_ms, t.prefill_ms, t.denoise_ms
        );
        let mut kinds = BTreeMap::new();
        for (step, ms) in program.steps.iter().zip(executable.step_ms()) {
            let kind: String = step.name.chars().filter(|c| !c.is_ascii_digit()).collect();
            *kinds.entry(kind).or_insert(0.0) += ms;
        }
        let parts = kinds.iter().map(|(kind, ms)| format!("{kind} {ms:.1}"));
        println!("  {}", parts.collect::<Vec<_>>().join(", "));
    }
    Ok(())
}
