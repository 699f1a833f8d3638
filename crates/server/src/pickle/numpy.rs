//! NumPy's own pickling functions as data: element types, arrays, scalars.

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};

use super::machine::{Global, Id, Node, text_of};

/// Most axes of an array.
const MAX_AXES: usize = 8;

/// Most arguments of a call, or parts of a state: an element type's has 8, and 9 with metadata.
pub(super) const MAX_ARGUMENTS: usize = 9;

pub(super) const UNKNOWN_FORM: &str = "it is not put together as NumPy 1 and 2 do";

const COLUMNS_FIRST: &str = "it lies in Fortran's order: send numpy.ascontiguousarray of it";

/// What a named function would have given.
pub(super) fn call(global: &Global, arguments: &[&Node], nodes: &[Node]) -> Result<Node, String> {
    match (global, arguments) {
        (Global::Dtype, [Node::Text(code), ..]) => Ok(Node::Dtype(scalar_of(&text_of(code))?)),
        (Global::Reconstruct, [Node::Global(Global::Ndarray), ..]) => Ok(Node::ArrayToFill),
        (Global::Scalar, [Node::Dtype(dtype), Node::Bytes(data)]) => {
            let array = array(*dtype, vec![], data.clone())?;
            let number = array.to_f64().and_then(|numbers| numbers.first().copied());
            let number = number.ok_or("a scalar without a number")?;
            let value = match dtype {
                Scalar::Bool => Value::Bool(number != 0.0),
                Scalar::F32 | Scalar::F64 => Value::Float(number),
                _ => Value::Int(number as i128),
            };
            Ok(Node::Scalar(*dtype, value))
        }
        (
            Global::FromBuffer,
            [Node::Bytes(data), Node::Dtype(dtype), Node::Tuple(shape), Node::Text(layout)],
        ) => {
            if layout != "C" {
                return Err(COLUMNS_FIRST.into());
            }
            array(*dtype, shape_of(shape, nodes)?, data.clone()).map(Node::Array)
        }
        _ => Err(UNKNOWN_FORM.into()),
    }
}

/// An element type with its byte order, or an array with its content.
pub(super) fn fill(object: &Node, state: &[&Node], nodes: &[Node]) -> Result<Node, String> {
    match (object, state) {
        (Node::Dtype(dtype), [Node::Int(_), Node::Text(order), ..]) => match &order[..] {
            b"<" | b"|" => Ok(Node::Dtype(*dtype)),
            _ => Err("it is not little-endian".into()),
        },
        (
            Node::ArrayToFill,
            [
                Node::Int(_),
                Node::Tuple(shape),
                Node::Dtype(dtype),
                Node::Bool(fortran),
                Node::Bytes(data),
            ],
        ) => {
            if *fortran {
                return Err(COLUMNS_FIRST.into());
            }
            array(*dtype, shape_of(shape, nodes)?, data.clone()).map(Node::Array)
        }
        _ => Err(UNKNOWN_FORM.into()),
    }
}

fn scalar_of(code: &str) -> Result<Scalar, String> {
    Ok(match code {
        "b1" => Scalar::Bool,
        "u1" => Scalar::U8,
        "i8" => Scalar::I64,
        "f4" => Scalar::F32,
        "f8" => Scalar::F64,
        _ => {
            let shown: String = code.chars().take(20).collect();
            return Err(format!(
                "element type `{shown}` is not read: bool, uint8, int64, float32 and float64 are"
            ));
        }
    })
}

fn shape_of(ids: &[Id], nodes: &[Node]) -> Result<Vec<usize>, String> {
    if ids.len() > MAX_AXES {
        return Err(format!("it has {} axes, at most {MAX_AXES} are read", ids.len()));
    }
    let extent = |id: &Id| match nodes[*id] {
        Node::Int(n) => usize::try_from(n).ok(),
        _ => None,
    };
    let shape: Option<Vec<usize>> = ids.iter().map(extent).collect();
    shape.ok_or_else(|| "its shape is not made of whole numbers".into())
}

/// Its bytes stay where they are: an array that many references share costs no more than one.
fn array(dtype: Scalar, shape: Vec<usize>, data: Bytes) -> Result<NdArray, String> {
    let array = NdArray { dtype, shape, data };
    if !array.is_consistent() {
        let (shape, bytes) = (&array.shape, array.data.len());
        return Err(format!(
            "{bytes} bytes do not fill shape {shape:?} of {}",
            dtype.type_string()
        ));
    }
    Ok(array)
}
