//! Contract card → a client in Python and one in C++ that send a request of the right form.

use serde::Serialize;

use super::{Contract, Field, Kind, SAMPLE_PROMPT};

/// Complete programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Samples {
    /// With openpi's own client.
    pub python: String,
    /// C++17 with nothing but sockets.
    pub cpp: String,
}

/// A map of a request: fields, and maps inside.
enum Node<'a> {
    Leaf(&'a Field),
    Map(Vec<(&'a str, Node<'a>)>),
}

pub(super) fn samples(contract: &Contract) -> Samples {
    let mut root = Vec::new();
    for field in &contract.observation {
        insert(&mut root, &field.path, field);
    }
    let actions = &contract.response[0];
    let meaning = format!("float64 [{}]: {}", actions.shape.join(", "), line(&actions.meaning));
    let prompt = contract.prompt.default.as_deref().unwrap_or(SAMPLE_PROMPT);
    let mut cpp = String::new();
    write_cpp(&root, prompt, &mut cpp);
    Samples {
        python: include_str!("client.py")
            .replace("@OBSERVATION@", &write_python(&root, prompt, 0))
            .replace("@MEANING@", &meaning),
        cpp: include_str!("client.cpp")
            .replace("@OBSERVATION@", cpp.trim_end())
            .replace("@DIMS@", actions.shape.last().map_or("1", String::as_str))
            .replace("@MEANING@", &meaning),
    }
}

fn insert<'a>(map: &mut Vec<(&'a str, Node<'a>)>, path: &'a [String], field: &'a Field) {
    match path {
        [] => {}
        [key] => map.push((key, Node::Leaf(field))),
        [key, inner @ ..] => {
            let at = map.iter().position(|(known, _)| known == key).unwrap_or_else(|| {
                map.push((key, Node::Map(Vec::new())));
                map.len() - 1
            });
            if let Node::Map(nested) = &mut map[at].1 {
                insert(nested, inner, field);
            }
        }
    }
}

fn write_python(map: &[(&str, Node<'_>)], prompt: &str, depth: usize) -> String {
    let indent = "    ".repeat(depth + 1);
    let mut out = String::from("{\n");
    for (key, node) in map {
        let (value, comment) = match node {
            Node::Map(inner) => (write_python(inner, prompt, depth + 1), String::new()),
            Node::Leaf(field) if field.kind == Kind::Text => (quoted(prompt), comment(field)),
            Node::Leaf(field) => {
                let extents = field.sample_shape();
                let comma = if extents.len() == 1 { "," } else { "" };
                let shape = format!("({}{comma})", join(&extents));
                (format!("np.zeros({shape}, dtype=np.{})", field.dtype), comment(field))
            }
        };
        let comment = if comment.is_empty() { comment } else { format!("  # {comment}") };
        out.push_str(&format!("{indent}{}: {value},{comment}\n", quoted(key)));
    }
    out.push_str(&"    ".repeat(depth));
    out.push('}');
    out
}

fn write_cpp(map: &[(&str, Node<'_>)], prompt: &str, out: &mut String) {
    out.push_str(&format!("    request.map({});\n", map.len()));
    for (key, node) in map {
        out.push_str(&format!("    request.text({});", quoted(key)));
        match node {
            Node::Map(inner) => {
                out.push('\n');
                write_cpp(inner, prompt, out);
            }
            Node::Leaf(field) => {
                let value = match field.kind {
                    Kind::Text => format!("request.text({});", quoted(prompt)),
                    _ => {
                        let extents = field.sample_shape();
                        let count: usize = extents.iter().product();
                        let (dtype, element) = match field.dtype {
                            "uint8" => ("|u1", "std::uint8_t"),
                            _ => ("<f8", "double"),
                        };
                        let shape = join(&extents);
                        let values = format!("std::vector<{element}>({count})");
                        format!("request.array({{{shape}}}, \"{dtype}\", {values});")
                    }
                };
                out.push_str(&format!("  // {}\n    {value}\n", comment(field)));
            }
        }
    }
}

fn join(extents: &[usize]) -> String {
    extents.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

fn comment(field: &Field) -> String {
    let optional = if field.required { "" } else { " (may be left out)" };
    format!("{}{optional}", line(&field.meaning))
}

/// On one line: what comes from a user's file must not end a comment.
fn line(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    // A backslash at its end would continue a C++ comment.
    text.trim_end_matches('\\').to_string()
}

/// A string literal of both languages.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use crate::config::named;
    use crate::contract::contract;

    #[test]
    fn samples_send_what_the_card_asks_for() {
        let aloha = contract(&named("pi0_aloha").unwrap()).samples;
        let image = "\"cam_high\": np.zeros((3, 224, 224), dtype=np.uint8),";
        assert!(aloha.python.contains(image), "{}", aloha.python);
        assert!(aloha.python.contains("\"images\": {\n        \"cam_high\""), "{}", aloha.python);
        assert!(aloha.python.contains("\"state\": np.zeros((14,), dtype=np.float64),"));
        assert!(aloha.python.contains("pip install openpi-client typing_extensions\n"));
        assert!(aloha.cpp.contains("    request.text(\"images\");\n    request.map(3);\n"));
        assert!(aloha.cpp.contains("{14}, \"<f8\", std::vector<double>(14)"), "{}", aloha.cpp);
        assert!(aloha.cpp.contains("const std::size_t dims = 14;"));
        for text in [aloha.python, aloha.cpp] {
            assert!(!text.contains('@'), "every place is filled: {text}");
        }
    }

    #[test]
    fn what_a_users_file_says_can_not_leave_its_line_or_string() {
        let mut config = named("pi0_libero").unwrap();
        config.default_prompt = Some("say \"hi\\\"\nimport os".into());
        let samples = contract(&config).samples;
        let literal = r#""say \"hi\\\" import os""#;
        assert!(samples.python.contains(literal) && samples.cpp.contains(literal));
        assert_eq!(super::line("a\nb\\"), "a b");
    }
}
