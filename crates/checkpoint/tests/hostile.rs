//! Damaged bytes: an error or right values, never a panic, hang or huge allocation.

mod support;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pirouette_checkpoint::orbax::Arrays;
use pirouette_checkpoint::orbax::ocdbt::{parse_manifest, parse_node};
use pirouette_checkpoint::orbax::zarr::{ArrayMeta, parse_zarray, read_array};
use pirouette_checkpoint::safetensors::parse_header;
use pirouette_checkpoint::{Checkpoint, CheckpointError, open};
use proptest::prelude::*;
use support::fixture;

/// Bytes of a manifest and of a leaf node of the fixtures.
fn blobs() -> &'static [Vec<u8>; 2] {
    static BLOBS: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
    BLOBS.get_or_init(|| {
        let params = fixture("B_jax/ckpt_pi0_bf16/params");
        let manifest = std::fs::read(params.join("manifest.ocdbt")).unwrap();
        let node = support::files_below(&params.join("d")).remove(0);
        let file = std::fs::read(node).unwrap();
        let start = file.windows(4).position(|w| w == [0x0c, 0xdb, 0x20, 0xde]).unwrap();
        let length = u64::from_le_bytes(file[start + 4..start + 12].try_into().unwrap());
        [manifest, file[start..start + length as usize].to_vec()]
    })
}

/// Makes the checksum right again so that the damage reaches the parser.
fn reseal(blob: &mut [u8]) {
    if let Some((body, sum)) = blob.split_last_chunk_mut::<4>() {
        *sum = crc32c::crc32c(body).to_le_bytes();
    }
}

fn parse(which: usize, blob: &[u8]) -> Result<(), String> {
    match which {
        0 => parse_manifest(blob).map(drop).map_err(|e| e.to_string()),
        _ => parse_node(blob, "").map(drop).map_err(|e| e.to_string()),
    }
}

