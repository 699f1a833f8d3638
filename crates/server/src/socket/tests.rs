//! Bytes cut and bent in every way → messages, or the fault they are.

use tokio::io::{DuplexStream, duplex};

use super::*;
use crate::load::socket::frame;

const MASK: [u8; 4] = [7, 99, 0, 254];

fn pair(limit: usize) -> (DuplexStream, Socket<DuplexStream>) {
    let (client, server) = duplex(64 << 10);
    (client, Socket::new(server, limit, Bytes::new()))
}

/// The masked frame, not final if `more` follows.
fn part(opcode: u8, payload: &[u8], more: bool) -> Vec<u8> {
    let mut bytes = frame(opcode, payload, MASK).to_vec();
    bytes[0] &= if more { 0x7f } else { 0xff };
    bytes
}

#[tokio::test]
async fn messages_arrive_whole_however_they_are_cut() {
    let long: Vec<u8> = (0..200_000u32).map(|i| (i * 31) as u8).collect();
    let mut sent = Vec::new();
    sent.extend(part(2, b"one", false));
    sent.extend(part(2, &long[..70_001], true));
    sent.extend(part(9, b"there?", false));
    sent.extend(part(0, &long[70_001..], false));
    sent.extend(part(1, "é".as_bytes(), false));
    sent.extend(part(2, b"", false));
    for step in [1, 2, 7, 4096, 65_537, sent.len()] {
        let (mut client, mut socket) = pair(1 << 20);
        let bytes = sent.clone();
        let writing = tokio::spawn(async move {
            for piece in bytes.chunks(step) {
                client.write_all(piece).await.unwrap();
            }
            client
        });
        let mut next = async || socket.receive().await.unwrap();
        assert_eq!(next().await, Message::Binary("one".into()), "{step}");
        assert_eq!(next().await, Message::Alive, "{step}");
        assert_eq!(next().await, Message::Binary(long.clone().into()), "{step}");
        assert_eq!(next().await, Message::Text, "{step}");
        assert_eq!(next().await, Message::Binary(Bytes::new()), "{step}");
        let mut client = writing.await.unwrap();
        // The pong leaves while the socket waits for more; a dropped wait loses nothing.
        let (mut pong, mut got) = ([0; 8], 0);
        while got < pong.len() {
            tokio::select! {
                read = client.read(&mut pong[got..]) => got += read.unwrap(),
                more = socket.receive() => panic!("{more:?}"),
            }
        }
        assert_eq!(&pong, b"\x8a\x06there?");
    }
}

#[tokio::test]
async fn what_is_against_the_protocol_ends_the_socket() {
    let long = vec![0; 126];
    let huge = [0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4];
    let limit = 1000;
    for (bytes, want) in [
        (vec![0x82, 0x01, b'x'], "a frame is not masked"),
        (vec![0xc2, 0x80, 0, 0, 0, 0], "reserved bits are set"),
        (part(3, b"", false), "no such kind of frame"),
        (part(11, b"", false), "no such kind of frame"),
        (part(0, b"x", false), "nothing is to be continued"),
        ([part(2, b"x", true), part(2, b"y", false)].concat(), "a message begins inside another"),
        (part(9, b"x", true), "a control frame is fragmented"),
        (part(9, &long, false), "a control frame is too long"),
        (part(8, b"x", false), "half a close code"),
        (part(2, &vec![0; limit + 1], false), "too big"),
        ([part(2, &long, true), part(0, &vec![0; 875], false)].concat(), "too big"),
        (huge.to_vec(), "too big"),
        (part(1, b"\xff", false), "no text"),
        (part(8, b"\x03\xe8\xff", false), "no text"),
        (part(2, b"cut", false)[..7].to_vec(), "gone"),
    ] {
        let (mut client, mut socket) = pair(limit);
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        let fault = socket.receive().await.unwrap_err();
        let told = match fault {
            Fault::Protocol(what) => what,
            Fault::TooBig => "too big",
            Fault::Utf8 => "no text",
            Fault::Gone => "gone",
            Fault::Unread => "unread",
        };
        assert_eq!(told, want, "{bytes:?}");
        assert_eq!(socket.receive().await, Err(Fault::Gone), "{want}");
    }
}

#[tokio::test]
async fn both_sides_can_close() {
    let mut answer = [0; 64];
    for (payload, echo) in [
        (&b""[..], &b"\x88\x00"[..]),
        (b"\x03\xe8bye", b"\x88\x05\x03\xe8bye"),
        (b"\x03\xed", b"\x88\x14\x03\xeaProtocol violation"),
    ] {
        let (mut client, mut socket) = pair(1000);
        client.write_all(&part(8, payload, false)).await.unwrap();
        assert_eq!(socket.receive().await, Ok(Message::Close));
        assert_eq!(socket.receive().await, Err(Fault::Gone));
        let n = client.read(&mut answer).await.unwrap();
        assert_eq!(&answer[..n], echo);
        assert_eq!(socket.send(Data::Binary, b"late").await, Err(Fault::Gone));
    }
    let (mut client, mut socket) = pair(1000);
    socket.close(1001, "over").await.unwrap();
    let n = client.read(&mut answer).await.unwrap();
    assert_eq!(&answer[..n], b"\x88\x06\x03\xe9over");
    client.write_all(&part(9, b"", false)).await.unwrap();
    client.write_all(&part(8, b"\x03\xe9", false)).await.unwrap();
    assert_eq!(socket.receive().await, Ok(Message::Alive));
    assert_eq!(socket.receive().await, Ok(Message::Close));
    assert_eq!(socket.receive().await, Err(Fault::Gone));
    drop(socket);
    assert_eq!(client.read(&mut answer).await.unwrap(), 0, "no pong and no second close");
}

#[tokio::test]
async fn pings_without_end_and_unread_answers_pile_up_nothing() {
    let (mut client, mut socket) = pair(1000);
    let pings = part(9, &[1; 100], false).repeat(100);
    for _ in 0..200 {
        client.write_all(&pings).await.unwrap();
        for _ in 0..100 {
            assert_eq!(socket.receive().await, Ok(Message::Alive));
        }
    }
    assert!(socket.out.len() <= 200, "{}", socket.out.len());
    let answer = vec![0; 1 << 20];
    let unread = async {
        loop {
            // Given up each time before it is written, as by a timeout.
            let sending = socket.send(Data::Binary, &answer);
            if let Ok(ended) = tokio::time::timeout(Default::default(), sending).await {
                return ended;
            }
        }
    };
    assert_eq!(unread.await, Err(Fault::Unread));
    let most = MAX_UNSENT_BYTES + answer.len() + 1000;
    assert!(socket.out.len() <= most, "{}", socket.out.len());
}

#[tokio::test]
async fn a_message_of_any_length_is_sent_also_behind_a_ping() {
    let (mut client, mut socket) = pair(1000);
    let answer = vec![7; 3 * MAX_UNSENT_BYTES];
    let sending = async {
        // Given up before it is written.
        let _ = tokio::time::timeout(Default::default(), socket.ping()).await;
        socket.send(Data::Binary, &answer).await
    };
    let reading = async {
        let mut got = vec![0; 11 + 10 + answer.len()];
        client.read_exact(&mut got).await.unwrap();
        got
    };
    let (sent, got) = tokio::join!(sending, reading);
    assert_eq!(sent, Ok(()));
    assert!(got.starts_with(b"\x89\x09pirouette\x82\x7f") && got.ends_with(&answer));
}
