//! The data pointer of a command: PRPs and SGLs to segments of client memory (sections 4.3 and 4.4).

use super::spec::{Sqe, Status};
use crate::device::Host;

/// SGL descriptors of a command at most.
const MAX_DESCRIPTORS: usize = 2048;
/// Bytes of a list that are read at once.
const PART: usize = 4096;

/// A contiguous piece of client memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub iova: u64,
    pub len: u64,
}

/// Where the data of a command is; kept from command to command, so that nothing is allocated for one.
#[derive(Debug)]
pub(super) struct DataPointer {
    pub segments: Vec<Segment>,
    list: Box<[u8; PART]>,
}

impl DataPointer {
    pub fn new() -> Self {
        Self { segments: Vec::with_capacity(256), list: Box::new([0; PART]) }
    }

    /// Finds the segments of `len` bytes. With pages of `1 << page_shift` bytes.
    #[inline]
    pub fn resolve(&mut self, sqe: &Sqe, len: u64, page_shift: u32, host: &mut impl Host) -> Result<(), Status> {
        self.segments.clear();
        match sqe.psdt() {
            0 => self.prps(sqe, len, 1 << page_shift, host),
            1 | 2 => self.sgl(sqe, len, host),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    #[inline]
    fn push(&mut self, iova: u64, len: u64) {
        match self.segments.last_mut() {
            Some(last) if last.iova.wrapping_add(last.len) == iova => last.len += len,
            _ => self.segments.push(Segment { iova, len }),
        }
    }

    #[inline]
    fn prps(&mut self, sqe: &Sqe, len: u64, page: u64, host: &mut impl Host) -> Result<(), Status> {
        let first = sqe.prp1();
        if first & 3 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let taken = len.min(page - (first & (page - 1)));
        self.push(first, taken);
        let left = len - taken;
        if left == 0 {
            return Ok(());
        }
        let second = sqe.prp2();
        if left <= page {
            if second & (page - 1) != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            self.push(second, left);
            return Ok(());
        }
        self.prp_list(second, left, page, host)
    }

    /// A list may start anywhere in its page; a list that another one chains to starts a page.
    fn prp_list(&mut self, list: u64, mut left: u64, page: u64, host: &mut impl Host) -> Result<(), Status> {
        if list & 7 != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        let mut at = list;
        let mut slots = (page - (list & (page - 1))) / 8;
        loop {
            let entries = left.div_ceil(page);
            let (here, chained) = if entries > slots { (slots - 1, true) } else { (entries, false) };
            let mut done = 0;
            while done < here {
                let part = (here - done).min(PART as u64 / 8) as usize;
                let bytes = &mut self.list[..part * 8];
                host.read(at, bytes).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                for i in 0..part {
                    let entry = quad(&self.list[i * 8..]);
                    if entry & (page - 1) != 0 {
                        return Err(Status::PRP_OFFSET_INVALID);
                    }
                    let taken = left.min(page);
                    self.push(entry, taken);
                    left -= taken;
                }
                at = at.wrapping_add(part as u64 * 8);
                done += part as u64;
            }
            if !chained {
                return Ok(());
            }
            host.read(at, &mut self.list[..8]).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            at = quad(&self.list[..]);
            if at & (page - 1) != 0 {
                return Err(Status::PRP_OFFSET_INVALID);
            }
            slots = page / 8;
        }
    }

    fn sgl(&mut self, sqe: &Sqe, len: u64, host: &mut impl Host) -> Result<(), Status> {
        let mut left = len;
        let mut seen = 0;
        let mut next = match Descriptor::new(sqe.prp1(), sqe.prp2())? {
            Descriptor::Data { iova, len } => {
                self.data(iova, len, &mut left);
                None
            }
            Descriptor::Segment { iova, len, last } => Some((iova, len, last)),
        };
        while let Some((iova, bytes, last)) = next.take() {
            if bytes == 0 || bytes % 16 != 0 {
                return Err(Status::SGL_SEGMENT_INVALID);
            }
            let mut done = 0;
            while done < bytes {
                let part = (bytes - done).min(PART as u64);
                seen += part as usize / 16;
                if seen > MAX_DESCRIPTORS {
                    return Err(Status::SGL_COUNT_INVALID);
                }
                let to = &mut self.list[..part as usize];
                host.read(iova.wrapping_add(done), to).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                done += part;
                for i in 0..part as usize / 16 {
                    let (low, high) = (quad(&self.list[i * 16..]), quad(&self.list[i * 16 + 8..]));
                    let is_last = done == bytes && i == part as usize / 16 - 1;
                    match Descriptor::new(low, high)? {
                        Descriptor::Data { iova, len } => self.data(iova, len, &mut left),
                        Descriptor::Segment { iova, len, last: next_last } if is_last && !last => {
                            next = Some((iova, len, next_last));
                        }
                        Descriptor::Segment { .. } => return Err(Status::SGL_SEGMENT_INVALID),
                    }
                }
            }
        }
        if left == 0 { Ok(()) } else { Err(Status::SGL_LENGTH_INVALID) }
    }

    /// What is beyond the command's length is not used.
    fn data(&mut self, iova: u64, len: u64, left: &mut u64) {
        let taken = len.min(*left);
        if taken != 0 {
            self.push(iova, taken);
            *left -= taken;
        }
    }
}

enum Descriptor {
    Data { iova: u64, len: u64 },
    Segment { iova: u64, len: u64, last: bool },
}

impl Descriptor {
    fn new(low: u64, high: u64) -> Result<Self, Status> {
        let len = high & 0xffff_ffff;
        match high >> 56 {
            0x00 => Ok(Self::Data { iova: low, len }),
            0x20 => Ok(Self::Segment { iova: low, len, last: false }),
            0x30 => Ok(Self::Segment { iova: low, len, last: true }),
            _ => Err(Status::SGL_TYPE_INVALID),
        }
    }
}

fn quad(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
