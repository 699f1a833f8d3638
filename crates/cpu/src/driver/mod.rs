//! What needs `unsafe` and is no arithmetic: shared memory, the thread pool, a clock.

pub(crate) mod clock;
pub(crate) mod memory;
pub(crate) mod pool;
