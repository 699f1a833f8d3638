//! `--record`: what is written, what is read again, the bound on the folder.

mod rig;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use pirouette_policy::Value;
use pirouette_server::{
    Dialect, LeftOut, RecordOptions, Recorded, Recorder, Recording, RecordingError, ServeOptions,
    Service, msgpack,
};
use rig::engine::EngineService;
use rig::{Server, state, text};
use serde_json::json;

fn recorder(dir: &Path, limit_bytes: u64) -> Arc<Recorder> {
    let options = RecordOptions { dir: dir.to_owned(), limit_bytes };
    Arc::new(Recorder::start(&options, || json!({ "config": "test" })).unwrap())
}

fn all(dir: &Path) -> Vec<Recorded> {
    let mut all = Vec::new();
    let recording = Recording::open(dir).unwrap();
    recording
        .for_each(|recorded| {
            all.push(recorded);
            ControlFlow::Continue(())
        })
        .unwrap();
    all
}

fn left_out(dir: &Path) -> LeftOut {
    Recording::open(dir).unwrap().for_each(|_| ControlFlow::Continue(())).unwrap()
}

/// The recorder learns of a request after its answer was sent: waits until it has.
async fn quiet<S: Service>(server: &Server<S>) {
    for _ in 0..500 {
        let (_, _, stats) = server.get("GET /stats HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
        if stats["requests"]["running"] == 0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("requests do not end");
}

async fn metric<S: Service>(server: &Server<S>, name: &str) -> u64 {
    let (_, _, metrics) = server.get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().parse().unwrap()
}

fn bytes_in(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum()
}

#[tokio::test]
async fn requests_are_written_as_they_came_and_run_again() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("records");
    let recorder = recorder(&dir, 1 << 30);
    let options = ServeOptions { recorder: Some(recorder.clone()), ..ServeOptions::default() };
    let server = Server::with(EngineService::start(1.0), options, false).await;
    let mut client = server.client().await;
    let mut replies = Vec::new();
    for i in 0..5 {
        client.ask(&[state(i as f64)]).await;
        replies.push(client.frame().await.payload);
    }
    client.ask(&[state(9.0), ("seed", Value::Int(u64::MAX.into()))]).await;
    replies.push(client.frame().await.payload);
    let one = |entry: (&str, Value)| Value::Map(vec![(entry.0.into(), entry.1)]);
    let three = [state(1.0), ("prompt", text("no state")), state(2.0)].map(one);
    client.ask(&[("batch", Value::List(three.into()))]).await;
    replies.push(client.frame().await.payload);
    client.ask(&[("prompt", text("no state"))]).await;
    let error = client.frame().await;
    let (_, _, metrics) = server.get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(metrics.contains("pirouette_record_dropped_total{reason=\"busy\"} 0"), "{metrics}");
    assert_eq!(client.frame().await.close().0, 1011);
    recorder.finish();

    let recorded = all(&dir);
    assert_eq!(recorded.len(), 8);
    for (i, (one, reply)) in recorded.iter().zip(&replies).enumerate() {
        assert_eq!(one.id, i as u64 + 1);
        assert_eq!(one.reply, reply, "the answer's frame, byte for byte");
        assert_eq!(one.identity, json!({ "config": "test" }));
        let answered = one.answered().unwrap();
        assert_eq!(answered.len(), if i == 6 { 2 } else { 1 }, "of three, two were answered");
        for (observation, context, actions) in answered {
            assert!(context.seed.is_some(), "drawn ones too");
            let again = server.script.infer(observation, context).await.unwrap();
            assert_eq!(again.actions, actions, "request {i} again");
        }
    }
    assert!(recorded[..6].iter().all(|one| one.outcome == "ok" && one.batch == Some(1)));
    assert_eq!(recorded[5].seed, Some(u64::MAX));
    assert_eq!(recorded[6].outcome, "invalid", "what became of the first that failed");
    assert_eq!((recorded[7].outcome.as_str(), recorded[7].seed), ("invalid", None));
    assert_eq!(recorded[7].reply, error.text().as_bytes());
    assert!(recorded[7].answered().unwrap().is_empty());
    #[cfg(unix)]
    for entry in std::fs::read_dir(&dir).unwrap() {
        use std::os::unix::fs::PermissionsExt;
        let mode = entry.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "for the owner alone");
    }
}

/// Their answers are the actions alone, as float32.
#[tokio::test]
async fn requests_of_vllm_omnis_clients_run_again() {
    let temporary = tempfile::tempdir().unwrap();
    let recorder = recorder(temporary.path(), 1 << 30);
    let dialect = Dialect::VllmOmni;
    let options = ServeOptions { recorder: Some(recorder.clone()), dialect, ..Default::default() };
    let server = Server::with(EngineService::start(1.0), options, false).await;
    let mut client = server.client().await;
    // With the second answer the first is in the recorder's hands.
    for _ in 0..2 {
        client.ask(&[state(1.0), ("session_id", text("a"))]).await;
        assert_eq!(client.frame().await.opcode, 2);
    }
    recorder.finish();
    let answered = all(temporary.path())[0].answered().unwrap();
    let [(observation, context, actions)] = <[_; 1]>::try_from(answered).unwrap();
    let again = server.script.infer(observation, context).await.unwrap();
    assert_eq!(again.actions.to_f32().unwrap(), actions);
}

