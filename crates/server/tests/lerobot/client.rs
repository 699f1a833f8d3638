//! LeRobot's client in Rust: gRPC over HTTP/2, and pickles written by hand.

use std::net::SocketAddr;
use std::time::Duration;

use axum::http::{HeaderMap, Request};
use bytes::Bytes;
use h2::client::SendRequest;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

/// Everything here is waited for, on a machine that may be busy.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// gRPC's codes.
pub const INVALID_ARGUMENT: u32 = 3;
pub const DEADLINE_EXCEEDED: u32 = 4;
pub const RESOURCE_EXHAUSTED: u32 = 8;
pub const FAILED_PRECONDITION: u32 = 9;
pub const UNIMPLEMENTED: u32 = 12;
pub const INTERNAL: u32 = 13;
pub const UNAVAILABLE: u32 = 14;

/// A code and its text.
pub type Refused = (u32, String);

#[derive(Clone)]
pub struct Client {
    send: SendRequest<Bytes>,
    pub connection: std::sync::Arc<JoinHandle<()>>,
}

pub fn fixture(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/lerobot_grpc");
    std::fs::read(format!("{folder}/{name}.pickle")).expect(name)
}

/// A gRPC message.
pub fn framed(message: &[u8]) -> Vec<u8> {
    [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat()
}

/// A protobuf field of bytes.
pub fn bytes_field(number: u8, data: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut n = data.len();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    [&out, data].concat()
}

/// An `Observation` of the protocol.
pub fn piece(transfer_state: u8, data: &[u8]) -> Vec<u8> {
    framed(&[vec![8, transfer_state], bytes_field(2, data)].concat())
}

impl Client {
    pub async fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(async move { drop(connection.await) });
        Client { send, connection: connection.into() }
    }

    /// A connected robot that has been set up.
    pub async fn ready(address: SocketAddr) -> Client {
        let client = Client::connect(address).await;
        assert_eq!(client.call("Ready", &framed(b"")).await.unwrap(), "");
        client.set_up(&fixture("setup.p4")).await.unwrap();
        client
    }

    pub fn sender(&self) -> SendRequest<Bytes> {
        self.send.clone()
    }

    pub async fn set_up(&self, pickle: &[u8]) -> Result<Bytes, Refused> {
        self.call("SendPolicyInstructions", &framed(&bytes_field(1, pickle))).await
    }

    /// In one piece.
    pub async fn observe(&self, pickle: &[u8]) -> Result<Bytes, Refused> {
        self.call("SendObservations", &piece(3, pickle)).await
    }

    /// The pickle of the actions; empty if there are none.
    pub async fn actions(&self) -> Result<Bytes, Refused> {
        let message = self.call("GetActions", &framed(b"")).await?;
        if message.is_empty() {
            return Ok(message);
        }
        assert_eq!(message[0], 0x0a);
        let digits = 1 + message[1..].iter().position(|byte| *byte < 0x80).unwrap();
        Ok(message.slice(1 + digits..))
    }

    pub async fn call(&self, method: &str, body: &[u8]) -> Result<Bytes, Refused> {
        let path = format!("/transport.AsyncInference/{method}");
        let answer = self.post(&path, "application/grpc", body);
        tokio::time::timeout(PATIENCE, answer).await.expect("an answer").map(|(_, m)| m)
    }

    /// Any request: HTTP's status and the message.
    pub async fn post(
        &self,
        path: &str,
        content_type: &str,
        body: &[u8],
    ) -> Result<(u16, Bytes), Refused> {
        let request = Request::post(format!("http://robot{path}"))
            .header("content-type", content_type)
            .header("te", "trailers");
        let mut send = self.send.clone().ready().await.map_err(gone)?;
        let (response, mut stream) =
            send.send_request(request.body(()).unwrap(), false).map_err(gone)?;
        // Refused on the way: the answer says why.
        let _ = stream.send_data(Bytes::copy_from_slice(body), true);
        let response = response.await.map_err(gone)?;
        let (head, mut body) = response.into_parts();
        outcome(&head.headers)?;
        let mut message = Vec::new();
        while let Some(data) = body.data().await {
            let data = data.map_err(gone)?;
            body.flow_control().release_capacity(data.len()).unwrap();
            message.extend_from_slice(&data);
        }
        let trailers = body.trailers().await.map_err(gone)?;
        outcome(&trailers.unwrap_or_default())?;
        if message.is_empty() {
            return Ok((head.status.as_u16(), Bytes::new()));
        }
        assert_eq!(framed(&message[5..])[..5], message[..5], "one message");
        Ok((head.status.as_u16(), Bytes::from(message).slice(5..)))
    }
}

fn gone(error: h2::Error) -> Refused {
    (99, error.to_string())
}

fn outcome(headers: &HeaderMap) -> Result<(), Refused> {
    let code = headers.get("grpc-status").map_or(0, |v| v.to_str().unwrap().parse().unwrap());
    let text = headers.get("grpc-message").map_or("", |v| v.to_str().unwrap());
    if code == 0 { Ok(()) } else { Err((code, text.into())) }
}

/// What one robot of the fixture's setup sees, pickled.
pub struct Seen<'a> {
    pub timestep: u16,
    pub must_go: bool,
    /// Of its first motor; the others are 0.
    pub position: f64,
    pub task: &'a str,
}

impl Seen<'_> {
    pub fn pickle(&self) -> Vec<u8> {
        let mut out = b"\x80\x04".to_vec();
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend([0x8c, text.len() as u8]);
            out.extend(text.bytes());
        };
        let number = |out: &mut Vec<u8>, x: f64| {
            out.push(b'G');
            out.extend(x.to_be_bytes());
        };
        text(&mut out, "lerobot.x");
        text(&mut out, "TimedObservation");
        out.extend(b"\x93)\x81}(");
        text(&mut out, "timestamp");
        number(&mut out, 100.0);
        text(&mut out, "timestep");
        out.push(b'M');
        out.extend(self.timestep.to_le_bytes());
        text(&mut out, "must_go");
        out.push(0x89 - u8::from(self.must_go));
        text(&mut out, "observation");
        out.extend(b"}(");
        for motor in ["shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"] {
            text(&mut out, &format!("{motor}.pos"));
            number(&mut out, 0.0);
        }
        text(&mut out, "shoulder_pan.pos");
        number(&mut out, self.position);
        for (camera, height) in [("front", 28), ("wrist", 21)] {
            text(&mut out, camera);
            text(&mut out, "numpy._core.numeric");
            text(&mut out, "_frombuffer");
            out.extend(b"\x93(\x96");
            out.extend((height as u64 * 84).to_le_bytes());
            out.extend(vec![7; height * 84]);
            text(&mut out, "numpy");
            text(&mut out, "dtype");
            out.push(0x93);
            text(&mut out, "u1");
            out.extend([0x85, b'R', b'K', height as u8, b'K', 28, b'K', 3, 0x87]);
            text(&mut out, "C");
            out.extend(b"tR");
        }
        text(&mut out, "task");
        text(&mut out, self.task);
        out.extend(b"uub.");
        out
    }
}
