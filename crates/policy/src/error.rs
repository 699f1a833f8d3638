//! Errors a robot's client can see, each with the Python exception openpi would have raised.

use thiserror::Error;

/// Why one observation (or one chunk of actions) was refused. The connection decides what to do;
/// [`PolicyError::wire_text`] is the text frame that openpi's clients show.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum PolicyError {
    /// A required key is missing.
    #[error("the observation has no key '{key}'; {remedy}")]
    Key {
        /// The key as the client should have spelled it.
        key: String,
        /// The schema expected.
        remedy: String,
    },
    /// A value of the right type that can't be used: shape, length, NaN, an absent prompt.
    #[error("{message}; {remedy}")]
    Value {
        /// Message in openpi's (or NumPy's) words where there are any.
        message: String,
        /// What to send instead.
        remedy: String,
    },
    /// A value of a wrong type.
    #[error("{message}; {remedy}")]
    Type {
        /// Message in openpi's (or Pillow's) words where there are any.
        message: String,
        /// What to send instead.
        remedy: String,
    },
    /// A method is called on something that has none (openpi's way to say "wrong type").
    #[error("{message}; {remedy}")]
    Attribute {
        /// Message in Python's words.
        message: String,
        /// What to send instead.
        remedy: String,
    },
    /// The model produced actions that must not reach a robot.
    #[error("{message}; {remedy}")]
    Output {
        /// What is wrong with them.
        message: String,
        /// What to check.
        remedy: String,
    },
}

impl PolicyError {
    /// The Python exception type of the last traceback line.
    pub fn exception(&self) -> &'static str {
        match self {
            PolicyError::Key { .. } => "KeyError",
            PolicyError::Value { .. } => "ValueError",
            PolicyError::Type { .. } => "TypeError",
            PolicyError::Attribute { .. } => "AttributeError",
            PolicyError::Output { .. } => "RuntimeError",
        }
    }

    /// The message after `Type: ` of the last traceback line.
    pub fn message(&self) -> String {
        match self {
            PolicyError::Key { key, .. } => python_repr(key),
            PolicyError::Value { message, .. }
            | PolicyError::Type { message, .. }
            | PolicyError::Attribute { message, .. }
            | PolicyError::Output { message, .. } => message.clone(),
        }
    }

    /// What the sender should change.
    pub fn remedy(&self) -> &str {
        match self {
            PolicyError::Key { remedy, .. }
            | PolicyError::Value { remedy, .. }
            | PolicyError::Type { remedy, .. }
            | PolicyError::Attribute { remedy, .. }
            | PolicyError::Output { remedy, .. } => remedy,
        }
    }

    /// The whole text frame: the remedy first, `Type: message` as the last line.
    pub fn wire_text(&self) -> String {
        format!("{}\n{}: {}", self.remedy(), self.exception(), self.message())
    }

    pub(crate) fn value(message: impl Into<String>, remedy: impl Into<String>) -> PolicyError {
        PolicyError::Value { message: message.into(), remedy: remedy.into() }
    }

    pub(crate) fn wrong_type(message: impl Into<String>, remedy: impl Into<String>) -> PolicyError {
        PolicyError::Type { message: message.into(), remedy: remedy.into() }
    }
}

/// Python's `repr` of a string, as KeyError prints its key (control characters aside).
pub(crate) fn python_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Python's `repr` of a tuple of integers or of strings already in `repr` form: `(14,)`, `(2, 7)`.
pub(crate) fn python_tuple<T: ToString>(items: &[T], separator: &str) -> String {
    let inner: Vec<String> = items.iter().map(ToString::to_string).collect();
    match inner.as_slice() {
        [one] => format!("({one},)"),
        many => format!("({})", many.join(separator)),
    }
}

/// A key of the observation has an array of another shape than it may have.
pub(crate) fn wrong_shape(key: &str, shape: &[usize], expected: &str) -> PolicyError {
    PolicyError::value(
        format!("'{key}' has shape {}", python_tuple(shape, ", ")),
        format!("'{key}' must be {expected}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_pythons() {
        let error = PolicyError::Key { key: "a/b".into(), remedy: "send a/b".into() };
        assert_eq!(error.wire_text(), "send a/b\nKeyError: 'a/b'");
        assert_eq!(python_repr("it's"), "\"it's\"");
        assert_eq!(python_repr("a\n\u{1}"), "'a\\n\\x01'");
        assert_eq!(python_tuple(&[14], ", "), "(14,)");
        assert_eq!(python_tuple(&[2, 7], ","), "(2,7)");
    }
}
