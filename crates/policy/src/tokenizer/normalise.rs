//! Text as the pieces expect it: characters replaced, spaces collapsed and written as U+2581.

use super::charsmap::Charsmap;
use super::pieces::Pieces;
use super::proto;

/// SentencePiece's visible space.
const SPACE: &str = "\u{2581}";

#[derive(Clone, Debug)]
pub struct Normaliser {
    charsmap: Option<Charsmap>,
    add_dummy_prefix: bool,
    collapse: bool,
    /// How a space is written.
    space: &'static str,
}

impl Normaliser {
    pub fn new(spec: proto::Normalizer) -> Result<Normaliser, String> {
        Ok(Normaliser {
            charsmap: if spec.charsmap.is_empty() {
                None
            } else {
                Some(Charsmap::parse(&spec.charsmap)?)
            },
            add_dummy_prefix: spec.add_dummy_prefix,
            collapse: spec.remove_extra_whitespaces,
            space: if spec.escape_whitespaces { SPACE } else { " " },
        })
    }

    pub fn apply(&self, text: &str, pieces: &Pieces) -> String {
        let mut rest = text;
        if self.collapse {
            while let Some((" ", length)) = self.step(rest, pieces) {
                rest = &rest[length..];
            }
        }
        let mut out = String::with_capacity(rest.len() + 3);
        if rest.is_empty() {
            return out;
        }
        if self.add_dummy_prefix {
            out.push_str(self.space);
        }
        let mut after_space = self.collapse;
        while let Some((replaced, length)) = self.step(rest, pieces) {
            let replaced = if after_space { replaced.trim_start_matches(' ') } else { replaced };
            if !replaced.is_empty() {
                replaced.chars().for_each(|c| match c {
                    ' ' => out.push_str(self.space),
                    c => out.push(c),
                });
                after_space = self.collapse && replaced.ends_with(' ');
            }
            rest = &rest[length..];
        }
        if self.collapse {
            while let Some(shorter) = out.strip_suffix(self.space) {
                out.truncate(shorter.len());
            }
        }
        out
    }

    /// The next stretch of text: what it becomes and how many bytes it takes. User-defined pieces
    /// are left as they are, then the longest entry of the table counts, else one character.
    fn step<'a>(&'a self, text: &'a str, pieces: &Pieces) -> Option<(&'a str, usize)> {
        let length = text.chars().next()?.len_utf8();
        if let Some(length) = pieces.user_defined(text.as_bytes()) {
            return Some((&text[..length], length));
        }
        let replaced = self.charsmap.as_ref().and_then(|map| map.longest(text));
        Some(replaced.unwrap_or((&text[..length], length)))
    }
}
