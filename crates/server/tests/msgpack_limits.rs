//! Hostile bytes: bounds, arithmetic, and that nothing ever panics.

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};
use pirouette_server::msgpack::{DecodeError, Limits, decode, decode_with, encode};
use proptest::prelude::*;

/// An array as it travels, with anything for its three fields.
fn tagged(data: &[u8], dtype: &str, shape: &[u8]) -> Bytes {
    let mut out = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc5".to_vec();
    out.extend((data.len() as u16).to_be_bytes());
    out.extend(data);
    out.extend(b"\xc4\x05dtype");
    out.push(0xa0 | dtype.len() as u8);
    out.extend(dtype.as_bytes());
    out.extend(b"\xc4\x05shape");
    out.extend(shape);
    out.into()
}

#[test]
fn dtypes_byte_orders_and_key_orders() {
    let table: [(&str, &[u8], Scalar, &[u8]); 12] = [
        ("|u1", &[7], Scalar::U8, &[7]),
        ("u1", &[7], Scalar::U8, &[7]),
        (">u1", &[7], Scalar::U8, &[7]),
        ("<i2", &[1, 2], Scalar::I16, &[1, 2]),
        ("=i2", &[1, 2], Scalar::I16, &[1, 2]),
        (">i2", &[1, 2], Scalar::I16, &[2, 1]),
        (">f8", &[1, 2, 3, 4, 5, 6, 7, 8], Scalar::F64, &[8, 7, 6, 5, 4, 3, 2, 1]),
        ("<f2", &[1, 2], Scalar::F16, &[1, 2]),
        ("|b1", &[1], Scalar::Bool, &[1]),
        ("|S3", &[1, 2, 3], Scalar::Bytes(3), &[1, 2, 3]),
        ("<U1", &[65, 0, 0, 0], Scalar::Unicode(1), &[65, 0, 0, 0]),
        (">U1", &[0, 0, 0, 65], Scalar::Unicode(1), &[65, 0, 0, 0]),
    ];
    for (dtype, data, want, bytes) in table {
        let value = decode(&tagged(data, dtype, b"\x91\x01")).expect(dtype);
        let array = NdArray { dtype: want, shape: vec![1], data: bytes.to_vec().into() };
        assert_eq!(value, Value::Array(array), "{dtype}");
    }
    // Any order of keys, any width of integers, and a key nobody knows.
    let mut shuffled = b"\x85\xc4\x05shape\x91\xcf\0\0\0\0\0\0\0\x02\xc4\x05extra\xc0".to_vec();
    shuffled.extend(b"\xc4\x05dtype\xa3|u1\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x02\x05\x06");
    let array = NdArray { dtype: Scalar::U8, shape: vec![2], data: vec![5, 6].into() };
    assert_eq!(decode(&shuffled.into()).unwrap(), Value::Array(array));
    // Tags as ordinary text keys are an ordinary map.
    let text = b"\x81\xab__ndarray__\xc3";
    let map = Value::Map(vec![("__ndarray__".into(), Value::Bool(true))]);
    assert_eq!(decode(&Bytes::from_static(text)).unwrap(), map);
}

#[test]
fn arrays_that_do_not_add_up() {
    let huge = b"\x92\xcf\x80\0\0\0\0\0\0\0\x02"; // 2^63 × 2 wraps to 0
    let zero_but_huge = b"\x93\0\xcf\x40\0\0\0\0\0\0\0\x04";
    let table: [(&[u8], &str, &[u8], &str); 15] = [
        (&[1], "<f4", b"\x91\x01", "does not fit"),
        (&[1; 8], "<f4", b"\x91\x01", "does not fit"),
        (&[], "<f4", b"\x90", "does not fit"),
        (&[], "|u1", huge, "does not fit"),
        (&[], "|u1", zero_but_huge, "does not fit"),
        (&[1], "|u1", b"\x91\xff", "integers from 0 on"),
        (&[1], "|u1", b"\x91\xa1x", "integers from 0 on"),
        (&[1], "|u1", b"\x01", "list of integers"),
        (&[1; 16], "<c16", b"\x91\x01", "`<c16` is not supported"),
        (&[1; 8], "|O8", b"\x91\x01", "`|O8` is not supported"),
        (&[1], "|u3", b"\x91\x01", "`|u3` is not supported"),
        (&[], "<U0", b"\x91\x01", "`<U0` is not supported"),
        (&[], "", b"\x91\x01", "is not supported"),
        (&[], "<U9999999999", b"\x90", "is not supported"),
        (&[], "<U999999999", b"\x90", "does not fit"),
    ];
    for (data, dtype, shape, want) in table {
        let error = decode(&tagged(data, dtype, shape)).expect_err(dtype);
        assert!(matches!(error, DecodeError::Numpy { .. }), "{dtype}: {error}");
        assert!(error.to_string().contains(want), "{dtype}: {error}");
    }
    let mut deep_shape = vec![0xdc, 0, 33];
    deep_shape.extend([1; 33]);
    let error = decode(&tagged(&[1], "|u1", &deep_shape)).unwrap_err();
    assert!(error.to_string().contains("33 dimensions"), "{error}");
}

