//! Interrupts of a device: eventfds bound to its vectors.
//!
//! Source: `drivers/vfio/pci/vfio_pci_intrs.c`. All of this may wait for a reset of the device, and makes accesses to its BARs
//! wait meanwhile: it has no place on a data path.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_SET_ACTION_MASK as MASK, VFIO_IRQ_SET_ACTION_TRIGGER as TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK as UNMASK,
    VFIO_IRQ_SET_DATA_EVENTFD as EVENTFD, VFIO_IRQ_SET_DATA_NONE as NONE,
};
use zerocopy::IntoBytes;

use super::{
    DeviceFd, abi,
    device::{Meanings, failed},
    ioctl,
};
use crate::{Error, Result, transport::user::wire::SetIrqs};

/// Vectors that are set at most with one request: MSI-X has 2048.
const MAX_VECTORS: usize = 2048;

const SET: [(Errno, &str); 7] = [
    (Errno::INVAL, "the device has no such vectors, or another kind of interrupt is in use; disable that first"),
    (Errno::NOTTY, "this kind of interrupt does not take this action"),
    (Errno::NODEV, "the device's interrupt line is not connected"),
    (Errno::BUSY, "the interrupt line is shared with another driver, or an eventfd is bound already"),
    (Errno::BADF, "one of the eventfds is not open"),
    (Errno::NOSPC, "the platform is out of interrupt vectors; use fewer"),
    (Errno::NOMEM, "the kernel is out of memory or interrupt vectors; use fewer"),
];

const DISABLE: [(Errno, &str); 1] = [(Errno::INVAL, "the device has no such interrupts, or they are not enabled")];

const LOOPBACK: [(Errno, &str); 2] = [
    (Errno::INVAL, "the device has no such vectors, or they are not enabled"),
    (Errno::NOTTY, "this kind of interrupt does not take this action; only INTx can be masked"),
];

