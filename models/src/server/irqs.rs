//! The client's eventfds.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    time::Timespec,
};
use vfio_uring::transport::user::wire::SetIrqs;

use crate::device::Device;

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 2;
const DATA_EVENTFD: u32 = 4;
const ACTION_MASK: u32 = 8;
const ACTION_UNMASK: u32 = 0x10;
const ACTION_TRIGGER: u32 = 0x20;

/// Eventfds by interrupt index and vector.
#[derive(Debug, Default)]
pub(super) struct Irqs {
    bound: Vec<Vec<Option<OwnedFd>>>,
}

impl Irqs {
    /// Signals what is bound.
    #[inline]
    pub fn signal(&self, index: u32, vector: u32) {
        if let Some(Some(fd)) = self.bound.get(index as usize).and_then(|bound| bound.get(vector as usize)) {
            notify(fd);
        }
    }

    /// SET_IRQS; `data` is what follows the structure.
    pub fn set(&mut self, set: &SetIrqs, data: &[u8], fds: Vec<OwnedFd>, device: &impl Device) -> Result<(), Errno> {
        let (index, start, count) = (set.index.get(), set.start.get(), set.count.get());
        let (kind, action) = (set.flags.get() & 7, set.flags.get() & !7);
        if index >= device.irqs() || !matches!(kind, DATA_NONE | DATA_BOOL | DATA_EVENTFD) {
            return Err(Errno::INVAL);
        }
        let vectors = device.irq_vectors(index);
        if start.checked_add(count).is_none_or(|end| end > vectors) {
            return Err(Errno::INVAL);
        }
        if kind != DATA_EVENTFD && !fds.is_empty() {
            return Err(Errno::INVAL);
        }
        match action {
            ACTION_TRIGGER => {}
            ACTION_MASK | ACTION_UNMASK => return Err(Errno::NOTSUP),
            _ => return Err(Errno::INVAL),
        }
        if self.bound.len() <= index as usize {
            self.bound.resize_with(index as usize + 1, Vec::new);
        }
        let Some(bound) = self.bound.get_mut(index as usize) else { return Err(Errno::INVAL) };
        match kind {
            DATA_NONE if count == 0 => bound.clear(),
            _ if count == 0 => return Err(Errno::INVAL),
            DATA_NONE => (start..start + count).for_each(|vector| self.signal(index, vector)),
            DATA_BOOL => {
                let chosen = data.get(..count as usize).ok_or(Errno::INVAL)?;
                for (vector, _) in (start..).zip(chosen).filter(|(_, chosen)| **chosen != 0) {
                    self.signal(index, vector);
                }
            }
            _ => {
                if !fds.is_empty() && fds.len() != count as usize {
                    return Err(Errno::INVAL);
                }
                if !fds.iter().all(is_eventfd) {
                    return Err(Errno::INVAL);
                }
                // A counter that the client fills up must not stop the server.
                for fd in &fds {
                    fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
                }
                bound.resize_with(vectors as usize, || None);
                let mut fds = fds.into_iter();
                for slot in &mut bound[start as usize..(start + count) as usize] {
                    *slot = fds.next();
                }
            }
        }
        Ok(())
    }
}

/// Whether a descriptor is an eventfd; taken on trust where /proc is not mounted.
fn is_eventfd(fd: &OwnedFd) -> bool {
    match std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
        Ok(target) => target.as_os_str() == "anon_inode:[eventfd]",
        Err(_) => true,
    }
}

/// Adds 1, unless the counter is full: then the client has an event to see anyway. The client may have made a write block again,
/// so it is asked first.
fn notify(fd: &OwnedFd) {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(fd, PollFlags::OUT)];
    if matches!(poll(&mut polled, Some(&now)), Ok(1)) && polled[0].revents().contains(PollFlags::OUT) {
        let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
    }
}
