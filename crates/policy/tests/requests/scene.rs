//! vla-eval's observations in each robot's own keys, and what RoboArena is told.

use crate::{policy, policy_of};
use pirouette_policy::config::{from_toml, named};
use pirouette_policy::{NdArray, Value};

fn scene(images: &[(&str, Value)], state: &[f64]) -> Value {
    let state = NdArray::from_f64(vec![state.len()], state).unwrap();
    states(images, &[("states", Value::Array(state))])
}

fn states(images: &[(&str, Value)], states: &[(&str, Value)]) -> Value {
    let map = |entries: &[(&str, Value)]| -> Vec<(String, Value)> {
        entries.iter().map(|(k, v)| (k.to_string(), v.clone())).collect()
    };
    let mut scene = map(&[("task_description", Value::Str("stack the cups".into()))]);
    scene.push(("images".into(), Value::Map(map(images))));
    scene.extend(map(states));
    Value::Map(scene)
}

/// Height 2, width 4, each pixel its own colour.
fn image(first: u8) -> Value {
    Value::Array(NdArray::from_u8(vec![2, 4, 3], (first..first + 24).collect::<Vec<_>>()).unwrap())
}

#[test]
fn libero_takes_images_in_order_and_droid_divides_the_state() {
    let seen =
        scene(&[("agentview", image(0)), ("wrist", image(100)), ("more", image(7))], &[0.5; 8]);
    let own = policy("pi05_libero").observation_of(seen.clone()).unwrap();
    assert_eq!(own.get("observation/image"), Some(&image(0)));
    assert_eq!(own.get("observation/wrist_image"), Some(&image(100)));
    assert_eq!(own.get("prompt"), Some(&Value::Str("stack the cups".into())));
    assert!(policy("pi05_libero").prepare(&own).is_ok());
    let droid = policy("pi05_droid");
    let own = droid.observation_of(seen).unwrap();
    let numbers = |key: &str| own.get(key).unwrap().to_array().unwrap().to_f64().unwrap();
    assert_eq!(numbers("observation/joint_position").len(), 7);
    assert_eq!(numbers("observation/gripper_position"), [0.5]);
    assert!(droid.prepare(&own).is_ok());
    let short = droid.observation_of(scene(&[("a", image(0))], &[0.5; 3])).unwrap_err();
    assert_eq!(short.message(), "'state' has shape (3,)");
}

#[test]
fn aloha_finds_cameras_by_name_and_gets_channels_first() {
    let aloha = policy("pi0_aloha");
    let images = [("cam_left_wrist", image(50)), ("cam_high", image(0)), ("x", image(9))];
    let own = aloha.observation_of(scene(&images, &[0.1; 14])).unwrap();
    let cameras = own.get("images").unwrap();
    let Some(Value::Array(high)) = cameras.get("cam_high") else { panic!("an array") };
    assert_eq!((high.shape.clone(), &high.data[..3]), (vec![3, 2, 4], &[0, 3, 6][..]));
    let Some(Value::Array(left)) = cameras.get("cam_left_wrist") else { panic!("an array") };
    assert_eq!(left.data[0], 50);
    assert!(aloha.prepare(&own).is_ok());
}

/// First bytes of what ALOHA's cameras see of images that are told apart by their first byte.
fn seen_by_aloha(names: &[&str]) -> Vec<(String, u8)> {
    let images: Vec<(&str, Value)> =
        names.iter().enumerate().map(|(i, name)| (*name, image(10 * i as u8))).collect();
    let own = policy("pi0_aloha").observation_of(scene(&images, &[0.1; 14])).unwrap();
    let Some(Value::Map(cameras)) = own.get("images") else { panic!("cameras") };
    let first = |image: &Value| match image {
        Value::Array(array) => array.data[0],
        other => panic!("{other:?}"),
    };
    cameras.iter().map(|(key, image)| (key.clone(), first(image))).collect()
}

