//! The table of errors: every wrong request with its last traceback line.

use crate::{changed, policy, policy_of};
use pirouette_policy::config::named;
use pirouette_policy::norm::FeatureStats;
use pirouette_policy::{NdArray, NormStats, Policy, Scalar, Value, sample_observation};

fn zeros(shape: &[usize]) -> Option<Value> {
    let count = shape.iter().product();
    NdArray::from_f64(shape.to_vec(), &vec![0.0; count]).map(Value::Array)
}

fn number(x: f64, count: usize) -> Option<Value> {
    NdArray::from_f64(vec![count], &vec![x; count]).map(Value::Array)
}

fn typed(dtype: Scalar, shape: &[usize]) -> Option<Value> {
    let count: usize = shape.iter().product();
    let data = vec![0; count * dtype.item_bytes()].into();
    Some(Value::Array(NdArray { dtype, shape: shape.to_vec(), data }))
}

fn text(s: &str) -> Option<Value> {
    Some(Value::Str(s.into()))
}

/// What is changed in a good request, to what, and the last line that answers it.
type Row = (&'static str, Option<Value>, &'static str);

fn check(name: &str, table: Vec<Row>) {
    let policy = policy(name);
    for (path, value, line) in table {
        let error = policy.prepare(&changed(&policy, path, value)).unwrap_err();
        let wire = error.wire_text();
        let last = wire.lines().last().unwrap();
        assert!(last.starts_with(line), "{name} {path}: {last}");
        assert!(!error.remedy().is_empty() && error.to_string().contains(error.remedy()));
    }
}

#[test]
fn alohas_observation() {
    let shapes = "ValueError: operands could not be broadcast together with shapes";
    let seven = format!("{shapes} (14,) (7,)");
    let square = format!("{shapes} (14,) (2,7)");
    let cameras = "ValueError: Expected images to contain ('cam_high', 'cam_low', \
        'cam_left_wrist', 'cam_right_wrist'), got ('cam_high', 'cam_left_wrist', \
        'cam_right_wrist', 'cam_x')";
    let rows_first = "TypeError: Cannot handle this data type: (1, 1, 48), |u1";
    let no_items = "AttributeError: 'ndarray' object has no attribute 'items'";
    check(
        "pi0_aloha",
        vec![
            ("state", None, "KeyError: 'state'"),
            ("images", None, "KeyError: 'images'"),
            ("images|cam_high", None, "KeyError: 'cam_high'"),
            ("images|cam_x", zeros(&[3, 4, 4]), cameras),
            ("images", zeros(&[3]), no_items),
            ("images|cam_high", typed(Scalar::U8, &[48, 64, 3]), rows_first),
            ("state", zeros(&[7]), seven.leak()),
            ("state", zeros(&[2, 7]), square.leak()),
            ("state", number(f64::NAN, 14), "ValueError: 'state' contains NaN at index 0"),
            ("state", text("x"), "TypeError: 'state' is no array of numbers but str"),
        ],
    );
}

#[test]
fn prompts() {
    let attribute = |kind: &str, name: &str| {
        format!("AttributeError: '{kind}' object has no attribute '{name}'").leak() as &str
    };
    let size = "ValueError: can only convert an array of size 1 to a Python scalar";
    check(
        "pi0_aloha",
        vec![
            ("prompt", None, "ValueError: Prompt is required"),
            ("prompt", Some(Value::Nil), "ValueError: Prompt is required"),
            ("prompt", Some(Value::Int(3)), attribute("int", "item")),
            ("prompt", Some(Value::List(vec![])), attribute("list", "item")),
            ("prompt", Some(Value::Bytes(b"x"[..].into())), attribute("bytes", "item")),
            ("prompt", zeros(&[]), attribute("float", "strip")),
            ("prompt", zeros(&[2]), size),
        ],
    );
    let utf8 = "ValueError: 'prompt' is no UTF-8: invalid utf-8 sequence of 1 bytes from index 0";
    check("pi05_droid", vec![("prompt", Some(Value::Bytes(vec![0xff].into())), utf8)]);
}

