//! How a virtual function is brought up.

use std::time::Duration;

use crate::{Error, Options, Result, spec::VF_QUEUES};

/// How to bring a virtual function up. What is not here the physical function decides: how checksums are looked at, whether VLAN
/// tags are taken out, how packets are spread over two queues.
#[derive(Debug, Clone)]
pub struct VfOptions {
    /// Queue pairs: 1 (the default) or 2. Linux's driver of the physical function has all that is received go to the first.
    pub queues: u16,
    /// As [`Options::rx_ring`].
    pub rx_ring: u16,
    /// As [`Options::tx_ring`].
    pub tx_ring: u16,
    /// As [`Options::buffers`].
    pub buffers: usize,
    /// As [`Options::buffer_len`].
    pub buffer_len: usize,
    /// As [`Options::max_frame`]. The physical function has to grant it; frames that are longer than its own limit never come.
    pub max_frame: usize,
    /// As [`Options::interrupt`].
    pub interrupt: Option<Duration>,
    /// The MAC address to ask for. `None`: that which the physical function gives; if it gives none, one that is made up.
    pub mac: Option<[u8; 6]>,
    /// How long the function may take for turning a queue on or off, and the physical function for an answer, 1 s by default.
    pub timeout: Duration,
}

impl Default for VfOptions {
    fn default() -> Self {
        let Options { queues, rx_ring, tx_ring, buffers, buffer_len, max_frame, interrupt, timeout, .. } =
            Options::default();
        Self { queues, rx_ring, tx_ring, buffers, buffer_len, max_frame, interrupt, mac: None, timeout }
    }
}

impl VfOptions {
    /// What the queues need to know, when all is in range.
    pub(super) fn common(&self) -> Result<Options> {
        let &Self { queues, rx_ring, tx_ring, buffers, buffer_len, max_frame, interrupt, mac, timeout } = self;
        if queues > VF_QUEUES {
            return Err(Error::invalid(format!("{queues} queues: a virtual function has {VF_QUEUES}")));
        }
        mac.map_or(Ok(()), check_mac)?;
        let common = Options {
            queues,
            rx_ring,
            tx_ring,
            buffers,
            buffer_len,
            max_frame,
            interrupt,
            timeout,
            rss: None,
            // A function that has no buffers must not stop the others.
            flow_control: false,
            ..Options::default()
        };
        common.check()?;
        Ok(common)
    }
}

pub(super) fn check_mac(mac: [u8; 6]) -> Result<()> {
    if mac[0] & 1 == 0 && mac != [0; 6] {
        return Ok(());
    }
    Err(Error::invalid(format!("the MAC address {}: it has to be a station's", super::show(mac))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_checked() {
        assert!(VfOptions::default().common().is_ok());
        let queues = |queues| VfOptions { queues, ..VfOptions::default() }.common().is_ok();
        assert_eq!([0, 1, 2, 3].map(queues), [false, true, true, false]);
        let mac = |mac| VfOptions { mac: Some(mac), ..VfOptions::default() }.common().is_ok();
        assert!(mac([2, 0, 0, 0, 0, 1]) && !mac([1, 0, 0, 0, 0, 1]) && !mac([0; 6]));
        assert!(VfOptions { max_frame: 100, ..VfOptions::default() }.common().is_err());
    }
}
