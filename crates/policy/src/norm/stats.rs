//! Statistics of states and actions, from openpi's `norm_stats.json` or LeRobot's named tensors.

use super::NormError;
use crate::file::read_file;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::Path;

/// Largest `norm_stats.json` accepted; real ones are a few kilobytes.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// Most numbers of one statistic.
const MAX_NUMBERS: usize = 1 << 16;
/// The statistics that some mode reads; openpi knows the first four.
const STATISTICS: [&str; 8] = ["mean", "std", "q01", "q99", "min", "max", "q10", "q90"];
const OPENPI: &[&str] = STATISTICS.split_at(4).0;

/// Statistics of one feature, each a vector over its dimensions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FeatureStats(BTreeMap<String, Vec<f64>>);

impl FeatureStats {
    /// One statistic (`mean`, `std`, `q01` …), if the file has it.
    pub fn get(&self, statistic: &str) -> Option<&Vec<f64>> {
        self.0.get(statistic)
    }

    /// Sets one statistic.
    pub fn set(&mut self, statistic: &str, values: Vec<f64>) {
        self.0.insert(statistic.into(), values);
    }

    /// The statistics present, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[f64])> {
        self.0.iter().map(|(name, values)| (name.as_str(), values.as_slice()))
    }
}

/// Statistics by feature: `state` and `actions`. Empty means nothing is normalised.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NormStats {
    features: BTreeMap<String, FeatureStats>,
}

impl NormStats {
    /// One feature's statistics.
    pub fn get(&self, feature: &str) -> Option<&FeatureStats> {
        self.features.get(feature)
    }

    /// Sets one feature's statistics.
    pub fn set(&mut self, feature: &str, stats: FeatureStats) {
        self.features.insert(feature.into(), stats);
    }

    /// Names of the features covered.
    pub fn features(&self) -> impl Iterator<Item = &str> {
        self.features.keys().map(String::as_str)
    }

    /// Reads `assets/<asset_id>/norm_stats.json` below a checkpoint directory.
    pub fn load(checkpoint: &Path, asset_id: &str) -> Result<NormStats, NormError> {
        NormStats::from_file(&checkpoint.join("assets").join(asset_id).join("norm_stats.json"))
    }

    /// Reads one `norm_stats.json`.
    pub fn from_file(path: &Path) -> Result<NormStats, NormError> {
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => NormError::NotFound(path.into()),
            _ => NormError::Io { path: path.into(), error },
        };
        NormStats::from_json(&read_file(path, MAX_FILE_BYTES).map_err(failed)?)
    }

    /// Parses `norm_stats.json`. Python's `NaN` and `Infinity` are numbers, an absent or null
    /// statistic is absent, unknown keys are ignored. So are `min`, `max`, `q10` and `q90`, which
    /// openpi does not know, where they are no lists of numbers.
    pub fn from_json(bytes: &[u8]) -> Result<NormStats, NormError> {
        let malformed = |what: String| NormError::Malformed(what);
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(malformed(format!("more than {MAX_FILE_BYTES} bytes")));
        }
        let text = std::str::from_utf8(bytes).map_err(|e| malformed(e.to_string()))?;
        let json: Json =
            serde_json::from_str(&quote_non_finite(text)).map_err(|e| malformed(e.to_string()))?;
        let Some(Json::Object(features)) = json.get("norm_stats") else {
            return Err(malformed("the top-level key `norm_stats` is missing".into()));
        };
        let mut stats = NormStats::default();
        for (feature, entry) in features {
            let Json::Object(entry) = entry else {
                return Err(malformed(format!("`{feature}` is no object")));
            };
            let mut read = FeatureStats::default();
            for name in STATISTICS {
                let Some(values) = entry.get(name).filter(|values| !values.is_null()) else {
                    continue;
                };
                match numbers(values) {
                    Some(values) => read.set(name, values),
                    None if OPENPI.contains(&name) => {
                        let what = format!("`{feature}.{name}` is no list of numbers");
                        return Err(malformed(what));
                    }
                    None => {}
                }
            }
            for name in ["mean", "std"] {
                if read.get(name).is_none() {
                    return Err(malformed(format!("`{feature}.{name}` is missing")));
                }
            }
            stats.set(feature, read);
        }
        Ok(stats)
    }

    /// From LeRobot's processor tensors, named `<feature>.<statistic>` (split at the last dot):
    /// `observation.state` becomes `state`, `action` becomes `actions`, others are left out.
    pub fn from_lerobot<'a>(
        tensors: impl IntoIterator<Item = (&'a str, Vec<f32>)>,
    ) -> Result<NormStats, NormError> {
        let mut stats = NormStats::default();
        for (name, values) in tensors {
            let Some((feature, statistic)) = name.rsplit_once('.') else { continue };
            let feature = match feature {
                "observation.state" => "state",
                "action" => "actions",
                _ => continue,
            };
            if values.len() > MAX_NUMBERS {
                return Err(NormError::Malformed(format!("`{name}` has {} numbers", values.len())));
            }
            if STATISTICS.contains(&statistic) {
                let values = values.into_iter().map(f64::from).collect();
                stats.features.entry(feature.into()).or_default().set(statistic, values);
            }
        }
        Ok(stats)
    }
}