#[tokio::test]
async fn an_answer_is_recorded_as_that_of_the_weights_that_made_it() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("records");
    let recorder = recorder(&dir, 1 << 30);
    let options = ServeOptions { recorder: Some(recorder.clone()), ..ServeOptions::default() };
    let server = Server::plain(options).await;
    // The script's note stands for its weights: they are swapped while a request runs.
    *server.script.note.lock().unwrap() = "old".into();
    let (mut slow, mut quick) = (server.client().await, server.client().await);
    slow.ask(&[state(1.0), ("sleep_ms", Value::Int(300))]).await;
    rig::eventually("running", || server.script.running.load(SeqCst) == 1).await;
    *server.script.note.lock().unwrap() = "new".into();
    quick.ask(&[state(2.0)]).await;
    quick.frame().await.map();
    quick.ask(&[("prompt", text("busy"))]).await;
    quick.frame().await.text();
    slow.frame().await.map();
    quiet(&server).await;
    recorder.finish();
    let mut of: Vec<_> = all(&dir).into_iter().map(|one| (one.outcome, one.identity)).collect();
    of.sort_by_key(|(outcome, identity)| (outcome.clone(), identity.to_string()));
    let (old, new) = (json!({ "note": "old" }), json!({ "note": "new" }));
    let ok = || "ok".to_owned();
    assert_eq!(of, [(ok(), new.clone()), (ok(), old), ("overloaded".into(), new)]);
}

#[tokio::test]
async fn a_full_folder_loses_its_oldest_requests_and_nobody_waits() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("records");
    let limit = 64 << 10;
    let padding = Value::Bytes(vec![7u8; 1000].into());
    // Two servers, one after the other: what the first left counts.
    for run in 0..2 {
        let recorder = recorder(&dir, limit);
        let options = ServeOptions { recorder: Some(recorder.clone()), ..ServeOptions::default() };
        let server = Server::plain(options).await;
        let mut client = server.client().await;
        for i in 0..120 {
            client.ask(&[state((run * 120 + i) as f64), ("padding", padding.clone())]).await;
            client.frame().await.map();
            // Let the disk keep up: nothing may be dropped here for being late.
            for _ in 0..1000 {
                if i % 32 != 31 || metric(&server, "pirouette_recorded_total").await >= i as u64 {
                    break;
                }
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        let huge = Value::Bytes(vec![0u8; 80 << 10].into());
        client.ask(&[state(0.0), ("padding", huge)]).await;
        client.frame().await.map();
        quiet(&server).await;
        recorder.finish();
        assert!(bytes_in(&dir) <= limit, "{}", bytes_in(&dir));
        let dropped = "pirouette_record_dropped_total";
        for (name, want) in [
            ("pirouette_recorded_total".into(), 120),
            (format!("{dropped}{{reason=\"busy\"}}"), 0),
            (format!("{dropped}{{reason=\"too_big\"}}"), 1),
            ("pirouette_record_bytes".into(), bytes_in(&dir)),
        ] {
            assert_eq!(metric(&server, &name).await, want, "{name}");
        }
    }
    let recorded = all(&dir);
    assert!((10..60).contains(&recorded.len()), "{}", recorded.len());
    let states: Vec<f64> = recorded.iter().map(first_state).collect();
    assert!(states.windows(2).all(|w| w[0] < w[1]), "oldest first: {states:?}");
    assert!(states[0] >= 120.0, "the first run's are gone: {states:?}");
}

fn first_state(recorded: &Recorded) -> f64 {
    let Ok(Value::Map(map)) = msgpack::decode(&recorded.request) else { panic!() };
    match map[0] {
        (_, Value::Float(v)) => v,
        _ => panic!("{map:?}"),
    }
}

/// Records three requests, in one segment.
async fn record_three(dir: &Path) {
    let recorder = recorder(dir, 1 << 20);
    let options = ServeOptions { recorder: Some(recorder.clone()), ..ServeOptions::default() };
    let server = Server::plain(options).await;
    let mut client = server.client().await;
    for i in 0..3 {
        client.ask(&[state(i as f64)]).await;
        client.frame().await.map();
    }
    quiet(&server).await;
    recorder.finish();
}

fn file(dir: &Path, extension: &str) -> PathBuf {
    let mut files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    files.find(|p| p.extension().is_some_and(|e| e == extension)).unwrap()
}

#[tokio::test]
async fn a_folder_is_read_while_it_is_recorded_into_and_after_the_power_failed() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("records");
    record_three(&dir).await;
    let paths = ["jsonl", "frames"].map(|extension| file(&dir, extension));
    let whole = paths.clone().map(|path| std::fs::read(path).unwrap());
    let write = |contents: [&[u8]; 2]| {
        for (path, contents) in paths.iter().zip(contents) {
            std::fs::write(path, contents).unwrap();
        }
    };
    let [index, frames] = [&whole[0][..], &whole[1][..]];
    let newer = ["jsonl", "frames"].map(|e| dir.join(format!("90000000000000-000001.{e}")));

    // One request is there, and while it is read the others come.
    let first = all(&dir)[0].clone();
    let lines: Vec<&[u8]> = index.split_inclusive(|byte| *byte == b'\n').collect();
    write([&lines[..2].concat(), &frames[..first.request.len() + first.reply.len()]]);
    let mut read = 0;
    let count = |_| {
        read += 1;
        write([index, frames]);
        ControlFlow::Continue(())
    };
    Recording::open(&dir).unwrap().for_each(count).unwrap();
    assert_eq!(read, 3);

    // The index reached the disk, the end of the frames did not.
    for (path, contents) in newer.iter().zip(&whole) {
        std::fs::write(path, contents).unwrap();
    }
    write([index, &frames[..frames.len() - 1]]);
    assert_eq!(all(&dir).len(), 2 + 3, "the next segment is read");
    let cut = |lines| LeftOut { lines, segments: 1, damaged: vec![] };
    assert_eq!(left_out(&dir), cut(1), "the next segment is another run's first");

    // Room is needed before the next segment is read.
    let mut read = 0;
    let count = |_| {
        read += 1;
        newer.iter().for_each(|path| drop(std::fs::remove_file(path)));
        ControlFlow::Continue(())
    };
    Recording::open(&dir).unwrap().for_each(count).unwrap();
    assert_eq!(read, 2);
}

