//! vfio-user: a PCI device served by another process (or thread) over a Unix socket.

pub mod client;
pub(crate) mod link;
pub mod protocol;
pub mod wire;
