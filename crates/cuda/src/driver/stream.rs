//! Streams and timing events.

use std::sync::Arc;

use pirouette_model::BackendError;

use super::Context;
use super::table::Handle;

/// A queue of device work.
pub struct Stream {
    pub(super) context: Arc<Context>,
    handle: Handle,
}

// SAFETY: driver handles may be used from any thread, one at a time.
unsafe impl Send for Stream {}
// SAFETY: the driver's stream calls are thread-safe; work from two threads would only interleave.
unsafe impl Sync for Stream {}

impl Stream {
    /// A stream that does not wait for the legacy default stream.
    pub fn new(context: &Arc<Context>) -> Result<Self, BackendError> {
        Self::with_priority(context, 0)
    }

    /// The same, whose blocks are placed before those of other streams.
    pub fn urgent(context: &Arc<Context>) -> Result<Self, BackendError> {
        // The most urgent there is: the driver clamps.
        Self::with_priority(context, i32::MIN)
    }

    fn with_priority(context: &Arc<Context>, priority: i32) -> Result<Self, BackendError> {
        context.make_current()?;
        let mut handle = std::ptr::null_mut();
        const NON_BLOCKING: u32 = 1;
        // SAFETY: out-pointer to a live pointer.
        let code = unsafe { (context.cuda().stream_create)(&mut handle, NON_BLOCKING, priority) };
        context.check("cuStreamCreateWithPriority", code)?;
        Ok(Stream { context: context.clone(), handle })
    }

    pub(super) fn handle(&self) -> Handle {
        self.handle
    }

    /// The context it belongs to.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What is queued from now on waits for all that `earlier` has queued until now; `mark` is any
    /// event. Within a capture of either this is an edge, and draws the other into the capture.
    pub fn wait_for(&self, earlier: &Stream, mark: &Event) -> Result<(), BackendError> {
        mark.record(earlier)?;
        // SAFETY: live handles; no flags.
        let code = unsafe { (self.context.cuda().stream_wait)(self.handle, mark.handle, 0) };
        self.context.check("cuStreamWaitEvent", code)
    }

    /// Waits until everything queued is done; surfaces failures of kernels.
    pub fn synchronize(&self) -> Result<(), BackendError> {
        self.context.alive()?;
        // SAFETY: the handle lives as long as `self`.
        let code = unsafe { (self.context.cuda().stream_synchronize)(self.handle) };
        self.context.check("cuStreamSynchronize", code)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: created in `new`, destroyed once.
            unsafe { (self.context.cuda().stream_destroy)(self.handle) };
        }
    }
}

/// A point in a stream whose time is taken.
pub struct Event {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: driver handles may be used from any thread, one at a time.
unsafe impl Send for Event {}
// SAFETY: the driver's event calls are thread-safe; records from two threads would only interleave.
unsafe impl Sync for Event {}

impl Event {
    /// An event with timing.
    pub fn new(context: &Arc<Context>) -> Result<Self, BackendError> {
        context.make_current()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: out-pointer to a live pointer; no flags.
        let code = unsafe { (context.cuda().event_create)(&mut handle, 0) };
        context.check("cuEventCreate", code)?;
        Ok(Event { context: context.clone(), handle })
    }

    /// Marks the present end of the stream.
    pub fn record(&self, stream: &Stream) -> Result<(), BackendError> {
        // SAFETY: both handles are alive.
        let code = unsafe { (self.context.cuda().event_record)(self.handle, stream.handle()) };
        self.context.check("cuEventRecord", code)
    }

    /// Waits until the stream has passed the mark.
    pub fn synchronize(&self) -> Result<(), BackendError> {
        self.context.alive()?;
        // SAFETY: the handle is alive.
        let code = unsafe { (self.context.cuda().event_synchronize)(self.handle) };
        self.context.check("cuEventSynchronize", code)
    }

    /// Milliseconds from `earlier` to this one; both must have been passed.
    pub fn ms_since(&self, earlier: &Event) -> Result<f64, BackendError> {
        let mut ms = 0.0f32;
        let elapsed = self.context.cuda().event_elapsed;
        // SAFETY: out-pointer to a live float; both handles are alive.
        let code = unsafe { elapsed(&mut ms, earlier.handle, self.handle) };
        self.context.check("cuEventElapsedTime", code)?;
        Ok(ms as f64)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: created in `new`, destroyed once.
            unsafe { (self.context.cuda().event_destroy)(self.handle) };
        }
    }
}
