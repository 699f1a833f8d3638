//! SIGTERM and Ctrl-C, for [`crate::serve`]'s `shutdown`.

/// Both signals, expected from its making on: one that comes before anybody waits is not lost. A
/// container's first process has no other way to be ended by them.
#[derive(Debug)]
pub struct Termination {
    #[cfg(unix)]
    signals: Vec<tokio::signal::unix::Signal>,
}

impl Termination {
    /// Starts to expect them; the process does not end by them any more.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    #[must_use]
    pub fn new() -> Self {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let kinds = [("SIGTERM", SignalKind::terminate()), ("SIGINT", SignalKind::interrupt())];
            let expected = kinds.into_iter().filter_map(|(name, kind)| {
                let refused = |error| tracing::warn!(%error, "{name} is not handled");
                signal(kind).map_err(refused).ok()
            });
            Termination { signals: expected.collect() }
        }
        #[cfg(not(unix))]
        Termination {}
    }

    /// Resolves when one of them has come.
    pub async fn told(&mut self) {
        #[cfg(unix)]
        std::future::poll_fn(|context| {
            let told = self.signals.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if told { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        // Without a handler nothing can ask us to stop gracefully.
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Default for Termination {
    fn default() -> Self {
        Self::new()
    }
}
