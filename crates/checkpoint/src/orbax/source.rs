//! Arrays of a JAX parameter tree → a [`TensorSource`]: decoded array by array, sliced by layer,
//! transposed, LoRA merged.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use pirouette_model::{DType, SourceError, Tensor, TensorSource};

use super::arrays::Arrays;
use super::lora::{Sizes, merge};
use super::permute::permuted;
use crate::error::{CheckpointError, Mismatch};
use crate::names::openpi_jax::{Lora, Part, Rule, array_of, rules};

/// Most layers of a stack.
const MAX_LAYERS: usize = 1024;
/// Decoded arrays are kept while they are at most this many and together at most this large; the
/// newest always is. That is q, k and v with their factors side by side, and gate, up and down of
/// a full-size f32 checkpoint (6.7 GiB). They are freed with the source.
const KEPT_ARRAYS: usize = 12;
const KEPT_BYTES: usize = 7 << 30;

/// Factors of a block.
struct Factors {
    paths: [String; 2],
    kind: Lora,
    sizes: Sizes,
    /// Elements of A and of B that belong to the block.
    ranges: [Range<usize>; 2],
}

/// Where a tensor comes from.
struct Piece {
    path: String,
    /// Elements of the array.
    range: Range<usize>,
    /// Extents of the block.
    block: Vec<usize>,
    perm: &'static [usize],
    shape: Vec<usize>,
    factors: Option<Factors>,
}

type Decoded = Result<Arc<(DType, Vec<u8>)>, String>;

/// Canonical tensors of a `params/` directory, in their stored type (merged ones in f32).
///
/// openpi rounds every array to bf16 when it serves such a checkpoint; here that is left to the
/// precision chosen at load.
pub struct OrbaxSource {
    arrays: Arrays,
    pieces: BTreeMap<String, Piece>,
    extra: Vec<String>,
    lora: Vec<String>,
    /// Most recently used first.
    cache: Mutex<Vec<(String, Arc<OnceLock<Decoded>>)>>,
}

impl OrbaxSource {
    /// Finds every known array's tensors. Shapes are checked against the meaning of the axes, not
    /// yet against each other.
    pub fn new(arrays: Arrays) -> Result<Self, CheckpointError> {
        let mut pieces = BTreeMap::new();
        let mut mismatches = Vec::new();
        let mut known = BTreeSet::new();
        let mut lora = Vec::new();
        for rule in rules() {
            let factors = rule.lora.map(|_| rule.factors()).unwrap_or_default();
            if arrays.meta(&rule.path).is_none() {
                continue;
            }
            known.insert(rule.path.clone());
            known.extend(factors.iter().cloned());
            match pieces_of(&arrays, &rule) {
                Ok(found) => {
                    if found.iter().any(|(_, piece)| piece.factors.is_some()) {
                        lora.push(rule.path.clone());
                    }
                    pieces.extend(found);
                }
                Err(m) => mismatches.push(m),
            }
        }
        if !mismatches.is_empty() {
            let origin = arrays.root().display().to_string();
            return Err(CheckpointError::Tensors { origin, mismatches });
        }
        let extra = arrays
            .iter()
            .map(|(path, _)| path.to_string())
            .filter(|path| !known.contains(path))
            .collect();
        Ok(OrbaxSource { arrays, pieces, extra, lora, cache: Mutex::new(vec![]) })
    }

    /// The arrays.
    pub fn arrays(&self) -> &Arrays {
        &self.arrays
    }

    /// Arrays that are no part of any model.
    pub fn extra(&self) -> &[String] {
        &self.extra
    }

    /// Arrays that low-rank factors are merged into.
    pub fn lora(&self) -> &[String] {
        &self.lora
    }

    /// SigLIP heads, an axis of its query kernels.
    pub fn vision_heads(&self) -> Option<usize> {
        let path = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0";
        self.arrays.meta(&format!("{path}/query/kernel"))?.shape.get(2).copied()
    }

    /// A canonical tensor's array, for messages.
    pub fn array_of(canonical: &str) -> String {
        array_of(&rules(), canonical).unwrap_or_else(|| canonical.to_string())
    }

    fn array(&self, path: &str) -> Decoded {
        let cell = {
            let mut cache = self.cache.lock().map_err(|_| "an earlier load failed".to_string())?;
            let cell = match cache.iter().position(|(name, _)| name == path) {
                Some(at) => cache.remove(at).1,
                None => Arc::default(),
            };
            cache.insert(0, (path.to_string(), Arc::clone(&cell)));
            let mut bytes = 0;
            let mut kept = 0;
            cache.retain(|(name, _)| {
                bytes += self.arrays.meta(name).map_or(0, |m| m.bytes());
                kept += 1;
                kept == 1 || (kept <= KEPT_ARRAYS && bytes <= KEPT_BYTES)
            });
            cell
        };
        // Decoded outside the lock, once, by whoever comes first.
        cell.get_or_init(|| self.arrays.read(path).map(Arc::new).map_err(|e| e.to_string())).clone()
    }

    fn floats(&self, path: &str, range: &Range<usize>) -> Result<Vec<f32>, String> {
        let decoded = self.array(path)?;
        let (dtype, bytes) = &*decoded;
        let all = Tensor { shape: vec![range.end], dtype: *dtype, data: Cow::Borrowed(bytes) };
        let mut out = vec![0.0; range.len()];
        all.read_f32(range.start, &mut out);
        Ok(out)
    }

