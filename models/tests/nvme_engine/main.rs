//! The NVMe controller through its registers, queues and client memory, without a transport.
#![forbid(unsafe_code)]

mod admin;
mod data;
mod queues;
mod random;
mod support;
