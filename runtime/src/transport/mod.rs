//! How a device is reached.

pub mod user;
pub mod vfio;
