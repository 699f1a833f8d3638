//! CUPTI, NVIDIA's tracing library, opened at run time: when every node of a replayed graph ran.
//!
//! What the library hands over lies in statics (`cupti_callbacks.rs`), so only one [`Tracing`]
//! exists at a time.

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};

use pirouette_model::BackendError;

use super::GraphNode;
use super::activity::{Activity, ActivityKind, parse};
use super::cupti_callbacks::{
    BufferCompleted, BufferRequested, CLONES, COMPLETED, Callback, Filled, NODE_CLONED, RESOURCE,
    buffer_completed, buffer_requested, free, locked, node_cloned,
};
use super::cupti_paths;
use super::table::{Handle, table};

table!(Functions {
    version = "cuptiGetVersion"(*mut u32);
    result_string = "cuptiGetResultString"(c_int, *mut *const c_char);
    timestamp = "cuptiGetTimestamp"(*mut u64);
    subscribe = "cuptiSubscribe"(*mut Handle, Callback, *mut c_void);
    unsubscribe = "cuptiUnsubscribe"(Handle);
    enable_callback = "cuptiEnableCallback"(u32, Handle, c_int, u32);
    register = "cuptiActivityRegisterCallbacks"(BufferRequested, BufferCompleted);
    enable = "cuptiActivityEnable"(u32);
    disable = "cuptiActivityDisable"(u32);
    flush = "cuptiActivityFlushAll"(u32);
    next_record = "cuptiActivityGetNextRecord"(*mut u8, usize, *mut *mut u8);
    dropped = "cuptiActivityGetNumDroppedRecords"(Handle, u32, *mut usize);
    node_id = "cuptiGetGraphNodeId"(Handle, *mut u64);
});

/// The first version whose layout of records is known, CUDA 12.4, and the first that may differ.
const VERSIONS: std::ops::Range<u32> = 22..140_000;

/// `CUPTI_ERROR_MAX_LIMIT_REACHED`: a buffer has no further record.
const NO_MORE: c_int = 12;

/// The opened library; it stays loaded, since it keeps threads.
pub struct Cupti {
    pub(super) functions: Functions,
    /// Where it was found.
    pub path: String,
    /// 28 for CUDA 12.9 update 1; 130001 for 13.0 update 1.
    pub version: u32,
}

pub(super) static LIBRARY: OnceLock<Cupti> = OnceLock::new();
static ALONE: Mutex<()> = Mutex::new(());

impl Cupti {
    /// Opens the library at `place` (a file, a CUDA folder, a Python environment or its
    /// `site-packages`), else where `PIROUETTE_CUPTI` says, else where installers put it. Never
    /// panics without it: the error says how to get it. The first one opened serves from then on.
    pub fn open(place: Option<&Path>) -> Result<&'static Cupti, BackendError> {
        if let Some(cupti) = LIBRARY.get() {
            return Ok(cupti);
        }
        let named = std::env::var_os("PIROUETTE_CUPTI").filter(|v| !v.is_empty());
        let named = place.map(Path::to_path_buf).or(named.map(PathBuf::from));
        let mut first_error = None;
        for path in cupti_paths::candidates(named.as_deref()) {
            match Self::load(&path) {
                Ok(cupti) => return Ok(LIBRARY.get_or_init(|| cupti)),
                // A name for the loader to look up that it does not find is no news.
                Err(error) if path.is_absolute() || path.exists() => {
                    first_error.get_or_insert(error);
                }
                Err(_) => {}
            }
        }
        let place = named.map_or("was found in none of the usual places".into(), |n| {
            format!("was not found under {}", n.display())
        });
        Err(BackendError::Unavailable(first_error.unwrap_or_else(|| {
            format!(
                "NVIDIA's tracing library CUPTI ({}) {place}: it comes with the CUDA \
                 toolkit and as `pip install nvidia-cuda-cupti`; name its folder or that Python \
                 environment with --cupti or PIROUETTE_CUPTI",
                cupti_paths::NAMES.join(", ")
            )
        })))
    }

    fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: loading the vendor's library runs its initialisers, nothing of ours.
        let library = unsafe { libloading::Library::new(path) }
            .map_err(|error| format!("{} can't be loaded: {error}", path.display()))?;
        let path = path.display().to_string();
        let functions =
            Functions::load(library).map_err(|symbol| format!("{path} lacks `{symbol}`"))?;
        let mut version = 0;
        // SAFETY: an out-pointer to a live integer.
        let code = unsafe { (functions.version)(&mut version) };
        let cupti = Cupti { functions, path, version };
        if code != 0 {
            return Err(format!("{}: cuptiGetVersion: {}", cupti.path, cupti.describe(code)));
        }
        if !VERSIONS.contains(&version) {
            return Err(format!(
                "{} is CUPTI version {version}: those of CUDA 12.4 to 13.x are known",
                cupti.path
            ));
        }
        Ok(cupti)
    }

    fn describe(&self, code: c_int) -> String {
        let mut text = std::ptr::null();
        // SAFETY: the library stores a pointer to a static string, or leaves null.
        let name = unsafe {
            (self.functions.result_string)(code, &mut text);
            if text.is_null() { None } else { CStr::from_ptr(text).to_str().ok() }
        };
        let hint = match code {
            35 | 40 => {
                ": run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
            }
            39 => ": another tool (Nsight, compute-sanitizer, a debugger) traces this process",
            999 => ": is the driver older than this library?",
            _ => "",
        };
        format!("{} ({code}){hint}", name.unwrap_or("CUPTI error"))
    }

    fn check(&self, call: &str, code: c_int) -> Result<(), BackendError> {
        match code {
            0 => Ok(()),
            _ => {
                let (path, error) = (&self.path, self.describe(code));
                Err(BackendError::Unavailable(format!("{call} of {path}: {error}")))
            }
        }
    }

    /// Appends a buffer's records and counts their sizes.
    fn read(
        &self,
        buffer: &Filled,
        all: &mut Vec<Activity>,
        sizes: &mut Sizes,
    ) -> Result<(), String> {
        let begin = buffer.address as *mut u8;
        let mut record = std::ptr::null_mut();
        let mut last: Option<(u32, usize)> = None;
        loop {
            // SAFETY: the buffer is alive and CUPTI filled `valid` bytes of it; `record` is null
            // or what the last call returned.
            let code = unsafe { (self.functions.next_record)(begin, buffer.valid, &mut record) };
            let at = if code == 0 { (record as usize).wrapping_sub(buffer.address) } else { 0 };
            if let Some((kind, from)) = last {
                let end = if code == 0 { at } else { buffer.valid };
                *sizes.entry((kind, end.saturating_sub(from))).or_default() += 1;
            }
            match code {
                0 => {}
                NO_MORE => return Ok(()),
                other => {
                    return Err(format!("cuptiActivityGetNextRecord: {}", self.describe(other)));
                }
            }
            if at >= buffer.valid {
                return Err("a record outside its buffer".into());
            }
            // SAFETY: `valid` bytes of the buffer are initialised, and `at` is below that.
            let bytes = unsafe { std::slice::from_raw_parts(record, buffer.valid - at) };
            let kind = bytes.first_chunk().map_or(0, |b| u32::from_ne_bytes(*b));
            last = Some((kind, at));
            if let Some((mut activity, name)) = parse(bytes)? {
                if name != 0 {
                    // SAFETY: in the versions opened this field is a zero-terminated string that
                    // CUPTI keeps while the module is loaded.
                    let text = unsafe { CStr::from_ptr(name as *const c_char) };
                    activity.name = Some(text.to_string_lossy().into_owned());
                }
                all.push(activity);
            }
        }
    }
}

