//! Byte-pair encoding: the best-scored adjacent pair merges first, the leftmost of equals.

use super::pieces::Pieces;
use super::proto::Kind;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

/// Splits of an unused piece nest at most this deep; each step is shorter than the last.
const MAX_SPLIT_DEPTH: usize = 64;

/// A stretch of the text, linked to its neighbours. `end == start` once merged away.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// A user-defined piece never merges.
    frozen: bool,
}

/// Two neighbours whose concatenation is a piece.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of the concatenation when it was found; differs later if either side has changed.
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Pair) -> Ordering {
        // Scores are never NaN; 0.0 and −0.0 tie.
        let score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Pair) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Pair) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

struct Merger<'a> {
    text: &'a str,
    pieces: &'a Pieces,
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Pair>,
    /// Where an unused piece is to be cut again if it is left over.
    splits: HashMap<(usize, usize), usize>,
}

/// Ids of a normalised text.
pub fn encode(text: &str, pieces: &Pieces) -> Vec<u32> {
    let mut merger = Merger {
        text,
        pieces,
        symbols: split(text, pieces),
        heap: BinaryHeap::new(),
        splits: HashMap::new(),
    };
    for right in 1..merger.symbols.len() {
        merger.consider(Some(right - 1), Some(right));
    }
    while let Some(pair) = merger.heap.pop() {
        merger.merge(&pair);
    }
    let (mut ids, mut after_unknown) = (Vec::new(), false);
    let mut at = (!merger.symbols.is_empty()).then_some(0);
    while let Some(index) = at {
        let symbol = &merger.symbols[index];
        merger.emit(symbol.start, symbol.end, 0, &mut after_unknown, &mut ids);
        at = symbol.next;
    }
    ids
}

/// User-defined pieces, longest first, else single characters.
fn split(text: &str, pieces: &Pieces) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::new();
    let mut start = 0;
    while let Some(c) = text[start..].chars().next() {
        let user_defined = pieces.user_defined(&text.as_bytes()[start..]);
        let end = start + user_defined.unwrap_or(c.len_utf8());
        let index = symbols.len();
        symbols.push(Symbol {
            start,
            end,
            previous: index.checked_sub(1),
            next: (end < text.len()).then_some(index + 1),
            frozen: user_defined.is_some(),
        });
        start = end;
    }
    symbols
}

impl Merger<'_> {
    fn consider(&mut self, left: Option<usize>, right: Option<usize>) {
        let (Some(left), Some(right)) = (left, right) else { return };
        let (a, b) = (&self.symbols[left], &self.symbols[right]);
        if a.frozen || b.frozen {
            return;
        }
        let Some(id) = self.pieces.id(&self.text[a.start..b.end]) else { return };
        if self.pieces.kind(id) == Kind::Unused {
            self.splits.insert((a.start, b.end), b.start);
        }
        let length = b.end - a.start;
        self.heap.push(Pair { score: self.pieces.score(id), left, right, length });
    }

    fn merge(&mut self, pair: &Pair) {
        let (left, right) = (&self.symbols[pair.left], &self.symbols[pair.right]);
        let lengths = (left.end - left.start, right.end - right.start);
        if lengths.0 == 0 || lengths.1 == 0 || lengths.0 + lengths.1 != pair.length {
            return;
        }
        let (end, next) = (right.end, right.next);
        self.symbols[pair.right].end = self.symbols[pair.right].start;
        self.symbols[pair.left].end = end;
        self.symbols[pair.left].next = next;
        if let Some(next) = next {
            self.symbols[next].previous = Some(pair.left);
        }
        self.consider(self.symbols[pair.left].previous, Some(pair.left));
        self.consider(Some(pair.left), next);
    }

    fn emit(
        &self,
        start: usize,
        end: usize,
        depth: usize,
        after_unknown: &mut bool,
        ids: &mut Vec<u32>,
    ) {
        let text = &self.text[start..end];
        let id = self.pieces.id(text);
        if let Some(&cut) = self.splits.get(&(start, end))
            && depth < MAX_SPLIT_DEPTH
        {
            self.emit(start, cut, depth + 1, after_unknown, ids);
            self.emit(cut, end, depth + 1, after_unknown, ids);
            return;
        }
        match id {
            Some(id) => ids.push(id),
            None => self.pieces.push_unknown(text, *after_unknown, ids),
        }
        *after_unknown = id.is_none();
    }
}
