//! A robot described by data: which keys are cameras and state, how many actions it takes.

use super::{Reader, RobotInput, SLOTS, Seen};
use crate::error::{PolicyError, wrong_shape};
use crate::image::Layout;
use crate::reserved;

/// Most state keys of one robot.
const MAX_KEYS: usize = 16;
/// Most numbers of one state key.
const MAX_DIMS: usize = 4096;

/// A lab's own robot.
#[derive(Clone, Debug, PartialEq)]
pub struct GenericRobot {
    /// Cameras in the model's order.
    pub cameras: Vec<Camera>,
    /// Keys whose numbers, one after the other, are the state.
    pub state: Vec<StateKey>,
    /// Columns of the robot's actions.
    pub output_dims: usize,
    /// Key of the instruction.
    pub prompt_key: String,
    /// What the state's numbers mean, for the contract.
    pub state_units: String,
    /// What the actions' numbers mean, for the contract.
    pub action_units: String,
}

/// One camera of a [`GenericRobot`].
#[derive(Clone, Debug, PartialEq)]
pub struct Camera {
    /// The model's name for it, one of [`SLOTS`]; the order decides, [`Robot::check`] sees that the
    /// names agree with it. `None`: a model whose cameras have no names.
    ///
    /// [`Robot::check`]: super::Robot::check
    pub slot: Option<String>,
    /// Key of the observation.
    pub key: String,
    /// Whether a request without it is refused. One without any camera always is.
    pub required: bool,
    /// Where its channels are.
    pub layout: Layout,
    /// Height and width in training, if known. Clients of LeRobot's own server have their images
    /// stretched to it.
    pub size: Option<(usize, usize)>,
}

/// One part of the state of a [`GenericRobot`].
#[derive(Clone, Debug, PartialEq)]
pub struct StateKey {
    /// Key of the observation: a vector or a single number.
    pub key: String,
    /// Its length, if fixed.
    pub dims: Option<usize>,
}

impl GenericRobot {
    pub(super) fn check(&self) -> Result<(), String> {
        let cameras = self.cameras.iter().map(|camera| camera.key.as_str());
        let state = self.state.iter().map(|part| part.key.as_str());
        let mut keys: Vec<&str> = cameras.chain(state).chain([self.prompt_key.as_str()]).collect();
        keys.sort();
        if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("uses the key `{}` twice", pair[0]));
        }
        if keys.contains(&"") {
            return Err("has an empty key".into());
        }
        if let Some(key) = keys.iter().find(|key| key.contains(char::is_control)) {
            return Err(format!("uses the key {key:?}, which holds a control character"));
        }
        let wrong = |dims: &usize| !(1..=MAX_DIMS).contains(dims);
        if let Some((key, dims)) =
            self.state.iter().find_map(|part| Some((&part.key, part.dims.filter(wrong)?)))
        {
            return Err(format!(
                "has the key `{key}` with `dims` {dims}; it must be 1 to {MAX_DIMS}, or left out"
            ));
        }
        if let Some(key) = keys.iter().find(|key| reserved::is(key)) {
            return Err(format!(
                "uses the key `{key}`, which the server takes out of a request for itself; choose \
                 another"
            ));
        }
        for (what, count, most) in
            [("cameras", self.cameras.len(), SLOTS.len()), ("state", self.state.len(), MAX_KEYS)]
        {
            if !(1..=most).contains(&count) {
                return Err(format!("has {count} entries in `{what}`; it must be 1 to {most}"));
            }
        }
        self.check_slots()
    }

    /// Cameras reach the model in the order of the description, so a slot that says otherwise
    /// would be a lie in the log and in the contract.
    fn check_slots(&self) -> Result<(), String> {
        let order = || SLOTS.join(", ");
        let mut last: Option<(usize, &Camera)> = None;
        for camera in &self.cameras {
            let Some(slot) = &camera.slot else { continue };
            let Some(place) = SLOTS.iter().position(|known| known == slot) else {
                return Err(format!(
                    "has a camera `{}` with the slot `{slot}`; the model's slots are {} (leave \
                     `slot` out to name a camera by its place)",
                    camera.key,
                    order()
                ));
            };
            match last {
                Some((before, other)) if before == place => {
                    return Err(format!(
                        "gives the slot `{slot}` to the cameras `{}` and `{}`; each slot is for \
                         one, and a camera without `slot` has that of its place",
                        other.key, camera.key
                    ));
                }
                Some((before, other)) if before > place => {
                    return Err(format!(
                        "has the camera `{}` ({slot}) after `{}` ({}); cameras reach the model in \
                         the file's order, so write them in the model's: {}",
                        camera.key,
                        other.key,
                        SLOTS[before],
                        order()
                    ));
                }
                _ => last = Some((place, camera)),
            }
        }
        Ok(())
    }

    pub(super) fn read(&self, reader: &Reader) -> Result<RobotInput, PolicyError> {
        let mut state = Vec::new();
        for part in &self.state {
            let (shape, numbers) = reader.numbers(&part.key)?;
            if shape.len() > 1 || part.dims.is_some_and(|dims| dims != numbers.len()) {
                let expected = match part.dims {
                    Some(dims) => format!("[{dims}] numbers"),
                    None => "a vector of numbers".into(),
                };
                return Err(wrong_shape(&part.key, &shape, &expected));
            }
            state.extend(numbers);
        }
        let cameras: Result<Vec<Seen>, PolicyError> = self
            .cameras
            .iter()
            .filter(|camera| camera.required || reader.observation.get(&camera.key).is_some())
            .map(|camera| reader.camera(&camera.key, camera.layout))
            .collect();
        let cameras = cameras?;
        if cameras.is_empty() {
            return Err(PolicyError::value(
                "All image features are missing from the batch. At least one expected.",
                self.schema(),
            ));
        }
        Ok(RobotInput { cameras, state })
    }

    pub(super) fn schema(&self) -> String {
        let cameras = self.cameras.iter().map(|camera| {
            let optional = if camera.required { "" } else { " (may be left out)" };
            format!("'{}'{optional}: image", camera.key)
        });
        let state = self.state.iter().map(|part| match part.dims {
            Some(dims) => format!("'{}': [{dims}] numbers", part.key),
            None => format!("'{}': numbers", part.key),
        });
        let parts: Vec<String> =
            cameras.chain(state).chain([format!("'{}': str", self.prompt_key)]).collect();
        let any = match self.cameras.iter().any(|camera| camera.required) {
            true => "",
            false => ", with one of the images at least",
        };
        format!("this robot's observation is {{{}}}{any}", parts.join(", "))
    }
}
