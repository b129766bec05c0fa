//! The kernel's VFIO: what its two ways to a device, group and cdev, have in common.
//!
//! Everything here is a system call, and may block: the reactor's thread calls what is known to be short, the rest runs on
//! a thread of its own.

pub(crate) mod abi;
mod attached;
mod device;
mod feature;
pub(crate) mod ioctl;
mod irqs;
mod reset;
mod token;

pub(crate) use attached::{Attached, PostedRegister};
pub use device::DeviceFd;
pub use feature::FeatureOp;
pub use reset::{DependentDevice, DependentId};
pub use token::VfToken;

/// What both kinds of device say of themselves, in the same words.
pub use super::user::protocol::{Area, DeviceInfo, IrqInfo, RegionInfo};
