//! LeRobot's asynchronous inference: gRPC on a listener of its own, pickles for messages.
//!
//! A robot client calls `Ready`, says with `SendPolicyInstructions` what its motors and cameras
//! are called, then sends observations from one thread and asks for actions from another. Each
//! connection is one robot. The model is the server's own, whatever the client names.

mod calls;
mod fit;
mod session;
mod setup;
mod transport;
mod wire;

pub(crate) use transport::listen;
