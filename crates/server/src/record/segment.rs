//! Entries → segment files in a folder of bounded size.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Value, json};

use super::{Entry, Identity, RecordOptions};

/// First field of a segment's first line, and the version of the format.
pub(super) const FORMAT: &str = "pirouette recording";
pub(super) const VERSION: u64 = 1;

/// Segments of a folder that is full: one of them goes when room is needed.
const SEGMENTS: u64 = 8;

/// A folder that is recorded into.
pub(super) struct Folder {
    dir: PathBuf,
    limit: u64,
    /// Finished segments, oldest first, with their bytes.
    finished: Vec<(String, u64)>,
    open: Option<Segment>,
    made: u64,
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
        let dir = options.dir.clone();
        let mut finished = Vec::new();
        for name in names(&dir)? {
            let size =
                |e: &str| std::fs::metadata(dir.join(format!("{name}.{e}"))).map(|m| m.len());
            let bytes = size("frames").unwrap_or(0) + size("jsonl").unwrap_or(0);
            finished.push((name, bytes));
        }
        Ok(Folder { dir, limit: options.limit_bytes, finished, open: None, made: 0 })
    }

    /// Bytes in the folder.
    pub(super) fn bytes(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, Segment::bytes);
        self.finished.iter().map(|(_, bytes)| bytes).sum::<u64>() + open
    }

    /// Writes an entry; false when it is larger than the whole folder may be.
    pub(super) fn write(&mut self, entry: &Entry, identity: &Identity) -> std::io::Result<bool> {
        let identity = identity();
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
                self.finished.push((segment.name.clone(), segment.bytes()));
                return Err(error);
            }
        }
        Ok(true)
    }

    fn close(&mut self) {
        if let Some(segment) = self.open.take() {
            self.finished.push((segment.name.clone(), segment.bytes()));
        }
    }

    fn make_room(&mut self, need: u64) -> std::io::Result<()> {
        while self.bytes() + need > self.limit {
            if self.finished.is_empty() {
                // Only the open segment is left, and it is too much: it goes as a whole.
                self.close();
            }
            let Some((name, _)) = self.finished.first() else { break };
            for extension in ["frames", "jsonl"] {
                let file = self.dir.join(format!("{name}.{extension}"));
                match std::fs::remove_file(file) {
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
        self.made += 1;
        // The number keeps the order of segments that begin in one millisecond.
        let name = format!("{:014}-{:06}", now.as_millis(), self.made);
        let frames = create_private(&self.dir.join(format!("{name}.frames")))?;
        let mut index = create_private(&self.dir.join(format!("{name}.jsonl")))?;
        let head = head(&identity);
        index.write_all(head.as_bytes())?;
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

/// Names of a folder's segments, oldest first; whatever else lies there is left alone.
pub(super) fn names(dir: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let file = entry?.file_name();
        let Some(name) = file.to_str().and_then(|f| f.strip_suffix(".jsonl")) else { continue };
        let digits =
            |part: &str, n: usize| part.len() == n && part.bytes().all(|b| b.is_ascii_digit());
        if name.split_once('-').is_some_and(|(time, count)| digits(time, 14) && digits(count, 6)) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn make_private_dir(dir: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir)
}

fn create_private(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}
