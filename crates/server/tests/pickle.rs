//! Pickles of LeRobot's own classes, and all those that must be refused.

use std::path::PathBuf;

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};
use pirouette_server::pickle::{
    Class, Instance, Limits, PickleError, TimedActions, read, write_actions,
};
use proptest::prelude::*;

fn fixture(name: &str) -> Bytes {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/lerobot_grpc");
    std::fs::read(folder.join(format!("{name}.pickle"))).expect(name).into()
}

fn decode(pickle: impl Into<Bytes>) -> Result<Instance, PickleError> {
    read(&pickle.into(), &Limits::default())
}

fn field<'a>(instance: &'a Instance, name: &str) -> &'a Value {
    &instance.fields.iter().find(|(key, _)| key == name).expect(name).1
}

/// The attribute of an object whose only attribute it is.
fn holding(value: &[u8]) -> Bytes {
    let head = b"\x80\x04\x8c\x07lerobot\x8c\x10TimedObservation\x93)\x81}\x8c\x01x";
    [&head[..], value, b"sb."].concat().into()
}

#[test]
fn observations_of_every_numpy_and_protocol() {
    for numpy in ["numpy1", "numpy2"] {
        for protocol in [4, 5] {
            let name = format!("observation.{numpy}.p{protocol}");
            let read = decode(fixture(&name)).expect(&name);
            assert_eq!(read.class, Class::TimedObservation);
            assert_eq!(read.module, "lerobot.async_inference.helpers");
            assert_eq!(field(&read, "timestep"), &Value::Int(7));
            assert_eq!(field(&read, "timestamp"), &Value::Float(1764000000.25 + 7.0 / 30.0));
            assert_eq!(field(&read, "must_go"), &Value::Bool(true));
            let observation = field(&read, "observation");
            assert_eq!(observation.get("shoulder_pan.pos"), Some(&Value::Float(-20.0)));
            assert_eq!(observation.get("gripper.pos"), Some(&Value::Float(32.5)));
            assert_eq!(observation.get("task"), Some(&text("put the cube into the box")));
            for (camera, shape) in [("front", [28, 28, 3]), ("wrist", [21, 28, 3])] {
                let n: usize = shape.iter().product();
                let pixels: Vec<u8> = (0..n).map(|i| ((i * 7 + 5) % 251) as u8).collect();
                let want = NdArray::from_u8(shape.to_vec(), pixels).unwrap();
                assert_eq!(observation.get(camera), Some(&Value::Array(want)), "{name} {camera}");
            }
        }
    }
}

fn text(text: &str) -> Value {
    Value::Str(text.into())
}

