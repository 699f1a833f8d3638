//! CUDA C++ source → cubin at run time, for GPUs no cubin was built for, with a disk cache.

use std::ffi::{CString, c_char, c_int, c_void};
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pirouette_model::BackendError;

use super::table::table;

table!(Nvrtc {
    version = "nvrtcVersion"(*mut c_int, *mut c_int);
    create = "nvrtcCreateProgram"(
        *mut *mut c_void, *const c_char, *const c_char, c_int, *const *const c_char,
        *const *const c_char,
    );
    compile = "nvrtcCompileProgram"(*mut c_void, c_int, *const *const c_char);
    log_bytes = "nvrtcGetProgramLogSize"(*mut c_void, *mut usize);
    log = "nvrtcGetProgramLog"(*mut c_void, *mut c_char);
    cubin_bytes = "nvrtcGetCUBINSize"(*mut c_void, *mut usize);
    cubin = "nvrtcGetCUBIN"(*mut c_void, *mut c_char);
    destroy = "nvrtcDestroyProgram"(*mut *mut c_void);
});

const LIBRARIES: &[&str] = &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

fn library() -> Result<&'static Nvrtc, BackendError> {
    static LIBRARY: OnceLock<Option<Nvrtc>> = OnceLock::new();
    let open = || {
        // SAFETY: loading the vendor's compiler library runs its initialisers, nothing of ours.
        let library =
            LIBRARIES.iter().find_map(|n| unsafe { libloading::Library::new(*n) }.ok())?;
        Nvrtc::load(library).ok()
    };
    LIBRARY.get_or_init(open).as_ref().ok_or_else(|| {
        BackendError::Unavailable(format!(
            "this GPU has no built-in kernels and the run-time compiler ({}) was not found: \
             install CUDA's NVRTC, or use `--device cpu`",
            LIBRARIES.join(", ")
        ))
    })
}

/// A source file with the headers it includes, all by name.
pub struct Source<'a> {
    /// File name, for messages.
    pub name: &'a str,
    /// Text.
    pub text: &'a str,
    /// (name, text) of the headers.
    pub headers: &'a [(&'a str, &'a str)],
}

/// Compiles for `sm_<major><minor>`, or takes the result of an earlier run from the cache.
pub fn cubin(source: &Source<'_>, (major, minor): (u32, u32)) -> Result<Vec<u8>, BackendError> {
    let nvrtc = library()?;
    let options = options((major, minor));
    let path = cache_path(nvrtc, source, &options);
    if let Some(cached) = path.as_ref().and_then(|p| std::fs::read(p).ok()).and_then(whole) {
        return Ok(cached);
    }
    let cubin = compile(nvrtc, source, &options)?;
    if let Some(path) = path {
        store(&path, &cubin);
    }
    Ok(cubin)
}

fn options((major, minor): (u32, u32)) -> [String; 2] {
    [format!("--gpu-architecture=sm_{major}{minor}"), "--std=c++17".to_string()]
}

/// Compiles without the cache; `None` where the run-time compiler is not installed.
#[cfg(test)]
pub(crate) fn compile_uncached(
    source: &Source<'_>,
    capability: (u32, u32),
) -> Option<Result<Vec<u8>, BackendError>> {
    let nvrtc = library().ok()?;
    Some(compile(nvrtc, source, &options(capability)))
}

/// `$XDG_CACHE_HOME/pirouette/cubin/<name>.<hash>.cubin`; `None` when there is no home to cache in.
fn cache_path(nvrtc: &Nvrtc, source: &Source<'_>, options: &[String]) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let root = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: out-pointers to live integers.
    unsafe { (nvrtc.version)(&mut major, &mut minor) };
    let mut hash = DefaultHasher::new();
    (major, minor, options, source.headers, source.name, source.text).hash(&mut hash);
    let name = source.name.trim_end_matches(".cu");
    Some(root.join("pirouette/cubin").join(format!("{name}.{:016x}.cubin", hash.finish())))
}

