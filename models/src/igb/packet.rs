//! What is in a frame: headers, checksums.

/// Extension headers of IPv6 that are looked at, at most.
const MAX_EXTENSIONS: usize = 8;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const SCTP: u8 = 132;

/// The network header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Network {
    /// Neither IPv4 nor IPv6, or cut off.
    None,
    V4 {
        options: bool,
    },
    V6 {
        extensions: bool,
    },
}

/// Where the headers of a frame are. All offsets lie in the frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Headers {
    pub network: Network,
    /// Start of the network header.
    pub l3: usize,
    /// Start of the transport header.
    pub l4: usize,
    /// End of the packet by its IP length, at most the end of the frame.
    pub end: usize,
    /// [`TCP`], [`UDP`] or [`SCTP`] when its header is there, in this packet; else 0.
    pub protocol: u8,
    /// The IP length is more than the frame has.
    pub cut: bool,
}

impl Headers {
    /// Looks at a frame; tags are stepped over.
    pub fn of(frame: &[u8]) -> Self {
        let none = |l3| Self { network: Network::None, l3, l4: l3, end: frame.len(), protocol: 0, cut: false };
        let mut l3 = 14;
        let mut ether_type = be16(frame, 12);
        for _ in 0..2 {
            if matches!(ether_type, Some(0x8100 | 0x88a8)) {
                ether_type = be16(frame, l3 + 2);
                l3 += 4;
            }
        }
        match ether_type {
            Some(0x0800) => Self::v4(frame, l3).unwrap_or_else(|| none(l3)),
            Some(0x86dd) => Self::v6(frame, l3).unwrap_or_else(|| none(l3)),
            _ => none(l3),
        }
    }

    fn v4(frame: &[u8], l3: usize) -> Option<Self> {
        let header = frame.get(l3..l3 + 20)?;
        let len = usize::from(header[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
        let l4 = l3 + len;
        if header[0] >> 4 != 4 || len < 20 || total < len || l4 > frame.len() {
            return None;
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
        let mut headers = Self {
            network: Network::V4 { options: len > 20 },
            l3,
            l4,
            end: (l3 + total).min(frame.len()),
            protocol: 0,
            cut: l3 + total > frame.len(),
        };
        if !fragment {
            headers.transport(header[9]);
        }
        Some(headers)
    }

    fn v6(frame: &[u8], l3: usize) -> Option<Self> {
        let header = frame.get(l3..l3 + 40)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let total = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let mut headers = Self {
            network: Network::V6 { extensions: false },
            l3,
            l4: l3 + 40,
            end: (l3 + total).min(frame.len()),
            protocol: 0,
            cut: l3 + total > frame.len(),
        };
        let mut next = header[6];
        for _ in 0..MAX_EXTENSIONS {
            // Hop by hop, routing, destination options: 8-byte units behind the first.
            if !matches!(next, 0 | 43 | 60) {
                break;
            }
            headers.network = Network::V6 { extensions: true };
            let Some(&[following, units]) = frame.get(headers.l4..headers.l4 + 2) else { return Some(headers) };
            let after = headers.l4 + 8 + usize::from(units) * 8;
            if after > headers.end {
                return Some(headers);
            }
            (headers.l4, next) = (after, following);
        }
        headers.transport(next);
        Some(headers)
    }

    fn transport(&mut self, protocol: u8) {
        let least = match protocol {
            TCP => 20,
            UDP => 8,
            SCTP => 12,
            _ => return,
        };
        if self.l4 + least <= self.end {
            self.protocol = protocol;
        }
    }

    /// Source and destination address, one behind the other.
    pub fn addresses<'a>(&self, frame: &'a [u8]) -> &'a [u8] {
        let range = match self.network {
            Network::None => 0..0,
            Network::V4 { .. } => self.l3 + 12..self.l3 + 20,
            Network::V6 { .. } => self.l3 + 8..self.l3 + 40,
        };
        frame.get(range).unwrap_or_default()
    }

    /// Whether the checksum of the IPv4 header is right.
    pub fn ip_checksum_fits(&self, frame: &[u8]) -> bool {
        fold(sum(frame.get(self.l3..self.l4).unwrap_or_default())) == 0xffff
    }

    /// Whether the checksum of TCP or UDP is right; `None` where it is not given or can't be known.
    pub fn transport_checksum_fits(&self, frame: &[u8]) -> Option<bool> {
        let segment = frame.get(self.l4..self.end)?;
        if self.cut || !matches!(self.protocol, TCP | UDP) {
            return None;
        }
        if self.protocol == UDP && segment.get(6..8)? == [0, 0] {
            return None;
        }
        let pseudo = sum(self.addresses(frame)) + u64::from(self.protocol) + segment.len() as u64;
        Some(fold(pseudo + sum(segment)) == 0xffff)
    }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// The sum of big-endian words, to be folded; an odd byte at the end is the high half of a word. Sums of up to 64 KiB can be added.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let mut chunks = bytes.chunks_exact(4);
    let mut total: u64 = 0;
    for chunk in &mut chunks {
        total += u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let mut last = [0; 4];
    let rest = chunks.remainder();
    last[..rest.len()].copy_from_slice(rest);
    total + u64::from(u32::from_be_bytes(last))
}

/// Adds the carries in: the ones' complement sum.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Puts the complement of a sum at `at`, when that is in the frame.
pub(super) fn put_checksum(frame: &mut [u8], at: usize, sum: u64, udp: bool) {
    let value = match !fold(sum) {
        // In UDP 0 says that there is none.
        0 if udp => 0xffff,
        value => value,
    };
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

const fn table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut value = i as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 != 0 { value >> 1 ^ polynomial } else { value >> 1 };
            bit += 1;
        }
        table[i] = value;
        i += 1;
    }
    table
}

static ETHERNET: [u32; 256] = table(0xedb8_8320);
static CASTAGNOLI: [u32; 256] = table(0x82f6_3b78);

fn crc(table: &[u32; 256], bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| table[usize::from(crc as u8 ^ byte)] ^ crc >> 8)
}

/// The CRC that ends a frame, as it goes over the wire.
pub(super) fn frame_check(bytes: &[u8]) -> [u8; 4] {
    crc(&ETHERNET, bytes).to_le_bytes()
}

/// The checksum of SCTP, as it is in its header; the field itself has to be 0.
pub(super) fn crc32c(bytes: &[u8]) -> [u8; 4] {
    crc(&CASTAGNOLI, bytes).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_checksums() {
        assert_eq!(frame_check(b"123456789"), 0xcbf4_3926u32.to_le_bytes());
        assert_eq!(crc32c(b"123456789"), 0xe306_9283u32.to_le_bytes());
        // RFC 1071, section 3.
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(&[1, 2, 3])), 0x0402);
        assert_eq!(fold(sum(&[])), 0);
    }

    #[test]
    fn what_is_cut_off_has_no_headers() {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        frame.extend([0; 20]);
        assert_eq!(Headers::of(&frame).protocol, TCP);
        for len in 0..frame.len() {
            let headers = Headers::of(&frame[..len]);
            assert_eq!(headers.protocol, 0, "{len}");
            assert!(headers.l4 <= headers.end.max(headers.l4) && headers.end <= len);
        }
    }
}
