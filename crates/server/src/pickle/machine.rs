//! A pickle's instructions → nodes that refer to each other by number.
//!
//! Containers are remembered before they are filled, so values are nodes of an arena and not a
//! tree: [`super::resolve`] makes the tree, with its bounds.

use bytes::Bytes;
use pirouette_policy::{NdArray, Scalar, Value};

use super::numpy;
use super::{Class, Limits, PickleError};

/// Number of a node.
pub(super) type Id = usize;

/// A value on the machine's stack.
#[derive(Clone, Debug)]
pub(super) enum Node {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    /// UTF-8, checked.
    Text(Bytes),
    Bytes(Bytes),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function that was named.
    Global(Global),
    /// An object of LeRobot's and the node of its attributes, once it has them.
    Instance(String, Class, Option<Id>),
    /// Little-endian.
    Dtype(Scalar),
    /// An array that gets its content next.
    ArrayToFill,
    Array(NdArray),
    Scalar(Scalar, Value),
}

/// What a pickle may name.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Global {
    /// In a module of LeRobot's.
    Class(String, Class),
    Ndarray,
    Dtype,
    Reconstruct,
    FromBuffer,
    Scalar,
}

/// Longest name of a module or class, in bytes.
const MAX_NAME: usize = 128;

impl Global {
    /// NumPy's inner modules lost an underscore's worth of privacy in version 2; LeRobot's move
    /// with every release.
    fn find(module: &str, name: &str) -> Option<Global> {
        let inner = |last: &str| {
            let rest = module.strip_prefix("numpy._core.");
            rest.or_else(|| module.strip_prefix("numpy.core.")) == Some(last)
        };
        Some(match name {
            "ndarray" if module == "numpy" => Global::Ndarray,
            "dtype" if module == "numpy" => Global::Dtype,
            "_reconstruct" if inner("multiarray") => Global::Reconstruct,
            "scalar" if inner("multiarray") => Global::Scalar,
            "_frombuffer" if inner("numeric") => Global::FromBuffer,
            _ => {
                let class = Class::ALL.into_iter().find(|class| class.name() == name)?;
                let lerobot = module == "lerobot" || module.starts_with("lerobot.");
                let plain = module.bytes().all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b));
                (lerobot && plain && module.len() <= MAX_NAME)
                    .then(|| Global::Class(module.into(), class))?
            }
        })
    }
}

pub(super) struct Machine<'a> {
    pickle: &'a Bytes,
    /// Never beyond the end.
    at: usize,
    /// Start of the instruction at hand, and the instruction.
    offset: usize,
    opcode: u8,
    pub(super) nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: Vec<Id>,
    /// Values pushed so far.
    pushed: usize,
    limits: &'a Limits,
}

/// Runs a pickle to its end: its nodes, and which of them is the result.
pub(super) fn run(pickle: &Bytes, limits: &Limits) -> Result<(Vec<Node>, Id), PickleError> {
    let mut machine = Machine {
        pickle,
        at: 0,
        offset: 0,
        opcode: 0,
        nodes: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: Vec::new(),
        pushed: 0,
        limits,
    };
    match machine.take(2)?[..] {
        [0x80, 4 | 5] => {}
        [0x80, found] | [found, ..] => return Err(PickleError::Protocol { found }),
        [] => return Err(PickleError::Truncated { offset: 0 }),
    }
    while machine.step()? {}
    let root = machine.pop()?;
    match pickle.len() - machine.at {
        0 => Ok((machine.nodes, root)),
        extra => Err(PickleError::Trailing { offset: machine.at, extra }),
    }
}

