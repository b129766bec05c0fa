//! The NVMe controller behind its server, seen by clients of other people's making.

mod common;
mod interop;
mod protocol;
mod queues;
