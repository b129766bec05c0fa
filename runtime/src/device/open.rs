//! Opening a device by each of its ways.

use std::{
    path::Path,
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use blocking::unblock;

use super::{Address, DeviceInfo, FLAG_PCI, FLAG_RESET, IrqInfo, Options, events::Signals, gate::Gate, region::RegionState};
use crate::{
    Error, Result,
    dma::{AddressSpace, Backend, IovaRange, Peers, overlaps, peers::Membership, vacate::Presence},
    pci::{Bdf, sysfs::Pci},
    reactor,
    transport::{
        Transport,
        cdev::{Bound, Unbound},
        group::Container,
        iommufd::{Ioas, IommufdFd},
        user::{
            client::Connection,
            protocol::{MAX_IRQS, MAX_REGIONS},
        },
        vfio::{Attached, DeviceFd, RegionInfo, VfToken},
    },
};

/// How long a device that was dropped may take to close: what it was asked last may still run, on a thread of its own.
const CLOSING: Duration = Duration::from_millis(200);

/// What a device is made of. In the order of closing: mappings of BARs, the device, its place in the address space, the space.
pub(super) struct Opened {
    pub(super) regions: Vec<RegionState>,
    pub(super) gate: Arc<Gate>,
    pub(super) transport: Transport,
    pub(super) seat: Seat,
    pub(super) dma: AddressSpace,
    pub(super) info: DeviceInfo,
    pub(super) irqs: Vec<IrqInfo>,
    /// Of a device of the kernel.
    pub(super) signals: Option<Signals>,
}

/// The ways of the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    /// By its character device, if it has one.
    Best,
    Group,
    Cdev,
}

/// Opens the device behind a vfio-user server.
pub(super) async fn user(path: &Path, options: &Options) -> Result<Opened> {
    let connection = Connection::connect(path, options.deadline, options.max_outstanding).await?;
    let info = connection.device_info().await?;
    let mut regions = Vec::new();
    for index in 0..info.regions {
        // A region that a device does not have is an error for some servers (VGA), and one of no size for others.
        let (info, fd) = known(connection.region_info(index).await)?;
        regions.push(RegionState::new(info, fd));
    }
    let mut irqs = Vec::new();
    for index in 0..info.irqs {
        irqs.push(known(connection.irq_info(index).await)?);
    }
    let name = || Address::User(path.into()).to_string();
    let (dma, member) = match &options.space {
        Some(space) => (space.clone(), space.join(&name(), &connection).await?),
        None => {
            let limits = connection.limits();
            let backend = Backend::User(Rc::new(Peers::new(connection.clone())));
            let dma = AddressSpace::new(backend, &options.iova_ranges, limits.page_size, limits.max_dma_maps);
            if let Some(usable) = &limits.iova_ranges {
                // Nothing is mapped yet that could lie outside.
                let _ = dma.install(usable);
            }
            connection.serve(&dma);
            reactor::spawn(dma.reclaimer());
            (dma.clone(), Membership::first(&dma))
        }
    };
    let seat = Seat::User(member);
    let gate = Gate::of_user(&name());
    connection.shut_with_it(&gate);
    Ok(Opened { regions, gate, transport: Transport::User(connection), seat, dma, info: info.into(), irqs, signals: None })
}

/// What a server refuses to describe, the device does not have.
fn known<T: Default>(result: Result<T>) -> Result<T> {
    match result {
        Err(Error::Refused { .. }) => Ok(T::default()),
        result => result,
    }
}

