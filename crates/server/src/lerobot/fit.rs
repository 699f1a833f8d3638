//! A LeRobot robot's motors, cameras and task ↔ the keys of the policy that is served.
//!
//! LeRobot knows an observation twice: raw, by motor and camera name, and as a policy's features
//! (`observation.state`, `observation.images.NAME`). A policy of a LeRobot checkpoint has the
//! latter for keys. A TOML file may use them too, or a camera's bare name.

use pirouette_policy::image::{Layout, stretch};
use pirouette_policy::robots::{self, Robot, StateKey};
use pirouette_policy::{NdArray, PolicyConfig, Scalar, Value};

use super::setup::{Features, text};
use super::wire::Status;
use crate::seldom::Seldom;

/// Prefix of a camera's feature.
const IMAGES: &str = "observation.images.";

/// Where the policy's inputs come from.
#[derive(Debug, Default)]
pub(super) struct Fit {
    vectors: Vec<Vector>,
    cameras: Vec<Camera>,
    prompt_key: String,
}

#[derive(Debug)]
struct Vector {
    /// The policy's.
    key: String,
    /// Names of its numbers in the raw observation.
    motors: Vec<String>,
}

#[derive(Debug)]
struct Camera {
    /// The policy's.
    key: String,
    /// In the raw observation.
    name: String,
    /// Height and width LeRobot's server would stretch its images to.
    size: Option<(usize, usize)>,
}

impl Fit {
    /// Finds a source for each of the policy's inputs.
    ///
    /// # Errors
    /// An input that has none, or a camera or a vector that the policy does not know.
    pub(super) fn new(features: &Features, config: &PolicyConfig) -> Result<Fit, Status> {
        let Robot::Generic(robot) = &config.robot else {
            let text = format!(
                "{} takes the keys of {}'s robot, which LeRobot's do not fit: serve a LeRobot \
                 checkpoint, or describe the robot by a TOML file with LeRobot's keys",
                config.name,
                config.robot.name()
            );
            return Err(Status::precondition(text));
        };
        Ok(Fit {
            vectors: robot
                .state
                .iter()
                .map(|part| vector(features, part))
                .collect::<Result<_, _>>()?,
            cameras: cameras(features, &robot.cameras)?,
            prompt_key: robot.prompt_key.clone(),
        })
    }

    /// A raw observation under the policy's keys, and its state.
    ///
    /// # Errors
    /// What is missing, or no number or image.
    pub(super) fn observation(&self, raw: &Value) -> Result<(Value, Vec<f32>), Status> {
        let get = |name: &str| {
            let missing = || Status::invalid(format!("the observation has no `{}`", text(name)));
            raw.get(name).ok_or_else(missing)
        };
        let (mut map, mut state) = (Vec::new(), Vec::new());
        for vector in &self.vectors {
            let numbers: Result<Vec<f32>, Status> =
                vector.motors.iter().map(|motor| number(get(motor)?, motor)).collect();
            let numbers = numbers?;
            state.extend_from_slice(&numbers);
            let array = NdArray::from_f32(vec![numbers.len()], &numbers);
            map.extend(array.map(|array| (vector.key.clone(), Value::Array(array))));
        }
        for camera in &self.cameras {
            let image = get(&camera.name)?;
            match image {
                Value::Array(NdArray { dtype: Scalar::U8, shape, .. })
                    if shape.len() == 3 && shape[2] == 3 && !shape.contains(&0) =>
                {
                    map.push((camera.key.clone(), image.clone()));
                }
                other => {
                    let found = match other {
                        Value::Array(a) => format!("{} {:?}", a.dtype.type_string(), a.shape),
                        other => other.python_type().into(),
                    };
                    let text = format!(
                        "camera `{}` must be uint8 [height, width, 3], it is {found}",
                        camera.name
                    );
                    return Err(Status::invalid(text));
                }
            }
        }
        if let Some(task) = raw.get("task") {
            map.push((self.prompt_key.clone(), task.clone()));
        }
        Ok((Value::Map(map), state))
    }

    /// Whether an image has another size than the one it is stretched to first.
    pub(super) fn must_stretch(&self, observation: &Value) -> bool {
        self.stretched(observation).next().is_some()
    }