#[test]
fn setups_scalars_and_what_else_an_observation_may_hold() {
    for protocol in [4, 5] {
        let setup = decode(fixture(&format!("setup.p{protocol}"))).unwrap();
        assert_eq!(setup.class, Class::RemotePolicyConfig);
        assert_eq!(field(&setup, "policy_type"), &text("pi05"));
        assert_eq!(field(&setup, "actions_per_chunk"), &Value::Int(3));
        let features = field(&setup, "lerobot_features");
        let wrist = features.get("observation.images.wrist").unwrap();
        assert_eq!(wrist.get("dtype"), Some(&text("image")));
        // The keys are references to those of the first camera.
        assert_eq!(wrist.get("shape"), Some(&Value::List([21, 28, 3].map(Value::Int).to_vec())));
        let names = ["height", "width", "channels"].map(text).to_vec();
        assert_eq!(wrist.get("names"), Some(&Value::List(names)));

        let read = decode(fixture(&format!("observation.float32.p{protocol}"))).unwrap();
        let number = field(&read, "observation").get("shoulder_lift.pos").unwrap().clone();
        assert_eq!(number, Value::Scalar(Scalar::F32, Box::new(Value::Float(-9.5))));
        assert_eq!(field(&read, "timestep"), &Value::Int(70000));

        let misc = decode(fixture(&format!("misc.p{protocol}"))).unwrap();
        let misc = field(&misc, "observation");
        let numbers = |key: &str| match misc.get(key) {
            Some(Value::Array(array)) => (array.shape.clone(), array.to_f64().unwrap()),
            other => panic!("{key}: {other:?}"),
        };
        assert_eq!(numbers("float32"), (vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        assert_eq!(numbers("float64"), (vec![2], vec![0.5, -1.25]));
        let big = 2f64.powi(40);
        assert_eq!(numbers("int64"), (vec![2], vec![-big, big]));
        assert_eq!(numbers("bool"), (vec![2], vec![1.0, 0.0]));
        let (shape, view) = numbers("view");
        assert_eq!((shape, view[0], view[1]), (vec![14, 28, 3], 19.0, 12.0));
        assert_eq!(misc.get("none"), Some(&Value::Nil));
        assert_eq!(misc.get("bytes"), Some(&Value::Bytes(Bytes::from_static(b"\0\xff"))));
        assert_eq!(misc.get("negative"), Some(&Value::Int(-5)));
        let many = (0..300).map(Value::Int).collect();
        assert_eq!(misc.get("many"), Some(&Value::List(many)));
    }
}

#[test]
fn images_stay_in_the_frame_they_came_in() {
    let frame = fixture("observation.numpy2.p5");
    let read = decode(frame.clone()).unwrap();
    let Some(Value::Array(image)) = field(&read, "observation").get("front") else { panic!() };
    assert!(frame.as_ptr_range().contains(&image.data.as_ptr()));
}

#[test]
fn what_is_not_data_is_refused_by_name() {
    for (name, want) in [
        ("refused.call", "`posix.system`"),
        ("refused.path", "`pathlib.PurePosixPath`"),
        ("refused.int16", "element type `i2` is not read"),
        ("refused.fortran", "numpy.ascontiguousarray"),
        ("refused.big_endian", "not little-endian"),
    ] {
        for protocol in [4, 5] {
            let error = decode(fixture(&format!("{name}.p{protocol}"))).unwrap_err().to_string();
            assert!(error.contains(want), "{name}: {error}");
        }
    }
    for (module, name) in [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "frombuffer"),
        ("numpy._core.multiarray.x", "scalar"),
        ("lerobot.policies", "PI0Config"),
        ("lerobotics", "TimedObservation"),
        ("lerobot.x;y", "TimedObservation"),
        ("torch", "tensor"),
        ("_codecs", "encode"),
    ] {
        let mut global = vec![0x8c, module.len() as u8];
        global.extend(module.bytes());
        global.extend([0x8c, name.len() as u8]);
        global.extend(name.bytes());
        global.push(0x93);
        match decode(holding(&global)).unwrap_err() {
            PickleError::Global { module: m, name: n, .. } => {
                assert_eq!((&*m, &*n), (module, name))
            }
            other => panic!("{module}.{name}: {other}"),
        }
    }
}

#[test]
fn every_other_instruction_is_refused() {
    let read_here = b".(NKMJGXCB]})tsaue hjRb\x80\x81\x85\x86\x87\x88\x89\x8c\x8e\x93\x94\x95\x96";
    for opcode in 0..=255u8 {
        if read_here.contains(&opcode) && opcode != b' ' && opcode != 0x80 {
            continue;
        }
        match decode(holding(&[opcode, 0, 0])).unwrap_err() {
            PickleError::Opcode { opcode: found, .. } => assert_eq!(found, opcode),
            other => panic!("{opcode:#04x}: {other}"),
        }
    }
    for (start, found) in [(&b"\x80\x03N."[..], 3), (b"\x80\x06N.", 6), (b"cos\nsystem\n.", b'c')] {
        let error = decode(Bytes::from_static(start)).unwrap_err();
        assert_eq!(error, PickleError::Protocol { found });
    }
}

#[test]
fn damage_is_named() {
    let whole = fixture("observation.numpy2.p4");
    for end in 0..whole.len() {
        let error = decode(whole.slice(..end)).unwrap_err();
        assert_eq!(error, PickleError::Truncated { offset: end }, "{end}");
    }
    let more = [&whole[..], b"x"].concat();
    let (offset, extra) = (whole.len(), 1);
    assert_eq!(decode(more).unwrap_err(), PickleError::Trailing { offset, extra });
    let offset = holding(b"").len() - 3;
    for (value, want) in [
        (&b"h\x05"[..], PickleError::Memo { offset, index: 5 }),
        (b"j\xff\xff\xff\xff", PickleError::Memo { offset, index: u32::MAX as usize }),
        (b"\x8c\x02\xff\xfe", PickleError::Utf8 { offset }),
        (b"\x87", PickleError::Stack { offset: offset + 1, opcode: b's' }),
        (b"NNR", PickleError::Stack { offset: offset + 2, opcode: b'R' }),
        (b"NNb", PickleError::Stack { offset: offset + 2, opcode: b'b' }),
        (b"(NNNu", PickleError::Stack { offset: offset + 4, opcode: b'u' }),
        (b"u", PickleError::Stack { offset, opcode: b'u' }),
        (b"e", PickleError::Stack { offset, opcode: b'e' }),
    ] {
        let error = decode(holding(value)).unwrap_err();
        let same = std::mem::discriminant(&error) == std::mem::discriminant(&want);
        assert!(same, "{value:?}: {error} instead of {want}");
    }
    for (pickle, want) in [
        (&b"\x80\x04N."[..], "holds no TimedObservation"),
        (b"\x80\x04\x8c\x07lerobot\x8c\x10TimedObservation\x93.", "holds no TimedObservation"),
        (b"\x80\x04\x8c\x07lerobot\x8c\x10TimedObservation\x93)\x81.", "holds no TimedObs"),
    ] {
        let error = decode(Bytes::from_static(pickle)).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let class = decode(holding(b"\x8c\x05numpy\x8c\x05dtype\x93")).unwrap_err().to_string();
    assert!(class.contains("stands where data should"), "{class}");
    let key = decode(holding(b"}K\x01Ns")).unwrap_err().to_string();
    assert!(key.contains("is no text"), "{key}");
}

#[test]
fn claims_cost_nothing_and_bombs_are_bounded() {
    // Lengths far beyond the end.
    for claim in [
        &b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f"[..],
        b"\x96\xff\xff\xff\xff\xff\xff\xff\xff",
        b"B\xff\xff\xff\xff",
        b"X\xff\xff\xff\xff",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        let error = decode(holding(claim)).unwrap_err();
        assert!(matches!(error, PickleError::Truncated { .. }), "{error}");
    }
    let deep = |n: usize| holding(&[vec![b']'; n + 1], vec![b'a'; n]].concat());
    assert!(decode(deep(10)).is_ok());
    assert_eq!(decode(deep(30)).unwrap_err(), PickleError::Depth { limit: 16 });
    assert_eq!(decode(holding(&[b'('; 99])).unwrap_err(), PickleError::Depth { limit: 16 });
    // A list in itself.
    let own = decode(holding(b"]\x94h\x00a")).unwrap_err();
    assert_eq!(own, PickleError::Depth { limit: 16 });
    // Twelve lists, each eight times the one before: 8^12 values from 260 bytes.
    let mut laughs = b"(]\x94".to_vec();
    for i in 0..12u8 {
        laughs.extend(b"](");
        for _ in 0..8 {
            laughs.extend([b'h', i]);
        }
        laughs.extend(b"e\x94");
    }
    laughs.push(b't');
    let values = PickleError::TooMany { what: "values", limit: 1 << 16 };
    assert_eq!(decode(holding(&laughs)).unwrap_err(), values);
    assert_eq!(decode(holding(&[b'N'; 70_000])).unwrap_err(), values);
    let memo = PickleError::TooMany { what: "remembered values", limit: 1 << 16 };
    assert_eq!(decode(holding(&[&b"N"[..], &[0x94; 70_000]].concat())).unwrap_err(), memo);
    // A long text, many times.
    let mut texts = b"](X\0\0\x01\0".to_vec();
    texts.extend([b'x'; 1 << 16]);
    texts.push(0x94);
    for _ in 0..40 {
        texts.extend(b"h\0");
    }
    texts.push(b'e');
    let text = PickleError::TooMany { what: "bytes of text", limit: 1 << 20 };
    assert_eq!(decode(holding(&texts)).unwrap_err(), text);
    let mut keys = b"}(".to_vec();
    for i in 0..300u32 {
        keys.extend([&b"X\x04\0\0\0"[..], format!("{i:04}").as_bytes(), b"N"].concat());
    }
    keys.push(b'u');
    let error = decode(holding(&keys)).unwrap_err();
    assert_eq!(error, PickleError::TooMany { what: "keys of a dictionary", limit: 256 });
}

/// A call or a state of many parts costs their number each time it is used, five bytes.
#[test]
fn calls_and_states_of_more_parts_than_anything_has_are_refused() {
    let dtype = b"\x8c\x05numpy\x8c\x05dtype\x93";
    let many = |first: &[u8], n: usize| [b"(", first, &b"N".repeat(n - 1), b"t"].concat();
    let called = |n: usize| holding(&[&b"]("[..], dtype, &many(b"\x8c\x02f8", n), b"Re"].concat());
    let filled = |n: usize| {
        let state = many(b"K\x03\x8c\x01<", n - 1);
        holding(&[&b"]("[..], dtype, b"\x8c\x02f8\x85R", &state, b"be"].concat())
    };
    for pickle in [called(3), filled(8), filled(9)] {
        // Element types are no data; they were read.
        assert!(matches!(decode(pickle), Err(PickleError::Content(_))));
    }
    for pickle in [called(32_768), called(10), filled(32_768), filled(10)] {
        let error = decode(pickle).unwrap_err();
        assert!(matches!(error, PickleError::Numpy { .. }), "{error}");
        assert!(error.to_string().contains("as NumPy 1 and 2 do"), "{error}");
    }
}

#[test]
fn shapes_that_do_not_add_up() {
    let from_buffer = |shape: &[u8]| {
        let dtype = b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f8\x85R";
        let head = b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93(C\x08\0\0\0\0\0\0\0\0";
        holding(&[&head[..], dtype, shape, b"\x8c\x01CtR"].concat())
    };
    assert!(decode(from_buffer(b"K\x01\x85")).is_ok());
    for (shape, want) in [
        (&b"K\x02\x85"[..], "8 bytes do not fill shape [2]"),
        (b"J\xff\xff\xff\xff\x85", "not made of whole numbers"),
        (b"N\x85", "not made of whole numbers"),
        (b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7fJ\xff\xff\xff\x7ft", "do not fill"),
        (b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t", "9 axes"),
        (b"N", "as NumPy 1 and 2 do"),
    ] {
        let error = decode(from_buffer(shape)).unwrap_err();
        assert!(matches!(error, PickleError::Numpy { .. }), "{error}");
        assert!(error.to_string().contains(want), "{error}");
    }
}

#[test]
fn actions_are_written_as_python_writes_them_but_for_names_first() {
    let module = "lerobot.async_inference.helpers";
    let chunk = TimedActions {
        module,
        actions: &[1.0, 2.0],
        dims: 1,
        timestamp: 10.0,
        timestep: 3,
        period: 0.5,
    };
    let pickle = write_actions(&chunk);
    let text = |t: &str| [&b"X"[..], &(t.len() as u32).to_le_bytes(), t.as_bytes()].concat();
    let float = |x: f64| [&b"G"[..], &x.to_be_bytes()].concat();
    let action = |when: f64, step: u8, value: f64| {
        [
            &b"h\0)\x81}(h\x02"[..],
            &float(when),
            &[b'h', 3, 0x8a, 8, step, 0, 0, 0, 0, 0, 0, 0],
            b"h\x04h\x01](",
            &float(value),
            b"e\x85Rub",
        ]
        .concat()
    };
    let want = [
        &b"\x80\x04"[..],
        &[text(module), text("TimedAction"), b"\x93\x940".to_vec()].concat(),
        &[text("torch"), text("tensor"), b"\x93\x940".to_vec()].concat(),
        &["timestamp", "timestep", "action"].map(|t| [&text(t)[..], b"\x940"].concat()).concat(),
        b"](",
        &action(10.0, 3, 1.0),
        &action(10.5, 4, 2.0),
        b"e.",
    ]
    .concat();
    assert_eq!(pickle, want);
    // What is written is code to its reader, and so is not read here.
    assert!(matches!(decode(pickle).unwrap_err(), PickleError::Global { .. }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever happens to a pickle, it is read or refused, and the result stays within bounds.
    #[test]
    fn mutated_pickles_never_panic(
        which in 0..4usize,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
    ) {
        let names = ["setup.p4", "misc.p5", "observation.float32.p4", "observation.numpy1.p5"];
        let mut bytes = fixture(names[which]).to_vec();
        for (at, byte, kind) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes[at] ^= 1 << (byte % 8),
                2 => bytes.insert(at, byte),
                _ => { bytes.splice(at..at, b"](h\0h\x01h\x02e\x94".iter().copied()); }
            }
        }
        if let Ok(instance) = decode(bytes) {
            let values: usize = instance.fields.iter().map(|(_, value)| count(value)).sum();
            prop_assert!(values < Limits::default().values);
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode([b"\x80\x04", &bytes[..]].concat());
        let _ = decode(bytes);
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::List(items) => items.iter().map(count).sum(),
        Value::Map(map) => map.iter().map(|(_, value)| count(value)).sum(),
        _ => 0,
    }
}
