//! An OCDBT database directory → its keys and values.

mod blobs;
mod cursor;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use blobs::{DataFile, Manifest, Node, NodeRef, Value, parse_manifest, parse_node};
pub use cursor::MAX_BLOB_BYTES;

use crate::driver::Mapped;
use crate::error::{CheckpointError, Malformed};
use crate::small_file;

/// Most nodes, keys and data files of one database.
const MAX_NODES: usize = 1 << 16;
const MAX_KEYS: usize = 1 << 21;
const MAX_FILES: usize = 1 << 14;
/// Tallest tree; TensorStore's own trees of 2^64 keys stay below.
const MAX_HEIGHT: u8 = 32;

/// An open database: the whole index in memory, the values in mapped files.
pub struct Database {
    root: PathBuf,
    files: BTreeMap<String, Mapped>,
    values: BTreeMap<String, Value>,
    nodes: usize,
}

impl Database {
    /// Reads the index below `root` and checks that every value lies inside its file.
    pub fn open(root: &Path) -> Result<Self, CheckpointError> {
        let path = root.join("manifest.ocdbt");
        let manifest = parse_manifest(&small_file(&path)?).map_err(|e| e.at(&path))?;
        let mut db = Database {
            root: root.into(),
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
        self.map(&at.file)?;
        let bytes = self.slice(&at.file, at.offset, at.length).map_err(wrong)?;
        let node = parse_node(bytes, &at.file.base).map_err(wrong)?;
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
            self.map(file)?;
            self.slice(file, *offset, *length).map_err(|e| {
                e.within(&format!("value of `{key}`")).at(self.root.join(file.path()))
            })?;
        }
        self.values.insert(key, value);
        Ok(())
    }

    fn map(&mut self, file: &DataFile) -> Result<(), CheckpointError> {
        let path = file.path();
        if !self.files.contains_key(&path) {
            if self.files.len() >= MAX_FILES {
                let what = format!("database of more than {MAX_FILES} files");
                return Err(Malformed::new(what).at(&self.root));
            }
            let mapped = Mapped::open(&self.root.join(&path))?;
            self.files.insert(path, mapped);
        }
        Ok(())
    }

    fn slice(&self, file: &DataFile, offset: u64, length: u64) -> Result<&[u8], Malformed> {
        let bytes = self.files.get(&file.path()).map_or(&[][..], Mapped::bytes);
        let range = usize::try_from(offset).ok().zip(usize::try_from(length).ok());
        range.and_then(|(a, n)| bytes.get(a..a.checked_add(n)?)).ok_or_else(|| {
            Malformed::new(format!(
                "{length} bytes at {offset} reach past the end of the file ({} bytes)",
                bytes.len()
            ))
        })
    }

    /// Every key, in byte order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A value's bytes.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        match self.values.get(key)? {
            Value::Inline(bytes) => Some(bytes),
            Value::Out { file, offset, length } => self.slice(file, *offset, *length).ok(),
        }
    }
}
