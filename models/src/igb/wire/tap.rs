//! A TAP interface of the system.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use super::Frame;
use crate::igb::{Cause, config::invalid, spec::MAX_FRAME};

/// Bytes of an interface's name at most.
const MAX_NAME: usize = 15;

/// A TAP interface; see [`Wire::tap`](super::Wire::tap).
pub struct Tap {
    device: SyncDevice,
    name: String,
}

impl std::fmt::Debug for Tap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tap").field(&self.name).finish()
    }
}

impl Tap {
    pub(super) fn open(name: &str) -> io::Result<Self> {
        if !(1..=MAX_NAME).contains(&name.len())
            || name.bytes().any(|byte| matches!(byte, 0 | b'/') || byte.is_ascii_whitespace())
        {
            return Err(invalid(format!("{name:?} is no name of an interface: 1 to {MAX_NAME} bytes without blanks and /")));
        }
        let remedy = |error: io::Error| {
            let remedy = match error.kind() {
                io::ErrorKind::PermissionDenied => "; run with CAP_NET_ADMIN, or as the owner of an interface that exists",
                io::ErrorKind::NotFound => "; the kernel needs TUN/TAP support (module tun)",
                _ => "",
            };
            io::Error::new(error.kind(), format!("TAP interface {name}: {error}{remedy}"))
        };
        let builder = DeviceBuilder::new().name(name).layer(Layer::L2).inherit_enable_state();
        let device = builder.build_sync().map_err(remedy)?;
        device.set_nonblocking(true).map_err(remedy)?;
        // The owner of an interface may not be permitted to; then it is up already, or will be.
        if let Err(error) = device.enabled(true) {
            tracing::debug!("TAP interface {name} is left as it is: {error}");
        }
        Ok(Self { device, name: name.into() })
    }

    pub(super) fn read(&self, frame: &mut Frame) -> bool {
        let read = frame.extend(MAX_FRAME).and_then(|room| self.device.recv(room).ok());
        frame.truncate(read.unwrap_or(0));
        read.is_some()
    }

    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), Cause> {
        self.device.send(bytes).map(|_| ()).map_err(|error| {
            tracing::debug!("TAP interface {}: {error}", self.name);
            Cause::Io
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}
