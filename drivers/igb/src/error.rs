//! The driver's error type.

use std::sync::Arc;

use crate::Packet;

/// Why a step of bring-up, or a queue, failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// From the runtime: the device, its memory or the ring, or an argument that is out of range.
    #[error(transparent)]
    Runtime(Box<vfio_uring::Error>),
    /// The NIC did not do what it must, or not in time.
    #[error("the NIC {0}")]
    Nic(Arc<str>),
    /// The driver of a virtual function's physical function did not take part as it has to.
    #[error("the physical function {0}")]
    Pf(Arc<str>),
    /// The driver of the physical function refused what a virtual function asked for.
    #[error("the physical function refused {0}")]
    Refused(Arc<str>),
    /// The physical function was reset, or its driver has forgotten this virtual function: its queues are dead.
    #[error("the physical function was reset, or its driver was: stop the virtual function, and bring it up again")]
    PfReset,
    /// The device was reset, and has forgotten its queues.
    #[error("the device was reset: bring the NIC up again, with Nic::new on the same device")]
    Reset,
    /// The NIC was stopped by [`Nic::stop`](crate::Nic::stop), or dropped: bring it up again for new queues.
    #[error("the NIC was stopped: bring it up again")]
    Stopped,
}

// Threads share it.
const _: fn() = || {
    fn is_send<T: Send + Sync>() {}
    is_send::<Error>();
};

/// The driver's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        vfio_uring::Error::invalid(what).into()
    }

    pub(crate) fn nic(what: impl Into<String>) -> Self {
        Self::Nic(what.into().into())
    }

    pub(crate) fn pf(what: impl Into<String>) -> Self {
        Self::Pf(what.into().into())
    }

    pub(crate) fn refused(what: impl Into<String>) -> Self {
        Self::Refused(what.into().into())
    }
}

impl From<vfio_uring::Error> for Error {
    fn from(error: vfio_uring::Error) -> Self {
        Self::Runtime(Box::new(error))
    }
}

/// A packet that a transmit queue did not take; it is given back.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The ring has no room: wait for [`TxQueue::ready`](crate::TxQueue::ready).
    #[error("the transmit ring is full: wait until it has room")]
    Full(Packet),
    /// It can't be sent in this form.
    #[error("the packet can't be sent: {why}")]
    Invalid {
        /// The packet.
        packet: Packet,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The queue has ended.
    #[error("the transmit queue has ended: {error}")]
    Ended {
        /// The packet.
        packet: Packet,
        /// Why.
        error: Error,
    },
}

impl SendError {
    /// The packet, without the reason.
    pub fn into_packet(self) -> Packet {
        match self {
            Self::Full(packet) | Self::Invalid { packet, .. } | Self::Ended { packet, .. } => packet,
        }
    }
}
