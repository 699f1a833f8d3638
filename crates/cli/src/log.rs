//! What `serve` tells while it runs → standard error, as text for people or JSON for collectors.
//!
//! Lines wait in a bounded queue, and one thread writes them. Where nobody reads standard error
//! (Ctrl-S in a terminal, a pipe whose reader hangs), lines are lost and counted: no thread that
//! serves waits for them.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// Most bytes that wait to be written. What must not be lost, panics and the last word, may take as
/// many again.
const ROOM: usize = 1 << 20;

/// How long an end waits for standard error.
const PATIENCE: Duration = Duration::from_secs(1);

/// Of this process, once its log has been started.
static QUEUE: OnceLock<Arc<Queue>> = OnceLock::new();

/// Of the log, once it has been started.
static FORMAT: OnceLock<LogFormat> = OnceLock::new();

/// The form of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging. `PIROUETTE_LOG` chooses what is told: `info` unless it is set, requests one by
/// one with `info,pirouette::request=debug`.
///
/// # Errors
/// No thread can be started.
pub fn start(format: LogFormat) -> io::Result<()> {
    let queue = Arc::new(Queue::default());
    let (writer, lines) = (Arc::clone(&queue), Arc::clone(&queue));
    let thread = std::thread::Builder::new().name("log".into());
    thread.spawn(move || writer.write(io::stderr(), tell_lost))?;
    QUEUE.get_or_init(|| queue);
    FORMAT.get_or_init(|| format);
    let wanted = std::env::var("PIROUETTE_LOG").ok();
    let wanted = wanted.as_deref().map(str::trim);
    let filter = filter(wanted);
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(move || Line(Arc::clone(&lines)))
        // Colours are for a terminal, not for a file or a collector.
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false);
    match format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    if let Some(mistake) = wanted.and_then(mistake) {
        tell(&format!("{mistake}\n"));
    }
    Ok(())
}

/// What is told, `info` where that is not said or makes no sense. Lines that are lost are told with
/// any filter that does not itself name who tells of them.
fn filter(wanted: Option<&str>) -> EnvFilter {
    let parsed = wanted.and_then(|wanted| wanted.parse::<EnvFilter>().ok());
    let names = |directive: &str| directive.split(['=', '[']).next() == Some(module_path!());
    let named = parsed.is_some() && wanted.is_some_and(|wanted| wanted.split(',').any(names));
    let filter = parsed.unwrap_or_else(|| EnvFilter::new("info"));
    match concat!(module_path!(), "=warn").parse() {
        Ok(own) if !named => filter.add_directive(own),
        _ => filter,
    }
}

/// What is odd about a filter: a word that is no level names a module, and nothing else is told.
fn mistake(wanted: &str) -> Option<String> {
    const REMEDY: &str = "levels are off, error, warn, info, debug and trace, as in \
                          `info,pirouette::request=debug`";
    if let Err(error) = wanted.parse::<EnvFilter>() {
        return Some(format!(
            "PIROUETTE_LOG is not understood, `info` is told ({error}): {REMEDY}"
        ));
    }
    let known = |word: &str| word.parse::<LevelFilter>().is_ok() || word.starts_with("pirouette");
    let bare = |word: &&str| !word.is_empty() && !word.contains(['=', '[', ':']);
    let mut words = wanted.split(',').map(str::trim).filter(bare);
    let odd = words.find(|word| !known(word))?;
    Some(format!("PIROUETTE_LOG: `{odd}` is no level, and tells nothing of the server: {REMEDY}"))
}

fn tell_lost(lines: u64) {
    tracing::warn!(lines, "lines of the log are lost: standard error was full");
}

/// Tells what must not be lost, also where no log was started.
pub fn tell(text: &str) {
    match QUEUE.get() {
        Some(queue) if FORMAT.get() == Some(&LogFormat::Json) => {
            queue.push(object("ERROR", text).as_bytes(), true);
        }
        Some(queue) => queue.push(text.as_bytes(), true),
        // There is nowhere else to say that it can't be said.
        None => drop(io::stderr().write_all(text.as_bytes())),
    }
}

/// A text as a line of a log in JSON.
fn object(level: &str, text: &str) -> String {
    let mut timestamp = String::new();
    // A clock that can't be written leaves the line without its time.
    let _ = SystemTime.format_time(&mut Writer::new(&mut timestamp));
    let line = serde_json::json!({
        "timestamp": timestamp, "level": level, "message": text.trim(), "target": "pirouette",
    });
    line.to_string() + "\n"
}

/// Tells one line beside the results. Nobody may be there to read it: that costs no result.
pub fn note(line: impl Display) {
    match QUEUE.get() {
        Some(queue) if FORMAT.get() == Some(&LogFormat::Json) => {
            queue.push(object("INFO", &line.to_string()).as_bytes(), true);
        }
        _ => tell(&format!("{line}\n")),
    }
}

/// Waits until everything is written, for a second at most.
pub fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush();
    }
}

/// Lets panics wait for a place among the lines, and not for standard error.
pub fn queue_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if QUEUE.get().is_none() {
            return usual(panic);
        }
        let thread = std::thread::current();
        let mut text = format!("\nthread '{}' {panic}\n", thread.name().unwrap_or("?"));
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            text += &format!("stack backtrace:\n{trace}");
        }
        tell(&text);
        // It may be the end of the process.
        flush();
    }));
}

