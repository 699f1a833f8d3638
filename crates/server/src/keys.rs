//! API keys: a file of them, and the check of an `Authorization` header.

use std::path::Path;

use subtle::{Choice, ConstantTimeEq};

/// Longest key accepted, and the most keys of a file.
const LIMIT: usize = 1024;

/// Why a key file can't be used. No message contains a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// It can't be read.
    #[error("the key file `{path}` can't be read: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// A line is no key.
    #[error("line {line} of the key file: a key is 16 to 1024 visible ASCII characters")]
    Line {
        /// From 1.
        line: usize,
    },
    /// No key, or too many.
    #[error("the key file holds {0} keys, 1 to 1024 are accepted")]
    Count(usize),
}

/// The keys that are accepted.
#[derive(Clone)]
pub struct ApiKeys(Vec<Vec<u8>>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({} keys)", self.0.len())
    }
}

impl ApiKeys {
    /// Reads a file: one key per line; empty lines and lines that start with `#` are skipped.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| KeyFileError::Read { path: path.display().to_string(), error })?;
        Self::parse(&text)
    }

    /// The same from the file's text.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        let mut keys = Vec::new();
        for (i, line) in text.lines().enumerate() {
            let key = line.trim();
            if key.is_empty() || key.starts_with('#') {
                continue;
            }
            if !(16..=LIMIT).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(KeyFileError::Line { line: i + 1 });
            }
            keys.push(key.as_bytes().to_vec());
        }
        match keys.len() {
            1..=LIMIT => Ok(ApiKeys(keys)),
            n => Err(KeyFileError::Count(n)),
        }
    }

    /// Whether the value of an `Authorization` header names a key: `Api-Key K` or `Bearer K`.
    /// Every key is compared, each in constant time, so that the time tells nothing but lengths.
    pub fn accept(&self, authorization: Option<&[u8]>) -> bool {
        let Some(value) = authorization else { return false };
        let Some(space) = value.iter().position(|b| *b == b' ') else { return false };
        let (scheme, key) = (&value[..space], value[space + 1..].trim_ascii());
        if !scheme.eq_ignore_ascii_case(b"Api-Key") && !scheme.eq_ignore_ascii_case(b"Bearer") {
            return false;
        }
        let found = self.0.iter().fold(Choice::from(0), |found, known| found | known.ct_eq(key));
        found.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_schemes_are_accepted_and_nothing_else() {
        let keys =
            ApiKeys::parse("# robots\n0123456789abcdef\n\n  fedcba9876543210-two  \n").unwrap();
        let accept = |value: &str| keys.accept(Some(value.as_bytes()));
        assert!(accept("Api-Key 0123456789abcdef"));
        assert!(accept("bearer fedcba9876543210-two"));
        assert!(accept("Bearer  0123456789abcdef "));
        for wrong in [
            "",
            "Api-Key",
            "Api-Key ",
            "0123456789abcdef",
            "Basic 0123456789abcdef",
            "Api-Key 0123456789abcdeF",
            "Api-Key 0123456789abcde",
            "Api-Key 0123456789abcdef0",
            "Api-Key # robots",
        ] {
            assert!(!accept(wrong), "{wrong:?}");
        }
        assert!(!keys.accept(None));
        assert!(!format!("{keys:?}").contains("0123"));
    }

    #[test]
    fn bad_files_are_refused_without_telling_keys() {
        assert!(matches!(ApiKeys::parse("# none\n"), Err(KeyFileError::Count(0))));
        let short = ApiKeys::parse("0123456789abcdef\nsecret\n").unwrap_err();
        assert!(matches!(short, KeyFileError::Line { line: 2 }));
        assert!(!short.to_string().contains("secret"));
        assert!(matches!(
            ApiKeys::parse("two words are no key"),
            Err(KeyFileError::Line { line: 1 })
        ));
    }
}
