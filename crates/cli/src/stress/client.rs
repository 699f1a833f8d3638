//! One client on a plain blocking socket, as openpi's own is → what everything but the model takes.
//!
//! The clock starts before the first byte of a ready frame is given to the kernel and stops when
//! the last byte of the answer's frame was read: encoding the request and decoding the answer are
//! the client's own affair. Each frame is made anew right before, as every client must, since its
//! mask has to be. What the answer tells of the model's time is taken off.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use pirouette_policy::Value;
use pirouette_server::load::socket::{Address, frame, handshake};
use pirouette_server::load::{Percentiles, timings};
use pirouette_server::msgpack;

/// Requests before the clock counts.
const WARM_UP: u32 = 20;

/// A server that takes longer for one answer has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longest answer that is read.
const MAX_ANSWER: usize = 1 << 20;

/// What one client saw, the model's time taken off.
pub struct Overhead {
    /// Latency minus the model's time.
    pub over_model: Percentiles,
    /// Latency minus the server's own time for the request: sockets and codec.
    pub over_server: Percentiles,
}

/// Asks for as long as `lasts`, at once after each answer but no sooner than `every` after the
/// request before.
pub fn ask(
    address: &Address,
    observation: &Value,
    lasts: Duration,
    every: Duration,
) -> Result<Overhead> {
    let payload = msgpack::encode(observation)?;
    let mut socket = TcpStream::connect(&address.authority)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(handshake(address, None).as_bytes())?;
    let mut client = Client { socket, buffer: vec![0; MAX_ANSWER], read: 0 };
    client.head()?;
    client.answer().context("no metadata")?;
    let (mut over_model, mut over_server) = (Vec::new(), Vec::new());
    let began = Instant::now();
    for turn in 0u32.. {
        let request = frame(2, &payload, turn.wrapping_mul(0x9e37_79b9).to_le_bytes());
        let asked = Instant::now();
        client.socket.write_all(&request)?;
        let answer = client.answer()?;
        let took_ms = asked.elapsed().as_secs_f64() * 1e3;
        let Some((server_ms, model_ms)) = timings(&answer) else {
            bail!("no answer but: {}", String::from_utf8_lossy(&answer));
        };
        if turn >= WARM_UP {
            over_model.push(took_ms - model_ms);
            over_server.push(took_ms - server_ms);
        }
        if began.elapsed() > lasts {
            break;
        }
        std::thread::sleep(every.saturating_sub(asked.elapsed()));
    }
    let (over_model, over_server) = (Percentiles::of(over_model), Percentiles::of(over_server));
    Ok(Overhead { over_model, over_server })
}

struct Client {
    socket: TcpStream,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are filled.
    read: usize,
}

impl Client {
    fn more(&mut self) -> Result<()> {
        match self.socket.read(&mut self.buffer[self.read..])? {
            0 => bail!("the server left, or its answer is longer than {MAX_ANSWER} bytes"),
            n => self.read += n,
        }
        Ok(())
    }

    /// Drops the first `n` bytes.
    fn drop(&mut self, n: usize) {
        self.buffer.copy_within(n..self.read, 0);
        self.read -= n;
    }

    /// Reads to the end of the handshake's answer.
    fn head(&mut self) -> Result<()> {
        loop {
            let head = &self.buffer[..self.read];
            if let Some(at) = head.windows(4).position(|end| end == b"\r\n\r\n") {
                let welcome = head.starts_with(b"HTTP/1.1 101");
                self.drop(at + 4);
                return if welcome { Ok(()) } else { bail!("no websocket") };
            }
            self.more()?;
        }
    }

    /// The payload of the next frame.
    fn answer(&mut self) -> Result<Bytes> {
        loop {
            let (header, length) = match &self.buffer[..self.read] {
                [_, 126, a, b, ..] => (4, usize::from(u16::from_be_bytes([*a, *b]))),
                [_, 127, length @ ..] if length.len() >= 8 => {
                    let length = length.first_chunk().map_or(0, |l| u64::from_be_bytes(*l));
                    (10, usize::try_from(length)?)
                }
                [_, short, ..] if *short < 126 => (2, usize::from(*short)),
                _ => (0, usize::MAX),
            };
            if header > 0 && self.read - header >= length {
                let payload = Bytes::copy_from_slice(&self.buffer[header..header + length]);
                self.drop(header + length);
                return Ok(payload);
            }
            self.more()?;
        }
    }
}
