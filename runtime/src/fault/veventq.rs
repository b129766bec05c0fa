//! Events of a virtual IOMMU (Linux 6.15): what a virtual machine's own IOMMU would report, unrecoverable faults above all.
//!
//! The queue has a depth. The kernel numbers the events, and so each one that there was no room for is known to be lost.
//!
//! Source: `include/uapi/linux/iommufd.h`, `drivers/iommu/iommufd/eventq.c`, `drivers/iommu/iommufd/driver.c`.

use std::{
    collections::VecDeque,
    fmt,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::Stream;
use iommufd_bindings as abi;
use rustix::{
    event::PollFlags,
    io::{self, Errno},
};

use super::{
    Lost,
    iommufd::{destroy, destroy_later},
};
use crate::{
    Error, Result,
    reactor::{self, op::MultishotPoll},
    transport::iommufd::{VeventObject, Viommu},
};

/// Bytes of an event's header (`struct iommufd_vevent_header`).
pub const HEADER_SIZE: usize = 8;
/// Bytes of an event's data at most.
pub const MAX_DATA: usize = 4096;
/// Events that are read at a time.
const READ_EVENTS: usize = 32;
/// Sequence numbers run from 0 to this, and start again.
const MAX_SEQUENCE: u32 = i32::MAX as u32;

const _: () = assert!(size_of::<abi::iommufd_vevent_header>() == HEADER_SIZE);
const _: () = assert!(size_of::<abi::iommu_vevent_arm_smmuv3>() == 32);
const _: () = assert!(size_of::<abi::iommu_vevent_tegra241_cmdqv>() == 16);

const LOST_EVENTS: u32 = abi::iommu_veventq_flag_IOMMU_VEVENTQ_FLAG_LOST_EVENTS;

/// Which events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventType {
    /// Event records of ARM's SMMUv3: 32 bytes.
    ArmSmmuV3,
    /// NVIDIA's command queues: 16 bytes.
    Tegra241,
    /// One that this library does not know.
    Other {
        /// The kernel's number (`enum iommu_veventq_type`).
        number: u32,
        /// Bytes of data of each event, up to [`MAX_DATA`].
        data_len: usize,
    },
}

impl EventType {
    /// The kernel's number.
    pub fn number(self) -> u32 {
        match self {
            Self::ArmSmmuV3 => abi::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_ARM_SMMUV3,
            Self::Tegra241 => abi::iommu_veventq_type_IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV,
            Self::Other { number, .. } => number,
        }
    }

    /// Bytes of data of each event.
    pub fn data_len(self) -> usize {
        match self {
            Self::ArmSmmuV3 => 32,
            Self::Tegra241 => 16,
            Self::Other { data_len, .. } => data_len,
        }
    }
}

/// What comes out of a queue of events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VirtualEvent {
    /// Events were lost between what came before and what comes next.
    Lost(Lost),
    /// An event.
    Event {
        /// Its number: one more than that of the event before, 0 after [`i32::MAX`].
        sequence: u32,
        /// What the IOMMU says, as its kind writes it.
        data: Vec<u8>,
    },
}

/// A record, as it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its number.
    pub sequence: u32,
    /// The event's data; `None` when all that is told is that events up to this number are lost.
    pub data: Option<&'a [u8]>,
}

/// Takes apart what one read gave: headers, with `data_len` bytes behind each but those that only tell of losses.
///
/// # Errors
/// [`Error::DeviceFault`] for unknown flags, a sequence number that can't be, or a record that ends too early.
pub fn parse(mut bytes: &[u8], data_len: usize) -> Result<Vec<Record<'_>>> {
    let mut records = Vec::new();
    let fault = |number: usize, what: fmt::Arguments<'_>| {
        Error::fault(format!("event {number} of a virtual IOMMU {what}; is the kernel newer than this program?"))
    };
    while !bytes.is_empty() {
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_SIZE>() else {
            return Err(fault(records.len(), format_args!("has {} bytes of a header", bytes.len())));
        };
        let [flags, sequence] =
            [0, 4].map(|at| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
        if flags & !LOST_EVENTS != 0 {
            return Err(fault(records.len(), format_args!("has unknown flags ({flags:#x})")));
        }
        if sequence > MAX_SEQUENCE {
            return Err(fault(records.len(), format_args!("has number {sequence:#x}, above {MAX_SEQUENCE:#x}")));
        }
        let len = if flags & LOST_EVENTS == 0 { data_len } else { 0 };
        let Some((data, rest)) = rest.split_at_checked(len) else {
            return Err(fault(records.len(), format_args!("has {} bytes of data instead of {len}", rest.len())));
        };
        records.push(Record { sequence, data: (flags & LOST_EVENTS == 0).then_some(data) });
        bytes = rest;
    }
    Ok(records)
}

