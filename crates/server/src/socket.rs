//! A byte stream after its upgrade → websocket messages, and back (RFC 6455, the server's side).
//!
//! A frame is read straight into memory of its size, which is not zeroed before, and unmasked part
//! by part while the rest of it is on its way: of half a megabyte of pixels that is worth a tenth
//! of a millisecond over reading first and unmasking then. Every method may be dropped at any
//! point and called again: what was read or is left to write stays here.

use std::io::{self, Cursor};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{CloseCode, Control, Data, OpCode};

/// What is read when it is not known how long the next frame is.
const HEAD: usize = 4 << 10;

/// What may wait to be taken by one client before another message joins it. A message alone may be
/// longer: 128 chunks of 1024 actions of 32 dimensions are 32 MiB.
const MAX_UNSENT_BYTES: usize = 8 << 20;

/// Longest payload of a control frame.
const MAX_CONTROL: usize = 125;

/// A message from the client. Pings are answered here, and so is a close.
#[derive(Debug, PartialEq)]
pub(crate) enum Message {
    Binary(Bytes),
    /// Nobody here reads text.
    Text,
    /// Pings and pongs.
    Alive,
    Close,
}

/// Why there are no more messages.
#[derive(Debug, PartialEq)]
pub(crate) enum Fault {
    /// The conversation is over, or the transport broke.
    Gone,
    /// The client does not take what it was sent, and that is too much by now.
    Unread,
    /// Longer than is accepted.
    TooBig,
    /// Against the protocol.
    Protocol(&'static str),
    /// Text that is not UTF-8.
    Utf8,
}

impl From<io::Error> for Fault {
    fn from(_: io::Error) -> Self {
        Fault::Gone
    }
}

/// A frame that is being read.
struct Frame {
    kind: OpCode,
    last: bool,
    mask: [u8; 4],
    /// Bytes of its payload still to come.
    left: usize,
}

/// One websocket.
pub(crate) struct Socket<S> {
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    /// Longest message, in bytes.
    limit: usize,
    /// Read, but of no frame yet.
    head: BytesMut,
    frame: Option<Frame>,
    /// Of that frame, unmasked.
    payload: BytesMut,
    /// A message whose last frame has not come.
    message: Option<(Data, BytesMut)>,
    /// To be written.
    out: BytesMut,
    flushed: bool,
    /// Only the last ping is answered: a client that sends them and does not read piles up nothing.
    pong: Option<Bytes>,
    /// A close frame was sent, or waits in `out`.
    closing: bool,
    /// Nothing more will be read.
    ended: bool,
}

impl<S: AsyncRead + AsyncWrite> Socket<S> {
    /// `limit`: the longest message that is accepted, in bytes. `head`: what was read already.
    pub(crate) fn new(stream: S, limit: usize, head: Bytes) -> Self {
        let (reader, writer) = split(stream);
        Socket {
            reader,
            writer,
            limit,
            head: head.into(),
            frame: None,
            payload: BytesMut::new(),
            message: None,
            out: BytesMut::new(),
            flushed: true,
            pong: None,
            closing: false,
            ended: false,
        }
    }

    /// The next message.
    pub(crate) async fn receive(&mut self) -> Result<Message, Fault> {
        loop {
            if self.ended {
                self.flush().await?;
                return Err(Fault::Gone);
            }
            match self.advance() {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => self.exchange().await.inspect_err(|_| self.ended = true)?,
                Err(fault) => {
                    self.ended = true;
                    return Err(fault);
                }
            }
        }
    }

    /// Sends a frame, after whatever still waits to be sent.
    pub(crate) async fn send(&mut self, kind: Data, payload: &[u8]) -> Result<(), Fault> {
        self.push(OpCode::Data(kind), payload)?;
        self.flush().await
    }

    /// Asks the client for a sign of life.
    pub(crate) async fn ping(&mut self) -> Result<(), Fault> {
        self.push(OpCode::Control(Control::Ping), b"pirouette")?;
        self.flush().await
    }

    /// Begins the closing handshake, unless the client has: nothing may be sent afterwards.
    pub(crate) async fn close(&mut self, code: u16, reason: &str) -> Result<(), Fault> {
        let mut payload = code.to_be_bytes().to_vec();
        payload.extend(reason.as_bytes());
        payload.truncate(MAX_CONTROL);
        self.push(OpCode::Control(Control::Close), &payload)?;
        self.closing = true;
        self.flush().await
    }

