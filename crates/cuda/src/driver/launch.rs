//! One kernel launch as data: recorded at compile time, issued into a stream or a capture.

use std::ffi::c_void;

use pirouette_model::BackendError;

use super::table::{ATTRIBUTE_CLUSTER, ATTRIBUTE_PROGRAMMATIC, LaunchAttribute, LaunchConfig};
use super::{Function, Stream};

/// Bytes of one kernel parameter, aligned as the strictest (a tensor map) needs.
#[derive(Clone)]
pub struct Arg {
    blocks: Box<[Block]>,
    bytes: usize,
}

#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Block([u8; 128]);

impl Arg {
    /// A parameter passed by value: the Rust twin of the kernel's struct.
    pub fn of<T: bytemuck::NoUninit>(value: &T) -> Self {
        let bytes = bytemuck::bytes_of(value);
        let mut blocks = vec![Block([0; 128]); bytes.len().div_ceil(128).max(1)];
        for (block, part) in blocks.iter_mut().zip(bytes.chunks(128)) {
            block.0[..part.len()].copy_from_slice(part);
        }
        Arg { blocks: blocks.into(), bytes: bytes.len() }
    }
}

/// A kernel with its grid and arguments.
#[derive(Clone)]
pub struct Launch {
    /// The kernel.
    pub function: Function,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, all 1 for none.
    pub cluster: [u32; 3],
    /// Programmatic dependent launch: may start before its predecessor ends, and waits
    /// (`griddepcontrol.wait`) in every block before it touches anything the program wrote or
    /// before it overwrites anything the program reads.
    pub dependent: bool,
    /// Parameters, in order.
    pub args: Vec<Arg>,
}

impl Launch {
    /// A launch without dynamic shared memory, cluster or dependent start.
    pub fn new(function: Function, grid: [u32; 3], threads: u32, args: Vec<Arg>) -> Self {
        let block = [threads, 1, 1];
        let cluster = [1; 3];
        Launch { function, grid, block, shared_bytes: 0, cluster, dependent: false, args }
    }
}

impl Stream {
    /// Queues a launch. `dependent` overrides nothing but the first launch after a copy, which the
    /// caller issues with `false`.
    pub fn launch(&self, launch: &Launch, dependent: bool) -> Result<(), BackendError> {
        let mut attributes = [LaunchAttribute { id: 0, pad: [0; 4], value: [0; 16] }; 2];
        let mut count = 0;
        if launch.cluster != [1; 3] {
            attributes[count].id = ATTRIBUTE_CLUSTER;
            attributes[count].value[..3].copy_from_slice(&launch.cluster);
            count += 1;
        }
        if launch.dependent && dependent {
            attributes[count].id = ATTRIBUTE_PROGRAMMATIC;
            attributes[count].value[0] = 1;
            count += 1;
        }
        let config = LaunchConfig {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            stream: self.handle(),
            attributes: attributes.as_ptr(),
            attribute_count: count as u32,
        };
        let args: Vec<*mut c_void> =
            launch.args.iter().map(|arg| arg.blocks.as_ptr().cast_mut().cast()).collect();
        let function = &launch.function;
        if !launch.args.iter().map(|arg| arg.bytes).eq(function.param_bytes.iter().copied()) {
            let given: Vec<usize> = launch.args.iter().map(|arg| arg.bytes).collect();
            return Err(BackendError::Device(format!(
                "`{}` takes parameters of {:?} bytes, its host twin passes {given:?}: they are out \
                 of step",
                function.label(),
                function.param_bytes
            )));
        }
        // SAFETY: config, attributes and arguments outlive the call, which copies them; the sizes
        // of the arguments were compared with the kernel's just above. That their fields match and
        // point into live arenas is the duty of the host twins, covered by the conformance tests.
        let code = unsafe {
            (self.context.cuda().launch)(&config, function.handle, args.as_ptr(), std::ptr::null())
        };
        let [x, y, z] = launch.grid;
        self.context.check(&format!("launch of `{}` on {x}×{y}×{z}", function.label()), code)
    }
}
