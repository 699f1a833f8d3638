//! Bytes → [`Value`]. Array data, byte strings and images stay in the frame they came in.

use bytes::Bytes;
use pirouette_policy::Value;

use super::ndarray;

/// Bounds on what one message may contain. They bound the memory a message can cost: a value
/// takes under a hundred bytes, strings and data no more than the message itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nested containers (default 16).
    pub depth: usize,
    /// Keys of one map (default 256).
    pub map_keys: usize,
    /// Values of the whole message, keys not counted (default 262,144).
    pub values: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { depth: 16, map_keys: 256, values: 1 << 18 }
    }
}

/// Why a message could not be decoded. `offset` is where in the message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends in the middle of a value.
    #[error("the message ends at byte {offset}, in the middle of a value")]
    Truncated {
        /// Length of the message.
        offset: usize,
    },
    /// Bytes after the value.
    #[error("{extra} bytes follow the value that ends at byte {offset}")]
    Trailing {
        /// End of the value.
        offset: usize,
        /// How many bytes follow.
        extra: usize,
    },
    /// The one byte msgpack never uses, or an extension type.
    #[error("byte {byte:#04x} at offset {offset} starts no value openpi's protocol knows")]
    Format {
        /// Where.
        offset: usize,
        /// The byte.
        byte: u8,
    },
    /// Too many nested containers.
    #[error("more than {limit} nested containers at offset {offset}")]
    Depth {
        /// Where.
        offset: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many of something.
    #[error("{what} at offset {offset}: at most {limit} are accepted")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// Where.
        offset: usize,
        /// The limit.
        limit: usize,
    },
    /// A string is not UTF-8.
    #[error("the string at offset {offset} is not UTF-8")]
    Utf8 {
        /// Start of the string.
        offset: usize,
    },
    /// A map key that is neither a string nor bytes.
    #[error("{found} is not allowed for map key when strict_map_key=True (offset {offset})")]
    Key {
        /// Where.
        offset: usize,
        /// Python's name of the key's type.
        found: &'static str,
    },
    /// A tagged map is no valid array or scalar.
    #[error("the NumPy value{} at offset {offset}: {reason}", of_key(.key))]
    Numpy {
        /// The map key it stands under, shortened; none outside of maps.
        key: Option<String>,
        /// Start of its map.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// How a message names the place of a value.
fn of_key(key: &Option<String>) -> String {
    key.as_ref().map_or_else(String::new, |key| format!(" of `{key}`"))
}

impl DecodeError {
    /// Names the key that the value stands under, unless a nearer one is named.
    fn under(mut self, of: &Key) -> Self {
        if let DecodeError::Numpy { key: key @ None, .. } = &mut self {
            let text = match of {
                Key::Text(text) => text.as_str().into(),
                Key::Tag(bytes) => String::from_utf8_lossy(&bytes[..bytes.len().min(320)]),
            };
            *key = Some(text.chars().take(80).flat_map(char::escape_default).collect());
        }
        self
    }

    /// The exception type openpi's Python server would raise.
    pub fn python_type(&self) -> &'static str {
        match self {
            DecodeError::Trailing { .. } => "msgpack.exceptions.ExtraData",
            DecodeError::Format { .. } => "msgpack.exceptions.FormatError",
            DecodeError::Depth { .. } => "msgpack.exceptions.StackError",
            DecodeError::Utf8 { .. } => "UnicodeDecodeError",
            DecodeError::Truncated { .. }
            | DecodeError::TooMany { .. }
            | DecodeError::Key { .. }
            | DecodeError::Numpy { .. } => "ValueError",
        }
    }
}

/// Decodes one message with the default [`Limits`].
pub fn decode(frame: &Bytes) -> Result<Value, DecodeError> {
    decode_with(frame, &Limits::default())
}

/// Decodes one message.
///
/// # Errors
/// The first thing that is wrong with it. Never panics, whatever the bytes.
pub fn decode_with(frame: &Bytes, limits: &Limits) -> Result<Value, DecodeError> {
    let mut reader = Reader { frame, at: 0, values: 0, limits };
    let value = reader.value(0)?;
    match frame.len() - reader.at {
        0 => Ok(value),
        extra => Err(DecodeError::Trailing { offset: reader.at, extra }),
    }
}

/// One key of a map: ordinary keys are str, openpi's tags are bin.
enum Key {
    Text(String),
    Tag(Bytes),
}

struct Reader<'a> {
    frame: &'a Bytes,
    /// Never beyond the end.
    at: usize,
    values: usize,
    limits: &'a Limits,
}