    /// LeRobot's server stretches images to the size that the policy was trained with, before the
    /// policy's own resize that keeps their proportions. Takes milliseconds.
    pub(super) fn stretch(&self, mut observation: Value) -> Value {
        let images: Vec<(String, Value)> = self
            .stretched(&observation)
            .filter_map(|(key, image, (height, width))| {
                let from = (image.shape[0], image.shape[1]);
                let pixels = stretch(&image.data, from, (height, width))?;
                let array = NdArray::from_u8(vec![height, width, 3], pixels)?;
                Some((key.to_owned(), Value::Array(array)))
            })
            .collect();
        if let Value::Map(map) = &mut observation {
            for (key, image) in images {
                map.iter_mut().filter(|(k, _)| *k == key).for_each(|(_, v)| *v = image.clone());
            }
        }
        observation
    }

    fn stretched<'a>(
        &'a self,
        observation: &'a Value,
    ) -> impl Iterator<Item = (&'a str, &'a NdArray, (usize, usize))> {
        self.cameras.iter().filter_map(|camera| {
            match (observation.get(&camera.key)?, camera.size) {
                (Value::Array(image), Some((height, width)))
                    if image.shape[..] != [height, width, 3] =>
                {
                    Some((&*camera.key, image, (height, width)))
                }
                _ => None,
            }
        })
    }
}

impl Features {
    /// Whether a feature is what the policy calls `key`.
    fn is(&self, feature: &str, key: &str) -> bool {
        let renamed = self.renames.iter().any(|(from, to)| from == feature && to == key);
        feature == key || renamed || feature.strip_prefix(IMAGES) == Some(key)
    }
}

fn vector(features: &Features, part: &StateKey) -> Result<Vector, Status> {
    let key = &part.key;
    let found = features.vectors.iter().find(|(feature, _)| features.is(feature, key));
    let Some((_, motors)) = found else {
        let text = format!("the policy reads `{key}`, which the robot does not have");
        return Err(Status::invalid(text + &known(features)));
    };
    match part.dims {
        Some(dims) if dims != motors.len() => {
            let has = motors.len();
            let text = format!("the policy's `{key}` is {dims} numbers, the robot's {has}");
            Err(Status::invalid(text + &known(features)))
        }
        _ => Ok(Vector { key: key.clone(), motors: motors.clone() }),
    }
}

fn cameras(features: &Features, wanted: &[robots::Camera]) -> Result<Vec<Camera>, Status> {
    let (mut out, mut masked) = (Vec::new(), Vec::new());
    for camera in wanted {
        let key = &camera.key;
        let found = features.cameras.iter().find(|feature| features.is(feature, key));
        match found.and_then(|feature| feature.strip_prefix(IMAGES)) {
            Some(_) if camera.layout == Layout::Chw => {
                let text = format!(
                    "the policy wants camera `{key}` with its channels first, LeRobot sends them \
                     last: set its layout to \"auto\""
                );
                return Err(Status::precondition(text));
            }
            Some(name) => {
                out.push(Camera { key: key.clone(), name: name.into(), size: camera.size });
            }
            None if camera.required => {
                let text = format!("the policy needs camera `{key}`");
                return Err(Status::invalid(text + &known(features)));
            }
            None => masked.push(&**key),
        }
    }
    for feature in &features.cameras {
        if !wanted.iter().any(|camera| features.is(feature, &camera.key)) {
            let keys: Vec<&str> = wanted.iter().map(|camera| &*camera.key).collect();
            let text = format!(
                "the policy has no camera `{}`, it has {}: name the robot's cameras as in \
                 training, or leave this one out",
                text(feature),
                keys.join(", ")
            );
            return Err(Status::invalid(text));
        }
    }
    if out.is_empty() {
        let text = format!("the policy needs one of its cameras at least: {}", masked.join(", "));
        return Err(Status::invalid(text + &known(features)));
    }
    static LINE: Seldom = Seldom::new();
    if !masked.is_empty()
        && let Some(unsaid) = LINE.pass()
    {
        tracing::info!(unsaid, "a LeRobot robot lacks cameras, they are masked: {masked:?}");
    }
    Ok(out)
}

fn number(value: &Value, motor: &str) -> Result<f32, Status> {
    let numbers = value.to_array().and_then(|array| array.to_f64());
    match numbers.as_deref() {
        Some([number]) => Ok(*number as f32),
        _ => {
            let (motor, found) = (text(motor), value.python_type());
            Err(Status::invalid(format!("`{motor}` must be a number, it is a {found}")))
        }
    }
}

/// What the robot has, for messages.
fn known(features: &Features) -> String {
    let vectors = features.vectors.iter().map(|(key, motors)| format!("{key} [{}]", motors.len()));
    let all: Vec<String> = vectors.chain(features.cameras.iter().cloned()).collect();
    let mut all = text(&all.join(", "));
    if all.is_empty() {
        all = "nothing".into();
    }
    format!(" (it has {all})")
}

#[cfg(test)]
mod tests;
