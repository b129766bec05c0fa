//! Regions by messages.

use std::{cell::OnceCell, fmt, os::fd::OwnedFd, rc::Rc, sync::Arc};

use super::{
    Area, Inner,
    gate::{Access, Gate},
};
use crate::{
    Error, Result,
    dma::SharedMemory,
    mmio::{GUARDED, Value},
    transport::{
        Place, Transport,
        user::protocol::{REGION_FLAG_MMAP, RegionInfo},
        vfio::DeviceFd,
    },
};

/// Region indices of a PCI device (`VFIO_PCI_*_REGION_INDEX`).
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod index {
    pub const BAR0: u32 = 0;
    pub const BAR1: u32 = 1;
    pub const BAR2: u32 = 2;
    pub const BAR3: u32 = 3;
    pub const BAR4: u32 = 4;
    pub const BAR5: u32 = 5;
    pub const ROM: u32 = 6;
    pub const CONFIG: u32 = 7;
    pub const VGA: u32 = 8;
}

/// The name of a region, for people.
pub(super) fn name(region: u32) -> String {
    match region {
        index::BAR0..=index::BAR5 => format!("BAR {region}"),
        index::ROM => "ROM".into(),
        index::CONFIG => "configuration space".into(),
        index::VGA => "VGA".into(),
        _ => "device-specific".into(),
    }
}

/// `VFIO_REGION_INFO_FLAG_WRITE`.
const REGION_FLAG_WRITE: u32 = 2;

/// A mapped part of a region.
pub(crate) struct MappedArea {
    pub(crate) offset: u64,
    pub(crate) memory: Arc<SharedMemory>,
}

/// What a region is mapped from.
enum Source {
    Nothing,
    /// A descriptor of its own, of a vfio-user server.
    File(Arc<OwnedFd>),
    /// The device's.
    Device(DeviceFd),
}

pub(super) struct RegionState {
    pub(super) info: RegionInfo,
    source: Source,
    mapped: OnceCell<Vec<MappedArea>>,
}

impl RegionState {
    pub(super) fn new(info: RegionInfo, fd: Option<OwnedFd>) -> Self {
        Self { info, source: fd.map_or(Source::Nothing, |fd| Source::File(Arc::new(fd))), mapped: OnceCell::new() }
    }

    /// A region of a device of the kernel.
    pub(super) fn of_device(info: RegionInfo, device: &DeviceFd) -> Self {
        Self { info, source: Source::Device(device.clone()), mapped: OnceCell::new() }
    }

    /// Maps what may be mapped, once. Without a descriptor nothing is: messages do as well.
    fn map(&self, region: u32, gate: &Gate) -> Result<&[MappedArea]> {
        if let Some(mapped) = self.mapped.get() {
            return Ok(mapped);
        }
        let mut mapped = Vec::new();
        if GUARDED && self.info.flags & REGION_FLAG_MMAP != 0 {
            for area in &self.info.areas {
                let memory = self.map_area(region, *area, gate).map_err(|error| {
                    Error::fault(format!("region {region}: its area {:#x}+{:#x}: {error}", area.offset, area.size))
                })?;
                mapped.extend(memory.map(|memory| MappedArea { offset: area.offset, memory }));
            }
        }
        Ok(self.mapped.get_or_init(|| mapped))
    }

    fn map_area(&self, region: u32, area: Area, gate: &Gate) -> Result<Option<Arc<SharedMemory>>> {
        let page = rustix::param::page_size() as u64;
        let offset = self.info.offset.checked_add(area.offset).filter(|offset| offset.is_multiple_of(page));
        let offset = offset.ok_or_else(|| Error::invalid("it does not start at a page of its descriptor"))?;
        let len = usize::try_from(area.size).map_err(|_| Error::invalid("it is larger than memory"))?;
        // What a device calls read-only may refuse to be mapped otherwise. BARs are not: their registers are stored to.
        let writable = region <= index::VGA || self.info.flags & REGION_FLAG_WRITE != 0;
        match &self.source {
            Source::Nothing => Ok(None),
            Source::File(fd) => gate.map(fd, offset, || SharedMemory::map(fd, offset, len, writable)).map(Some),
            Source::Device(device) => gate.map(device.shared(), offset, || device.map(offset, len, writable)).map(Some),
        }
    }
}

/// A region of a device: a range of bytes behind messages, or an address range of the bus. A handle, whose clones are the same.
#[derive(Clone)]
pub struct Region {
    device: Rc<Inner>,
    index: u32,
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Region").field("index", &self.index).field("size", &self.size()).finish_non_exhaustive()
    }
}

