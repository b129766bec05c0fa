//! The driver's error type.

use std::sync::Arc;

use crate::spec::Status;

/// Why a command or a step of bring-up failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the runtime: the device, its memory or the ring.
    #[error(transparent)]
    Runtime(#[from] vfio_uring::Error),
    /// The controller completed the command with an error.
    #[error("the controller failed the command: {0}")]
    Status(Status),
    /// An argument that the device can't take.
    #[error("{0}")]
    Invalid(String),
    /// The controller did not do what it must, or in time.
    #[error("the NVMe controller {0}")]
    Controller(String),
    /// The queue ended; every pending command ends with this.
    #[error("the queue has ended: {0}")]
    Ended(Arc<Error>),
    /// The queue has no free slot: take completions first.
    #[error("all {0} slots of the queue are in use")]
    Full(usize),
}

/// The driver's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
