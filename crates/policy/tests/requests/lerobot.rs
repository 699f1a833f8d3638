//! A LeRobot checkpoint's own processing, on a robot described in TOML.

use crate::tokenizer;
use pirouette_policy::config::from_toml;
use pirouette_policy::{NdArray, NormStats, Policy, Value};

const ROBOT: &str = "
    horizon = 2
    processing = 'lerobot'
    absolute = [1, -1]
    [robot]
    kind = 'generic'
    output_dims = 2
    prompt_key = 'task'
    cameras = [
        { key = 'observation.images.top' },
        { key = 'observation.images.wrist', required = false },
    ]
    state = [{ key = 'observation.state', dims = 2 }]
";

fn policy(head: &str) -> Policy {
    let config = from_toml(&format!("{head}\n{ROBOT}")).unwrap();
    let stats = NormStats::from_lerobot([
        ("observation.state.mean", vec![1.0, 2.0]),
        ("observation.state.std", vec![0.5, 0.0]),
        ("action.mean", vec![10.0, 20.0]),
        ("action.std", vec![2.0, 4.0]),
        ("observation.state.q01", vec![0.0, 0.0]),
        ("observation.state.q99", vec![4.0, 2.0]),
        ("action.q01", vec![-1.0, 5.0]),
        ("action.q99", vec![1.0, 5.0]),
    ])
    .unwrap();
    Policy::new(config, &stats, tokenizer(), 4).unwrap()
}

/// PyTorch would refuse most lengths; what it does not un-normalise would go to the robot.
#[test]
fn statistics_are_one_number_for_each_column() {
    let start = |state: usize, action: usize| {
        let config = from_toml(&format!("name = 'x'\nfamily = 'pi0'\n{ROBOT}")).unwrap();
        let stats = NormStats::from_lerobot([
            ("observation.state.mean", vec![0.0; state]),
            ("observation.state.std", vec![1.0; state]),
            ("action.mean", vec![0.0; action]),
            ("action.std", vec![1.0; action]),
        ]);
        let started = Policy::new(config, &stats.unwrap(), tokenizer(), 4);
        started.map(drop).map_err(|e| e.to_string())
    };
    assert_eq!(start(2, 2), Ok(()));
    for (state, action, says) in [
        (2, 1, "`actions` covers 1 numbers, this robot has 2"),
        (2, 3, "`actions` covers 3 numbers, this robot has 2"),
        (3, 2, "`state` covers 3 numbers, this robot has 2"),
        (1, 2, "one number for all, which must be written once for each"),
    ] {
        let error = start(state, action).unwrap_err();
        assert!(error.contains(says), "{error}\nlacks {says}");
    }
}

#[test]
fn a_relative_column_needs_a_number_of_the_state() {
    let read = |absolute: &str, dims: &str| {
        let robot = ROBOT.replace("[1, -1]", absolute).replace("dims = 2 }", dims);
        let text = format!("name = 'x'\nfamily = 'pi0'\n{robot}");
        from_toml(&text).map(drop).map_err(|e| e.to_string())
    };
    for (absolute, dims) in [("[2]", "dims = 2 }"), ("[1, -1]", "dims = 1 }"), ("[]", "}")] {
        assert_eq!(read(absolute, dims), Ok(()), "{absolute} {dims}");
    }
    let short = "`absolute` makes action column 1 relative to the state, which has 1 numbers";
    let unknown = "`absolute` makes actions relative to a state of unknown length";
    for (dims, says) in [("dims = 1 }", short), ("}", unknown)] {
        let error = read("[2]", dims).unwrap_err();
        assert!(error.contains(says), "{error}\nlacks {says}");
    }
}

