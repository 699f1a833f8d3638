//! A certificate and its key, as PEM files → TLS on a connection; read again when they change.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::ServerConfig;
use tokio_rustls::rustls::{self, InconsistentKeys};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, rustls::DEFAULT_VERSIONS};

use crate::reload::{Contents, Reload, Watched};
use crate::validity::validity;

/// Most certificates in a chain.
const MAX_CHAIN: usize = 16;

/// Why TLS can't be had from two files. No message contains a key.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read.
    #[error("`{path}` can't be read: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// A file is damaged.
    #[error("`{path}` is no PEM file: {why}")]
    Pem {
        /// The file.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// No certificate.
    #[error(
        "`{path}` holds no certificate: --tls-cert takes a PEM file with the server's certificate \
         first, then those that lead to the authority"
    )]
    NoCertificate {
        /// The file.
        path: String,
    },
    /// No key.
    #[error(
        "`{path}` holds no private key: --tls-key takes a PEM file with an unencrypted key \
         (`PRIVATE KEY`, `RSA PRIVATE KEY` or `EC PRIVATE KEY`)"
    )]
    NoKey {
        /// The file.
        path: String,
    },
    /// The key belongs to another certificate.
    #[error("the key in `{key}` is not that of the first certificate in `{certificate}`")]
    OtherKey {
        /// The certificate's file.
        certificate: String,
        /// The key's file.
        key: String,
    },
    /// The library refuses one of the two.
    #[error("`{path}` can't be used: {why}")]
    Unusable {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
}

/// A certificate and its key in use. Copies share what is in use.
#[derive(Clone)]
pub struct Tls(Arc<Inner>);

struct Inner {
    certificate: PathBuf,
    key: PathBuf,
    watched: Watched,
    live: RwLock<Live>,
}

struct Live {
    config: Arc<ServerConfig>,
    valid: Option<[i64; 2]>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tls").field(&self.0.certificate).finish()
    }
}

impl Tls {
    /// Reads a PEM file with the server's certificate and those that lead to its authority, and
    /// one with the certificate's key. An expired certificate is only a warning.
    ///
    /// # Errors
    /// Either file can't be read or used, or they do not belong together.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let (watched, contents) = Watched::open(&[certificate, key]);
        let live = RwLock::new(load(certificate, key, contents)?);
        let (certificate, key) = (certificate.to_path_buf(), key.to_path_buf());
        Ok(Tls(Arc::new(Inner { certificate, key, watched, live })))
    }

    /// The server's part of a handshake. The caller bounds the time.
    pub(crate) async fn accept<Io>(&self, io: Io) -> io::Result<TlsStream<Io>>
    where
        Io: AsyncRead + AsyncWrite + Unpin,
    {
        let config = self.0.live.read().unwrap_or_else(PoisonError::into_inner).config.clone();
        TlsAcceptor::from(config).accept(io).await
    }

    /// When the certificate in use expires, in seconds since 1970.
    pub(crate) fn expires(&self) -> Option<i64> {
        self.0.live.read().unwrap_or_else(PoisonError::into_inner).valid.map(|[_, until]| until)
    }

    pub(crate) fn reloading(&self) -> Arc<dyn Reload> {
        self.0.clone()
    }
}

impl Reload for Inner {
    fn name(&self) -> &'static str {
        "certificate"
    }

    fn reload(&self, at_once: bool) -> Option<Result<(), String>> {
        let contents = self.watched.changed(at_once)?;
        Some(match load(&self.certificate, &self.key, contents) {
            Ok(new) => {
                *self.live.write().unwrap_or_else(PoisonError::into_inner) = new;
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        })
    }
}

fn load(certificate: &Path, key: &Path, contents: Contents) -> Result<Live, TlsError> {
    let shown = |path: &Path| path.display().to_string();
    let mut contents = contents.into_iter();
    let mut next = |path: &Path| match contents.next() {
        Some(Ok(bytes)) => Ok(bytes),
        Some(Err(error)) => Err(TlsError::Read { path: shown(path), error }),
        None => Err(TlsError::Pem { path: shown(path), why: "it was not read" }),
    };
    let (chain_pem, key_pem) = (next(certificate)?, next(key)?);
    let broken = |path: &Path, error| TlsError::Pem { path: shown(path), why: flaw(&error) };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&chain_pem)
        .take(MAX_CHAIN)
        .collect::<Result<_, _>>()
        .map_err(|error| broken(certificate, error))?;
    let first =
        chain.first().ok_or_else(|| TlsError::NoCertificate { path: shown(certificate) })?;
    let valid = validity(first);
    let key_der = match PrivateKeyDer::from_pem_slice(&key_pem) {
        Err(pem::Error::NoItemsFound) => return Err(TlsError::NoKey { path: shown(key) }),
        other => other.map_err(|error| broken(key, error))?,
    };
    let unusable = |path: &Path, why: rustls::Error| TlsError::Unusable {
        path: shown(path),
        why: why.to_string(),
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(DEFAULT_VERSIONS)
        .map_err(|why| unusable(certificate, why))?
        .with_no_client_auth()
        .with_single_cert(chain, key_der)
        .map_err(|why| match why {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::OtherKey { certificate: shown(certificate), key: shown(key) }
            }
            rustls::Error::InvalidCertificate(_) => unusable(certificate, why),
            _ => unusable(key, why),
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    warn_of_time(certificate, valid);
    Ok(Live { config: Arc::new(config), valid })
}

/// What is wrong with a PEM file, without a piece of it.
fn flaw(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => "an END line is missing",
        pem::Error::IllegalSectionStart { .. } => "a BEGIN line is damaged",
        pem::Error::Base64Decode(_) => "there is something between BEGIN and END that is no base64",
        _ => "it can't be understood",
    }
}

/// The operator's clock may be the one that is wrong: clients decide.
fn warn_of_time(path: &Path, valid: Option<[i64; 2]>) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = now.map_or(0, |t| i64::try_from(t.as_secs()).unwrap_or(i64::MAX));
    let path = path.display();
    let days = |seconds: i64| seconds / 86_400;
    match valid {
        None => tracing::warn!(%path, "the certificate's time of validity can't be read"),
        Some([from, _]) if now < from => {
            tracing::warn!(%path, days = days(from - now), "the certificate is not valid yet");
        }
        Some([_, until]) if now > until => {
            tracing::warn!(%path, days = days(now - until), "the certificate has expired");
        }
        Some([_, until]) => {
            tracing::info!(%path, days_left = days(until - now), "certificate read");
        }
    }
}
