//! A file of API keys, read again when it changes → who an `Authorization` header is.
//!
//! A line is a key, perhaps with a name before it and quotas after it:
//!
//! ```text
//! # name    key                            quotas
//! arm-1     0f3c9a7be41d4c5e8a2f           connections=2 rate=20 burst=40 in_flight=4
//! 5d2e8b1c7f6a4930bd1e
//! ```

use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use subtle::{ConditionallySelectable, ConstantTimeEq};

use crate::quota::{Account, Quota};
use crate::reload::{Contents, Reload, Watched};

/// Longest key accepted, and the most keys of a file.
const LIMIT: usize = 1024;

/// Shortest key. Names are shorter, so that neither is ever taken for the other.
const MIN_KEY: usize = 16;

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
    #[error("line {line} of the key file: {why}")]
    Line {
        /// From 1.
        line: usize,
        /// What a line must be.
        why: &'static str,
    },
    /// No key, or too many.
    #[error("the key file holds {0} keys, 1 to 1024 are accepted")]
    Count(usize),
}

/// The keys that are accepted, each with its account. Copies share both.
#[derive(Clone)]
pub struct ApiKeys(Arc<Inner>);

struct Inner {
    watched: Option<Watched>,
    entries: RwLock<Arc<[Entry]>>,
}

struct Entry {
    secret: Box<[u8]>,
    account: Arc<Account>,
}

/// A line of the file.
#[derive(Debug)]
struct Line<'a> {
    name: Arc<str>,
    secret: &'a str,
    quota: Quota,
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({} keys)", self.entries().len())
    }
}

impl ApiKeys {
    /// Reads a file: `[NAME] KEY [QUOTA=N …]` per line; empty lines and lines that start with `#`
    /// are skipped. A key without a name is called `key-N`, N counting the keys of the file.
    ///
    /// # Errors
    /// It can't be read, or a line is not understood.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let (watched, contents) = Watched::open(&[path]);
        let text = text(contents)
            .map_err(|error| KeyFileError::Read { path: path.display().to_string(), error })?;
        Self::new(Some(watched), &text)
    }

    /// The same from the file's text.
    ///
    /// # Errors
    /// A line is not understood.
    pub fn parse(text: &str) -> Result<Self, KeyFileError> {
        Self::new(None, text)
    }

    fn new(watched: Option<Watched>, text: &str) -> Result<Self, KeyFileError> {
        let inner = Inner { watched, entries: RwLock::new(Arc::new([])) };
        inner.take(&lines(text)?);
        Ok(ApiKeys(Arc::new(inner)))
    }

    /// Whether the value of an `Authorization` header names a key: `Api-Key K` or `Bearer K`.
    pub fn accept(&self, authorization: Option<&[u8]>) -> bool {
        self.identify(authorization).is_some()
    }

    /// Whose key it is. Every key is compared, each in constant time, so that the time tells
    /// nothing but lengths.
    pub(crate) fn identify(&self, authorization: Option<&[u8]>) -> Option<Arc<Account>> {
        let value = authorization?;
        let space = value.iter().position(|b| *b == b' ')?;
        let (scheme, key) = (&value[..space], value[space + 1..].trim_ascii());
        if !scheme.eq_ignore_ascii_case(b"Api-Key") && !scheme.eq_ignore_ascii_case(b"Bearer") {
            return None;
        }
        let entries = self.entries();
        let mut found = u32::MAX;
        for (i, entry) in (0u32..).zip(entries.iter()) {
            found.conditional_assign(&i, entry.secret.ct_eq(key));
        }
        entries.get(found as usize).map(|entry| entry.account.clone())
    }

    pub(crate) fn accounts(&self) -> Vec<Arc<Account>> {
        self.entries().iter().map(|entry| entry.account.clone()).collect()
    }

    pub(crate) fn reloading(&self, name: &'static str) -> Arc<dyn Reload> {
        Arc::new(KeyFile { name, keys: self.clone() })
    }

    fn entries(&self) -> Arc<[Entry]> {
        self.0.entries.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Inner {
    /// Puts other keys in force. A key that stays keeps its account and its connections; one that
    /// is gone loses them.
    fn take(&self, lines: &[Line<'_>]) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let new: Arc<[Entry]> = lines
            .iter()
            .map(|line| {
                let secret = line.secret.as_bytes();
                let known = entries.iter().find(|entry| *entry.secret == *secret);
                let account = match known {
                    Some(entry) => {
                        entry.account.renew(line.name.clone(), line.quota);
                        entry.account.clone()
                    }
                    None => Arc::new(Account::new(line.name.clone(), line.quota)),
                };
                Entry { secret: secret.into(), account }
            })
            .collect();
        let old = std::mem::replace(&mut *entries, new.clone());
        // Unlocked first: connections that end look nothing up, but need not wait for us either.
        drop(entries);
        for entry in old.iter() {
            if !new.iter().any(|kept| Arc::ptr_eq(&kept.account, &entry.account)) {
                entry.account.revoke();
            }
        }
    }
}

struct KeyFile {
    name: &'static str,
    keys: ApiKeys,
}

impl Reload for KeyFile {
    fn name(&self) -> &'static str {
        self.name
    }

    fn reload(&self, at_once: bool) -> Option<Result<(), String>> {
        let inner = &self.keys.0;
        let contents = inner.watched.as_ref()?.changed(at_once)?;
        let text = match text(contents) {
            Ok(text) => text,
            Err(error) => return Some(Err(format!("the key file can't be read: {error}"))),
        };
        Some(lines(&text).map(|lines| inner.take(&lines)).map_err(|error| error.to_string()))
    }
}

fn text(contents: Contents) -> std::io::Result<String> {
    let bytes = contents.into_iter().next().unwrap_or(Ok(Vec::new()))?;
    String::from_utf8(bytes).map_err(|_| std::io::Error::other("it is not UTF-8"))
}

fn lines(text: &str) -> Result<Vec<Line<'_>>, KeyFileError> {
    let mut lines: Vec<Line<'_>> = Vec::new();
    for (i, text) in text.lines().enumerate() {
        let text = text.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        let wrong = |why| KeyFileError::Line { line: i + 1, why };
        let line = line(text, lines.len() + 1).map_err(wrong)?;
        if lines.iter().any(|known| known.secret == line.secret) {
            return Err(wrong("the key is there already"));
        }
        if lines.iter().any(|known| known.name == line.name) {
            return Err(wrong("the name is there already: every key has its own"));
        }
        lines.push(line);
    }
    match lines.len() {
        1..=LIMIT => Ok(lines),
        n => Err(KeyFileError::Count(n)),
    }
}