#[test]
fn every_flipped_bit_of_a_blob_is_noticed() {
    for (which, blob) in blobs().iter().enumerate() {
        parse(which, blob).unwrap();
        for at in 0..blob.len() {
            let mut damaged = blob.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(parse(which, &damaged).is_err(), "byte {at}");
            assert!(parse(which, &blob[..at]).is_err(), "cut at {at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn resealed_blobs_never_panic(
        which in 0..2usize,
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut blob = blobs()[which].clone();
        for (at, byte) in edits {
            let at = at.index(blob.len());
            blob[at] = byte;
        }
        reseal(&mut blob);
        if let Err(text) = parse(which, &blob) {
            prop_assert!(!text.is_empty());
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(parse_manifest(&bytes).is_err());
        prop_assert!(parse_node(&bytes, "x/").is_err());
        prop_assert!(parse_zarray(&bytes).is_err());
        prop_assert!(parse_header(&bytes).map_or(true, |h| h.entries.is_empty()));
    }

    #[test]
    fn damaged_zstd_chunks_never_panic(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let (meta, good) = frame();
        let mut damaged = good.clone();
        for (at, byte) in edits {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
        for bytes in [&damaged[..], &good[..cut.index(good.len())]] {
            let chunk = |_: &str| Ok(Some((bytes.len() as u64, bytes)));
            if let Ok(array) = read_array(meta, &chunk) {
                prop_assert_eq!(array.len(), meta.bytes());
            }
        }
    }

    #[test]
    fn damaged_headers_never_panic(
        edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let tensors = support::Tensors::from([
            ("a.weight".into(), support::Stored::zeros(&[3, 2])),
            ("b".into(), support::Stored::zeros(&[4])),
        ]);
        let mut file = support::encode(&tensors, &[("format", "pt")]);
        let header = file.len() - 40;
        prop_assert!(parse_header(&file[..cut.index(file.len())]).is_err());
        for (at, byte) in edits {
            file[at.index(header)] = byte;
        }
        if let Ok(header) = parse_header(&file) {
            for entry in header.entries {
                prop_assert!(entry.range.end <= file.len());
            }
        }
    }
}

/// A zstd chunk of the fixtures, written by the reference encoder, and its array's metadata.
fn frame() -> &'static (ArrayMeta, Vec<u8>) {
    static FRAME: OnceLock<(ArrayMeta, Vec<u8>)> = OnceLock::new();
    FRAME.get_or_init(|| {
        let array = "ckpt_pi0_fp32_noocdbt/params/params.PaliGemma.img.pos_embedding";
        let dir = fixture("B_jax").join(array);
        let meta = parse_zarray(&std::fs::read(dir.join(".zarray")).unwrap()).unwrap();
        (meta, std::fs::read(dir.join("0.0.0")).unwrap())
    })
}

/// Opens and loads everything.
fn load_all(dir: &Path) -> Result<Checkpoint, String> {
    let checkpoint = open(dir).map_err(|e: CheckpointError| e.to_string())?;
    for name in checkpoint.source.names() {
        checkpoint.source.load(&name).map_err(|e| e.to_string())?;
    }
    Ok(checkpoint)
}

fn damaged_copy(from: &str) -> (tempfile::TempDir, Vec<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    support::copy(&fixture(from), dir.path());
    let files = support::files_below(&dir.path().join("params"));
    (dir, files)
}

/// Truncates and flips every file of a tree. Array bytes are covered by no checksum unless the
/// zstd frame has one, so a flip there may go unnoticed; it must not do worse.
#[test]
fn damaged_trees_yield_an_error_or_weights() {
    for tree in ["B_jax/ckpt_pi0_bf16", "B_jax/ckpt_pi0_fp32_noocdbt"] {
        let (dir, files) = damaged_copy(tree);
        let mut noticed = 0;
        for (turn, path) in files.iter().enumerate() {
            let good = std::fs::read(path).unwrap();
            for part in 0..2usize {
                let at = (good.len() * part / 2 + turn) % good.len();
                let mut flipped = good.clone();
                flipped[at] ^= 0x5a;
                for bytes in [&flipped[..], &good[..at]] {
                    std::fs::write(path, bytes).unwrap();
                    noticed += usize::from(load_all(dir.path()).is_err());
                }
            }
            std::fs::write(path, &good).unwrap();
        }
        assert!(noticed > files.len(), "{noticed} of {}", 4 * files.len());
        load_all(dir.path()).unwrap();
    }
}

#[test]
fn a_missing_data_file_is_named() {
    let (dir, files) = damaged_copy("B_jax/ckpt_pi0_bf16");
    let largest = files.iter().max_by_key(|p| p.metadata().unwrap().len()).unwrap();
    let name = largest.file_name().unwrap().to_string_lossy().into_owned();
    let good = std::fs::read(largest).unwrap();
    std::fs::write(largest, &good[..good.len() / 2]).unwrap();
    let text = load_all(dir.path()).map(drop).unwrap_err();
    assert!(text.contains(&name) && text.contains("reach past the end"), "{text}");
    std::fs::remove_file(largest).unwrap();
    let text = load_all(dir.path()).map(drop).unwrap_err();
    assert!(text.contains(&name) && text.contains("can't read"), "{text}");
}

#[test]
fn chunks_of_the_wrong_length_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for (zstd, stored) in [(false, 3usize), (false, 5), (true, 3), (true, 5)] {
        let path = dir.path().join(format!("{zstd}{stored}")).join("params.a");
        let values = vec![1.0; stored];
        support::write_zarr(&path, &[stored], &[stored], &values, zstd, &|_| false);
        let meta = std::fs::read_to_string(path.join(".zarray")).unwrap();
        let meta = meta.replace(&format!("[{stored}]"), "[4]");
        std::fs::write(path.join(".zarray"), meta).unwrap();
        let arrays = Arrays::open(path.parent().unwrap()).unwrap();
        let text = arrays.read("a").unwrap_err().to_string();
        assert!(text.contains("array `params.a`: chunk `0`"), "{text}");
        assert!(text.contains("16"), "{text}");
    }
}

/// What follows a frame is no part of it: the chunk was written over by something else.
#[test]
fn bytes_behind_a_frame_are_noticed() {
    let (meta, good) = frame();
    let read = |bytes: &[u8]| read_array(meta, &|_: &str| Ok(Some((bytes.len() as u64, bytes))));
    read(good).unwrap();
    let text = read(&[good, &[0][..]].concat()).unwrap_err().to_string();
    assert!(text.contains("after the end of the frame"), "{text}");
}

/// A tree that refers to a file outside its root.
#[test]
fn data_files_outside_the_database_are_refused() {
    let (dir, files) = damaged_copy("B_jax/ckpt_pi0_bf16");
    let manifest = files.iter().find(|p| p.ends_with("params/manifest.ocdbt")).unwrap();
    let mut blob = std::fs::read(manifest).unwrap();
    let at = blob.windows(2).position(|w| w == b"d/").unwrap();
    blob[at..at + 3].copy_from_slice(b"../");
    reseal(&mut blob);
    std::fs::write(manifest, &blob).unwrap();
    let text = load_all(dir.path()).map(drop).unwrap_err();
    assert!(text.contains("outside the database"), "{text}");
}