    fn read(&self, piece: &Piece) -> Result<Tensor<'_>, String> {
        let (dtype, data) = match &piece.factors {
            None => {
                let decoded = self.array(&piece.path)?;
                let (dtype, bytes) = &*decoded;
                let size = dtype.bytes();
                let block = &bytes[piece.range.start * size..piece.range.end * size];
                (*dtype, permuted(block, &piece.block, piece.perm, size))
            }
            Some(factors) => {
                let mut w = self.floats(&piece.path, &piece.range)?;
                let a = self.floats(&factors.paths[0], &factors.ranges[0])?;
                let b = self.floats(&factors.paths[1], &factors.ranges[1])?;
                merge(&mut w, &a, &b, factors.sizes, factors.kind);
                let bytes: Vec<u8> = w.iter().flat_map(|v| v.to_le_bytes()).collect();
                (DType::F32, permuted(&bytes, &piece.block, piece.perm, 4))
            }
        };
        Ok(Tensor { shape: piece.shape.clone(), dtype, data: Cow::Owned(data) })
    }
}

impl TensorSource for OrbaxSource {
    fn origin(&self) -> String {
        self.arrays.root().display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.pieces.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.pieces.get(name).map(|p| p.shape.clone())
    }

    fn load(&self, name: &str) -> Result<Tensor<'_>, SourceError> {
        let piece = self
            .pieces
            .get(name)
            .ok_or_else(|| SourceError::Missing { name: name.into(), origin: self.origin() })?;
        self.read(piece).map_err(|reason| SourceError::Unreadable { name: name.into(), reason })
    }
}

/// The tensors of one array.
fn pieces_of(arrays: &Arrays, rule: &Rule) -> Result<Vec<(String, Piece)>, Mismatch> {
    let found = arrays.meta(&rule.path).map(|m| m.shape.clone()).unwrap_or_default();
    let wrong =
        |axes: String| Err(Mismatch::Axes { name: rule.path.clone(), found: found.clone(), axes });
    if found.len() != rule.rank() {
        return wrong(format!("of number {}", rule.rank()));
    }
    let (layers, rest) = match rule.stacked {
        true => (found[0], &found[1..]),
        false => (1, &found[..]),
    };
    if layers > MAX_LAYERS {
        return wrong(format!("whose first is at most {MAX_LAYERS} layers"));
    }
    let picked = rule.parts[0].pick.len();
    let (choice, block) = rest.split_at(picked);
    for (axis, &extent) in choice.iter().enumerate() {
        let wanted = rule.parts.iter().map(|p| p.pick[axis] + 1).max().unwrap_or(1);
        if extent != wanted {
            let axis = axis + usize::from(rule.stacked);
            return wrong(format!("whose number {axis} has extent {wanted}"));
        }
    }
    let mut out = Vec::new();
    for layer in 0..layers {
        for part in &rule.parts {
            let index = block_index(layer, choice, part.pick);
            let size: usize = block.iter().product();
            let piece = Piece {
                path: rule.path.clone(),
                range: index * size..(index + 1) * size,
                block: block.to_vec(),
                perm: part.perm,
                shape: joined(block, part),
                factors: factors_of(arrays, rule, &found, picked, index)?,
            };
            out.push((rule.name(part, layer), piece));
        }
    }
    Ok(out)
}

/// Position of a block among the blocks of its array.
fn block_index(layer: usize, choice: &[usize], pick: &[usize]) -> usize {
    choice.iter().zip(pick).fold(layer, |at, (extent, index)| at * extent + index)
}

fn joined(block: &[usize], part: &Part) -> Vec<usize> {
    let mut axes = part.perm.iter().map(|&axis| block[axis]);
    part.join.iter().map(|&n| axes.by_ref().take(n).product()).collect()
}

fn factors_of(
    arrays: &Arrays,
    rule: &Rule,
    shape: &[usize],
    picked: usize,
    index: usize,
) -> Result<Option<Factors>, Mismatch> {
    let Some(kind) = rule.lora else { return Ok(None) };
    let paths = rule.factors();
    let (a, b) = match (arrays.meta(&paths[0]), arrays.meta(&paths[1])) {
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(Mismatch::Missing(paths[1].clone())),
        (None, Some(_)) => return Err(Mismatch::Missing(paths[0].clone())),
        (Some(a), Some(b)) => (&a.shape, &b.shape),
    };
    let (lead, matrix) = shape.split_at(shape.len() - 2);
    let (rows, cols) = (matrix[0], matrix[1]);
    let rank = a.last().copied().unwrap_or(0);
    for (path, found, last) in [(&paths[0], a, [rows, rank]), (&paths[1], b, [rank, cols])] {
        let expected = [lead, &last].concat();
        if *found != expected {
            let (name, found) = (path.clone(), found.clone());
            return Err(Mismatch::Shape { name, found, expected });
        }
    }
    let batch = lead[usize::from(rule.stacked) + picked..].iter().product();
    let sizes = Sizes { batch, rows, cols, rank };
    let range = |n: usize| index * n..(index + 1) * n;
    let ranges = [range(batch * rows * rank), range(batch * rank * cols)];
    Ok(Some(Factors { paths, kind, sizes, ranges }))
}
