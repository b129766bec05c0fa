//! Receive side scaling: which queue a packet is for (section 7.1.1.7).

use super::{
    packet::{Headers, Network, TCP, UDP},
    spec::mrqc,
};

/// Bytes that are hashed at most: two IPv6 addresses and two ports.
const INPUT: usize = 36;

/// What RSS says of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hash {
    pub value: u32,
    /// RSS type of the descriptor; 0 for none.
    pub kind: u32,
}

/// The Toeplitz hash with a key, by tables: one of 256 entries for each byte of the input.
#[derive(Debug)]
pub(super) struct Toeplitz {
    tables: Box<[[u32; 256]; INPUT]>,
}

impl Toeplitz {
    pub fn new(key: &[u8; 40]) -> Self {
        let mut tables = Box::new([[0; 256]; INPUT]);
        for (at, table) in tables.iter_mut().enumerate() {
            // What bit 7 - i of the byte adds: 32 bits of the key from bit 8 * at + i on.
            let mut window = [0; 8];
            window[..5].copy_from_slice(&key[at..at + 5]);
            let window = u64::from_be_bytes(window);
            for value in 1..256usize {
                let low = value.trailing_zeros();
                let add = (window << (7 - low) >> 32) as u32;
                table[value] = table[value & (value - 1)] ^ add;
            }
        }
        Self { tables }
    }

    /// The hash of addresses followed by ports.
    pub fn hash(&self, input: &[u8]) -> u32 {
        self.tables.iter().zip(input).fold(0, |hash, (table, &byte)| hash ^ table[usize::from(byte)])
    }

    /// Hashes what MRQC says of a packet.
    pub fn of(&self, frame: &[u8], headers: &Headers, mrqc: u32) -> Hash {
        let on = |bit| mrqc & bit != 0;
        let kind = match (headers.network, headers.protocol) {
            (Network::V4 { .. }, TCP) if on(mrqc::TCP_IPV4) => 1,
            (Network::V4 { .. }, UDP) if on(mrqc::UDP_IPV4) => 7,
            (Network::V4 { .. }, _) if on(mrqc::IPV4) => 2,
            (Network::V6 { extensions: false }, TCP) if on(mrqc::TCP_IPV6) => 3,
            (Network::V6 { extensions: false }, UDP) if on(mrqc::UDP_IPV6) => 8,
            (Network::V6 { .. }, TCP) if on(mrqc::TCP_IPV6_EX) => 6,
            (Network::V6 { .. }, UDP) if on(mrqc::UDP_IPV6_EX) => 9,
            (Network::V6 { extensions: false }, _) if on(mrqc::IPV6) => 5,
            (Network::V6 { .. }, _) if on(mrqc::IPV6_EX) => 4,
            _ => return Hash::default(),
        };
        let addresses = headers.addresses(frame);
        let mut input = [0; INPUT];
        let Some(part) = input.get_mut(..addresses.len()) else { return Hash::default() };
        part.copy_from_slice(addresses);
        let mut len = addresses.len();
        if matches!(kind, 1 | 3 | 6..=9)
            && let (Some(ports), Some(part)) = (frame.get(headers.l4..headers.l4 + 4), input.get_mut(len..len + 4))
        {
            part.copy_from_slice(ports);
            len += 4;
        }
        Hash { value: self.hash(&input[..len]), kind }
    }
}
