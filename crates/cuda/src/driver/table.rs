//! The part of `libcuda` this crate calls, as a table of function pointers looked up at run time.
//!
//! An own table of some forty entries instead of a bindings crate: it adds nothing measurable to
//! the build, has no feature per toolkit version, and a missing symbol is an error value instead
//! of a panic. Signatures follow `cuda.h` of CUDA 13; every symbol exists since driver 12.4.

use std::ffi::{c_char, c_int, c_uint, c_void};

pub(super) type Handle = *mut c_void;
pub(super) type DevicePtr = u64;

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: Handle,
    pub attributes: *const LaunchAttribute,
    pub attribute_count: c_uint,
}

/// `CUlaunchAttribute`: an id, padding, a 64-byte union.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
pub(super) struct LaunchAttribute {
    pub id: c_int,
    pub pad: [u8; 4],
    pub value: [u32; 16],
}

const _: () = assert!(size_of::<LaunchConfig>() == 56);
const _: () = assert!(size_of::<LaunchAttribute>() == 72);

pub(super) const ATTRIBUTE_CLUSTER: c_int = 4;
pub(super) const ATTRIBUTE_PROGRAMMATIC: c_int = 6;

macro_rules! table {
    ($name:ident { $($field:ident = $symbol:literal($($arg:ty),* $(,)?);)* }) => {
        /// Looked-up entry points; they stay valid as long as the library they hold.
        pub(super) struct $name {
            $(pub $field: unsafe extern "C" fn($($arg),*) -> c_int,)*
            _library: libloading::Library,
        }

        impl $name {
            /// Looks every symbol up; the error names the first that is missing.
            pub(super) fn load(library: libloading::Library) -> Result<Self, &'static str> {
                $(
                    // SAFETY: the type is the symbol's signature in the vendor's header, and the
                    // pointer is kept only beside the library it came from.
                    let $field = unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) -> c_int>(
                            concat!($symbol, "\0").as_bytes(),
                        )
                    }
                    .map(|symbol| *symbol)
                    .map_err(|_| $symbol)?;
                )*
                Ok(Self { $($field,)* _library: library })
            }
        }
    };
}
pub(super) use table;

table!(Cuda {
    init = "cuInit"(c_uint);
    driver_version = "cuDriverGetVersion"(*mut c_int);
    error_name = "cuGetErrorName"(c_int, *mut *const c_char);
    error_string = "cuGetErrorString"(c_int, *mut *const c_char);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_uuid = "cuDeviceGetUuid_v2"(*mut [u8; 16], c_int);
    device_attribute = "cuDeviceGetAttribute"(*mut c_int, c_int, c_int);
    device_memory = "cuDeviceTotalMem_v2"(*mut usize, c_int);
    context_retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    context_release = "cuDevicePrimaryCtxRelease_v2"(c_int);
    context_set = "cuCtxSetCurrent"(Handle);
    memory_info = "cuMemGetInfo_v2"(*mut usize, *mut usize);
    memory_alloc = "cuMemAlloc_v2"(*mut DevicePtr, usize);
    memory_free = "cuMemFree_v2"(DevicePtr);
    host_alloc = "cuMemHostAlloc"(*mut Handle, usize, c_uint);
    host_free = "cuMemFreeHost"(Handle);
    copy_in = "cuMemcpyHtoDAsync_v2"(DevicePtr, *const c_void, usize, Handle);
    copy_out = "cuMemcpyDtoHAsync_v2"(*mut c_void, DevicePtr, usize, Handle);
    fill_bytes = "cuMemsetD8Async"(DevicePtr, u8, usize, Handle);
    module_load = "cuModuleLoadData"(*mut Handle, *const c_void);
    module_unload = "cuModuleUnload"(Handle);
    module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    function_set = "cuFuncSetAttribute"(Handle, c_int, c_int);
    function_load = "cuFuncLoad"(Handle);
    function_param = "cuFuncGetParamInfo"(Handle, usize, *mut usize, *mut usize);
    launch = "cuLaunchKernelEx"(
        *const LaunchConfig, Handle, *const *mut c_void, *const *mut c_void,
    );
    stream_create = "cuStreamCreateWithPriority"(*mut Handle, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    stream_synchronize = "cuStreamSynchronize"(Handle);
    stream_wait = "cuStreamWaitEvent"(Handle, Handle, c_uint);
    capture_begin = "cuStreamBeginCapture_v2"(Handle, c_int);
    capture_end = "cuStreamEndCapture"(Handle, *mut Handle);
    capture_info = "cuStreamGetCaptureInfo_v3"(
        Handle, *mut c_int, *mut u64, *mut Handle, *mut *const Handle, *mut *const c_void,
        *mut usize,
    );
    graph_instantiate = "cuGraphInstantiateWithFlags"(*mut Handle, Handle, u64);
    graph_upload = "cuGraphUpload"(Handle, Handle);
    graph_launch = "cuGraphLaunch"(Handle, Handle);
    graph_exec_destroy = "cuGraphExecDestroy"(Handle);
    graph_destroy = "cuGraphDestroy"(Handle);
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2"(Handle);
    event_record = "cuEventRecord"(Handle, Handle);
    event_synchronize = "cuEventSynchronize"(Handle);
    event_elapsed = "cuEventElapsedTime"(*mut f32, Handle, Handle);
    tensor_map = "cuTensorMapEncodeTiled"(
        *mut super::TensorMap, c_int, c_uint, *mut c_void, *const u64, *const u64,
        *const c_uint, *const c_uint, c_int, c_int, c_int, c_int,
    );
});