/// Opens a device of the kernel, in the address space of the options or one of its own.
pub(super) async fn kernel(bdf: Bdf, way: Way, options: &Options) -> Result<Opened> {
    let host = match &options.space {
        None => None,
        Some(space) => Some(match space.backend() {
            Backend::Container(container) => Host::Container(container.clone()),
            Backend::Ioas(ioas) => Host::Ioas(ioas.clone()),
            _ => return Err(Error::invalid("an address space of the kernel can't be shared with vfio-user devices")),
        }),
    };
    // Two that join a space at once would install each other's ranges.
    let _turn = match &options.space {
        Some(space) => Some(space.attaching().await),
        None => None,
    };
    options.space.as_ref().map_or(Ok(()), AddressSpace::check_alive)?;
    let (token, no_iommu) = (options.vf_token, options.no_iommu);
    let start = Instant::now();
    let seated = loop {
        let host = host.clone();
        match unblock(move || seat(bdf, way, host, token.as_ref(), no_iommu)).await {
            Err(Refusal::Other(Error::InUse { .. })) if start.elapsed() < CLOSING => reactor::sleep(CLOSING / 10).await,
            seated => break seated,
        }
    };
    let Seated { device, place, usable, granule, max_mappings, info, regions, irqs, signals } =
        match (seated, &options.space) {
            (Err(Refusal::Reserves(reserved, error)), Some(space)) => {
                let clash = overlaps(space.taken().into_iter(), &reserved);
                return Err(match (error, clash) {
                    (Error::Conflict { device, .. }, Some((mapping, reserved))) => {
                        Error::Conflict { device, mapping: Some(mapping), reserved: Some(reserved) }
                    }
                    (error, _) => error,
                });
            }
            (Err(Refusal::Reserves(_, error) | Refusal::Other(error)), _) => return Err(error),
            (Ok(seated), _) => seated,
        };
    let dma = match &options.space {
        Some(space) => space.clone(),
        None => {
            let space = AddressSpace::new(place.backend(), &options.iova_ranges, granule, max_mappings);
            reactor::spawn(space.reclaimer());
            space
        }
    };
    let regions = regions
        .into_iter()
        .map(|info| match info {
            Some(info) => RegionState::of_device(info, &device),
            None => RegionState::new(RegionInfo::default(), None),
        })
        .collect();
    let by_group = matches!(place, Place::Group(..));
    let group = match &place {
        Place::Group(container, number) => {
            container.groups().into_iter().find_map(|(of, group)| (of == *number).then_some(group))
        }
        Place::Cdev(..) => None,
    };
    let gate = Gate::of_kernel(bdf, group);
    let attached = Rc::new(Attached::new(device, irqs.clone(), gate.clone()));
    let transport = if by_group { Transport::Group(attached) } else { Transport::Cdev(attached) };
    let opened = Opened {
        regions,
        gate,
        transport,
        seat: Seat::Kernel(KernelSeat { place: Some(place), presence: Presence::new(&dma) }),
        dma,
        info: info.into(),
        irqs,
        signals: Some(signals),
    };
    // After the device is put together: dropped here, it leaves the space as it was.
    opened.dma.install(&usable).map_err(|(mapping, reserved)| Error::Conflict {
        device: bdf.to_string(),
        mapping: Some(mapping),
        reserved: Some(reserved),
    })?;
    Ok(opened)
}

/// An address space that a device joins.
#[derive(Clone)]
enum Host {
    Container(Container),
    Ioas(Ioas),
}

/// A device's place in an address space of the kernel.
enum Place {
    Group(Container, u32),
    Cdev(Arc<Bound>, Ioas),
}

impl Place {
    fn backend(&self) -> Backend {
        match self {
            Self::Group(container, _) => Backend::Container(container.clone()),
            Self::Cdev(_, ioas) => Backend::Ioas(ioas.clone()),
        }
    }

    /// Gives the place up, after its device is closed. What can be mapped then, if others stay.
    fn leave(self) -> Option<Vec<IovaRange>> {
        match self {
            // The last group would take all mappings with it; one whose other devices are open does not go.
            Self::Group(container, group) if container.groups().len() > 1 => {
                let _ = container.remove_group(group);
                container.info().ok()?.ranges
            }
            Self::Group(..) => None,
            Self::Cdev(bound, ioas) => {
                drop(bound);
                Some(ioas.iova_ranges().ok()?.ranges)
            }
        }
    }

