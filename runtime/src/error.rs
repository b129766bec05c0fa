//! The one error type of the runtime: each variant says what was wrong and what to do about it.

use std::{io, sync::Arc, time::Duration};

use crate::{device::State, dma::IovaRange};

/// Why an operation of the runtime failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A device address that can't be read.
    #[error("{text:?} is not a device address: {reason}; write 0000:01:00.0 or vfio-user:/path/to/socket")]
    Address {
        /// The text as given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A system call or a ring operation failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with its object.
        what: String,
        /// The error of the kernel.
        source: Arc<io::Error>,
    },
    /// io_uring can't be used here.
    #[error(
        "io_uring is not available ({source}): it needs Linux 5.15 or newer, kernel.io_uring_disabled=0, and a sandbox that permits it"
    )]
    NoIoUring {
        /// What `io_uring_setup` answered.
        source: Arc<io::Error>,
    },
    /// An operation was started outside of a reactor.
    #[error("{what} needs a reactor on this thread: call it inside Reactor::block_on")]
    NoReactor {
        /// The operation.
        what: &'static str,
    },
    /// The peer broke the protocol; the connection or device is not used any further.
    #[error("the device broke the protocol: {what}")]
    DeviceFault {
        /// The rule that was broken, with the offending value.
        what: String,
    },
    /// The peer answered a command with an error.
    #[error("the device refused {command}: {source}")]
    Refused {
        /// The command that was refused.
        command: String,
        /// The errno that the peer gave.
        source: Arc<io::Error>,
    },
    /// No answer came in time.
    #[error("{what} got no answer within {after:?}: the device stalls or its server is stopped")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long was waited.
        after: Duration,
    },
    /// The device or the connection to it is gone.
    #[error("the device is gone: {reason}")]
    Gone {
        /// What ended it.
        reason: Arc<str>,
    },
    /// The device, or the platform, has fewer interrupt vectors than were asked for. None of them is enabled.
    #[error("{asked} interrupt vectors were asked for, {available} are there; ask for fewer")]
    Vectors {
        /// As many as were asked for.
        asked: u32,
        /// As many as can be had.
        available: u32,
    },
    /// The memory of a mapped register was not there. The next access may succeed.
    #[error(
        "BAR {bar} does not answer at {offset:#x}: the device's memory is switched off, it sleeps, or it is being reset; try again later, or reset it"
    )]
    MmioUnavailable {
        /// The number of the BAR.
        bar: u32,
        /// Offset of the register in it, in bytes.
        offset: u64,
    },
    /// The device can't be accessed at present, and nothing was tried: see [`Device::state`](crate::device::Device::state).
    #[error("the device can't be accessed now: {reason}")]
    Unavailable {
        /// What it is instead of live.
        state: State,
        /// Why, and what helps.
        reason: &'static str,
    },
    /// Devices were reset, and not all of them came back.
    #[error("a reset, after which not all is as before: {}", failures(failed))]
    Reset {
        /// Those that did not, by their addresses, each with its own error.
        failed: Vec<(Arc<str>, Error)>,
    },
    /// The device has no such thing, or can't do this.
    #[error("the device does not support this: {what}")]
    Unsupported {
        /// What was asked for.
        what: String,
    },
    /// A precondition is not met: of the machine, its kernel, or the driver of a device.
    #[error("{what}")]
    NotReady {
        /// What is missing, and how to get it.
        what: String,
    },
    /// Something else is using the device.
    #[error("{what}")]
    InUse {
        /// What uses it, and how to end that.
        what: String,
    },
    /// A caller's argument is out of range.
    #[error("{what}")]
    Invalid {
        /// Which argument, its value and its limits.
        what: String,
    },
    /// Memory could not be mapped for DMA.
    #[error("mapping {len:#x} bytes at IOVA {iova:#x}: {reason}")]
    Map {
        /// Where the device was to see it.
        iova: u64,
        /// Bytes.
        len: u64,
        /// Why not.
        reason: crate::dma::MapRefused,
    },
    /// A device can't join the others: it reserves addresses that they use.
    #[error(
        "{device} can't be attached: {}; unmap what is there, or keep those addresses free from the start",
        conflict(mapping, reserved)
    )]
    Conflict {
        /// The device that was to be attached.
        device: String,
        /// The mapping that is in the way, where it is known.
        mapping: Option<IovaRange>,
        /// The addresses that the device can't use, where they are known.
        reserved: Option<IovaRange>,
    },
    /// DMA memory or IOVA space ran out.
    #[error("{what}")]
    Exhausted {
        /// Which resource, how much was asked for, and what would help.
        what: String,
    },
}

/// The runtime's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn conflict(mapping: &Option<IovaRange>, reserved: &Option<IovaRange>) -> String {
    let range = |range: &IovaRange| format!("{:#x}-{:#x}", range.start, range.last);
    match (mapping, reserved) {
        (Some(mapping), Some(reserved)) => {
            format!("the mapping at IOVA {} overlaps {}, which it reserves", range(mapping), range(reserved))
        }
        (Some(mapping), None) => format!("it reserves some of the mapping at IOVA {}", range(mapping)),
        (None, Some(reserved)) => format!("it reserves IOVA {}, where something is mapped or allowed", range(reserved)),
        (None, None) => "a region that it reserves overlaps an IOVA that is mapped or allowed".into(),
    }
}

fn failures(failed: &[(Arc<str>, Error)]) -> String {
    let each: Vec<_> = failed.iter().map(|(device, error)| format!("{device}: {error}")).collect();
    each.join("; ")
}

impl Error {
    /// Wraps an I/O error with what was being done.
    pub fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: Arc::new(source.into()) }
    }

    /// A broken rule of the protocol.
    pub fn fault(what: impl Into<String>) -> Self {
        Self::DeviceFault { what: what.into() }
    }

    /// An argument that is out of range.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_names_both_sides_where_they_are_known() {
        let mapping = Some(IovaRange { start: 0xfee0_0000, last: 0xfee0_0fff });
        let reserved = Some(IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff });
        for (mapping, reserved, part) in [
            (
                mapping,
                reserved,
                "the mapping at IOVA 0xfee00000-0xfee00fff overlaps 0xfee00000-0xfeefffff, which it reserves",
            ),
            (mapping, None, "it reserves some of the mapping at IOVA 0xfee00000-0xfee00fff"),
            (None, reserved, "it reserves IOVA 0xfee00000-0xfeefffff, where something is mapped"),
            (None, None, "a region that it reserves overlaps"),
        ] {
            let text = Error::Conflict { device: "0000:01:00.0".into(), mapping, reserved }.to_string();
            assert!(text.starts_with("0000:01:00.0 can't be attached: ") && text.contains(part), "{text}");
        }
    }
}
