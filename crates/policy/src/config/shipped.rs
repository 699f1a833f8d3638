//! openpi's policies as a table, and what its server starts for each `--env`.
//! Enumerated from openpi 15a9616 by instantiating its configurations.

use super::{ConfigError, PolicyConfig, Processing, STEPS, make_bool_mask};
use crate::norm::NormMode;
use crate::robots::Robot;
use crate::value::Value;
use pirouette_model::config::Family::{self, Pi0, Pi05};

struct Row {
    name: &'static str,
    family: Family,
    horizon: usize,
    max_token_len: usize,
    asset_id: &'static str,
    robot: Robot,
    /// Mask notation of [`make_bool_mask`].
    absolute: &'static [i32],
    discrete_state: bool,
    prompt: Option<&'static str>,
    reset_pose: bool,
}

const ALOHA: Robot = Robot::Aloha { adapt_to_pi: true };
const ALOHA_MASK: &[i32] = &[6, -1, 6, -1];
const DROID_MASK: &[i32] = &[7, -1];
const LIBERO_MASK: &[i32] = &[6, -1];
const LIBERO_ASSET: &str = "physical-intelligence/libero";
const TUPPERWARE: &str = "open the tupperware and put the food on the plate";

/// A π0 policy of an ALOHA robot that sends its reset pose; the rows below start from these.
const ALOHA_PI0: Row = Row {
    name: "pi0_aloha",
    family: Pi0,
    horizon: 50,
    max_token_len: 48,
    asset_id: "trossen",
    robot: ALOHA,
    absolute: ALOHA_MASK,
    discrete_state: false,
    prompt: None,
    reset_pose: true,
};
const ALOHA_PI05: Row =
    Row { name: "pi05_aloha", family: Pi05, max_token_len: 200, discrete_state: true, ..ALOHA_PI0 };
const DROID_PI0: Row = Row {
    name: "pi0_droid",
    horizon: 10,
    asset_id: "droid",
    robot: Robot::Droid,
    absolute: &[],
    reset_pose: false,
    ..ALOHA_PI0
};
const DROID_PI05: Row = Row {
    name: "pi05_droid",
    family: Pi05,
    horizon: 15,
    max_token_len: 200,
    discrete_state: true,
    ..DROID_PI0
};
const DROID_JOINTS_PI0: Row = Row { max_token_len: 100, absolute: DROID_MASK, ..DROID_PI0 };
const LIBERO_PI0: Row = Row {
    name: "pi0_libero",
    asset_id: LIBERO_ASSET,
    robot: Robot::Libero,
    absolute: LIBERO_MASK,
    reset_pose: false,
    ..ALOHA_PI0
};

const SHIPPED: &[Row] = &[
    ALOHA_PI0,
    ALOHA_PI05,
    Row { name: "pi0_aloha_towel", prompt: Some("fold the towel"), ..ALOHA_PI0 },
    Row { name: "pi0_aloha_tupperware", prompt: Some(TUPPERWARE), ..ALOHA_PI0 },
    Row {
        name: "pi0_aloha_pen_uncap",
        prompt: Some("uncap the pen"),
        reset_pose: false,
        ..ALOHA_PI0
    },
    Row {
        name: "pi05_aloha_pen_uncap",
        prompt: Some("uncap the pen"),
        reset_pose: false,
        ..ALOHA_PI05
    },
    Row {
        name: "pi0_aloha_sim",
        asset_id: "lerobot/aloha_sim_transfer_cube_human",
        absolute: &[],
        prompt: Some("Transfer cube"),
        reset_pose: false,
        ..ALOHA_PI0
    },
    DROID_PI0,
    DROID_PI05,
    Row { name: "pi05_droid_finetune", horizon: 16, ..DROID_PI05 },
    Row { name: "pi05_full_droid_finetune", horizon: 16, absolute: DROID_MASK, ..DROID_PI05 },
    Row { name: "pi05_droid_jointpos_polaris", absolute: DROID_MASK, ..DROID_PI05 },
    Row { name: "pi0_droid_jointpos_polaris", ..DROID_JOINTS_PI0 },
    Row { name: "pi0_droid_jointpos_100k_polaris", ..DROID_JOINTS_PI0 },
    LIBERO_PI0,
    Row { name: "pi0_libero_low_mem_finetune", ..LIBERO_PI0 },
    // π0.5 without digits: the state does not reach this model at all.
    Row {
        name: "pi05_libero",
        family: Pi05,
        horizon: 10,
        max_token_len: 200,
        absolute: &[],
        ..LIBERO_PI0
    },
];

