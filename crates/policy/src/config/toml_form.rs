//! A policy for a lab's own robot, as TOML: the same fields as a shipped policy.

use super::{ConfigError, PolicyConfig, Processing, STEPS, make_bool_mask};
use crate::image::Layout;
use crate::norm::NormMode;
use crate::robots::{Camera, GenericRobot, Robot, StateKey};
use crate::value::Value;
use pirouette_model::config::Family;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest TOML text accepted.
const MAX_BYTES: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: String,
    family: FamilyName,
    horizon: usize,
    max_token_len: Option<usize>,
    action_dim: Option<usize>,
    steps: Option<usize>,
    asset_id: Option<String>,
    norm: Option<Norm>,
    state_norm: Option<Norm>,
    action_norm: Option<Norm>,
    #[serde(default)]
    absolute: Vec<i32>,
    discrete_state: Option<bool>,
    default_prompt: Option<String>,
    #[serde(default)]
    processing: ProcessingName,
    #[serde(default)]
    metadata: toml::Table,
    robot: RobotForm,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum FamilyName {
    Pi0,
    Pi05,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ProcessingName {
    #[default]
    Openpi,
    Lerobot,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Norm {
    Identity,
    ZScore,
    Quantile,
    MeanStd,
    MinMax,
    Quantiles,
    Quantile10,
}

impl From<Norm> for NormMode {
    fn from(norm: Norm) -> NormMode {
        match norm {
            Norm::Identity => NormMode::Identity,
            Norm::ZScore => NormMode::OpenpiZScore,
            Norm::Quantile => NormMode::OpenpiQuantile,
            Norm::MeanStd => NormMode::MeanStd,
            Norm::MinMax => NormMode::MinMax,
            Norm::Quantiles => NormMode::Quantiles,
            Norm::Quantile10 => NormMode::Quantile10,
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
enum RobotForm {
    Aloha {
        #[serde(default = "yes")]
        adapt_to_pi: bool,
    },
    // With braces: of a variant without them serde ignores every field.
    Droid {},
    Libero {},
    Generic {
        cameras: Vec<CameraForm>,
        state: Vec<StateForm>,
        output_dims: usize,
        prompt_key: Option<String>,
        #[serde(default)]
        state_units: String,
        #[serde(default)]
        action_units: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CameraForm {
    key: String,
    slot: Option<String>,
    #[serde(default = "yes")]
    required: bool,
    #[serde(default)]
    layout: LayoutName,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum LayoutName {
    #[default]
    Auto,
    Hwc,
    Chw,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StateForm {
    key: String,
    dims: Option<usize>,
}

fn yes() -> bool {
    true
}

/// A policy from TOML text; `examples/so101.toml` shows every field with its meaning and default.
/// Misspelt fields are errors.
pub fn from_toml(text: &str) -> Result<PolicyConfig, ConfigError> {
    if text.len() > MAX_BYTES {
        return Err(ConfigError::Toml(format!("{} bytes; at most {MAX_BYTES}", text.len())));
    }
    let form: Document = toml::from_str(text).map_err(|e| ConfigError::Toml(e.to_string()))?;
    let family = match form.family {
        FamilyName::Pi0 => Family::Pi0,
        FamilyName::Pi05 => Family::Pi05,
    };
    let processing = match form.processing {
        ProcessingName::Openpi => Processing::Openpi,
        ProcessingName::Lerobot => Processing::Lerobot,
    };
    let default_norm = match (processing, family) {
        (Processing::Openpi, family) => NormMode::openpi(family),
        (Processing::Lerobot, Family::Pi0) => NormMode::MeanStd,
        (Processing::Lerobot, Family::Pi05) => NormMode::Quantiles,
    };
    let norm = form.norm.map_or(default_norm, NormMode::from);
    let pi05 = family == Family::Pi05;
    let config = PolicyConfig {
        name: form.name,
        family,
        horizon: form.horizon,
        max_token_len: form.max_token_len.unwrap_or(if pi05 { 200 } else { 48 }),
        action_dim: form.action_dim.unwrap_or(32),
        action_dim_said: form.action_dim.is_some(),
        steps: form.steps.unwrap_or(STEPS),
        asset_id: form.asset_id,
        state_norm: form.state_norm.map_or(norm, NormMode::from),
        action_norm: form.action_norm.map_or(norm, NormMode::from),
        robot: robot(form.robot),
        absolute_mask: make_bool_mask(&form.absolute),
        discrete_state: form.discrete_state.unwrap_or(pi05),
        default_prompt: form.default_prompt,
        metadata: form.metadata.into_iter().map(|(key, value)| (key, plain(value))).collect(),
        processing,
    };
    config.check()?;
    Ok(config)
}

fn robot(form: RobotForm) -> Robot {
    match form {
        RobotForm::Aloha { adapt_to_pi } => Robot::Aloha { adapt_to_pi },
        RobotForm::Droid {} => Robot::Droid,
        RobotForm::Libero {} => Robot::Libero,
        RobotForm::Generic {
            cameras,
            state,
            output_dims,
            prompt_key,
            state_units,
            action_units,
        } => Robot::Generic(GenericRobot {
            cameras: cameras.into_iter().enumerate().map(|(i, form)| camera(i, form)).collect(),
            state: state.into_iter().map(|s| StateKey { key: s.key, dims: s.dims }).collect(),
            output_dims,
            prompt_key: prompt_key.unwrap_or_else(|| "prompt".into()),
            state_units,
            action_units,
        }),
    }
}

fn camera(index: usize, form: CameraForm) -> Camera {
    Camera {
        slot: form.slot.or_else(|| crate::robots::SLOTS.get(index).map(|slot| (*slot).into())),
        key: form.key,
        required: form.required,
        layout: match form.layout {
            LayoutName::Auto => Layout::Auto,
            LayoutName::Hwc => Layout::Hwc,
            LayoutName::Chw => Layout::Chw,
        },
        size: None,
    }
}

fn plain(value: toml::Value) -> Value {
    match value {
        toml::Value::String(s) => Value::Str(s),
        toml::Value::Integer(i) => Value::Int(i.into()),
        toml::Value::Float(f) => Value::Float(f),
        toml::Value::Boolean(b) => Value::Bool(b),
        toml::Value::Datetime(d) => Value::Str(d.to_string()),
        toml::Value::Array(items) => Value::List(items.into_iter().map(plain).collect()),
        toml::Value::Table(table) => {
            let sorted: BTreeMap<String, toml::Value> = table.into_iter().collect();
            Value::Map(sorted.into_iter().map(|(k, v)| (k, plain(v))).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../../examples/so101.toml");

    #[test]
    fn the_documented_example_is_read() {
        let config = from_toml(EXAMPLE).unwrap();
        assert_eq!(config.name, "so101_pick");
        assert_eq!(config.family, Family::Pi05);
        assert_eq!((config.horizon, config.max_token_len, config.action_dim), (50, 200, 32));
        assert_eq!(config.state_norm, NormMode::OpenpiQuantile);
        assert_eq!(config.absolute_mask, [true, true, true, true, true, false]);
        assert_eq!(config.output_dims(), 6);
        let Robot::Generic(robot) = &config.robot else { panic!("generic") };
        assert_eq!(robot.cameras[0].slot.as_deref(), Some("base_0_rgb"));
        assert!(!robot.cameras[1].required);
        assert_eq!(robot.state.iter().map(|s| s.dims).collect::<Vec<_>>(), [Some(5), Some(1)]);
        assert_eq!(config.metadata[0].0, "reset_pose");
    }

    #[test]
    fn mistakes_are_named() {
        let misspelt = EXAMPLE.replace("horizon", "horizom");
        assert!(from_toml(&misspelt).unwrap_err().to_string().contains("horizom"));
        let wide = EXAMPLE.replace("output_dims = 6", "output_dims = 60");
        assert!(from_toml(&wide).unwrap_err().to_string().contains("output_dims"));
        let family = EXAMPLE.replace("family = \"pi05\"", "family = \"pi7\"");
        assert!(from_toml(&family).unwrap_err().to_string().contains("pi7"));
        assert!(from_toml(&"#".repeat(MAX_BYTES + 1)).is_err());
    }

    #[test]
    fn every_kind_of_robot_refuses_fields_it_does_not_have() {
        for kind in ["aloha", "droid", "libero", "generic"] {
            let own = match kind {
                "generic" => "output_dims=6\ncameras=[{key='c'}]\nstate=[{key='s'}]\n",
                _ => "",
            };
            let text = format!("name='x'\nfamily='pi0'\nhorizon=50\n[robot]\nkind='{kind}'\n{own}");
            from_toml(&text).unwrap_or_else(|e| panic!("{kind}: {e}"));
            let error = from_toml(&(text + "state_unit='rad'\n")).unwrap_err().to_string();
            assert!(error.contains("unknown field `state_unit`"), "{kind}: {error}");
        }
    }

    #[test]
    fn what_would_fail_at_every_request_is_refused() {
        for key in ["noise", "session", "inference_delay", "batch"] {
            for own in ["observation/image", "observation/gripper_position"] {
                let error = from_toml(&EXAMPLE.replace(own, key)).unwrap_err().to_string();
                assert!(error.contains(&format!("uses the key `{key}`")), "{error}");
            }
        }
        let camera = |i| format!("[[robot.cameras]]\nkey = \"camera {i}\"\n");
        let more = EXAMPLE.to_string() + &camera(3);
        assert_eq!(from_toml(&more).unwrap().robot.cameras(), 3);
        let error = from_toml(&(more + &camera(4))).unwrap_err().to_string();
        assert!(error.contains("has 4 entries in `cameras`; it must be 1 to 3"), "{error}");
    }

    #[test]
    fn sizes_that_can_not_work_together_are_refused_by_field() {
        let changed = |changes: &[(&str, &str)]| {
            changes.iter().fold(EXAMPLE.to_string(), |text, (from, to)| {
                assert!(text.contains(from), "{from}");
                text.replace(from, to)
            })
        };
        let pi0 = ("family = \"pi05\"", "family = \"pi0\"");
        let (norm, no_norm) = (("norm = \"quantile\"", ""), ("discrete_state = true", ""));
        let (five, absolute) = ("dims = 5 ", "absolute = [5, -1]");
        // The state beside the model's columns, which π0.5 reads as text.
        let wide = (five, "dims = 32 ");
        assert!(from_toml(&changed(&[wide])).is_ok());
        for (changes, says) in [
            (
                &[pi0, norm, no_norm, wide][..],
                "`robot.state` has 33 numbers, of which pi0 reads `action_dim`, 32",
            ),
            (&[(absolute, "absolute = [6]"), ("dims = 1\n", "")], ""),
            (&[(absolute, "absolute = [6]")], ""),
            (&[(absolute, "absolute = [5, -27]")], ""),
            (
                &[(absolute, "absolute = [6]"), (five, "dims = 4 ")],
                "`absolute` makes action column 5 relative to the state, which has 5 numbers",
            ),
            (
                &[(absolute, "absolute = [5, 2]")],
                "`absolute` makes column 6 relative, the robot receives 6 (`output_dims`)",
            ),
            (&[(five, "dims = 0 ")], "the key `observation/joint_position` with `dims` 0; it must"),
            (&[(five, "dims = 9999999 ")], "with `dims` 9999999; it must be 1 to 4096"),
            (&[("\"observation/image\"", "\"a\\nb\"")], "key \"a\\nb\", which holds a control"),
            (&[("\"observation/gripper_position\"", "\"\\u007f\"")], "which holds a control"),
            (&[("prompt_key = \"prompt\"", "prompt_key = \"a\\tb\"")], "\"a\\tb\", which holds"),
        ] {
            match from_toml(&changed(changes)) {
                Ok(_) => assert_eq!(says, "", "{changes:?}"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(!says.is_empty() && error.contains(says), "{changes:?}: {error}");
                }
            }
        }
    }

    /// The model gets the cameras in the file's order, whatever they are called.
    #[test]
    fn slots_agree_with_the_order_of_the_cameras() {
        let told = |base: &str, wrist: &str| {
            let text = EXAMPLE.replace("slot = \"left_wrist_0_rgb\"", wrist);
            let text = text.replacen("slot = \"base_0_rgb\"", base, 1);
            from_toml(&text).map(drop).map_err(|e| e.to_string())
        };
        let [base, left, right] = crate::robots::SLOTS.map(|slot| format!("slot = \"{slot}\""));
        for (first, second) in [(&base[..], &right[..]), (&left, &right), ("", ""), ("", &left)] {
            assert_eq!(told(first, second), Ok(()), "{first} {second}");
        }
        for (first, second, says) in [
            (&left[..], &base[..], "so write them in the model's: base_0_rgb, left_wrist_0_rgb"),
            (&base, &base, "to the cameras `observation/image` and `observation/wrist_image`"),
            (&left, "", "gives the slot `left_wrist_0_rgb` to the cameras"),
            ("slot = \"top\"", &left, "`top`; the model's slots are base_0_rgb, left_wrist_0_rgb"),
        ] {
            let error = told(first, second).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn lerobot_has_its_own_default_normalisation() {
        let text = "name='x'\nfamily='pi0'\nhorizon=50\nprocessing='lerobot'\n[robot]\n\
            kind='generic'\noutput_dims=6\nprompt_key='task'\n\
            cameras=[{key='observation.images.top'}]\nstate=[{key='observation.state'}]\n";
        let config = from_toml(text).unwrap();
        assert_eq!((config.state_norm, config.max_token_len), (NormMode::MeanStd, 48));
    }
}
