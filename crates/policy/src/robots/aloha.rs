//! ALOHA: two six-joint arms with grippers; channel-first images under `images`.

use super::{Reader, RobotInput, Seen, broadcast_error};
use crate::error::{PolicyError, python_repr, python_tuple};
use crate::image::Layout;
use crate::value::Value;

/// Left six joints, left gripper, right six joints, right gripper.
pub const DIMS: usize = 14;

pub(super) const SCHEMA: &str = "an ALOHA observation is {'state': [14] numbers, 'images': \
    {'cam_high': [3, h, w], 'cam_left_wrist' and 'cam_right_wrist' (may be left out): [3, h, w], \
    uint8 or float in [0, 1]}, 'prompt': str}";

const CAMERAS: [&str; 4] = ["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"];
const GRIPPERS: [usize; 2] = [6, 13];
/// Signs between the robot's joints and the model's.
const FLIP: [f64; DIMS] =
    [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0];

pub(super) fn read(reader: &Reader, adapt_to_pi: bool) -> Result<RobotInput, PolicyError> {
    let (shape, mut state) = reader.numbers("state")?;
    if shape != [DIMS] {
        let remedy = format!("'state' must be [{DIMS}] numbers; {SCHEMA}");
        return Err(broadcast_error(&[DIMS], &shape, remedy));
    }
    if adapt_to_pi {
        decode_state(&mut state);
    }
    let images = reader.get("images")?;
    let Value::Map(entries) = images else {
        return Err(PolicyError::Attribute {
            message: format!("'{}' object has no attribute 'items'", images.python_type()),
            remedy: format!("'images' must be a dict of cameras; {SCHEMA}"),
        });
    };
    if entries.iter().any(|(key, _)| !CAMERAS.contains(&key.as_str())) {
        let known: Vec<String> = CAMERAS.iter().map(|key| python_repr(key)).collect();
        let got: Vec<String> = entries.iter().map(|(key, _)| python_repr(key)).collect();
        let (known, got) = (python_tuple(&known, ", "), python_tuple(&got, ", "));
        return Err(PolicyError::value(
            format!("Expected images to contain {known}, got {got}"),
            "leave other cameras out",
        ));
    }
    if images.get("cam_high").is_none() {
        return Err(reader.missing("cam_high"));
    }
    // cam_low is accepted and not used.
    let cameras: Result<Vec<Seen>, PolicyError> = ["cam_high", "cam_left_wrist", "cam_right_wrist"]
        .iter()
        .filter_map(|key| images.get(key).map(|image| reader.image(image, key, Layout::Chw)))
        .collect();
    Ok(RobotInput { cameras: cameras?, state })
}

fn decode_state(state: &mut [f64]) {
    for (x, flip) in state.iter_mut().zip(FLIP) {
        *x *= flip;
    }
    for gripper in GRIPPERS {
        if let Some(x) = state.get_mut(gripper) {
            *x = gripper_to_angular(*x);
        }
    }
}

pub(super) fn encode_actions(row: &mut [f64]) {
    for (x, flip) in row.iter_mut().zip(FLIP) {
        *x *= flip;
    }
    for gripper in GRIPPERS {
        if let Some(x) = row.get_mut(gripper) {
            *x = gripper_from_angular(*x);
        }
    }
}

/// The inverse of [`encode_actions`].
pub(super) fn decode_actions(row: &mut [f64]) {
    for gripper in GRIPPERS {
        if let Some(x) = row.get_mut(gripper) {
            *x = *x * (1.4910 - -0.6213) + -0.6213 - 0.5476;
        }
    }
    for (x, flip) in row.iter_mut().zip(FLIP) {
        *x *= flip;
    }
}

/// The robot's gripper (0 closed, 1 open, linear in the finger's travel) as the angle of the
/// model's gripper, scaled to its range.
pub fn gripper_to_angular(gripper: f64) -> f64 {
    const ARM: f64 = 0.036;
    const HORN: f64 = 0.022;
    let travel = gripper * (0.05800 - 0.01844) + 0.01844;
    let sine = (HORN * HORN + travel * travel - ARM * ARM) / (2.0 * HORN * travel);
    (sine.clamp(-1.0, 1.0).asin() - 0.5476) / (1.6296 - 0.5476)
}

/// The model's gripper angle as the command of the robot's gripper joint. Not the inverse of
/// [`gripper_to_angular`]: state and command have different scales on this robot.
pub fn gripper_from_angular(angle: f64) -> f64 {
    (angle + 0.5476 - -0.6213) / (1.4910 - -0.6213)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn openpis_gripper_values() {
        for (x, angular) in [
            (0.0, -1.0798655475132917),
            (0.25, -0.5130776068814178),
            (0.5, -0.1400559217021429),
            (0.75, 0.22332757987422025),
            (1.0, 0.945652797407483),
            (1.2, 0.945652797407483),
            (-0.2, -1.9578524277217162),
        ] {
            assert!((gripper_to_angular(x) - angular).abs() < 1e-14, "{x}");
        }
        assert_eq!(gripper_from_angular(0.0), 0.5533778345878898);
        assert_eq!(gripper_from_angular(0.5), 0.7900866354211049);
        assert_eq!(gripper_from_angular(1.0), 1.0267954362543197);
    }
}
