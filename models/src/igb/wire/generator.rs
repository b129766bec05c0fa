//! A packet generator.

use std::{collections::VecDeque, io};

use super::{Frame, MIN_FRAME, within};
use crate::igb::{
    packet::{put_checksum, sum},
    spec::MAX_FRAME,
};

/// Source of generated packets: locally administered.
const SOURCE: [u8; 6] = [0x02, 0x67, 0x65, 0x6e, 0, 1];

/// Sends the same packets again and again; see [`Wire::generator`](super::Wire::generator).
#[derive(Debug)]
pub struct Generator {
    size: usize,
    flows: usize,
    /// Packets that are still to be sent; `None`: without end.
    left: Option<u64>,
    frames: VecDeque<Frame>,
}

impl Generator {
    pub(super) fn new(size: usize, flows: usize, count: u64) -> io::Result<Self> {
        within("packet size", size as u64, MIN_FRAME as u64..=MAX_FRAME as u64)?;
        within("number of flows", flows as u64, 1..=4096)?;
        Ok(Self { size, flows, left: (count != 0).then_some(count), frames: VecDeque::new() })
    }

    pub(super) fn prepare(&mut self, mac: [u8; 6]) {
        let packet = |flow| {
            let mut frame = Frame::new(self.size);
            let bytes = packet(mac, self.size, flow);
            debug_assert!(bytes.len() == self.size);
            frame.push(&bytes);
            frame
        };
        self.frames = (0..self.flows as u16).map(packet).collect();
    }

    pub(super) fn has_more(&self) -> bool {
        self.left != Some(0)
    }

    #[inline]
    pub(super) fn receive(&mut self) -> Option<Frame> {
        if self.left == Some(0) {
            return None;
        }
        let frame = self.frames.pop_front()?;
        if let Some(left) = &mut self.left {
            *left -= 1;
        }
        Some(frame)
    }

    #[inline]
    pub(super) fn done(&mut self, frame: Frame) {
        self.frames.push_back(frame);
    }
}

/// UDP from 198.18.0.1 to 198.18.0.2 (RFC 2544), the source port by the flow, checksums right.
fn packet(mac: [u8; 6], size: usize, flow: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size);
    bytes.extend(mac);
    bytes.extend(SOURCE);
    bytes.extend([0x08, 0x00]);
    bytes.extend([0x45, 0]);
    bytes.extend(((size - 14) as u16).to_be_bytes());
    bytes.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 2]);
    bytes.extend((1024 + flow).to_be_bytes());
    bytes.extend(9u16.to_be_bytes());
    bytes.extend(((size - 34) as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend((bytes.len()..size).map(|at| at as u8));
    let header = sum(&bytes[14..34]);
    put_checksum(&mut bytes, 24, header, false);
    let segment = sum(&bytes[26..34]) + 17 + (size - 34) as u64 + sum(&bytes[34..]);
    put_checksum(&mut bytes, 40, segment, true);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::igb::packet::{Headers, UDP};

    #[test]
    fn packets_are_right() {
        for size in [60, 61, 1514, 9724] {
            let bytes = packet([2, 0, 0, 0, 0, 1], size, 7);
            let headers = Headers::of(&bytes);
            assert_eq!((bytes.len(), headers.protocol, headers.end), (size, UDP, size));
            assert!(headers.ip_checksum_fits(&bytes));
            assert_eq!(headers.transport_checksum_fits(&bytes), Some(true));
        }
        for (size, flows) in [(59, 1), (9725, 1), (60, 0), (60, 4097)] {
            assert!(Generator::new(size, flows, 0).is_err());
        }
    }
}
