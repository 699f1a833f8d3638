//! Unigram segmentation: the split of the text with the highest sum of scores (Viterbi).

use super::pieces::Pieces;
use super::proto::Kind;

/// How much less an unknown character scores than the worst piece.
const UNKNOWN_PENALTY: f32 = 10.0;
/// How much less a user-defined piece scores than its length times the best piece.
const USER_DEFINED_PENALTY: f64 = 0.1;

/// The best way to reach a byte position.
#[derive(Clone, Copy)]
struct Best {
    start: usize,
    /// `None`: an unknown character.
    id: Option<u32>,
    score: f32,
}

/// Ids of a normalised text.
pub fn encode(text: &str, pieces: &Pieces) -> Vec<u32> {
    let lowest = pieces.normal_scores().fold(f32::INFINITY, f32::min);
    let highest = pieces.normal_scores().fold(f32::NEG_INFINITY, f32::max);
    let unknown = lowest - UNKNOWN_PENALTY;
    let mut best: Vec<Option<Best>> = vec![None; text.len() + 1];
    for (start, c) in text.char_indices() {
        // Every character is reachable: the one before it is, at least as an unknown.
        let here = best[start].map_or(0.0, |b| b.score);
        let mut single = false;
        pieces.all.each(&text.as_bytes()[start..], |length, id| {
            let score = match pieces.kind(id) {
                Kind::Unused => return,
                Kind::UserDefined => f64::from(length as f32 * highest) - USER_DEFINED_PENALTY,
                _ => f64::from(pieces.score(id)),
            };
            single |= length == c.len_utf8();
            improve(&mut best[start + length], start, Some(id), score + f64::from(here));
        });
        if !single {
            let score = f64::from(unknown + here);
            improve(&mut best[start + c.len_utf8()], start, None, score);
        }
    }
    let mut path = Vec::new();
    let mut end = text.len();
    while end > 0 {
        let Some(step) = best[end] else { break };
        path.push((step, end));
        end = step.start;
    }
    let (mut ids, mut after_unknown) = (Vec::new(), false);
    for (step, end) in path.into_iter().rev() {
        match step.id {
            Some(id) => ids.push(id),
            None => pieces.push_unknown(&text[step.start..end], after_unknown, &mut ids),
        }
        after_unknown = step.id.is_none();
    }
    ids
}

fn improve(best: &mut Option<Best>, start: usize, id: Option<u32>, score: f64) {
    if best.is_none_or(|known| score > f64::from(known.score)) {
        *best = Some(Best { start, id, score: score as f32 });
    }
}
