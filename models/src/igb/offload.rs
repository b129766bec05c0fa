//! What a transmit context asks for: checksums and segmentation (sections 7.2.2 and 7.2.4).

use super::{
    Cause,
    packet::{crc32c, put_checksum, sum},
    spec::{MAX_FRAME, tx},
};

/// Bytes of the headers of a segmented packet at most: 127 + 511 + 255.
pub(super) const MAX_HEADER: usize = 896;
/// Flags that stay in the first, in middle and in the last segment (DTXTCPFLGL and DTXTCPFLGH as they are initially).
const FIRST_FLAGS: u8 = 0xf6;
const MIDDLE_FLAGS: u8 = 0x76;
const LAST_FLAGS: u8 = 0x7f;

/// What is on top of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
    Sctp,
}

/// A context descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context {
    pub vlan: u16,
    /// Bytes before the IP header.
    pub mac: usize,
    /// Bytes of the IP header.
    pub ip: usize,
    /// Bytes of the transport header.
    pub l4: usize,
    pub mss: usize,
    pub v4: bool,
    pub transport: Option<Transport>,
}

impl Context {
    pub fn parse(low: u64, high: u64) -> Self {
        let lengths = low as u32;
        let (kind, sizes) = (high as u32, (high >> 32) as u32);
        Self {
            vlan: (lengths >> 16) as u16,
            mac: (lengths >> 9 & 0x7f) as usize,
            ip: (lengths & 0x1ff) as usize,
            l4: (sizes >> 8 & 0xff) as usize,
            mss: (sizes >> 16) as usize,
            v4: kind & tx::TUCMD_IPV4 != 0,
            transport: match kind >> tx::TUCMD_L4T_SHIFT & 3 {
                0 => Some(Transport::Udp),
                1 => Some(Transport::Tcp),
                2 => Some(Transport::Sctp),
                _ => None,
            },
        }
    }

    /// Bytes of all headers.
    pub fn headers(&self) -> usize {
        self.mac + self.ip + self.l4
    }

    /// Whether packets can be segmented by it.
    pub fn can_segment(&self) -> bool {
        let l4 = match self.transport {
            Some(Transport::Tcp) => 20,
            Some(Transport::Udp) => 8,
            _ => return false,
        };
        let ip = if self.v4 { 20 } else { 40 };
        self.mac >= 14 && self.ip >= ip && self.l4 >= l4 && self.mss > 0 && self.headers() + self.mss <= MAX_FRAME
    }
}

/// Which segment of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment {
    /// From 0.
    pub index: u32,
    /// Bytes of payload before it.
    pub offset: u32,
    pub last: bool,
}

/// Makes the headers right for a segment. `frame` starts with a copy of the packet's, which [`Context::can_segment`].
pub(super) fn segment(frame: &mut [u8], context: &Context, segment: Segment) {
    let total = frame.len();
    let (ip, l4) = (context.mac, context.mac + context.ip);
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = frame.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    if context.v4 {
        put(ip + 2, &((total - ip) as u16).to_be_bytes());
    } else {
        put(ip + 4, &((total - ip).saturating_sub(40) as u16).to_be_bytes());
    }
    if context.transport == Some(Transport::Udp) {
        put(l4 + 4, &((total - l4) as u16).to_be_bytes());
    }
    if let Some(field) = frame.get_mut(ip + 4..ip + 6).filter(|_| context.v4) {
        let id = u16::from_be_bytes([field[0], field[1]]).wrapping_add(segment.index as u16);
        field.copy_from_slice(&id.to_be_bytes());
    }
    if context.transport == Some(Transport::Tcp)
        && let Some(header) = frame.get_mut(l4..l4 + 20)
    {
        let sequence = u32::from_be_bytes([header[4], header[5], header[6], header[7]]).wrapping_add(segment.offset);
        header[4..8].copy_from_slice(&sequence.to_be_bytes());
        header[13] &= match (segment.index, segment.last) {
            (0, true) => 0xff,
            (0, false) => FIRST_FLAGS,
            (_, false) => MIDDLE_FLAGS,
            (_, true) => LAST_FLAGS,
        };
    }
}

/// Inserts the checksums that are asked for. `segmented`: the sum in the header is without the length, which is added.
pub(super) fn checksums(frame: &mut [u8], context: &Context, ip: bool, l4: bool, segmented: bool) -> Result<(), Cause> {
    let (start, end) = (context.mac, context.mac + context.ip);
    if ip && context.v4 {
        let header = frame.get_mut(start..end).filter(|header| header.len() >= 20).ok_or(Cause::Context)?;
        header[10..12].fill(0);
        let total = sum(header);
        put_checksum(header, 10, total, false);
    }
    if !l4 {
        return Ok(());
    }
    let segment = frame.get_mut(end..).ok_or(Cause::Context)?;
    let (at, least) = match context.transport {
        Some(Transport::Tcp) => (16, 20),
        Some(Transport::Udp) => (6, 8),
        Some(Transport::Sctp) => (8, 12),
        None => return Err(Cause::Context),
    };
    if segment.len() < least {
        return Err(Cause::Context);
    }
    if context.transport == Some(Transport::Sctp) {
        segment[8..12].fill(0);
        let value = crc32c(segment);
        segment[8..12].copy_from_slice(&value);
        return Ok(());
    }
    // The field holds the sum of what is not in the segment: of the pseudo header.
    let total = sum(segment) + if segmented { segment.len() as u64 } else { 0 };
    put_checksum(segment, at, total, context.transport == Some(Transport::Udp));
    Ok(())
}
