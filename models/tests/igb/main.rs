//! The software NIC through its registers, rings and client memory.
#![forbid(unsafe_code)]

mod hostile;
mod interrupts;
mod offload;
mod random;
mod registers;
mod rss;
mod served;
mod support;
mod traffic;
mod wires;
