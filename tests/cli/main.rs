//! The command as its users see it: output, exit status, and what happens when the other side goes away.

mod bench;
mod edu;
mod igb;
mod nic;
mod pci;
mod serve;
mod support;
mod usage;