#[tokio::test]
async fn damaged_recordings_are_named_and_a_cut_end_is_no_damage() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("records");
    record_three(&dir).await;
    let file = |extension: &str| file(&dir, extension);
    let index = std::fs::read_to_string(file("jsonl")).unwrap();
    let whole = all(&dir).len();
    assert_eq!(whole, 3);
    std::fs::write(file("jsonl"), &index[..index.len() - 5]).unwrap();
    assert_eq!(all(&dir).len(), whole - 1, "a line that was cut short");
    assert_eq!(left_out(&dir), LeftOut { lines: 1, segments: 1, damaged: vec![] });
    std::fs::write(file("jsonl"), &index).unwrap();
    assert_eq!(left_out(&dir), LeftOut::default());
    let read = || Recording::open(&dir).unwrap().for_each(|_| ControlFlow::Continue(()));
    for (damaged, wanted) in [
        (index.replacen("pirouette recording", "something else", 1), "no recording"),
        (index.replacen("{\"request\":[0,", "{\"request\":[\"0\",", 1), "not in the segment"),
        (index.replacen("\"version\":1", "\"version\":2", 1), "version"),
        (index.replacen("\n{", "\nno json{", 1), "no JSON"),
        (index.replacen("[0,", "[1,18446744073709551615,", 1), "not in the segment"),
    ] {
        assert_ne!(damaged, index);
        std::fs::write(file("jsonl"), damaged).unwrap();
        let error = read().unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let empty = temporary.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(matches!(Recording::open(&empty), Err(RecordingError::Empty(_))));
    assert!(matches!(Recording::open(&empty.join("no")), Err(RecordingError::Read { .. })));
}

/// Frames that are missing at the end of a run never reached the disk; where the same server wrote
/// another segment after them, somebody has cut them off. All that is there is read.
#[tokio::test]
async fn frames_may_be_missing_at_the_end_of_a_run_alone() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().join("records");
    record_three(&dir).await;
    let whole = ["jsonl", "frames"].map(|e| std::fs::read(file(&dir, e)).unwrap());
    let name = file(&dir, "jsonl").file_stem().unwrap().to_str().unwrap().to_owned();
    let cut = |bytes: usize| std::fs::write(file(&dir, "frames"), &whole[1][..bytes]).unwrap();
    let all_but_one = whole[1].len() - 1;

    // The newest segment: one line, then all three and a torn fourth.
    cut(all_but_one);
    assert_eq!(left_out(&dir), LeftOut { lines: 1, segments: 1, damaged: vec![] });
    cut(0);
    std::fs::write(file(&dir, "jsonl"), [&whole[0][..], b"{\"requ"].concat()).unwrap();
    assert_eq!(left_out(&dir), LeftOut { lines: 4, segments: 1, damaged: vec![] });
    std::fs::write(file(&dir, "jsonl"), &whole[0]).unwrap();

    for (next, damaged) in
        [("90000000000000-000002", vec![name]), ("90000000000000-000001", vec![])]
    {
        cut(all_but_one);
        let paths = ["jsonl", "frames"].map(|e| dir.join(format!("{next}.{e}")));
        paths.iter().zip(&whole).for_each(|(path, bytes)| std::fs::write(path, bytes).unwrap());
        assert_eq!(all(&dir).len(), 2 + 3);
        assert_eq!(left_out(&dir), LeftOut { lines: 1, segments: 1, damaged });
        paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    }
}