/// Lines on their way.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// Lines that found no room, since it was last told how many.
    lost: u64,
    /// Whether the thread has something in hand.
    writing: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, text: &[u8], urgent: bool) {
        let mut state = self.lock();
        let bytes = state.waiting.len() + text.len();
        // After one that is lost all are, until it is told: the log shows where its gap is.
        if (bytes > ROOM || state.lost > 0) && !(urgent && bytes <= 2 * ROOM) {
            state.lost += 1;
        } else {
            state.waiting.extend_from_slice(text);
        }
        self.changed.notify_all();
    }

    /// Writes what comes, line by line: a worker's lines go to the same place.
    fn write(&self, mut out: impl Write, tell_lost: impl Fn(u64)) {
        let mut lines = Vec::new();
        loop {
            let mut state = self.lock();
            state.writing = false;
            self.changed.notify_all();
            let idle = |state: &mut State| state.waiting.is_empty() && state.lost == 0;
            let wait = self.changed.wait_while(state, idle);
            state = wait.unwrap_or_else(PoisonError::into_inner);
            state.writing = true;
            if state.waiting.is_empty() {
                let lost = std::mem::take(&mut state.lost);
                drop(state);
                tell_lost(lost);
                continue;
            }
            std::mem::swap(&mut lines, &mut state.waiting);
            drop(state);
            for line in lines.split_inclusive(|byte| *byte == b'\n') {
                // What can't be written, to a file on a full disk, is lost.
                let _ = out.write_all(line);
            }
            lines.clear();
        }
    }

    fn flush(&self) {
        let busy = |state: &mut State| state.writing || !state.waiting.is_empty() || state.lost > 0;
        // Whatever is left after that time is lost.
        let _ = self.changed.wait_timeout_while(self.lock(), PATIENCE, busy);
    }
}

/// Takes one line.
struct Line(Arc<Queue>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line, false);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Command, Stdio};
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_finds_no_room_is_counted_where_it_is_missing() {
        let (read, write) = io::pipe().unwrap();
        let queue = Arc::new(Queue::default());
        let (writer, teller) = (Arc::clone(&queue), Arc::clone(&queue));
        let tell = move |lost| teller.push(format!("lost {lost}\n").as_bytes(), false);
        std::thread::spawn(move || writer.write(write, tell));
        // More than the pipe, what is being written and the queue hold.
        let line = format!("{}\n", "x".repeat(1023));
        let all = 4 * ROOM / line.len();
        for _ in 0..all {
            queue.push(line.as_bytes(), false);
        }
        queue.push(b"panicked\n", true);
        let begun = Instant::now();
        queue.flush();
        assert!((PATIENCE..10 * PATIENCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        let mut lines = Vec::new();
        for line in BufReader::new(read).lines() {
            lines.push(line.unwrap());
            if lines[lines.len() - 1].starts_with("lost") {
                break;
            }
        }
        let [told @ .., urgent, lost] = &lines[..] else { panic!("{lines:?}") };
        assert_eq!((urgent.as_str(), lost), ("panicked", &format!("lost {}", all - told.len())));
        assert!(told.len() >= ROOM / line.len() && told.iter().all(|line| line.len() == 1023));
    }

    #[test]
    fn lost_lines_are_told_with_any_filter() {
        for (wanted, is_told) in [
            (None, true),
            (Some("info"), true),
            (Some("pirouette::request=debug"), true),
            (Some("error,pirouette=error"), true),
            (Some("off"), true),
            (Some(""), true),
            (Some("no=such=filter"), true),
            (Some("info,pirouette::log=off"), false),
            (Some("pirouette::log"), true),
        ] {
            let queue = Arc::new(Queue::default());
            let lines = Arc::clone(&queue);
            let log = tracing_subscriber::fmt()
                .with_env_filter(filter(wanted))
                .with_writer(move || Line(Arc::clone(&lines)))
                .json();
            tracing::subscriber::with_default(log.finish(), || {
                tell_lost(7);
                tracing::debug!("that is not asked for");
            });
            let told = String::from_utf8(std::mem::take(&mut queue.lock().waiting)).unwrap();
            assert_eq!(told.matches("lines of the log are lost").count(), usize::from(is_told));
            let debug = wanted == Some("pirouette::log");
            assert_eq!(told.contains("not asked for"), debug, "{wanted:?}: {told}");
        }
    }

    #[test]
    fn a_filter_that_tells_nothing_is_told() {
        for good in ["", "info", "off", "WARN", "info,pirouette::request=debug", "pirouette::log"] {
            assert_eq!(mistake(good), None, "{good}");
        }
        for (wrong, named) in [
            ("warning", "`warning`"),
            ("trce", "`trce`"),
            ("info,pirouette::request=dbug", "is not understood"),
            ("no=such=filter", "is not understood"),
        ] {
            let told = mistake(wrong).unwrap();
            assert!(told.contains(named) && told.contains("debug and trace"), "{wrong}: {told}");
        }
    }

    #[test]
    fn a_last_word_is_an_object_too() {
        let line = object("ERROR", "pirouette: no key:\n  is there\n");
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["message"], "pirouette: no key:\n  is there");
        assert_eq!(line["level"], "ERROR");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
    }

    #[test]
    fn panics_are_shown_before_the_process_can_end() {
        if std::env::var_os("PIROUETTE_TEST_PANICS").is_some() {
            start(LogFormat::Text).unwrap();
            queue_panics();
            let thread = std::thread::Builder::new().name("device".into());
            let joined = thread.spawn(|| panic!("it broke")).unwrap().join();
            std::process::exit(if joined.is_err() { 7 } else { 0 });
        }
        let test = "log::tests::panics_are_shown_before_the_process_can_end";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env("PIROUETTE_TEST_PANICS", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = String::new();
        child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(7));
        assert!(
            told.contains("thread 'device' panicked at ") && told.contains("it broke"),
            "{told}"
        );
    }
}