#[test]
fn droids_observation() {
    let gripper = "observation/gripper_position";
    let joints = "observation/joint_position";
    let exterior = "observation/exterior_image_1_left";
    let nine = "ValueError: operands could not be broadcast together with shapes (9,) (8,)";
    let batch = "ValueError: 'observation/joint_position' has shape (1, 7)";
    let inf = "ValueError: 'observation/gripper_position' contains inf at index 0";
    check(
        "pi05_droid",
        vec![
            (gripper, None, "KeyError: 'observation/gripper_position'"),
            (joints, None, "KeyError: 'observation/joint_position'"),
            (exterior, None, "KeyError: 'observation/exterior_image_1_left'"),
            ("observation/wrist_image_left", None, "KeyError: 'observation/wrist_image_left'"),
            (joints, zeros(&[1, 7]), batch),
            (joints, zeros(&[8]), nine),
            (joints, zeros(&[6]), "ValueError: the state has 7 numbers"),
            (gripper, number(f64::INFINITY, 1), inf),
        ],
    );
}

#[test]
fn liberos_observation() {
    let image = "observation/image";
    let state = "observation/state";
    let data_type = "TypeError: Cannot handle this data type:";
    let ints = format!("{data_type} (1, 1, 3), <i8").leak();
    let alpha = format!("{data_type} (1, 1, 4), |u1").leak();
    let u8_image = |shape: &[usize]| typed(Scalar::U8, shape);
    let batch = "ValueError: 'observation/image' has shape (1, 8, 8, 3)";
    let nothing = "ValueError: height and width must be > 0";
    check(
        "pi0_libero",
        vec![
            (image, None, "KeyError: 'observation/image'"),
            ("observation/wrist_image", None, "KeyError: 'observation/wrist_image'"),
            (state, None, "KeyError: 'observation/state'"),
            (image, typed(Scalar::I64, &[8, 8, 3]), ints),
            (image, u8_image(&[8, 8, 4]), alpha),
            (image, u8_image(&[1, 8, 8, 3]), batch),
            (image, u8_image(&[8, 0, 3]), nothing),
            (image, u8_image(&[1, 500, 3]), nothing),
            (image, text("x"), "TypeError: 'observation/image' is no image array but str"),
            (state, number(1e300, 8), "ValueError: state number 0 is 9.99999000001"),
        ],
    );
}

#[test]
fn what_is_missing_is_told_in_openpis_order_with_the_schema() {
    for (name, keys) in [
        ("pi0_aloha", &["state", "images"][..]),
        (
            "pi0_droid",
            &[
                "observation/gripper_position",
                "observation/joint_position",
                "observation/exterior_image_1_left",
                "observation/wrist_image_left",
            ],
        ),
        ("pi0_libero", &["observation/image", "observation/wrist_image", "observation/state"]),
    ] {
        let policy = policy(name);
        let Value::Map(full) = sample_observation(policy.config(), 1) else { panic!() };
        let mut entries = Vec::new();
        for key in keys {
            let error = policy.prepare(&Value::Map(entries.clone())).unwrap_err();
            assert_eq!(error.message(), format!("'{key}'"));
            assert!(error.wire_text().contains("observation is {"), "{error}");
            entries.push(full.iter().find(|(known, _)| known == key).unwrap().clone());
        }
        let error = policy.prepare(&Value::Map(entries)).unwrap_err();
        assert_eq!(error.message(), "Prompt is required");
    }
    let error = policy("pi0_droid").prepare(&Value::List(vec![])).unwrap_err();
    assert_eq!(error.exception(), "TypeError");
}

#[test]
fn request_before_configuration() {
    let towel = policy("pi0_aloha_towel");
    let without = changed(&towel, "prompt", None);
    let with = changed(&towel, "prompt", text("uncap the pen"));
    let tokens = |policy: &Policy, observation| policy.prepare(observation).unwrap().input.tokens;
    let encode = |s: &str| {
        let t = crate::tokenizer();
        [&[t.bos()][..], &t.encode(s), &t.encode("\n")].concat()
    };
    assert_eq!(tokens(&towel, &without), encode("fold the towel"));
    assert_eq!(tokens(&towel, &with), encode("uncap the pen"));
    let points: Vec<u8> = "pick up".chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
    let array = NdArray { dtype: Scalar::Unicode(7), shape: vec![], data: points.into() };
    let numpy = changed(&towel, "prompt", Some(Value::Array(array)));
    assert_eq!(tokens(&towel, &numpy), encode("pick up"));
    let droid = policy("pi0_droid");
    let bytes = changed(&droid, "prompt", Some(Value::Bytes(b"pick up"[..].into())));
    assert_eq!(tokens(&droid, &bytes), encode("pick up"));
    assert_eq!(tokens(&droid, &changed(&droid, "prompt", text(""))), encode(""));
    let long = changed(&droid, "prompt", Some(Value::Str("x".repeat(1 << 17))));
    assert_eq!(droid.prepare(&long).unwrap_err().exception(), "ValueError");
}