fn numbers(json: &Json) -> Option<Vec<f64>> {
    let list = json.as_array()?;
    if list.len() > MAX_NUMBERS {
        return None;
    }
    list.iter()
        .map(|item| match item {
            Json::Number(n) => n.as_f64(),
            Json::String(s) if s == "NaN" => Some(f64::NAN),
            Json::String(s) if s == "Infinity" => Some(f64::INFINITY),
            Json::String(s) if s == "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        })
        .collect()
}

/// Puts quotes around the literals `NaN`, `Infinity`, `-Infinity` outside of strings, which
/// Python's writer produces and JSON does not have.
fn quote_non_finite(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if !in_string {
            let literal =
                ["NaN", "Infinity", "-Infinity"].into_iter().find(|l| rest.starts_with(l));
            if let Some(literal) = literal {
                out.extend(["\"", literal, "\""]);
                rest = &rest[literal.len()..];
                continue;
            }
        }
        match c {
            _ if escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ => {}
        }
        out.push(c);
        rest = &rest[c.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pythons_json_is_read() {
        let text = r#"{"norm_stats": {"state": {"mean": [1, NaN], "std": [-Infinity, Infinity],
            "q01": null, "min": {"of": 3}, "q10": [null], "max": [2],
            "note \" NaN": "NaN"}}, "extra": 1}"#;
        let stats = NormStats::from_json(text.as_bytes()).unwrap();
        let state = stats.get("state").unwrap();
        assert_eq!(state.get("mean").unwrap()[0], 1.0);
        assert!(state.get("mean").unwrap()[1].is_nan());
        assert_eq!(state.get("std").unwrap(), &[f64::NEG_INFINITY, f64::INFINITY]);
        assert_eq!(state.get("max").unwrap(), &[2.0]);
        assert!(["q01", "min", "q10"].iter().all(|name| state.get(name).is_none()));
        assert!(stats.get("actions").is_none());
    }

    #[test]
    fn what_is_missing_is_named() {
        for (text, word) in [
            ("{}", "norm_stats"),
            ("[1", "EOF"),
            (r#"{"norm_stats": {"state": 1}}"#, "state"),
            (r#"{"norm_stats": {"state": {"mean": [1]}}}"#, "state.std"),
            (r#"{"norm_stats": {"state": {"mean": ["1"], "std": [1]}}}"#, "state.mean"),
            (r#"{"norm_stats": {"state": {"mean": [1], "std": [1], "q99": 1}}}"#, "state.q99"),
        ] {
            let error = NormStats::from_json(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
        assert!(NormStats::from_json(&[0xff]).is_err());
        let error = NormStats::load(Path::new("nowhere"), "a/b").unwrap_err().to_string();
        assert!(error.starts_with("Norm stats file not found at: nowhere"), "{error}");
    }

    #[test]
    fn lerobots_names() {
        let stats = NormStats::from_lerobot([
            ("observation.state.mean", vec![1.0]),
            ("action.q99", vec![2.0]),
            ("observation.images.top.mean", vec![3.0]),
            ("action.count", vec![4.0]),
        ])
        .unwrap();
        assert_eq!(stats.features().collect::<Vec<_>>(), ["actions", "state"]);
        assert_eq!(stats.get("actions").unwrap().get("q99").unwrap(), &[2.0]);
        assert!(stats.get("actions").unwrap().get("count").is_none());
    }
}
