//! Observations and metadata of evaluation harnesses ↔ a robot's own keys.
//!
//! vla-eval's benchmarks send `images` (a map, the main camera first), `task_description`, and the
//! state as `states` or `state`. RoboArena's evaluators ask which cameras a policy wants and which
//! actions it gives.

use crate::array::element_count;
use crate::error::{PolicyError, python_repr, wrong_shape};
use crate::image::Layout;
use crate::policy::{Policy, Prepared};
use crate::robots::Robot;
use crate::value::{NdArray, Scalar, Value};

const SCHEMA: &str = "a vla-eval observation is {'images': {camera: image, the main one first}, \
    'task_description': str, 'states' or 'state': numbers}";

/// Most names of images in a message, and most characters of each.
const MAX_NAMES: usize = 16;
const MAX_NAME: usize = 64;

/// DROID's state: joints first, then the gripper.
const JOINTS: usize = 7;

impl Policy {
    /// [`Policy::prepare`] of a vla-eval observation; what it lacks is told in the words of such
    /// an observation, whose sender never heard of the robot's keys.
    ///
    /// # Errors
    /// Those of [`Policy::observation_of`] and [`Policy::prepare`].
    pub fn prepare_scene(&self, scene: Value) -> Result<Prepared, PolicyError> {
        let names = shown_names(scene.get("images"));
        let own = self.observation_of(scene)?;
        self.prepare(&own).map_err(|error| {
            let PolicyError::Key { key, .. } = &error else { return error };
            let robot = &self.config().robot;
            if robot.camera_keys().iter().any(|(camera, _)| camera == key) {
                let camera = python_repr(key);
                let message = format!("camera {camera} is missing: `images` holds [{names}]");
                return PolicyError::value(message, SCHEMA);
            }
            if robot.state_parts().iter().any(|(part, _)| part == key) {
                let message = "the state is missing: send its numbers as `states` or `state`";
                return PolicyError::value(message, SCHEMA);
            }
            error
        })
    }

    /// A vla-eval observation in this policy's own keys. A camera of the robot takes the image of
    /// its name, or else the first that bears no camera's name and that no other camera took;
    /// further images are left out. nil counts as absent.
    ///
    /// # Errors
    /// `images` is no map, or a state that has to be divided is no vector of numbers.
    pub fn observation_of(&self, scene: Value) -> Result<Value, PolicyError> {
        let Value::Map(mut entries) = scene else {
            return Err(PolicyError::wrong_type("an observation must be a dict", SCHEMA));
        };
        let mut take = |key: &str| {
            let there = |(known, value): &(String, Value)| known == key && *value != Value::Nil;
            let at = entries.iter().position(there)?;
            Some(entries.swap_remove(at).1)
        };
        let mut images = match take("images") {
            Some(Value::Map(images)) => images,
            Some(other) => {
                let message = format!("'images' must be a dict, not {}", other.python_type());
                return Err(PolicyError::wrong_type(message, SCHEMA));
            }
            None => return Err(PolicyError::Key { key: "images".into(), remedy: SCHEMA.into() }),
        };
        images.retain(|(_, image)| *image != Value::Nil);
        let state = take("states").or_else(|| take("state"));
        let robot = &self.config().robot;
        let mut own = Vec::new();
        if let Some(prompt) = take("task_description") {
            own.push((robot.prompt_key().to_string(), prompt));
        }
        let keys = robot.camera_keys();
        let mut free = images.iter().filter(|(name, _)| !keys.iter().any(|(key, _)| key == name));
        let mut cameras = Vec::new();
        for (key, layout) in &keys {
            let named = images.iter().find(|(name, _)| name == key);
            if let Some((_, image)) = named.or_else(|| free.next()) {
                cameras.push((key.clone(), laid_out(image, *layout)));
            }
        }
        match robot {
            Robot::Aloha { .. } => own.push(("images".into(), Value::Map(cameras))),
            _ => own.append(&mut cameras),
        }
        if let Some(state) = state {
            own.append(&mut divided(state, &robot.state_parts())?);
        }
        Ok(Value::Map(own))
    }

