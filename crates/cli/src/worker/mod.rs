//! A device in a process of its own, so that one that breaks takes nothing else with it: an illegal
//! address on one GPU ends all use of CUDA in its process, on every GPU.
//!
//! The server starts `pirouette worker` for a device and speaks with it over a socket, its standard
//! input: one line of JSON asks, one answers. Images, numbers and actions lie in a file in memory,
//! its standard output, where [`Places`] says. The process ends with the socket, also in a run.

mod child;
mod parent;
mod watch;

use std::io::{self, BufRead, Read, Write};

use pirouette_model::{BackendError, Program, Rtc, Shape, StageTimes};
use serde::{Deserialize, Serialize};

use crate::model::Open;

pub use child::run;
pub use parent::ProcessDevice;

/// Longest line: the first names every file of a checkpoint, which may be thousands.
const LINE_LIMIT: u64 = 8 << 20;

/// Most bytes of an error's text, which may be a compiler's whole log: escaped it fits a line.
const TEXT_LIMIT: usize = 8 << 10;

/// What the server asks.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// Once, first.
    Open(Open),
    Compile {
        id: u64,
        shape: WireShape,
    },
    /// A run is about to be asked for. No answer.
    Wake,
    /// Inputs lie in the file; `previous`: chunks of real-time chunking, too.
    Run {
        id: u64,
        previous: bool,
    },
    /// No answer.
    Forget {
        id: u64,
    },
}

/// What the process answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Opened { name: String, weight_bytes: u64 },
    Compiled,
    Ran { times: [f64; 6] },
    Failed(Failure),
}

/// A [`BackendError`] on its way.
#[derive(Debug, Serialize, Deserialize)]
enum Failure {
    Unavailable(String),
    Stale(String),
    Unsupported(String),
    Device(String),
    OutOfMemory { what: String, device: String, needed_bytes: u64, free_bytes: u64 },
}

impl From<BackendError> for Failure {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::OutOfMemory { what, device, needed_bytes, free_bytes } => {
                Failure::OutOfMemory { what, device, needed_bytes, free_bytes }
            }
            BackendError::Stale(text) => Failure::Stale(shortened(text)),
            BackendError::Unsupported(text) => Failure::Unsupported(shortened(text)),
            BackendError::Device(text) => Failure::Device(shortened(text)),
            other => Failure::Unavailable(shortened(other.to_string())),
        }
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > TEXT_LIMIT {
        text.truncate(text.floor_char_boundary(TEXT_LIMIT));
        text.push_str(" …");
    }
    text
}

impl From<Failure> for BackendError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::OutOfMemory { what, device, needed_bytes, free_bytes } => {
                BackendError::OutOfMemory { what, device, needed_bytes, free_bytes }
            }
            Failure::Unsupported(text) => BackendError::Unsupported(text),
            Failure::Device(text) => BackendError::Device(text),
            Failure::Stale(text) => BackendError::Stale(text),
            Failure::Unavailable(text) => BackendError::Unavailable(text),
        }
    }
}

/// A [`Shape`] on its way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct WireShape {
    sizes: [usize; 5],
    rtc: u8,
}

impl From<Shape> for WireShape {
    fn from(s: Shape) -> Self {
        let rtc = match s.rtc {
            Rtc::Off => 0,
            Rtc::Guided => 1,
            Rtc::Trained => 2,
        };
        WireShape { sizes: [s.batch, s.cameras, s.prompt_tokens, s.horizon, s.steps], rtc }
    }
}

impl From<WireShape> for Shape {
    fn from(wire: WireShape) -> Self {
        let [batch, cameras, prompt_tokens, horizon, steps] = wire.sizes;
        let rtc = match wire.rtc {
            0 => Rtc::Off,
            1 => Rtc::Guided,
            _ => Rtc::Trained,
        };
        Shape { batch, cameras, prompt_tokens, horizon, steps, rtc }
    }
}

fn times_to_wire(t: StageTimes) -> [f64; 6] {
    let StageTimes { copy_in_ms, vision_ms, prefill_ms, denoise_ms, copy_out_ms, total_ms } = t;
    [copy_in_ms, vision_ms, prefill_ms, denoise_ms, copy_out_ms, total_ms]
}

fn times_from_wire(wire: [f64; 6]) -> StageTimes {
    let [copy_in_ms, vision_ms, prefill_ms, denoise_ms, copy_out_ms, total_ms] = wire;
    StageTimes { copy_in_ms, vision_ms, prefill_ms, denoise_ms, copy_out_ms, total_ms }
}

