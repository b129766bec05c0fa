//! A device of the kernel as a reactor uses it: bytes of regions go through the ring, requests that may wait run on a thread of
//! their own.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    sync::Arc,
};

use blocking::unblock;
use futures::lock::Mutex;
use rustix::io::Errno;

use super::{
    DeviceFd, IrqInfo,
    device::{access_failed, ended},
};
use crate::{
    Error, Result,
    device::gate::{Access, Gate},
    reactor::{self, op},
    transport::Place,
};

/// Bytes of one read or write of a region.
const CHUNK: usize = 1 << 20;
/// INTx, MSI and MSI-X, which exclude each other.
const MODES: std::ops::Range<u32> = 0..3;

/// An open device of the kernel.
pub(crate) struct Attached {
    device: DeviceFd,
    infos: Vec<IrqInfo>,
    /// One request for interrupts at a time.
    irqs: Mutex<Irqs>,
    /// Vectors whose owner is gone.
    released: RefCell<Vec<(u32, u32)>>,
    /// A request was given up before its answer: what the kernel has is not known.
    unknown: Cell<bool>,
    gate: Arc<Gate>,
}

/// What the kernel has bound.
#[derive(Default)]
struct Irqs {
    bound: BTreeMap<(u32, u32), Arc<OwnedFd>>,
    /// Vectors that are allocated, by index.
    allocated: BTreeMap<u32, u32>,
}

impl Attached {
    pub(crate) fn new(device: DeviceFd, infos: Vec<IrqInfo>, gate: Arc<Gate>) -> Self {
        Self { device, infos, irqs: Mutex::default(), released: RefCell::default(), unknown: Cell::new(false), gate }
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    pub(crate) fn device(&self) -> &DeviceFd {
        &self.device
    }

    /// Reads all of `to`, by the ring: a worker of the kernel does it, which may wait behind a reset, and the reactor goes on.
    ///
    /// Four bytes of configuration space take 49 to 77 us so in a guest under emulation, 14 to 24 us when the ring does it on this
    /// thread (O_NONBLOCK on the descriptor), 1.7 to 3.1 us by pread. Both of those would hold the reactor for as long as a reset
    /// lasts, 100 ms and more; what is read often is mapped.
    pub(crate) async fn read(&self, at: Place, to: &mut [u8]) -> Result<()> {
        let (len, start, mut done) = (to.len(), at.base + at.offset, 0);
        while done < len {
            let buf = vec![0; (len - done).min(CHUNK)];
            match op::read_at(self.device.shared(), buf, start + done as u64).await {
                (Ok(0), _) => return Err(ended("reading", len, start, done)),
                (Ok(read), buf) => {
                    to[done..done + read].copy_from_slice(&buf[..read]);
                    done += read;
                }
                (Err(error), _) => retry("reading", len, start, done, &error)?,
            }
        }
        Ok(())
    }

    /// Writes all of `from`, in the same way.
    pub(crate) async fn write(&self, at: Place, from: &[u8]) -> Result<()> {
        let (len, start, mut done) = (from.len(), at.base + at.offset, 0);
        while done < len {
            let buf = from[done..].iter().take(CHUNK).copied().collect();
            match op::write_at(self.device.shared(), buf, start + done as u64).await.0 {
                Ok(0) => return Err(ended("writing", len, start, done)),
                Ok(written) => done += written,
                Err(error) => retry("writing", len, start, done, &error)?,
            }
        }
        Ok(())
    }

    pub(crate) async fn unmask_irqs(&self, index: u32, start: u32, count: u32) -> Result<()> {
        let device = self.device.clone();
        unblock(move || device.unmask(index, start, count)).await
    }

    /// Binds `fds` to the vectors from `start` on. Where vectors can't be added to those that are enabled, all are disabled and enabled
    /// again; an interrupt that was lost meanwhile is made up for by a signal to each of the others.
    pub(crate) async fn set_irqs(&self, index: u32, start: u32, fds: &[Arc<OwnedFd>]) -> Result<()> {
        let mut irqs = self.irqs.lock().await;
        self.apply_released(&mut irqs).await;
        let end = start + fds.len() as u32;
        let allocated = irqs.allocated.get(&index).copied().unwrap_or(0);
        let grows = self.infos.get(index as usize).is_some_and(IrqInfo::is_resizable) || !MODES.contains(&index);
        let again = self.unknown.get() || (allocated != 0 && end > allocated && !grows);
        let mut wanted: BTreeMap<u32, Arc<OwnedFd>> = (start..).zip(fds.iter().cloned()).collect();
        if again {
            let of_index = irqs.bound.range((index, 0)..(index + 1, 0));
            let before: Vec<_> = of_index.map(|(&(_, vector), fd)| (vector, fd.clone())).collect();
            self.request(move |device| device.disable_irqs(index))
                .await
                .or_else(|error| not_enabled(&error, error.clone()))?;
            irqs.allocated.remove(&index);
            for (vector, fd) in before {
                wanted.entry(vector).or_insert(fd);
            }
        }
        let first = *wanted.keys().next().unwrap_or(&start);
        let last = wanted.keys().next_back().map_or(end, |vector| vector + 1);
        let vectors: Vec<_> = (first..last).map(|vector| wanted.get(&vector).cloned()).collect();
        let bound = vectors.clone();
        let set = self.request(move |device| {
            let fds: Vec<_> = bound.iter().map(|fd| fd.as_ref().map(AsFd::as_fd)).collect();
            device.set_irqs_eventfds(index, first, &fds)
        });
        if let Err(error) = set.await {
            if again {
                // Those that were there before are gone with it: whoever waits for them looks, and fails at the device.
                irqs.bound.retain(|&(of, _), _| of != index);
            }
            return Err(error);
        }
        self.unknown.set(false);
        irqs.allocated.insert(index, last.max(allocated));
        for (vector, fd) in (first..).zip(vectors).filter_map(|(vector, fd)| Some((vector, fd?))) {
            if again && vector < start {
                // A full counter is readable as well.
                let _ = rustix::io::write(&fd, &1u64.to_ne_bytes());
            }
            irqs.bound.insert((index, vector), fd);
        }
        Ok(())
    }

    /// Releases a vector: before the next request, or with the device. Until then it signals an eventfd that nobody has.
    pub(crate) fn unset_irq(&self, index: u32, vector: u32) {
        self.released.borrow_mut().push((index, vector));
    }

    async fn apply_released(&self, irqs: &mut Irqs) {
        loop {
            let Some((index, vector)) = self.released.borrow_mut().pop() else { return };
            if irqs.bound.remove(&(index, vector)).is_none() {
                continue;
            }
            let more = irqs.bound.range((index, 0)..(index + 1, 0)).next().is_some();
            let released = self.request(move |device| match more {
                true => device.set_irqs_eventfds(index, vector, &[None]),
                false => device.disable_irqs(index),
            });
            if let Err(error) = released.await {
                tracing::warn!(index, vector, %error, "an interrupt vector could not be released");
            } else if !more {
                irqs.allocated.remove(&index);
            }
        }
    }

    /// Runs a request for interrupts on a thread of its own. Dropped midway, nobody knows what the kernel has.
    async fn request(&self, request: impl FnOnce(&DeviceFd) -> Result<()> + Send + 'static) -> Result<()> {
        let device = self.device.clone();
        let before = self.unknown.replace(true);
        let result = unblock(move || request(&device)).await;
        self.unknown.set(before);
        result
    }
}

/// A register that is only written, and whose newest value alone matters, where it can't be mapped.
pub(crate) struct PostedRegister {
    attached: Rc<Attached>,
    at: Place,
    size: usize,
    next: Cell<Option<u64>>,
    writing: Cell<bool>,
    error: Cell<Option<Error>>,
    gate: Arc<Gate>,
}

impl PostedRegister {
    pub(crate) fn new(attached: Rc<Attached>, at: Place, size: usize, gate: &Arc<Gate>) -> Rc<Self> {
        let (next, writing, error) = Default::default();
        Rc::new(Self { attached, at, size, next, writing, error, gate: gate.clone() })
    }

