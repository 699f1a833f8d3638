//! Requests and answers → files that `pirouette replay` runs again: `--record`.
//!
//! A folder holds segments, each a pair of files: `NAME.frames` are the frames end to end, as
//! they came and went; `NAME.jsonl` says in its first line what answered them, then in one line
//! per request where its frames lie, its seed, times and batch. Names sort by time. When the
//! folder would grow above its limit the oldest segment goes. Pictures may be private: files are
//! readable by their owner alone. One server at a time records into a folder: it holds a lock.
//!
//! Writing happens on a thread of its own behind a bounded queue. What finds it full is dropped
//! and counted: no request ever waits for a disk.

mod read;
mod segment;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use pirouette_engine::Timing;
use serde_json::{Value, json};

use self::segment::Folder;
use crate::recent::{RequestRecord, ms_between};
use crate::render::{header, sample};

pub use read::{LeftOut, Recorded, Recording, RecordingError};

/// Requests, and bytes of their frames, that may wait for the disk.
const QUEUE: usize = 64;
const QUEUE_BYTES: u64 = 256 << 20;

/// Where to record, and how much.
#[derive(Clone, Debug)]
pub struct RecordOptions {
    /// The folder; made if it is not there.
    pub dir: PathBuf,
    /// Most bytes in it.
    pub limit_bytes: u64,
}

/// One request and its answer, to be written.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) record: RequestRecord,
    pub(crate) request: Bytes,
    /// The answer's frame; of an error its text.
    pub(crate) reply: Bytes,
    /// Of what answered; an error has none, and goes wherever is written.
    pub(crate) identity: Option<Value>,
}

/// What answers requests, as JSON: configuration, steps, devices and the fingerprints of what
/// they compute. When it changes a new segment begins.
type Identity = Box<dyn Fn() -> Value + Send>;

#[derive(Debug, Default)]
struct Counts {
    recorded: AtomicU64,
    /// In the folder.
    bytes: AtomicU64,
    busy: AtomicU64,
    too_big: AtomicU64,
    failed: AtomicU64,
    /// Waiting for the disk.
    queued_bytes: AtomicU64,
}

/// Writes requests down. Dropping it writes what waits, then ends its thread.
#[derive(Debug)]
pub struct Recorder {
    queue: Mutex<Option<SyncSender<Entry>>>,
    counts: Arc<Counts>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Recorder {
    /// Makes the folder, takes stock of what is in it, starts the thread.
    ///
    /// # Errors
    /// The folder can't be made or read, or another server records into it.
    pub fn start(
        options: &RecordOptions,
        identity: impl Fn() -> Value + Send + 'static,
    ) -> std::io::Result<Self> {
        let folder = Folder::open(options)?;
        let counts = Arc::new(Counts::default());
        counts.bytes.store(folder.bytes(), Relaxed);
        let (sender, receiver) = sync_channel(QUEUE);
        let shared = counts.clone();
        let thread = std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || run(folder, &receiver, &shared, &(Box::new(identity) as Identity)))?;
        Ok(Recorder { queue: Mutex::new(Some(sender)), counts, thread: Mutex::new(Some(thread)) })
    }

    /// Queues a request, or drops and counts it. Never blocks.
    pub(crate) fn offer(&self, entry: Entry) {
        let bytes = entry.bytes();
        let waiting = self.counts.queued_bytes.fetch_add(bytes, Relaxed);
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = match &*queue {
            Some(queue) if waiting + bytes <= QUEUE_BYTES => queue.try_send(entry),
            _ => Err(TrySendError::Full(entry)),
        };
        if sent.is_err() {
            self.counts.queued_bytes.fetch_sub(bytes, Relaxed);
            self.counts.busy.fetch_add(1, Relaxed);
        }
    }

    /// Writes what waits and ends; what comes later is dropped and counted.
    pub fn finish(&self) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A recorder that panicked has nothing to add.
            let _ = thread.join();
        }
    }

    pub(crate) fn render(&self, out: &mut String) {
        let counts = &self.counts;
        let value = |counter: &AtomicU64| counter.load(Relaxed) as f64;
        header(out, "pirouette_recorded_total", "counter", "Requests recorded.");
        sample(out, "pirouette_recorded_total", &[], value(&counts.recorded));
        let name = "pirouette_record_dropped_total";
        header(out, name, "counter", "Requests that were not recorded, by reason.");
        let reasons =
            [("busy", &counts.busy), ("too_big", &counts.too_big), ("failed", &counts.failed)];
        for (reason, counter) in reasons {
            sample(out, name, &[("reason", reason)], value(counter));
        }
        header(out, "pirouette_record_bytes", "gauge", "Bytes in the recorder's folder.");
        sample(out, "pirouette_record_bytes", &[], value(&counts.bytes));
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Entry {
    fn bytes(&self) -> u64 {
        (self.request.len() + self.reply.len()) as u64
    }

    /// Its line in the index; offsets are the segment's business.
    fn line(&self, at: u64) -> Value {
        let r = &self.record;
        let ago = r.received.elapsed();
        let received = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let part = |from: Option<Instant>, to: Option<Instant>| Some(ms_between(from?, to?));
        let request = self.request.len() as u64;
        json!({
            "request": [at, request],
            "reply": [at + request, self.reply.len()],
            "id": r.id,
            "connection": r.connection,
            "received_unix_ms": received.saturating_sub(ago).as_millis() as u64,
            "outcome": r.outcome,
            "seed": r.seed,
            "ms": {
                "decode": part(Some(r.began), r.decoded),
                "infer": part(r.decoded, r.inferred),
                "model": r.timing.map(|t| t.run.total_ms),
                "total": r.total_ms(),
            },
            "batch": r.timing.map(|Timing { batch, slots, device, .. }| {
                json!({ "requests": batch, "slots": slots, "device": device })
            }),
        })
    }
}

fn run(mut folder: Folder, queue: &Receiver<Entry>, counts: &Counts, identity: &Identity) {
    let mut broken = false;
    while let Ok(entry) = queue.recv() {
        let result = folder.write(&entry, identity);
        counts.queued_bytes.fetch_sub(entry.bytes(), Relaxed);
        counts.bytes.store(folder.bytes(), Relaxed);
        match result {
            Ok(true) => {
                counts.recorded.fetch_add(1, Relaxed);
                broken = false;
            }
            Ok(false) => {
                counts.too_big.fetch_add(1, Relaxed);
            }
            Err(error) => {
                counts.failed.fetch_add(1, Relaxed);
                if !std::mem::replace(&mut broken, true) {
                    tracing::error!(%error, "requests can't be recorded");
                }
            }
        }
    }
}