#[test]
fn lists_and_scalars_are_numbers_too() {
    let droid = policy("pi0_droid");
    let key = "observation/joint_position";
    let list = Value::List((0..7).map(|i| Value::Float(f64::from(i) / 8.0)).collect());
    let array: Vec<f64> = (0..7).map(|i| f64::from(i) / 8.0).collect();
    let array = Value::Array(NdArray::from_f64(vec![7], &array).unwrap());
    let prepare = |value| droid.prepare(&changed(&droid, key, Some(value))).unwrap();
    assert_eq!(prepare(list), prepare(array));
    let key = "observation/gripper_position";
    for value in [
        Value::Int(1),
        Value::Float(1.0),
        Value::Scalar(Scalar::F32, Box::new(Value::Float(1.0))),
        zeros(&[]).unwrap(),
    ] {
        droid.prepare(&changed(&droid, key, Some(value))).unwrap();
    }
}

#[test]
fn unknown_keys_are_ignored() {
    let libero = policy("pi05_libero");
    let plain = libero.prepare(&sample_observation(libero.config(), 1)).unwrap();
    assert_eq!(plain.input.state.len(), 32);
    let more = changed(&libero, "seed", Some(Value::Int(7)));
    assert_eq!(libero.prepare(&more).unwrap(), plain);
}

#[test]
fn nan_never_leaves_and_chunks_must_fit() {
    let droid = policy("pi0_droid");
    let prepared = droid.prepare(&sample_observation(droid.config(), 1)).unwrap();
    let mut actions = vec![0.5f32; 10 * 32];
    let out = droid.finish(&prepared, &actions).unwrap();
    assert_eq!((out.dtype, out.shape), (Scalar::F64, vec![10, 8]));
    // A column that no robot receives does not matter; one that it receives does.
    actions[32 + 20] = f32::NAN;
    assert!(droid.finish(&prepared, &actions).is_ok());
    actions[2 * 32 + 3] = f32::INFINITY;
    let error = droid.finish(&prepared, &actions).unwrap_err();
    assert_eq!(error.message(), "action column 3 of step 2 is inf");
    assert!(droid.finish(&prepared, &actions[1..]).is_err());
}

#[test]
fn aloha_adds_the_decoded_state_before_the_output_flips() {
    let aloha = policy("pi0_aloha");
    let state: Vec<f64> = (0..14).map(|i| 0.1 + f64::from(i) / 20.0).collect();
    let state_value = NdArray::from_f64(vec![14], &state).map(Value::Array);
    let prepared = aloha.prepare(&changed(&aloha, "state", state_value)).unwrap();
    let out = aloha.finish(&prepared, &[0.0; 50 * 32]).unwrap().to_f64().unwrap();
    // Zero differences give the robot's own joints back; the grippers are not relative.
    for joint in [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12] {
        assert!((out[joint] - state[joint]).abs() < 1e-12, "joint {joint}");
    }
    assert_eq!(out[6], out[13]);
    assert!((out[6] - 0.5533778345878898).abs() < 1e-6);
}

