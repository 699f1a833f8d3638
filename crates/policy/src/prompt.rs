//! From an instruction (and, for π0.5, the normalised state) to prompt tokens.

use crate::tokenizer::Tokenizer;

/// How an instruction becomes a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptFormat {
    /// openpi's π0: the cleaned instruction, then a newline encoded on its own.
    Instruction,
    /// π0.5: "Task: …, State: …;\nAction: " in one piece.
    TaskAndState,
    /// LeRobot's π0: the instruction as it is, with a newline at the end, in one piece.
    Lerobot,
}

/// Tokens of one prompt, without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// BOS first; at most as many as asked for, the head is kept.
    pub ids: Vec<u32>,
    /// How many were cut off. Not zero means that the model misses the end of its prompt.
    pub dropped: usize,
}

/// What Python's `str.strip` takes for white space; `char::is_whitespace` lacks 001C to 001F.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// openpi's cleaning: strip, then `_` to space, then newline to space, in that order.
pub fn clean(instruction: &str) -> String {
    instruction.trim_matches(is_python_space).replace(['_', '\n'], " ")
}

/// The state as openpi writes it: each number's bin among 256 edges −1 + k/128, minus one if it
/// is below all; 255 for NaN. Not clipped on the left: "-1" is possible.
pub fn state_digits(state: &[f64]) -> String {
    let bins: Vec<String> = state.iter().map(|&x| bin(x).to_string()).collect();
    bins.join(" ")
}

fn bin(x: f64) -> i64 {
    if x.is_nan() {
        return 255;
    }
    // Scaling by a power of two is exact, so no edge is missed.
    ((x * 128.0).floor() + 128.0).clamp(-1.0, 255.0) as i64
}

/// The prompt of one request. `state` is normalised and un-padded; only
/// [`PromptFormat::TaskAndState`] reads it. At most `max_token_len` tokens remain.
pub fn prompt_tokens(
    tokenizer: &Tokenizer,
    format: PromptFormat,
    instruction: &str,
    state: &[f64],
    max_token_len: usize,
) -> PromptTokens {
    let mut ids = vec![tokenizer.bos()];
    match format {
        PromptFormat::Instruction => {
            ids.extend(tokenizer.encode(&clean(instruction)));
            ids.extend(tokenizer.encode("\n"));
        }
        PromptFormat::TaskAndState => {
            let (task, digits) = (clean(instruction), state_digits(state));
            ids.extend(tokenizer.encode(&format!("Task: {task}, State: {digits};\nAction: ")));
        }
        PromptFormat::Lerobot => {
            let newline = if instruction.ends_with('\n') { "" } else { "\n" };
            ids.extend(tokenizer.encode(&format!("{instruction}{newline}")));
        }
    }
    let dropped = ids.len().saturating_sub(max_token_len);
    ids.truncate(max_token_len);
    PromptTokens { ids, dropped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleaning_follows_python() {
        assert_eq!(clean("\u{1c} fold_the\ntowel \u{3000}\n"), "fold the towel");
        assert_eq!(clean("_x"), " x");
        assert_eq!(clean("a  B\tc"), "a  B\tc");
        assert_eq!(clean("\u{200b}x"), "\u{200b}x");
    }

    #[test]
    fn bins_at_the_edges() {
        let state = [0.0, -0.0, -1e-30, 1.0, 127.0 / 128.0, -1.0, -1.0 - 1e-15, f64::NAN, 1e300];
        assert_eq!(state_digits(&state), "128 128 127 255 255 0 -1 255 255");
        assert_eq!(state_digits(&[f64::INFINITY, f64::NEG_INFINITY]), "255 -1");
        assert_eq!(state_digits(&[]), "");
    }
}