/// `[NAME] KEY [QUOTA=N …]`, the `number`th key of its file.
fn line(text: &str, number: usize) -> Result<Line<'_>, &'static str> {
    const FORM: &str = "it must be `[NAME] KEY [QUOTA=N …]`; quotas are connections, rate, burst \
                        and in_flight";
    let mut words: Vec<&str> = text.split_whitespace().collect();
    let mut quota = Quota::default();
    let is_quota = |word: &str| {
        let name = word.split_once('=').map(|(name, _)| name);
        matches!(name, Some("connections" | "rate" | "burst" | "in_flight"))
    };
    while words.len() > 1 && words.last().is_some_and(|word| is_quota(word)) {
        let (name, value) = words.pop().and_then(|word| word.split_once('=')).ok_or(FORM)?;
        limit(&mut quota, name, value)?;
    }
    if quota.burst.is_some() && quota.rate.is_none() {
        return Err("`burst` needs a `rate`");
    }
    let (name, secret): (Arc<str>, &str) = match words[..] {
        [secret] => (format!("key-{number}").into(), secret),
        [name, secret] => {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            if name.len() >= MIN_KEY || !name.bytes().all(plain) {
                return Err("a name is 1 to 15 letters, digits, `-`, `_` or `.`");
            }
            (name.into(), secret)
        }
        _ => return Err(FORM),
    };
    if !(MIN_KEY..=LIMIT).contains(&secret.len()) || !secret.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("a key is 16 to 1024 visible ASCII characters");
    }
    Ok(Line { name, secret, quota })
}