#[test]
fn statistics_may_be_shorter_or_padded() {
    // Padded statistics of an old checkpoint: the robot's own length is fine.
    let droid = policy_of(named("pi0_droid").unwrap(), 32);
    assert!(droid.prepare(&sample_observation(droid.config(), 1)).is_ok());
    // Another arm behind DROID's or LIBERO's keys: its own statistics say so, as in openpi.
    let six = policy_of(named("pi0_droid").unwrap(), 7);
    let observation = changed(&six, "observation/joint_position", zeros(&[6]));
    assert!(six.prepare(&observation).is_ok());
    assert!(six.prepare(&sample_observation(six.config(), 1)).is_err());
    let seven = policy_of(named("pi0_libero").unwrap(), 7);
    let observation = changed(&seven, "observation/state", zeros(&[7]));
    assert!(seven.prepare(&observation).is_ok());
    assert!(seven.prepare(&sample_observation(seven.config(), 1)).is_err());
}

fn z_score_of(len: usize, std: f64) -> FeatureStats {
    let mut stats = FeatureStats::default();
    stats.set("mean", vec![0.0; len]);
    stats.set("std", vec![std; len]);
    stats
}

#[test]
fn what_the_statistics_leave_out_is_told_and_shown() {
    let start = |name: &str, stats: &NormStats| {
        Policy::new(named(name).unwrap(), stats, crate::tokenizer(), 224).unwrap()
    };
    let mut stats = NormStats::default();
    stats.set("actions", z_score_of(6, 1.0));
    let droid = start("pi0_droid", &stats);
    let [state, actions] = &droid.warnings()[..] else { panic!("{:?}", droid.warnings()) };
    assert!(state.contains("no `state`") && state.contains("z_score"), "{state}");
    assert!(actions.contains("cover 6 of the robot's 8 columns"), "{actions}");
    let line = "asset droid: state identity, actions z_score over 6; actions absolute";
    assert_eq!(droid.contract().lines()[1], line);
    stats.set("actions", z_score_of(32, 1.0));
    stats.set("state", z_score_of(7, 1.0));
    let libero = start("pi0_libero", &stats);
    let [state] = &libero.warnings()[..] else { panic!("{:?}", libero.warnings()) };
    assert!(state.contains("cover 7 numbers, libero's state has 8"), "{state}");
    let zeros = zeros(&[7]);
    assert!(libero.prepare(&changed(&libero, "observation/state", zeros)).is_ok());
    assert!(policy("pi0_droid").warnings().is_empty());
}

#[test]
fn a_state_of_any_length_is_as_long_as_its_statistics() {
    let robot = |state: &str| {
        let text = format!(
            "name = \"arm\"\nfamily = \"pi0\"\nhorizon = 10\nnorm = \"z_score\"\n\
             asset_id = \"arm\"\n[robot]\nkind = \"generic\"\noutput_dims = 7\n\
             [[robot.cameras]]\nkey = \"image\"\nlayout = \"hwc\"\n{state}"
        );
        pirouette_policy::config::from_toml(&text).unwrap()
    };
    let key = |name: &str, dims: &str| format!("[[robot.state]]\nkey = \"{name}\"\n{dims}\n");
    let start = |state: &str, stats: &NormStats| {
        Policy::new(robot(state), stats, crate::tokenizer(), 56).unwrap()
    };
    let mut stats = NormStats::default();
    stats.set("state", z_score_of(6, 1.0));
    let shapes = |policy: &Policy| {
        let fields = policy.contract().observation.into_iter();
        let shape = fields.skip(1).filter_map(|field| field.shape.into_iter().next());
        shape.collect::<Vec<String>>()
    };
    for (state, want) in [(key("q", ""), "6"), (key("hand", "dims = 2") + &key("q", ""), "4")] {
        let policy = start(&state, &stats);
        let card = policy.contract();
        assert_eq!(shapes(&policy).last().map(String::as_str), Some(want));
        let line = format!("takes q float64 [{want}]: ");
        assert!(card.lines().iter().any(|l| l.starts_with(&line)), "{:?}", card.lines());
        assert!(card.samples.python.contains(&format!("\"q\": np.zeros(({want},), ")));
        assert!(policy.prepare(&card.sample(1)).is_ok());
    }
    // Nothing says how long it is: any is accepted.
    let free = start(&key("q", ""), &NormStats::default());
    assert_eq!(shapes(&free), ["n"]);
    assert!(free.prepare(&free.contract().sample(1)).is_ok());
    assert!(free.contract().samples.python.contains("\"q\": np.zeros((1,), "));
    // Two such keys may share the numbers as they like.
    assert_eq!(shapes(&start(&(key("a", "") + &key("b", "")), &stats)), ["n", "n"]);
}