    /// RoboArena's `PolicyServerConfig` as a map, for policies of DROID's robot: one external
    /// camera, one on the wrist, images as the model reads them.
    pub fn roboarena(&self) -> Option<Value> {
        let Robot::Droid = self.config().robot else { return None };
        let joints = self.config().absolute_mask.iter().any(|&relative| relative);
        let space = if joints { "joint_position" } else { "joint_velocity" };
        let side = Value::Int(self.image_side() as i128);
        let entries = [
            ("image_resolution", Value::List(vec![side.clone(), side])),
            ("needs_wrist_camera", Value::Bool(true)),
            ("n_external_cameras", Value::Int(1)),
            ("needs_stereo_camera", Value::Bool(false)),
            ("needs_session_id", Value::Bool(false)),
            ("action_space", Value::Str(space.into())),
        ];
        Some(Value::Map(entries.map(|(key, value)| (key.to_string(), value)).into()))
    }
}

impl Robot {
    /// Keys of the cameras in the model's order, and where their channels are.
    fn camera_keys(&self) -> Vec<(String, Layout)> {
        let keys = |keys: &[&str], layout| {
            keys.iter().map(|key| (key.to_string(), layout)).collect::<Vec<_>>()
        };
        match self {
            Robot::Aloha { .. } => {
                keys(&["cam_high", "cam_left_wrist", "cam_right_wrist"], Layout::Chw)
            }
            Robot::Droid => keys(
                &["observation/exterior_image_1_left", "observation/wrist_image_left"],
                Layout::Auto,
            ),
            Robot::Libero => keys(&["observation/image", "observation/wrist_image"], Layout::Auto),
            Robot::Generic(robot) => {
                robot.cameras.iter().map(|c| (c.key.clone(), c.layout)).collect()
            }
        }
    }

    /// Keys of the state and their lengths; `None` takes what is left.
    fn state_parts(&self) -> Vec<(String, Option<usize>)> {
        match self {
            Robot::Aloha { .. } => vec![("state".into(), None)],
            Robot::Libero => vec![("observation/state".into(), None)],
            Robot::Droid => vec![
                ("observation/joint_position".into(), Some(JOINTS)),
                ("observation/gripper_position".into(), None),
            ],
            Robot::Generic(robot) => robot.state.iter().map(|p| (p.key.clone(), p.dims)).collect(),
        }
    }
}

/// The names of images that came, as Python would list them.
fn shown_names(images: Option<&Value>) -> String {
    let Some(Value::Map(images)) = images else { return String::new() };
    let there = images.iter().filter(|(_, image)| *image != Value::Nil);
    let shown =
        |(name, _): &(String, Value)| python_repr(&name.chars().take(MAX_NAME).collect::<String>());
    there.take(MAX_NAMES).map(shown).collect::<Vec<_>>().join(", ")
}

/// vla-eval's image arrays have their channels last; one for a robot that wants them first is
/// turned. Files need no turning.
fn laid_out(image: &Value, layout: Layout) -> Value {
    let Value::Array(NdArray { dtype: Scalar::U8, shape, data }) = image else {
        return image.clone();
    };
    let &[height, width, 3] = shape.as_slice() else { return image.clone() };
    if layout != Layout::Chw || element_count(shape) != Some(data.len()) {
        return image.clone();
    }
    let plane = |channel| data.iter().skip(channel).step_by(3).copied();
    let planes: Vec<u8> = plane(0).chain(plane(1)).chain(plane(2)).collect();
    let turned = NdArray::from_u8(vec![3, height, width], planes);
    turned.map_or_else(|| image.clone(), Value::Array)
}

/// A state as the values of a robot's keys, one after the other.
fn divided(
    state: Value,
    parts: &[(String, Option<usize>)],
) -> Result<Vec<(String, Value)>, PolicyError> {
    if let [(key, _)] = parts {
        return Ok(vec![(key.clone(), state)]);
    }
    let array = state.to_array().filter(|array| array.shape.len() == 1);
    let Some(numbers) = array.as_ref().and_then(NdArray::to_f64) else {
        let message = format!("the state is no vector of numbers but {}", state.python_type());
        return Err(PolicyError::wrong_type(message, SCHEMA));
    };
    let (mut rest, mut out) = (&numbers[..], Vec::new());
    for (key, dims) in parts {
        let n = dims.unwrap_or(rest.len());
        let Some((part, after)) = rest.split_at_checked(n) else {
            return Err(wrong_shape(
                "state",
                &[numbers.len()],
                &format!("longer: '{key}' is next"),
            ));
        };
        rest = after;
        out.extend(NdArray::from_f64(vec![n], part).map(|a| (key.clone(), Value::Array(a))));
    }
    if !rest.is_empty() {
        let most = numbers.len() - rest.len();
        return Err(wrong_shape("state", &[numbers.len()], &format!("[{most}] numbers")));
    }
    Ok(out)
}
