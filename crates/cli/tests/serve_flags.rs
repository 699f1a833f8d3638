//! The flags of `serve` that decide who may reach it, as a process: what is refused before the
//! model is loaded, and in which words.

use std::path::PathBuf;
use std::process::{Command, Output};

fn serve(flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pirouette"));
    command.arg("serve").args(flags).env_remove("PIROUETTE_LOG");
    command.output().unwrap()
}

fn tls(name: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../../testdata/tls").join(name).display().to_string()
}

#[test]
fn what_would_be_open_to_all_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "arm secret-of-the-first-arm rate=fast\n").unwrap();
    let keys = keys.to_str().unwrap();
    let good = folder.path().join("good");
    std::fs::write(&good, "arm secret-of-the-first-arm\n").unwrap();
    let good = good.to_str().unwrap();
    let (first, own, other) = (tls("first.pem"), tls("first.key"), tls("second.key"));
    let admin = ["--admin-port", "1", "--admin-host", "0.0.0.0"];
    let with_tls = [&admin[..], &["--tls-cert", &first, "--tls-key", &own]].concat();
    let lerobot = ["pi05_droid", "--device", "null", "--lerobot-port", "1"];
    // Keys and TLS guard the other ports; LeRobot's client knows neither.
    let open = ["--lerobot-host", "0.0.0.0", "--api-key-file", good, "--tls-cert", &first];
    let open = [&lerobot[..], &open, &["--tls-key", &own]].concat();
    let table: [(&[&str], &str); 12] = [
        (&["--queue", "8", "--max-observations", "9"], "never fits a queue of 8: raise --queue"),
        (&["--host", "0.0.0.0"], "--api-key-file, a certificate with --tls-cert and --tls-key"),
        (&admin, "the admin listener on 0.0.0.0:1 can be reached from other machines"),
        (&with_tls, "name a key file with --admin-key-file"),
        (&["--admin-key-file", keys], "--admin-port"),
        (&["--lerobot-host", "0.0.0.0"], "--lerobot-port"),
        (&open, "LeRobot's port on 0.0.0.0:1 can be reached from other machines"),
        (&lerobot, "can't send the keys of droid's robot"),
        (&["--tls-cert", &first], "--tls-key"),
        (&["--tls-cert", &first, "--tls-key", &other], "is not that of the first certificate"),
        (&["--tls-cert", "missing.pem", "--tls-key", &other], "`missing.pem` can't be read"),
        (&["--api-key-file", keys], "line 1 of the key file: `rate` is a number"),
    ];
    for (flags, want) in table {
        let output = serve(flags);
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{flags:?}");
        assert!(told.contains(want), "{flags:?}: {told}");
        assert!(!told.contains("secret-of"), "{told}");
    }
}

#[test]
fn json_logs_are_one_object_a_line() {
    let flags = ["pi05_droid", "--device", "null", "--checkpoint", "missing"];
    let flags = [&["--log-format", "json"][..], &flags].concat();
    let told = String::from_utf8(serve(&flags).stderr).unwrap();
    let first: serde_json::Value = serde_json::from_str(told.lines().next().unwrap()).unwrap();
    assert_eq!(first["level"], "WARN");
    assert!(first["message"].as_str().unwrap().contains("NULL DEVICE"), "{first}");
    assert!(serve(&["--log-format", "xml"]).status.code() == Some(2));
}
