//! The fields of SentencePiece's ModelProto that encoding needs, read from protobuf bytes.

/// Most pieces accepted (PaliGemma has 257,152).
const MAX_PIECES: usize = 1 << 21;
/// Longest piece accepted, in bytes.
const MAX_PIECE_BYTES: usize = 4096;

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

#[derive(Clone, Debug)]
pub struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub struct Trainer {
    /// 1 unigram, 2 BPE, 3 word, 4 char.
    pub model_type: u64,
    pub byte_fallback: bool,
    pub whitespace_as_suffix: bool,
    pub unk: i32,
    pub bos: i32,
}

#[derive(Clone, Debug)]
pub struct Normalizer {
    pub charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub escape_whitespaces: bool,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub pieces: Vec<Piece>,
    pub trainer: Trainer,
    pub normalizer: Normalizer,
}

impl Model {
    /// Walks the message; unknown fields are skipped, truncated ones are errors.
    pub fn parse(bytes: &[u8]) -> Result<Model, String> {
        let mut model = Model {
            pieces: Vec::new(),
            // The defaults of sentencepiece_model.proto.
            trainer: Trainer {
                model_type: 1,
                byte_fallback: false,
                whitespace_as_suffix: false,
                unk: 0,
                bos: 1,
            },
            normalizer: Normalizer {
                charsmap: Vec::new(),
                add_dummy_prefix: true,
                remove_extra_whitespaces: true,
                escape_whitespaces: true,
            },
        };
        let mut fields = Fields { rest: bytes };
        while let Some((number, field)) = fields.next()? {
            match (number, field) {
                (1, Field::Bytes(piece)) => {
                    if model.pieces.len() >= MAX_PIECES {
                        return Err(format!("more than {MAX_PIECES} pieces"));
                    }
                    let index = model.pieces.len();
                    model
                        .pieces
                        .push(parse_piece(piece).map_err(|e| format!("piece {index}: {e}"))?);
                }
                (2, Field::Bytes(trainer)) => parse_trainer(trainer, &mut model.trainer)?,
                (3, Field::Bytes(spec)) => parse_normalizer(spec, &mut model.normalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("it has no pieces".into());
        }
        Ok(model)
    }
}

fn parse_piece(bytes: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (1, Field::Bytes(text)) => {
                if text.len() > MAX_PIECE_BYTES {
                    return Err(format!("{} bytes of text", text.len()));
                }
                piece.text = std::str::from_utf8(text).map_err(|e| e.to_string())?.into();
            }
            (2, Field::Four(score)) => piece.score = f32::from_le_bytes(score),
            (3, Field::Varint(kind)) => {
                piece.kind = match kind {
                    1 => Kind::Normal,
                    2 => Kind::Unknown,
                    3 => Kind::Control,
                    4 => Kind::UserDefined,
                    5 => Kind::Unused,
                    6 => Kind::Byte,
                    other => return Err(format!("unknown type {other}")),
                }
            }
            _ => {}
        }
    }
    if piece.score.is_nan() {
        return Err("its score is NaN".into());
    }
    Ok(piece)
}

fn parse_trainer(bytes: &[u8], trainer: &mut Trainer) -> Result<(), String> {
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        let Field::Varint(value) = field else { continue };
        match number {
            3 => trainer.model_type = value,
            24 => trainer.whitespace_as_suffix = value != 0,
            35 => trainer.byte_fallback = value != 0,
            // An int32; −1 is written as ten bytes of a 64-bit value.
            40 => trainer.unk = value as i32,
            41 => trainer.bos = value as i32,
            _ => {}
        }
    }
    Ok(())
}

fn parse_normalizer(bytes: &[u8], normalizer: &mut Normalizer) -> Result<(), String> {
    let mut fields = Fields { rest: bytes };
    while let Some((number, field)) = fields.next()? {
        match (number, field) {
            (2, Field::Bytes(charsmap)) => normalizer.charsmap = charsmap.to_vec(),
            (3, Field::Varint(value)) => normalizer.add_dummy_prefix = value != 0,
            (4, Field::Varint(value)) => normalizer.remove_extra_whitespaces = value != 0,
            (5, Field::Varint(value)) => normalizer.escape_whitespaces = value != 0,
            _ => {}
        }
    }
    Ok(())
}

enum Field<'a> {
    Varint(u64),
    Eight,
    Bytes(&'a [u8]),
    Four([u8; 4]),
}

struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let field = match tag & 7 {
            0 => Field::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Field::Eight
            }
            2 => {
                let length = self.varint()?;
                Field::Bytes(self.take(length)?)
            }
            5 => {
                let mut four = [0; 4];
                four.copy_from_slice(self.take(4)?);
                Field::Four(four)
            }
            other => return Err(format!("protobuf wire type {other}")),
        };
        Ok(Some((tag >> 3, field)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let byte = self.take(1)?[0];
            // The tenth byte holds one bit of a 64-bit number; the rest falls off.
            value |= u64::from(byte & 127).checked_shl(shift).unwrap_or(0);
            if byte < 128 {
                return Ok(value);
            }
        }
        Err("a protobuf number of more than ten bytes".into())
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], String> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let (taken, rest) =
            self.rest.split_at_checked(length).ok_or("a protobuf field runs past the end")?;
        self.rest = rest;
        Ok(taken)
    }
}
