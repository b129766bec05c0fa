//! The NVM command set (section 6).

use super::{
    Faults,
    backing::Store,
    spec::{NSID_ALL, Sqe, Status, nvm},
    transfer::DataPointer,
};
use crate::device::Host;

/// Bytes that one DSM command deallocates at most; it is a hint, so the rest may stay.
const DEALLOCATE_LIMIT: u64 = 1 << 42;
/// Bytes that are compared at once.
const COMPARE_PART: usize = 4096;

/// A namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    pub lba_shift: u32,
    pub blocks: u64,
    pub store: Store,
    /// Distinguishes it from the namespaces of other controllers.
    pub uid: u64,
}

/// What is to be done with a command's completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done(Status),
    /// By fault injection: no completion.
    Dropped,
    /// By fault injection: a completion for a command that nobody sent.
    WrongCid(Status),
}

/// What the SMART log counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Namespaces, and what it takes to execute commands on them.
#[derive(Debug)]
pub(super) struct Nvm {
    pub namespaces: Vec<Namespace>,
    pub faults: Faults,
    pub has_faults: bool,
    pub max_transfer: u64,
    pub page_shift: u32,
    /// The volatile write cache is switched off: every write is flushed.
    pub write_through: bool,
    pub counters: Counters,
    pub data: DataPointer,
}

impl Nvm {
    #[inline]
    pub fn namespace(&mut self, nsid: u32) -> Result<&mut Namespace, Status> {
        let index = (nsid as usize).wrapping_sub(1);
        self.namespaces.get_mut(index).ok_or(Status::INVALID_NAMESPACE)
    }

    /// Prepares for a batch of commands.
    #[inline]
    pub fn warm(&self, batch: &[Sqe]) {
        // The first command would have to wait for its own miss anyway.
        for sqe in batch.iter().skip(1).filter(|sqe| sqe.opcode() == nvm::READ) {
            if let Some(namespace) = self.namespaces.get((sqe.nsid() as usize).wrapping_sub(1))
                && sqe.lba() < namespace.blocks
            {
                namespace.store.warm(sqe.lba() << namespace.lba_shift);
            }
        }
    }

    /// Executes a command of an I/O queue.
    #[inline]
    pub fn execute(&mut self, sqe: &Sqe, host: &mut impl Host) -> Outcome {
        if self.has_faults
            && let Some(outcome) = self.fault(sqe, host)
        {
            return outcome;
        }
        Outcome::Done(self.perform(sqe, host))
    }

    #[cold]
    fn fault(&mut self, sqe: &Sqe, host: &mut impl Host) -> Option<Outcome> {
        if !matches!(sqe.opcode(), nvm::READ | nvm::WRITE | nvm::COMPARE | nvm::WRITE_ZEROES) {
            return None;
        }
        let hit = |lba: Option<u64>| lba.is_some_and(|lba| lba.wrapping_sub(sqe.lba()) < sqe.blocks());
        if hit(self.faults.drop_completion_lba) {
            return Some(Outcome::Dropped);
        }
        if hit(self.faults.error_lba) {
            let error = if sqe.opcode() == nvm::READ { Status::READ_ERROR } else { Status::WRITE_FAULT };
            return Some(Outcome::Done(error));
        }
        hit(self.faults.bad_cid_lba).then(|| Outcome::WrongCid(self.perform(sqe, host)))
    }

    #[inline]
    fn perform(&mut self, sqe: &Sqe, host: &mut impl Host) -> Status {
        if sqe.fuse() != 0 {
            return Status::INVALID_FIELD;
        }
        let result = match sqe.opcode() {
            nvm::READ => self.read(sqe, host),
            nvm::WRITE => self.write(sqe, host),
            nvm::FLUSH => self.flush(sqe.nsid()),
            nvm::COMPARE => self.compare(sqe, host),
            nvm::WRITE_ZEROES => self.write_zeroes(sqe),
            nvm::DATASET_MANAGEMENT => self.dataset_management(sqe, host),
            _ => Err(Status::INVALID_OPCODE),
        };
        match result {
            Ok(()) => Status::SUCCESS,
            Err(status) => status,
        }
    }

