//! gRPC's frames and LeRobot's three messages ↔ bytes.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::body::{Body, Incoming};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};

use crate::service::{Failure, ServiceError};

/// Largest message, as LeRobot's client has it; larger observations come in pieces.
pub(super) const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Length of a message's prefix: a flag and a size.
const PREFIX: usize = 5;

/// gRPC's outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    Cancelled = 1,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
}

/// Why a call failed, as the client is told. Never paths of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) code: Code,
    pub(super) message: String,
    /// Label in the metrics.
    pub(super) reason: &'static str,
}

impl Status {
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Status { code: Code::InvalidArgument, message: message.into(), reason: "invalid" }
    }

    pub(super) fn precondition(message: impl Into<String>) -> Self {
        Status { code: Code::FailedPrecondition, message: message.into(), reason: "invalid" }
    }

    pub(super) fn too_big(message: impl Into<String>) -> Self {
        Status { code: Code::ResourceExhausted, message: message.into(), reason: "too_big" }
    }

    pub(super) fn unavailable(message: impl Into<String>, reason: &'static str) -> Self {
        Status { code: Code::Unavailable, message: message.into(), reason }
    }

    fn unimplemented(message: impl Into<String>) -> Self {
        Status { code: Code::Unimplemented, message: message.into(), reason: "invalid" }
    }

    /// There is no such method here.
    pub(super) fn unknown_method(path: &str) -> Self {
        let shown: String = path.chars().take(80).collect();
        Status::unimplemented(format!("{shown} is not served: transport.AsyncInference is"))
    }

    pub(super) fn headers(&self, headers: &mut HeaderMap) {
        headers.insert(GRPC_STATUS, HeaderValue::from(self.code as u16));
        // Printable ASCII but `%`; everything else in hexadecimal, as gRPC wants it.
        let mut text = String::with_capacity(self.message.len());
        for byte in self.message.bytes().take(4096) {
            match byte {
                b' '..=b'~' if byte != b'%' => text.push(byte as char),
                _ => text.push_str(&format!("%{byte:02X}")),
            }
        }
        if let Ok(text) = HeaderValue::try_from(text) {
            headers.insert(GRPC_MESSAGE, text);
        }
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        let code = match (error.reason, error.failure) {
            ("overloaded" | "quota", _) => Code::ResourceExhausted,
            ("deadline", _) => Code::DeadlineExceeded,
            ("superseded", _) => Code::Cancelled,
            (_, Failure::Refusal) => Code::Unavailable,
            ("invalid", Failure::Exception) => Code::InvalidArgument,
            (_, Failure::Exception) => Code::Internal,
        };
        let detail = error.detail.as_deref().map(|d| format!(" ({d})")).unwrap_or_default();
        Status { code, message: error.line() + &detail, reason: error.reason }
    }
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// The messages of a request, one after the other. What has been read and not asked for is at
/// most a message and one frame of HTTP/2.
pub(super) struct Messages {
    body: Incoming,
    buffer: BytesMut,
}

impl Messages {
    pub(super) fn new(body: Incoming) -> Self {
        Messages { body, buffer: BytesMut::new() }
    }

    /// The next one; `None` after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Status> {
        while !self.complete()? {
            let frame = std::future::poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await;
            match frame {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(_)) => return Err(Status::unavailable("the request broke off", "gone")),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(Status::invalid("the request ends within a message")),
            }
        }
        let size = self.size();
        self.buffer.advance(PREFIX);
        Ok(Some(self.buffer.split_to(size).freeze()))
    }

    /// The only one of a request.
    pub(super) async fn only(&mut self) -> Result<Bytes, Status> {
        let message = self.next().await?;
        message.ok_or_else(|| Status::invalid("the request has no message"))
    }

    /// Size of the next message, where its prefix is there.
    fn size(&self) -> usize {
        match self.buffer[..] {
            [_, a, b, c, d, ..] => u32::from_be_bytes([a, b, c, d]) as usize,
            _ => 0,
        }
    }

    fn complete(&self) -> Result<bool, Status> {
        if self.buffer.len() < PREFIX {
            return Ok(false);
        }
        if self.buffer[0] != 0 {
            return Err(Status::unimplemented("compressed messages are not read here"));
        }
        let size = self.size();
        if size > MAX_MESSAGE_BYTES {
            let text = format!("a message of {size} bytes: at most {MAX_MESSAGE_BYTES} are read");
            return Err(Status::too_big(text));
        }
        Ok(self.buffer.len() >= PREFIX + size)
    }
}

