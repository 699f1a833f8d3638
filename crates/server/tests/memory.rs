//! Memory stays flat; alone in its process, so that only its own counts.
#![cfg(target_os = "linux")]

mod rig;

use std::time::Duration;

use pirouette_server::ServeOptions;
use rig::{Server, first_action, state};
use tokio::io::AsyncWriteExt;

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test]
async fn a_flood_of_pings_that_nobody_reads_the_pongs_of_is_bounded() {
    let server = Server::plain(ServeOptions::default()).await;
    let mut client = server.client().await;
    let flood = rig::masked(9, &[7; 125]).repeat(1000);
    let before = resident();
    for _ in 0..500 {
        // 65 MB of pings. A server may also stop reading; then the flood ends by itself.
        let write = client.0.write_all(&flood);
        if !matches!(tokio::time::timeout(Duration::from_millis(500), write).await, Ok(Ok(()))) {
            break;
        }
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more than before");
    let mut other = server.client().await;
    other.ask(&[state(1.0)]).await;
    assert_eq!(first_action(&other.frame().await.map()), 1.0);
}
