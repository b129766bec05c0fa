//! How a device is reached.

pub mod group;
pub mod user;
pub mod vfio;
