//! Waiting for a line without sleeping through it: a core that sleeps takes 50 to 100 µs to wake.

use std::hint::spin_loop;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Cores below which nobody stays awake: they are needed.
const ENOUGH_CORES: usize = 4;

/// Whether waiting awake is worth a core.
pub fn may_watch() -> bool {
    available_parallelism().is_ok_and(|cores| cores.get() >= ENOUGH_CORES)
}

/// Sleeps until something can be read or until `from`, then stays awake for `long` at most. What
/// came, if anything did, is read by the caller, who may block.
pub fn watch(stream: &mut BufReader<UnixStream>, from: Instant, long: Duration) -> io::Result<()> {
    let sleep = from.saturating_duration_since(Instant::now());
    if !stream.buffer().is_empty() {
        return Ok(());
    }
    if !sleep.is_zero() {
        let timeout =
            Timespec { tv_sec: sleep.as_secs() as i64, tv_nsec: sleep.subsec_nanos().into() };
        let mut fds = [PollFd::new(stream.get_ref(), PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    stream.get_ref().set_nonblocking(true)?;
    let end = Instant::now() + long;
    let outcome = loop {
        match stream.fill_buf() {
            Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < end => spin_loop(),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break Ok(()),
            other => break other.map(drop),
        }
    };
    stream.get_ref().set_nonblocking(false)?;
    outcome
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_line_is_there_early_late_or_never() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut stream = BufReader::new(ours);
        let soon = Instant::now() + Duration::from_millis(5);
        // Never: it comes back without an error and without data.
        watch(&mut stream, soon, Duration::from_millis(1)).unwrap();
        assert!(stream.buffer().is_empty());
        theirs.write_all(b"early\n").unwrap();
        let later = Instant::now() + Duration::from_secs(600);
        watch(&mut stream, later, Duration::ZERO).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        assert_eq!(line, "early\n");
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            theirs.write_all(b"late\n").unwrap();
        });
        watch(&mut stream, Instant::now(), Duration::from_secs(600)).unwrap();
        assert_eq!(stream.buffer(), b"late\n");
        writer.join().unwrap();
        // The end counts as something to read.
        line.clear();
        stream.read_line(&mut line).unwrap();
        watch(&mut stream, Instant::now(), Duration::from_secs(600)).unwrap();
        assert_eq!(stream.read_line(&mut line).unwrap(), 0);
    }
}
