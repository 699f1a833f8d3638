//! What CUPTI calls: for room for records, with records, and for each node of a graph that is
//! cloned.
//!
//! It calls from threads of its own and without a pointer of ours, hence the statics. Nothing here
//! may panic: the callers are C.

use std::alloc::Layout;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::cupti::LIBRARY;
use super::table::Handle;

pub(super) type Callback = unsafe extern "C" fn(*mut c_void, c_int, u32, *const c_void);
pub(super) type BufferRequested = unsafe extern "C" fn(*mut *mut u8, *mut usize, *mut usize);
pub(super) type BufferCompleted = unsafe extern "C" fn(Handle, u32, *mut u8, usize, usize);

/// `CUPTI_CB_DOMAIN_RESOURCE` and `CUPTI_CBID_RESOURCE_GRAPHNODE_CLONED`.
pub(super) const RESOURCE: c_int = 3;
pub(super) const NODE_CLONED: u32 = 20;

/// `CUpti_ResourceData`.
#[repr(C)]
struct ResourceData {
    context: Handle,
    stream: Handle,
    descriptor: *const GraphData,
}

/// `CUpti_GraphData`, as far as it is read.
#[repr(C)]
struct GraphData {
    graph: Handle,
    original_graph: Handle,
    node: Handle,
    original_node: Handle,
}

const _: () = assert!(std::mem::offset_of!(ResourceData, descriptor) == 16);
const _: () = assert!(std::mem::offset_of!(GraphData, original_node) == 24);

pub(super) static COMPLETED: Mutex<Vec<Filled>> = Mutex::new(Vec::new());
static HANDED_OUT: AtomicUsize = AtomicUsize::new(0);
/// (a node, the node it was cloned from).
pub(super) static CLONES: Mutex<Vec<(u64, u64)>> = Mutex::new(Vec::new());

/// A buffer that CUPTI has given back, and its bytes that hold records.
pub(super) struct Filled {
    pub(super) address: usize,
    pub(super) valid: usize,
}

pub(super) fn locked<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const BUFFER: Layout = match Layout::from_size_align(4 << 20, 64) {
    Ok(layout) => layout,
    Err(_) => panic!("a power of two"),
};
const MAX_BUFFERS: usize = 64;

pub(super) fn free(buffer: Filled) {
    // SAFETY: allocated with this layout in `buffer_requested`, given back once by CUPTI.
    unsafe { std::alloc::dealloc(buffer.address as *mut u8, BUFFER) };
    HANDED_OUT.fetch_sub(1, Ordering::Relaxed);
}

/// CUPTI wants room for records.
pub(super) unsafe extern "C" fn buffer_requested(
    buffer: *mut *mut u8,
    size: *mut usize,
    records: *mut usize,
) {
    let mut address = std::ptr::null_mut();
    if HANDED_OUT.fetch_add(1, Ordering::Relaxed) < MAX_BUFFERS {
        // SAFETY: the layout has a size above zero. Zeroed, so that all of it is initialised.
        address = unsafe { std::alloc::alloc_zeroed(BUFFER) };
    }
    if address.is_null() {
        HANDED_OUT.fetch_sub(1, Ordering::Relaxed);
    }
    // SAFETY: CUPTI passes pointers to its own variables; 0 records means as many as fit, a null
    // buffer makes it count what it drops.
    unsafe {
        *buffer = address;
        *size = if address.is_null() { 0 } else { BUFFER.size() };
        *records = 0;
    }
}

/// CUPTI gives a buffer back.
pub(super) unsafe extern "C" fn buffer_completed(
    _context: Handle,
    _stream: u32,
    buffer: *mut u8,
    _size: usize,
    valid: usize,
) {
    if !buffer.is_null() {
        let valid = valid.min(BUFFER.size());
        locked(&COMPLETED).push(Filled { address: buffer as usize, valid });
    }
}

/// The driver has cloned a node of a graph.
pub(super) unsafe extern "C" fn node_cloned(
    _: *mut c_void,
    domain: c_int,
    id: u32,
    data: *const c_void,
) {
    let Some(cupti) = LIBRARY.get() else { return };
    if (domain, id) != (RESOURCE, NODE_CLONED) || data.is_null() {
        return;
    }
    let (mut clone, mut original) = (0, 0);
    // SAFETY: for this callback the data is a `CUpti_ResourceData` whose descriptor is a
    // `CUpti_GraphData`, both alive during the call.
    let known = unsafe {
        let graph = (*data.cast::<ResourceData>()).descriptor;
        let id = cupti.functions.node_id;
        !graph.is_null()
            && id((*graph).node, &mut clone) == 0
            && id((*graph).original_node, &mut original) == 0
    };
    if known {
        locked(&CLONES).push((clone, original));
    }
}
