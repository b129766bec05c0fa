//! A fault queue for a software device, in regions of its own and with an interrupt of its own.
//!
//! Two forms, both of the series "vfio: expose physical DMA faults to user space", which was never merged into Linux:
//! [`Form::TwoRegion`] with a version that both sides agree on (v8), and [`Form::Single`] with a queue of answers to page requests
//! (v13). A device keeps a [`Unit`], passes accesses to regions from [`region::COUNT`] on to it, and tells it of faults.
//!
//! What the series do wrong is done right here: version 0 is refused; the header has the version that was agreed on; a queue is full
//! when one slot is free, whatever its size; a consumer that overtakes the producer is refused; and all is as new for the next
//! client. Faults that there is no room for are counted, in version 2 of the interface, which is ours
//! ([`abi`](vfio_uring::fault::abi)).
//!
//! [`Faulty`] does so for any device. A [`Handle`] makes the device fault on addresses, raises faults by the thousand, and lies.

mod answers;
mod faulty;
mod handle;
mod queue;

use std::{io, os::fd::BorrowedFd};

use rustix::io::Errno;
use vfio_uring::fault::{
    Fault, PageRequest, Permissions, Reason, Unrecoverable,
    abi::{
        IRQ_INDEX, IRQ_TYPE, RECORD, REGION_TYPE, REGION_TYPE_LATER, Record, SUBTYPE_CONSUMER, SUBTYPE_QUEUE,
        SUBTYPE_RESPONSE, VERSION_COUNTED,
    },
};
use vfio_uring::transport::user::wire::{CAP_FAULT, CAP_FAULT_RESPONSE};

use self::{answers::Answers, queue::Queue};
pub use self::{
    faulty::Faulty,
    handle::{Counters, GivenAnswer, Handle, Word},
    queue::Form,
};
use crate::device::{Host, Kind, RegionSpec, irq, region};

/// The producer's region, or the single one.
const QUEUE: u32 = region::COUNT;
/// The consumer's region, or that of the answers.
const SECOND: u32 = region::COUNT + 1;
const READ: u32 = 1;
const WRITE: u32 = 2;
/// Faults that one call of `service` raises.
const STORM: u64 = 256;

/// What a fault queue is like.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its form.
    pub form: Form,
    /// The highest version: 1, or 2 with a count of lost faults.
    pub version: u32,
    /// Entries, 2 at least.
    pub entries: u32,
    /// Bytes of an entry, 48 at least.
    pub entry_size: u32,
    /// Whether entries may be mapped.
    pub mapped: bool,
    /// Of the single-region form: whether there is a queue of answers.
    pub answers: bool,
    /// Whether regions have the type of the series' v12, 4 in place of 2.
    pub later_type: bool,
    /// To raise faults, and to see what became of them.
    pub handle: Handle,
}

impl Config {
    /// Version 2 with 64 entries of 64 bytes, mapped, with answers where the form has some.
    ///
    /// # Errors
    /// When no eventfd is to be had.
    pub fn new(form: Form) -> io::Result<Self> {
        Ok(Self {
            form,
            version: VERSION_COUNTED,
            entries: 64,
            entry_size: 64,
            mapped: true,
            answers: form == Form::Single,
            later_type: form == Form::Single,
            handle: Handle::new()?,
        })
    }

    fn check(&self) -> io::Result<()> {
        let sizes = (2..=1 << 16).contains(&self.entries) && (RECORD as u32..=4096).contains(&self.entry_size);
        if sizes && (1..=VERSION_COUNTED).contains(&self.version) && !(self.answers && self.form == Form::TwoRegion) {
            return Ok(());
        }
        let what =
            "a fault queue has 2 to 65536 entries of 48 to 4096 bytes, version 1 or 2, and answers in the single form only";
        Err(io::Error::new(io::ErrorKind::InvalidInput, what))
    }
}

/// A device's fault queue.
#[derive(Debug)]
pub struct Unit {
    config: Config,
    queue: Queue,
    answers: Option<Answers>,
    /// A signal is due.
    signal: bool,
    group: u32,
}

impl Unit {
    /// An empty queue.
    ///
    /// # Errors
    /// A configuration that is not possible, or no memfd to be had.
    pub fn new(config: Config) -> io::Result<Self> {
        config.check()?;
        let queue = Queue::new(&config)?;
        let answers = if config.answers { Some(Answers::new(config.mapped)?) } else { None };
        Ok(Self { config, queue, answers, signal: false, group: 0 })
    }

    /// To raise faults, and to see what became of them.
    pub fn handle(&self) -> Handle {
        self.config.handle.clone()
    }

    /// All as new, for the next client.
    pub fn reset(&mut self) {
        self.queue.reset();
        if let Some(answers) = &mut self.answers {
            answers.reset();
        }
        self.signal = false;
    }

    /// Number of a device's regions, with those of the queue.
    pub fn regions(&self) -> u32 {
        match self.config.form {
            Form::Single if self.answers.is_none() => SECOND,
            _ => SECOND + 1,
        }
    }

    /// Number of a device's interrupt indices, with that of the queue.
    pub fn irqs(&self) -> u32 {
        const { assert!(IRQ_INDEX == irq::COUNT) };
        IRQ_INDEX + 1
    }

    /// What the interrupt of the queue is.
    pub fn irq_kind(&self, index: u32) -> Option<Kind> {
        let (type_, subtype) = IRQ_TYPE;
        (index == IRQ_INDEX && self.config.form == Form::Single).then_some(Kind { type_, subtype, capability: None })
    }

