//! Cubins on the device and the kernels in them.

use std::ffi::CString;
use std::sync::Arc;

use pirouette_model::BackendError;

use super::Context;
use super::table::Handle;

/// A loaded cubin.
pub struct Module {
    context: Arc<Context>,
    handle: Handle,
    name: String,
}

// SAFETY: driver handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: only read after construction.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a cubin; `name` appears in errors.
    pub fn load(
        context: &Arc<Context>,
        name: &str,
        cubin: &[u8],
    ) -> Result<Arc<Self>, BackendError> {
        context.make_current()?;
        if cubin.len() < 64 || &cubin[..4] != b"\x7fELF" {
            return Err(BackendError::Device(format!("module `{name}` is not a cubin")));
        }
        let mut handle = std::ptr::null_mut();
        // SAFETY: an ELF image carries its own size in its headers, and this one is whole: it is
        // part of this program, was compiled just now, or lay in the cache with its hash.
        let code = unsafe { (context.cuda().module_load)(&mut handle, cubin.as_ptr().cast()) };
        context.check(&format!("cuModuleLoadData of `{name}`"), code)?;
        Ok(Arc::new(Module { context: context.clone(), handle, name: name.into() }))
    }

    /// An entry point, loaded eagerly (lazy loading may not happen during capture), allowed to use
    /// up to `shared_bytes` of dynamic shared memory.
    pub fn function(
        self: &Arc<Self>,
        entry: &str,
        shared_bytes: usize,
    ) -> Result<Function, BackendError> {
        let context = &self.context;
        context.make_current()?;
        let symbol = CString::new(entry)
            .map_err(|_| BackendError::Device(format!("bad kernel name `{entry}`")))?;
        let mut handle = std::ptr::null_mut();
        let cuda = context.cuda();
        // SAFETY: out-pointer to a live pointer, a zero-terminated name.
        let code = unsafe { (cuda.module_function)(&mut handle, self.handle, symbol.as_ptr()) };
        let label = format!("{}:{entry}", self.name);
        context.check(&format!("cuModuleGetFunction of `{label}`"), code)?;
        // SAFETY: a handle just obtained.
        let code = unsafe { (cuda.function_load)(handle) };
        context.check(&format!("cuFuncLoad of `{label}`"), code)?;
        const MAX_DYNAMIC_SHARED: i32 = 8;
        if shared_bytes > 48 << 10 {
            // SAFETY: as above.
            let code =
                unsafe { (cuda.function_set)(handle, MAX_DYNAMIC_SHARED, shared_bytes as i32) };
            context.check(&format!("{shared_bytes} bytes of shared memory for `{label}`"), code)?;
        }
        let mut sizes = Vec::new();
        let (mut offset, mut size) = (0, 0);
        // SAFETY: out-pointers to live integers; past the last parameter the call returns an error.
        while unsafe { (cuda.function_param)(handle, sizes.len(), &mut offset, &mut size) } == 0 {
            sizes.push(size);
        }
        let param_bytes = sizes.into();
        Ok(Function { _module: self.clone(), handle, label: label.into(), param_bytes })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: loaded in `load`, unloaded once; functions hold an `Arc` of this.
            unsafe { (self.context.cuda().module_unload)(self.handle) };
        }
    }
}

/// A kernel.
#[derive(Clone)]
pub struct Function {
    /// Keeps the code on the device.
    _module: Arc<Module>,
    pub(super) handle: Handle,
    label: Arc<str>,
    /// Bytes of each parameter, as the cubin has them.
    pub(super) param_bytes: Arc<[usize]>,
}

// SAFETY: driver handles may be used from any thread.
unsafe impl Send for Function {}
// SAFETY: immutable.
unsafe impl Sync for Function {}

impl Function {
    /// `module:entry`, for messages.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The kernel's symbol.
    pub fn entry(&self) -> &str {
        self.label.rsplit_once(':').map_or(&self.label, |(_, entry)| entry)
    }
}
