//! `kernels/*.cu` → `cubin/*.sm_90a.cubin` and a lock file that says what they were made from.
//!
//! `cargo xtask kernels` compiles what changed, `--check` recompiles everything and compares bytes,
//! and a plain test compares the lock with sources and cubins without a compiler.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

const FLAGS: &[&str] =
    &["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-cubin"];

/// Entry of the subcommand.
pub fn main(args: &[String]) -> Result<()> {
    let check = match args {
        [] => false,
        [flag] if flag == "--check" => true,
        _ => bail!("usage: cargo xtask kernels [--check]"),
    };
    let folders = Folders::of_workspace();
    let nvcc = find_nvcc()?;
    let compiler = compiler_version(&nvcc)?;
    let old = folders.read_lock().unwrap_or_default();
    let mut kernels = Map::new();
    for stem in folders.stems()? {
        let sources = folders.sources(&stem)?;
        let cubin = folders.cubin(&stem);
        let known = &old["kernels"][&stem];
        let fresh = old["compiler"] == json!(compiler)
            && old["flags"] == json!(FLAGS)
            && known["sources"] == json!(sources)
            && std::fs::read(&cubin).is_ok_and(|b| known["cubin"] == json!(hash(&b)));
        if fresh && !check {
            kernels.insert(stem, known.clone());
            continue;
        }
        println!("compiling {stem}.cu");
        let (bytes, entries) = compile(&nvcc, &folders, &stem)?;
        if check {
            ensure!(
                std::fs::read(&cubin).is_ok_and(|b| b == bytes),
                "{} differs from a fresh compilation: run `cargo xtask kernels`",
                cubin.display()
            );
        } else {
            std::fs::create_dir_all(&folders.cubins)?;
            std::fs::write(&cubin, &bytes)?;
        }
        let entry = json!({ "sources": sources, "cubin": hash(&bytes), "entries": entries });
        kernels.insert(stem, entry);
    }
    let lock = json!({ "compiler": compiler, "flags": FLAGS, "kernels": kernels });
    if check {
        ensure!(lock == old, "kernels.lock.json is stale: run `cargo xtask kernels`");
        println!("{} cubins are what their sources compile to", kernels_of(&lock).len());
        return Ok(());
    }
    folders.remove_strays(&lock)?;
    std::fs::write(folders.lock(), serde_json::to_string_pretty(&lock)? + "\n")?;
    let spilling = spilling(&lock);
    ensure!(spilling.is_empty(), "written, but these kernels spill registers: {spilling:?}");
    Ok(())
}

/// Files whose kernels still spill, with the most bytes a thread of any of them may: a debt to be
/// paid off. No other kernel spills, and none of these more.
const KNOWN_SPILLS: &[(&str, u64)] = &[("gemm_sm90", 68)];

/// `file:entry (bytes)` of every kernel that spills more than is known.
fn spilling(lock: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (stem, kernel) in lock["kernels"].as_object().into_iter().flatten() {
        let known = KNOWN_SPILLS.iter().find(|(file, _)| file == stem).map_or(0, |(_, most)| *most);
        for (entry, used) in kernel["entries"].as_object().into_iter().flatten() {
            let bytes = used["spill_bytes"].as_u64().unwrap_or(u64::MAX);
            if bytes > known {
                found.push(format!("{stem}:{entry} ({bytes})"));
            }
        }
    }
    found
}

fn kernels_of(lock: &Value) -> BTreeSet<String> {
    lock["kernels"].as_object().map(|k| k.keys().cloned().collect()).unwrap_or_default()
}

struct Folders {
    kernels: PathBuf,
    cubins: PathBuf,
}

impl Folders {
    fn of_workspace() -> Self {
        let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/cuda");
        Folders { kernels: cuda.join("kernels"), cubins: cuda.join("cubin") }
    }

    fn lock(&self) -> PathBuf {
        self.cubins.join("kernels.lock.json")
    }

    fn cubin(&self, stem: &str) -> PathBuf {
        self.cubins.join(format!("{stem}.sm_90a.cubin"))
    }

    fn read_lock(&self) -> Result<Value> {
        let text = std::fs::read_to_string(self.lock()).context("cubin/kernels.lock.json")?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Stems of all `.cu` files, sorted.
    fn stems(&self) -> Result<Vec<String>> {
        let mut stems = Vec::new();
        for entry in std::fs::read_dir(&self.kernels)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(stem) = name.strip_suffix(".cu") {
                stems.push(stem.to_string());
            }
        }
        stems.sort();
        Ok(stems)
    }

    /// Hashes of a `.cu` file and of every header of ours it reaches.
    fn sources(&self, stem: &str) -> Result<BTreeMap<String, String>> {
        let mut found = BTreeMap::new();
        let mut open = vec![format!("{stem}.cu")];
        while let Some(name) = open.pop() {
            if found.contains_key(&name) {
                continue;
            }
            let text = std::fs::read_to_string(self.kernels.join(&name))
                .with_context(|| format!("kernels/{name}"))?;
            for line in text.lines() {
                let include = line.trim().strip_prefix("#include \"");
                if let Some(header) = include.and_then(|rest| rest.split('"').next()) {
                    open.push(header.to_string());
                }
            }
            found.insert(name, hash(text.as_bytes()));
        }
        Ok(found)
    }