const NO_ASSET: &str = "it has no asset id, so there are no statistics to load (openpi refuses it \
    too: \"Asset id is required to load norm stats.\"); use a policy with a robot, or `bench` for \
    random weights";
const BROKEN: &str = "openpi itself can't build it at 15a9616: its factory passes `action_dim` to \
    DroidInputs, which has no such argument (TypeError); use pi0_droid or pi05_droid";
const FAST: &str = "π0-FAST decodes action tokens one by one, which is not implemented; the \
    π0 and π0.5 policies of the same robot are";

/// openpi's other names, each with the reason why it can't be served.
pub const UNSERVED: &[(&str, &str)] = &[
    ("debug", NO_ASSET),
    ("debug_restore", NO_ASSET),
    ("debug_pi05", NO_ASSET),
    ("paligemma_binning_droid", BROKEN),
    ("paligemma_fast_droid", BROKEN),
    ("paligemma_fast_specialist_droid", BROKEN),
    ("paligemma_vq_droid", BROKEN),
    ("paligemma_diffusion_droid", BROKEN),
    ("pi0_fast_droid", FAST),
    ("pi0_fast_libero", FAST),
    ("pi0_fast_libero_low_mem_finetune", FAST),
    ("pi0_fast_full_droid_finetune", FAST),
    ("pi0_fast_droid_jointpos_polaris", FAST),
];

/// The shipped policies' names, in openpi's order.
pub fn names() -> impl Iterator<Item = &'static str> {
    SHIPPED.iter().map(|row| row.name)
}

/// The shipped policy of that name, or an error with the nearest names.
pub fn named(name: &str) -> Result<PolicyConfig, ConfigError> {
    if let Some(row) = SHIPPED.iter().find(|row| row.name == name) {
        return Ok(row.config());
    }
    if let Some((_, reason)) = UNSERVED.iter().find(|(unserved, _)| *unserved == name) {
        return Err(ConfigError::Unserved { name: name.into(), reason });
    }
    let mut near: Vec<(usize, &str)> = names()
        .map(|known| (edit_distance(name, known), known))
        .filter(|(distance, known)| *distance <= known.len() / 2)
        .collect();
    near.sort();
    let near: Vec<&str> = near.into_iter().take(3).map(|(_, known)| known).collect();
    Err(ConfigError::Unknown {
        name: name.chars().take(80).collect(),
        near: match near.as_slice() {
            [] => String::new(),
            some => format!("did you mean {}? ", some.join(", ")),
        },
        all: names().collect::<Vec<_>>().join(", "),
    })
}

impl Row {
    fn config(&self) -> PolicyConfig {
        let norm = NormMode::openpi(self.family);
        let pose = [0.0, -1.5, 1.5, 0.0, 0.0, 0.0];
        // Python writes whole numbers of this list as ints; the wire shows it.
        let number = |x: f64| if x == 0.0 { Value::Int(0) } else { Value::Float(x) };
        let pose = Value::List(pose.into_iter().map(number).collect());
        PolicyConfig {
            name: self.name.into(),
            family: self.family,
            horizon: self.horizon,
            max_token_len: self.max_token_len,
            action_dim: 32,
            action_dim_said: false,
            steps: STEPS,
            asset_id: Some(self.asset_id.into()),
            state_norm: norm,
            action_norm: norm,
            robot: self.robot.clone(),
            absolute_mask: make_bool_mask(self.absolute),
            discrete_state: self.discrete_state,
            default_prompt: self.prompt.map(String::from),
            metadata: if self.reset_pose { vec![("reset_pose".into(), pose)] } else { vec![] },
            processing: Processing::Openpi,
        }
    }
}

