//! Bytes of an OCDBT blob → its integers and strings, never reading past the end.

use std::borrow::Cow;
use std::io::Read;

use crate::error::Malformed;

/// Largest manifest or node accepted, compressed or not. Orbax caps decoded nodes at 1e8.
pub const MAX_BLOB_BYTES: usize = 128 << 20;

/// Reads one blob front to back.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub fn raw(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        if n > self.remaining() {
            return Err(Malformed::new(format!(
                "{n} bytes wanted at byte {}, {} left",
                self.at,
                self.remaining()
            )));
        }
        let out = &self.bytes[self.at..self.at + n];
        self.at += n;
        Ok(out)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut out = [0; N];
        out.copy_from_slice(self.raw(N)?);
        Ok(out)
    }

    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u32_be(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub fn u64_le(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// Unsigned LEB128.
    pub fn varint(&mut self) -> Result<u64, Malformed> {
        let start = self.at;
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 127);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte < 128 {
                return Ok(value);
            }
        }
        Err(Malformed::new(format!("integer at byte {start} exceeds 64 bits")))
    }

    /// A varint that indexes or measures something in memory.
    pub fn size(&mut self) -> Result<usize, Malformed> {
        let value = self.varint()?;
        usize::try_from(value).map_err(|_| Malformed::new(format!("{value} is no size")))
    }

    /// A number of rows, each of which takes at least one more byte.
    pub fn count(&mut self, what: &str) -> Result<usize, Malformed> {
        let n = self.size()?;
        if n > self.remaining() {
            return Err(Malformed::new(format!("{n} {what} in {} bytes", self.remaining())));
        }
        Ok(n)
    }

    /// A column of `n` varints.
    pub fn column(&mut self, n: usize) -> Result<Vec<u64>, Malformed> {
        (0..n).map(|_| self.varint()).collect()
    }

    /// A column of `n` sizes.
    pub fn sizes(&mut self, n: usize) -> Result<Vec<usize>, Malformed> {
        (0..n).map(|_| self.size()).collect()
    }

    /// Strings stored as (shared prefix with the one before, own suffix): both length columns,
    /// then `between`, then the suffixes.
    pub fn prefixed<T>(
        &mut self,
        n: usize,
        limit: usize,
        between: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<(Vec<Vec<u8>>, T), Malformed> {
        let mut shared = vec![0; n.min(1)];
        shared.extend(self.sizes(n.saturating_sub(1))?);
        let suffixes = self.sizes(n)?;
        let middle = between(self)?;
        let mut out: Vec<Vec<u8>> = Vec::new();
        let mut total = 0usize;
        for (&shared, &suffix) in shared.iter().zip(&suffixes) {
            let before = out.last().map_or(&[][..], Vec::as_slice);
            let start = before.get(..shared).ok_or_else(|| {
                Malformed::new(format!("shared prefix of {shared} in a name of {}", before.len()))
            })?;
            let name = [start, self.raw(suffix)?].concat();
            total += name.len();
            if name.len() > limit || total > MAX_BLOB_BYTES {
                return Err(Malformed::new(format!("name of {} bytes is too long", name.len())));
            }
            out.push(name);
        }
        Ok((out, middle))
    }

    pub fn finish(&self) -> Result<(), Malformed> {
        match self.remaining() {
            0 => Ok(()),
            n => Err(Malformed::new(format!("{n} bytes left over at byte {}", self.at))),
        }
    }
}

/// Checks magic, length and checksum of a blob and returns its decompressed body.
pub(super) fn open_envelope(blob: &[u8], magic: u32) -> Result<Cow<'_, [u8]>, Malformed> {
    if blob.len() > MAX_BLOB_BYTES {
        return Err(Malformed::new(format!("{} bytes, limit {MAX_BLOB_BYTES}", blob.len())));
    }
    let Some((covered, checksum)) = blob.split_last_chunk::<4>() else {
        return Err(Malformed::new(format!("{} bytes are too few", blob.len())));
    };
    let mut head = Cursor::new(covered);
    let found = head.u32_be()?;
    if found != magic {
        return Err(Malformed::new(format!("starts with {found:08x}, expected {magic:08x}")));
    }
    let length = head.u64_le()?;
    if length != blob.len() as u64 {
        return Err(Malformed::new(format!("claims {length} bytes, has {}", blob.len())));
    }
    let (stored, computed) = (u32::from_le_bytes(*checksum), crc32c::crc32c(covered));
    if stored != computed {
        return Err(Malformed::new(format!("checksum {computed:08x}, recorded {stored:08x}")));
    }
    match (head.varint()?, head.varint()?) {
        (0, 0) => Ok(Cow::Borrowed(&covered[head.at..])),
        (0, 1) => decompress(&covered[head.at..]).map(Cow::Owned),
        (0, method) => Err(Malformed::new(format!("unknown compression {method}"))),
        (version, _) => Err(Malformed::new(format!("unknown OCDBT version {version}"))),
    }
}

fn decompress(frame: &[u8]) -> Result<Vec<u8>, Malformed> {
    let bad = |e: String| Malformed::new(format!("zstd body: {e}"));
    let decoder = ruzstd::decoding::StreamingDecoder::new(frame).map_err(|e| bad(e.to_string()))?;
    let mut body = Vec::new();
    decoder
        .take(MAX_BLOB_BYTES as u64 + 1)
        .read_to_end(&mut body)
        .map_err(|e| bad(e.to_string()))?;
    if body.len() > MAX_BLOB_BYTES {
        return Err(bad(format!("more than {MAX_BLOB_BYTES} bytes")));
    }
    Ok(body)
}
