//! The process's side: a device of this process, run as the server asks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytemuck::{Pod, cast_slice, cast_slice_mut};
use pirouette_model::{
    BackendError, Config, Device, Executable, Images, Inputs, Previous, Shape, ShapeError,
    WeightTable, record_with,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use super::watch::watch;
use super::{Answer, Ask, Places, receive, send, times_to_wire};
use crate::{log, model};

/// How long the thread stays awake for a run that was announced: inputs of a full batch take
/// milliseconds to write, those of one request a tenth of one.
const LOOKOUT: Duration = Duration::from_micros(500);

/// Time to end by itself once the server is gone. After that not even a load or a GPU that hangs
/// keeps the GPU's memory from the next server.
const ALONE: Duration = Duration::from_secs(2);

/// `pirouette worker`: serves one device until the socket closes or the device breaks.
pub fn run() -> Result<()> {
    let usage = "`worker` is what `serve` starts for a GPU: it is of no use by itself";
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    control.peer_addr().context(usage)?;
    end_with_the_server(control.try_clone()?)?;
    let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Whoever ends all processes of a service wants the server to drain; this one ends with it.
    let _kept = {
        let _entered = runtime.enter();
        [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?]
    };
    let mut stream = BufReader::new(control);
    let Some(Ask::Open(open)) = receive(&mut stream)? else { bail!(usage) };
    log::start(open.log)?;
    let (config, device) = match model::open_here(&open) {
        Ok(opened) => opened,
        Err(error) => return Ok(send(stream.get_mut(), &failed(error))?),
    };
    let opened = Answer::Opened { name: device.name(), weight_bytes: device.weight_bytes() };
    send(stream.get_mut(), &opened)?;
    let mut worker = Worker { config, device, file, programs: BTreeMap::new(), tables: vec![] };
    while let Some(ask) = receive(&mut stream)? {
        let answer = match ask {
            Ask::Forget { id } => {
                worker.programs.remove(&id);
                continue;
            }
            Ask::Wake => {
                watch(&mut stream, Instant::now(), LOOKOUT)?;
                continue;
            }
            Ask::Compile { id, shape } => worker.compile(id, shape.into()),
            Ask::Run { id, previous } => worker.run(id, previous),
            Ask::Open(_) => Err(BackendError::Device("it is open already".into())),
        };
        let answer = answer.unwrap_or_else(failed);
        send(stream.get_mut(), &answer)?;
        if let Answer::Failed(super::Failure::Device(_)) = answer {
            break;
        }
    }
    Ok(())
}

/// The answer to what failed. The server may end this process as soon as it has it, so what the log
/// says about it goes first.
fn failed(error: BackendError) -> Answer {
    log::flush();
    Answer::Failed(error.into())
}

/// Kills this process if it is still there a while after the other end of the socket closed:
/// whoever runs, loads or compiles reads no socket.
fn end_with_the_server(control: UnixStream) -> io::Result<()> {
    let watch = move || {
        let mut hung_up = [PollFd::new(&control, PollFlags::RDHUP)];
        while poll(&mut hung_up, None) == Err(Errno::INTR) {}
        std::thread::sleep(ALONE);
        // Not by exit, which would wait for a driver that is busy. This can't fail.
        let _ = kill_process(getpid(), Signal::KILL);
    };
    std::thread::Builder::new().name("server-watch".into()).spawn(watch).map(drop)
}

struct Worker {
    config: Config,
    device: Box<dyn Device>,
    file: File,
    programs: BTreeMap<u64, Compiled>,
    tables: Vec<Arc<WeightTable>>,
}

struct Compiled {
    executable: Box<dyn Executable>,
    places: Places,
    inputs: Buffers,
    actions: Vec<f32>,
}

/// The inputs of a run, in this process.
#[derive(Default)]
struct Buffers {
    images: Vec<u8>,
    cameras: Vec<u32>,
    tokens: Vec<u32>,
    prompt_len: Vec<u32>,
    state: Vec<f32>,
    noise: Vec<f32>,
    chunks: Vec<f32>,
    weights: Vec<f32>,
    limits: Vec<f32>,
}

impl Worker {
    /// The weights' table for so many Euler steps.
    fn table(&mut self, steps: usize) -> Arc<WeightTable> {
        if let Some(table) = self.tables.iter().find(|t| t.steps == steps) {
            return Arc::clone(table);
        }
        let table = Arc::new(WeightTable::new(self.config, steps));
        self.tables.push(Arc::clone(&table));
        table
    }

    fn compile(&mut self, id: u64, shape: Shape) -> Result<Answer, BackendError> {
        let unsupported = |e: ShapeError| BackendError::Unsupported(e.to_string());
        let program = Arc::new(record_with(self.table(shape.steps), shape).map_err(unsupported)?);
        let places = Places::of(&program);
        let executable = self.device.compile(program)?;
        let inputs = Buffers {
            images: vec![0; places.images],
            cameras: vec![0; places.cameras],
            tokens: vec![0; places.tokens],
            prompt_len: vec![0; places.prompt_len],
            state: vec![0.0; places.state],
            noise: vec![0.0; places.noise],
            ..Buffers::default()
        };
        let actions = vec![0.0; places.noise];
        self.programs.insert(id, Compiled { executable, places, inputs, actions });
        Ok(Answer::Compiled)
    }

    fn run(&mut self, id: u64, previous: bool) -> Result<Answer, BackendError> {
        let Some(compiled) = self.programs.get_mut(&id) else {
            return Err(BackendError::Device(format!("program {id} was never compiled")));
        };
        let shared = |e: io::Error| BackendError::Device(format!("the shared file: {e}"));
        compiled.read(&self.file, previous).map_err(shared)?;
        let Compiled { executable, places, inputs, actions } = compiled;
        let times = executable.run(&inputs.of_run(previous), actions)?;
        let at = places.offsets()[9];
        self.file.write_all_at(cast_slice(actions), at).map_err(shared)?;
        Ok(Answer::Ran { times: times_to_wire(times) })
    }
}

impl Compiled {
    fn read(&mut self, file: &File, previous: bool) -> io::Result<()> {
        let at = self.places.offsets();
        let b = &mut self.inputs;
        file.read_exact_at(&mut b.images, at[0])?;
        fill(file, &mut b.cameras, at[1])?;
        fill(file, &mut b.tokens, at[2])?;
        fill(file, &mut b.prompt_len, at[3])?;
        fill(file, &mut b.state, at[4])?;
        fill(file, &mut b.noise, at[5])?;
        if previous {
            b.chunks.resize(self.places.noise, 0.0);
            b.weights.resize(self.places.weights, 0.0);
            b.limits.resize(self.places.limits, 0.0);
            fill(file, &mut b.chunks, at[6])?;
            fill(file, &mut b.weights, at[7])?;
            fill(file, &mut b.limits, at[8])?;
        }
        Ok(())
    }
}

fn fill<T: Pod>(file: &File, words: &mut [T], at: u64) -> io::Result<()> {
    file.read_exact_at(cast_slice_mut(words), at)
}

impl Buffers {
    fn of_run(&self, previous: bool) -> Inputs<'_> {
        let chunks =
            Previous { chunks: &self.chunks, weights: &self.weights, limits: &self.limits };
        Inputs {
            images: Images::Packed(&self.images),
            cameras: &self.cameras,
            tokens: &self.tokens,
            prompt_len: &self.prompt_len,
            state: &self.state,
            noise: &self.noise,
            previous: previous.then_some(chunks),
        }
    }
}
