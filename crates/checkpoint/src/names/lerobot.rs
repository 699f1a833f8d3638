//! LeRobot's names: openpi's with a leading `model.`, or without one in converted base
//! checkpoints, whose loader then renames a few.

use pirouette_model::Family;
use pirouette_model::config::names::EXPERT;

use super::{Mapping, openpi_torch};
use crate::error::Mismatch;

/// Maps stored names the way LeRobot's loader does for a policy of this family.
pub fn mapping<'a>(
    stored: impl Iterator<Item = &'a str>,
    family: Family,
) -> Result<Mapping, Mismatch> {
    let mut mapping = Mapping::default();
    for name in stored {
        let canonical = match name.strip_prefix("model.") {
            Some(rest) => rest.to_string(),
            None => match renamed(name, family) {
                Ok(renamed) => renamed,
                Err(reason) => {
                    mapping.skip(name, reason);
                    continue;
                }
            },
        };
        if canonical.starts_with("proprio_history_proj.") {
            mapping.skip(name, "proprioceptive memory, off in this policy");
            continue;
        }
        openpi_torch::add(&mut mapping, name, canonical)?;
    }
    openpi_torch::resolve_tie(&mut mapping);
    Ok(mapping)
}

/// What LeRobot's loader makes of a key without prefix, or why it drops it.
fn renamed(name: &str, family: Family) -> Result<String, &'static str> {
    match family {
        Family::Pi0 => Ok(match name.strip_prefix("time_mlp_") {
            Some(rest) => format!("action_time_mlp_{rest}"),
            None => name.to_string(),
        }),
        Family::Pi05 => {
            if name.starts_with("state_proj.") {
                return Err("π0.5 has no state projection");
            }
            if is_plain_expert_norm(name) {
                return Err("π0.5's expert norms are adaptive");
            }
            Ok(match name.strip_prefix("action_time_mlp_") {
                Some(rest) => format!("time_mlp_{rest}"),
                None => name.to_string(),
            })
        }
    }
}

fn is_plain_expert_norm(name: &str) -> bool {
    name.strip_prefix(EXPERT).is_some_and(|rest| {
        rest == "norm.weight"
            || rest.ends_with(".input_layernorm.weight")
            || rest.ends_with(".post_attention_layernorm.weight")
    })
}
