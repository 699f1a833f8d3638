//! The server's side: a device that is a process.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytemuck::cast_slice;
use pirouette_model::{BackendError, Device, Executable, Inputs, Program, StageTimes};
use rustix::fs::{MemfdFlags, memfd_create};

use super::watch::{may_watch, watch};
use super::{Answer, Ask, Places, receive, send, times_from_wire};
use crate::model::Open;

/// Time a process may take to load weights, or to compile a program.
const SLOW: Duration = Duration::from_secs(1800);
/// Time a run may take: the engine gives up long before, this ends the process.
const RUN: Duration = Duration::from_secs(600);
/// From this long before a run's answer is due until this long after it, the thread stays awake.
const AWAKE: Duration = Duration::from_micros(300);

/// A device in a process of its own.
pub struct ProcessDevice {
    link: Arc<Mutex<Link>>,
    name: String,
    weight_bytes: u64,
}

impl ProcessDevice {
    /// Starts the process and waits until its weights are loaded.
    pub fn open(open: Open) -> Result<Self, BackendError> {
        let what = open.device.device.clone();
        let starting = |e: io::Error| {
            BackendError::Unavailable(format!("no process could be started for {what}: {e}"))
        };
        let mut link = Link::start(what.clone()).map_err(starting)?;
        match link.ask(&Ask::Open(open), SLOW)? {
            Answer::Opened { name, weight_bytes } => {
                tracing::info!("{name} is served by process {}", link.child.id());
                Ok(ProcessDevice { link: Arc::new(Mutex::new(link)), name, weight_bytes })
            }
            other => Err(link.strange(&other)),
        }
    }
}

impl Device for ProcessDevice {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        let places = Places::of(&program);
        let mut link = lock(&self.link);
        let bytes = places.offsets()[10];
        if link.file_bytes < bytes {
            let room = link.file.set_len(bytes);
            room.map_err(|e| BackendError::Unavailable(format!("{bytes} bytes to share: {e}")))?;
            link.file_bytes = bytes;
        }
        link.last_id += 1;
        let id = link.last_id;
        match link.ask(&Ask::Compile { id, shape: program.shape.into() }, SLOW)? {
            Answer::Compiled => {
                let link = self.link.clone();
                Ok(Box::new(ProcessExecutable { link, id, program, places, usual: None }))
            }
            other => Err(link.strange(&other)),
        }
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Whether the process still runs: one that was killed while nobody asked anything.
    fn look(&mut self) -> Result<(), BackendError> {
        let mut link = lock(&self.link);
        match link.child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(link.lost("it ended")),
        }
    }
}

struct ProcessExecutable {
    link: Arc<Mutex<Link>>,
    id: u64,
    program: Arc<Program>,
    places: Places,
    /// What the last run took, from asking to its answer.
    usual: Option<Duration>,
}

impl ProcessExecutable {
    fn write(&self, file: &File, inputs: &Inputs<'_>) -> io::Result<()> {
        let [_, cameras, tokens, prompt_len, state, noise, chunks, weights, limits, ..] =
            self.places.offsets();
        let mut at = 0;
        for image in inputs.images.pieces() {
            file.write_all_at(image, at)?;
            at += image.len() as u64;
        }
        for (words, at) in
            [(inputs.cameras, cameras), (inputs.tokens, tokens), (inputs.prompt_len, prompt_len)]
        {
            file.write_all_at(cast_slice(words), at)?;
        }
        file.write_all_at(cast_slice(inputs.state), state)?;
        file.write_all_at(cast_slice(inputs.noise), noise)?;
        if let Some(previous) = inputs.previous {
            file.write_all_at(cast_slice(previous.chunks), chunks)?;
            file.write_all_at(cast_slice(previous.weights), weights)?;
            file.write_all_at(cast_slice(previous.limits), limits)?;
        }
        Ok(())
    }
}

