//! The igb driver, end to end: on software NICs over vfio-user, or on the devices that the environment names (see `support.rs`).

mod bring_up;
mod hostile;
mod memory;
mod offload;
mod queues;
mod support;
mod traffic;
