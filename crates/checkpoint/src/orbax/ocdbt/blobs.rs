//! Bytes of an OCDBT manifest or B+tree node → what it refers to. Layouts: the OCDBT format page
//! of TensorStore.

use std::path::{Component, Path};

use super::cursor::{Cursor, open_envelope};
use crate::error::Malformed;

const MANIFEST_MAGIC: u32 = 0x0cdb_3a2a;
const NODE_MAGIC: u32 = 0x0cdb_20de;
/// Longest path or key, in bytes.
const MAX_NAME: usize = 4096;
/// Offset and length of an empty database's root.
const NOWHERE: u64 = u64::MAX;

/// A row of a data file table: where a file lies below the database root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Folder of the database that wrote the file, inherited by that file's own nodes.
    pub base: String,
    /// The rest of the path.
    pub relative: String,
}

impl DataFile {
    /// Path below the database root.
    pub fn path(&self) -> String {
        format!("{}{}", self.base, self.relative)
    }
}

/// A node's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRef {
    /// The file it lies in.
    pub file: DataFile,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Levels below it.
    pub height: u8,
}

/// A parsed manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Root of the newest version; `None` if the database is empty.
    pub root: Option<NodeRef>,
}

/// Where a value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// In the node itself.
    Inline(Vec<u8>),
    /// In a data file.
    Out {
        /// The file.
        file: DataFile,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// A parsed node. Keys are relative to the prefix its parent gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// (key prefix the child inherits, child).
    Interior(Vec<(Vec<u8>, NodeRef)>),
    /// (key, value), in key order.
    Leaf(Vec<(Vec<u8>, Value)>),
}

/// Parses a `manifest.ocdbt`.
pub fn parse_manifest(bytes: &[u8]) -> Result<Manifest, Malformed> {
    let body = open_envelope(bytes, MANIFEST_MAGIC)?;
    let mut c = Cursor::new(&body);
    c.raw(16)?; // uuid
    let kind = c.u8()?;
    if kind != 0 {
        return Err(Malformed::unread(format!(
            "manifest kind {kind} (numbered manifests) is not read; save again with Orbax's default"
        )));
    }
    c.varint()?; // max_inline_value_bytes
    c.varint()?; // max_decoded_node_bytes
    c.u8()?; // version_tree_arity_log2
    match c.varint()? {
        0 => {}
        1 => drop(c.raw(4)?), // zstd level
        method => return Err(Malformed::new(format!("unknown compression {method}"))),
    }
    let files = file_table(&mut c, "")?;

    let n = c.count("versions")?;
    c.column(n)?; // generation
    let heights = c.raw(n)?;
    let ids = c.sizes(n)?;
    let offsets = c.column(n)?;
    let lengths = c.column(n)?;
    for _ in 0..3 {
        c.column(n)?; // num_keys, tree_bytes, indirect_bytes
    }
    (0..n).try_for_each(|_| c.u64_le().map(drop))?; // commit_time

    let m = c.count("older versions")?;
    for _ in 0..5 {
        c.column(m)?; // generation, file, offset, length, num_generations
    }
    (0..m).try_for_each(|_| c.u64_le().map(drop))?;
    c.raw(m)?; // height
    c.finish()?;

    let Some(last) = n.checked_sub(1) else {
        return Err(Malformed::new("manifest lists no version"));
    };
    if offsets[last] == NOWHERE && lengths[last] == NOWHERE {
        return Ok(Manifest { root: None });
    }
    let file = file_of(&files, ids[last])?;
    let (offset, length, height) = (offsets[last], lengths[last], heights[last]);
    Ok(Manifest { root: Some(NodeRef { file, offset, length, height }) })
}

/// Parses a B+tree node reached through a file whose base is `base`.
pub fn parse_node(bytes: &[u8], base: &str) -> Result<Node, Malformed> {
    let body = open_envelope(bytes, NODE_MAGIC)?;
    let mut c = Cursor::new(&body);
    let height = c.u8()?;
    let files = file_table(&mut c, base)?;
    let n = c.count("entries")?;
    let node = match height.checked_sub(1) {
        Some(below) => interior(&mut c, &files, n, below)?,
        None => leaf(&mut c, &files, n)?,
    };
    c.finish()?;
    Ok(node)
}