    /// Has the value written soon: while a write is under way, only the newest of the values that come meanwhile follows it.
    pub(crate) fn post(self: &Rc<Self>, value: u64) {
        if let Err(error) = self.gate.enter(Access::Memory) {
            return self.error.set(Some(error));
        }
        self.next.set(Some(value));
        if self.writing.replace(true) {
            return;
        }
        let this = self.clone();
        reactor::spawn(async move {
            while let Some(value) = this.next.take() {
                // A value from before a reset is nothing to the device that comes out of it.
                let written = match this.gate.enter(Access::Memory) {
                    Ok(_inside) => this.attached.write(this.at, &value.to_le_bytes()[..this.size]).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = written {
                    this.error.set(Some(error));
                }
            }
            this.writing.set(false);
        });
    }

    /// The error of the last write that failed, once.
    pub(crate) fn take_error(&self) -> Option<Error> {
        self.error.take()
    }
}

/// An index that is not enabled can't be disabled, and need not be.
fn not_enabled(error: &Error, or: Error) -> Result<()> {
    match error {
        Error::Io { source, .. } if source.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
        _ => Err(or),
    }
}

/// A read or write that a signal has cut short goes on.
fn retry(doing: &str, len: usize, offset: u64, done: usize, error: &std::io::Error) -> Result<()> {
    match Errno::from_io_error(error) {
        Some(Errno::INTR) => Ok(()),
        Some(errno) => Err(access_failed(doing, len, offset, done, errno)),
        None => Err(Error::io(
            format!("{doing} {len} bytes at {offset:#x} of the device"),
            std::io::Error::other(error.to_string()),
        )),
    }
}
