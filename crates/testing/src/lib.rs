//! What tests of several crates share: golden fixtures, the plain form of the model, tolerances.

pub mod fixture;
pub mod golden;
pub mod mutate;
pub mod parity;
pub mod plain;