macro_rules! accessors {
    ($($ty:ty, $read:ident, $write:ident;)*) => {$(
        #[doc = concat!("Reads a little-endian `", stringify!($ty), "`, in one message of that width.")]
        ///
        /// # Errors
        /// See [`Region::read`].
        pub async fn $read(&self, offset: u64) -> Result<$ty> {
            self.read_value(offset).await
        }

        #[doc = concat!("Writes a little-endian `", stringify!($ty), "`, in one message of that width.")]
        ///
        /// # Errors
        /// See [`Region::read`].
        pub async fn $write(&self, offset: u64, value: $ty) -> Result<()> {
            self.write_value(offset, value).await
        }
    )*};
}

impl Region {
    pub(super) fn new(device: Rc<Inner>, index: u32) -> Self {
        Self { device, index }
    }

    fn info(&self) -> Option<&RegionInfo> {
        Some(&self.device.regions.get(self.index as usize)?.info)
    }

    pub(super) fn transport(&self) -> &Transport {
        &self.device.transport
    }

    pub(super) fn gate(&self) -> &Arc<Gate> {
        &self.device.gate
    }

    /// What an access to it is to the gate.
    pub(super) fn access(&self) -> Access {
        match self.index {
            index::BAR0..=index::ROM | index::VGA => Access::Memory,
            _ => Access::Control,
        }
    }

    pub(super) fn place(&self, offset: u64) -> Place {
        Place { region: self.index, base: self.info().map_or(0, |info| info.offset), offset }
    }

    pub(crate) fn mapped(&self) -> Result<&[MappedArea]> {
        self.device.regions.get(self.index as usize).map_or(Ok(&[]), |state| state.map(self.index, &self.device.gate))
    }

    /// See [`index`].
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.info().map_or(0, |info| info.size)
    }

    /// `VFIO_REGION_INFO_FLAG_*`: READ 1, WRITE 2, MMAP 4, CAPS 8.
    pub fn flags(&self) -> u32 {
        self.info().map_or(0, |info| info.flags)
    }

    /// Type and subtype of a region that only some devices have; bit 31 of the type: the low half is a PCI vendor.
    pub fn kind(&self) -> Option<(u32, u32)> {
        self.info()?.type_
    }

    /// The highest version of its interface that a fault queue offers; `None` of other regions.
    pub fn fault_version(&self) -> Option<u32> {
        self.info()?.fault_version
    }

    /// The version of a queue of answers to page requests; `None` of other regions.
    pub fn response_version(&self) -> Option<u32> {
        self.info()?.response_version
    }

    /// What of it may be mapped.
    pub fn areas(&self) -> &[Area] {
        self.info().map_or(&[], |info| &info.areas)
    }

    pub(super) fn check(&self, offset: u64, len: usize) -> Result<()> {
        let size = self.size();
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(()),
            _ => Err(Error::invalid(format!(
                "an access of {len} bytes at {offset:#x} is outside of region {} ({}), which has {size:#x} bytes",
                self.index,
                name(self.index)
            ))),
        }
    }

    /// Reads `to.len()` bytes at `offset`, always by messages, even where the region is mapped.
    ///
    /// # Errors
    /// [`Error::Invalid`] outside of the region, [`Error::Unavailable`] at once while the device is not
    /// [live](super::Device::state), except for configuration space while it is unavailable; [`Error::Refused`] when the device says
    /// no, else the error that ended the device.
    pub async fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        self.check(offset, to.len())?;
        let _inside = self.device.gate.enter(self.access())?;
        self.device.transport.read(self.place(offset), to).await.map_err(|error| self.device.explain(error))
    }

    /// Writes `from` at `offset`, always by messages.
    ///
    /// A write to configuration space that resets the device, switches its memory or its power passes the device's gate: the
    /// device is resetting or unavailable meanwhile, and its [state](super::Device::state) is right afterwards.
    ///
    /// # Errors
    /// See [`Region::read`].
    pub async fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        self.check(offset, from.len())?;
        if self.index == index::CONFIG && self.device.info.pci {
            return self.device.write_config(self.place(offset), from).await;
        }
        let _inside = self.device.gate.enter(self.access())?;
        self.device.transport.write(self.place(offset), from).await.map_err(|error| self.device.explain(error))
    }

    pub(super) async fn read_value<T: Value>(&self, offset: u64) -> Result<T> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes[..T::SIZE]).await?;
        Ok(T::truncate(u64::from_le_bytes(bytes)))
    }

    pub(super) async fn write_value<T: Value>(&self, offset: u64, value: T) -> Result<()> {
        let value: u64 = value.into();
        self.write(offset, &value.to_le_bytes()[..T::SIZE]).await
    }

    accessors! {
        u8, read_u8, write_u8;
        u16, read_u16, write_u16;
        u32, read_u32, write_u32;
        u64, read_u64, write_u64;
    }
}