    /// A region of the queue; one of no size for other indices.
    pub fn region(&self, index: u32) -> RegionSpec {
        let type_ = if self.config.later_type { REGION_TYPE_LATER } else { REGION_TYPE };
        let kind = |subtype, capability| Some(Kind { type_, subtype, capability });
        match (index, self.config.form, &self.answers) {
            (QUEUE, form, _) => RegionSpec {
                size: self.queue.size(),
                flags: if form == Form::TwoRegion { READ } else { READ | WRITE },
                mappable: self.queue.mappable(),
                kind: kind(SUBTYPE_QUEUE, Some((CAP_FAULT, self.config.version))),
            },
            (SECOND, Form::TwoRegion, _) => {
                RegionSpec { size: 8, flags: WRITE, mappable: None, kind: kind(SUBTYPE_CONSUMER, None) }
            }
            (SECOND, Form::Single, Some(answers)) => RegionSpec {
                size: answers.size(),
                flags: READ | WRITE,
                mappable: answers.mappable(),
                kind: kind(SUBTYPE_RESPONSE, Some((CAP_FAULT_RESPONSE, 1))),
            },
            _ => RegionSpec::default(),
        }
    }

    /// Reads from a region of the queue.
    ///
    /// # Errors
    /// `EINVAL` before a version is agreed on.
    pub fn read(&mut self, index: u32, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        match (index, &self.answers) {
            (QUEUE, _) => self.queue.read(offset, to, &self.config.handle),
            (SECOND, Some(answers)) => answers.read(offset, to),
            _ => Err(Errno::INVAL),
        }
    }

    /// Writes to a region of the queue.
    ///
    /// # Errors
    /// `EINVAL` for a version that is not offered, or differs from that which was agreed on; for indices that can't be; and for
    /// what is not to be written.
    pub fn write(&mut self, index: u32, offset: u64, from: &[u8]) -> Result<(), Errno> {
        match (index, self.config.form, &mut self.answers) {
            (SECOND, Form::TwoRegion, _) => self.queue.write_consumer(offset, from),
            (QUEUE, Form::Single, _) => self.queue.write_tail(offset, from),
            (SECOND, Form::Single, Some(answers)) => answers.write(offset, from, &self.config.handle),
            _ => Err(Errno::INVAL),
        }
    }

    /// Readable when the handle asks for something.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.config.handle.wake()
    }

    /// Whether [`Unit::service`] has something to do.
    pub fn is_active(&self) -> bool {
        self.signal || self.config.handle.is_pending() || self.answers.as_ref().is_some_and(|answers| answers.is_active())
    }

    /// Does what the handle asks for, takes answers, and signals; gives the units of work.
    pub fn service(&mut self, host: &mut impl Host) -> usize {
        let mut work = 0;
        if self.config.handle.is_pending() {
            let handle = self.config.handle.clone();
            let (records, rewrites) = handle.take(STORM);
            work += records.len() + rewrites.len();
            for record in records {
                self.store(record);
            }
            for (slot, bytes) in rewrites {
                self.queue.rewrite(slot, &bytes);
            }
        }
        if let Some(answers) = &mut self.answers {
            work += answers.service(&self.config.handle);
        }
        if std::mem::take(&mut self.signal) {
            host.signal_specific(IRQ_INDEX);
        }
        work
    }

    fn store(&mut self, record: Record) {
        self.signal |= self.queue.store(record, &self.config.handle);
    }

    /// Stores a fault that can't be answered. The client is told at the next [`Unit::service`].
    pub fn fault(&mut self, fault: Unrecoverable) {
        self.store(Record { lost: 0, fault: Fault::Unrecoverable(fault), last: true });
    }

    /// Stores a fault of an access to `iova`.
    pub fn access(&mut self, iova: u64, write: bool, reason: Reason) {
        self.fault(Unrecoverable {
            reason,
            pasid: None,
            permissions: permissions(write),
            address: Some(iova),
            fetch_address: None,
        });
    }

    /// Whether an access to `len` bytes from `iova` on is to fail, as the handle says.
    pub fn forbids(&self, iova: u64, len: usize) -> bool {
        self.config.handle.forbids(iova, len)
    }

    /// Whether the device asks for pages that are not there, as the handle says and where there can be an answer.
    pub fn asks(&self) -> bool {
        self.answers.is_some() && self.config.handle.asks()
    }

    /// Asks for pages, as one group; its number.
    pub fn request(&mut self, pages: &[u64], write: bool) -> u32 {
        self.group = self.group.wrapping_add(1) & 0x1ff;
        let group_index = self.group;
        self.forget_answer(group_index);
        for (i, &address) in pages.iter().enumerate() {
            let permissions = permissions(write);
            let request = PageRequest { pasid: None, group_index, permissions, address, length: 0, private_data: None };
            self.store(Record { lost: 0, fault: Fault::PageRequest(request), last: i + 1 == pages.len() });
        }
        group_index
    }

    /// The answer to a group that was asked for, once it is there: its code.
    pub fn answer(&self, group: u32) -> Option<u32> {
        self.answers.as_ref()?.to(group)
    }

    fn forget_answer(&mut self, group: u32) {
        if let Some(answers) = &mut self.answers {
            answers.forget(group);
        }
    }
}

fn permissions(write: bool) -> Permissions {
    if write { Permissions::WRITE } else { Permissions::READ }
}
