//! Resets of a whole slot or bus, with all devices there.

use std::{
    os::fd::AsFd,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blocking::unblock;
use rustix::io::Errno;

use super::{
    Device,
    gate::{Closed, Gate, why},
    reset::{elsewhere, was_reset},
};
use crate::{
    Error, Result,
    pci::Bdf,
    transport::{
        Transport,
        group::GroupFd,
        vfio::{Attached, DependentDevice, DependentId, DeviceFd},
    },
};

/// How long the kernel may find one of the devices busy. Ours are not: somebody else's access, or a lock of the bus.
const BUSY: Duration = Duration::from_secs(10);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

impl Device {
    /// The devices that a reset of the whole slot or bus affects, this one among them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when there is no such reset, else [`Error::Io`].
    pub async fn hot_reset_info(&self) -> Result<Vec<DependentDevice>> {
        let device = self.attached()?.device().clone();
        unblock(move || device.hot_reset_info()).await
    }

    /// Resets the whole slot or bus, and with it all devices of [`Device::hot_reset_info`], for devices that can't be reset alone or
    /// do not recover so. All of them that this process has open, on whatever thread, are [resetting](super::State::Resetting)
    /// together, and the [generation](Device::generation) of each is one higher afterwards.
    ///
    /// The kernel wants to see that each device is this process's own. Opened by a group: the group of each is in a container of this
    /// process. By a cdev: they share an iommufd, which devices do that are opened in one
    /// [address space](super::Options::space).
    ///
    /// # Errors
    /// Nothing was reset then: [`Error::NotReady`] names the devices that are not ours, [`Error::Unsupported`] when there is no such
    /// reset, [`Error::Io`] when the kernel refuses, as when one of the devices is busy for 10 s. [`Error::Reset`]: they were reset,
    /// and those that it names could not be mapped again.
    pub async fn hot_reset(&self) -> Result<()> {
        let affected = self.hot_reset_info().await?;
        let (gates, groups) = ours(self.address().to_string(), &affected)?;
        let closed = Closed::close(&self.inner.gate, gates, why::RESETTING).await?;
        let reset = move |device: &DeviceFd| was_reset(insist(device, &groups));
        elsewhere(self.attached()?, closed, reset).await
    }

    fn attached(&self) -> Result<&Attached> {
        match &self.inner.transport {
            Transport::Group(attached) | Transport::Cdev(attached) => Ok(attached),
            Transport::User(_) => {
                Err(Error::Unsupported { what: "a hot reset: only devices of the kernel have a bus".into() })
            }
        }
    }
}

/// The gates of all of these devices, and the groups that prove that they are ours.
fn ours(name: String, affected: &[DependentDevice]) -> Result<(Vec<Arc<Gate>>, Vec<GroupFd>)> {
    let (mut gates, mut groups) = (Vec::new(), Vec::<GroupFd>::new());
    let mut foreign = Vec::new();
    for device in affected {
        let bdf = Bdf::new(device.segment.into(), device.bus, device.device, device.function);
        let open = bdf.map(Gate::at).unwrap_or_default();
        let is_open = !open.is_empty();
        gates.extend(open);
        match device.id {
            DependentId::Group(number) => match Gate::of_group(number) {
                Some(group) if groups.iter().any(|known| known.number() == number) => drop(group),
                Some(group) => groups.push(group),
                None if is_open => foreign.push(format!("{device} (open here, but not by its group {number})")),
                None => foreign.push(format!("{device} (of group {number}, which is not open here)")),
            },
            DependentId::Device(_) | DependentId::Owned => {}
            DependentId::NotOwned if is_open => foreign.push(format!("{device} (open here, but not with the same iommufd)")),
            DependentId::NotOwned => foreign.push(format!("{device} (not open here)")),
        }
    }
    if foreign.is_empty() {
        return Ok((gates, groups));
    }
    Err(Error::NotReady {
        what: format!(
            "a hot reset of {name} would also reset {}: bind them to vfio-pci and open them here as well, all in one address space",
            foreign.join(", ")
        ),
    })
}

/// Tries until nobody is in the way.
fn insist(device: &DeviceFd, groups: &[GroupFd]) -> Result<()> {
    let start = Instant::now();
    let groups: Vec<_> = groups.iter().map(AsFd::as_fd).collect();
    loop {
        let result = device.hot_reset(&groups);
        let Err(Error::Io { source, .. }) = &result else { return result };
        let busy = matches!(Errno::from_io_error(source), Some(Errno::BUSY | Errno::AGAIN));
        if !busy || start.elapsed() > BUSY {
            return result;
        }
        thread::sleep(PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_devices_are_named() {
        let at = |function, id| DependentDevice { segment: 0, bus: 0xfe, device: 0, function, id };
        let affected = [
            at(0, DependentId::Device(1)),
            at(1, DependentId::Owned),
            at(2, DependentId::NotOwned),
            at(3, DependentId::Group(u32::MAX)),
        ];
        assert!(ours("x".into(), &affected[..2]).is_ok_and(|(gates, groups)| gates.is_empty() && groups.is_empty()));
        let gate = Gate::of_kernel("0000:fe:00.2".parse().unwrap(), None);
        let error = ours("0000:fe:00.0".into(), &affected).unwrap_err().to_string();
        assert!(
            error.contains("0000:fe:00.2 (open here, but not with the same iommufd), 0000:fe:00.3 (of group 4294967295")
        );
        assert!(!error.contains("00.1"), "{error}");
        let gates = ours("x".into(), &affected[..1]).unwrap().0;
        assert!(gates.is_empty());
        drop(gate);
        assert!(Gate::at("0000:fe:00.2".parse().unwrap()).is_empty());
    }
}
