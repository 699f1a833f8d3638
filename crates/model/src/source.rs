//! Where weights come from: tensors under openpi's PyTorch names, whatever file they lie in.
//!
//! A checkpoint reader (or the synthetic recipe) implements [`TensorSource`]; the weight table
//! (`weights.rs`) asks it for tensors by their canonical names, the ones of an openpi
//! `model.safetensors`.

use std::borrow::Cow;

/// Element type of a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single, little-endian.
    F32,
    /// Upper half of an IEEE single, little-endian.
    Bf16,
    /// IEEE half, little-endian.
    F16,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }
}

/// One tensor: row-major, little-endian bytes, `data.len() == shape.product() * dtype.bytes()`.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Element type of `data`.
    pub dtype: DType,
    /// The bytes: borrowed from memory, or owned when they had to be read or computed.
    pub data: Cow<'a, [u8]>,
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Converts elements `start .. start + out.len()` to f32 (exact for all three types).
    ///
    /// # Panics
    /// If the range reaches past the end: ranges come from shapes that were checked at load.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let b = self.dtype.bytes();
        let bytes = &self.data[start * b..(start + out.len()) * b];
        match self.dtype {
            DType::F32 => {
                for (o, c) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([c[0], c[1], c[2], c[3]]);
                }
            }
            DType::Bf16 => {
                for (o, c) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f32::from_bits((u16::from_le_bytes([c[0], c[1]]) as u32) << 16);
                }
            }
            DType::F16 => {
                for (o, c) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = half::f16::from_le_bytes([c[0], c[1]]).to_f32();
                }
            }
        }
    }

    /// The whole tensor as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.read_f32(0, &mut out);
        out
    }
}

/// Copies the bytes of a tensor from an offset on.
pub type ReadBytes<'a> = dyn Fn(usize, &mut [u8]) -> Result<(), SourceError> + Send + Sync + 'a;

/// A tensor whose bytes are fetched when they are asked for, from several threads.
pub struct OpenTensor<'a> {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Memory(Tensor<'a>),
    Stored(DType, Box<ReadBytes<'a>>),
}

impl<'a> OpenTensor<'a> {
    /// One that lies in a file.
    pub fn stored(shape: Vec<usize>, dtype: DType, read: Box<ReadBytes<'a>>) -> Self {
        OpenTensor { shape, kind: Kind::Stored(dtype, read) }
    }

    /// As [`Tensor::read_f32`]; fails where the bytes can't be read.
    ///
    /// # Panics
    /// If the range reaches past the end: ranges come from shapes that were checked at load.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<(), SourceError> {
        let (dtype, read) = match &self.kind {
            Kind::Memory(tensor) => {
                tensor.read_f32(start, out);
                return Ok(());
            }
            Kind::Stored(dtype, read) => (*dtype, read),
        };
        let size = dtype.bytes();
        let mut bytes = vec![0; out.len().min(AT_ONCE) * size];
        for (i, out) in out.chunks_mut(AT_ONCE).enumerate() {
            let bytes = &mut bytes[..out.len() * size];
            read((start + i * AT_ONCE) * size, bytes)?;
            let data = Cow::Borrowed(&*bytes);
            Tensor { shape: vec![out.len()], dtype, data }.read_f32(0, out);
        }
        Ok(())
    }
}

impl<'a> From<Tensor<'a>> for OpenTensor<'a> {
    fn from(tensor: Tensor<'a>) -> Self {
        OpenTensor { shape: tensor.shape.clone(), kind: Kind::Memory(tensor) }
    }
}

/// Elements read from a file at a time: they stay in a core's cache until they are converted.
const AT_ONCE: usize = 1 << 14;

/// Why a tensor could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No tensor of that name.
    #[error("tensor `{name}` is missing from {origin}")]
    Missing {
        /// Canonical name asked for.
        name: String,
        /// The file or recipe that was asked.
        origin: String,
    },
    /// It is there but could not be read or decoded; the text names the file and the remedy.
    #[error("tensor `{name}` can't be read: {reason}")]
    Unreadable {
        /// Canonical name asked for.
        name: String,
        /// What went wrong, with the remedy.
        reason: String,
    },
}

/// Tensors by openpi's PyTorch names (spec: `paligemma_with_expert.…`, `action_in_proj.weight`, …).
///
/// The token table is always served as
/// `paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight`.
/// Linear weights are `[out, in]`, the patch kernel is `[out, channel, row, column]`.
/// Implementations are shared by loading threads.
pub trait TensorSource: Send + Sync {
    /// What to call this source in messages: a path, or "synthetic weights, seed 1".
    fn origin(&self) -> String;

    /// Every canonical name present, junk and unknown names left out, sorted.
    fn names(&self) -> Vec<String>;

    /// Shape of a tensor, or `None` if it is not there. Must not read the data.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The tensor itself. Reads, and may decode; callers ask layer by layer for one kind at a time
    /// (all layers of `q_proj`, then all of `o_proj`, …) so that a reader of stacked arrays can
    /// keep the last few decoded arrays and nothing else.
    fn load(&self, name: &str) -> Result<Tensor<'_>, SourceError>;

    /// The tensor for reading row by row: what lies in a file as it is need not be whole in
    /// memory.
    fn open(&self, name: &str) -> Result<OpenTensor<'_>, SourceError> {
        self.load(name).map(OpenTensor::from)
    }
}

/// Tensors held in memory under their canonical names: for tests and small tools.
#[derive(Default)]
pub struct MemorySource {
    /// The tensors.
    pub tensors: std::collections::BTreeMap<String, Tensor<'static>>,
}

impl MemorySource {
    /// Adds an f32 tensor.
    pub fn insert(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let tensor = Tensor { shape: shape.to_vec(), dtype: DType::F32, data: Cow::Owned(data) };
        self.tensors.insert(name.to_string(), tensor);
    }
}

impl TensorSource for MemorySource {
    fn origin(&self) -> String {
        "memory".into()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor<'_>, SourceError> {
        let t = self
            .tensors
            .get(name)
            .ok_or_else(|| SourceError::Missing { name: name.into(), origin: self.origin() })?;
        Ok(Tensor { shape: t.shape.clone(), dtype: t.dtype, data: Cow::Borrowed(&t.data) })
    }
}
