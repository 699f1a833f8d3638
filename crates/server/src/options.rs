//! Settings of the server, and who may reach it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::dialect::Dialect;
use crate::keys::ApiKeys;
use crate::msgpack::Limits;
use crate::record::Recorder;
use crate::tls::Tls;

/// Settings of [`crate::serve`].
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Longest message accepted, in bytes (default 64 MiB).
    pub max_frame_bytes: usize,
    /// Bounds on what a message may contain.
    pub limits: Limits,
    /// Open websockets; one more gets 503 (default 1024).
    pub max_connections: usize,
    /// Connections whose HTTP request is not answered yet; for one more the one that has been
    /// silent longest is dropped, or itself where all have asked. Apart from `max_connections`, so
    /// that half-open ones can't keep robots out (default 1024).
    pub max_handshakes: usize,
    /// Time to send the HTTP request (default 10 s).
    pub handshake_timeout: Duration,
    /// Silence after which a ping is sent (default 20 s, as openpi's server).
    pub keepalive_interval: Duration,
    /// Silence after a ping that ends the connection (default 20 s).
    pub keepalive_timeout: Duration,
    /// The same for vla-eval's clients (default 1 h): their simulators answer no ping while they
    /// reset or step, which may take minutes, and their own server sends none.
    pub vla_eval_keepalive_timeout: Duration,
    /// Time without a request that ends the connection, pings or not (default none: a robot may
    /// stand still for a day).
    pub idle_timeout: Option<Duration>,
    /// Time in which a client must take an answer off our hands (default 10 s).
    pub write_timeout: Duration,
    /// Requests of one connection that are read ahead while one is computed (default 4).
    pub read_ahead: usize,
    /// Time given to requests in flight at shutdown (default 10 s).
    pub drain_timeout: Duration,
    /// Time a readiness probe may take (default 5 s).
    pub readiness_timeout: Duration,
    /// Whose protocol is spoken on paths that name none (default openpi's).
    pub dialect: Dialect,
    /// With [`Dialect::Auto`]: time a client has to speak first before it gets openpi's metadata
    /// (default 250 ms).
    pub hello_wait: Duration,
    /// Actions of a chunk that vla-eval's clients execute before the next inference (default 10,
    /// as vla-eval's own π0 server).
    pub vla_eval_actions: usize,
    /// Actions a second of LeRobot's clients, by which the actions of a chunk are dated (default
    /// 30, as LeRobot's server).
    pub lerobot_fps: f64,
    /// Observations of one `batch` request (default 128).
    pub max_batch_observations: usize,
    /// Keys; without them everybody who reaches the port is served.
    pub api_keys: Option<ApiKeys>,
    /// Keys of the admin listener; without them everybody who reaches it may use it.
    pub admin_keys: Option<ApiKeys>,
    /// TLS on all listeners but LeRobot's; without it they speak plainly.
    pub tls: Option<Tls>,
    /// How often key files and certificates are looked at (default 3 s). A change is acted upon
    /// at the second look, or at SIGHUP.
    pub reload_interval: Duration,
    /// A thread of its own stays awake for the first few plain TCP connections while it answers
    /// their requests, and for this time after each answer (default zero: there is no such thread).
    /// Takes a core meanwhile.
    pub busy_poll: Duration,
    /// Writes every request and answer down (default none).
    pub recorder: Option<Arc<Recorder>>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions {
            max_frame_bytes: 64 << 20,
            limits: Limits::default(),
            max_connections: 1024,
            max_handshakes: 1024,
            handshake_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(20),
            vla_eval_keepalive_timeout: Duration::from_secs(3600),
            idle_timeout: None,
            write_timeout: Duration::from_secs(10),
            read_ahead: 4,
            drain_timeout: Duration::from_secs(10),
            readiness_timeout: Duration::from_secs(5),
            dialect: Dialect::Openpi,
            hello_wait: Duration::from_millis(250),
            vla_eval_actions: 10,
            lerobot_fps: 30.0,
            max_batch_observations: 128,
            api_keys: None,
            admin_keys: None,
            tls: None,
            reload_interval: Duration::from_secs(3),
            busy_poll: Duration::ZERO,
            recorder: None,
        }
    }
}

