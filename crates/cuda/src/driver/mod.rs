//! Safe handles over the CUDA driver: all of this crate's `unsafe` lies in this folder.
//!
//! [`Driver::open`] finds the library, [`Driver::context`] a device. Handles keep their context
//! alive. A failing call becomes `BackendError::Device` and marks the context dead: CUDA errors
//! are sticky, so later calls return the first failure instead of touching the device again.

mod activity;
pub mod cupti;
mod cupti_callbacks;
mod cupti_paths;
mod graph;
mod launch;
mod memory;
mod module;
pub mod nvrtc;
mod stream;
mod table;
mod tensor_map;

use std::ffi::{CStr, c_char, c_int};
use std::sync::{Arc, OnceLock};

use pirouette_model::BackendError;

pub use activity::{Activity, ActivityKind};
pub use graph::{Graph, GraphNode};
pub use launch::{Arg, Launch};
pub use memory::{DeviceMemory, Pinned};
pub use module::{Function, Module};
pub use stream::{Event, Stream};
pub use tensor_map::{Stored, Swizzle, TensorMap, TensorMapSpec};

/// The oldest driver API this crate works with: CUDA 13.0, driver 580.
const MINIMUM_VERSION: i32 = 13_000;

const LIBRARY: &[&str] = if cfg!(windows) { &["nvcuda.dll"] } else { &["libcuda.so.1"] };

/// The opened library.
pub struct Driver {
    cuda: table::Cuda,
    /// CUDA version the driver speaks, 13000 for 13.0.
    pub version: i32,
}

impl Driver {
    /// Opens `libcuda`, initialises it and checks its version. Never panics without CUDA: each way
    /// to fail is a message that names the remedy.
    pub fn open() -> Result<Arc<Driver>, BackendError> {
        let unavailable = |text: String| Err(BackendError::Unavailable(text));
        // SAFETY: loading the vendor's driver library runs its initialisers, nothing of ours.
        let library =
            LIBRARY.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
        let Some(library) = library else {
            let names = LIBRARY.join(", ");
            return unavailable(format!(
                "the CUDA driver library ({names}) was not found: install the NVIDIA driver, or \
                 use `--device cpu`"
            ));
        };
        let cuda = match table::Cuda::load(library) {
            Ok(cuda) => cuda,
            Err(symbol) => {
                return unavailable(format!(
                    "the CUDA driver lacks `{symbol}`, it is too old: driver 580 (CUDA 13.0) or \
                     newer is needed"
                ));
            }
        };
        let mut version = 0;
        // SAFETY: an out-pointer to a live integer; allowed before cuInit.
        let code = unsafe { (cuda.driver_version)(&mut version) };
        if code == 0 && version < MINIMUM_VERSION {
            let (major, minor) = (version / 1000, version % 1000 / 10);
            return unavailable(format!(
                "the CUDA driver supports CUDA {major}.{minor}; 13.0 (driver 580) or newer is \
                 needed"
            ));
        }
        // SAFETY: no arguments that could be wrong.
        let code = unsafe { (cuda.init)(0) };
        let driver = Driver { cuda, version };
        if code != 0 {
            let error = driver.describe(code);
            return unavailable(format!(
                "no usable CUDA device: {error}; check `nvidia-smi` and CUDA_VISIBLE_DEVICES"
            ));
        }
        Ok(Arc::new(driver))
    }

    /// Devices visible to this process.
    pub fn device_count(&self) -> usize {
        let mut count = 0;
        // SAFETY: an out-pointer to a live integer.
        let code = unsafe { (self.cuda.device_count)(&mut count) };
        if code == 0 { count.max(0) as usize } else { 0 }
    }

