//! How a device is reached.

pub mod cdev;
pub mod iommufd;
pub mod user;
pub mod vfio;