/// A server that anyone on the network could use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExposureError {
    /// The robots' port.
    #[error(
        "{0} can be reached from other machines and neither keys nor TLS are set: name a key file \
         with --api-key-file, a certificate with --tls-cert and --tls-key, or say --insecure if \
         that is what you want"
    )]
    Public(SocketAddr),
    /// The admin listener.
    #[error(
        "the admin listener on {0} can be reached from other machines and has no keys: name a key \
         file with --admin-key-file, or say --insecure if that is what you want"
    )]
    Admin(SocketAddr),
    /// LeRobot's port.
    #[error(
        "LeRobot's port on {0} can be reached from other machines, and LeRobot's client has \
         neither keys nor TLS: keep it on 127.0.0.1 and reach it through a tunnel (ssh -L), or say \
         --insecure if that is what you want"
    )]
    Lerobot(SocketAddr),
}

/// Loopback is open; any other address needs a `guard` (keys, or TLS), or `insecure` said out
/// loud.
///
/// # Errors
/// [`ExposureError::Public`].
pub fn check_exposure(
    address: SocketAddr,
    guard: bool,
    insecure: bool,
) -> Result<(), ExposureError> {
    let open = is_loopback(address) || guard || insecure;
    if open { Ok(()) } else { Err(ExposureError::Public(address)) }
}

/// The same of the admin listener. Only keys guard it: TLS alone would let anybody change things.
///
/// # Errors
/// [`ExposureError::Admin`].
pub fn check_admin_exposure(
    address: SocketAddr,
    keys: bool,
    insecure: bool,
) -> Result<(), ExposureError> {
    let open = is_loopback(address) || keys || insecure;
    if open { Ok(()) } else { Err(ExposureError::Admin(address)) }
}

/// The same of LeRobot's port, which nothing guards: its client has no keys and no TLS.
///
/// # Errors
/// [`ExposureError::Lerobot`].
pub fn check_lerobot_exposure(address: SocketAddr, insecure: bool) -> Result<(), ExposureError> {
    let open = is_loopback(address) || insecure;
    if open { Ok(()) } else { Err(ExposureError::Lerobot(address)) }
}

/// An IPv4-mapped loopback (`::ffff:127.0.0.1`) is one too.
fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_open_to_all() {
        let check = |a: &str, keys, insecure| check_exposure(a.parse().unwrap(), keys, insecure);
        for address in ["127.0.0.1:8000", "127.8.9.1:1", "[::1]:8000", "[::ffff:127.0.0.1]:80"] {
            assert!(check(address, false, false).is_ok(), "{address}");
        }
        for address in ["0.0.0.0:8000", "10.0.0.7:8000", "[::]:8000", "[2001:db8::1]:8000"] {
            let error = check(address, false, false).unwrap_err();
            assert!(error.to_string().contains("--insecure"), "{address}");
            assert!(check(address, true, false).is_ok());
            assert!(check(address, false, true).is_ok());
            let admin = |keys| check_admin_exposure(address.parse().unwrap(), keys, false);
            assert!(admin(true).is_ok());
            let lerobot = |insecure| check_lerobot_exposure(address.parse().unwrap(), insecure);
            assert!(lerobot(true).is_ok());
            assert!(lerobot(false).unwrap_err().to_string().contains("ssh -L"));
            assert!(admin(false).unwrap_err().to_string().contains("--admin-key-file"));
        }
        assert!(check_admin_exposure("127.0.0.1:1".parse().unwrap(), false, false).is_ok());
        assert!(check_lerobot_exposure("127.0.0.1:1".parse().unwrap(), false).is_ok());
    }
}