#[test]
fn arrays_that_are_wrong_are_named_by_the_nearest_key() {
    let array = tagged(&[1], "<f4", b"\x91\x01");
    for (before, want) in [
        (&b""[..], "the NumPy value at offset 0: shape [1]"),
        (b"\x81\xa5state", "the NumPy value of `state` at offset 7: shape [1]"),
        (b"\x81\xa6images\x81\xa4left", "the NumPy value of `left` at offset 14"),
        (b"\x81\xa6images\x92\xc0", "the NumPy value of `images` at offset 10"),
        (b"\x81\xc4\x04\xffkey", "the NumPy value of `\\u{fffd}key` at offset 7"),
        (b"\x81\xa3a\nb", "the NumPy value of `a\\nb` at offset 5"),
    ] {
        let error = decode(&[before, &array].concat().into()).unwrap_err().to_string();
        assert!(error.starts_with(want), "{error}");
    }
    let mut long = b"\x81\xda\x01\x00".to_vec();
    long.extend([b'x'; 256]);
    long.extend(&array[..]);
    let error = decode(&long.into()).unwrap_err().to_string();
    assert!(error.contains(&format!(" of `{}` at", "x".repeat(80))), "{error}");
}

#[test]
fn other_keys_of_bytes_are_ignored() {
    for (bytes, want) in [
        (&b"\x81\xc4\x01x\xc0"[..], &[][..]),
        (b"\x83\xc4\x01x\x01\xa1y\x02\xc4\x01z\x93\x01\x02\x03", &[("y", Value::Int(2))]),
        (b"\x82\xa1y\x02\xc4\x04data\xc4\x00", &[("y", Value::Int(2))]),
    ] {
        let want = want.iter().map(|(key, value)| (key.to_string(), value.clone())).collect();
        assert_eq!(decode(&Bytes::from_static(bytes)), Ok(Value::Map(want)), "{bytes:x?}");
    }
}

#[test]
fn scalars_must_be_of_their_type() {
    let scalar = |data: &[u8], dtype: &str| {
        let mut out = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data".to_vec();
        out.extend(data);
        out.extend(b"\xc4\x05dtype");
        out.push(0xa0 | dtype.len() as u8);
        out.extend(dtype.as_bytes());
        decode(&out.into())
    };
    let good = |dtype, value| Ok(Value::Scalar(dtype, Box::new(value)));
    assert_eq!(scalar(b"\xcc\xff", "|u1"), good(Scalar::U8, Value::Int(255)));
    assert_eq!(scalar(b"\x01", "<f4"), good(Scalar::F32, Value::Float(1.0)));
    assert_eq!(scalar(b"\xa1x", "<U1"), good(Scalar::Unicode(1), Value::Str("x".into())));
    for (data, dtype) in [
        (&b"\xcd\x01\x00"[..], "|u1"),
        (b"\xff", "<u4"),
        (b"\xcb\0\0\0\0\0\0\0\0", "<i4"),
        (b"\x01", "|b1"),
        (b"\xc0", "<f4"),
        (b"\x01", "<U1"),
        (b"\xa1x", "|S1"),
    ] {
        assert!(matches!(scalar(data, dtype), Err(DecodeError::Numpy { .. })), "{dtype}");
    }
}