/// What openpi's server starts for one `--env`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Environment {
    /// The flag's value.
    pub name: &'static str,
    /// Name of the policy, for [`named`].
    pub config: &'static str,
    /// Where openpi downloads the checkpoint from.
    pub checkpoint: &'static str,
}

const ENVIRONMENTS: &[Environment] = &[
    Environment {
        name: "ALOHA",
        config: "pi05_aloha",
        checkpoint: "gs://openpi-assets/checkpoints/pi05_base",
    },
    Environment {
        name: "ALOHA_SIM",
        config: "pi0_aloha_sim",
        checkpoint: "gs://openpi-assets/checkpoints/pi0_aloha_sim",
    },
    Environment {
        name: "DROID",
        config: "pi05_droid",
        checkpoint: "gs://openpi-assets/checkpoints/pi05_droid",
    },
    Environment {
        name: "LIBERO",
        config: "pi05_libero",
        checkpoint: "gs://openpi-assets/checkpoints/pi05_libero",
    },
];

/// Policy and checkpoint of an `--env` (case is ignored; openpi's default is `ALOHA_SIM`).
pub fn environment(name: &str) -> Result<Environment, ConfigError> {
    let found = ENVIRONMENTS.iter().find(|env| env.name.eq_ignore_ascii_case(name));
    found.copied().ok_or_else(|| ConfigError::Environment(name.chars().take(80).collect()))
}

/// Levenshtein distance over bytes; names are short ASCII, longer input is cut.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b) = (&a.as_bytes()[..a.len().min(80)], b.as_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_name_brings_near_ones() {
        let text = named("pi05-droid").unwrap_err().to_string();
        assert!(text.contains("did you mean pi05_droid"), "{text}");
        assert!(text.contains("pi0_libero_low_mem_finetune"), "{text}");
        assert!(!named("zzzz").unwrap_err().to_string().contains("did you mean"));
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }

    #[test]
    fn what_openpi_cannot_serve_says_why() {
        for (name, reason) in [
            ("debug", "asset id"),
            ("paligemma_diffusion_droid", "DroidInputs"),
            ("pi0_fast_droid", "π0-FAST"),
        ] {
            let text = named(name).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(reason), "{text}");
        }
        assert!(UNSERVED.iter().all(|(name, _)| !names().any(|served| served == *name)));
    }

    #[test]
    fn environments_are_openpis() {
        let aloha = environment("aloha").unwrap();
        assert_eq!(aloha.config, "pi05_aloha");
        assert!(aloha.checkpoint.ends_with("/pi05_base"));
        assert!(environment("MARS").is_err());
        for env in ENVIRONMENTS {
            named(env.config).unwrap();
        }
    }

    #[test]
    fn rows_that_differ_from_their_family() {
        let polaris = named("pi0_droid_jointpos_polaris").unwrap();
        assert_eq!((polaris.max_token_len, polaris.horizon), (100, 10));
        let libero = named("pi05_libero").unwrap();
        assert!(!libero.discrete_state && libero.absolute_mask.is_empty());
        assert_eq!((libero.max_token_len, libero.horizon), (200, 10));
        assert_eq!(libero.state_norm, NormMode::OpenpiQuantile);
        assert_eq!(named("pi0_aloha_towel").unwrap().metadata.len(), 1);
        assert!(named("pi0_aloha_pen_uncap").unwrap().metadata.is_empty());
    }
}
