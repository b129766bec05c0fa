//! The kernel's VFIO: what its two ways to a device, group and cdev, have in common.
//!
//! Everything here is a system call, and may block: the reactor's thread calls what is known to be short, the rest runs on
//! a thread of its own.

mod device;
pub(crate) mod ioctl;
mod token;

pub use device::DeviceFd;
pub use token::VfToken;