    /// Deletes cubins without a source.
    fn remove_strays(&self, lock: &Value) -> Result<()> {
        let keep: BTreeSet<PathBuf> = kernels_of(lock).iter().map(|s| self.cubin(s)).collect();
        for entry in std::fs::read_dir(&self.cubins)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "cubin") && !keep.contains(&path) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// `NVCC`, then `CUDA_WHEELS` (a folder of NVIDIA's PyPI packages), then the PATH.
fn find_nvcc() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(nvcc) = set("NVCC") {
        return Ok(nvcc);
    }
    if let Some(wheels) = set("CUDA_WHEELS") {
        let nvcc = wheels.join("nvidia/cu13/bin/nvcc");
        ensure!(nvcc.exists(), "CUDA_WHEELS is set but {} is not there", nvcc.display());
        return Ok(nvcc);
    }
    let paths = set("PATH").unwrap_or_default();
    std::env::split_paths(&paths).map(|p| p.join("nvcc")).find(|p| p.exists()).context(
        "nvcc 13.0 was not found: set NVCC, or CUDA_WHEELS to the folder of the PyPI packages \
         nvidia-cuda-nvcc, -nvvm, -crt, -runtime, -cccl",
    )
}

fn compiler_version(nvcc: &Path) -> Result<String> {
    let output = Command::new(nvcc).arg("--version").output().context("running nvcc")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.lines().find(|l| l.contains("release")).and_then(|l| l.rsplit(' ').next());
    version.map(|v| format!("nvcc {v}")).context("nvcc --version printed no release")
}

/// Compiles one file; returns the cubin and what ptxas says of each entry.
fn compile(nvcc: &Path, folders: &Folders, stem: &str) -> Result<(Vec<u8>, Value)> {
    let target = std::env::temp_dir().join(format!("{stem}.{}.cubin", std::process::id()));
    let output = Command::new(nvcc)
        .current_dir(&folders.kernels)
        .args(FLAGS)
        .arg("-o")
        .arg(&target)
        .arg(format!("{stem}.cu"))
        .output()
        .context("running nvcc")?;
    let report = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{stem}.cu does not compile:\n{report}");
    let bytes = std::fs::read(&target).context("reading nvcc's output")?;
    std::fs::remove_file(&target)?;
    let entries = resources(&report);
    ensure!(entries.as_object().is_some_and(|e| !e.is_empty()), "{stem}.cu has no kernel");
    Ok((bytes, entries))
}

/// ptxas' verbose report → `{entry: {registers, shared_bytes, spill_bytes}}`.
fn resources(report: &str) -> Value {
    let mut entries = Map::new();
    let (mut entry, mut spills) = (None, 0);
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            entry = rest.split('\'').next().map(str::to_string);
            spills = 0;
        } else if line.contains("spill stores") {
            spills = number_before(line, " bytes spill stores")
                + number_before(line, " bytes spill loads");
        } else if let (Some(name), true) = (&entry, line.contains("Used ")) {
            let used = json!({
                "registers": number_before(line, " registers"),
                "shared_bytes": number_before(line, " bytes smem"),
                "spill_bytes": spills,
            });
            entries.insert(name.clone(), used);
            entry = None;
        }
    }
    Value::Object(entries)
}

fn number_before(line: &str, label: &str) -> u64 {
    let before = line.split(label).next().filter(|b| b.len() < line.len());
    before.and_then(|b| b.rsplit(' ').next()).and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// FNV-1a, 128 bits: tells versions of a file apart; no protection against malice.
fn hash(bytes: &[u8]) -> String {
    let start = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58du128;
    let step = |h: u128, b: &u8| (h ^ *b as u128).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
    format!("{:032x}", bytes.iter().fold(start, step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_matches_sources_and_cubins() {
        let folders = Folders::of_workspace();
        let lock = folders.read_lock().unwrap();
        let stems: BTreeSet<String> = folders.stems().unwrap().into_iter().collect();
        assert_eq!(stems, kernels_of(&lock), "run `cargo xtask kernels`");
        assert_eq!(lock["flags"], json!(FLAGS), "run `cargo xtask kernels`");
        for stem in stems {
            let entry = &lock["kernels"][&stem];
            let sources = json!(folders.sources(&stem).unwrap());
            assert_eq!(entry["sources"], sources, "{stem}.cu changed: run `cargo xtask kernels`");
            let cubin = std::fs::read(folders.cubin(&stem)).unwrap();
            assert_eq!(entry["cubin"], json!(hash(&cubin)), "{stem}: the cubin was replaced");
        }
        assert_eq!(spilling(&lock), Vec::<String>::new(), "kernels spill registers");
    }

    #[test]
    fn reads_the_report_of_ptxas() {
        let report = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
                      ptxas info    : Function properties for k\n\
                      8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                      ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem\n";
        let want = json!({"k": {"registers": 40, "shared_bytes": 1024, "spill_bytes": 16}});
        assert_eq!(resources(report), want);
    }

    #[test]
    fn hash_tells_files_apart() {
        assert_eq!(hash(b""), "6c62272e07bb014262b821756295c58d");
        assert_eq!(hash(b"a"), "d228cb696f1a8caf78912b704e4a8964");
    }
}
