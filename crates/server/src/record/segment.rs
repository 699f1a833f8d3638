//! Entries → segment files in a folder of bounded size.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::{Entry, Identity, RecordOptions};

/// First field of a segment's first line, and the version of the format.
pub(super) const FORMAT: &str = "pirouette recording";
pub(super) const VERSION: u64 = 1;

/// Segments of a folder that is full: one of them goes when room is needed.
const SEGMENTS: u64 = 8;

/// How long a disk that failed is left alone.
const PAUSE: Duration = Duration::from_secs(5);

/// Both files of a segment. The index goes first and comes last: frames alone are no recording.
const FILES: [&str; 2] = ["jsonl", "frames"];

/// An empty file that is locked while the folder is recorded into. It is never removed: another
/// server may just have opened it.
const LOCK: &str = "lock";

/// A folder that is recorded into.
pub(super) struct Folder {
    dir: PathBuf,
    /// Two servers would remove each other's segments. The lock ends with the file, also where the
    /// process is killed.
    _lock: File,
    limit: u64,
    /// Finished segments, oldest first, with their bytes.
    finished: Vec<(String, u64)>,
    open: Option<Segment>,
    made: u64,
    /// Until when nothing is tried after a failure.
    paused: Option<Instant>,
}

struct Segment {
    name: String,
    identity: Value,
    frames: File,
    index: File,
    frame_bytes: u64,
    index_bytes: u64,
}

impl Folder {
    pub(super) fn open(options: &RecordOptions) -> std::io::Result<Self> {
        make_private_dir(&options.dir)?;
        let (dir, limit) = (options.dir.clone(), options.limit_bytes);
        let mut for_lock = OpenOptions::new();
        let lock = private(for_lock.create(true).truncate(false)).open(dir.join(LOCK))?;
        alone(lock.try_lock())?;
        let names = names(&dir, &FILES)?;
        let (finished, open, paused) = (Vec::new(), None, None);
        let mut folder = Folder { dir, _lock: lock, limit, finished, open, made: 0, paused };
        for name in names {
            folder.finish(name);
        }
        Ok(folder)
    }

    fn file(&self, name: &str, extension: &str) -> PathBuf {
        self.dir.join(format!("{name}.{extension}"))
    }

    /// Enters a segment with what the disk holds of it, which after a failure may be more than was
    /// written whole.
    fn finish(&mut self, name: String) {
        let size = |e: &str| std::fs::metadata(self.file(&name, e)).map_or(0, |m| m.len());
        let bytes = FILES.map(size).iter().sum();
        self.finished.push((name, bytes));
    }

