//! Resets of a device.

use std::{
    fmt,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{VFIO_PCI_DEVID_NOT_OWNED, VFIO_PCI_DEVID_OWNED, VFIO_PCI_HOT_RESET_FLAG_DEV_ID};
use zerocopy::{FromBytes, IntoBytes};

use super::{
    DeviceFd,
    abi::{self, Dependent, HotReset},
    device::failed,
    ioctl,
};
use crate::{Error, Result};

/// Room for so many devices at first.
const FIRST: usize = 32;
/// Devices that share one reset, at most: 256 functions on each of 16 buses.
const MAX_DEPENDENT: usize = 4096;
const ATTEMPTS: usize = 4;

const RESET: [(Errno, &str); 3] = [
    (Errno::INVAL, "the device can't be reset alone; try a hot reset"),
    (Errno::NOTTY, "the device can't be reset alone; try a hot reset"),
    (Errno::AGAIN, "somebody else holds the device's lock; try again"),
];

const HOT_RESET_INFO: [(Errno, &str); 1] = [(Errno::NODEV, "neither the slot nor the bus of the device can be reset")];

const HOT_RESET: [(Errno, &str); 6] = [
    (Errno::INVAL, "each device that the reset affects must be open here: by the groups given, or by the same iommufd"),
    (Errno::BADF, "one of the groups is not open"),
    (Errno::BUSY, "one of the devices is being accessed; try again"),
    (Errno::AGAIN, "somebody else holds the lock of one of the devices; try again"),
    (Errno::NOTTY, "the bus did not come back, or can't be reset"),
    (Errno::NODEV, "neither the slot nor the bus of the device can be reset"),
];

/// A device that a hot reset affects; the one that is asked is among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DependentDevice {
    /// PCI segment (domain).
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
    /// By what it is owned.
    pub id: DependentId,
}

/// By what a device that a hot reset affects is owned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DependentId {
    /// Its IOMMU group, whose descriptor the reset wants: the device that was asked is open by its group.
    Group(u32),
    /// It is bound to the same iommufd, with this id.
    Device(u32),
    /// It is not open, but ours: of an IOMMU group that the same iommufd has.
    Owned,
    /// It is not ours: the reset will be refused.
    NotOwned,
}

impl fmt::Display for DependentDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device, self.function)
    }
}

impl DeviceFd {
    /// Resets the function: 100 ms or more. Its configuration space, also the interrupts, is as before afterwards; accesses to
    /// its BARs wait meanwhile.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the device can't be reset alone, else [`Error::Io`].
    pub fn reset(&self) -> Result<()> {
        // SAFETY: RESET takes no argument.
        let result = unsafe { ioctl::with_number(self, abi::device::RESET, 0) };
        let error = |errno| failed("resetting the device", errno, &RESET);
        result.map(drop).map_err(|errno| match errno {
            Errno::INVAL | Errno::NOTTY => Error::Unsupported { what: error(errno).to_string() },
            errno => error(errno),
        })
    }

    /// Which devices a reset of the whole slot or bus affects.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when there is no such reset, [`Error::DeviceFault`] for an answer without end, else [`Error::Io`].
    pub fn hot_reset_info(&self) -> Result<Vec<DependentDevice>> {
        let mut room = FIRST;
        for _ in 0..ATTEMPTS {
            let mut answer = vec![0; size_of::<HotReset>() + room * size_of::<Dependent>()];
            let argsz = answer.len() as u32;
            answer[..4].copy_from_slice(&argsz.to_ne_bytes());
            // SAFETY: GET_PCI_HOT_RESET_INFO takes a `vfio_pci_hot_reset_info` of `argsz` bytes, which is the buffer's size, and
            // writes at most that.
            let result = unsafe { ioctl::with_struct(self, abi::device::GET_PCI_HOT_RESET_INFO, answer.as_mut_slice()) };
            match result {
                Ok(_) => return parse_dependent(&answer),
                Err(Errno::NOSPC) => room = needed(&answer)?.max(2 * room),
                Err(errno) => {
                    let error = failed("asking what a hot reset affects", errno, &HOT_RESET_INFO);
                    let none = matches!(errno, Errno::NODEV);
                    return Err(if none { Error::Unsupported { what: error.to_string() } } else { error });
                }
            }
        }
        Err(Error::fault("the devices that a hot reset affects grew each time they were asked for"))
    }

