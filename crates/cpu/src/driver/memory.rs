//! Zeroed, page-aligned words: weights, arena, packed operands.

use std::alloc::{Layout, alloc, dealloc};
use std::ops::Range;
use std::ptr::NonNull;

use pirouette_model::BackendError;

/// From this size on memory is aligned to, and asks for, huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes that can be had without swapping, where the system says.
pub(crate) fn free_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kib * 1024)
}

/// Fails if so much memory can't be had: the system would grant it and kill the process later.
pub(crate) fn reserve(needed_bytes: u64, what: &str) -> Result<(), BackendError> {
    match free_bytes() {
        Some(free_bytes) if free_bytes < needed_bytes => Err(BackendError::OutOfMemory {
            what: what.into(),
            device: "the CPU".into(),
            needed_bytes,
            free_bytes,
        }),
        _ => Ok(()),
    }
}

/// A fixed number of 32-bit words, zero at first.
pub(crate) struct Words {
    start: NonNull<u32>,
    len: usize,
    layout: Layout,
}

// SAFETY: plain memory owned by the value; shared access to it goes through `&self` (reads) or
// the unsafe methods of `Shared`, whose callers keep writers apart.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Allocates; `what` names the memory in the error.
    pub(crate) fn zeroed(len: usize, what: &str) -> Result<Self, BackendError> {
        let failed = |bytes: usize| BackendError::OutOfMemory {
            what: what.into(),
            device: "the CPU".into(),
            needed_bytes: bytes as u64,
            free_bytes: free_bytes().unwrap_or(0),
        };
        let bytes = len.max(16).checked_mul(4).ok_or_else(|| failed(usize::MAX))?;
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 64 };
        let layout = Layout::from_size_align(bytes, align).map_err(|_| failed(bytes))?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc(layout) };
        let start = NonNull::new(start.cast::<u32>()).ok_or_else(|| failed(bytes))?;
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            // Pages get their size when they are first written, so the advice comes before that.
            // SAFETY: the range is ours; the advice changes page sizes, not contents. It may be
            // refused, which costs speed alone.
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: allocated with this size.
        unsafe { start.as_ptr().cast::<u8>().write_bytes(0, bytes) };
        Ok(Words { start, len, layout })
    }

    pub(crate) fn as_slice(&self) -> &[u32] {
        // SAFETY: allocated, initialised, and writable only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: allocated, initialised, exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.len * 4
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}

/// A number of 4 bytes that [`Shared`] memory can be read as.
pub(crate) trait Word: Copy {}
impl Word for u32 {}
impl Word for f32 {}

/// Words that the workers of a pool read and write at the same time, each its own part.
pub(crate) struct Shared {
    words: Words,
}

impl Shared {
    pub(crate) fn zeroed(len: usize, what: &str) -> Result<Self, BackendError> {
        Ok(Shared { words: Words::zeroed(len, what)? })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.words.bytes()
    }

    /// Everything, while no worker runs.
    pub(crate) fn exclusive(&mut self) -> &mut [u32] {
        self.words.as_mut_slice()
    }

    fn start(&self, range: &Range<usize>) -> *mut u32 {
        assert!(range.start <= range.end && range.end <= self.words.len, "{range:?} out of range");
        self.words.start.as_ptr().wrapping_add(range.start)
    }

    /// Part of the memory, for reading.
    ///
    /// # Safety
    /// Nobody writes these words while the slice lives.
    pub(crate) unsafe fn read<T: Word>(&self, range: Range<usize>) -> &[T] {
        // SAFETY: in range, initialised; the caller rules out writers.
        unsafe { std::slice::from_raw_parts(self.start(&range).cast(), range.len()) }
    }

    /// Part of the memory, for writing.
    ///
    /// # Safety
    /// Nobody else reads or writes these words while the slice lives.
    #[allow(clippy::mut_from_ref)] // the point of the type
    pub(crate) unsafe fn write<T: Word>(&self, range: Range<usize>) -> &mut [T] {
        // SAFETY: in range, initialised; the caller rules out other users.
        unsafe { std::slice::from_raw_parts_mut(self.start(&range).cast(), range.len()) }
    }
}
