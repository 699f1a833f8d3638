//! Robots that fit a policy, and all the ways in which they do not.

use pirouette_policy::config::{from_toml, named};
use pirouette_policy::robots::Robot;

use super::super::setup;
use super::*;
use crate::lerobot::wire::Code;
use crate::pickle::{Class, Instance};

const POLICY: &str = "
    name = 'arm'
    family = 'pi05'
    horizon = 50
    processing = 'lerobot'
    [robot]
    kind = 'generic'
    output_dims = 2
    prompt_key = 'task'
    cameras = [{ key = 'observation.images.front' }, { key = 'wrist', required = false }]
    state = [{ key = 'observation.state', dims = 2 }]
";

fn policy() -> PolicyConfig {
    from_toml(POLICY).unwrap()
}

fn texts(names: &[&str]) -> Value {
    Value::List(names.iter().map(|name| Value::Str((*name).into())).collect())
}

fn feature(dtype: &str, axes: usize, names: &[&str]) -> Value {
    let shape = Value::List(vec![Value::Int(1); axes]);
    let dtype = Value::Str(dtype.into());
    Value::Map(vec![
        ("dtype".into(), dtype),
        ("shape".into(), shape),
        ("names".into(), texts(names)),
    ])
}

fn image() -> Value {
    feature("image", 3, &["height", "width", "channels"])
}

fn state(names: &[&str]) -> (String, Value) {
    ("observation.state".into(), feature("float32", 1, names))
}

fn camera(name: &str) -> (String, Value) {
    (format!("observation.images.{name}"), image())
}

fn wanted(kind: &str, features: Vec<(String, Value)>, renames: Vec<(String, Value)>) -> Instance {
    let fields = [
        ("policy_type", Value::Str(kind.into())),
        ("pretrained_name_or_path", Value::Str("somebody/something".into())),
        ("lerobot_features", Value::Map(features)),
        ("actions_per_chunk", Value::Int(20)),
        ("device", Value::Str("mps".into())),
        ("rename_map", Value::Map(renames)),
    ];
    let fields = fields.map(|(key, value)| (key.to_string(), value)).into();
    Instance { module: "lerobot".into(), class: Class::RemotePolicyConfig, fields }
}

fn fit(features: Vec<(String, Value)>) -> Result<setup::Setup, Status> {
    setup::read(&wanted("pi05", features, vec![]), &policy())
}

fn raw() -> Value {
    let frame = NdArray::from_u8(vec![2, 2, 3], (0..12).collect::<Vec<u8>>()).unwrap();
    Value::Map(vec![
        ("b".into(), Value::Float(2.5)),
        ("a".into(), Value::Scalar(Scalar::F32, Box::new(Value::Float(-1.0)))),
        ("front".into(), Value::Array(frame)),
        ("task".into(), Value::Str("lift".into())),
    ])
}

#[test]
fn motors_come_in_the_features_order_and_cameras_by_either_name() {
    let setup = fit(vec![state(&["a", "b"]), camera("front"), camera("wrist")]).unwrap();
    assert_eq!(setup.actions_per_chunk, 20);
    let missing = setup.fit.observation(&raw()).unwrap_err();
    assert_eq!(missing.message, "the observation has no `wrist`");

    let setup = fit(vec![camera("front"), state(&["a", "b"])]).unwrap();
    let (observation, state) = setup.fit.observation(&raw()).unwrap();
    assert_eq!(state, [-1.0, 2.5]);
    let vector = NdArray::from_f32(vec![2], &[-1.0, 2.5]).unwrap();
    assert_eq!(observation.get("observation.state"), Some(&Value::Array(vector)));
    assert_eq!(observation.get("observation.images.front"), raw().get("front"));
    assert_eq!(observation.get("task"), Some(&Value::Str("lift".into())));
    assert!(!setup.fit.must_stretch(&observation));
}

