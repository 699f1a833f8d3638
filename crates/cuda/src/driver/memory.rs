//! Device memory (few big blocks, carved by offset) and page-locked host memory.

use std::sync::Arc;

use pirouette_model::BackendError;

use super::table::Handle;
use super::{Context, OUT_OF_MEMORY, Stream};

/// One block of device memory.
pub struct DeviceMemory {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// Allocates after asking how much is free, so that running out is an answer with both numbers
    /// and the context stays alive. `what` names the block in that answer.
    pub fn new(context: &Arc<Context>, what: &str, bytes: usize) -> Result<Self, BackendError> {
        context.make_current()?;
        let (free_bytes, _) = context.memory_info()?;
        let full = || BackendError::OutOfMemory {
            what: what.into(),
            device: format!("cuda:{}", context.properties.ordinal),
            needed_bytes: bytes as u64,
            free_bytes,
        };
        // The driver itself wants some room to load modules and instantiate graphs.
        const MARGIN: u64 = 64 << 20;
        if bytes as u64 + MARGIN > free_bytes {
            return Err(full());
        }
        let mut address = 0;
        // SAFETY: out-pointer to a live integer.
        let code = unsafe { (context.cuda().memory_alloc)(&mut address, bytes.max(1)) };
        if code == OUT_OF_MEMORY {
            return Err(full());
        }
        context.check("cuMemAlloc", code)?;
        Ok(DeviceMemory { context: context.clone(), address, bytes })
    }

    /// Device address of the first byte; aligned to 256.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues a copy of `bytes` bytes from `host[from..]` to `to`. The source is page-locked
    /// memory, which the caller keeps unchanged until the stream has passed this point.
    pub fn copy_in(
        &self,
        stream: &Stream,
        to: usize,
        host: &Pinned,
        from: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        assert!(to + bytes <= self.bytes && from + bytes <= host.bytes, "copy out of range");
        let context = &self.context;
        // SAFETY: both ranges were checked against their blocks just above.
        let code = unsafe {
            let source = host.address.cast::<u8>().add(from).cast();
            (context.cuda().copy_in)(self.address + to as u64, source, bytes, stream.handle())
        };
        context.check("cuMemcpyHtoDAsync", code)
    }

    /// Queues a copy of `bytes` bytes from `from` to `host[to..]`.
    pub fn copy_out(
        &self,
        stream: &Stream,
        from: usize,
        host: &Pinned,
        to: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        assert!(from + bytes <= self.bytes && to + bytes <= host.bytes, "copy out of range");
        let context = &self.context;
        // SAFETY: both ranges were checked against their blocks just above.
        let code = unsafe {
            let target = host.address.cast::<u8>().add(to).cast();
            (context.cuda().copy_out)(target, self.address + from as u64, bytes, stream.handle())
        };
        context.check("cuMemcpyDtoHAsync", code)
    }

    /// Queues filling `bytes` bytes at `at` with one value.
    pub fn fill(
        &self,
        stream: &Stream,
        at: usize,
        bytes: usize,
        value: u8,
    ) -> Result<(), BackendError> {
        assert!(at + bytes <= self.bytes, "fill out of range");
        let address = self.address + at as u64;
        // SAFETY: the range was checked just above.
        let code =
            unsafe { (self.context.cuda().fill_bytes)(address, value, bytes, stream.handle()) };
        self.context.check("cuMemsetD8Async", code)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: allocated in `new`, freed once. cuMemFree waits for work that uses it.
            unsafe { (self.context.cuda().memory_free)(self.address) };
        }
    }
}

/// Page-locked host memory.
pub struct Pinned {
    context: Arc<Context>,
    address: Handle,
    bytes: usize,
}

// SAFETY: plain memory; access goes through `&self` / `&mut self` as for a `Vec`.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Allocates `bytes` bytes, zeroed.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, BackendError> {
        context.make_current()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: out-pointer to a live pointer; no flags.
        let code = unsafe { (context.cuda().host_alloc)(&mut address, bytes.max(1), 0) };
        context.check("cuMemHostAlloc", code)?;
        // SAFETY: freshly allocated with that size.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        Ok(Pinned { context: context.clone(), address, bytes })
    }

    /// Its contents. The device must not be writing them: synchronise first.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated with that size and initialised in `new`.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes) }
    }

    /// Its contents, writable. The device must not be reading them: synchronise first.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: allocated in `new`, freed once.
            unsafe { (self.context.cuda().host_free)(self.address) };
        }
    }
}
