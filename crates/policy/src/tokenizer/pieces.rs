//! The vocabulary: text to id, user-defined pieces by longest prefix, bytes for the rest.

use super::proto::{Kind, Model};
use std::collections::HashMap;

#[derive(Clone, Debug)]
pub struct Pieces {
    /// Pieces that text can become: normal, user-defined and unused ones.
    ids: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    kinds: Vec<Kind>,
    user_defined: Prefixes,
    /// Everything in `ids`, for unigram's lattice.
    pub all: Prefixes,
    /// Ids of `<0x00>` to `<0xFF>`, when the model falls back to bytes.
    bytes: Option<Box<[u32; 256]>>,
    unknown: u32,
}

impl Pieces {
    pub fn new(model: &Model) -> Result<Pieces, String> {
        let mut ids = HashMap::with_capacity(model.pieces.len());
        let mut bytes = vec![None; 256];
        let (mut user_defined, mut all) = (Vec::new(), Vec::new());
        let unigram = model.trainer.model_type == 1;
        for (index, piece) in model.pieces.iter().enumerate() {
            let id = index as u32;
            if piece.text.is_empty() {
                return Err(format!("piece {index} is empty"));
            }
            match piece.kind {
                Kind::Normal | Kind::UserDefined | Kind::Unused => {
                    if ids.insert(piece.text.as_str().into(), id).is_some() {
                        return Err(format!("piece {index} (`{}`) appears twice", piece.text));
                    }
                    let entry = (piece.text.as_bytes().into(), id);
                    if piece.kind == Kind::UserDefined {
                        user_defined.push(entry.clone());
                    }
                    if unigram {
                        all.push(entry);
                    }
                }
                Kind::Byte => {
                    let byte = parse_byte(&piece.text)
                        .ok_or_else(|| format!("byte piece {index} is `{}`", piece.text))?;
                    bytes[usize::from(byte)] = Some(id);
                }
                Kind::Unknown | Kind::Control => {}
            }
        }
        let bytes: Option<Vec<u32>> = bytes.into_iter().collect();
        let bytes = match (model.trainer.byte_fallback, bytes) {
            (false, _) => None,
            (true, Some(ids)) => <Box<[u32; 256]>>::try_from(ids.into_boxed_slice()).ok(),
            (true, None) => return Err("byte fallback without all 256 byte pieces".into()),
        };
        let unknown = model.pieces.iter().position(|piece| piece.kind == Kind::Unknown);
        let unknown = unknown.map(|index| index as u32).ok_or("it has no unknown piece")?;
        Ok(Pieces {
            ids,
            scores: model.pieces.iter().map(|piece| piece.score).collect(),
            kinds: model.pieces.iter().map(|piece| piece.kind).collect(),
            user_defined: Prefixes::new(user_defined),
            all: Prefixes::new(all),
            bytes,
            unknown,
        })
    }

    pub fn count(&self) -> usize {
        self.kinds.len()
    }

    pub fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    pub fn score(&self, id: u32) -> f32 {
        self.scores.get(id as usize).copied().unwrap_or(0.0)
    }

    pub fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Unknown)
    }

    /// Scores of the normal pieces.
    pub fn normal_scores(&self) -> impl Iterator<Item = f32> {
        let pairs = self.scores.iter().zip(&self.kinds);
        pairs.filter(|(_, kind)| **kind == Kind::Normal).map(|(score, _)| *score)
    }

    /// Bytes of the longest user-defined piece that `text` starts with.
    pub fn user_defined(&self, text: &[u8]) -> Option<usize> {
        let mut longest = None;
        self.user_defined.each(text, |length, _| longest = Some(length));
        longest
    }

    /// Adds what stands for a text that is no piece: its bytes, or one unknown piece (a run of
    /// unknown texts gives a single one).
    pub fn push_unknown(&self, text: &str, after_unknown: bool, ids: &mut Vec<u32>) {
        match &self.bytes {
            Some(bytes) => ids.extend(text.bytes().map(|b| bytes[usize::from(b)])),
            None if after_unknown => {}
            None => ids.push(self.unknown),
        }
    }
}

fn parse_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` alone would take a sign.
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Texts in byte order, to find all that a text starts with.
#[derive(Clone, Debug)]
pub struct Prefixes {
    sorted: Vec<(Box<[u8]>, u32)>,
}

impl Prefixes {
    fn new(mut entries: Vec<(Box<[u8]>, u32)>) -> Prefixes {
        entries.sort();
        Prefixes { sorted: entries }
    }

    /// Calls `found(length, id)` for every entry that is a prefix of `text`, shortest first.
    pub fn each(&self, text: &[u8], mut found: impl FnMut(usize, u32)) {
        let mut range = self.sorted.as_slice();
        for (depth, byte) in text.iter().enumerate() {
            // All of `range` share the first `depth` bytes of `text` and are longer than that.
            let start = range.partition_point(|(entry, _)| entry[depth] < *byte);
            let end = range.partition_point(|(entry, _)| entry[depth] <= *byte);
            range = &range[start..end];
            // The entry that ends here sorts before its extensions.
            if let Some(((first, id), longer)) = range.split_first()
                && first.len() == depth + 1
            {
                found(depth + 1, *id);
                range = longer;
            }
            if range.is_empty() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_come_shortest_first() {
        let entries = ["ab", "a", "abcd", "b", "abce"];
        let entries = entries.iter().zip(0..).map(|(e, id)| (e.as_bytes().into(), id)).collect();
        let prefixes = Prefixes::new(entries);
        let found = |text: &str| {
            let mut all = Vec::new();
            prefixes.each(text.as_bytes(), |length, id| all.push((length, id)));
            all
        };
        assert_eq!(found("abcdef"), [(1, 1), (2, 0), (4, 2)]);
        assert_eq!(found("abc"), [(1, 1), (2, 0)]);
        assert_eq!(found("x"), []);
        assert_eq!(found(""), []);
    }

    #[test]
    fn byte_pieces_are_two_hex_digits() {
        assert_eq!(parse_byte("<0x0A>"), Some(10));
        assert_eq!(parse_byte("<0xA>"), None);
        assert_eq!(parse_byte("<0x+1>"), None);
        assert_eq!(parse_byte("0x00"), None);
    }
}