    /// Gives the place up, after its device is closed, in a space that others still hold handles of.
    fn vacate(self) -> Left {
        match self {
            Self::Group(container, group) => {
                let until = Instant::now() + CLOSING;
                loop {
                    match container.remove_group(group) {
                        Ok(true) => return Left::Nothing,
                        Ok(false) => return Left::Others(container.info().ok().and_then(|info| info.ranges)),
                        // An operation of the ring may still have the device; or another device of the group is open.
                        Err(Error::InUse { .. }) if Instant::now() < until => thread::sleep(CLOSING / 20),
                        Err(error) => {
                            tracing::debug!(group, %error, "the group stays in its container");
                            return Left::Others(None);
                        }
                    }
                }
            }
            cdev => Left::Others(cdev.leave()),
        }
    }

    /// What can be mapped at present, the smallest page, and mappings at most.
    fn limits(&self) -> Result<Limits> {
        match self {
            Self::Group(container, _) => {
                let info = container.info()?;
                let most = container.max_mappings().map_or(usize::MAX, |most| most as usize);
                let all = || vec![IovaRange { start: 0, last: u64::MAX }];
                Ok((info.ranges.clone().unwrap_or_else(all), info.granule(), most))
            }
            Self::Cdev(_, ioas) => {
                let ranges = ioas.iova_ranges()?;
                let page = rustix::param::page_size() as u64;
                Ok((ranges.ranges, ranges.alignment.max(page), usize::MAX))
            }
        }
    }
}

/// Gives a place up after its device is closed, and lets those that stay have what it kept from them.
pub(super) enum Seat {
    Kernel(KernelSeat),
    User(#[expect(dead_code, reason = "it is there to be dropped")] Membership),
}

impl Seat {
    /// The device and its address space, where it is opened by its cdev.
    pub(super) fn cdev(&self) -> Option<(Arc<Bound>, Ioas)> {
        match self {
            Self::Kernel(KernelSeat { place: Some(Place::Cdev(bound, ioas)), .. }) => Some((bound.clone(), ioas.clone())),
            _ => None,
        }
    }
}

pub(super) struct KernelSeat {
    place: Option<Place>,
    presence: Presence,
}

impl KernelSeat {
    /// Whether no other device is in the space.
    pub(super) fn is_last(&self) -> bool {
        self.presence.is_last()
    }

    /// Gives the place up although the space is still held by others. After the device is closed.
    pub(super) async fn leave(mut self) {
        let Some(place) = self.place.take() else { return };
        match unblock(move || place.vacate()).await {
            Left::Others(usable) => self.install(usable),
            Left::Nothing => self.presence.space().emptied(),
        }
    }