/// LeRobot puts the cameras that are there first, whichever they are.
#[test]
fn any_one_camera_will_do_where_none_is_required() {
    let robot = ROBOT.replace("images.top' }", "images.top', required = false }");
    let config = from_toml(&format!("name = 'x'\nfamily = 'pi0'\n{robot}")).unwrap();
    let policy = Policy::new(config, &NormStats::default(), tokenizer(), 4).unwrap();
    let Value::Map(mut map) = observation(float_image(4, 0.5)) else { panic!("a map") };
    let both = policy.prepare(&Value::Map(map.clone())).unwrap().input;
    map[0].0 = "observation.images.wrist".into();
    assert_eq!(policy.prepare(&Value::Map(map.clone())).unwrap().input, both);
    map.remove(0);
    let error = policy.prepare(&Value::Map(map)).unwrap_err().wire_text();
    assert!(error.contains("with one of the images at least"), "{error}");
    assert!(
        error.ends_with(
            "ValueError: All image features are missing from the batch. At \
        least one expected."
        ),
        "{error}"
    );
}

fn observation(image: NdArray) -> Value {
    let state = NdArray::from_f32(vec![2], &[2.0, 1.0]).unwrap();
    Value::Map(vec![
        ("observation.images.top".into(), Value::Array(image)),
        ("observation.state".into(), Value::Array(state)),
        ("task".into(), Value::Str(" pick_up".into())),
    ])
}

fn float_image(size: usize, value: f32) -> NdArray {
    NdArray::from_f32(vec![3, size, size], &vec![value; 3 * size * size]).unwrap()
}

#[test]
fn pi0() {
    let policy = policy("name = 'x'\nfamily = 'pi0'");
    let prepared = policy.prepare(&observation(float_image(4, 0.5))).unwrap();
    // Rounded, where openpi would truncate to 127; an absent camera is left out.
    assert_eq!(prepared.input.images.len(), 1);
    assert!(prepared.input.images[0].iter().all(|&b| b == 128));
    let (bos, text) = (tokenizer().bos(), tokenizer().encode(" pick_up\n"));
    assert_eq!(prepared.input.tokens, [&[bos][..], &text].concat());
    assert_eq!(prepared.input.state[0], (2.0f32 - 1.0) / (0.5 + 1e-8));
    assert_eq!(prepared.input.state[1], (1.0f32 - 2.0) / 1e-8);
    // Statistics cover the two columns that remain; the inverse has no eps; the first column is
    // relative to the raw state.
    let mut actions = vec![0.0f32; 2 * 32];
    actions[..2].copy_from_slice(&[1.5, -0.5]);
    let out = policy.finish(&prepared, &actions).unwrap();
    assert_eq!(out.shape, [2, 2]);
    assert_eq!(out.to_f64().unwrap(), [15.0, 18.0, 12.0, 20.0]);
}

#[test]
fn pi05() {
    let policy = policy("name = 'x'\nfamily = 'pi05'");
    let prepared = policy.prepare(&observation(float_image(4, 1.0))).unwrap();
    let text = "Task: pick up, State: 128 128;\nAction: ";
    assert_eq!(prepared.input.tokens[1..], tokenizer().encode(text));
    assert_eq!(prepared.input.state[..3], [0.0, 0.0, 0.0]);
    let out = policy.finish(&prepared, &[0.0; 2 * 32]).unwrap().to_f64().unwrap();
    // Equal quantiles: the range is 1e-8.
    assert_eq!(out, [2.0, 5.0, 2.0, 5.0]);
}

#[test]
fn images_are_resized_without_a_filter() {
    let policy = policy("name = 'x'\nfamily = 'pi0'");
    // 8 × 8 to 4 × 4: torch reads the mean of each 2 × 2 block.
    let mut pixels = vec![0u8; 8 * 8 * 3];
    pixels[0] = 200;
    let image = NdArray::from_u8(vec![8, 8, 3], pixels).unwrap();
    let prepared = policy.prepare(&observation(image)).unwrap();
    assert_eq!(prepared.input.images[0][..4], [50, 0, 0, 0]);
    // Sixteen to four picks the two middle ones of four: a corner pixel is not seen at all.
    let mut pixels = vec![0u8; 16 * 16 * 3];
    pixels[0] = 255;
    let image = NdArray::from_u8(vec![16, 16, 3], pixels).unwrap();
    let prepared = policy.prepare(&observation(image)).unwrap();
    assert!(prepared.input.images[0].iter().all(|&b| b == 0));
}
