//! openpi's PyTorch names: canonical except for the tied token table and the expert's head.

use pirouette_model::config::names::EMBED;

use super::Mapping;
use crate::error::Mismatch;

/// The token table's other name: the one openpi's writer keeps.
pub const LM_HEAD: &str = "paligemma_with_expert.paligemma.lm_head.weight";
/// The expert's output head, which nothing reads or trains.
pub const EXPERT_HEAD: &str = "paligemma_with_expert.gemma_expert.lm_head.weight";

/// Maps stored names. A name without meaning maps to itself and is reported as unexpected later.
pub fn mapping<'a>(stored: impl Iterator<Item = &'a str>) -> Result<Mapping, Mismatch> {
    let mut mapping = Mapping::default();
    for name in stored {
        add(&mut mapping, name, name.to_string())?;
    }
    resolve_tie(&mut mapping);
    Ok(mapping)
}

/// Adds `stored`, whose openpi name is `name`.
pub(super) fn add(mapping: &mut Mapping, stored: &str, name: String) -> Result<(), Mismatch> {
    if name == EXPERT_HEAD {
        mapping.skip(stored, "the expert's output head is never used");
        return Ok(());
    }
    mapping.insert(name, stored)
}

/// Serves the token table as the embedding, whichever of its two names the file has. Where both
/// are there (LeRobot does not tie them) the head is untrained and the embedding counts.
pub(super) fn resolve_tie(mapping: &mut Mapping) {
    let Some(head) = mapping.used.remove(LM_HEAD) else { return };
    if mapping.used.contains_key(EMBED) {
        mapping.skip(&head, "the language head is not used; the token table is `embed_tokens`");
    } else {
        mapping.used.insert(EMBED.to_string(), head);
    }
}
