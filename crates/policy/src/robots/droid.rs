//! DROID: a Franka arm with one exterior and one wrist camera; flat keys with slashes.

use super::{Reader, RobotInput};
use crate::error::{PolicyError, wrong_shape};
use crate::image::Layout;

/// Seven joints and the gripper.
pub(super) const DIMS: usize = 8;

pub(super) const SCHEMA: &str = "a DROID observation is {'observation/exterior_image_1_left' and \
    'observation/wrist_image_left': [h, w, 3] or [3, h, w], uint8 or float in [0, 1], \
    'observation/joint_position': [7] numbers, 'observation/gripper_position': [1] number, \
    'prompt': str}; the keys are flat, with slashes in them";

pub(super) fn read(reader: &Reader) -> Result<RobotInput, PolicyError> {
    let gripper_key = "observation/gripper_position";
    let (shape, gripper) = reader.numbers(gripper_key)?;
    if shape.len() > 1 {
        return Err(wrong_shape(gripper_key, &shape, "[1] or a single number"));
    }
    let mut state = reader.vector("observation/joint_position", "[7] numbers")?;
    state.extend(gripper);
    let cameras = vec![
        reader.camera("observation/exterior_image_1_left", Layout::Auto)?,
        reader.camera("observation/wrist_image_left", Layout::Auto)?,
    ];
    Ok(RobotInput { cameras, state })
}