    /// `CUDA_ERROR_…: text` of a result code.
    fn describe(&self, code: c_int) -> String {
        let text = |entry: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text = std::ptr::null();
            // SAFETY: the driver stores a pointer to a static string, or null.
            unsafe {
                entry(code, &mut text);
                if text.is_null() { None } else { CStr::from_ptr(text).to_str().ok() }
            }
        };
        match (text(self.cuda.error_name), text(self.cuda.error_string)) {
            (Some(name), Some(string)) => format!("{name}: {string}"),
            _ => format!("CUDA error {code}"),
        }
    }

    /// What device `ordinal` is, without making a context on it.
    pub fn inspect(&self, ordinal: usize) -> Result<Properties, BackendError> {
        Ok(self.properties(self.device(ordinal)?, ordinal))
    }

    fn device(&self, ordinal: usize) -> Result<c_int, BackendError> {
        let count = self.device_count();
        if ordinal >= count {
            return Err(BackendError::Unavailable(format!(
                "there is no cuda:{ordinal}: {count} CUDA devices are visible (see \
                 CUDA_VISIBLE_DEVICES)"
            )));
        }
        let mut device = 0;
        // SAFETY: out-pointer to a live integer, ordinal was checked.
        let code = unsafe { (self.cuda.device_get)(&mut device, ordinal as c_int) };
        if code == 0 { Ok(device) } else { Err(self.unusable(ordinal, "cuDeviceGet", code)) }
    }

    fn unusable(&self, ordinal: usize, call: &str, code: c_int) -> BackendError {
        let error = self.describe(code);
        BackendError::Unavailable(format!("cuda:{ordinal} can't be used: {call}: {error}"))
    }

    /// Makes the primary context of device `ordinal`.
    pub fn context(self: &Arc<Self>, ordinal: usize) -> Result<Arc<Context>, BackendError> {
        let device = self.device(ordinal)?;
        let properties = self.properties(device, ordinal);
        if properties.capability < (8, 0) {
            let (major, minor) = properties.capability;
            return Err(BackendError::Unavailable(format!(
                "cuda:{ordinal} {} has compute capability {major}.{minor}; 8.0 (Ampere) or newer \
                 is needed for bf16",
                properties.name
            )));
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: out-pointer to a live pointer; released in `Context::drop`.
        let code = unsafe { (self.cuda.context_retain)(&mut handle, device) };
        if code != 0 {
            return Err(self.unusable(ordinal, "cuDevicePrimaryCtxRetain", code));
        }
        let driver = self.clone();
        let context = Context { driver, device, handle, properties, failure: OnceLock::new() };
        context.make_current()?;
        Ok(Arc::new(context))
    }

    fn properties(&self, device: c_int, ordinal: usize) -> Properties {
        let attribute = |id| {
            let mut value = 0;
            // SAFETY: out-pointer to a live integer; unknown ids give an error and leave 0.
            unsafe { (self.cuda.device_attribute)(&mut value, id, device) };
            value.max(0) as u32
        };
        let mut name = [0u8; 128];
        let mut memory_bytes = 0;
        let mut uuid = [0u8; 16];
        // SAFETY: buffers are live and their lengths are passed along or fixed by the call.
        unsafe {
            (self.cuda.device_name)(name.as_mut_ptr().cast(), name.len() as c_int, device);
            (self.cuda.device_memory)(&mut memory_bytes, device);
            (self.cuda.device_uuid)(&mut uuid, device);
        }
        let name = CStr::from_bytes_until_nul(&name).map_or("?".into(), |s| s.to_string_lossy());
        Properties {
            name: name.into_owned(),
            ordinal,
            uuid,
            capability: (attribute(75), attribute(76)),
            sms: attribute(16),
            shared_bytes: attribute(97),
            l2_bytes: attribute(38),
            memory_bytes: memory_bytes as u64,
        }
    }
}

/// What the driver tells about a device.
#[derive(Clone, Debug)]
pub struct Properties {
    /// `NVIDIA H200`, ….
    pub name: String,
    /// Its number among the visible devices.
    pub ordinal: usize,
    /// Its identity across processes (NVML finds it by this).
    pub uuid: [u8; 16],
    /// Compute capability, (9, 0) for Hopper.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sms: u32,
    /// The most shared memory one block may have.
    pub shared_bytes: u32,
    /// L2 size.
    pub l2_bytes: u32,
    /// Device memory.
    pub memory_bytes: u64,
}

/// CUDA_ERROR_OUT_OF_MEMORY
const OUT_OF_MEMORY: c_int = 2;

/// The primary context of one device. Any thread may use it, one at a time.
pub struct Context {
    driver: Arc<Driver>,
    device: c_int,
    handle: table::Handle,
    /// The device.
    pub properties: Properties,
    failure: OnceLock<String>,
}

// SAFETY: a CUDA context handle may be used from any thread once made current there; the driver
// library is thread-safe.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    fn cuda(&self) -> &table::Cuda {
        &self.driver.cuda
    }

    /// CUDA version of the driver, 13000 for 13.0.
    pub fn driver_version(&self) -> i32 {
        self.driver.version
    }

    /// Binds the context to the calling thread; cheap, called at every entry from outside.
    pub fn make_current(&self) -> Result<(), BackendError> {
        self.alive()?;
        // SAFETY: the handle is retained until drop.
        self.check("cuCtxSetCurrent", unsafe { (self.cuda().context_set)(self.handle) })
    }

    /// The failure that killed the device, if any.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Bytes free and in total.
    pub fn memory_info(&self) -> Result<(u64, u64), BackendError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: out-pointers to live integers.
        let code = unsafe { (self.cuda().memory_info)(&mut free, &mut total) };
        self.check("cuMemGetInfo", code)?;
        Ok((free as u64, total as u64))
    }

    fn alive(&self) -> Result<(), BackendError> {
        match self.failure.get() {
            None => Ok(()),
            Some(first) => Err(BackendError::Device(format!("it failed before: {first}"))),
        }
    }

    fn check(&self, call: &str, code: c_int) -> Result<(), BackendError> {
        if code == 0 {
            return Ok(());
        }
        let Properties { ordinal, name, .. } = &self.properties;
        let text = format!("cuda:{ordinal} {name}: {call}: {}", self.driver.describe(code));
        // Without memory for this call the context is as good as before, and what it holds can and
        // must be given back: another engine may go on in it.
        if code != OUT_OF_MEMORY {
            let _ = self.failure.set(text.clone());
        }
        Err(BackendError::Device(text))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `Driver::context`; every handle made from it holds an `Arc` of
        // this struct, so nothing uses it any more.
        unsafe { (self.cuda().context_release)(self.device) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_cuda_gets_an_answer() {
        match Driver::open() {
            Ok(driver) => assert!(driver.version >= MINIMUM_VERSION),
            Err(BackendError::Unavailable(text)) => {
                let names_the_remedy = ["install", "newer", "nvidia-smi"];
                assert!(names_the_remedy.iter().any(|word| text.contains(word)), "{text}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}