/// Writes beside the target and renames, so that no reader sees half a file; behind the cubin its
/// hash, since the driver trusts what a cut one says of itself. The name is by chance: processes of
/// containers that share a home have the same numbers. A cache that can't be written costs time,
/// not correctness.
fn store(path: &Path, cubin: &[u8]) {
    let chance = RandomState::new().build_hasher().finish();
    let temporary = path.with_extension(format!("{chance:016x}.tmp"));
    let file = [cubin, &hash(cubin)].concat();
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&temporary, file))
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
}

/// The cubin of a cached file, if it is as it was written.
fn whole(mut file: Vec<u8>) -> Option<Vec<u8>> {
    let (cubin, behind) = file.split_last_chunk::<8>()?;
    if !cubin.starts_with(b"\x7fELF") || *behind != hash(cubin) {
        return None;
    }
    file.truncate(file.len() - 8);
    Some(file)
}

fn hash(bytes: &[u8]) -> [u8; 8] {
    let mut hash = DefaultHasher::new();
    hash.write(bytes);
    hash.finish().to_le_bytes()
}

fn compile(
    nvrtc: &Nvrtc,
    source: &Source<'_>,
    options: &[String],
) -> Result<Vec<u8>, BackendError> {
    let text = |s: &str| {
        CString::new(s).map_err(|_| BackendError::Device("kernel source holds a zero byte".into()))
    };
    let (name, body) = (text(source.name)?, text(source.text)?);
    let all = |texts: &[&str]| -> Result<Vec<CString>, BackendError> {
        texts.iter().map(|t| text(t)).collect()
    };
    let names = all(&source.headers.iter().map(|h| h.0).collect::<Vec<_>>())?;
    let texts = all(&source.headers.iter().map(|h| h.1).collect::<Vec<_>>())?;
    let header_names: Vec<_> = names.iter().map(|n| n.as_ptr()).collect();
    let header_texts: Vec<_> = texts.iter().map(|t| t.as_ptr()).collect();
    let options = all(&options.iter().map(String::as_str).collect::<Vec<_>>())?;
    let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings are zero-terminated and outlive the calls; buffers are sized by the
    // library's own answers; the program is destroyed once, at the end.
    unsafe {
        let code = (nvrtc.create)(
            &mut program,
            body.as_ptr(),
            name.as_ptr(),
            names.len() as c_int,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        );
        if code != 0 {
            return Err(BackendError::Device(format!("nvrtcCreateProgram failed with {code}")));
        }
        let code = (nvrtc.compile)(program, options.len() as c_int, options.as_ptr());
        let result = if code != 0 {
            let mut bytes = 0;
            (nvrtc.log_bytes)(program, &mut bytes);
            let mut log = vec![0u8; bytes.min(1 << 20)];
            if bytes == log.len() {
                (nvrtc.log)(program, log.as_mut_ptr().cast());
            }
            let log = String::from_utf8_lossy(&log);
            Err(BackendError::Device(format!("compiling {} failed: {log}", source.name)))
        } else {
            let mut bytes = 0;
            (nvrtc.cubin_bytes)(program, &mut bytes);
            let mut cubin = vec![0u8; bytes];
            (nvrtc.cubin)(program, cubin.as_mut_ptr().cast());
            Ok(cubin)
        };
        (nvrtc.destroy)(&mut program);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cached_cubin_comes_back_only_whole() {
        let folder = std::env::temp_dir().join(format!("pirouette-cubin-{}", std::process::id()));
        let path = folder.join("deeper/kernel.0.cubin");
        let cubin = [b"\x7fELF".as_slice(), &[7; 1000]].concat();
        store(&path, &cubin);
        let file = std::fs::read(&path).unwrap();
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no leavings");
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!(whole(file.clone()), Some(cubin.clone()));
        for cut in [0, 7, 8, 500, file.len() - 1] {
            assert_eq!(whole(file[..cut].to_vec()), None, "{cut}");
        }
        assert_eq!(whole(cubin), None, "as earlier versions wrote it");
    }
}
