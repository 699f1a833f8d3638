//! A recorded folder → its requests, one after the other.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use pirouette_policy::{NdArray, Value};
use serde_json::Value as Json;

use super::segment::{FORMAT, VERSION, names, place_of};
use crate::dialect::{Frame, decode, openpi};
use crate::msgpack;
use crate::service::{RequestContext, ServiceError};

/// Longest line of an index that is read.
const MAX_LINE: u64 = 1 << 20;

/// Why a recording can't be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// A file can't be read.
    #[error("`{path}` can't be read: {error}")]
    Read {
        /// The file or folder.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// No segment in the folder.
    #[error("`{0}` holds no recording: name the folder that `serve --record` wrote")]
    Empty(String),
    /// A line that is not what the format says.
    #[error("line {line} of `{path}`: {what}")]
    Line {
        /// The index.
        path: String,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// A folder that was recorded into.
#[derive(Debug)]
pub struct Recording {
    dir: PathBuf,
    names: Vec<String>,
}

/// What was recorded and is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Lines that were cut short or whose frames are not there.
    pub lines: usize,
    /// Segments that end with such lines.
    pub segments: usize,
    /// Those of them that lack frames although their server went on to another segment: that is
    /// no failure of the power, but damage.
    pub damaged: Vec<String>,
}

/// One recorded request.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The segment it lies in.
    pub segment: String,
    /// The server's number of it.
    pub id: u64,
    /// `ok`, or why there was no answer.
    pub outcome: String,
    /// The seed its noise came from; `None` when the request brought the noise.
    pub seed: Option<u64>,
    /// Requests that shared its batch, itself included.
    pub batch: Option<u64>,
    /// What answered it, as the server called itself then.
    pub identity: Json,
    /// The request's frame.
    pub request: Bytes,
    /// The answer's frame, or the error's text.
    pub reply: Bytes,
}

impl Recorded {
    /// Its observations as the server would hand them to its service, each with the recorded seed
    /// and without a deadline, beside the recorded actions. Observations without recorded actions
    /// are left out; so is everything of vla-eval's, whose answers hold one action of a chunk.
    ///
    /// # Errors
    /// What the server would have told the client.
    pub fn answered(&self) -> Result<Vec<(Value, RequestContext, NdArray)>, ServiceError> {
        let results = self.results();
        if results.iter().all(Option::is_none) {
            return Ok(Vec::new());
        }
        let map = decode(Frame::Binary(self.request.clone()), &msgpack::Limits::default())?;
        // RoboArena's `endpoint` is known here: with openpi's clients it would mean nothing.
        let asked = match openpi::read(map, Instant::now(), usize::MAX, true)? {
            openpi::Request::Infer(one) => vec![Ok(*one)],
            openpi::Request::Batch(observations) => observations,
            openpi::Request::Reset => Vec::new(),
        };
        let pair = |(asked, result): (openpi::Asked, Option<(NdArray, Option<u64>)>)| {
            let (Ok((observation, mut context)), Some((actions, seed))) = (asked, result) else {
                return None;
            };
            context.deadline = None;
            if context.noise.is_none() {
                context.seed = context.seed.or(seed).or(self.seed);
            }
            Some((observation, context, actions))
        };
        Ok(asked.into_iter().zip(results).filter_map(pair).collect())
    }

    /// Actions and drawn seed of each result of the answer.
    fn results(&self) -> Vec<Option<(NdArray, Option<u64>)>> {
        let map = match msgpack::decode(&self.reply) {
            Ok(Value::Map(map)) => map,
            // As vLLM-Omni answers.
            Ok(Value::Array(actions)) => return vec![Some((actions, None))],
            _ => return Vec::new(),
        };
        match map.iter().find(|(key, _)| key == "batch") {
            Some((_, Value::List(results))) => results.iter().map(result).collect(),
            _ => vec![result(&Value::Map(map))],
        }
    }
}

fn result(value: &Value) -> Option<(NdArray, Option<u64>)> {
    let Value::Map(map) = value else { return None };
    let get = |key: &str| map.iter().find(|(known, _)| known == key).map(|(_, value)| value);
    let Some(Value::Array(actions)) = get("actions") else { return None };
    let seed = match get("seed") {
        Some(Value::Int(seed)) => u64::try_from(*seed).ok(),
        _ => None,
    };
    Some((actions.clone(), seed))
}

impl Recording {
    /// Looks into a folder.
    pub fn open(dir: &Path) -> Result<Self, RecordingError> {
        let shown = dir.display().to_string();
        // Frames without an index are what a server that was killed had just begun.
        let names = names(dir, &["jsonl"])
            .map_err(|error| RecordingError::Read { path: shown.clone(), error })?;
        if names.is_empty() {
            return Err(RecordingError::Empty(shown));
        }
        Ok(Recording { dir: dir.to_owned(), names })
    }