/// The answer's body: one message and an outcome, or nothing.
pub(super) struct Answer {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl Answer {
    /// One message and "ok".
    pub(super) fn message(message: &[u8]) -> Self {
        let mut data = BytesMut::with_capacity(PREFIX + message.len());
        data.put_u8(0);
        data.put_u32(message.len() as u32);
        data.extend_from_slice(message);
        let mut trailers = HeaderMap::new();
        trailers.insert(GRPC_STATUS, HeaderValue::from_static("0"));
        Answer { data: Some(data.freeze()), trailers: Some(trailers) }
    }

    /// The outcome is in the head.
    pub(super) fn none() -> Self {
        Answer { data: None, trailers: None }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        use hyper::body::Frame;
        let data = self.data.take().map(Frame::data);
        let frame = data.or_else(|| self.trailers.take().map(Frame::trailers));
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }
}

/// A message of LeRobot's: a number it may have (`Observation.transfer_state`, 1) and its bytes
/// (`Observation.data`, 2; `PolicySetup.data` and `Actions.data`, 1).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parcel {
    pub(super) transfer_state: u64,
    pub(super) data: Bytes,
}

/// Reads a protobuf message; fields it doesn't know are skipped, as protobuf wants it.
pub(super) fn parcel(mut message: Bytes, data_field: u64) -> Result<Parcel, Status> {
    let broken = || Status::invalid("a message is no protobuf of LeRobot's");
    let mut parcel = Parcel::default();
    while !message.is_empty() {
        let key = varint(&mut message).ok_or_else(broken)?;
        let (field, kind) = (key >> 3, key & 7);
        let skip = match kind {
            0 => {
                let value = varint(&mut message).ok_or_else(broken)?;
                if field == 1 {
                    parcel.transfer_state = value;
                }
                continue;
            }
            1 => 8,
            2 => varint(&mut message).and_then(|n| usize::try_from(n).ok()).ok_or_else(broken)?,
            5 => 4,
            _ => return Err(broken()),
        };
        if skip > message.len() {
            return Err(broken());
        }
        let bytes = message.split_to(skip);
        if kind == 2 && field == data_field {
            parcel.data = bytes;
        }
    }
    Ok(parcel)
}

fn varint(message: &mut Bytes) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        if message.is_empty() {
            return None;
        }
        let byte = message.get_u8();
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// `Actions`; `Empty` without any.
pub(super) fn actions(data: &[u8]) -> Vec<u8> {
    if data.is_empty() {
        return Vec::new();
    }
    let mut out = vec![1 << 3 | 2];
    let mut n = data.len();
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
    out.extend_from_slice(data);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_messages_and_what_is_none() {
        let read = |bytes: &'static [u8], field| parcel(Bytes::from_static(bytes), field);
        let data = Bytes::from_static(b"abc");
        let want = Parcel { transfer_state: 3, data: data.clone() };
        assert_eq!(read(b"\x08\x03\x12\x03abc", 2), Ok(want.clone()));
        assert_eq!(read(b"\x12\x03abc\x08\x03", 2), Ok(want.clone()));
        // Fields of a later version, of every kind.
        let later = b"\x12\x03abc\x08\x03\x18\x96\x01\x21________\x2a\x01x\x35____";
        assert_eq!(read(later, 2), Ok(want));
        assert_eq!(read(b"\x0a\x03abc", 1).unwrap().data, data);
        assert_eq!(read(b"", 1), Ok(Parcel::default()));
        for broken in [
            &b"\x08"[..],
            b"\x12\x04abc",
            b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0b",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x21____",
        ] {
            assert!(read(broken, 2).is_err(), "{broken:?}");
        }
        let long = vec![7; 300];
        let sent = Bytes::from(actions(&long));
        assert_eq!(parcel(sent, 1).unwrap().data, long);
        assert!(actions(b"").is_empty());
    }

    #[test]
    fn statuses_travel_as_ascii() {
        let mut headers = HeaderMap::new();
        Status::invalid("50 % é\n").headers(&mut headers);
        assert_eq!(headers[GRPC_STATUS], "3");
        assert_eq!(headers[GRPC_MESSAGE], "50 %25 %C3%A9%0A");
        let code = |error: ServiceError| Status::from(error).code;
        assert_eq!(code(ServiceError::exception("KeyError", "'x'")), Code::InvalidArgument);
        assert_eq!(code(ServiceError::refusal("overloaded", "full")), Code::ResourceExhausted);
        assert_eq!(code(ServiceError::refusal("device", "again")), Code::Unavailable);
        assert_eq!(code(ServiceError::late()), Code::DeadlineExceeded);
        assert_eq!(code(ServiceError::superseded()), Code::Cancelled);
        let mut bug = ServiceError::exception("RuntimeError", "internal error");
        bug.reason = "internal";
        assert_eq!(code(bug), Code::Internal);
    }
}
