//! The binary: the largest `batch` that `serve` accepts is answered, on an idle server.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pirouette_policy::{NdArray, Value};
use pirouette_server::load::socket::{Address, frame, handshake};
use pirouette_server::msgpack;

#[path = "../src/stress/port.rs"]
mod port;
use port::Port;

const PATIENCE: Duration = Duration::from_secs(120);

/// Ended with the test, whatever becomes of it.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The payload of the next frame, which is a binary one.
fn answer(from: &mut impl Read) -> bytes::Bytes {
    let mut head = [0; 2];
    from.read_exact(&mut head).unwrap();
    let more = match head[1] {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let mut length = [0; 8];
    length[7] = head[1];
    from.read_exact(&mut length[8 - more..]).unwrap();
    let mut payload = vec![0; u64::from_be_bytes(length) as usize];
    from.read_exact(&mut payload).unwrap();
    assert_eq!(head[0], 0x82, "{}", payload.escape_ascii());
    payload.into()
}

#[test]
fn a_batch_of_512_finds_room() {
    let port = Port::free().unwrap();
    let served = Command::new(env!("CARGO_BIN_EXE_pirouette"))
        .args(["serve", "pi0_libero", "--max-observations", "512", "--max-batch", "1"])
        // Far slower than observations are prepared: most of them wait.
        .args(["--device", "null:1:8", "--port", &port.number.to_string()])
        .stdin(Stdio::null())
        .spawn();
    let _served = Served(served.unwrap());
    let address = Address::parse(&format!("ws://127.0.0.1:{}", port.number)).unwrap();
    let begun = Instant::now();
    let mut socket = loop {
        match TcpStream::connect(&address.authority) {
            Ok(socket) => break socket,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.write_all(handshake(&address, None).as_bytes()).unwrap();
    let mut reader = BufReader::new(socket.try_clone().unwrap());
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        reader.read_line(&mut line).unwrap();
    }
    answer(&mut reader);
    let image = || Value::Array(NdArray::from_u8(vec![8, 8, 3], vec![7; 192]).unwrap());
    let observation = Value::Map(vec![
        ("observation/image".into(), image()),
        ("observation/wrist_image".into(), image()),
        ("observation/state".into(), Value::List(vec![Value::Float(0.0); 8])),
        ("prompt".into(), Value::Str("stack the cups".into())),
    ]);
    let batch = Value::Map(vec![("batch".into(), Value::List(vec![observation; 512]))]);
    let request = frame(2, &msgpack::encode(&batch).unwrap(), [1, 2, 3, 4]);
    socket.write_all(&request).unwrap();
    let answer = msgpack::decode(&answer(&mut reader)).unwrap();
    let Some(Value::List(results)) = answer.get("batch") else { panic!("{answer:?}") };
    let wrong: Vec<_> = results.iter().filter(|result| result.get("actions").is_none()).collect();
    assert!(
        results.len() == 512 && wrong.is_empty(),
        "{} failed: {:?}",
        wrong.len(),
        wrong.first()
    );
}
