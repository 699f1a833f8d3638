//! SentencePiece text encoding from a `.model` file: BPE and unigram, byte fallback, normaliser.

mod bpe;
mod charsmap;
mod find;
mod normalise;
mod pieces;
mod proto;
mod unigram;

pub use find::{SearchPlaces, find_tokenizer, find_tokenizer_in, tokenizers, unread_tokenizers};

use crate::file::read_file;
use normalise::Normaliser;
use pieces::Pieces;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Largest model file accepted (PaliGemma's is 4 MB).
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A SentencePiece model, ready to encode.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    pieces: Pieces,
    normaliser: Normaliser,
    algorithm: Algorithm,
    bos: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Bpe,
    Unigram,
}

impl Tokenizer {
    /// Reads a `.model` file.
    pub fn from_file(path: &Path) -> Result<Tokenizer, TokenizerError> {
        let failed = |error| TokenizerError::Io { path: path.into(), error };
        let bytes = read_file(path, MAX_FILE_BYTES).map_err(failed)?;
        Tokenizer::from_bytes(&bytes)
            .map_err(|error| TokenizerError::File { path: path.into(), error: error.into() })
    }

    /// Parses the bytes of a `.model` file. All of its properties are read from it; a kind of
    /// model that can't be encoded faithfully is an error.
    pub fn from_bytes(bytes: &[u8]) -> Result<Tokenizer, TokenizerError> {
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(TokenizerError::Malformed(format!("more than {MAX_FILE_BYTES} bytes")));
        }
        let model = proto::Model::parse(bytes).map_err(TokenizerError::Malformed)?;
        let algorithm = match model.trainer.model_type {
            1 => Algorithm::Unigram,
            2 => Algorithm::Bpe,
            3 => return Err(TokenizerError::Unsupported("model_type WORD")),
            4 => return Err(TokenizerError::Unsupported("model_type CHAR")),
            _ => return Err(TokenizerError::Unsupported("an unknown model_type")),
        };
        if model.trainer.whitespace_as_suffix {
            return Err(TokenizerError::Unsupported("treat_whitespace_as_suffix"));
        }
        let pieces = Pieces::new(&model).map_err(TokenizerError::Malformed)?;
        let bos = u32::try_from(model.trainer.bos)
            .ok()
            .filter(|&id| (id as usize) < pieces.count())
            .ok_or(TokenizerError::Unsupported("no BOS piece, which π0's prompts start with"))?;
        let normaliser = Normaliser::new(model.normalizer).map_err(TokenizerError::Malformed)?;
        Ok(Tokenizer { pieces, normaliser, algorithm, bos })
    }

    /// Ids of a text. Empty text gives none; nothing is added. "<bos>" in the text is ordinary
    /// characters.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let text = self.normaliser.apply(text, &self.pieces);
        match self.algorithm {
            Algorithm::Bpe => bpe::encode(&text, &self.pieces),
            Algorithm::Unigram => unigram::encode(&text, &self.pieces),
        }
    }

    /// Id that starts every prompt.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// Number of pieces; ids are below it. A model's embedding table must have at least as many
    /// rows.
    pub fn piece_count(&self) -> usize {
        self.pieces.count()
    }
}

/// A tokenizer that can't be had.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// It is nowhere.
    #[error(
        "no PaliGemma tokenizer found; looked at:\n{}\nIt is one 4 MB file: `mkdir -p \
         ~/.cache/openpi/big_vision && gsutil cp gs://big_vision/paligemma_tokenizer.model \
         ~/.cache/openpi/big_vision/` (openpi's own copy works too), or tokenizer.model of \
         google/paligemma-3b-pt-224 on Hugging Face (accept its licence first); or name it with \
         --tokenizer FILE{note}",
        list(looked)
    )]
    NotFound {
        /// Every place tried, in order.
        looked: Vec<PathBuf>,
        /// Something found that is not usable, or nothing.
        note: String,
    },
    /// The file can't be read.
    #[error("tokenizer {path} can't be read: {error}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// What was read from a file is wrong.
    #[error("tokenizer {path}: {error}")]
    File {
        /// Where.
        path: PathBuf,
        /// What (not named `source`: the text has it already).
        error: Box<TokenizerError>,
    },
    /// The bytes are no SentencePiece model.
    #[error(
        "this is no SentencePiece model ({0}); a `tokenizer.json` is another format, \
         the file needed is `tokenizer.model` or `paligemma_tokenizer.model`"
    )]
    Malformed(String),
    /// A SentencePiece model with a property that is not implemented.
    #[error(
        "this SentencePiece model has {0}, which is not supported; π0 and π0.5 use PaliGemma's \
         tokenizer (BPE)"
    )]
    Unsupported(&'static str),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| format!("  {}", path.display())).collect::<Vec<_>>().join("\n")
}
