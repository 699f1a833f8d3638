//! Contract card → the lines a server prints when it has loaded a policy.

use super::{Contract, Field};

impl Contract {
    /// The card's main lines, for people: the policy, how numbers are normalised, every key of a
    /// request and what comes back.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "policy {}: {} ({} processing), {} Euler steps, prompt of at most {} tokens{}",
            self.policy,
            self.family,
            self.processing,
            self.model.steps,
            self.prompt.max_tokens,
            if self.prompt.state_reaches_model {
                ""
            } else {
                ", the state does not reach the model"
            },
        )];
        let norm = &self.normalisation;
        let relative = match norm.relative_columns.len() {
            0 => "actions absolute".to_string(),
            n => format!("{n} action columns relative to the state"),
        };
        lines.push(format!(
            "asset {}: state {}, actions {}; {relative}",
            norm.asset_id.as_deref().unwrap_or("none"),
            over(norm.state, norm.state_covered),
            over(norm.actions, norm.actions_covered),
        ));
        lines.extend(self.observation.iter().map(|field| format!("takes {}", one(field))));
        lines.extend(self.response.first().map(|field| format!("gives {}", one(field))));
        lines
    }
}

fn over(mode: &str, covered: Option<usize>) -> String {
    covered.map_or_else(|| mode.into(), |n| format!("{mode} over {n}"))
}

fn one(field: &Field) -> String {
    let shape = if field.shape.is_empty() {
        String::new()
    } else {
        format!(" [{}]", field.shape.join(", "))
    };
    let optional = if field.required { "" } else { " (may be left out)" };
    format!("{} {}{shape}{optional}: {}", field.path.join(" › "), field.dtype, field.meaning)
}

#[cfg(test)]
mod tests {
    use crate::config::named;
    use crate::contract::contract;

    #[test]
    fn the_lines_name_what_a_robot_must_send() {
        let lines = contract(&named("pi0_aloha").unwrap()).lines();
        assert_eq!(
            lines[..2],
            [
                "policy pi0_aloha: pi0 (openpi processing), 10 Euler steps, prompt of at most 48 \
                 tokens",
                "asset trossen: state z_score, actions z_score; 12 action columns relative to the \
                 state",
            ]
        );
        let camera = "takes images › cam_left_wrist uint8 [3, height, width] (may be left out): \
            camera on the left wrist";
        assert!(lines.contains(&camera.to_string()), "{lines:#?}");
        assert!(lines.last().unwrap().starts_with("gives actions float64 [50, 14]: targets"));
    }
}