    /// Ranges only grow here. A space that can't be told keeps the narrower ones.
    fn install(&self, usable: Option<Vec<IovaRange>>) {
        if let Some(usable) = usable
            && let Err((mapping, hole)) = self.presence.space().install(&usable)
        {
            tracing::warn!(?mapping, ?hole, "the kernel's ranges shrank when a device left");
        }
    }
}

impl Drop for KernelSeat {
    fn drop(&mut self) {
        let usable = self.place.take().and_then(Place::leave);
        self.install(usable);
    }
}

/// What is left of an address space after a device has left it.
enum Left {
    /// It has other devices, or is there all the same; what can be mapped in it.
    Others(Option<Vec<IovaRange>>),
    /// The kernel has unmapped everything.
    Nothing,
}

struct Seated {
    device: DeviceFd,
    place: Place,
    usable: Vec<IovaRange>,
    granule: u64,
    max_mappings: usize,
    info: super::ProtocolInfo,
    regions: Vec<Option<RegionInfo>>,
    irqs: Vec<IrqInfo>,
    signals: Signals,
}

enum Refusal {
    /// The device reserves these addresses, one of which is in use.
    Reserves(Vec<IovaRange>, Error),
    Other(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// All of the kernel's part, which takes its time: opening a device resets it, joining a space pins its memory.
fn seat(bdf: Bdf, way: Way, host: Option<Host>, token: Option<&VfToken>, no_iommu: bool) -> Result<Seated, Refusal> {
    let pci = Pci::system();
    let found = pci.device(bdf)?;
    let by_cdev = match (&host, way) {
        (Some(Host::Ioas(_)), Way::Group) | (Some(Host::Container(_)), Way::Cdev) => {
            return Err(Error::invalid(format!(
                "{bdf}: a group and a cdev can't share an address space; open both devices in the same way"
            ))
            .into());
        }
        (Some(Host::Ioas(_)), _) | (None, Way::Cdev) => true,
        (Some(Host::Container(_)), _) | (None, Way::Group) => false,
        (None, Way::Best) => pci.prefers_cdev(&found) && !no_iommu,
    };
    let name = bdf.to_string();
    let (device, place) = if by_cdev {
        let (context, ioas) = match host {
            Some(Host::Ioas(ioas)) => (ioas.context().clone(), ioas),
            _ => {
                let context = IommufdFd::open()?;
                let ioas = Ioas::alloc(&context)?;
                (context, ioas)
            }
        };
        let bound = Unbound::find(&name)?.bind(&context, token.copied()).map_err(Error::from)?;
        if let Err(error) = bound.attach(&ioas) {
            return Err(Refusal::Reserves(bound.reserved().to_vec(), error));
        }
        (bound.device().clone(), Place::Cdev(Arc::new(bound), ioas))
    } else {
        let Some(group) = found.group.as_ref().map(|group| group.id) else {
            let obstacles = pci.obstacles(&found);
            let what = obstacles.group.first().map_or_else(|| format!("{bdf} has no IOMMU group"), ToString::to_string);
            return Err(Error::NotReady { what }.into());
        };
        let container = match host {
            Some(Host::Container(container)) => container,
            _ => Container::new()?,
        };
        container.add_group(group, no_iommu).map_err(|error| match error {
            Error::Conflict { .. } => Refusal::Reserves(container.reserved(group).unwrap_or_default(), error),
            error => Refusal::Other(error),
        })?;
        let place = Place::Group(container.clone(), group);
        match container.device(&name, token) {
            Ok(device) => (device, place),
            Err(error) => {
                place.leave();
                return Err(error.into());
            }
        }
    };
    match describe(&device, &place, no_iommu) {
        Ok((info, regions, irqs, signals, (usable, granule, max_mappings))) => {
            Ok(Seated { device, place, usable, granule, max_mappings, info, regions, irqs, signals })
        }
        Err(error) => {
            drop(device);
            place.leave();
            Err(error.into())
        }
    }
}

type Limits = (Vec<IovaRange>, u64, usize);
type Description = (super::ProtocolInfo, Vec<Option<RegionInfo>>, Vec<IrqInfo>, Signals, Limits);

/// What the kernel says of a device and of what it can reach.
fn describe(device: &DeviceFd, place: &Place, no_iommu: bool) -> Result<Description> {
    let info = device.info()?;
    let regions = (0..info.regions.min(MAX_REGIONS)).map(|index| device.region_info(index)).collect::<Result<_>>()?;
    let irqs = (0..info.irqs.min(MAX_IRQS)).map(|index| device.irq_info(index)).collect::<Result<Vec<_>>>()?;
    let signals = Signals::bind(device, &irqs);
    let limits = match no_iommu {
        true => (Vec::new(), rustix::param::page_size() as u64, 0),
        false => place.limits()?,
    };
    Ok((info, regions, irqs, signals, limits))
}

impl From<super::ProtocolInfo> for DeviceInfo {
    fn from(info: super::ProtocolInfo) -> Self {
        Self { pci: info.flags & FLAG_PCI != 0, reset: info.flags & FLAG_RESET != 0, regions: info.regions, irqs: info.irqs }
    }
}