fn limit(quota: &mut Quota, name: &str, value: &str) -> Result<(), &'static str> {
    let count = || match value.parse::<usize>() {
        Ok(n @ 1..=1_000_000) => Ok(n),
        _ => Err("`connections` and `in_flight` are whole numbers from 1 to 1000000"),
    };
    let number = |least: f64| match value.parse::<f64>() {
        Ok(v) if (least..=1e6).contains(&v) => Ok(v),
        _ => Err("`rate` is a number from 0.001 to 1000000, `burst` one from 1 to 1000000"),
    };
    let twice = match name {
        "connections" => quota.connections.replace(count()?).is_some(),
        "in_flight" => quota.in_flight.replace(count()?).is_some(),
        "rate" => quota.rate.replace(number(0.001)?).is_some(),
        _ => quota.burst.replace(number(1.0)?).is_some(),
    };
    if twice { Err("a quota is given twice") } else { Ok(()) }
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
    fn names_and_quotas() {
        let text = "arm-1 0123456789abcdef connections=2 rate=0.5\n\
                    0123456789abcdeF rate=20 burst=40 in_flight=4\n\
                    \tb.2\t0123456789abcdef== # no: a comment is a line\n";
        assert!(lines(text).is_err());
        let text = text.replace(" # no: a comment is a line", "");
        let lines = lines(&text).unwrap();
        let seen: Vec<_> = lines.iter().map(|l| (&*l.name, l.secret, l.quota)).collect();
        let none = Quota::default();
        let first = Quota { connections: Some(2), rate: Some(0.5), ..none };
        let second = Quota { rate: Some(20.0), burst: Some(40.0), in_flight: Some(4), ..none };
        assert_eq!(
            seen,
            [
                ("arm-1", "0123456789abcdef", first),
                ("key-2", "0123456789abcdeF", second),
                ("b.2", "0123456789abcdef==", none),
            ]
        );
        let keys = ApiKeys::parse(&text).unwrap();
        let name = |key: &str| {
            let account = keys.identify(Some(format!("Bearer {key}").as_bytes()))?;
            Some(account.connect().unwrap().name().to_string())
        };
        assert_eq!(name("0123456789abcdeF").unwrap(), "key-2");
        assert_eq!(name("0123456789abcdef").unwrap(), "arm-1");
        assert_eq!(name("arm-1"), None);
    }

    #[test]
    fn bad_files_are_refused_without_telling_keys() {
        assert!(matches!(ApiKeys::parse("# none\n"), Err(KeyFileError::Count(0))));
        let many: String = (0..1025).map(|i| format!("key-number-{i:05}\n")).collect();
        assert!(matches!(ApiKeys::parse(&many), Err(KeyFileError::Count(1025))));
        for (bad, want) in [
            ("secret", "16 to 1024"),
            ("secret-of-the-arm name", "a name is 1 to 15"),
            ("an/arm secret-of-the-arm", "a name is 1 to 15"),
            ("three words secret-of-the-arm", "it must be"),
            ("arm secret-of-the-arm speed=3", "it must be"),
            ("arm rate=3", "16 to 1024"),
            ("arm secret-of-the-arm rate=0", "`rate` is"),
            ("arm secret-of-the-arm rate=NaN", "`rate` is"),
            ("arm secret-of-the-arm rate=1 burst=0.5", "`burst`"),
            ("arm secret-of-the-arm burst=5", "needs a `rate`"),
            ("arm secret-of-the-arm connections=0", "whole numbers"),
            ("arm secret-of-the-arm in_flight=1.5", "whole numbers"),
            ("arm secret-of-the-arm rate=1 rate=2", "twice"),
            ("arm secret-of-the-arm\narm2 secret-of-the-arm", "there already"),
            ("arm secret-of-the-arm\narm secret-of-the-leg", "the name is there"),
            ("key-3 secret-of-the-arm\nsecret-of-the-leg", "the name is there"),
        ] {
            let text = format!("0123456789abcdef\n{bad}\n");
            let error = ApiKeys::parse(&text).expect_err(bad).to_string();
            assert!(error.contains(want) && !error.contains("secret"), "{bad}: {error}");
            let line = 2 + bad.matches('\n').count();
            assert!(error.starts_with(&format!("line {line} ")), "{bad}: {error}");
        }
    }
}