/// Counts lost events by the numbers of the others.
#[derive(Debug, Clone, Copy)]
pub struct Sequence {
    last: u32,
}

impl Default for Sequence {
    /// Of a new queue, whose first event has number 0.
    fn default() -> Self {
        Self { last: MAX_SEQUENCE }
    }
}

impl Sequence {
    /// Events that were lost before this record, or with it where it only tells of that.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] for a number that was there just before.
    pub fn next(&mut self, record: &Record<'_>) -> Result<u64> {
        let delta = record.sequence.wrapping_sub(self.last) & MAX_SEQUENCE;
        if delta == 0 {
            return Err(Error::fault(format!("two events of a virtual IOMMU have number {}", record.sequence)));
        }
        self.last = record.sequence;
        // A header without data has the number of the last event that was lost, which counts as well.
        Ok(u64::from(delta) - u64::from(record.data.is_some()))
    }
}

/// The events of a virtual IOMMU: a stream that ends with its first error. Losses come in order, with their exact count.
///
/// Dropping it destroys the queue.
pub struct VirtualEvents {
    /// Goes first: the ring holds the descriptor through it.
    watch: Option<MultishotPoll>,
    object: Option<VeventObject>,
    data_len: usize,
    buffer: Vec<u8>,
    sequence: Sequence,
    ready: VecDeque<VirtualEvent>,
    /// Nothing was there at the last look; the descriptor is watched.
    drained: bool,
    ended: bool,
}

impl fmt::Debug for VirtualEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtualEvents").field("object", &self.object).field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl VirtualEvents {
    /// Makes the queue of `viommu` for one type of events, which holds up to `depth` of them, 1 to 2^19.
    ///
    /// # Errors
    /// [`Error::NoReactor`] outside of a reactor, [`Error::Invalid`] for a type with more than [`MAX_DATA`] bytes, and those of
    /// [`VeventObject::alloc`].
    pub fn open(viommu: &Viommu, kind: EventType, depth: u32) -> Result<Self> {
        if !reactor::is_running() {
            return Err(Error::NoReactor { what: "a queue of a virtual IOMMU's events" });
        }
        let data_len = kind.data_len();
        if data_len > MAX_DATA {
            return Err(Error::invalid(format!("events of {data_len} bytes: up to {MAX_DATA} are possible")));
        }
        let object = VeventObject::alloc(viommu, kind.number(), depth)?;
        let watch = reactor::op::poll_multishot(object.fd(), PollFlags::IN.bits().into());
        Ok(Self {
            watch: Some(watch),
            object: Some(object),
            data_len,
            buffer: vec![0; READ_EVENTS * (HEADER_SIZE + data_len)],
            sequence: Sequence::default(),
            ready: VecDeque::new(),
            drained: false,
            ended: false,
        })
    }

    /// Destroys the queue, and waits for it. Events that are in it are gone.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses: it stays until its context ends then.
    pub async fn close(mut self) -> Result<()> {
        self.watch = None;
        let Some(object) = self.object.take() else { return Ok(()) };
        let (closed, _viommu) = object.close_fd();
        destroy(closed).await
    }

    /// Takes a batch of events from the kernel; whether there was one.
    fn fill(&mut self) -> Result<bool> {
        let Some(object) = &self.object else { return Ok(false) };
        let read = match read(object.fd().as_fd(), &mut self.buffer) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(Errno::INVAL) => {
                return Err(Error::fault(format!(
                    "an event of a virtual IOMMU has more than {} bytes of data",
                    self.data_len
                )));
            }
            Err(errno) => return Err(Error::io("reading events of a virtual IOMMU", errno)),
        };
        let Some(bytes) = self.buffer.get(..read) else {
            return Err(Error::fault(format!("a read of {} bytes gave {read}", self.buffer.len())));
        };
        for record in parse(bytes, self.data_len)? {
            match self.sequence.next(&record)? {
                0 => {}
                lost => self.ready.push_back(VirtualEvent::Lost(Lost::Count(lost))),
            }
            if let Some(data) = record.data {
                self.ready.push_back(VirtualEvent::Event { sequence: record.sequence, data: data.to_vec() });
            }
        }
        Ok(true)
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<VirtualEvent>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Ok(event));
            }
            if self.drained {
                let Some(watch) = self.watch.as_mut() else { return Poll::Pending };
                match ready!(Pin::new(watch).poll_next(cx)) {
                    Some(Ok(_)) => self.drained = false,
                    Some(Err(error)) => return Poll::Ready(Err(Error::io("watching events of a virtual IOMMU", error))),
                    None => return Poll::Pending,
                }
            }
            self.drained = !self.fill()?;
        }
    }
}

fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    io::retry_on_intr(|| io::read(fd, &mut *buffer))
}

impl Stream for VirtualEvents {
    type Item = Result<VirtualEvent>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended && this.ready.is_empty() {
            return Poll::Ready(None);
        }
        let event = ready!(this.poll_event(cx));
        this.ended |= event.is_err();
        Poll::Ready(Some(event))
    }
}

impl Drop for VirtualEvents {
    fn drop(&mut self) {
        self.watch = None;
        if let Some(object) = self.object.take() {
            let (closed, viommu) = object.close_fd();
            destroy_later(closed, "a queue of a virtual IOMMU's events", viommu);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(flags: u32, sequence: u32, data: &[u8]) -> Vec<u8> {
        [&flags.to_ne_bytes()[..], &sequence.to_ne_bytes(), data].concat()
    }

    #[test]
    fn losses_are_counted_by_the_numbers() {
        let all =
            [event(0, 0, b"abcd"), event(0, 3, b"efgh"), event(1, 5, b""), event(0, 6, b"ijkl"), event(1, 7, b"")].concat();
        let records = parse(&all, 4).unwrap();
        let data: Vec<_> = records.iter().map(|record| record.data).collect();
        assert_eq!(data, [Some(&b"abcd"[..]), Some(b"efgh"), None, Some(b"ijkl"), None]);
        let mut sequence = Sequence::default();
        let lost: Vec<_> = records.iter().map(|record| sequence.next(record).unwrap()).collect();
        assert_eq!(lost, [0, 2, 2, 0, 1]);
    }

    #[test]
    fn numbers_start_again_after_the_largest() {
        let record = |sequence| Record { sequence, data: Some(&[]) };
        let mut sequence = Sequence { last: MAX_SEQUENCE - 1 };
        assert_eq!(sequence.next(&record(MAX_SEQUENCE)).unwrap(), 0);
        assert_eq!(sequence.next(&record(0)).unwrap(), 0);
        assert!(sequence.next(&record(0)).is_err());
        let mut sequence = Sequence { last: MAX_SEQUENCE - 1 };
        assert_eq!(sequence.next(&Record { sequence: 1, data: None }).unwrap(), 3);
        assert_eq!(sequence.next(&record(4)).unwrap(), 2);
        let mut first = Sequence::default();
        assert_eq!(first.next(&record(2)).unwrap(), 2, "the first events of a queue were lost");
    }

    #[test]
    fn what_no_kernel_writes_is_refused() {
        for (bytes, part) in [
            (event(2, 0, b"abcd"), "unknown flags"),
            (event(0, 1 << 31, b"abcd"), "above 0x7fffffff"),
            (event(0, 0, b"abc"), "3 bytes of data instead of 4"),
            (event(1, 0, b"a"), "event 1 of a virtual IOMMU has 1 bytes of a header"),
        ] {
            let error = parse(&bytes, 4).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(parse(&[], 4).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_bytes_are_records_or_an_error(
            bytes in proptest::collection::vec(prop_oneof![6 => 0u8..2, 1 => any::<u8>()], 0..200),
            data_len in 0usize..40,
        ) {
            if let Ok(records) = parse(&bytes, data_len) {
                let len: usize = records.iter().map(|record| HEADER_SIZE + record.data.map_or(0, <[u8]>::len)).sum();
                prop_assert_eq!(len, bytes.len());
            }
        }

        #[test]
        fn given_and_lost_events_are_all_events(steps in proptest::collection::vec((1u32..1000, any::<bool>()), 1..50)) {
            let (mut sequence, mut number, mut counted) = (Sequence::default(), MAX_SEQUENCE, 0u64);
            for (step, given) in &steps {
                number = (number + step) & MAX_SEQUENCE;
                let record = Record { sequence: number, data: given.then_some(&[]) };
                counted += sequence.next(&record).unwrap() + u64::from(*given);
            }
            prop_assert_eq!(counted, steps.iter().map(|(step, _)| u64::from(*step)).sum::<u64>());
        }
    }
}
