//! The binary: SIGTERM while a device is in a run of a minute. Clients are told, and the process
//! ends within the grace that docs/operations.md promises.
#![cfg(unix)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

#[path = "../src/stress/port.rs"]
mod port;
use port::Port;

const PATIENCE: Duration = Duration::from_secs(60);

const UPGRADE: &str = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";

/// Ended with the test, whatever becomes of it.
struct Served {
    child: Child,
    port: Port,
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Served {
    fn start(flags: &[&str]) -> Served {
        let port = Port::free().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_pirouette"))
            .args(["serve", "pi0_libero", "--port", &port.number.to_string()])
            .args(flags)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Served { child, port }
    }

    /// A websocket after its handshake.
    fn websocket(&self) -> TcpStream {
        let begun = Instant::now();
        loop {
            if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port.number)) {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream.write_all(UPGRADE.as_bytes()).unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    head.extend(byte);
                }
                assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", head.escape_ascii());
                return stream;
            }
            assert!(begun.elapsed() < PATIENCE, "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn terminate(&self) {
        self.signal("-TERM");
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    fn ended(&mut self) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "the process does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn a_model_that_warms_up_holds_neither_its_clients_nor_the_process() {
    for isolate in ["never", "always"] {
        let folder = tempfile::tempdir().unwrap();
        let mut flags = vec!["--device", "null:1:60000", "--isolate", isolate];
        flags.extend(["--record", folder.path().to_str().unwrap()]);
        let mut served = Served::start(&flags);
        let mut waiting = served.websocket();
        served.terminate();
        let told = Instant::now();
        let mut frame = [0; 27];
        waiting.read_exact(&mut frame).unwrap();
        assert_eq!(frame[..4], *b"\x88\x19\x03\xe9", "close 1001");
        assert_eq!(frame[4..], *b"server is shutting down");
        assert!(told.elapsed() < Duration::from_secs(3), "{:?}", told.elapsed());
        drop(waiting);
        let status = served.ended();
        assert!(status.success(), "{isolate}: {status}");
        assert!(told.elapsed() < Duration::from_secs(15), "{isolate}: {:?}", told.elapsed());
    }
}

/// A container's first process ignores signals that it has no handler for.
#[test]
fn a_server_that_is_still_being_opened_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    assert!(Command::new("mkfifo").arg(&keys).status().unwrap().success());
    let flags = ["--device", "null:1:1", "--api-key-file", keys.to_str().unwrap()];
    let mut served = Served::start(&flags);
    // Opens once the server reads it, which waits for what is written.
    let _writer = std::fs::File::options().write(true).open(&keys).unwrap();
    served.terminate();
    assert_eq!(served.ended().code(), Some(0), "by its own handler, not by the signal");
}

/// A reload (systemd's ExecReload) while files are still being read, which systemd would take for
/// a clean end, after which it restarts nothing.
#[test]
fn a_hangup_while_the_server_starts_is_not_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    assert!(Command::new("mkfifo").arg(&keys).status().unwrap().success());
    let flags = ["--device", "null:1:1", "--api-key-file", keys.to_str().unwrap()];
    let mut served = Served::start(&flags);
    // Opens once the server reads it, which waits for what is written.
    let mut writer = std::fs::File::options().write(true).open(&keys).unwrap();
    served.signal("-HUP");
    std::thread::sleep(Duration::from_millis(200));
    // It may have gone.
    let _ = writer.write_all(b"no-key");
    drop(writer);
    assert_eq!(served.ended().code(), Some(1), "it ends because of that file");
}
