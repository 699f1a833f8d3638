//! The pickles of LeRobot's robot client → values, and actions → a pickle it can load.
//!
//! A pickle is a program for a stack machine. This reader knows those of its instructions that
//! build plain data, and by name the few classes and functions that LeRobot's messages are made
//! of: they are data here, nothing is ever imported or called. Everything else is refused.

mod machine;
mod numpy;
mod resolve;
mod write;

use bytes::Bytes;
use pirouette_policy::Value;

pub use write::{TimedActions, write_actions};

/// Bounds on what one pickle may contain. They bound the memory it can cost beside its own bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nested containers (default 16).
    pub depth: usize,
    /// Keys of one dictionary (default 256).
    pub map_keys: usize,
    /// Values pushed while reading, and values of the result (default 65,536).
    pub values: usize,
    /// Remembered values (default 65,536).
    pub memo: usize,
    /// Bytes of all text in the result (default 1 MiB): a string may be referred to many times.
    pub text_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { depth: 16, map_keys: 256, values: 1 << 16, memo: 1 << 16, text_bytes: 1 << 20 }
    }
}

/// The classes of LeRobot that a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// What the client wants of the server.
    RemotePolicyConfig,
    /// One observation.
    TimedObservation,
}

impl Class {
    const ALL: [Class; 2] = [Class::RemotePolicyConfig, Class::TimedObservation];

    /// Its name in Python.
    pub fn name(self) -> &'static str {
        match self {
            Class::RemotePolicyConfig => "RemotePolicyConfig",
            Class::TimedObservation => "TimedObservation",
        }
    }
}

/// What a pickle holds: an object with its attributes.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    /// Where the client has its class; the answer's classes are in the same module.
    pub module: String,
    /// Its class.
    pub class: Class,
    /// Its attributes in their order.
    pub fields: Vec<(String, Value)>,
}

/// Why a pickle could not be read. `offset` is where in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// The pickle ends in the middle of an instruction, or without its last one.
    #[error("the pickle ends at byte {offset}, before it is complete")]
    Truncated {
        /// Length of the pickle.
        offset: usize,
    },
    /// Bytes after the end.
    #[error("{extra} bytes follow the pickle, which ends at byte {offset}")]
    Trailing {
        /// End of the pickle.
        offset: usize,
        /// How many bytes follow.
        extra: usize,
    },
    /// No pickle at all, or one of another protocol.
    #[error("pickle protocol {found} is not read here: 4 and 5 are (Python 3.8 and later)")]
    Protocol {
        /// The protocol, or the first byte of what is no pickle.
        found: u8,
    },
    /// An instruction that plain data does not need.
    #[error(
        "pickle instruction {opcode:#04x} at byte {offset} is refused: numbers, text, lists, \
         dictionaries and NumPy arrays are read"
    )]
    Opcode {
        /// Where.
        offset: usize,
        /// The instruction.
        opcode: u8,
    },
    /// A class or function that no message of LeRobot's needs.
    #[error(
        "`{module}.{name}` (byte {offset}) is refused: a pickle may name LeRobot's \
         TimedObservation and RemotePolicyConfig and NumPy's arrays; turn everything else into \
         numbers, text or arrays before it is sent"
    )]
    Global {
        /// Where.
        offset: usize,
        /// Its module, shortened.
        module: String,
        /// Its name, shortened.
        name: String,
    },
    /// An instruction that finds other things on the stack than it needs.
    #[error("pickle instruction {opcode:#04x} at byte {offset} does not fit what is before it")]
    Stack {
        /// Where.
        offset: usize,
        /// The instruction.
        opcode: u8,
    },
    /// A reference to something that was not remembered.
    #[error("byte {offset} refers to remembered value {index}, which does not exist")]
    Memo {
        /// Where.
        offset: usize,
        /// The number.
        index: usize,
    },
    /// A string is not UTF-8.
    #[error("the string at byte {offset} is not UTF-8")]
    Utf8 {
        /// Where.
        offset: usize,
    },
    /// Too many nested containers.
    #[error("more than {limit} nested containers")]
    Depth {
        /// The limit.
        limit: usize,
    },
    /// Too many of something.
    #[error("too many {what}: at most {limit} are accepted")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// A NumPy value that is none, or of a kind that is not read.
    #[error("the NumPy value before byte {offset}: {reason}")]
    Numpy {
        /// Where it is put together.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The values are there, but are not what a message is made of.
    #[error("{0}")]
    Content(String),
}

/// Reads one object. Arrays keep their bytes in `pickle`.
///
/// # Errors
/// The first thing that is wrong with it. Never panics, whatever the bytes.
pub fn read(pickle: &Bytes, limits: &Limits) -> Result<Instance, PickleError> {
    let (nodes, root) = machine::run(pickle, limits)?;
    resolve::instance(&nodes, root, limits)
}