/// (`CUpti_ActivityKind`, bytes) of records, and how many; the last one of a buffer counts as long
/// as the room behind it.
pub type Sizes = BTreeMap<(u32, usize), usize>;

/// Records of every kernel, copy and fill of this process, until it is dropped.
pub struct Tracing {
    /// The library.
    pub cupti: &'static Cupti,
    subscriber: Handle,
    /// Sizes of the records seen.
    pub sizes: Sizes,
    _alone: MutexGuard<'static, ()>,
}

impl Tracing {
    /// Begins. Graphs must be instantiated after this for their nodes to be told apart.
    pub fn start(cupti: &'static Cupti) -> Result<Self, BackendError> {
        let alone = locked(&ALONE);
        locked(&CLONES).clear();
        let f = &cupti.functions;
        let mut subscriber = std::ptr::null_mut();
        // SAFETY: an out-pointer to a live handle and a callback that lives as long as the process.
        let code = unsafe { (f.subscribe)(&mut subscriber, node_cloned, std::ptr::null_mut()) };
        cupti.check("cuptiSubscribe", code)?;
        let tracing = Tracing { cupti, subscriber, sizes: Sizes::new(), _alone: alone };
        // SAFETY: the subscriber is alive; callbacks live as long as the process.
        unsafe {
            let code = (f.enable_callback)(1, subscriber, RESOURCE, NODE_CLONED);
            cupti.check("cuptiEnableCallback", code)?;
            let code = (f.register)(buffer_requested, buffer_completed);
            cupti.check("cuptiActivityRegisterCallbacks", code)?;
            for kind in ActivityKind::ALL {
                cupti.check(&format!("cuptiActivityEnable({kind:?})"), (f.enable)(kind.id()))?;
            }
        }
        Ok(tracing)
    }

    /// The number that records give a node of a graph.
    pub fn node_id(&self, node: GraphNode) -> Result<u64, BackendError> {
        let mut id = 0;
        // SAFETY: an out-pointer to a live integer; the node belongs to a graph under capture.
        let code = unsafe { (self.cupti.functions.node_id)(node.0, &mut id) };
        self.cupti.check("cuptiGetGraphNodeId", code)?;
        Ok(id)
    }

    /// Now, nanoseconds on the clock of the records.
    pub fn now_ns(&self) -> Result<u64, BackendError> {
        let mut now = 0;
        // SAFETY: an out-pointer to a live integer.
        let code = unsafe { (self.cupti.functions.timestamp)(&mut now) };
        self.cupti.check("cuptiGetTimestamp", code)?;
        Ok(now)
    }

