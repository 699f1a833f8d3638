//! A free port → a server on it, in a process that is still to be started.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpSocket;

/// A loopback port that nobody listens on. Linux gives it to nobody else while this lives, but for
/// a server that asks for it by number.
///
/// It is bound and does not listen: a process that is being started holds a copy of all sockets
/// until its program runs, and a listening one would answer for the server in the meantime.
pub struct Port {
    pub number: u16,
    /// Elsewhere the server could not bind while this is held.
    #[cfg(target_os = "linux")]
    _held: TcpSocket,
}

impl Port {
    /// One that the system chooses.
    pub fn free() -> io::Result<Port> {
        let socket = TcpSocket::new_v4()?;
        // The server sets it, too; without it on both sides it could not have the port.
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
        Ok(Port {
            number: socket.local_addr()?.port(),
            #[cfg(target_os = "linux")]
            _held: socket,
        })
    }
}
