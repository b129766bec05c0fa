//! How a device is reached.

pub mod cdev;
pub mod group;
pub mod iommufd;
pub mod user;
pub mod vfio;