impl DeviceFd {
    /// Binds `fds[i]`, an eventfd, to vector `start + i` of `index`: each interrupt adds 1 to its counter. `None` leaves a hole,
    /// or releases what was bound there. The first such request enables the index; until [`DeviceFd::disable_irqs`] it stays so,
    /// and INTx, MSI and MSI-X exclude each other.
    ///
    /// Where the index is [resizable](crate::transport::user::protocol::IrqInfo::is_resizable) later requests may go beyond the
    /// first; else disable, and bind all of them.
    ///
    /// # Errors
    /// [`Error::Vectors`] with the number that can be had, when the platform has fewer: nothing is enabled then.
    /// [`Error::Invalid`] for no descriptor or too many, else [`Error::Io`]; of an index that is enabled, the vectors given may
    /// be unbound after a failure.
    pub fn set_irqs_eventfds(&self, index: u32, start: u32, fds: &[Option<BorrowedFd<'_>>]) -> Result<()> {
        if fds.is_empty() || fds.len() > MAX_VECTORS {
            return Err(Error::invalid(format!(
                "{} eventfds for interrupt index {index}: from 1 to {MAX_VECTORS} can be bound at once",
                fds.len()
            )));
        }
        let count = fds.len() as u32;
        let what = || format!("binding {count} eventfds from vector {start} of interrupt index {index}");
        let answer = self.set_irqs(&irq_set(EVENTFD | TRIGGER, index, start, count, fds));
        bound(answer.map_err(|errno| failed(what(), errno, &SET))?, start, count)
    }

    /// Disables `index`: its eventfds are unbound and its vectors freed.
    ///
    /// # Errors
    /// [`Error::Io`]; EINVAL when it is not enabled.
    pub fn disable_irqs(&self, index: u32) -> Result<()> {
        // A count of 0 disables; any other would fire the vectors.
        self.act(format!("disabling interrupt index {index}"), &irq_set(NONE | TRIGGER, index, 0, 0, &[]), &DISABLE)
    }

    /// Signals the eventfds of `count` vectors, as the device would: for tests.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no vector, else [`Error::Io`].
    pub fn trigger(&self, index: u32, start: u32, count: u32) -> Result<()> {
        self.loopback("triggering", TRIGGER, index, start, count)
    }

    /// Masks an INTx interrupt.
    ///
    /// # Errors
    /// As for [`DeviceFd::trigger`].
    pub fn mask(&self, index: u32, start: u32, count: u32) -> Result<()> {
        self.loopback("masking", MASK, index, start, count)
    }

    /// Unmasks an INTx interrupt, which masks itself when it fires. Still asserted, it fires again at once.
    ///
    /// # Errors
    /// As for [`DeviceFd::trigger`].
    pub fn unmask(&self, index: u32, start: u32, count: u32) -> Result<()> {
        self.loopback("unmasking", UNMASK, index, start, count)
    }

    /// Binds an eventfd that unmasks INTx when it is written; `None` unbinds. The kernel takes its counter: never read it.
    ///
    /// # Errors
    /// [`Error::Io`]: EBUSY when one is bound.
    pub fn unmask_eventfd(&self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        let what = format!("binding an eventfd to the unmasking of interrupt index {index}");
        self.act(what, &irq_set(EVENTFD | UNMASK, index, 0, 1, &[fd]), &SET)
    }

    fn loopback(&self, doing: &str, action: u32, index: u32, start: u32, count: u32) -> Result<()> {
        let what = format!("{doing} {count} vectors from {start} of interrupt index {index}");
        if count == 0 {
            return Err(Error::invalid(format!("{what}: there must be at least one")));
        }
        self.act(what, &irq_set(NONE | action, index, start, count, &[]), &LOOPBACK)
    }

    fn act(&self, what: String, request: &[u8], meanings: &Meanings) -> Result<()> {
        match self.set_irqs(request) {
            Ok(0) => Ok(()),
            Ok(answer) => Err(Error::fault(format!("{what}: the kernel answered {answer}"))),
            Err(errno) => Err(failed(what, errno, meanings)),
        }
    }

    fn set_irqs(&self, request: &[u8]) -> Result<u32, Errno> {
        let mut request = request.to_vec();
        // SAFETY: SET_IRQS reads a `vfio_irq_set` of `argsz` bytes, which is the buffer's size; it writes nothing.
        unsafe { ioctl::with_struct(self, abi::device::SET_IRQS, request.as_mut_slice()) }.map(i32::unsigned_abs)
    }
}

/// What became of vectors that were bound: the kernel answers with as many as it could have, where it has fewer.
fn bound(answer: u32, start: u32, count: u32) -> Result<()> {
    match answer {
        0 => Ok(()),
        available => Err(Error::Vectors { asked: start.saturating_add(count), available }),
    }
}

/// A `vfio_irq_set`, with a descriptor for each vector or without data.
fn irq_set(flags: u32, index: u32, start: u32, count: u32, fds: &[Option<BorrowedFd<'_>>]) -> Vec<u8> {
    let size = size_of::<SetIrqs>() + size_of::<i32>() * fds.len();
    let head = SetIrqs {
        argsz: (size as u32).into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    let mut request = head.as_bytes().to_vec();
    request.extend(fds.iter().flat_map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()).to_ne_bytes()));
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_carry_whole_descriptors() {
        // SAFETY: the number is only copied into the request.
        let fd = unsafe { BorrowedFd::borrow_raw(0x1234_5678) };
        let request = irq_set(EVENTFD | TRIGGER, 2, 5, 3, &[Some(fd), None, Some(fd)]);
        let words: Vec<u32> = request.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [32, 0x24, 2, 5, 3, 0x1234_5678, u32::MAX, 0x1234_5678]);
        assert_eq!(irq_set(NONE | TRIGGER, 1, 0, 0, &[]).len(), 20);
    }

    #[test]
    fn fewer_vectors_are_a_failure() {
        assert!(bound(0, 4, 4).is_ok());
        assert_eq!(
            bound(5, 4, 4).unwrap_err().to_string(),
            "8 interrupt vectors were asked for, 5 are there; ask for fewer"
        );
    }

    #[test]
    fn what_is_no_device_is_refused() {
        let device = DeviceFd::new(std::fs::File::open("/dev/null").unwrap().into());
        let error = device.disable_irqs(2).unwrap_err().to_string();
        assert!(error.contains("interrupt index 2"), "{error}");
        assert!(matches!(device.trigger(0, 0, 0), Err(Error::Invalid { .. })));
        assert!(matches!(device.set_irqs_eventfds(2, 0, &[]), Err(Error::Invalid { .. })));
        assert!(matches!(device.set_irqs_eventfds(2, 0, &[None; 2049]), Err(Error::Invalid { .. })));
    }
}