/// Elements of what goes to and fro, in the order in which they lie in the file, each from a
/// multiple of 64 bytes on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Places {
    images: usize,
    cameras: usize,
    tokens: usize,
    prompt_len: usize,
    state: usize,
    noise: usize,
    weights: usize,
    limits: usize,
}

impl Places {
    fn of(program: &Program) -> Self {
        let (shape, config) = (&program.shape, &program.config);
        Places {
            images: shape.batch * shape.cameras * config.vision.image.pow(2) * 3,
            cameras: shape.batch,
            tokens: shape.batch * shape.prompt_tokens,
            prompt_len: shape.batch,
            state: shape.batch * config.action_dim,
            noise: shape.batch * shape.horizon * config.action_dim,
            weights: shape.batch * shape.horizon,
            limits: shape.batch,
        }
    }

    /// Byte offsets: images, cameras, tokens, prompt lengths, state, noise, previous chunks, their
    /// weights, their limits, actions, the end.
    fn offsets(&self) -> [u64; 11] {
        let words = [
            self.cameras,
            self.tokens,
            self.prompt_len,
            self.state,
            self.noise,
            self.noise,
            self.weights,
            self.limits,
            self.noise,
        ];
        let mut offsets = [0; 11];
        let mut end = self.images;
        for (offset, words) in offsets[1..].iter_mut().zip(words) {
            let begin = end.next_multiple_of(64);
            *offset = begin as u64;
            end = begin + 4 * words;
        }
        offsets[10] = end as u64;
        offsets
    }
}

fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// The next message; `None` when the other side has gone.
fn receive<T: for<'a> Deserialize<'a>>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.take(LINE_LIMIT).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "a line breaks off")),
    }
}

#[cfg(test)]
mod tests {
    use pirouette_model::{Config, WeightTable, record_with};

    use super::*;

    #[test]
    fn errors_and_shapes_arrive_as_they_were() {
        let memory = || BackendError::OutOfMemory {
            what: "activations".into(),
            device: "cuda:0".into(),
            needed_bytes: 7,
            free_bytes: 3,
        };
        for error in [
            memory(),
            BackendError::Device("gone".into()),
            BackendError::Unsupported("rtc".into()),
            BackendError::Unavailable("no GPU".into()),
            BackendError::Stale("other files".into()),
        ] {
            let (text, stale) = (error.to_string(), matches!(error, BackendError::Stale(_)));
            let mut wire = Vec::new();
            send(&mut wire, &Answer::Failed(error.into())).unwrap();
            let Some(Answer::Failed(back)) = receive(&mut &wire[..]).unwrap() else {
                panic!("{text}")
            };
            let back = BackendError::from(back);
            assert_eq!((back.to_string(), matches!(back, BackendError::Stale(_))), (text, stale));
        }
        // A compiler's log, at its worst.
        let log = "\u{1}".repeat(1 << 20);
        let mut wire = Vec::new();
        send(&mut wire, &Answer::Failed(BackendError::Unavailable(log).into())).unwrap();
        let back = receive(&mut &wire[..]).unwrap();
        assert!(matches!(back, Some(Answer::Failed(Failure::Unavailable(_)))));
        for rtc in [Rtc::Off, Rtc::Guided, Rtc::Trained] {
            let shape =
                Shape { batch: 3, cameras: 2, prompt_tokens: 16, horizon: 50, steps: 10, rtc };
            assert_eq!(Shape::from(WireShape::from(shape)), shape);
        }
    }

    #[test]
    fn a_broken_line_is_an_error_and_the_end_is_none() {
        assert!(receive::<Ask>(&mut &b""[..]).unwrap().is_none());
        assert!(receive::<Ask>(&mut &b"{\"Forget\":"[..]).is_err());
        assert!(receive::<Ask>(&mut &b"[]\n"[..]).is_err());
    }

    #[test]
    fn places_do_not_overlap() {
        let config = Config::pi0();
        let shape =
            Shape { batch: 3, cameras: 2, prompt_tokens: 17, horizon: 11, steps: 2, rtc: Rtc::Off };
        let program = record_with(WeightTable::new(config, 2).into(), shape).unwrap();
        let places = Places::of(&program);
        let offsets = places.offsets();
        assert!(offsets[1] >= places.images as u64);
        assert!(offsets.windows(2).all(|pair| pair[0] < pair[1]), "{offsets:?}");
        assert!(offsets[1..10].iter().all(|offset| offset % 64 == 0));
        assert_eq!(offsets[10] - offsets[9], 3 * 11 * 32 * 4);
    }
}
