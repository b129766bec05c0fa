//! An async NVMe driver on the vfio-uring runtime.
//!
//! [`Controller::new`] brings a controller up, [`Controller::create_queue`] makes I/O queues, and a [`Namespace`] on a queue
//! reads and writes. The same queue has two forms: a future per command, and a [`CommandStream`] with tokens and batches for
//! the peak. A [`Remote`] is a queue's namespace for other threads and their executors, a
//! [`NamespaceIo`] the namespace as a file. Completions are polled by the reactor, once a turn; so is the doorbell rung.

#![forbid(unsafe_code)]

mod command;
mod controller;
mod error;
mod identify;
mod io;
mod large;
mod line;
mod namespace;
mod poll;
mod prp;
mod queue;
mod remote;
pub mod spec;
mod stream;
mod watch;

pub use controller::{Controller, Options, Queue};
pub use error::{Error, Result};
pub use identify::{ControllerInfo, parse_list, parse_namespace};
pub use io::NamespaceIo;
pub use namespace::{Io, Namespace, NamespaceInfo};
pub use queue::{MAX_SLOTS, MAX_TRANSFER, Parts};
pub use remote::{MAX_REMOTE, Remote, RemoteIo, RemoteRunner};
pub use stream::{CommandStream, Completion, Rejected, Token};
pub use watch::Watch;