#[test]
fn a_rename_map_leads_to_the_policys_keys() {
    let features = vec![state(&["a", "b"]), camera("top")];
    let renames = ("observation.images.top", "observation.images.front");
    let renames = vec![(renames.0.into(), Value::Str(renames.1.into()))];
    let setup = setup::read(&wanted("pi05", features, renames), &policy()).unwrap();
    assert!(setup.fit.observation(&raw()).unwrap_err().message.contains("`top`"));
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    for (features, want) in [
        (vec![camera("front")], "reads `observation.state`, which the robot does not have"),
        (vec![state(&["a"]), camera("front")], "is 2 numbers, the robot's 1"),
        (vec![state(&["a", "b"])], "needs camera `observation.images.front`"),
        (
            vec![state(&["a", "b"]), camera("front"), camera("side")],
            "no camera `observation.images.side`, it has observation.images.front, wrist",
        ),
        (vec![("observation.x".into(), Value::Nil)], "has no `dtype`"),
    ] {
        let status = fit(features).unwrap_err();
        assert!(status.message.contains(want), "{}", status.message);
        assert_eq!(status.code, Code::InvalidArgument);
    }
    let mut any = policy();
    let Robot::Generic(robot) = &mut any.robot else { panic!("generic") };
    robot.cameras[0].required = false;
    let read = |features| setup::read(&wanted("pi05", features, vec![]), &any);
    assert!(read(vec![state(&["a", "b"]), camera("wrist")]).is_ok());
    let told = read(vec![state(&["a", "b"])]).unwrap_err().message;
    assert!(
        told.contains("one of its cameras at least: observation.images.front, wrist"),
        "{told}"
    );
    let good = || vec![state(&["a", "b"]), camera("front")];
    for kind in ["pi0", "act", "é\n"] {
        let status = setup::read(&wanted(kind, good(), vec![]), &policy()).unwrap_err();
        assert!(status.message.contains("of type pi05, not"), "{}", status.message);
    }
    let openpi = named("pi05_droid").unwrap();
    let status = setup::read(&wanted("pi05", good(), vec![]), &openpi).unwrap_err();
    assert_eq!(status.code, Code::FailedPrecondition);
    assert!(status.message.contains("droid's robot"), "{}", status.message);
    let mut none = wanted("pi05", good(), vec![]);
    none.fields[3].1 = Value::Int(0);
    assert!(setup::read(&none, &policy()).unwrap_err().message.contains("`actions_per_chunk`"));
    none.fields.remove(0);
    assert!(setup::read(&none, &policy()).unwrap_err().message.contains("has no `policy_type`"));
    none.class = Class::TimedObservation;
    assert!(setup::read(&none, &policy()).unwrap_err().message.contains("was expected"));
}

#[test]
fn what_is_no_number_or_no_image_is_named() {
    let setup = fit(vec![camera("front"), state(&["a", "b"])]).unwrap();
    let with = |key: &str, value: Value| {
        let Value::Map(mut map) = raw() else { panic!("a map") };
        map.retain(|(k, _)| k != key);
        map.push((key.into(), value));
        setup.fit.observation(&Value::Map(map)).unwrap_err().message
    };
    assert_eq!(with("a", Value::Str("x".into())), "`a` must be a number, it is a str");
    let two = Value::Array(NdArray::from_f64(vec![2], &[1.0, 2.0]).unwrap());
    assert_eq!(with("a", two.clone()), "`a` must be a number, it is a ndarray");
    assert!(with("front", two).ends_with("it is <f8 [2]"));
    assert!(with("front", Value::Nil).ends_with("it is NoneType"));
    let gray = NdArray::from_u8(vec![2, 2, 1], vec![0; 4]).unwrap();
    assert!(with("front", Value::Array(gray)).ends_with("it is |u1 [2, 2, 1]"));
}

#[test]
fn images_of_another_size_than_in_training_are_stretched() {
    let mut policy = policy();
    let Robot::Generic(robot) = &mut policy.robot else { panic!("generic") };
    robot.cameras[0].size = Some((1, 2));
    let features = vec![camera("front"), state(&["a", "b"])];
    let setup = setup::read(&wanted("pi05", features, vec![]), &policy).unwrap();
    let (observation, _) = setup.fit.observation(&raw()).unwrap();
    assert!(setup.fit.must_stretch(&observation));
    let stretched = setup.fit.stretch(observation);
    let want = NdArray::from_u8(vec![1, 2, 3], vec![3, 4, 5, 6, 7, 8]).unwrap();
    assert_eq!(stretched.get("observation.images.front"), Some(&Value::Array(want)));
    assert!(!setup.fit.must_stretch(&stretched));
}

#[test]
fn robots_that_are_set_up_again_and_again_do_not_fill_the_log() {
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    // Without the wrist's camera.
    let robot = wanted("pi05", vec![state(&["a", "b"]), camera("front")], vec![]);
    let begun = std::time::Instant::now();
    tracing::subscriber::with_default(log, || {
        for _ in 0..500 {
            setup::read(&robot, &policy()).unwrap();
        }
    });
    let lines = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let most = 2 * (2 + begun.elapsed().as_secs() as usize);
    assert!(lines.lines().count() <= most, "{lines}");
}
