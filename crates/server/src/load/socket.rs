//! A websocket client that costs next to nothing: a request's frame is masked once and written as
//! it is, so that what is measured is the server and the wire. It speaks as much of RFC 6455 as
//! openpi's dialect uses, to servers one trusts.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest head of a response, and longest frame, that are read.
const MAX_HEAD: usize = 64 << 10;
const MAX_FRAME: u64 = 1 << 30;

/// Longest page that is read.
const MAX_PAGE: u64 = 4 << 20;

/// A data frame from the server.
pub enum Received {
    /// A binary frame: metadata or actions.
    Answer(Bytes),
    /// A text frame: why there are none.
    Refusal(String),
}

/// `ws://host[:port][/path]` taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// `host:port`.
    pub authority: String,
    /// `/` and what follows.
    pub path: String,
}

impl Address {
    /// Takes an address apart.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let rest = url.strip_prefix("ws://").ok_or("it must start with ws://")?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let plain = |s: &str| s.bytes().all(|b| b.is_ascii_graphic());
        if authority.is_empty() || !plain(authority) || !plain(path) {
            return Err("it must name a host");
        }
        // `[::1]` has colons of its own.
        let named = authority.rsplit_once(']').map_or(authority, |(_, port)| port).contains(':');
        let authority = if named { authority.to_owned() } else { format!("{authority}:80") };
        Ok(Address { authority, path: if path.is_empty() { "/".into() } else { path.into() } })
    }
}

/// A client's frame: final, masked.
pub fn frame(opcode: u8, payload: &[u8], mask: [u8; 4]) -> Bytes {
    let mut out = Vec::with_capacity(payload.len() + 14);
    out.push(0x80 | opcode);
    match payload.len() {
        n @ 0..126 => out.push(0x80 | n as u8),
        n @ 126..65536 => {
            out.push(0x80 | 126);
            out.extend((n as u16).to_be_bytes());
        }
        n => {
            out.push(0x80 | 127);
            out.extend((n as u64).to_be_bytes());
        }
    }
    out.extend(mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out.into()
}

/// The HTTP request that opens a websocket.
pub fn handshake(address: &Address, api_key: Option<&str>) -> String {
    let Address { authority, path } = address;
    let key = api_key.map_or(String::new(), |k| format!("Authorization: Api-Key {k}\r\n"));
    format!(
        "GET {path} HTTP/1.1\r\nHost: {authority}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: cGlyb3VldHRlIGxvYWQhIQ==\r\nSec-WebSocket-Version: 13\r\n{key}\r\n"
    )
}

/// A plain GET: the body of a 200.
///
/// # Errors
/// `InvalidData` for any other answer, with its status; another kind for none.
pub async fn get(address: &Address, path: &str, api_key: Option<&str>) -> io::Result<String> {
    let mut stream = TcpStream::connect(&address.authority).await?;
    let key = api_key.map_or(String::new(), |k| format!("Authorization: Api-Key {k}\r\n"));
    let authority = &address.authority;
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: {authority}\r\n{key}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_PAGE).read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "no HTTP answer"))?;
    let status = head.lines().next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") {
        return Err(bad(status));
    }
    Ok(body.to_owned())
}

/// An open websocket.
pub struct Socket {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Socket {
    /// Connects and shakes hands; the metadata is the first thing to receive.
    ///
    /// # Errors
    /// Nobody listens, or not to websockets.
    pub async fn connect(address: &Address, api_key: Option<&str>) -> io::Result<Self> {
        let mut stream = TcpStream::connect(&address.authority).await?;
        stream.set_nodelay(true)?;
        stream.write_all(handshake(address, api_key).as_bytes()).await?;
        let mut socket = Socket { stream, buffer: BytesMut::with_capacity(64 << 10) };
        let end = loop {
            let found = socket.buffer.windows(4).position(|w| w == b"\r\n\r\n");
            match found {
                Some(at) => break at + 4,
                None if socket.buffer.len() > MAX_HEAD => return Err(bad("endless HTTP head")),
                None => socket.more().await?,
            }
        };
        let head = socket.buffer.split_to(end);
        let head = String::from_utf8_lossy(&head);
        let status = head.lines().next().unwrap_or_default();
        if !status.starts_with("HTTP/1.1 101") {
            return Err(bad(&format!("no websocket: {status}")));
        }
        Ok(socket)
    }