impl Machine<'_> {
    fn take(&mut self, n: usize) -> Result<Bytes, PickleError> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.pickle.len());
        let end = end.ok_or(PickleError::Truncated { offset: self.pickle.len() })?;
        let bytes = self.pickle.slice(self.at..end);
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PickleError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.take(N)?);
        Ok(bytes)
    }

    /// A length or number of `width` bytes, little-endian.
    fn length(&mut self, width: usize) -> Result<usize, PickleError> {
        let mut bytes = [0; 8];
        bytes[..width].copy_from_slice(&self.take(width)?);
        usize::try_from(u64::from_le_bytes(bytes))
            .map_err(|_| PickleError::Truncated { offset: self.pickle.len() })
    }

    fn stack_fault(&self) -> PickleError {
        PickleError::Stack { offset: self.offset, opcode: self.opcode }
    }

    /// Puts a node that exists on the stack.
    fn push_id(&mut self, id: Id) -> Result<(), PickleError> {
        let limit = self.limits.values;
        if self.pushed >= limit {
            return Err(PickleError::TooMany { what: "values", limit });
        }
        self.pushed += 1;
        self.stack.push(id);
        Ok(())
    }

    fn push(&mut self, node: Node) -> Result<(), PickleError> {
        self.nodes.push(node);
        self.push_id(self.nodes.len() - 1)
    }

    /// Whatever lies above the last mark.
    fn pop(&mut self) -> Result<Id, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err(self.stack_fault());
        }
        self.stack.pop().ok_or_else(|| self.stack_fault())
    }

    fn pop_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        let mark = self.marks.pop().ok_or_else(|| self.stack_fault())?;
        Ok(self.stack.split_off(mark))
    }

    /// The node on top, which stays.
    fn top(&self) -> Result<Id, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.last().filter(|_| self.stack.len() > floor);
        top.copied().ok_or_else(|| self.stack_fault())
    }

    fn text(&mut self, n: usize) -> Result<(), PickleError> {
        let bytes = self.take(n)?;
        match std::str::from_utf8(&bytes) {
            Ok(_) => self.push(Node::Text(bytes)),
            Err(_) => Err(PickleError::Utf8 { offset: self.offset }),
        }
    }

    fn data(&mut self, n: usize) -> Result<(), PickleError> {
        let bytes = self.take(n)?;
        self.push(Node::Bytes(bytes))
    }

    fn tuple(&mut self, n: usize) -> Result<(), PickleError> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Node::Tuple(items))
    }

    /// Executes one instruction; false after the last.
    fn step(&mut self) -> Result<bool, PickleError> {
        self.offset = self.at;
        self.opcode = self.array::<1>()?[0];
        match self.opcode {
            b'.' => return Ok(false),
            // FRAME: where the next bytes end says nothing that the instructions do not.
            0x95 => {
                let n = self.length(8)?;
                if n > self.pickle.len() - self.at {
                    return Err(PickleError::Truncated { offset: self.pickle.len() });
                }
            }
            b'(' => {
                // Marks cost nothing else, so they are bounded as what nests.
                let limit = self.limits.depth;
                if self.marks.len() >= limit {
                    return Err(PickleError::Depth { limit });
                }
                self.marks.push(self.stack.len());
            }
            b'N' => self.push(Node::None)?,
            0x88 => self.push(Node::Bool(true))?,
            0x89 => self.push(Node::Bool(false))?,
            b'K' => {
                let n = self.length(1)?;
                self.push(Node::Int(n as i64))?;
            }
            b'M' => {
                let n = self.length(2)?;
                self.push(Node::Int(n as i64))?;
            }
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(n.into()))?;
            }
            b'G' => {
                let x = f64::from_be_bytes(self.array()?);
                self.push(Node::Float(x))?;
            }
            0x8c => {
                let n = self.length(1)?;
                self.text(n)?;
            }
            b'X' => {
                let n = self.length(4)?;
                self.text(n)?;
            }
            b'C' => {
                let n = self.length(1)?;
                self.data(n)?;
            }
            b'B' => {
                let n = self.length(4)?;
                self.data(n)?;
            }
            // BINBYTES8, and protocol 5's BYTEARRAY8, which arrays are made of.
            0x8e | 0x96 => {
                let n = self.length(8)?;
                self.data(n)?;
            }
            b']' => self.push(Node::List(vec![]))?,
            b'}' => self.push(Node::Dict(vec![]))?,
            b')' => self.push(Node::Tuple(vec![]))?,
            0x85..=0x87 => self.tuple((self.opcode - 0x84) as usize)?,
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items))?;
            }
            b'a' | b'e' | b's' | b'u' => self.extend()?,
            0x94 => {
                let limit = self.limits.memo;
                if self.memo.len() >= limit {
                    return Err(PickleError::TooMany { what: "remembered values", limit });
                }
                self.memo.push(self.top()?);
            }
            b'h' | b'j' => {
                let index = self.length(if self.opcode == b'h' { 1 } else { 4 })?;
                let id = self.memo.get(index).copied();
                self.push_id(id.ok_or(PickleError::Memo { offset: self.offset, index })?)?;
            }
            0x93 => self.global()?,
            0x81 => self.new_object()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            opcode => return Err(PickleError::Opcode { offset: self.offset, opcode }),
        }
        Ok(true)
    }

    /// APPEND, APPENDS, SETITEM, SETITEMS.
    fn extend(&mut self) -> Result<(), PickleError> {
        let items = match self.opcode {
            b'e' | b'u' => self.pop_mark()?,
            b'a' => vec![self.pop()?],
            _ => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
        };
        let (fault, container) = (self.stack_fault(), self.top()?);
        match (&mut self.nodes[container], self.opcode) {
            (Node::List(list), b'a' | b'e') => list.extend(items),
            (Node::Dict(dict), b's' | b'u') if items.len() % 2 == 0 => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => return Err(fault),
        }
        Ok(())
    }

    fn global(&mut self) -> Result<(), PickleError> {
        let (name, module) = (self.pop()?, self.pop()?);
        let (Node::Text(module), Node::Text(name)) = (&self.nodes[module], &self.nodes[name])
        else {
            return Err(self.stack_fault());
        };
        let (module, name) = (text_of(module), text_of(name));
        let Some(global) = Global::find(&module, &name) else {
            let short = |text: &str| text.chars().take(MAX_NAME).collect::<String>();
            let (module, name) = (short(&module), short(&name));
            return Err(PickleError::Global { offset: self.offset, module, name });
        };
        self.push(Node::Global(global))
    }

    fn new_object(&mut self) -> Result<(), PickleError> {
        let (arguments, class) = (self.pop()?, self.pop()?);
        match (&self.nodes[class], &self.nodes[arguments]) {
            (Node::Global(Global::Class(module, class)), Node::Tuple(none)) if none.is_empty() => {
                let instance = Node::Instance(module.clone(), *class, None);
                self.push(instance)
            }
            _ => Err(self.stack_fault()),
        }
    }

    fn reduce(&mut self) -> Result<(), PickleError> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let (Node::Global(global), Node::Tuple(arguments)) =
            (&self.nodes[callable], &self.nodes[arguments])
        else {
            return Err(self.stack_fault());
        };
        let built = numpy::call(global, &self.arguments(arguments)?, &self.nodes);
        let offset = self.offset;
        self.push(built.map_err(|reason| PickleError::Numpy { offset, reason })?)
    }

    /// The nodes of a tuple that something is called or filled with. One of more than anything
    /// takes is not gone through: it may be used again and again.
    fn arguments(&self, ids: &[Id]) -> Result<Vec<&Node>, PickleError> {
        if ids.len() > numpy::MAX_ARGUMENTS {
            let reason = numpy::UNKNOWN_FORM.into();
            return Err(PickleError::Numpy { offset: self.offset, reason });
        }
        Ok(ids.iter().map(|id| &self.nodes[*id]).collect())
    }

    fn build(&mut self) -> Result<(), PickleError> {
        let (state, object) = (self.pop()?, self.top()?);
        let built = match (&self.nodes[object], &self.nodes[state]) {
            (Node::Instance(module, class, None), Node::Dict(_)) => {
                Ok(Node::Instance(module.clone(), *class, Some(state)))
            }
            (object @ (Node::Dtype(..) | Node::ArrayToFill), Node::Tuple(state)) => {
                numpy::fill(object, &self.arguments(state)?, &self.nodes)
            }
            _ => return Err(self.stack_fault()),
        };
        let offset = self.offset;
        self.nodes[object] = built.map_err(|reason| PickleError::Numpy { offset, reason })?;
        Ok(())
    }
}

/// Text that was checked when it was read.
pub(super) fn text_of(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
