//! `RemotePolicyConfig`: what a robot calls its motors and cameras → how it fits the policy.

use pirouette_policy::{PolicyConfig, Value};

use super::fit::Fit;
use super::wire::Status;
use crate::pickle::{Class, Instance};
use crate::seldom::Seldom;

/// A robot that fits the policy.
#[derive(Debug, Default)]
pub(super) struct Setup {
    /// Most actions of a chunk that the client wants.
    pub(super) actions_per_chunk: usize,
    pub(super) fit: Fit,
}

/// What a client says of its robot, in LeRobot's names of features.
#[derive(Debug, Default)]
pub(super) struct Features {
    /// `observation.state` and the like: the names of their numbers, in order.
    pub(super) vectors: Vec<(String, Vec<String>)>,
    /// `observation.images.NAME`.
    pub(super) cameras: Vec<String>,
    /// Other names that the client's policy would have for them.
    pub(super) renames: Vec<(String, String)>,
}

/// Reads what a client wants, and whether it can have it from this policy.
///
/// # Errors
/// What is wrong, and what would be right.
pub(super) fn read(wanted: &Instance, config: &PolicyConfig) -> Result<Setup, Status> {
    if wanted.class != Class::RemotePolicyConfig {
        let found = wanted.class.name();
        return Err(Status::invalid(format!("a RemotePolicyConfig was expected, not a {found}")));
    }
    let field = |name: &str| {
        let found = wanted.fields.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        found.ok_or_else(|| Status::invalid(format!("RemotePolicyConfig has no `{name}`")))
    };
    let served = config.family.name();
    match field("policy_type")? {
        Value::Str(kind) if kind == served => {}
        other => {
            let shown = shown(other);
            let text = format!(
                "this server's policy is of type {served}, not {shown}: start the client with \
                 --policy_type={served}, or the server with another checkpoint"
            );
            return Err(Status::invalid(text));
        }
    }
    let actions_per_chunk = match field("actions_per_chunk")? {
        Value::Int(n) => usize::try_from(*n).ok().filter(|n| *n > 0),
        _ => None,
    };
    let actions_per_chunk = actions_per_chunk
        .ok_or_else(|| Status::invalid("`actions_per_chunk` must be a whole number above 0"))?;
    let mut features = features(field("lerobot_features")?)?;
    // Older clients don't have it.
    if let Ok(renames) = field("rename_map") {
        features.renames = renames_of(renames)?;
    }
    let fit = Fit::new(&features, config)?;
    static LINE: Seldom = Seldom::new();
    if let Some(unsaid) = LINE.pass() {
        tracing::info!(
            unsaid,
            "a LeRobot robot is served by {}: `{}` on {}, which it asked for, is not loaded",
            config.name,
            field("pretrained_name_or_path").map_or_else(|_| String::new(), shown),
            field("device").map_or_else(|_| String::new(), shown),
        );
    }
    Ok(Setup { actions_per_chunk, fit })
}

/// A value that should have been a short text.
fn shown(value: &Value) -> String {
    match value {
        Value::Str(text) => text.chars().take(80).flat_map(char::escape_default).collect(),
        other => other.python_type().into(),
    }
}

/// Features of the observation: vectors of floats, and cameras. LeRobot ignores the others too.
fn features(value: &Value) -> Result<Features, Status> {
    let Value::Map(map) = value else {
        return Err(Status::invalid("`lerobot_features` must be a dictionary"));
    };
    let mut out = Features::default();
    for (key, feature) in map.iter().filter(|(key, _)| key.starts_with("observation.")) {
        let wrong = |what: &str| Status::invalid(format!("feature `{}` {what}", text(key)));
        let Some(Value::Str(dtype)) = feature.get("dtype") else {
            return Err(wrong("has no `dtype`"));
        };
        let axes = match feature.get("shape") {
            Some(Value::List(shape)) => shape.len(),
            _ => return Err(wrong("has no `shape`")),
        };
        match dtype.as_str() {
            "float32" if axes == 1 => {
                let names = match feature.get("names") {
                    Some(Value::List(names)) => names.iter().map(owned).collect(),
                    _ => None,
                };
                let names = names.ok_or_else(|| wrong("has no list of `names`"))?;
                out.vectors.push((key.clone(), names));
            }
            "image" | "video" => out.cameras.push(key.clone()),
            _ => tracing::debug!(feature = text(key), dtype = text(dtype), "ignored"),
        }
    }
    Ok(out)
}

fn renames_of(value: &Value) -> Result<Vec<(String, String)>, Status> {
    let pairs = match value {
        Value::Map(map) => map.iter().map(|(from, to)| Some((from.clone(), owned(to)?))).collect(),
        Value::Nil => Some(vec![]),
        _ => None,
    };
    pairs.ok_or_else(|| Status::invalid("`rename_map` must be a dictionary of texts"))
}

fn owned(value: &Value) -> Option<String> {
    match value {
        Value::Str(text) => Some(text.clone()),
        _ => None,
    }
}

/// A client's text for a log or a message: short, and no control characters.
pub(super) fn text(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_default).collect()
}
