//! What a robot sends and receives: keys, shapes and maps of each kind of robot.

pub mod aloha;
mod droid;
mod generic;
mod libero;

pub use generic::{Camera, GenericRobot, StateKey};

use crate::config::Processing;
use crate::error::{PolicyError, python_tuple, wrong_shape};
use crate::image::{CameraImage, Layout};
use crate::value::Value;

/// openpi's names of the model's cameras, in their order.
pub const SLOTS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];

/// Which observation a policy takes and which actions it gives.
#[derive(Clone, Debug, PartialEq)]
pub enum Robot {
    /// Two arms, 14 joints.
    Aloha {
        /// Flip joints and map grippers between the robot's and the model's convention.
        adapt_to_pi: bool,
    },
    /// Franka arm with DROID's keys.
    Droid,
    /// The LIBERO simulator.
    Libero,
    /// Described by a TOML file.
    Generic(GenericRobot),
}

/// One camera image with its key.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Key of the observation, for messages.
    pub key: String,
    /// The image, of any size.
    pub image: CameraImage,
}

/// An observation in the model's convention, before normalisation.
#[derive(Clone, Debug, PartialEq)]
pub struct RobotInput {
    /// Real cameras in the model's order; absent ones are left out.
    pub cameras: Vec<Seen>,
    /// State in the model's convention, raw units.
    pub state: Vec<f64>,
}

impl Robot {
    /// Columns of the robot's actions.
    pub fn output_dims(&self) -> usize {
        match self {
            Robot::Aloha { .. } => aloha::DIMS,
            Robot::Droid => droid::DIMS,
            Robot::Libero => libero::OUTPUT_DIMS,
            Robot::Generic(robot) => robot.output_dims,
        }
    }

    /// Most cameras a request can bring.
    pub fn cameras(&self) -> usize {
        match self {
            Robot::Aloha { .. } => 3,
            Robot::Droid | Robot::Libero => 2,
            Robot::Generic(robot) => robot.cameras.len(),
        }
    }

    /// Length of the state, if the robot's kind fixes it.
    pub fn state_dims(&self) -> Option<usize> {
        match self {
            Robot::Aloha { .. } => Some(aloha::DIMS),
            Robot::Droid => Some(droid::DIMS),
            Robot::Libero => Some(libero::STATE_DIMS),
            Robot::Generic(robot) => robot.state.iter().map(|key| key.dims).sum(),
        }
    }

    /// Length of the state, where any other is refused. LIBERO's and DROID's keys are used by other
    /// arms too, which openpi takes.
    pub(crate) fn exact_state_dims(&self) -> Option<usize> {
        match self {
            Robot::Libero | Robot::Droid => None,
            robot => robot.state_dims(),
        }
    }

    /// Key of the instruction.
    pub fn prompt_key(&self) -> &str {
        match self {
            Robot::Generic(robot) => &robot.prompt_key,
            _ => "prompt",
        }
    }

    /// Short name for contracts and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Robot::Aloha { .. } => "aloha",
            Robot::Droid => "droid",
            Robot::Libero => "libero",
            Robot::Generic(_) => "generic",
        }
    }

    /// What is wrong with the description, if anything.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Robot::Generic(robot) => robot.check(),
            _ => Ok(()),
        }
    }

    /// Reads an observation, looking keys up in openpi's order (it decides which one a client is
    /// told to be missing).
    pub fn read(
        &self,
        observation: &Value,
        processing: Processing,
    ) -> Result<RobotInput, PolicyError> {
        if !matches!(observation, Value::Map(_)) {
            return Err(PolicyError::wrong_type(
                format!("an observation must be a dict, not {}", observation.python_type()),
                self.schema(),
            ));
        }
        let reader = Reader { observation, robot: self, processing };
        match self {
            Robot::Aloha { adapt_to_pi } => aloha::read(&reader, *adapt_to_pi),
            Robot::Droid => droid::read(&reader),
            Robot::Libero => libero::read(&reader),
            Robot::Generic(robot) => robot.read(&reader),
        }
    }

    /// One action row in the robot's convention: the first columns, mapped. `row` may be longer.
    pub fn write(&self, row: &[f64]) -> Vec<f64> {
        let mut out = row.to_vec();
        out.truncate(self.output_dims());
        if matches!(self, Robot::Aloha { adapt_to_pi: true }) {
            aloha::encode_actions(&mut out);
        }
        out
    }

    /// One of the robot's action rows in the model's convention: the inverse of [`Robot::write`].
    pub fn read_action(&self, row: &[f64]) -> Vec<f64> {
        let mut out = row.to_vec();
        if matches!(self, Robot::Aloha { adapt_to_pi: true }) {
            aloha::decode_actions(&mut out);
        }
        out
    }

    /// The observation expected, in one sentence.
    pub fn schema(&self) -> String {
        match self {
            Robot::Aloha { .. } => aloha::SCHEMA.into(),
            Robot::Droid => droid::SCHEMA.into(),
            Robot::Libero => libero::SCHEMA.into(),
            Robot::Generic(robot) => robot.schema(),
        }
    }
}

/// Looks keys of one observation up.
pub(crate) struct Reader<'a> {
    pub observation: &'a Value,
    pub robot: &'a Robot,
    pub processing: Processing,
}

impl<'a> Reader<'a> {
    pub fn get(&self, key: &str) -> Result<&'a Value, PolicyError> {
        self.observation.get(key).ok_or_else(|| self.missing(key))
    }

    pub fn missing(&self, key: &str) -> PolicyError {
        PolicyError::Key { key: key.into(), remedy: self.robot.schema() }
    }

    pub fn camera(&self, key: &str, layout: Layout) -> Result<Seen, PolicyError> {
        self.image(self.get(key)?, key, layout)
    }

    pub fn image(&self, value: &Value, key: &str, layout: Layout) -> Result<Seen, PolicyError> {
        let image = CameraImage::parse(value, key, layout, self.processing)?;
        Ok(Seen { key: key.into(), image })
    }

    /// Shape and numbers of a key; NaN and infinities are refused.
    pub fn numbers(&self, key: &str) -> Result<(Vec<usize>, Vec<f64>), PolicyError> {
        let value = self.get(key)?;
        let read = value.to_array().and_then(|array| array.to_f64().map(|n| (array.shape, n)));
        let Some((shape, numbers)) = read else {
            return Err(PolicyError::wrong_type(
                format!("'{key}' is no array of numbers but {}", value.python_type()),
                self.robot.schema(),
            ));
        };
        if let Some((index, number)) = numbers.iter().enumerate().find(|(_, n)| !n.is_finite()) {
            return Err(PolicyError::value(
                format!("'{key}' contains {number} at index {index}"),
                "a robot's state must be finite; check the sensor or driver that fills it",
            ));
        }
        Ok((shape, numbers))
    }

    /// A one-dimensional array of numbers.
    pub fn vector(&self, key: &str, expected: &str) -> Result<Vec<f64>, PolicyError> {
        let (shape, numbers) = self.numbers(key)?;
        if shape.len() != 1 { Err(wrong_shape(key, &shape, expected)) } else { Ok(numbers) }
    }
}

/// NumPy's complaint about two shapes that don't fit.
pub(crate) fn broadcast_error(a: &[usize], b: &[usize], remedy: String) -> PolicyError {
    let shapes = format!("{} {}", python_tuple(a, ","), python_tuple(b, ","));
    PolicyError::value(
        format!("operands could not be broadcast together with shapes {shapes}"),
        remedy,
    )
}
