//! The driver's error type.

use std::{
    io::{self, ErrorKind},
    sync::Arc,
};

use crate::spec::Status;

/// Why a command or a step of bring-up failed. Two words long: a result travels with every command.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the runtime: the device, its memory or the ring, or an argument that is out of range.
    #[error(transparent)]
    Runtime(Box<vfio_uring::Error>),
    /// The controller completed the command with an error.
    #[error("the controller failed the command: {0}")]
    Status(Status),
    /// The controller did not do what it must, or not in time.
    #[error("the NVMe controller {}", .0.what)]
    Controller(Box<Fault>),
    /// The queue ended; every pending command ends with this.
    #[error("the queue has ended: {0}")]
    Ended(Arc<Error>),
    /// The device was reset, and has forgotten its queues.
    #[error("the device was reset: bring the controller up again, with Controller::new on the same device")]
    Reset,
    /// The queue has no free slot: take completions first.
    #[error("all {0} slots of the queue are in use")]
    Full(u32),
    /// The runner of a [`Remote`](crate::Remote) is gone: it was dropped, or its reactor was.
    #[error(
        "the runner of the remote handle is gone, or the reactor that owned the queue: keep both until the last handle's end"
    )]
    NoRunner,
}

const _: () = assert!(size_of::<Error>() == 16);
// Results go back to other threads.
const _: fn() = || {
    fn is_send<T: Send + Sync>() {}
    is_send::<Error>();
};

/// What a controller did wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// A sentence whose subject is the controller.
    pub what: String,
}

/// The driver's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        vfio_uring::Error::invalid(what).into()
    }

    pub(crate) fn controller(what: impl Into<String>) -> Self {
        Self::Controller(Box::new(Fault { what: what.into() }))
    }
}

impl From<vfio_uring::Error> for Error {
    fn from(error: vfio_uring::Error) -> Self {
        Self::Runtime(Box::new(error))
    }
}

impl From<Error> for io::Error {
    /// Keeps the error as the source ([`io::Error::get_ref`]), under the kind that is nearest.
    fn from(error: Error) -> Self {
        Self::new(kind(&error), error)
    }
}

fn kind(error: &Error) -> ErrorKind {
    use vfio_uring::Error as Runtime;
    match error {
        Error::Runtime(error) => match &**error {
            Runtime::Io { source, .. } | Runtime::NoIoUring { source } | Runtime::Refused { source, .. } => source.kind(),
            Runtime::Invalid { .. } | Runtime::Address { .. } => ErrorKind::InvalidInput,
            Runtime::DeviceFault { .. } => ErrorKind::InvalidData,
            Runtime::Timeout { .. } => ErrorKind::TimedOut,
            Runtime::Gone { .. } => ErrorKind::NotConnected,
            Runtime::Unsupported { .. } => ErrorKind::Unsupported,
            Runtime::InUse { .. } => ErrorKind::ResourceBusy,
            Runtime::Exhausted { .. } => ErrorKind::OutOfMemory,
            _ => ErrorKind::Other,
        },
        Error::Ended(error) => kind(error),
        Error::NoRunner => ErrorKind::NotConnected,
        Error::Reset => ErrorKind::ConnectionReset,
        Error::Full(_) => ErrorKind::ResourceBusy,
        Error::Status(_) | Error::Controller(_) => ErrorKind::Other,
    }
}