#[test]
fn claimed_lengths_cost_nothing_and_limits_hold() {
    type Check = fn(&DecodeError) -> bool;
    let table: [(&[u8], Check); 8] = [
        (b"\xdd\xff\xff\xff\xff", |e| matches!(e, DecodeError::Truncated { .. })),
        (b"\xdf\xff\xff\xff\xff", |e| matches!(e, DecodeError::TooMany { .. })),
        (b"\xc6\xff\xff\xff\xff", |e| matches!(e, DecodeError::Truncated { .. })),
        (b"\xdb\xff\xff\xff\xff", |e| matches!(e, DecodeError::Truncated { .. })),
        (b"\xde\x01\x01", |e| matches!(e, DecodeError::TooMany { limit: 256, .. })),
        (b"\x81\x81\xc0\xc0\xc0", |e| matches!(e, DecodeError::Key { found: "dict", .. })),
        (b"\x81\x90\xc0", |e| matches!(e, DecodeError::Key { found: "list", .. })),
        (b"\xc7\x00\x01", |e| matches!(e, DecodeError::Format { byte: 0xc7, .. })),
    ];
    for (bytes, right) in table {
        let error = decode(&Bytes::from_static(bytes)).unwrap_err();
        assert!(right(&error), "{bytes:x?}: {error:?}");
    }
    let nested = |depth: usize| {
        let mut out = vec![0x91; depth];
        out.push(0xc0);
        decode(&out.into())
    };
    assert!(nested(16).is_ok());
    assert!(matches!(nested(17), Err(DecodeError::Depth { limit: 16, .. })));
    // Nesting through map keys is no way around it.
    assert!(decode(&vec![0x81; 1 << 20].into()).is_err());
    let mut wide = vec![0xdd, 0, 4, 0, 0];
    wide.extend(vec![0xc0; 1 << 18]);
    let error = decode(&wide.into()).unwrap_err();
    assert!(matches!(error, DecodeError::TooMany { what: "values", .. }), "{error}");
    let few = Limits { values: 3, ..Limits::default() };
    assert!(decode_with(&Bytes::from_static(b"\x92\x01\x02"), &few).is_ok());
    assert!(decode_with(&Bytes::from_static(b"\x93\x01\x02\x03"), &few).is_err());
}

#[test]
fn the_last_of_equal_keys_wins_at_the_first_ones_place() {
    let value = decode(&Bytes::from_static(b"\x83\xa1a\x01\xa1b\x02\xa1a\x03")).unwrap();
    let want = [("a".to_string(), Value::Int(3)), ("b".to_string(), Value::Int(2))];
    assert_eq!(value, Value::Map(want.to_vec()));
}

fn values() -> impl Strategy<Value = Value> {
    let array = (0..3usize, 0..4usize, any::<u8>()).prop_map(|(rows, cols, fill)| {
        let (shape, data) = (vec![rows, cols], vec![fill; rows * cols * 4].into());
        Value::Array(NdArray { dtype: Scalar::F32, shape, data })
    });
    let leaf = prop_oneof![
        Just(Value::Nil),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(|n| Value::Int(n.into())),
        any::<u64>().prop_map(|n| Value::Int(n.into())),
        any::<i32>().prop_map(|n| Value::Float(n.into())),
        ".{0,40}".prop_map(Value::Str),
        proptest::collection::vec(any::<u8>(), 0..300).prop_map(|b| Value::Bytes(b.into())),
        any::<i16>().prop_map(|n| Value::Scalar(Scalar::I16, Box::new(Value::Int(n.into())))),
        array,
    ];
    leaf.prop_recursive(4, 64, 8, |inner| {
        let entries = proptest::collection::btree_map("[a-z/]{0,8}", inner.clone(), 0..20);
        prop_oneof![
            proptest::collection::vec(inner, 0..20).prop_map(Value::List),
            entries.prop_map(|m| Value::Map(m.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_encoded_decodes_to_itself(value in values()) {
        let bytes = Bytes::from(encode(&value).unwrap());
        prop_assert_eq!(decode(&bytes).unwrap(), value);
        for cut in 0..bytes.len().min(200) {
            prop_assert!(decode(&bytes.slice(..cut)).is_err(), "a prefix is no message");
        }
    }

    #[test]
    fn mutated_messages_never_panic(
        value in values(),
        mutations in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = encode(&value).unwrap();
        for (at, byte) in mutations {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(value) = decode(&bytes.into()) {
            // Whatever passes is whole: it can be encoded, and means the same again.
            let again = encode(&value).unwrap();
            prop_assert_eq!(encode(&decode(&again.clone().into()).unwrap()).unwrap(), again);
        }
    }

    #[test]
    fn noise_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = decode(&bytes.into());
    }
}
