//! What one key may use: connections, requests per second, requests in flight; and its account.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::render::{header, sample};
use crate::service::ServiceError;

/// The limits of a key; what is absent is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Quota {
    /// Websockets open at once.
    pub(crate) connections: Option<usize>,
    /// Requests per second, on average.
    pub(crate) rate: Option<f64>,
    /// Requests that may come at once after a pause; at least one.
    pub(crate) burst: Option<f64>,
    /// Requests being answered at once, over all connections.
    pub(crate) in_flight: Option<usize>,
}

impl Quota {
    fn full_bucket(&self) -> f64 {
        self.burst.or(self.rate.map(f64::ceil)).unwrap_or(1.0).max(1.0)
    }
}

/// What a key has used. It outlives changes of the key file that keep the key.
#[derive(Debug)]
pub(crate) struct Account {
    books: Mutex<Books>,
    revoked: watch::Sender<bool>,
}

#[derive(Debug)]
struct Books {
    name: Arc<str>,
    quota: Quota,
    connections: usize,
    in_flight: usize,
    /// Requests that may come now; each observation of a batch counts.
    tokens: f64,
    filled: Instant,
    admitted: u64,
    refused: [u64; REFUSALS.len()],
}

const REFUSALS: [&str; 3] = ["connections", "rate", "in_flight"];

impl Account {
    pub(crate) fn new(name: Arc<str>, quota: Quota) -> Self {
        let books = Books {
            name,
            quota,
            connections: 0,
            in_flight: 0,
            tokens: quota.full_bucket(),
            filled: Instant::now(),
            admitted: 0,
            refused: [0; REFUSALS.len()],
        };
        Account { books: Mutex::new(books), revoked: watch::Sender::new(false) }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key is still in the file, perhaps with another name and other limits.
    pub(crate) fn renew(&self, name: Arc<str>, quota: Quota) {
        let mut books = self.books();
        books.tokens = books.tokens.min(quota.full_bucket());
        (books.name, books.quota) = (name, quota);
    }

    /// The key is gone: its connections end.
    pub(crate) fn revoke(&self) {
        self.revoked.send_replace(true);
    }

    /// Opens a websocket, or says why not.
    pub(crate) fn connect(self: &Arc<Self>) -> Result<Pass, String> {
        let mut books = self.books();
        match books.quota.connections {
            Some(most) if books.connections >= most => {
                books.refused[0] += 1;
                let name = &books.name;
                Err(format!("key `{name}` has all of its {most} connections open: close one\n"))
            }
            _ => {
                books.connections += 1;
                drop(books);
                Ok(Pass { account: self.clone(), revoked: self.revoked.subscribe() })
            }
        }
    }
}

/// The right to an open websocket; its end gives the connection back.
#[derive(Debug)]
pub(crate) struct Pass {
    account: Arc<Account>,
    revoked: watch::Receiver<bool>,
}

impl Pass {
    /// Of the key.
    pub(crate) fn name(&self) -> Arc<str> {
        self.account.books().name.clone()
    }

    /// Resolves once the key is revoked. Safe to drop.
    pub(crate) async fn revoked(&mut self) {
        if self.revoked.wait_for(|revoked| *revoked).await.is_err() {
            std::future::pending().await
        }
    }

    /// Lets a request in, or tells which quota is used up and when to try again. It counts as its
    /// observations: a batch may overdraw a quota that is not used up, and what it overdrew is
    /// waited for by the next request.
    pub(crate) fn admit(
        &self,
        now: Instant,
        observations: usize,
    ) -> Result<Admission, ServiceError> {
        let mut books = self.account.books();
        if let Some(most) = books.quota.in_flight
            && books.in_flight >= most
        {
            books.refused[2] += 1;
            let name = &books.name;
            let message = format!(
                "key `{name}` may have {most} requests in flight: try again when one is answered"
            );
            return Err(ServiceError::refusal("quota", message));
        }
        if let Some(rate) = books.quota.rate {
            let passed = now.saturating_duration_since(books.filled);
            books.filled = books.filled.max(now);
            let grown = books.tokens + rate * passed.as_secs_f64();
            books.tokens = grown.min(books.quota.full_bucket());
            if books.tokens < 1.0 {
                books.refused[1] += 1;
                let wait = Duration::from_secs_f64((1.0 - books.tokens) / rate);
                let mut message =
                    format!("key `{}` may send {rate} requests a second: try again", books.name);
                let _ = write!(message, " in {} ms", wait.as_millis() + 1);
                return Err(ServiceError::refusal("quota", message));
            }
            books.tokens -= observations as f64;
        }
        books.in_flight += observations;
        books.admitted += observations as u64;
        Ok(Admission { account: self.account.clone(), observations })
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.account.books().connections -= 1;
    }
}

/// A request that was let in; its end gives its place in flight back.
#[derive(Debug)]
pub(crate) struct Admission {
    account: Arc<Account>,
    observations: usize,
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.account.books().in_flight -= self.observations;
    }
}