    fn push(&mut self, kind: OpCode, payload: &[u8]) -> Result<(), Fault> {
        if self.closing {
            return Err(Fault::Gone);
        }
        if self.out.len() > MAX_UNSENT_BYTES {
            return Err(Fault::Unread);
        }
        let header = FrameHeader { opcode: kind, ..FrameHeader::default() };
        header.format(payload.len() as u64, &mut (&mut self.out).writer()).map_err(fault)?;
        self.out.put_slice(payload);
        self.flushed = false;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Fault> {
        Ok(write(&mut self.writer, &mut self.out, &mut self.flushed).await?)
    }

    /// Reads some bytes of the frame at hand, or of the next one; meanwhile writes what waits.
    async fn exchange(&mut self) -> Result<(), Fault> {
        if self.out.is_empty()
            && let Some(pong) = self.pong.take()
        {
            self.push(OpCode::Control(Control::Pong), &pong)?;
        }
        let (into, most) = match &self.frame {
            Some(frame) => (&mut self.payload, frame.left),
            None => (&mut self.head, HEAD),
        };
        let before = into.len();
        let mut into = into.limit(most);
        let read = tokio::select! {
            biased;
            written = write(&mut self.writer, &mut self.out, &mut self.flushed),
                if !self.flushed => return Ok(written?),
            read = self.reader.read_buf(&mut into) => read?,
        };
        if read == 0 {
            return Err(Fault::Gone);
        }
        if let Some(frame) = &mut self.frame {
            unmask(&mut self.payload[before..], frame.mask, before);
            frame.left -= read;
        }
        Ok(())
    }

    /// The message that ends in what was read so far, if one does.
    fn advance(&mut self) -> Result<Option<Message>, Fault> {
        loop {
            if self.frame.is_none() && !self.begin()? {
                return Ok(None);
            }
            match self.frame.take_if(|frame| frame.left == 0) {
                None => return Ok(None),
                Some(frame) => match self.complete(frame)? {
                    None => {}
                    message => return Ok(message),
                },
            }
        }
    }

    /// Reads the header of the next frame; false while it is not complete.
    fn begin(&mut self) -> Result<bool, Fault> {
        let mut cursor = Cursor::new(&self.head[..]);
        let Some((header, length)) = FrameHeader::parse(&mut cursor).map_err(fault)? else {
            return Ok(false);
        };
        let parsed = cursor.position() as usize;
        self.head.advance(parsed);
        if header.rsv1 || header.rsv2 || header.rsv3 {
            return Err(Fault::Protocol("reserved bits are set"));
        }
        let Some(mask) = header.mask else {
            return Err(Fault::Protocol("a frame is not masked"));
        };
        let before = match (header.opcode, &self.message) {
            (OpCode::Control(_), _) if !header.is_final => {
                return Err(Fault::Protocol("a control frame is fragmented"));
            }
            (OpCode::Control(_), _) if length > MAX_CONTROL as u64 => {
                return Err(Fault::Protocol("a control frame is too long"));
            }
            (OpCode::Control(_), _) => 0,
            (OpCode::Data(Data::Continue), Some((_, begun))) => begun.len(),
            (OpCode::Data(Data::Continue), None) => {
                return Err(Fault::Protocol("nothing is to be continued"));
            }
            (OpCode::Data(_), Some(_)) => {
                return Err(Fault::Protocol("a message begins inside another"));
            }
            (OpCode::Data(_), None) => 0,
        };
        let length = usize::try_from(length).ok().filter(|n| *n <= self.limit - before);
        let length = length.ok_or(Fault::TooBig)?;
        let here = length.min(self.head.len());
        self.payload = BytesMut::with_capacity(length);
        self.payload.put_slice(&self.head[..here]);
        self.head.advance(here);
        unmask(&mut self.payload, mask, 0);
        let (kind, last) = (header.opcode, header.is_final);
        self.frame = Some(Frame { kind, last, mask, left: length - here });
        Ok(true)
    }

    /// The message that a whole frame is, or is the end of.
    fn complete(&mut self, frame: Frame) -> Result<Option<Message>, Fault> {
        let payload = std::mem::take(&mut self.payload);
        let (kind, whole) = match (frame.kind, self.message.take()) {
            (OpCode::Control(control), message) => {
                self.message = message;
                return self.control(control, payload).map(Some);
            }
            (OpCode::Data(_), Some((kind, mut begun))) => {
                begun.extend_from_slice(&payload);
                (kind, begun)
            }
            (OpCode::Data(kind), None) => (kind, payload),
        };
        if !frame.last {
            self.message = Some((kind, whole));
            return Ok(None);
        }
        match kind {
            Data::Text if std::str::from_utf8(&whole).is_err() => Err(Fault::Utf8),
            Data::Text => Ok(Some(Message::Text)),
            _ => Ok(Some(Message::Binary(whole.freeze()))),
        }
    }

    fn control(&mut self, kind: Control, payload: BytesMut) -> Result<Message, Fault> {
        if kind != Control::Close {
            if kind == Control::Ping && !self.closing {
                self.pong = Some(payload.freeze());
            }
            return Ok(Message::Alive);
        }
        let echo = match &payload[..] {
            [] => Bytes::new(),
            [_] => return Err(Fault::Protocol("half a close code")),
            [a, b, reason @ ..] => {
                std::str::from_utf8(reason).map_err(|_| Fault::Utf8)?;
                let allowed = CloseCode::from(u16::from_be_bytes([*a, *b])).is_allowed();
                let wrong = Bytes::from_static(b"\x03\xeaProtocol violation");
                if allowed { payload.freeze() } else { wrong }
            }
        };
        self.ended = true;
        if !self.closing {
            self.push(OpCode::Control(Control::Close), &echo)?;
            self.closing = true;
        }
        Ok(Message::Close)
    }
}

async fn write<S: AsyncWrite>(
    writer: &mut WriteHalf<S>,
    out: &mut BytesMut,
    flushed: &mut bool,
) -> io::Result<()> {
    if !*flushed {
        writer.write_all_buf(out).await?;
        writer.flush().await?;
        *flushed = true;
    }
    Ok(())
}

/// What a header that can't be read or written is.
fn fault(error: tungstenite::Error) -> Fault {
    match error {
        tungstenite::Error::Io(_) => Fault::Gone,
        _ => Fault::Protocol("no such kind of frame"),
    }
}

/// Takes the mask off bytes that begin `offset` bytes into their frame.
fn unmask(bytes: &mut [u8], mut mask: [u8; 4], offset: usize) {
    mask.rotate_left(offset % 4);
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests;
