//! How a device is reached.

pub mod user;
