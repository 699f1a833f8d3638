//! Requests of one session → tickets that know when a newer one has arrived.
//!
//! Only sessions with a request in flight are remembered, so there are never more of them than
//! requests that all connections together may have read.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Longest name of a session, in bytes.
pub(crate) const MAX_SESSION_BYTES: usize = 128;

/// Whose requests supersede each other.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Session {
    /// `session`: the same on every connection with that API key (if keys are asked for) that
    /// names it.
    Named(Option<Arc<str>>, String),
    /// Without a name: the connection, by its number.
    Connection(u64),
}

#[derive(Debug)]
struct Entry {
    /// Tickets that still exist.
    tickets: usize,
    /// Number of the newest request.
    newest: watch::Sender<u64>,
}

/// The sessions of one server.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sessions(Arc<Mutex<HashMap<Session, Entry>>>);

impl Sessions {
    /// A request has arrived: every earlier one of its session is superseded now.
    pub(crate) fn arrive(&self, session: Session) -> Ticket {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries
            .entry(session.clone())
            .or_insert_with(|| Entry { tickets: 0, newest: watch::Sender::new(0) });
        entry.tickets += 1;
        let number = *entry.newest.borrow() + 1;
        let newest = entry.newest.subscribe();
        entry.newest.send_replace(number);
        Ticket(Arc::new(Place { sessions: self.clone(), session, number, newest }))
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

struct Place {
    sessions: Sessions,
    session: Session,
    number: u64,
    newest: watch::Receiver<u64>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut entries = self.sessions.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = entries.get_mut(&self.session) {
            entry.tickets -= 1;
            if entry.tickets == 0 {
                entries.remove(&self.session);
            }
        }
    }
}

/// The place of one request in its session.
#[derive(Clone)]
pub struct Ticket(Arc<Place>);

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {} of {:?}", self.0.number, self.0.session)
    }
}

impl Ticket {
    /// Whether a newer request of the session has arrived.
    pub fn is_superseded(&self) -> bool {
        *self.0.newest.borrow() > self.0.number
    }

    /// Resolves when a newer request of the session arrives.
    pub async fn superseded(&self) {
        let mut newest = self.0.newest.clone();
        // The sender lives as long as any ticket does.
        if newest.wait_for(|newest| *newest > self.0.number).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_of_a_session_supersedes_the_others_and_nothing_is_left() {
        let sessions = Sessions::default();
        let named = || Session::Named(None, "arm".into());
        let first = sessions.arrive(named());
        let other = sessions.arrive(Session::Connection(7));
        assert!(!first.is_superseded());
        let waiting = first.clone();
        let waiter = tokio::spawn(async move { waiting.superseded().await });
        let second = sessions.arrive(named());
        waiter.await.unwrap();
        assert!(first.is_superseded() && !second.is_superseded() && !other.is_superseded());
        drop(first);
        let third = sessions.arrive(named());
        assert!(second.is_superseded() && !third.is_superseded());
        assert_eq!(sessions.len(), 2);
        drop((second, third, other));
        assert_eq!(sessions.len(), 0);
    }
}
