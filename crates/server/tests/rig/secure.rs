//! TLS in the tests: the certificates of `testdata/tls`, and a client that trusts them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use pirouette_server::{ServeOptions, Tls, TlsError};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::{PATIENCE, Raw};

pub fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/tls").join(name)
}

pub fn tls(certificate: &str, key: &str) -> Result<Tls, TlsError> {
    Tls::read(&file(certificate), &file(key))
}

pub fn first() -> ServeOptions {
    ServeOptions { tls: Some(tls("first.pem", "first.key").unwrap()), ..Default::default() }
}

/// Trusts the authority in a file.
pub fn client(authority: &str, version: &'static rustls::SupportedProtocolVersion) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file(authority)).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

pub async fn connect(
    connector: &TlsConnector,
    address: SocketAddr,
) -> std::io::Result<Raw<TlsStream<TcpStream>>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    let handshake = connector.connect(name, stream);
    Ok(Raw(tokio::time::timeout(PATIENCE, handshake).await.expect("a handshake")?))
}