    /// The byte range of a command, checked against the namespace.
    #[inline]
    fn range(&mut self, sqe: &Sqe) -> Result<(u64, u64), Status> {
        let namespace = self.namespace(sqe.nsid())?;
        let (lba, blocks) = (sqe.lba(), sqe.blocks());
        if lba >= namespace.blocks || blocks > namespace.blocks - lba {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        Ok((lba << namespace.lba_shift, blocks << namespace.lba_shift))
    }

    /// The byte range of a command that moves data, with its segments in `self.data`.
    #[inline]
    fn transfer(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<(u64, u64), Status> {
        let (offset, len) = self.range(sqe)?;
        if len > self.max_transfer {
            return Err(Status::INVALID_FIELD);
        }
        self.data.resolve(sqe, len, self.page_shift, host)?;
        Ok((offset, len))
    }

    #[inline]
    fn read(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<(), Status> {
        let (mut offset, len) = self.transfer(sqe, host)?;
        self.counters.reads += 1;
        self.counters.bytes_read += len;
        let Some(namespace) = self.namespaces.get_mut(sqe.nsid() as usize - 1) else {
            return Err(Status::INVALID_NAMESPACE);
        };
        for segment in &self.data.segments {
            namespace.store.read(offset, segment.len, segment.iova, host)?;
            offset += segment.len;
        }
        Ok(())
    }

    #[inline]
    fn write(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<(), Status> {
        let (mut offset, len) = self.transfer(sqe, host)?;
        self.counters.writes += 1;
        self.counters.bytes_written += len;
        let Some(namespace) = self.namespaces.get_mut(sqe.nsid() as usize - 1) else {
            return Err(Status::INVALID_NAMESPACE);
        };
        for segment in &self.data.segments {
            namespace.store.write(offset, segment.len, segment.iova, host)?;
            offset += segment.len;
        }
        let force_unit_access = sqe.dword(12) >> 30 & 1 != 0;
        if force_unit_access || self.write_through { namespace.store.flush() } else { Ok(()) }
    }

    /// Flushes a namespace, or all.
    pub fn flush(&mut self, nsid: u32) -> Result<(), Status> {
        if nsid == NSID_ALL {
            return self.namespaces.iter_mut().try_for_each(|namespace| namespace.store.flush());
        }
        self.namespace(nsid)?.store.flush()
    }

    fn compare(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<(), Status> {
        let (mut offset, _) = self.transfer(sqe, host)?;
        let Some(namespace) = self.namespaces.get_mut(sqe.nsid() as usize - 1) else {
            return Err(Status::INVALID_NAMESPACE);
        };
        let (mut theirs, mut ours) = ([0; COMPARE_PART], [0; COMPARE_PART]);
        for segment in &self.data.segments {
            let (mut iova, mut left) = (segment.iova, segment.len);
            while left != 0 {
                let part = left.min(COMPARE_PART as u64);
                let (theirs, ours) = (&mut theirs[..part as usize], &mut ours[..part as usize]);
                host.read(iova, theirs).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                namespace.store.get(offset, ours)?;
                if theirs != ours {
                    return Err(Status::COMPARE_FAILURE);
                }
                (iova, offset, left) = (iova.wrapping_add(part), offset + part, left - part);
            }
        }
        Ok(())
    }

    fn write_zeroes(&mut self, sqe: &Sqe) -> Result<(), Status> {
        let (offset, len) = self.range(sqe)?;
        let flush = sqe.dword(12) >> 30 & 1 != 0 || self.write_through;
        let namespace = self.namespace(sqe.nsid())?;
        namespace.store.zero(offset, len)?;
        if flush { namespace.store.flush() } else { Ok(()) }
    }

    /// Section 6.7: of the attributes only Deallocate does something.
    fn dataset_management(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<(), Status> {
        let (shift, blocks) = {
            let namespace = self.namespace(sqe.nsid())?;
            (namespace.lba_shift, namespace.blocks)
        };
        let count = (sqe.dword(10) & 0xff) as usize + 1;
        self.data.resolve(sqe, count as u64 * 16, self.page_shift, host)?;
        let mut ranges = [0; 256 * 16];
        let ranges = &mut ranges[..count * 16];
        let mut at = 0;
        for segment in &self.data.segments {
            let part = &mut ranges[at..at + segment.len as usize];
            host.read(segment.iova, part).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            at += segment.len as usize;
        }
        let parsed = ranges.chunks_exact(16).map(|range| {
            let value = u128::from_le_bytes(range.try_into().unwrap_or_default());
            ((value >> 64) as u64, u64::from((value >> 32) as u32))
        });
        if parsed.clone().any(|(lba, len)| lba > blocks || len > blocks - lba) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let deallocate = sqe.dword(11) & 4 != 0;
        let mut left = if deallocate { DEALLOCATE_LIMIT } else { 0 };
        let namespace = self.namespace(sqe.nsid())?;
        for (lba, len) in parsed.filter(|(_, len)| *len != 0) {
            let bytes = len << shift;
            if bytes > left {
                break;
            }
            left -= bytes;
            namespace.store.zero(lba << shift, bytes)?;
        }
        Ok(())
    }
}
