//! SentencePiece's compiled character table: a double-array trie from text to its replacement.

/// Longest replaced text looked for, in matches of the trie, as in SentencePiece.
const MAX_MATCHES: usize = 32;

/// A trie of u32 units (darts-clone's layout) and the NUL-terminated replacements it points to.
#[derive(Clone, Debug)]
pub struct Charsmap {
    units: Vec<u32>,
    replacements: Vec<u8>,
}

impl Charsmap {
    /// Layout: trie size in bytes (u32), the trie, the replacements; all little-endian.
    pub fn parse(bytes: &[u8]) -> Result<Charsmap, String> {
        let (size, rest) = bytes.split_first_chunk::<4>().ok_or("the character table is cut")?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) =
            rest.split_at_checked(size).ok_or("the character table's trie is cut")?;
        if trie.is_empty() || trie.len() % 4 != 0 {
            return Err(format!("the character table's trie is {size} bytes long"));
        }
        let unit = |b: &[u8]| b.iter().rev().fold(0u32, |n, &b| n << 8 | u32::from(b));
        Ok(Charsmap {
            units: trie.chunks_exact(4).map(unit).collect(),
            replacements: replacements.to_vec(),
        })
    }

    /// The longest entry that `text` starts with: its replacement and its length in bytes.
    pub fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let mut found = None;
        let mut matches = 0;
        let mut node = offset(*self.units.first()?);
        for (index, &byte) in text.as_bytes().iter().enumerate() {
            node ^= usize::from(byte);
            let Some(&unit) = self.units.get(node) else { break };
            if label(unit) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if has_leaf(unit) {
                let Some(&leaf) = self.units.get(node) else { break };
                found = Some((value(leaf), index + 1));
                matches += 1;
                if matches == MAX_MATCHES {
                    break;
                }
            }
        }
        let (start, length) = found?;
        let tail = self.replacements.get(start..)?;
        let end = tail.iter().position(|&b| b == 0)?;
        // A table that cuts characters apart is broken; such an entry is as good as none.
        let replacement = std::str::from_utf8(&tail[..end]).ok()?;
        text.is_char_boundary(length).then_some((replacement, length))
    }
}

fn has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

fn value(unit: u32) -> usize {
    (unit & 0x7fff_ffff) as usize
}

/// The byte of the edge into a unit; its top bit, set in leaves only, matches no byte.
fn label(unit: u32) -> u32 {
    unit & 0x8000_00ff
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 0x200) >> 6)) as usize
}
