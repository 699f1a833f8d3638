//! Files that changed → their new contents, once: keys and certificates without a restart.
//!
//! Files are compared by content, so that mounted secrets that are swapped by links are noticed.
//! A change counts when two looks in a row saw the same, so that a file in the middle of being
//! written, or a certificate whose key is still to come, is not acted upon. SIGHUP acts at once.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::serve::Shared;

/// Largest file read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What can be read again.
pub(crate) trait Reload: Send + Sync {
    /// In logs and metrics: `api_keys`.
    fn name(&self) -> &'static str;

    /// Reads again what changed, or, `at_once`, in any case. `None`: nothing to do. What was in
    /// use stays in use after an error.
    fn reload(&self, at_once: bool) -> Option<Result<(), String>>;
}

/// Some files and what was last seen in them.
#[derive(Debug)]
pub(crate) struct Watched {
    paths: Vec<PathBuf>,
    seen: Mutex<Seen>,
}

/// Fingerprints of contents.
#[derive(Debug)]
struct Seen {
    handled: u64,
    pending: Option<u64>,
}

pub(crate) type Contents = Vec<io::Result<Vec<u8>>>;

impl Watched {
    /// Reads the files for the first time.
    pub(crate) fn open(paths: &[&Path]) -> (Watched, Contents) {
        let paths: Vec<PathBuf> = paths.iter().map(|p| p.to_path_buf()).collect();
        let contents: Contents = paths.iter().map(|p| read(p)).collect();
        let seen = Seen { handled: fingerprint(&contents), pending: None };
        (Watched { paths, seen: Mutex::new(seen) }, contents)
    }

    /// The contents, if they are to be acted upon.
    pub(crate) fn changed(&self, at_once: bool) -> Option<Contents> {
        let contents: Contents = self.paths.iter().map(|p| read(p)).collect();
        let found = fingerprint(&contents);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if !at_once && found == seen.handled {
            seen.pending = None;
            return None;
        }
        if !at_once && seen.pending != Some(found) {
            seen.pending = Some(found);
            return None;
        }
        *seen = Seen { handled: found, pending: None };
        Some(contents)
    }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    if file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)? as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB"));
    }
    Ok(bytes)
}

/// The process forgets contents that are not in use; it only compares this.
fn fingerprint(contents: &Contents) -> u64 {
    let mut hasher = DefaultHasher::new();
    for content in contents {
        content.as_ref().map_err(|error| error.kind()).hash(&mut hasher);
    }
    hasher.finish()
}

/// Looks at everything that can be read again, every few seconds and at SIGHUP, for ever.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let options = &shared.options;
    let mut files: Vec<Arc<dyn Reload>> = Vec::new();
    files.extend(options.tls.iter().map(|tls| tls.reloading()));
    files.extend(options.api_keys.iter().map(|keys| keys.reloading("api_keys")));
    files.extend(options.admin_keys.iter().map(|keys| keys.reloading("admin_keys")));
    let mut hangup = Hangup::new();
    loop {
        let at_once = tokio::select! {
            () = tokio::time::sleep(options.reload_interval) => false,
            () = hangup.recv() => true,
        };
        for file in &files {
            let (name, file) = (file.name(), file.clone());
            // Files may lie on a network that is slow today.
            match tokio::task::spawn_blocking(move || file.reload(at_once)).await {
                Ok(None) => continue,
                Ok(Some(Ok(()))) => {
                    tracing::info!(file = name, "read again");
                    shared.metrics.reloaded(name, true);
                }
                Ok(Some(Err(why))) => {
                    tracing::error!(file = name, %why, "not read again: what was read stays");
                    shared.metrics.reloaded(name, false);
                }
                Err(_) => tracing::error!(file = name, "reading again failed"),
            }
        }
    }
}

/// From now on SIGHUP does not end the process, as it does by default: for the time before
/// [`crate::serve`], which reads files again at it. Files that are read after this call and
/// changed before that are noticed all the same. Needs a runtime's context.
pub fn expect_hangup() {
    // A handler stays as long as the process.
    drop(Hangup::new());
}

/// SIGHUP, where there is such a thing.
struct Hangup {
    #[cfg(unix)]
    signal: Option<tokio::signal::unix::Signal>,
}

impl Hangup {
    fn new() -> Self {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let signal = signal(SignalKind::hangup())
                .inspect_err(|error| tracing::warn!(%error, "SIGHUP is not handled"));
            Hangup { signal: signal.ok() }
        }
        #[cfg(not(unix))]
        Hangup {}
    }

    async fn recv(&mut self) {
        #[cfg(unix)]
        if let Some(signal) = &mut self.signal
            && signal.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_it_was_seen_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, "one").unwrap();
        let (watched, contents) = Watched::open(&[&path]);
        assert_eq!(contents[0].as_ref().unwrap(), b"one");
        let look = || watched.changed(false).map(|c| c[0].as_ref().map_or(vec![], |c| c.clone()));
        assert!(look().is_none());
        // Still growing.
        std::fs::write(&path, "tw").unwrap();
        assert!(look().is_none());
        std::fs::write(&path, "two").unwrap();
        assert!(look().is_none());
        assert_eq!(look().unwrap(), b"two");
        assert!(look().is_none());
        // There and back again is no change.
        std::fs::write(&path, "x").unwrap();
        assert!(look().is_none());
        std::fs::write(&path, "two").unwrap();
        assert!(look().is_none() && look().is_none());
        // A file that went away is told once.
        std::fs::remove_file(&path).unwrap();
        assert!(look().is_none());
        assert_eq!(look().unwrap(), b"");
        assert!(look().is_none());
        assert!(watched.changed(true).unwrap()[0].is_err(), "asked for");
    }

    #[test]
    fn long_files_are_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("long");
        std::fs::write(&path, vec![b'x'; MAX_FILE_BYTES as usize + 1]).unwrap();
        let error = read(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }
}