fn interior(
    c: &mut Cursor<'_>,
    files: &[DataFile],
    n: usize,
    height: u8,
) -> Result<Node, Malformed> {
    let (keys, common) = c.prefixed(n, MAX_NAME, |c| c.sizes(n))?;
    let ids = c.sizes(n)?;
    let offsets = c.column(n)?;
    let lengths = c.column(n)?;
    for _ in 0..3 {
        c.column(n)?; // num_keys, tree_bytes, indirect_bytes
    }
    check_order(&keys)?;
    let mut children = Vec::with_capacity(n);
    for (i, key) in keys.iter().enumerate() {
        let prefix = key.get(..common[i]).ok_or_else(|| {
            Malformed::new(format!("common prefix of {} in a key of {}", common[i], key.len()))
        })?;
        let file = file_of(files, ids[i])?;
        let child = NodeRef { file, offset: offsets[i], length: lengths[i], height };
        children.push((prefix.to_vec(), child));
    }
    Ok(Node::Interior(children))
}

fn leaf(c: &mut Cursor<'_>, files: &[DataFile], n: usize) -> Result<Node, Malformed> {
    let (keys, ()) = c.prefixed(n, MAX_NAME, |_| Ok(()))?;
    check_order(&keys)?;
    let lengths = c.column(n)?;
    let kinds = c.raw(n)?;
    if let Some(kind) = kinds.iter().find(|&&k| k > 1) {
        return Err(Malformed::new(format!("unknown value kind {kind}")));
    }
    let outside = kinds.iter().filter(|&&k| k == 1).count();
    let mut ids = c.sizes(outside)?.into_iter();
    let mut offsets = c.column(outside)?.into_iter();
    let mut values = Vec::with_capacity(n);
    for ((key, kind), length) in keys.into_iter().zip(kinds).zip(lengths) {
        let value = match (kind, ids.len()) {
            (0, _) => {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                Value::Inline(c.raw(length)?.to_vec())
            }
            _ => {
                let file = file_of(files, ids.next().unwrap_or(usize::MAX))?;
                Value::Out { file, offset: offsets.next().unwrap_or(NOWHERE), length }
            }
        };
        values.push((key, value));
    }
    Ok(Node::Leaf(values))
}

fn check_order(keys: &[Vec<u8>]) -> Result<(), Malformed> {
    match keys.windows(2).find(|w| w[0] >= w[1]) {
        None => Ok(()),
        Some(w) => {
            let key = String::from_utf8_lossy(&w[1]).into_owned();
            Err(Malformed::new(format!("key `{key}` is out of order")))
        }
    }
}

fn file_of(files: &[DataFile], id: usize) -> Result<DataFile, Malformed> {
    let missing = || Malformed::new(format!("data file {id} of {}", files.len()));
    files.get(id).cloned().ok_or_else(missing)
}

fn file_table(c: &mut Cursor<'_>, above: &str) -> Result<Vec<DataFile>, Malformed> {
    let n = c.count("data files")?;
    let (paths, bases) = c.prefixed(n, MAX_NAME, |c| c.sizes(n))?;
    let mut files = Vec::with_capacity(n);
    for (path, &base) in paths.iter().zip(&bases) {
        let path = std::str::from_utf8(path)
            .map_err(|_| Malformed::new("a data file's name is not UTF-8"))?;
        let (base, relative) = path.split_at_checked(base).ok_or_else(|| {
            Malformed::new(format!("base of {base} bytes in the file name `{path}`"))
        })?;
        let file = DataFile { base: format!("{above}{base}"), relative: relative.into() };
        check_inside(&file)?;
        files.push(file);
    }
    Ok(files)
}

/// A data file must lie below the database root.
fn check_inside(file: &DataFile) -> Result<(), Malformed> {
    let path = file.path();
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_));
    if path.len() > MAX_NAME || path.contains('\0') || !Path::new(&path).components().all(plain) {
        return Err(Malformed::new(format!("data file `{path}` is outside the database")));
    }
    Ok(())
}