    /// Resets the whole slot or bus, and with it all devices of [`DeviceFd::hot_reset_info`]: `groups` has the group descriptor
    /// of each. For a device that was opened as a cdev it is empty.
    ///
    /// # Errors
    /// [`Error::Io`]; EBUSY and EAGAIN: try again.
    pub fn hot_reset(&self, groups: &[BorrowedFd<'_>]) -> Result<()> {
        if groups.len() > MAX_DEPENDENT {
            return Err(Error::invalid(format!("a hot reset of {} groups: {MAX_DEPENDENT} are the most", groups.len())));
        }
        let size = size_of::<HotReset>() + size_of::<i32>() * groups.len();
        let head = HotReset { argsz: (size as u32).into(), flags: 0.into(), count: (groups.len() as u32).into() };
        let mut request = head.as_bytes().to_vec();
        request.extend(groups.iter().flat_map(|group| group.as_raw_fd().to_ne_bytes()));
        // SAFETY: PCI_HOT_RESET reads a `vfio_pci_hot_reset` with `count` descriptors, which the buffer has; it writes nothing.
        let result = unsafe { ioctl::with_struct(self, abi::device::PCI_HOT_RESET, request.as_mut_slice()) };
        result.map(drop).map_err(|errno| failed("a hot reset of the device", errno, &HOT_RESET))
    }
}

/// How many devices the kernel has, from an answer that had no room for them.
fn needed(answer: &[u8]) -> Result<usize> {
    let (head, _) = HotReset::read_from_prefix(answer).map_err(|_| short())?;
    let count = head.count.get() as usize;
    if count > MAX_DEPENDENT {
        return Err(Error::fault(format!("a hot reset affects {count} devices; at most {MAX_DEPENDENT} make sense")));
    }
    Ok(count)
}

/// Reads the answer to GET_PCI_HOT_RESET_INFO.
fn parse_dependent(answer: &[u8]) -> Result<Vec<DependentDevice>> {
    let (head, rest) = HotReset::read_from_prefix(answer).map_err(|_| short())?;
    let count = head.count.get();
    let (devices, _) = <[Dependent]>::ref_from_prefix_with_elems(rest, count as usize).map_err(|_| {
        Error::fault(format!("{count} devices of a hot reset do not fit in their answer of {} bytes", answer.len()))
    })?;
    let by_device = head.flags.get() & VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
    let id = |id: u32| match id {
        group if !by_device => DependentId::Group(group),
        VFIO_PCI_DEVID_OWNED => DependentId::Owned,
        id if id == VFIO_PCI_DEVID_NOT_OWNED as u32 => DependentId::NotOwned,
        id => DependentId::Device(id),
    };
    let device = |device: &Dependent| DependentDevice {
        segment: device.segment.get(),
        bus: device.bus,
        device: device.devfn >> 3,
        function: device.devfn & 7,
        id: id(device.id.get()),
    };
    Ok(devices.iter().map(device).collect())
}

fn short() -> Error {
    Error::fault("the answer about a hot reset is too short")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(flags: u32, devices: &[(u32, u8)]) -> Vec<u8> {
        let head = HotReset { argsz: 0.into(), flags: flags.into(), count: (devices.len() as u32).into() };
        let mut answer = head.as_bytes().to_vec();
        for &(id, devfn) in devices {
            answer.extend(Dependent { id: id.into(), segment: 1.into(), bus: 0x3a, devfn }.as_bytes());
        }
        answer
    }

    #[test]
    fn ids_are_groups_or_devices() {
        let ids = |flags| -> Vec<_> {
            let devices = parse_dependent(&answer(flags, &[(7, 0), (0, 0x0b), (u32::MAX, 0xff)])).unwrap();
            devices.into_iter().map(|device| (device.to_string(), device.id)).collect()
        };
        let at = |text: &str, id| (text.to_owned(), id);
        assert_eq!(ids(0)[..2], [at("0001:3a:00.0", DependentId::Group(7)), at("0001:3a:01.3", DependentId::Group(0))]);
        let by_device = [
            at("0001:3a:00.0", DependentId::Device(7)),
            at("0001:3a:01.3", DependentId::Owned),
            at("0001:3a:1f.7", DependentId::NotOwned),
        ];
        assert_eq!(ids(1), by_device);
    }

    #[test]
    fn counts_are_not_believed() {
        let mut answer = answer(0, &[(7, 0)]);
        answer[8] = 2;
        assert!(parse_dependent(&answer).is_err());
        assert_eq!(needed(&answer).unwrap(), 2);
        answer[8..12].fill(0xff);
        assert!(needed(&answer).is_err() && parse_dependent(&answer).is_err());
        assert!(parse_dependent(&[0; 11]).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(answer in prop::collection::vec(any::<u8>(), 0..64)) {
            let _ = needed(&answer);
            if let Ok(devices) = parse_dependent(&answer) {
                prop_assert!(devices.len() * 8 + 12 <= answer.len());
            }
        }
    }
}