/// The accounts in Prometheus' text form.
pub(crate) fn render(accounts: &[Arc<Account>], out: &mut String) {
    let family = |out: &mut String, name: &str, kind: &str, help: &str, of: fn(&Books) -> f64| {
        header(out, name, kind, help);
        for account in accounts {
            let books = account.books();
            sample(out, name, &[("key", &books.name)], of(&books));
        }
    };
    let (name, help) = ("pirouette_key_connections", "Websockets open, by key.");
    family(out, name, "gauge", help, |books| books.connections as f64);
    let (name, help) = ("pirouette_key_in_flight", "Requests being answered, by key.");
    family(out, name, "gauge", help, |books| books.in_flight as f64);
    let (name, help) = ("pirouette_key_requests_total", "Requests within the quota, by key.");
    family(out, name, "counter", help, |books| books.admitted as f64);
    let name = "pirouette_key_refused_total";
    header(out, name, "counter", "Requests and connections over a quota, by key.");
    for account in accounts {
        let books = account.books();
        for (quota, n) in REFUSALS.iter().zip(books.refused) {
            sample(out, name, &[("key", &books.name), ("quota", quota)], n as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(quota: Quota) -> Arc<Account> {
        Arc::new(Account::new("arm".into(), quota))
    }

    #[test]
    fn the_bucket_fills_at_its_rate_up_to_its_burst() {
        let quota = Quota { rate: Some(10.0), burst: Some(3.0), ..Quota::default() };
        let pass = account(quota).connect().unwrap();
        let start = Instant::now();
        let at = |ms: u64| pass.admit(start + Duration::from_millis(ms), 1);
        for _ in 0..3 {
            at(0).unwrap();
        }
        let refused = at(0).unwrap_err();
        assert_eq!((refused.reason, refused.failure), ("quota", crate::Failure::Refusal));
        assert_eq!(refused.message, "key `arm` may send 10 requests a second: try again in 101 ms");
        assert!(at(40).unwrap_err().message.ends_with("in 61 ms"));
        at(101).unwrap();
        assert!(at(102).is_err());
        // A pause of an hour is worth a burst, not an hour.
        for _ in 0..3 {
            at(3_600_000).unwrap();
        }
        assert!(at(3_600_000).is_err());
        // A clock read before another one's adds nothing and takes nothing.
        assert!(at(3_500_000).is_err());
        at(3_600_101).unwrap();
    }

    #[test]
    fn a_slow_rate_allows_one_at_once() {
        let quota = Quota { rate: Some(0.5), ..Quota::default() };
        let pass = account(quota).connect().unwrap();
        let start = Instant::now();
        pass.admit(start, 1).unwrap();
        let message = pass.admit(start, 1).unwrap_err().message;
        assert!(message.contains("0.5 requests a second: try again in 200"), "{message}");
        pass.admit(start + Duration::from_millis(2001), 1).unwrap();
    }

    #[test]
    fn a_batch_counts_as_its_observations() {
        let quota =
            Quota { rate: Some(10.0), burst: Some(4.0), in_flight: Some(4), ..Quota::default() };
        let pass = account(quota).connect().unwrap();
        let start = Instant::now();
        let batch = pass.admit(start, 14).unwrap();
        assert!(pass.admit(start, 1).unwrap_err().message.contains("in flight"));
        drop(batch);
        // 4 - 14 + 11 = 1.
        let message = pass.admit(start, 1).unwrap_err().message;
        assert!(message.ends_with("again in 1101 ms"), "{message}");
        pass.admit(start + Duration::from_millis(1101), 1).unwrap();
    }

    #[test]
    fn places_return() {
        let quota = Quota { connections: Some(2), in_flight: Some(1), ..Quota::default() };
        let account = account(quota);
        let first = account.connect().unwrap();
        let second = account.connect().unwrap();
        assert!(account.connect().unwrap_err().contains("all of its 2 connections"));
        let now = Instant::now();
        let admission = first.admit(now, 1).unwrap();
        let refused = second.admit(now, 1).unwrap_err().message;
        assert!(refused.contains("1 requests in flight: try again when"), "{refused}");
        drop(admission);
        second.admit(now, 1).unwrap();
        drop(first);
        account.connect().unwrap();
        let mut out = String::new();
        render(&[account], &mut out);
        for line in [
            "pirouette_key_connections{key=\"arm\"} 1",
            "pirouette_key_in_flight{key=\"arm\"} 0",
            "pirouette_key_requests_total{key=\"arm\"} 2",
            "pirouette_key_refused_total{key=\"arm\",quota=\"connections\"} 1",
            "pirouette_key_refused_total{key=\"arm\",quota=\"rate\"} 0",
            "pirouette_key_refused_total{key=\"arm\",quota=\"in_flight\"} 1",
        ] {
            assert!(out.lines().any(|l| l == line), "{line}\n{out}");
        }
    }
}
