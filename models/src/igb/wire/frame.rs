//! A frame on its way.

/// Room in front, for a VLAN tag.
const FRONT: usize = 8;

/// Memory for a frame, used again and again.
#[derive(Debug)]
pub(in crate::igb) struct Frame {
    data: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Frame {
    /// With room for `capacity` bytes, a VLAN tag in front and a CRC behind.
    pub fn new(capacity: usize) -> Self {
        Self { data: vec![0; FRONT + capacity + 4].into(), start: FRONT, end: FRONT }
    }

    pub fn clear(&mut self) {
        (self.start, self.end) = (FRONT, FRONT);
    }

    pub fn len(&self) -> usize {
        self.end - self.start
    }

    pub fn bytes(&self) -> &[u8] {
        &self.data[self.start..self.end]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.data[self.start..self.end]
    }

    /// Takes `len` bytes more, which hold anything; `None` when they do not fit.
    pub fn extend(&mut self, len: usize) -> Option<&mut [u8]> {
        let start = self.end;
        let end = start.checked_add(len).filter(|&end| end <= self.data.len())?;
        self.end = end;
        self.data.get_mut(start..end)
    }

    /// Takes the bytes.
    pub fn push(&mut self, bytes: &[u8]) -> bool {
        self.extend(bytes.len()).map(|room| room.copy_from_slice(bytes)).is_some()
    }

    /// Drops what is behind the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.end = self.end.min(self.start + len);
    }

    /// Makes it at least `len` bytes long, with zeros.
    pub fn pad(&mut self, len: usize) {
        if let Some(more) = len.checked_sub(self.len()).filter(|&more| more > 0)
            && let Some(room) = self.extend(more)
        {
            room.fill(0);
        }
    }

    /// Puts a VLAN tag behind the addresses.
    pub fn insert_tag(&mut self, ether_type: u16, tag: u16) {
        if self.len() < 12 || self.start < 4 {
            return;
        }
        self.data.copy_within(self.start..self.start + 12, self.start - 4);
        self.start -= 4;
        let [a, b] = ether_type.to_be_bytes();
        let [c, d] = tag.to_be_bytes();
        self.data[self.start + 12..self.start + 16].copy_from_slice(&[a, b, c, d]);
    }

    /// Takes the VLAN tag out that is behind the addresses.
    pub fn remove_tag(&mut self) {
        if self.len() >= 16 {
            self.data.copy_within(self.start..self.start + 12, self.start + 4);
            self.start += 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        let mut frame = Frame::new(64);
        let bytes: Vec<u8> = (0..20).collect();
        assert!(frame.push(&bytes));
        frame.insert_tag(0x8100, 0x6123);
        assert_eq!(&frame.bytes()[..16], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0x81, 0, 0x61, 0x23]);
        assert_eq!(frame.len(), 24);
        frame.remove_tag();
        assert_eq!(frame.bytes(), bytes);
        frame.pad(60);
        assert_eq!((frame.len(), frame.bytes()[59]), (60, 0));
        assert!(frame.extend(100).is_none() && frame.len() == 60);
        frame.clear();
        assert_eq!(frame.len(), 0);
    }
}
