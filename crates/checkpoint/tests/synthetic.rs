//! The weight recipe against openpi-side fixtures: every tensor of the tiny models, and head and
//! checksum of full-size tensors.

mod support;

use pirouette_checkpoint::{Synthetic, open};
use pirouette_model::{Config, TensorSource};
use serde_json::Value;
use support::fixture;

/// Tensors larger than this are checked by their checksum only if `PIROUETTE_SLOW_TESTS` is set.
const SMALL: usize = 8 << 20;

#[test]
fn tiny_models_are_the_recipe_unrounded() {
    for dir in ["A_tiny/pi0", "A_tiny/pi05"] {
        let stored = open(&fixture(dir)).unwrap();
        let made = Synthetic::unrounded(&stored.config, 20261122);
        support::assert_same(&made, &*stored.source, &|v| v);
        let rounded = Synthetic::new(&stored.config, 20261122);
        support::assert_same(&rounded, &*stored.source, &|v| half::bf16::from_f32(v).to_f32());
    }
}

#[test]
fn full_size_tensors_have_the_recorded_heads_and_checksums() {
    for (dir, config) in [("pi0", Config::pi0()), ("pi05", Config::pi05())] {
        check_manifest(dir, &config);
    }
}

fn check_manifest(dir: &str, config: &Config) {
    let text = std::fs::read(fixture(&format!("C_full/{dir}/manifest.json"))).unwrap();
    let manifest: Value = serde_json::from_slice(&text).unwrap();
    let tensors = manifest["tensors"].as_object().unwrap();
    let made = Synthetic::new(config, manifest["seed"].as_u64().unwrap());
    let slow = std::env::var_os("PIROUETTE_SLOW_TESTS").is_some();
    let mut names: Vec<&String> = tensors.keys().collect();
    names.sort();
    assert_eq!(made.names().iter().collect::<Vec<_>>(), names);
    let mut skipped = 0;
    let mut checked = 0;
    for (name, entry) in tensors {
        let shape: Vec<usize> = serde_json::from_value(entry["shape"].clone()).unwrap();
        assert_eq!(made.shape(name), Some(shape.clone()), "{name}");
        let spread = made.spread(name).unwrap();
        assert_eq!(hex(spread.offset.to_bits()), entry["offset_f32_hex"], "{name}");
        assert_eq!(hex(spread.scale.to_bits()), entry["scale_f32_hex"], "{name}");
        let head = made.head(name, 4).unwrap();
        for (element, expected) in head.iter().zip(entry["first4_bf16_hex"].as_array().unwrap()) {
            assert_eq!(hex(element.to_bits())[..4], *expected, "{name}");
        }
        if shape.iter().product::<usize>() > SMALL && !slow {
            skipped += 1;
            continue;
        }
        // Every eighth layer's checksum in a plain run: the rest differ in the name only.
        let layer = name.split('.').find_map(|part| part.parse::<usize>().ok());
        if slow || layer.is_none_or(|l| l % 8 == 0) {
            let tensor = made.load(name).unwrap();
            assert_eq!(hex(crc32(&tensor.data)), entry["crc32_of_bf16_le"], "{name}");
            checked += 1;
        }
    }
    println!("{dir}: {checked} checksums of {}, {skipped} large tensors skipped", tensors.len());
    assert!(checked > 100);
    assert!(!slow || skipped == 0);
}

fn hex(bits: u32) -> String {
    format!("{bits:08x}")
}

/// CRC-32 as zlib computes it, eight bytes at a time.
fn crc32(data: &[u8]) -> u32 {
    let mut tables = [[0u32; 256]; 8];
    for i in 0..256u32 {
        tables[0][i as usize] =
            (0..8).fold(i, |c, _| if c & 1 == 1 { (c >> 1) ^ 0xEDB8_8320 } else { c >> 1 });
    }
    for t in 1..8 {
        for i in 0..256 {
            let c = tables[t - 1][i];
            tables[t][i] = (c >> 8) ^ tables[0][(c & 255) as usize];
        }
    }
    let (words, rest) = data.as_chunks::<8>();
    let crc = words.iter().fold(u32::MAX, |crc, w| {
        let low = (crc ^ u32::from_le_bytes([w[0], w[1], w[2], w[3]])).to_le_bytes();
        (0..4).fold(0, |c, i| {
            c ^ tables[7 - i][usize::from(low[i])] ^ tables[3 - i][usize::from(w[4 + i])]
        })
    });
    !rest.iter().fold(crc, |c, b| (c >> 8) ^ tables[0][((c ^ u32::from(*b)) & 255) as usize])
}

#[test]
fn crc32_is_zlibs() {
    assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
}
