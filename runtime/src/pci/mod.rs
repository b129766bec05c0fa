//! PCI: configuration space, the devices of this machine, and which driver has them.
//!
//! [`offset`], [`capability`] and [`CapabilityWalk`] are about configuration space. [`sysfs`] finds the devices that the kernel
//! knows, gives one to `vfio-pci` and back, and says what is missing to use one.

mod bdf;
mod class;
mod config;
mod in_use;
mod obstacle;
mod plan;
pub mod sysfs;

pub use bdf::Bdf;
pub use class::class_name;
pub use config::{
    COMMAND_BUS_MASTER, COMMAND_MEMORY, CONFIG_SIZE, CapabilityWalk, EXTENDED_CONFIG_SIZE, PciCapability, PciIds,
    STATUS_CAPABILITIES, capability, offset,
};
pub use obstacle::{Memlock, Obstacle, Obstacles};
pub use plan::{Outcome, Plan, Step};

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
