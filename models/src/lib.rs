//! Software PCI devices behind a vfio-user server.
//!
//! [`server`] speaks vfio-user over a Unix socket for any [`device::Device`]; [`nvme`] is an NVMe 1.4 controller, [`igb`] an Intel 82576
//! NIC, [`edu`] QEMU's device for students. [`faults`] gives a device a fault queue. All also work without a socket and without a
//! thread: [`server::Session`] handles one message at a time, and a device is serviced in line with any [`device::Host`].
#![forbid(unsafe_code)]

pub mod device;
pub mod edu;
pub mod faults;
pub mod igb;
pub mod nvme;
pub mod pci;
pub mod server;
