//! The same bytes over a bare socket, with the same pause in between → what the machine itself
//! takes for an exchange, below which no server can get.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use pirouette_server::load::Percentiles;

/// Bytes of an answer of ten actions.
const REPLY: usize = 1100;

/// `count` exchanges of `bytes` for an answer that comes after `pause`; the pause taken off. With
/// `awake` the server's side looks for the next request again and again instead of sleeping.
pub fn exchange(bytes: usize, pause: Duration, count: usize, awake: bool) -> Result<Percentiles> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no port for a bare exchange")?;
    let address = listener.local_addr()?;
    let server = std::thread::spawn(move || serve(&listener, bytes, pause, count, awake));
    let mut socket = TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let (mut request, mut reply) = (vec![1; bytes], [0; REPLY]);
    let mut measured = Vec::with_capacity(count);
    for turn in 0..count {
        request.fill(turn as u8); // fresh, as a client's frame is
        let began = Instant::now();
        socket.write_all(&request)?;
        socket.read_exact(&mut reply)?;
        let paused = f64::from_le_bytes(reply[..8].try_into()?);
        measured.push((began.elapsed().as_secs_f64() - paused) * 1e3);
    }
    match server.join() {
        Ok(served) => served.context("the bare server failed")?,
        Err(_) => anyhow::bail!("the bare server panicked"),
    }
    Ok(Percentiles::of(measured))
}

fn serve(
    listener: &TcpListener,
    bytes: usize,
    pause: Duration,
    count: usize,
    awake: bool,
) -> Result<()> {
    let (mut socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    let (mut request, mut reply) = (vec![0; bytes], [0; REPLY]);
    for _ in 0..count {
        socket.set_nonblocking(awake)?;
        let mut read = 0;
        while read < bytes {
            match socket.read(&mut request[read..]) {
                Ok(0) => anyhow::bail!("the bare client left"),
                Ok(n) => read += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
                Err(error) => return Err(error.into()),
            }
        }
        socket.set_nonblocking(false)?;
        let began = Instant::now();
        std::thread::sleep(pause);
        reply[..8].copy_from_slice(&began.elapsed().as_secs_f64().to_le_bytes());
        socket.write_all(&reply)?;
    }
    Ok(())
}