    /// (clone, original) of the nodes cloned so far: instantiating a graph clones its nodes, and
    /// records carry the clones' numbers.
    pub fn clones(&self) -> Vec<(u64, u64)> {
        locked(&CLONES).clone()
    }

    /// Everything recorded since the last call. The device must be idle.
    pub fn take(&mut self) -> Result<Vec<Activity>, BackendError> {
        const FORCED: u32 = 1;
        // SAFETY: no arguments that could be wrong.
        let code = unsafe { (self.cupti.functions.flush)(FORCED) };
        self.cupti.check("cuptiActivityFlushAll", code)?;
        let mut all = Vec::new();
        let filled = std::mem::take(&mut *locked(&COMPLETED));
        let mut result = Ok(());
        for buffer in filled {
            if result.is_ok() {
                result = self.cupti.read(&buffer, &mut all, &mut self.sizes);
            }
            free(buffer);
        }
        let mut dropped = 0;
        // SAFETY: an out-pointer to a live integer; no context, for all of them.
        let code = unsafe { (self.cupti.functions.dropped)(std::ptr::null_mut(), 0, &mut dropped) };
        self.cupti.check("cuptiActivityGetNumDroppedRecords", code)?;
        if result.is_ok() && dropped > 0 {
            result = Err(format!("{dropped} records were dropped: too little room for them"));
        }
        let unavailable = |text| {
            let Cupti { path, version, .. } = self.cupti;
            BackendError::Unavailable(format!("records of {path} (version {version}): {text}"))
        };
        result.map_err(unavailable)?;
        Ok(all)
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let f = &self.cupti.functions;
        // SAFETY: kinds that may or may not be enabled; the subscriber is given up once, here.
        unsafe {
            for kind in ActivityKind::ALL {
                (f.disable)(kind.id());
            }
            (f.flush)(1);
            (f.enable_callback)(0, self.subscriber, RESOURCE, NODE_CLONED);
            (f.unsubscribe)(self.subscriber);
        }
        locked(&COMPLETED).drain(..).for_each(free);
    }
}

#[cfg(test)]
mod tests {
    use super::super::activity::tests::record;
    use super::*;

    #[test]
    fn a_machine_without_cupti_gets_an_answer() {
        let nowhere = std::env::temp_dir().join("no-cupti-here");
        match Cupti::open(Some(&nowhere)) {
            // A test before this one, or the machine itself, had it loaded.
            Ok(cupti) => assert!(VERSIONS.contains(&cupti.version)),
            Err(BackendError::Unavailable(text)) => {
                assert!(text.contains("pip install nvidia-cuda-cupti"), "{text}");
                assert!(text.contains("no-cupti-here"), "{text}");
            }
            Err(other) => panic!("{other}"),
        }
    }

    /// The real library walks records of the sizes that its header has. It needs no driver for it.
    #[test]
    fn the_library_walks_records_as_this_file_reads_them() {
        let cupti = match Cupti::open(None) {
            Ok(cupti) => cupti,
            Err(error) => return println!("skipped: {error}"),
        };
        let [kernel, copy, fill] = match cupti.version {
            22..=25 => [208, 88, 88],
            26..=28 => [208, 96, 88],
            130_000..130_100 => [216, 96, 88],
            other => return println!("skipped: sizes of version {other} are not in this test"),
        };
        let entry = c"gemm_add_128x64";
        let mut want = Vec::new();
        let mut bytes = Vec::new();
        for (i, kind) in [0, 1, 0, 2, 0].map(|k| ActivityKind::ALL[k]).into_iter().enumerate() {
            let n = i as u64 + 1;
            let activity = Activity {
                kind,
                start_ns: 1000 * n,
                end_ns: 1000 * n + 1,
                correlation: 9,
                node: 50 + n,
                graph: 3,
                device: 0,
                stream: 7,
                name: (kind == ActivityKind::Kernel).then(|| "gemm_add_128x64".into()),
            };
            let size = match kind {
                ActivityKind::Kernel => kernel,
                ActivityKind::Copy => copy,
                ActivityKind::Fill => fill,
            };
            bytes.extend(record(&activity, entry.as_ptr() as u64, size));
            want.push(activity);
        }
        // Words, so that records are aligned as CUPTI's are.
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|c| c.iter().rev().fold(0, |word, b| word << 8 | *b as u64))
            .collect();
        let buffer = Filled { address: words.as_ptr() as usize, valid: bytes.len() };
        let (mut got, mut sizes) = (Vec::new(), Sizes::new());
        cupti.read(&buffer, &mut got, &mut sizes).unwrap();
        assert_eq!(got, want);
        assert_eq!(sizes[&(ActivityKind::Kernel.id(), kernel)], 3);
        assert_eq!(sizes[&(ActivityKind::Copy.id(), copy)], 1);
        assert_eq!(sizes[&(ActivityKind::Fill.id(), fill)], 1);
        assert_eq!(
            cupti.describe(39).split(' ').next().map(|n| n.starts_with("CUPTI_ERROR")),
            Some(true)
        );
    }
}
