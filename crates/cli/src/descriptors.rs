//! The limit on open files → enough for every connection the server promises to hold.

/// Raises the soft limit, which is often 1024, to the hard one, and warns if `wanted` is more.
#[cfg(unix)]
pub fn raise(wanted: u64) {
    use rustix::process::{Resource, getrlimit, setrlimit};

    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|soft| soft < wanted) {
        // The hard limit may be in the millions: no more than what is of use.
        limit.current = Some(limit.maximum.map_or(wanted, |hard| hard.min(wanted)));
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the limit on open files can't be raised");
        }
    }
    let limit = getrlimit(Resource::Nofile).current;
    if let Some(limit) = limit.filter(|limit| *limit < wanted) {
        tracing::warn!(
            limit,
            wanted,
            "open files are limited: raise it (`ulimit -n`, systemd's LimitNOFILE), or \
             connections will be refused before the server's own limits"
        );
    }
}

/// Elsewhere there is nothing to raise.
#[cfg(not(unix))]
pub fn raise(_wanted: u64) {}
