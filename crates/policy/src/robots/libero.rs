//! LIBERO: the simulator's arm with one fixed and one wrist camera; flat keys with slashes.

use super::{Reader, RobotInput};
use crate::error::PolicyError;
use crate::image::Layout;

/// End effector's position (3), orientation (3) and the two fingers.
pub(super) const STATE_DIMS: usize = 8;
/// End effector's motion (6) and gripper.
pub(super) const OUTPUT_DIMS: usize = 7;

pub(super) const SCHEMA: &str = "a LIBERO observation is {'observation/image' and \
    'observation/wrist_image': [h, w, 3] or [3, h, w], uint8 or float in [0, 1], \
    'observation/state': [8] numbers, 'prompt': str}; the keys are flat, with slashes in them";

pub(super) fn read(reader: &Reader) -> Result<RobotInput, PolicyError> {
    let cameras = vec![
        reader.camera("observation/image", Layout::Auto)?,
        reader.camera("observation/wrist_image", Layout::Auto)?,
    ];
    let state = reader.vector("observation/state", "[8] numbers")?;
    Ok(RobotInput { cameras, state })
}