/// π0 has a column for each number of a state; π0.5 reads all of them as text, openpi's too.
#[test]
fn a_state_may_be_longer_than_the_actions_where_it_is_text() {
    let robot = |family: &str, norm: &str, dims: &str| {
        let text = format!(
            "name = \"wide\"\nfamily = \"{family}\"\nhorizon = 10\nnorm = \"{norm}\"\n\
             asset_id = \"wide\"\n[robot]\nkind = \"generic\"\noutput_dims = 7\n\
             [[robot.cameras]]\nkey = \"image\"\nslot = \"base_0_rgb\"\nlayout = \"hwc\"\n\
             [[robot.state]]\nkey = \"state\"\n{dims}\n"
        );
        pirouette_policy::config::from_toml(&text).unwrap()
    };
    let mut stats = NormStats::default();
    let mut quantiles = FeatureStats::default();
    quantiles.set("q01", vec![-1.0; 40]);
    quantiles.set("q99", vec![1.0; 40]);
    stats.set("state", quantiles);
    let wide = robot("pi05", "quantile", "dims = 40");
    let policy = Policy::new(wide, &stats, crate::tokenizer(), 56).unwrap();
    let sample = sample_observation(policy.config(), 1);
    let long = policy.prepare(&sample).unwrap();
    assert_eq!(long.input.state.len(), 32, "the model's columns");
    // The last number is in the prompt.
    let mut last = vec![0.25; 40];
    let with = |state: &[f64]| {
        let state = NdArray::from_f64(vec![40], state).unwrap();
        policy.prepare(&changed(&policy, "state", Some(Value::Array(state)))).unwrap().input.tokens
    };
    let before = with(&last);
    last[39] = -0.75;
    assert_ne!(with(&last), before);

    let mut stats = NormStats::default();
    stats.set("state", z_score_of(40, 1.0));
    // Where the description does not say how long it is, the statistics or a request do.
    let any = |norm: &str| robot("pi0", norm, "");
    let error = Policy::new(any("z_score"), &stats, crate::tokenizer(), 56).unwrap_err();
    assert!(error.to_string().contains("covers 40 dimensions"), "{error}");
    let plain = Policy::new(any("identity"), &NormStats::default(), crate::tokenizer(), 56);
    let error = plain.unwrap().prepare(&sample).unwrap_err().to_string();
    assert!(error.contains("40 numbers, the model reads 32"), "{error}");
}

#[test]
fn statistics_that_can_not_work_stop_the_start() {
    let start = |name: &str, stats: &NormStats| {
        Policy::new(named(name).unwrap(), stats, crate::tokenizer(), 224).unwrap_err().to_string()
    };
    let z_score = z_score_of(40, 1.0);
    let mut stats = NormStats::default();
    stats.set("actions", z_score.clone());
    assert!(start("pi0_droid", &stats).contains("40 dimensions"));
    let mut short = NormStats::default();
    short.set("state", z_score_of(7, 1.0));
    let error = start("pi0_aloha_towel", &short);
    assert!(error.contains("covers 7 numbers, this robot's state has 14"), "{error}");
    for (feature, name) in [("state", "mean"), ("actions", "std")] {
        let mut broken = z_score_of(8, 1.0);
        broken.set(name, [&[0.0; 7][..], &[f64::NAN]].concat());
        let mut stats = NormStats::default();
        stats.set(feature, broken);
        let want = format!("`{feature}.{name}` is NaN at index 7");
        assert!(start("pi0_droid", &stats).contains(&want));
        // LIBERO has one action column less.
        let libero = Policy::new(named("pi0_libero").unwrap(), &stats, crate::tokenizer(), 224);
        assert_eq!(libero.is_ok(), feature == "actions");
    }
    assert!(start("pi05_droid", &stats).contains("q01"));
    stats.set("reward", z_score);
    assert!(start("pi0_droid", &stats).starts_with("Selector key reward not found in tree"));
    let empty = NormStats::default();
    assert!(Policy::new(named("pi05_droid").unwrap(), &empty, crate::tokenizer(), 0).is_err());
}
