//! The values an observation or an answer is made of: what msgpack-numpy can carry.

/// NumPy element types that cross the wire (`dtype.str` without the byte order).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// `|b1`
    Bool,
    /// `|i1`
    I8,
    /// `<i2`
    I16,
    /// `<i4`
    I32,
    /// `<i8`
    I64,
    /// `|u1`
    U8,
    /// `<u2`
    U16,
    /// `<u4`
    U32,
    /// `<u8`
    U64,
    /// `<f2`
    F16,
    /// `<f4`
    F32,
    /// `<f8`
    F64,
    /// `<Un`: n code points per element, UCS-4 little-endian, zero padded.
    Unicode(usize),
    /// `|Sn`: n bytes per element, zero padded.
    Bytes(usize),
}

/// An n-dimensional array: C order, little-endian, `data.len() == product(shape) * itemsize`
/// (whoever builds one checks this with overflow-safe arithmetic).
#[derive(Clone, Debug, PartialEq)]
pub struct NdArray {
    /// Element type.
    pub dtype: Scalar,
    /// Extents, outermost first; empty for a 0-d array.
    pub shape: Vec<usize>,
    /// Little-endian elements (big-endian input is swapped by the decoder). `Bytes` so that an
    /// image can stay in the frame it came in.
    pub data: bytes::Bytes,
}

/// One value of an observation, a metadata map or an answer. Maps keep their order.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// None.
    Nil,
    /// A boolean.
    Bool(bool),
    /// An integer; wide enough for every msgpack integer.
    Int(i128),
    /// A float; msgpack float32 is widened.
    Float(f64),
    /// Text.
    Str(String),
    /// Raw bytes.
    Bytes(bytes::Bytes),
    /// A NumPy array.
    Array(NdArray),
    /// A NumPy scalar: a 0-d value with its type.
    Scalar(Scalar, Box<Value>),
    /// A list or tuple.
    List(Vec<Value>),
    /// A map with text keys, in order.
    Map(Vec<(String, Value)>),
}
