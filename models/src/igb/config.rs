//! How a NIC is set up.

use std::{
    io,
    sync::atomic::{AtomicU32, Ordering},
};

use super::{Handle, Wire};

/// A NIC.
#[derive(Debug)]
pub struct Config {
    /// Its MAC address, of one station.
    pub mac: [u8; 6],
    /// What its cable leads to.
    pub wire: Wire,
    /// Whether clients may map the registers of the queues; see [the module](super).
    pub mapped_queues: bool,
    /// Its cable and its counters, to be cloned before the NIC is made.
    pub handle: Handle,
}

impl Default for Config {
    /// Nothing at the cable's other end, and a locally administered MAC address that no other default has in this process.
    fn default() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let [_, high, middle, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        Self {
            mac: [0x02, 0x76, 0x66, high, middle, low],
            wire: Wire::Unplugged,
            mapped_queues: true,
            handle: Handle::default(),
        }
    }
}

impl Config {
    /// With something at the cable's other end.
    pub fn with_wire(self, wire: Wire) -> Self {
        Self { wire, ..self }
    }

    pub(super) fn check(&self) -> io::Result<()> {
        if self.mac[0] & 1 != 0 || self.mac == [0; 6] {
            let shown = self.mac.map(|byte| format!("{byte:02x}")).join(":");
            return Err(invalid(format!("{shown} is not the MAC address of a station: bit 0 of its first byte is 0")));
        }
        Ok(())
    }
}

pub(super) fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