    /// Hands every request, oldest first, to `take`, until that says stop. Says what was left out
    /// up to there.
    ///
    /// The folder may be recorded into meanwhile: a segment that has gone by its turn is passed
    /// over. A last line that was cut short (the disk was full) ends its segment, and so does a
    /// line whose frames are not there (the power failed).
    ///
    /// # Errors
    /// A file that can't be read or is not in the format.
    pub fn for_each(
        &self,
        mut take: impl FnMut(Recorded) -> std::ops::ControlFlow<()>,
    ) -> Result<LeftOut, RecordingError> {
        let mut left_out = LeftOut::default();
        for (i, name) in self.names.iter().enumerate() {
            let Some(mut segment) = Reader::open(&self.dir, name)? else { continue };
            while let Some(recorded) = segment.next()? {
                if take(recorded).is_break() {
                    return Ok(left_out);
                }
            }
            let lines = segment.frameless + usize::from(segment.torn);
            left_out.lines += lines;
            left_out.segments += usize::from(lines > 0);
            if segment.frameless > 0 && !self.ends_run(i) {
                left_out.damaged.push(name.clone());
            }
        }
        Ok(left_out)
    }

    /// Whether segment `i` is the last that its server wrote, as far as the folder tells: the next
    /// begins another count.
    fn ends_run(&self, i: usize) -> bool {
        self.names.get(i + 1).is_none_or(|next| place_of(next) <= place_of(&self.names[i]))
    }
}

struct Reader {
    name: String,
    path: String,
    index: BufReader<File>,
    frames: File,
    frame_bytes: u64,
    line: usize,
    identity: Json,
    /// Lines from the first without frames on.
    frameless: usize,
    /// Whether the last line was cut short.
    torn: bool,
}

impl Reader {
    /// `None` when the segment was removed.
    fn open(dir: &Path, name: &str) -> Result<Option<Self>, RecordingError> {
        let open = |extension: &str| {
            let path = dir.join(format!("{name}.{extension}"));
            let shown = path.display().to_string();
            match File::open(&path) {
                Ok(file) => Ok((shown, file)),
                Err(error) => Err(RecordingError::Read { path: shown, error }),
            }
        };
        // Of a segment that is removed the index goes first: frames alone are no damage, an index
        // alone is.
        let (frames, index) = (open("frames"), open("jsonl"));
        if let Err(RecordingError::Read { error, .. }) = &index
            && error.kind() == std::io::ErrorKind::NotFound
        {
            return Ok(None);
        }
        let ((_, frames), (path, index)) = (frames?, index?);
        let index = BufReader::new(index);
        let (name, identity) = (name.to_owned(), Json::Null);
        let (frame_bytes, line, frameless, torn) = (0, 0, 0, false);
        let mut reader =
            Reader { name, path, index, frames, frame_bytes, line, identity, frameless, torn };
        let Some(head) = reader.json()? else { return Ok(Some(reader)) };
        if head["format"] != FORMAT || head["version"] != VERSION {
            return Err(reader.wrong("this is no recording of a version known here"));
        }
        reader.identity = head["identity"].clone();
        Ok(Some(reader))
    }

    fn wrong(&self, what: &'static str) -> RecordingError {
        RecordingError::Line { path: self.path.clone(), line: self.line, what }
    }

    fn failed(&self, error: std::io::Error) -> RecordingError {
        RecordingError::Read { path: self.path.clone(), error }
    }

    /// The next whole line; `None` at the end, also when the last line was cut short.
    fn json(&mut self) -> Result<Option<Json>, RecordingError> {
        let Some(line) = self.line()? else { return Ok(None) };
        serde_json::from_slice(&line).map(Some).map_err(|_| self.wrong("this is no JSON"))
    }

    fn line(&mut self) -> Result<Option<Vec<u8>>, RecordingError> {
        let mut line = Vec::new();
        let read = self.index.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
        read.map_err(|error| self.failed(error))?;
        self.line += 1;
        if line.last() != Some(&b'\n') {
            let long = line.len() as u64 == MAX_LINE;
            self.torn = !line.is_empty();
            return if long { Err(self.wrong("the line is too long")) } else { Ok(None) };
        }
        Ok(Some(line))
    }

    fn next(&mut self) -> Result<Option<Recorded>, RecordingError> {
        let Some(line) = self.json()? else { return Ok(None) };
        let frames = self.frame(&line["request"])?.zip(self.frame(&line["reply"])?);
        let Some((request, reply)) = frames else {
            self.frameless = 1;
            while self.line()?.is_some() {
                self.frameless += 1;
            }
            return Ok(None);
        };
        Ok(Some(Recorded {
            segment: self.name.clone(),
            id: line["id"].as_u64().unwrap_or(0),
            outcome: line["outcome"].as_str().unwrap_or("").to_owned(),
            seed: line["seed"].as_u64(),
            batch: line["batch"]["requests"].as_u64(),
            identity: self.identity.clone(),
            request,
            reply,
        }))
    }

    /// `None` when the segment ends before it does.
    fn frame(&mut self, place: &Json) -> Result<Option<Bytes>, RecordingError> {
        let (at, bytes) = (place[0].as_u64(), place[1].as_u64());
        let end = at.zip(bytes).and_then(|(at, bytes)| at.checked_add(bytes));
        let (Some(at), Some(bytes), Some(end)) = (at, bytes, end) else {
            return Err(self.wrong("its frames are not in the segment"));
        };
        if end > self.frame_bytes {
            // It may have grown since.
            self.frame_bytes = self.frames.metadata().map_err(|error| self.failed(error))?.len();
            if end > self.frame_bytes {
                return Ok(None);
            }
        }
        let mut frame = vec![0; bytes as usize];
        let read = self.frames.seek(SeekFrom::Start(at));
        let read = read.and_then(|_| self.frames.read_exact(&mut frame));
        read.map_err(|error| self.failed(error))?;
        Ok(Some(frame.into()))
    }
}