    /// Sends a frame made by [`frame`].
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&mut self, frame: &Bytes) -> io::Result<()> {
        self.stream.write_all(frame).await
    }

    /// The next data frame. Pings are answered on the way.
    ///
    /// # Errors
    /// The connection ended, or was closed; the text says with what reason.
    pub async fn receive(&mut self) -> io::Result<Received> {
        loop {
            let (opcode, payload) = self.next().await?;
            match opcode {
                1 => return Ok(Received::Refusal(String::from_utf8_lossy(&payload).into_owned())),
                2 => return Ok(Received::Answer(payload)),
                8 => {
                    let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or(&[]));
                    return Err(bad(&format!("closed by the server: {reason}")));
                }
                9 => self.send(&frame(10, &payload, [0; 4])).await?,
                _ => {}
            }
        }
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn finish(&mut self) -> io::Result<()> {
        self.stream.shutdown().await
    }

    /// Ends the connection as a process that dies does: with a reset, if data is left unread or
    /// `abruptly`.
    pub fn kill(self, abruptly: bool) {
        if abruptly {
            // Where it can't be set the connection ends a little more gently.
            let _ = self.stream.set_zero_linger();
        }
    }

    async fn next(&mut self) -> io::Result<(u8, Bytes)> {
        self.at_least(2).await?;
        let (opcode, short) = (self.buffer[0] & 0x0f, self.buffer[1]);
        if self.buffer[0] & 0xf0 != 0x80 || short & 0x80 != 0 || opcode == 0 {
            return Err(bad("a frame no openpi server sends"));
        }
        self.buffer.advance(2);
        let length = match short {
            126 => {
                self.at_least(2).await?;
                self.buffer.get_u16().into()
            }
            127 => {
                self.at_least(8).await?;
                self.buffer.get_u64()
            }
            n => n.into(),
        };
        if length > MAX_FRAME {
            return Err(bad("a frame of more than 1 GiB"));
        }
        let length = length as usize;
        self.at_least(length).await?;
        Ok((opcode, self.buffer.split_to(length).freeze()))
    }

    async fn at_least(&mut self, n: usize) -> io::Result<()> {
        while self.buffer.len() < n {
            self.more().await?;
        }
        Ok(())
    }

    async fn more(&mut self) -> io::Result<()> {
        self.buffer.reserve(16 << 10);
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(bad("the connection ended")),
            _ => Ok(()),
        }
    }
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let parse = |url: &str| Address::parse(url).map(|a| (a.authority, a.path));
        let want = |a: &str, p: &str| Ok((a.to_string(), p.to_string()));
        assert_eq!(parse("ws://127.0.0.1:8000"), want("127.0.0.1:8000", "/"));
        assert_eq!(parse("ws://robot/a/b?c"), want("robot:80", "/a/b?c"));
        assert_eq!(parse("ws://[::1]:9/"), want("[::1]:9", "/"));
        assert_eq!(parse("ws://[::1]"), want("[::1]:80", "/"));
        for wrong in ["wss://x", "http://x", "ws://", "ws:///x", "ws://a b", "ws://x/\r\nY: z"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn frames_have_all_three_lengths() {
        let mask = [1, 2, 3, 4];
        assert_eq!(&frame(2, &[0, 0], mask)[..], [0x82, 0x82, 1, 2, 3, 4, 1, 2]);
        assert_eq!(&frame(2, &[0; 126], mask)[..4], [0x82, 0xfe, 0, 126]);
        let long = frame(2, &[5; 65536], mask);
        assert_eq!(&long[..10], [0x82, 0xff, 0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!((long.len(), &long[14..18]), (65550, &[4, 7, 6, 1][..]));
    }
}