    /// Bytes in the folder.
    pub(super) fn bytes(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, Segment::bytes);
        self.finished.iter().map(|(_, bytes)| bytes).sum::<u64>() + open
    }

    /// Writes an entry; false when it is larger than the whole folder may be. After a failure
    /// nothing is tried for a while.
    pub(super) fn write(&mut self, entry: &Entry, identity: &Identity) -> std::io::Result<bool> {
        if self.paused.is_some_and(|until| Instant::now() < until) {
            return Err(std::io::Error::other("the disk failed a moment ago"));
        }
        // A checkpoint may be swapped while an answer is made: its own segment says which it was.
        let open = self.open.as_ref().map(|segment| &segment.identity);
        let identity = entry.identity.as_ref().or(open).cloned().unwrap_or_else(identity);
        let written = self.try_write(entry, identity);
        self.paused = written.is_err().then(|| Instant::now() + PAUSE);
        written
    }

    fn try_write(&mut self, entry: &Entry, identity: Value) -> std::io::Result<bool> {
        let share = self.limit / SEGMENTS;
        let need = |at: u64| entry.bytes() + entry.line(at).to_string().len() as u64 + 1;
        let at = self.open.as_ref().map_or(0, |s| s.frame_bytes);
        let full = |s: &Segment| s.bytes() + need(at) > share || s.identity != identity;
        if self.open.as_ref().is_some_and(full) {
            self.close();
        }
        let head = match &self.open {
            Some(_) => 0,
            None => head(&identity).len() as u64,
        };
        let need = need(self.open.as_ref().map_or(0, |s| s.frame_bytes)) + head;
        if need > self.limit {
            return Ok(false);
        }
        self.make_room(need)?;
        let mut segment = match self.open.take() {
            Some(segment) => segment,
            None => self.begin(identity)?,
        };
        // After a failure the segment is left as it is: whole lines name whole frames.
        match segment.write(entry) {
            Ok(()) => self.open = Some(segment),
            Err(error) => {
                self.finish(segment.name);
                return Err(error);
            }
        }
        Ok(true)
    }

    fn close(&mut self) {
        if let Some(segment) = self.open.take() {
            self.finish(segment.name);
        }
    }

    fn make_room(&mut self, need: u64) -> std::io::Result<()> {
        while self.bytes() + need > self.limit {
            if self.finished.is_empty() {
                // Only the open segment is left, and it is too much: it goes as a whole.
                self.close();
            }
            let Some((name, _)) = self.finished.first() else { break };
            for extension in FILES {
                match std::fs::remove_file(self.file(name, extension)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error);
                    }
                    _ => {}
                }
            }
            self.finished.remove(0);
        }
        Ok(())
    }

    fn begin(&mut self, identity: Value) -> std::io::Result<Segment> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // Names sort by time also where the clock was set back: the oldest segment goes first.
        let newest = self.finished.last().map_or(0, |(name, _)| time_of(name));
        let time = now.as_millis().max(newest + 1);
        self.made += 1;
        let name = format!("{time:014}-{:06}", self.made % 1_000_000);
        let head = head(&identity);
        let (frames_path, index_path) = (self.file(&name, "frames"), self.file(&name, "jsonl"));
        // Nothing half begun stays behind; what can't be removed is found at the next start.
        let remove = |path: &Path| drop(std::fs::remove_file(path));
        let frames = create_private(&frames_path)?;
        let mut index = create_private(&index_path).inspect_err(|_| remove(&frames_path))?;
        index.write_all(head.as_bytes()).inspect_err(|_| {
            remove(&index_path);
            remove(&frames_path);
        })?;
        let index_bytes = head.len() as u64;
        Ok(Segment { name, identity, frames, index, frame_bytes: 0, index_bytes })
    }
}

fn head(identity: &Value) -> String {
    let program = concat!("pirouette ", env!("CARGO_PKG_VERSION"));
    let head = json!({
        "format": FORMAT, "version": VERSION, "program": program, "identity": identity,
    });
    head.to_string() + "\n"
}

impl Segment {
    fn bytes(&self) -> u64 {
        self.frame_bytes + self.index_bytes
    }

    fn write(&mut self, entry: &Entry) -> std::io::Result<()> {
        let line = entry.line(self.frame_bytes).to_string() + "\n";
        self.frames.write_all(&entry.request)?;
        self.frames.write_all(&entry.reply)?;
        self.frame_bytes += entry.bytes();
        self.index.write_all(line.as_bytes())?;
        self.index_bytes += line.len() as u64;
        Ok(())
    }
}

/// Names of a folder's segments that have a file of these, oldest first; whatever else lies there
/// is left alone.
pub(super) fn names(dir: &Path, extensions: &[&str]) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let file = entry?.file_name();
        let parts = file.to_str().and_then(|file| file.split_once('.'));
        let Some((name, extension)) = parts else { continue };
        let digits =
            |part: &str, n: usize| part.len() == n && part.bytes().all(|b| b.is_ascii_digit());
        let ours =
            name.split_once('-').is_some_and(|(time, count)| digits(time, 14) && digits(count, 6));
        if ours && extensions.contains(&extension) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

/// A segment's place among those of its run, from 1, in its name.
pub(super) fn place_of(name: &str) -> u64 {
    name.split('-').nth(1).and_then(|place| place.parse().ok()).unwrap_or(0)
}

/// Milliseconds in a segment's name.
fn time_of(name: &str) -> u128 {
    name.split('-').next().and_then(|time| time.parse().ok()).unwrap_or(0)
}

fn make_private_dir(dir: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

fn create_private(path: &Path) -> std::io::Result<File> {
    private(OpenOptions::new().create_new(true)).open(path)
}

/// For writing; a file that is made is its owner's alone.
fn private(options: &mut OpenOptions) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, 0o600);
    options.write(true)
}

