//! A captured stream of copies and launches, replayed with one call.

use std::sync::Arc;

use pirouette_model::BackendError;

use super::table::Handle;
use super::{Context, Stream};

/// A node of the graph being captured; its handle is valid until the capture's end.
#[derive(Clone, Copy)]
pub struct GraphNode(pub(super) Handle);

/// An instantiated graph. Whatever memory its nodes name must outlive it.
pub struct Graph {
    context: Arc<Context>,
    executable: Handle,
}

// SAFETY: driver handles may be used from any thread, one at a time.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `record` queues on the stream, instantiates it and uploads it.
    pub fn capture(
        stream: &Stream,
        record: impl FnOnce() -> Result<(), BackendError>,
    ) -> Result<Graph, BackendError> {
        let context = stream.context().clone();
        context.make_current()?;
        const THREAD_LOCAL: i32 = 1;
        let cuda = context.cuda();
        // SAFETY: live handles throughout; the capture is ended on every path.
        let code = unsafe { (cuda.capture_begin)(stream.handle(), THREAD_LOCAL) };
        context.check("cuStreamBeginCapture", code)?;
        let recorded = record();
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; the out-pointer is live.
        let code = unsafe { (cuda.capture_end)(stream.handle(), &mut graph) };
        recorded?;
        context.check("cuStreamEndCapture", code)?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was just captured and is destroyed once, here.
        let code = unsafe {
            let code = (cuda.graph_instantiate)(&mut executable, graph, 0);
            (cuda.graph_destroy)(graph);
            code
        };
        context.check("cuGraphInstantiate", code)?;
        let graph = Graph { context, executable };
        // SAFETY: live handles.
        let code = unsafe { (graph.context.cuda().graph_upload)(executable, stream.handle()) };
        graph.context.check("cuGraphUpload", code)?;
        Ok(graph)
    }

    /// Queues one replay.
    pub fn launch(&self, stream: &Stream) -> Result<(), BackendError> {
        // SAFETY: live handles; the owner keeps the memory that the nodes name.
        let code = unsafe { (self.context.cuda().graph_launch)(self.executable, stream.handle()) };
        self.context.check("cuGraphLaunch", code)
    }
}

impl Stream {
    /// The node that the last queued work became; for use inside [`Graph::capture`].
    pub fn captured_node(&self) -> Result<GraphNode, BackendError> {
        let (mut status, mut id, mut graph) = (0, 0, std::ptr::null_mut());
        let (mut nodes, mut edges, mut count) = (std::ptr::null(), std::ptr::null(), 0);
        let cuda = self.context.cuda();
        // SAFETY: a live stream and out-pointers to live variables.
        let code = unsafe {
            let handle = self.handle();
            let info = cuda.capture_info;
            info(handle, &mut status, &mut id, &mut graph, &mut nodes, &mut edges, &mut count)
        };
        self.context.check("cuStreamGetCaptureInfo", code)?;
        // What the next node will depend on: in a stream without forks, the last one alone.
        if count != 1 || nodes.is_null() {
            return Err(BackendError::Unavailable(format!(
                "a capture without forks has {count} open nodes where one was expected"
            )));
        }
        // SAFETY: the driver's array of `count` nodes, valid until the next call on this stream.
        Ok(GraphNode(unsafe { *nodes }))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: instantiated in `capture`, destroyed once.
            unsafe { (self.context.cuda().graph_exec_destroy)(self.executable) };
        }
    }
}
