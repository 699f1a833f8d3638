//! Wrong checkpoints, observations, ports and files → one clear line with the remedy, a non-zero
//! exit code, and nothing left behind.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata")
}

fn checkpoint() -> PathBuf {
    testdata().join("A_tiny/e2e/pi05_droid/checkpoint")
}

fn tokenizer() -> PathBuf {
    testdata().join("D_preprocess/tokenizer/tok_bpe.model")
}

/// Runs the binary in an empty folder of its own, which must be empty afterwards.
fn pirouette(arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_pirouette"))
        .args(arguments)
        .current_dir(folder.path())
        .env("HOME", folder.path())
        .env_remove("OPENPI_DATA_HOME")
        .env_remove("HF_HOME")
        .output()
        .unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{arguments:?} left {left:?}");
    output
}

/// The command fails and its last words hold each of `says`, without a panic or a doubled cause.
#[track_caller]
fn fails(arguments: &[&str], says: &[&str]) {
    let output = pirouette(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
    assert!(text.contains("pirouette: "), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for part in says {
        assert!(text.contains(part), "{arguments:?} does not say `{part}`: {text}");
    }
    let twice = "No such file or directory (os error 2): No such file";
    assert!(!text.contains(twice), "a cause said twice: {text}");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A copy of the tiny checkpoint whose weights were changed by `edit`.
fn edited(edit: impl FnOnce(&mut Vec<u8>)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let assets = folder.path().join("assets/droid");
    std::fs::create_dir_all(&assets).unwrap();
    let stats = "assets/droid/norm_stats.json";
    std::fs::copy(checkpoint().join(stats), folder.path().join(stats)).unwrap();
    let mut bytes = std::fs::read(checkpoint().join("model.safetensors")).unwrap();
    edit(&mut bytes);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

/// Replaces text of equal length in the header.
fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

fn infer<'a>(checkpoint: &'a str, tokenizer: &'a str, rest: &[&'a str]) -> Vec<&'a str> {
    let base = ["infer", "pi05_droid", "--checkpoint", checkpoint, "--tokenizer", tokenizer];
    base.into_iter().chain(["--device", "cpu"]).chain(rest.iter().copied()).collect()
}

#[test]
fn damaged_and_foreign_checkpoints() {
    let truncated = edited(|bytes| bytes.truncate(bytes.len() / 2));
    let headless = edited(|bytes| bytes.truncate(100));
    let noise = edited(|bytes| bytes[..64].fill(0xA5));
    let integer = edited(|bytes| {
        let at = bytes.windows(23).position(|w| w == b"action_in_proj.bias\":{\"");
        let at = at.expect("the tensor is there");
        replace(&mut bytes[at..], "\"F32\"", "\"I32\"");
    });
    let missing = edited(|bytes| replace(bytes, "action_in_proj.bias", "action_in_prox.bias"));
    let damaged = "copy or download the checkpoint again";
    for (folder, says) in [
        (&truncated, vec!["is damaged", damaged]),
        (&headless, vec!["is damaged", damaged]),
        (&noise, vec!["is damaged", damaged]),
        (&integer, vec!["`action_in_proj.bias` has type I32, expected F32, BF16 or F16"]),
        (&missing, vec!["missing `action_in_proj.bias`", "unexpected `action_in_prox.bias`"]),
    ] {
        let folder = text(folder.path());
        fails(&infer(folder, text(&tokenizer()), &[]), &says);
        fails(&["inspect", folder], &says);
        fails(&["serve", "pi05_droid", "--checkpoint", folder, "--port", "0"], &says);
    }
    let empty = tempfile::tempdir().unwrap();
    let says = ["is not a checkpoint: expected `model.safetensors`"];
    fails(&["inspect", text(empty.path())], &says);
    // A folder of arrays that are no model's: `inspect` must not recommend itself.
    let arrays = testdata().join("F_loader/orbax_train_style/7");
    fails(&["inspect", text(&arrays)], &["is missing from", "or name another directory"]);
    fails(&["inspect", "/no/such/folder"], &["/no/such/folder", "No such file or directory"]);
}

#[test]
fn weights_that_are_no_numbers() {
    let nan = edited(|bytes| {
        let end = bytes.len();
        bytes[end - 256..].fill(0xFF);
    });
    let (folder, tokenizer) = (text(nan.path()), tokenizer());
    let says = ["is NaN: the weights or the device are broken"];
    fails(&infer(folder, text(&tokenizer), &[]), &says);
    let flags = ["--device", "cpu", "--horizon", "4", "--steps", "1", "--runs", "1"];
    let bench: Vec<_> = ["bench", "--checkpoint", folder].into_iter().chain(flags).collect();
    fails(&bench, &["NaN: the weights or the device are broken"]);
}

/// The command line itself is refused, and the flag named.
#[track_caller]
fn refuses(arguments: &[&str], flag: &str) {
    let output = pirouette(arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
    assert!(told.contains(flag) && !told.contains("panicked"), "{arguments:?}: {told}");
}

#[test]
fn numbers_beyond_any_machine() {
    let huge = "18446744073709551615";
    for command in ["bench", "profile", "ladder", "report"] {
        for number in [huge, "1000000000000", "0"] {
            refuses(&[command, "--device", "cpu", "--runs", number], "--runs");
        }
        refuses(&[command, "--device", "cpu", "--warmup", huge], "--warmup");
    }
    refuses(&["replay", "recordings", "--limit", "0"], "--limit");
    for seconds in [huge, "0"] {
        refuses(&["stress", "--overload-seconds", seconds], "--overload-seconds");
    }
    fails(&["bench", "--deterministic", huge], &["batch"]);
    let dir = checkpoint();
    let verify = ["verify", text(&dir), "--device", "cpu", "--horizon", "4", "--seed", huge];
    let told = pirouette(&verify);
    assert_eq!(told.status.code(), Some(0), "{}", String::from_utf8_lossy(&told.stderr));
}

#[test]
fn rates_that_nothing_can_be_divided_by() {
    for command in ["plan", "profile", "report"] {
        for flag in ["--tflops", "--tbps"] {
            for rate in ["nan", "inf", "0", "-1", "1e300"] {
                refuses(&[command, &format!("{flag}={rate}")], flag);
            }
        }
    }
}

#[test]
fn a_comparison_has_no_measurements_to_write() {
    for (flag, value) in [("--json", "c.json"), ("--json", "-"), ("--published", "p.json")] {
        refuses(&["report", "--compare", "a.json", "b.json", flag, value], flag);
    }
}

#[test]
fn the_wrong_configuration() {
    let (dir, tokenizer) = (checkpoint(), tokenizer());
    let serve = |name| {
        ["serve", name, "--checkpoint", text(&dir), "--tokenizer", text(&tokenizer), "--port", "0"]
    };
    fails(&serve("pi0_droid"), &["pi0_droid is for pi0, these weights are pi05", "choose"]);
    fails(&serve("pi05_libero"), &["physical-intelligence/libero", "asset"]);
    fails(&serve("pi05_driod"), &["no policy `pi05_driod`; did you mean pi05_droid"]);
    fails(&serve("robot.toml"), &["can't read robot.toml"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("robot.toml");
    std::fs::write(&file, "family = \"pi05\"\nhorizn = 4\n").unwrap();
    fails(&serve(text(&file)), &["robot.toml", "horizn"]);
}

#[test]
fn openpis_cache_is_looked_for_as_openpi_does() {
    let home = tempfile::tempdir().unwrap();
    for (variable, cache) in [("", ".cache/openpi"), ("~/data", "data"), ("/data", "/data")] {
        let output = Command::new(env!("CARGO_BIN_EXE_pirouette"))
            .args(["serve", "--env", "DROID", "--port", "0"])
            .env("HOME", home.path())
            .env("OPENPI_DATA_HOME", variable)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let want = format!("pi05_droid is not in {}:", home.path().join(cache).display());
        assert!(told.contains(&want), "{variable}: {told}");
    }
}

#[test]
fn inspect_looks_for_tokenizers_where_infer_does() {
    let folder = edited(|_| ());
    let json = folder.path().join("tokenizer/tokenizer.json");
    std::fs::create_dir_all(json.parent().unwrap()).unwrap();
    std::fs::write(&json, "{}").unwrap();
    let told = |output: Output| String::from_utf8(output.stdout).unwrap();
    let page = told(pirouette(&["inspect", text(folder.path())]));
    assert!(page.contains(&format!("{} (not read:", json.display())), "{page}");
    assert!(page.contains("none that is read; pass one with --tokenizer"), "{page}");
    let model = folder.path().join("assets/tokenizer.model");
    std::fs::copy(tokenizer(), &model).unwrap();
    let page = told(pirouette(&["inspect", text(folder.path()), "--json", "-"]));
    let page: serde_json::Value = serde_json::from_str(&page).unwrap();
    assert_eq!(page["tokenizers"], serde_json::json!([text(&model)]));
    assert_eq!(page["tokenizers_not_read"], serde_json::json!([text(&json)]));
    assert_eq!(page["family"], "pi05");
    let output =
        pirouette(&["infer", "pi05_droid", "--checkpoint", text(folder.path()), "--device", "cpu"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn files_that_are_something_else() {
    let dir = checkpoint();
    let dir = text(&dir);
    let folder = tempfile::tempdir().unwrap();
    let junk = folder.path().join("tokenizer.model");
    std::fs::write(&junk, "{\"version\": \"1.0\"}").unwrap();
    fails(&infer(dir, text(&junk), &[]), &["is no SentencePiece model", "tokenizer.model"]);
    fails(&infer(dir, "/no/tokenizer.model", &[]), &["/no/tokenizer.model"]);
    let own = edited(|_| ());
    let found = own.path().join("tokenizer.model");
    std::fs::copy(&junk, &found).unwrap();
    let says = format!("tokenizer {}: this is no SentencePiece model", found.display());
    fails(&["infer", "pi05_droid", "--checkpoint", text(own.path()), "--device", "cpu"], &[&says]);
    let tokenizer = tokenizer();
    let tokenizer = text(&tokenizer);
    let observation = folder.path().join("obs.npz");
    std::fs::write(&observation, "PK\x03\x04 and nothing more").unwrap();
    fails(&infer(dir, tokenizer, &["--observation", text(&observation)]), &["obs.npz"]);
    let says = ["an observation is a .npz or a .msgpack file"];
    fails(&infer(dir, tokenizer, &["--observation", tokenizer]), &says);
    let stats = folder.path().join("norm_stats.json");
    std::fs::write(&stats, "{}").unwrap();
    fails(&infer(dir, tokenizer, &["--norm-stats", text(&stats)]), &["norm stats"]);
    let found = own.path().join("assets/droid/norm_stats.json");
    let json = std::fs::read_to_string(&found).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&json).unwrap();
    json["norm_stats"]["state"]["q01"][0] = "NaN".into();
    std::fs::write(&found, json.to_string()).unwrap();
    let says = format!("{}: norm stats: `state.q01` is NaN at index 0", found.display());
    fails(&infer(text(own.path()), tokenizer, &[]), &[&says]);
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "short\n").unwrap();
    let serve = ["serve", "pi05_droid", "--api-key-file", text(&keys)];
    fails(&serve, &["line 1 of the key file", "16 to 1024"]);
}

/// The recorded request, with one value changed, as a client would send it.
fn observation(change: impl FnOnce(&mut Vec<(String, pirouette_policy::Value)>)) -> Vec<u8> {
    use pirouette_policy::Value;
    let config = pirouette_policy::config::named("pi05_droid").unwrap();
    let Value::Map(mut map) = pirouette_policy::sample_observation(&config, 0) else {
        panic!("an observation is a map")
    };
    change(&mut map);
    pirouette_server::msgpack::encode(&Value::Map(map)).unwrap()
}

#[test]
fn wrong_observations() {
    use pirouette_policy::{NdArray, Scalar, Value};
    let set = |key: &'static str, value: Value| {
        observation(move |map| match map.iter_mut().find(|(k, _)| k == key) {
            Some(entry) => entry.1 = value,
            None => map.push((key.into(), value)),
        })
    };
    let array = |dtype, shape: &[usize], data: Vec<u8>| {
        Value::Array(NdArray { dtype, shape: shape.to_vec(), data: data.into() })
    };
    let nan = f64::NAN.to_le_bytes().repeat(7);
    let joints = "observation/joint_position";
    let image = "observation/exterior_image_1_left";
    let cases: Vec<(Vec<u8>, Vec<&str>)> = vec![
        (set(joints, array(Scalar::F64, &[7], nan)), vec![joints, "NaN"]),
        (set(image, array(Scalar::U8, &[224, 224], vec![0; 224 * 224])), vec![image]),
        (set("prompt", Value::Int(3)), vec!["prompt"]),
        (observation(|map| map.retain(|(k, _)| k != joints)), vec!["KeyError", joints]),
        (b"\x93\x01\x02".to_vec(), vec!["wrong.msgpack"]),
    ];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wrong.msgpack");
    let (dir, tokenizer) = (checkpoint(), tokenizer());
    for (bytes, says) in cases {
        std::fs::write(&file, bytes).unwrap();
        let arguments = ["--observation", text(&file)];
        fails(&infer(text(&dir), text(&tokenizer), &arguments), &says);
    }
}

/// An observation "as a client sends it" may bring the optional keys: none is ignored.
#[test]
fn request_keys_of_an_observation_count_or_are_refused_by_name() {
    use pirouette_policy::{NdArray, Value};
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("obs.msgpack");
    let (dir, tokenizer) = (checkpoint(), tokenizer());
    let own = ["--observation", text(&file), "--json", "-"];
    let with = |keys: &[(&str, Value)]| {
        let bytes = observation(|map| {
            map.extend(keys.iter().map(|(key, value)| (key.to_string(), value.clone())));
        });
        std::fs::write(&file, bytes).unwrap();
    };
    let run = |flags: &[&str]| {
        let output = pirouette(&infer(text(&dir), text(&tokenizer), &[&own, flags].concat()));
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{errors}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        (answer["actions"].clone(), answer["seed"].clone(), errors)
    };
    let seed = |n| ("seed", Value::Int(n));
    with(&[]);
    let (three, ..) = run(&["--seed", "3"]);
    with(&[seed(3), ("explain", Value::Bool(false)), ("deadline_ms", Value::Nil)]);
    let (actions, told, _) = run(&[]);
    assert_eq!((&actions, told), (&three, 3.into()));
    let (actions, told, errors) = run(&["--seed", "4"]);
    assert_eq!((actions != three, told), (true, 4.into()));
    assert!(errors.contains("--seed 4 instead of the observation's seed 3"), "{errors}");

    let zeros = NdArray::from_f32(vec![15, 32], &[0.0; 15 * 32]).unwrap();
    let noise = ("noise", Value::Array(zeros));
    with(std::slice::from_ref(&noise));
    let (from_zeros, told, errors) = run(&[]);
    assert_eq!((from_zeros != three, told), (true, serde_json::Value::Null));
    assert!(errors.contains("the observation's noise"), "{errors}");
    let left = NdArray::from_f32(vec![10, 8], &[0.5; 80]).unwrap();
    with(&[noise, ("prev_chunk_left_over", Value::Array(left))]);
    assert_ne!(run(&[]).0, from_zeros, "drawn towards what is left of the last chunk");
    with(&[seed(3), ("num_steps", Value::Int(2))]);
    assert_ne!(run(&[]).0, three);

    let short = NdArray::from_f32(vec![1, 32], &[0.0; 32]).unwrap();
    for (key, value, says) in [
        ("seed", Value::Int(-1), "`seed` must be an integer"),
        ("num_steps", Value::Int(0), "1 to 1000 steps"),
        ("noise", Value::Array(short), "noise has shape [1, 32], the model takes [15, 32]"),
        ("deadline_ms", Value::Int(50), "what `deadline_ms` asks for"),
        ("explain", Value::Bool(true), "what `explain` asks for"),
        ("newest_wins", Value::Bool(true), "what `newest_wins` asks for"),
        ("session", Value::Str("arm".into()), "what `session` asks for"),
        ("return_model_actions", Value::Bool(true), "what `return_model_actions` asks for"),
        ("batch", Value::List(vec![]), "what `batch` asks for"),
    ] {
        with(&[(key, value)]);
        fails(&infer(text(&dir), text(&tokenizer), &own), &[says]);
    }
}

#[test]
fn empty_and_endless_prompts_are_served_as_openpi_does() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("obs.msgpack");
    let (dir, tokenizer) = (checkpoint(), tokenizer());
    for prompt in [String::new(), "pick up the cup and ".repeat(250)] {
        let is_long = !prompt.is_empty();
        let with_prompt = observation(|map| {
            map.retain(|(k, _)| k != "prompt");
            map.push(("prompt".into(), pirouette_policy::Value::Str(prompt)));
        });
        std::fs::write(&file, with_prompt).unwrap();
        let arguments = ["--observation", text(&file), "--seed", "1", "--json", "-"];
        let output = pirouette(&infer(text(&dir), text(&tokenizer), &arguments));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = answer["actions"].as_array().unwrap();
        assert_eq!((rows.len(), rows[0].as_array().unwrap().len()), (15, 8));
        assert_eq!(errors.contains("the prompt was cut at its end"), is_long, "{errors}");
    }
}

#[test]
fn a_taken_port_and_a_full_disk() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let (dir, tokenizer) = (checkpoint(), tokenizer());
    let common = ["--checkpoint", text(&dir), "--tokenizer", text(&tokenizer), "--device", "cpu"];
    let serve: Vec<&str> =
        ["serve", "pi05_droid"].into_iter().chain(common).chain(["--port", &port]).collect();
    fails(&serve, &[&port, "choose another --port"]);
    let exposed: Vec<&str> =
        ["serve", "pi05_droid"].into_iter().chain(common).chain(["--host", "0.0.0.0"]).collect();
    fails(&exposed, &["--api-key-file", "--insecure"]);
    if !Path::new("/dev/full").exists() {
        println!("skipped: no /dev/full here to stand for a full disk");
        return;
    }
    for flag in ["--json", "--out"] {
        let says = ["/dev/full", "No space left"];
        fails(&infer(text(&dir), text(&tokenizer), &[flag, "/dev/full"]), &says);
    }
    fails(&["plan", "pi0", "--json", "/no/such/folder/plan.json"], &["/no/such/folder/plan.json"]);
    fails(&["bench", "--device", "tpu"], &["use auto, cpu or cuda:N"]);
}

#[test]
fn load_says_what_is_wrong_with_the_address() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    for (url, says) in [
        (format!("ws://{address}"), format!("nothing answers at ws://{address}")),
        (address, "it must start with ws://".into()),
    ] {
        fails(&["load", &url], &[&says]);
        let told = pirouette(&["load", &url]).stderr;
        assert!(!String::from_utf8_lossy(&told).contains("--config"), "{url}");
    }
    assert_eq!(pirouette(&["load", "--requests", "0"]).status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn no_permission() {
    use std::os::unix::fs::PermissionsExt;
    let folder = edited(|_| {});
    let file = folder.path().join("model.safetensors");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::File::open(&file).is_ok() {
        println!("skipped: this user may read every file");
        return;
    }
    fails(&["inspect", text(folder.path())], &["Permission denied", "model.safetensors"]);
}

#[cfg(unix)]
#[test]
fn output_that_nobody_reads_is_no_fault() {
    // Shut down rather than closed: a process that is being started may hold a copy of it.
    let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    reader.shutdown(std::net::Shutdown::Both).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_pirouette"))
        .args(["plan", "pi0"])
        .stdout(std::os::fd::OwnedFd::from(writer))
        .stderr(std::process::Stdio::piped())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(141));
}