/// Refuses a folder that another server has locked.
fn alone(locked: Result<(), TryLockError>) -> std::io::Result<()> {
    match locked {
        Err(TryLockError::WouldBlock) => {
            let why = "another server records into it: give this one another --record DIR";
            return Err(std::io::Error::new(std::io::ErrorKind::ResourceBusy, why));
        }
        Err(TryLockError::Error(error)) => tracing::warn!(
            %error,
            "the recorder's folder can't be locked: let no other server record into it"
        ),
        Ok(()) => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recent::RequestRecord;

    fn entry() -> Entry {
        let now = Instant::now();
        let record = RequestRecord::begin(1, 4, now, now);
        Entry { record, request: "asks".into(), reply: "told".into(), identity: None }
    }

    fn folder(dir: &Path, limit_bytes: u64) -> Folder {
        Folder::open(&RecordOptions { dir: dir.to_owned(), limit_bytes }).unwrap()
    }

    fn write(folder: &mut Folder) -> std::io::Result<bool> {
        folder.write(&entry(), &(Box::new(|| json!("test")) as Identity))
    }

    fn files(dir: &Path) -> Vec<String> {
        let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
        let files = std::fs::read_dir(dir).unwrap();
        let mut files: Vec<String> = files.map(|e| name(e).into_string().unwrap()).collect();
        files.sort();
        files
    }

    #[test]
    fn a_folder_has_one_recorder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = folder(dir.path(), 1 << 20);
        let options = RecordOptions { dir: dir.path().to_owned(), limit_bytes: 1 << 20 };
        let error = Folder::open(&options).err().unwrap().to_string();
        assert!(error.contains("another server") && error.contains("--record DIR"), "{error}");
        drop(first);
        assert_eq!(Folder::open(&options).unwrap().bytes(), 0, "the lock's file does not count");
        let unknown = std::io::Error::from(std::io::ErrorKind::Unsupported);
        alone(Err(TryLockError::Error(unknown))).unwrap();
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_make_the_newest_the_oldest() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["00000000000001-000001", "90000000000000-000007"] {
            std::fs::write(dir.path().join(format!("{name}.jsonl")), "{}\n").unwrap();
            std::fs::write(dir.path().join(format!("{name}.frames")), "").unwrap();
        }
        for number in 1..=2 {
            let mut folder = folder(dir.path(), 1 << 20);
            assert!(write(&mut folder).unwrap());
            let newest = format!("{}-000001", 90_000_000_000_000_u64 + number);
            assert_eq!(names(dir.path(), &FILES).unwrap().last(), Some(&newest));
            assert_eq!(folder.bytes(), folder_bytes(dir.path()));
        }
    }

    fn folder_bytes(dir: &Path) -> u64 {
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum()
    }

    #[test]
    fn halves_of_segments_count_and_go() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("00000000000001-000001.frames"), [0; 1000]).unwrap();
        std::fs::write(dir.path().join("00000000000002-000001.jsonl"), [0; 1000]).unwrap();
        std::fs::write(dir.path().join("notes.frames"), [0; 1000]).unwrap();
        let mut folder = folder(dir.path(), 1200);
        assert_eq!(folder.bytes(), 2000);
        assert_eq!(names(dir.path(), &["jsonl"]).unwrap(), ["00000000000002-000001"]);
        assert!(write(&mut folder).unwrap());
        assert_eq!(folder.bytes() + 1000, folder_bytes(dir.path()));
        let files = files(dir.path());
        assert_eq!(files[2..], ["lock", "notes.frames"], "{files:?}");
    }

    #[test]
    fn a_segment_that_can_not_begin_leaves_nothing_and_the_disk_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("90000000000000-000001.jsonl"), "{}\n").unwrap();
        let mut folder = folder(dir.path(), 1 << 20);
        std::fs::create_dir(dir.path().join("90000000000001-000001.jsonl")).unwrap();
        let before = files(dir.path());
        write(&mut folder).unwrap_err();
        assert_eq!(files(dir.path()), before, "no frames without an index");
        let error = write(&mut folder).unwrap_err().to_string();
        assert!(error.contains("a moment ago") && folder.made == 1, "{error}");
        folder.paused = Some(Instant::now());
        assert!(write(&mut folder).unwrap(), "tried again after the pause");
        assert!(folder.paused.is_none());
    }
}