impl Reader<'_> {
    fn take(&mut self, n: usize) -> Result<&[u8], DecodeError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.frame.len());
        let end = end.ok_or(DecodeError::Truncated { offset: self.frame.len() })?;
        let bytes = &self.frame[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn shared(&mut self, n: usize) -> Result<Bytes, DecodeError> {
        let start = self.at;
        self.take(n)?;
        Ok(self.frame.slice(start..start + n))
    }

    fn big_endian<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    /// An unsigned length of 1, 2 or 4 bytes, by the low bits of the type byte.
    fn length(&mut self, width: u8) -> Result<usize, DecodeError> {
        Ok(match width {
            0 => self.big_endian::<1>()?[0] as usize,
            1 => u16::from_be_bytes(self.big_endian()?) as usize,
            _ => u32::from_be_bytes(self.big_endian()?) as usize,
        })
    }

    fn value(&mut self, depth: usize) -> Result<Value, DecodeError> {
        let offset = self.at;
        self.values += 1;
        if self.values > self.limits.values {
            let limit = self.limits.values;
            return Err(DecodeError::TooMany { what: "values", offset, limit });
        }
        let byte = self.big_endian::<1>()?[0];
        Ok(match byte {
            0x00..=0x7f => Value::Int(byte as i128),
            0xe0..=0xff => Value::Int(byte as i8 as i128),
            0x80..=0x8f => self.map((byte & 0x0f) as usize, offset, depth)?,
            0x90..=0x9f => self.list((byte & 0x0f) as usize, offset, depth)?,
            0xa0..=0xbf => Value::Str(self.text((byte & 0x1f) as usize)?),
            0xc0 => Value::Nil,
            0xc2 => Value::Bool(false),
            0xc3 => Value::Bool(true),
            0xc4..=0xc6 => {
                let n = self.length(byte - 0xc4)?;
                Value::Bytes(self.shared(n)?)
            }
            0xca => Value::Float(f32::from_be_bytes(self.big_endian()?) as f64),
            0xcb => Value::Float(f64::from_be_bytes(self.big_endian()?)),
            0xcc => Value::Int(self.big_endian::<1>()?[0] as i128),
            0xcd => Value::Int(u16::from_be_bytes(self.big_endian()?) as i128),
            0xce => Value::Int(u32::from_be_bytes(self.big_endian()?) as i128),
            0xcf => Value::Int(u64::from_be_bytes(self.big_endian()?) as i128),
            0xd0 => Value::Int(i8::from_be_bytes(self.big_endian()?) as i128),
            0xd1 => Value::Int(i16::from_be_bytes(self.big_endian()?) as i128),
            0xd2 => Value::Int(i32::from_be_bytes(self.big_endian()?) as i128),
            0xd3 => Value::Int(i64::from_be_bytes(self.big_endian()?) as i128),
            0xd9..=0xdb => {
                let n = self.length(byte - 0xd9)?;
                Value::Str(self.text(n)?)
            }
            0xdc | 0xdd => {
                let n = self.length(byte - 0xdc + 1)?;
                self.list(n, offset, depth)?
            }
            0xde | 0xdf => {
                let n = self.length(byte - 0xde + 1)?;
                self.map(n, offset, depth)?
            }
            0xc1 | 0xc7..=0xc9 | 0xd4..=0xd8 => return Err(DecodeError::Format { offset, byte }),
        })
    }

    fn text(&mut self, n: usize) -> Result<String, DecodeError> {
        let offset = self.at;
        let text = std::str::from_utf8(self.take(n)?);
        text.map(str::to_owned).map_err(|_| DecodeError::Utf8 { offset })
    }

    fn descend(&self, depth: usize, offset: usize) -> Result<usize, DecodeError> {
        let limit = self.limits.depth;
        if depth < limit { Ok(depth + 1) } else { Err(DecodeError::Depth { offset, limit }) }
    }

    fn list(&mut self, n: usize, offset: usize, depth: usize) -> Result<Value, DecodeError> {
        let depth = self.descend(depth, offset)?;
        // The claimed length reserves next to nothing: only what is really there takes memory.
        let mut items = Vec::with_capacity(n.min(16));
        for _ in 0..n {
            items.push(self.value(depth)?);
        }
        Ok(Value::List(items))
    }

    /// Looks at the type byte first: a container as a key would escape the depth limit.
    fn key(&mut self) -> Result<Key, DecodeError> {
        let offset = self.at;
        let byte = self.big_endian::<1>()?[0];
        let found = match byte {
            0xa0..=0xbf => return Ok(Key::Text(self.text((byte & 0x1f) as usize)?)),
            0xd9..=0xdb => {
                let n = self.length(byte - 0xd9)?;
                return Ok(Key::Text(self.text(n)?));
            }
            0xc4..=0xc6 => {
                let n = self.length(byte - 0xc4)?;
                return Ok(Key::Tag(self.shared(n)?));
            }
            0x00..=0x7f | 0xe0..=0xff | 0xcc..=0xd3 => "int",
            0xca | 0xcb => "float",
            0xc2 | 0xc3 => "bool",
            0xc0 => "NoneType",
            0x90..=0x9f | 0xdc | 0xdd => "list",
            0x80..=0x8f | 0xde | 0xdf => "dict",
            0xc1 | 0xc7..=0xc9 | 0xd4..=0xd8 => return Err(DecodeError::Format { offset, byte }),
        };
        Err(DecodeError::Key { offset, found })
    }

    fn map(&mut self, n: usize, offset: usize, depth: usize) -> Result<Value, DecodeError> {
        let depth = self.descend(depth, offset)?;
        let limit = self.limits.map_keys;
        if n > limit {
            return Err(DecodeError::TooMany { what: "keys of a map", offset, limit });
        }
        let mut text: Vec<(String, Value)> = Vec::with_capacity(n.min(16));
        let mut tags: Vec<(Bytes, Value)> = Vec::new();
        for _ in 0..n {
            let key = self.key()?;
            let value = self.value(depth).map_err(|error| error.under(&key))?;
            match key {
                // As in a Python dictionary: the last value wins, at the first one's place.
                Key::Text(key) => match text.iter_mut().find(|(k, _)| *k == key) {
                    Some((_, old)) => *old = value,
                    None => text.push((key, value)),
                },
                Key::Tag(key) => match tags.iter_mut().find(|(k, _)| *k == key) {
                    Some((_, old)) => *old = value,
                    None => tags.push((key, value)),
                },
            }
        }
        match ndarray::from_tags(&tags) {
            Some(tagged) => {
                tagged.map_err(|reason| DecodeError::Numpy { key: None, offset, reason })
            }
            // No policy has keys of bytes: they are as unknown to it as other keys it ignores.
            None => Ok(Value::Map(text)),
        }
    }
}
