//! Nodes → a tree of values. What is referred to many times is counted every time.

use pirouette_policy::Value;

use super::machine::{Id, Node, text_of};
use super::{Instance, Limits, PickleError};

struct Resolver<'a> {
    nodes: &'a [Node],
    values: usize,
    text_bytes: usize,
    limits: &'a Limits,
}

/// The object a pickle is about.
pub(super) fn instance(nodes: &[Node], root: Id, limits: &Limits) -> Result<Instance, PickleError> {
    let Node::Instance(module, class, Some(fields)) = &nodes[root] else {
        let text = "the pickle holds no TimedObservation or RemotePolicyConfig of LeRobot's";
        return Err(PickleError::Content(text.into()));
    };
    let mut resolver = Resolver { nodes, values: 0, text_bytes: 0, limits };
    match resolver.value(*fields, 0)? {
        Value::Map(fields) => Ok(Instance { module: module.clone(), class: *class, fields }),
        _ => Err(PickleError::Content(format!("{} has no attributes", class.name()))),
    }
}

impl Resolver<'_> {
    fn value(&mut self, id: Id, depth: usize) -> Result<Value, PickleError> {
        let limit = self.limits.values;
        self.values += 1;
        if self.values > limit {
            return Err(PickleError::TooMany { what: "values", limit });
        }
        let limit = self.limits.depth;
        if depth > limit {
            return Err(PickleError::Depth { limit });
        }
        let nodes = self.nodes;
        Ok(match &nodes[id] {
            Node::None => Value::Nil,
            Node::Bool(b) => Value::Bool(*b),
            Node::Int(n) => Value::Int((*n).into()),
            Node::Float(x) => Value::Float(*x),
            Node::Text(bytes) => Value::Str(self.text(bytes)?),
            Node::Bytes(bytes) => Value::Bytes(bytes.clone()),
            Node::List(ids) | Node::Tuple(ids) => {
                let mut items = Vec::with_capacity(ids.len().min(16));
                for id in ids {
                    items.push(self.value(*id, depth + 1)?);
                }
                Value::List(items)
            }
            Node::Dict(entries) => self.map(entries, depth)?,
            Node::Array(array) => Value::Array(array.clone()),
            Node::Scalar(dtype, value) => Value::Scalar(*dtype, Box::new(value.clone())),
            Node::Global(_) | Node::Instance(..) | Node::Dtype(..) | Node::ArrayToFill => {
                let text = "a class, an element type or an unfinished object stands where data \
                            should: send numbers, text and arrays";
                return Err(PickleError::Content(text.into()));
            }
        })
    }

    fn text(&mut self, bytes: &bytes::Bytes) -> Result<String, PickleError> {
        let limit = self.limits.text_bytes;
        self.text_bytes = self.text_bytes.saturating_add(bytes.len());
        if self.text_bytes > limit {
            return Err(PickleError::TooMany { what: "bytes of text", limit });
        }
        Ok(text_of(bytes))
    }

    fn map(&mut self, entries: &[(Id, Id)], depth: usize) -> Result<Value, PickleError> {
        let limit = self.limits.map_keys;
        if entries.len() > limit {
            return Err(PickleError::TooMany { what: "keys of a dictionary", limit });
        }
        let mut map: Vec<(String, Value)> = Vec::with_capacity(entries.len().min(16));
        for (key, value) in entries {
            let Node::Text(key) = &self.nodes[*key] else {
                let text = "a key of a dictionary is no text";
                return Err(PickleError::Content(text.into()));
            };
            let (key, value) = (self.text(key)?, self.value(*value, depth + 1)?);
            // As in Python: the last value wins, at the first one's place.
            match map.iter_mut().find(|(known, _)| *known == key) {
                Some((_, old)) => *old = value,
                None => map.push((key, value)),
            }
        }
        Ok(Value::Map(map))
    }
}
