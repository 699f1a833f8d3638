//! A place that was named, or none → the files that may be CUPTI, in the order to try them.

use std::path::{Path, PathBuf};

/// Newest first.
pub const NAMES: [&str; 3] = ["libcupti.so.13", "libcupti.so.12", "libcupti.so"];

/// Where the library lies inside a CUDA folder, a `site-packages` or the folder itself.
const INSIDE: [&str; 8] = [
    "",
    "lib64",
    "lib",
    "extras/CUPTI/lib64",
    "targets/x86_64-linux/lib",
    "targets/sbsa-linux/lib",
    "nvidia/cu13/lib",
    "nvidia/cuda_cupti/lib",
];

/// Files to try. A file that is named is the only one; a folder that is named is searched alone.
pub fn candidates(named: Option<&Path>) -> Vec<PathBuf> {
    match named {
        Some(file) if file.is_file() => vec![file.to_path_buf()],
        Some(folder) => existing(&with_python(folder)),
        None => {
            // The loader's own search comes first: LD_LIBRARY_PATH is how people override.
            let mut all: Vec<PathBuf> = NAMES.map(PathBuf::from).into();
            all.extend(existing(&usual_roots()));
            all
        }
    }
}

fn usual_roots() -> Vec<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut roots: Vec<PathBuf> = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).collect();
    roots.extend(entries(Path::new("/usr/local"), "cuda"));
    roots.push("/opt/cuda".into());
    let home = set("HOME").map(|home| home.join(".local"));
    let python = [set("VIRTUAL_ENV"), set("CONDA_PREFIX"), home];
    let system = ["/usr/local", "/usr"].map(|root| Some(PathBuf::from(root)));
    for root in python.into_iter().chain(system).flatten() {
        roots.extend(packages(&root));
    }
    roots
}

/// A folder and, where it is a Python environment, its packages.
fn with_python(folder: &Path) -> Vec<PathBuf> {
    let mut all = vec![folder.to_path_buf()];
    all.extend(packages(folder));
    all
}

/// `lib/python3*/{site,dist}-packages` of a Python environment.
fn packages(root: &Path) -> Vec<PathBuf> {
    let versions = entries(&root.join("lib"), "python3");
    let kinds = ["site-packages", "dist-packages"];
    versions.iter().flat_map(|v| kinds.map(|kind| v.join(kind))).collect()
}

/// Entries of a folder whose names begin so, last name first: newer versions before older.
fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(listed) = std::fs::read_dir(folder) else { return Vec::new() };
    let begins = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    let mut found: Vec<PathBuf> = listed.flatten().map(|e| e.path()).filter(begins).collect();
    found.sort();
    found.reverse();
    found
}

fn existing(roots: &[PathBuf]) -> Vec<PathBuf> {
    let inside = roots.iter().flat_map(|root| INSIDE.map(|part| root.join(part)));
    let files = inside.flat_map(|folder| NAMES.map(|name| folder.join(name)));
    files.filter(|file| file.is_file()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_environments_and_files_are_understood() {
        let root = std::env::temp_dir().join(format!("cupti-paths-{}", std::process::id()));
        let place = |part: &str| {
            let file = root.join(part);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, "").unwrap();
            file
        };
        let toolkit = place("cuda/extras/CUPTI/lib64/libcupti.so.12");
        let wheel = "venv/lib/python3.11/site-packages/nvidia/cu13/lib/libcupti.so.13";
        let wheel = place(wheel);
        let packages = root.join("venv/lib/python3.11/site-packages");
        let found = |named: &Path| candidates(Some(named));
        assert_eq!(found(&root.join("cuda")), std::slice::from_ref(&toolkit));
        assert_eq!(found(&root.join("venv")), std::slice::from_ref(&wheel));
        assert_eq!(found(&packages), std::slice::from_ref(&wheel));
        assert_eq!(found(wheel.parent().unwrap()), std::slice::from_ref(&wheel));
        assert_eq!(found(&toolkit), std::slice::from_ref(&toolkit));
        assert!(found(&root.join("nothing")).is_empty());
        assert!(candidates(None).starts_with(&NAMES.map(PathBuf::from)));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