#[test]
fn no_camera_takes_what_another_is_named_by() {
    let is = |key: &str, first| (key.to_string(), first);
    assert_eq!(
        seen_by_aloha(&["cam_left_wrist", "cam_right_wrist", "cam_head"]),
        [is("cam_high", 20), is("cam_left_wrist", 0), is("cam_right_wrist", 10)]
    );
    let without_left = [is("cam_high", 0), is("cam_right_wrist", 10)];
    assert_eq!(seen_by_aloha(&["cam_high", "cam_right_wrist"]), without_left);
    // Nor is one taken twice.
    let in_order = [is("cam_high", 10), is("cam_left_wrist", 0), is("cam_right_wrist", 20)];
    assert_eq!(seen_by_aloha(&["cam_left_wrist", "front", "side"]), in_order);
}

#[test]
fn what_a_scene_lacks_is_named() {
    let libero = policy("pi05_libero");
    let error = libero.observation_of(Value::Map(vec![])).unwrap_err();
    assert_eq!((error.exception(), error.message()), ("KeyError", "'images'".into()));
    let flat = Value::Map(vec![("images".into(), image(0))]);
    assert!(libero.observation_of(flat).unwrap_err().message().contains("must be a dict"));
    let said = |name: &str, scene: Value| policy(name).prepare_scene(scene).unwrap_err().message();
    let one_camera = scene(&[("agentview", image(0)), ("wrist", Value::Nil)], &[0.5; 8]);
    assert_eq!(
        said("pi05_libero", one_camera),
        "camera 'observation/wrist_image' is missing: `images` holds ['agentview']"
    );
    let none = "camera 'cam_high' is missing: `images` holds []";
    assert_eq!(said("pi0_aloha", scene(&[], &[0.1; 14])), none);
    let two = [("a", image(0)), ("b", image(1))];
    for name in ["pi05_libero", "pi05_droid", "pi0_aloha"] {
        let told = said(name, states(&two, &[("states", Value::Nil)]));
        assert_eq!(told, "the state is missing: send its numbers as `states` or `state`");
    }
    let long = "x".repeat(1000);
    assert!(said("pi05_libero", scene(&[(long.as_str(), image(0))], &[0.5; 8])).len() < 200);
}

#[test]
fn nil_counts_as_absent_in_a_scene() {
    let state = NdArray::from_f64(vec![8], &[0.5; 8]).unwrap();
    let either = [("states", Value::Nil), ("state", Value::Array(state))];
    let two = [("none", Value::Nil), ("a", image(0)), ("b", image(100))];
    let own = policy("pi05_libero").observation_of(states(&two, &either)).unwrap();
    assert_eq!(own.get("observation/state").unwrap().to_array().unwrap().shape, [8]);
    assert_eq!(own.get("observation/wrist_image"), Some(&image(100)));
}

#[test]
fn a_robot_of_ones_own_is_filled_part_by_part() {
    let text =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/so101.toml"));
    let config = from_toml(&text.unwrap()).unwrap();
    let dims = config.robot.state_dims().unwrap();
    let own = policy_of(config, dims);
    let observation =
        own.observation_of(scene(&[("front", image(0)), ("b", image(1))], &vec![0.5; dims]));
    assert!(own.prepare(&observation.unwrap()).is_ok());
}

#[test]
fn roboarena_is_told_cameras_and_actions_of_droids_robot() {
    let told = |name: &str| policy(name).roboarena();
    let config = told("pi05_droid").unwrap();
    let Value::Map(entries) = &config else { panic!("a map") };
    let keys: Vec<&str> = entries.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "image_resolution",
            "needs_wrist_camera",
            "n_external_cameras",
            "needs_stereo_camera",
            "needs_session_id",
            "action_space"
        ]
    );
    assert_eq!(config.get("action_space"), Some(&Value::Str("joint_velocity".into())));
    assert_eq!(config.get("image_resolution"), Some(&Value::List(vec![Value::Int(56); 2])));
    let jointpos = told("pi05_droid_jointpos_polaris").unwrap();
    assert_eq!(jointpos.get("action_space"), Some(&Value::Str("joint_position".into())));
    assert!(told("pi0_aloha").is_none() && named("pi0_aloha").is_ok());
}