impl Executable for ProcessExecutable {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn run(
        &mut self,
        inputs: &Inputs<'_>,
        actions: &mut [f32],
    ) -> Result<StageTimes, BackendError> {
        inputs.check(&self.program)?;
        if actions.len() != self.places.noise {
            let (got, want) = (actions.len(), self.places.noise);
            return Err(BackendError::InputSize { name: "actions", got, want });
        }
        let mut link = lock(&self.link);
        let write = |link: &mut Link| {
            if link.watches {
                // The process wakes while the inputs are written.
                send(link.stream.get_mut(), &Ask::Wake)?;
            }
            self.write(&link.file, inputs)
        };
        write(&mut link).map_err(|e| link.lost(&e.to_string()))?;
        let previous = inputs.previous.is_some();
        let asked = Instant::now();
        link.due = self.usual.map(|usual| asked + usual);
        match link.ask(&Ask::Run { id: self.id, previous }, RUN)? {
            Answer::Ran { times } => {
                self.usual = Some(asked.elapsed());
                let at = self.places.offsets()[9];
                let read = link.file.read_exact_at(bytemuck::cast_slice_mut(actions), at);
                read.map_err(|e| link.lost(&e.to_string()))?;
                Ok(times_from_wire(times))
            }
            other => Err(link.strange(&other)),
        }
    }
}

impl Drop for ProcessExecutable {
    fn drop(&mut self) {
        let mut link = lock(&self.link);
        if link.failure.is_none() {
            // If it can't be told any more, there is nothing left to forget.
            let _ = send(link.stream.get_mut(), &Ask::Forget { id: self.id });
        }
    }
}

/// The process, the socket and the file in memory.
struct Link {
    what: String,
    child: Child,
    stream: BufReader<UnixStream>,
    file: File,
    file_bytes: u64,
    last_id: u64,
    /// Whether a core may stay awake for an answer.
    watches: bool,
    /// When the answer of the run that is asked for next should come.
    due: Option<Instant>,
    /// Why nothing can be asked any more.
    failure: Option<String>,
}

fn lock(link: &Mutex<Link>) -> MutexGuard<'_, Link> {
    link.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    fn start(what: String) -> io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let file = File::from(memfd_create("pirouette", MemfdFlags::CLOEXEC)?);
        // This very program, also when its file has been replaced meanwhile. A group of its own:
        // an interrupt from the keyboard is for the server, which ends its processes itself.
        let child = Command::new("/proc/self/exe")
            .arg0("pirouette")
            .arg("worker")
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::from(file.try_clone()?))
            .process_group(0)
            .spawn()?;
        let stream = BufReader::new(ours);
        let (watches, due, failure) = (may_watch(), None, None);
        Ok(Link { what, child, stream, file, file_bytes: 0, last_id: 0, watches, due, failure })
    }

    fn ask(&mut self, ask: &Ask, limit: Duration) -> Result<Answer, BackendError> {
        if let Some(failure) = &self.failure {
            return Err(BackendError::Device(failure.clone()));
        }
        let due = self.due.take().filter(|_| self.watches);
        let mut answer = || {
            self.stream.get_ref().set_read_timeout(Some(limit))?;
            send(self.stream.get_mut(), ask)?;
            if let Some(due) = due {
                watch(&mut self.stream, due.checked_sub(AWAKE).unwrap_or(due), 2 * AWAKE)?;
            }
            receive::<Answer>(&mut self.stream)
        };
        match answer() {
            Ok(Some(Answer::Failed(failure))) => {
                let error = BackendError::from(failure);
                if let BackendError::Device(text) = &error {
                    self.failure = Some(text.clone());
                }
                Err(error)
            }
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(self.lost("it ended")),
            Err(e) => Err(self.lost(&e.to_string())),
        }
    }

    /// Ends the process, and says what became of it.
    fn lost(&mut self, why: &str) -> BackendError {
        // Of a process that has ended already this does nothing.
        let _ = self.child.kill();
        let status = self.child.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
        let text = format!("the process of {}: {why} ({status})", self.what);
        self.failure = Some(text.clone());
        BackendError::Device(text)
    }

    fn strange(&mut self, answer: &Answer) -> BackendError {
        self.lost(&format!("it answered {answer:?}"))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
