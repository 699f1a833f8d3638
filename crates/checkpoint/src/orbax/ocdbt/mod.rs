//! An OCDBT database directory → its keys and values.

mod blobs;
mod cursor;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use blobs::{DataFile, Manifest, Node, NodeRef, Value, parse_manifest, parse_node};
pub use cursor::MAX_BLOB_BYTES;

use crate::error::{CheckpointError, Malformed};
use crate::file::WeightFile;
use crate::identity::Identity;
use crate::orbax::arrays::Stored;
use crate::small_file;

/// Most nodes, keys and data files of one database.
const MAX_NODES: usize = 1 << 16;
const MAX_KEYS: usize = 1 << 21;
const MAX_FILES: usize = 1 << 14;
/// Tallest tree; TensorStore's own trees of 2^64 keys stay below.
const MAX_HEIGHT: u8 = 32;

/// An open database: the whole index in memory, the values in files.
pub struct Database {
    root: PathBuf,
    manifest: WeightFile,
    files: BTreeMap<String, WeightFile>,
    values: BTreeMap<String, Value>,
    nodes: usize,
}

impl Database {
    /// Reads the index below `root` and checks that every value lies inside its file.
    pub fn open(root: &Path) -> Result<Self, CheckpointError> {
        let path = root.join("manifest.ocdbt");
        let noted = WeightFile::noted(&path)?;
        let manifest = parse_manifest(&small_file(&path)?).map_err(|e| e.at(&path))?;
        let mut db = Database {
            root: root.into(),
            manifest: noted,
            files: BTreeMap::new(),
            values: BTreeMap::new(),
            nodes: 0,
        };
        if let Some(node) = manifest.root {
            if node.height > MAX_HEIGHT {
                return Err(Malformed::new(format!("tree of height {}", node.height)).at(path));
            }
            db.walk(&node, b"")?;
        }
        Ok(db)
    }

    /// Recursion ends because a child's height is its parent's minus one.
    fn walk(&mut self, at: &NodeRef, prefix: &[u8]) -> Result<(), CheckpointError> {
        let path = at.file.path();
        let here = self.root.join(&path);
        let wrong =
            |e: Malformed| e.within(&format!("B+tree node at byte {}", at.offset)).at(&here);
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(wrong(Malformed::new(format!("more than {MAX_NODES} nodes"))));
        }
        self.note(&at.file)?;
        let (file, range) = self.place(&at.file, at.offset, at.length).map_err(wrong)?;
        if at.length > MAX_BLOB_BYTES as u64 {
            let what = format!("{} bytes, limit {MAX_BLOB_BYTES}", at.length);
            return Err(wrong(Malformed::new(what)));
        }
        let node = parse_node(&file.read(range)?, &at.file.base).map_err(wrong)?;
        match node {
            Node::Interior(_) if at.height == 0 => {
                Err(wrong(Malformed::new("interior node where a leaf should be")))
            }
            Node::Leaf(_) if at.height > 0 => {
                Err(wrong(Malformed::new("leaf where an interior node should be")))
            }
            Node::Interior(children) => {
                for (key, child) in children {
                    if child.height + 1 != at.height {
                        return Err(wrong(Malformed::new("height does not match its parent's")));
                    }
                    self.walk(&child, &[prefix, &key].concat())?;
                }
                Ok(())
            }
            Node::Leaf(entries) => {
                for (key, value) in entries {
                    self.insert([prefix, &key].concat(), value, &path)?;
                }
                Ok(())
            }
        }
    }

    fn insert(&mut self, key: Vec<u8>, value: Value, from: &str) -> Result<(), CheckpointError> {
        let from = self.root.join(from);
        let bad = |what: String| Malformed::new(what).at(&from);
        let key = String::from_utf8(key)
            .map_err(|e| bad(format!("key {:?} is not UTF-8", e.as_bytes())))?;
        if self.values.len() >= MAX_KEYS {
            return Err(bad(format!("more than {MAX_KEYS} keys")));
        }
        if self.values.contains_key(&key) {
            return Err(bad(format!("key `{key}` is there twice")));
        }
        if let Value::Out { file, offset, length } = &value {
            self.note(file)?;
            self.place(file, *offset, *length).map(drop).map_err(|e| {
                e.within(&format!("value of `{key}`")).at(self.root.join(file.path()))
            })?;
        }
        self.values.insert(key, value);
        Ok(())
    }

    fn note(&mut self, file: &DataFile) -> Result<(), CheckpointError> {
        let path = file.path();
        if !self.files.contains_key(&path) {
            if self.files.len() >= MAX_FILES {
                let what = format!("database of more than {MAX_FILES} files");
                return Err(Malformed::new(what).at(&self.root));
            }
            let noted = WeightFile::noted(&self.root.join(&path))?;
            self.files.insert(path, noted);
        }
        Ok(())
    }

    /// A file that was noted, and the bytes of it.
    fn place(
        &self,
        file: &DataFile,
        offset: u64,
        length: u64,
    ) -> Result<(&WeightFile, Range<u64>), Malformed> {
        let file = self.files.get(&file.path());
        let there = file.map_or(0, WeightFile::length);
        let end = offset.checked_add(length).filter(|end| *end <= there);
        file.zip(end).map(|(file, end)| (file, offset..end)).ok_or_else(|| {
            Malformed::new(format!(
                "{length} bytes at {offset} reach past the end of the file ({there} bytes)"
            ))
        })
    }

    /// Adds the files.
    pub(super) fn identify(&self, identity: &mut Identity) {
        identity.add(&self.root.join("manifest.ocdbt"), self.manifest.stamp());
        for (path, file) in &self.files {
            identity.add(&self.root.join(path), file.stamp());
        }
    }

    /// Every key, in byte order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A value.
    pub(super) fn get(&self, key: &str) -> Result<Option<Stored<'_>>, CheckpointError> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Inline(bytes)) => Ok(Some(Stored::Inline(bytes))),
            Some(Value::Out { file, offset, length }) => {
                let (file, range) =
                    self.place(file, *offset, *length).map_err(|e| e.at(&self.root))?;
                Ok(Some(Stored::In(file.section(range)?)))
            }
        }
    }
}
