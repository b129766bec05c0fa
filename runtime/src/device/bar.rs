//! BARs: registers, mapped where the device allows it, by messages elsewhere.

use std::{fmt, rc::Rc};

use super::{Area, Region};
use crate::{
    Error, Result,
    mmio::{Register, Value},
    transport::{
        Transport,
        user::{client::Connection, link::PostedWrite},
        vfio::PostedRegister,
    },
};

/// A region of registers. A handle, whose clones are the same.
#[derive(Debug, Clone)]
pub struct Bar {
    region: Region,
}

impl Bar {
    pub(super) fn new(region: Region) -> Result<Self> {
        region.mapped()?;
        Ok(Self { region })
    }

    /// The region behind it.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.region.size()
    }

    /// What of it is mapped.
    pub fn mapped(&self) -> Vec<Area> {
        let mapped = self.region.mapped().unwrap_or_default();
        mapped.iter().map(|area| Area { offset: area.offset, size: area.memory.len() as u64 }).collect()
    }

    /// The mapped register at `offset`, if it is mapped.
    fn find<T: Value>(&self, offset: u64) -> Result<Option<Register<T>>> {
        self.region.check(offset, T::SIZE)?;
        if !offset.is_multiple_of(T::SIZE as u64) {
            return Err(Error::invalid(format!(
                "a register of {} bytes can't be at {offset:#x}: it is misaligned",
                T::SIZE
            )));
        }
        let areas = self.region.mapped()?;
        let at = areas.partition_point(|area| area.offset <= offset);
        let Some(area) = at.checked_sub(1).and_then(|at| areas.get(at)) else { return Ok(None) };
        // One that straddles the end of its area goes by message.
        Ok(Register::new(&area.memory, offset - area.offset).ok())
    }

    fn unavailable(&self, offset: u64) -> Error {
        if let Some(cause) = self.region.gate().cause() {
            return cause;
        }
        Error::MmioUnavailable { bar: self.region.index(), offset }
    }

    /// Reads a register: one load where it is mapped, else one message of exactly its width.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is misaligned or outside of the BAR; [`Error::MmioUnavailable`] when it is mapped, and the
    /// device's memory is not there, as while it is reset; [`Error::Unavailable`] for the same where it is not mapped; [`Error::Refused`] when the device says no, else the error that ended the device.
    pub async fn read<T: Value>(&self, offset: u64) -> Result<T> {
        match self.find(offset)? {
            Some(register) => register.try_read().map_err(|_| self.unavailable(offset)),
            None => self.region.read_value(offset).await,
        }
    }

    /// Writes a register, after all that was stored to DMA memory before: one store where it is mapped, else one message of
    /// exactly its width.
    ///
    /// # Errors
    /// See [`Bar::read`].
    pub async fn write<T: Value>(&self, offset: u64, value: T) -> Result<()> {
        match self.find(offset)? {
            Some(register) => register.try_write(value).map_err(|_| self.unavailable(offset)),
            None => self.region.write_value(offset, value).await,
        }
    }

    /// A mapped register, for the hot path.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is not mapped; see [`Bar::read`].
    pub fn register<T: Value>(&self, offset: u64) -> Result<Register<T>> {
        self.find(offset)?.ok_or_else(|| Error::Unsupported {
            what: format!("BAR {}: the register at {offset:#x} is not mapped", self.region.index()),
        })
    }

    /// A register that is only written, without ever waiting: a doorbell.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is misaligned or outside of the BAR.
    pub fn posted<T: Value>(&self, offset: u64) -> Result<Posted<T>> {
        let bar = self.region.index();
        let way = match self.find(offset)? {
            Some(register) => Way::Mapped(register),
            None => match self.region.transport() {
                Transport::User(connection) => {
                    Way::Messages(PostedWrite::new(bar, offset, T::SIZE, self.region.gate()), connection.clone())
                }
                Transport::Group(attached) | Transport::Cdev(attached) => Way::Descriptor(PostedRegister::new(
                    attached.clone(),
                    self.region.place(offset),
                    T::SIZE,
                    self.region.gate(),
                )),
            },
        };
        Ok(Posted { way, bar, offset })
    }
}

/// A register that is only written, and whose newest value alone matters: a doorbell.
pub struct Posted<T> {
    way: Way<T>,
    bar: u32,
    offset: u64,
}

enum Way<T> {
    Mapped(Register<T>),
    Messages(Rc<PostedWrite>, Rc<Connection>),
    Descriptor(Rc<PostedRegister>),
}

impl<T> Clone for Posted<T> {
    fn clone(&self) -> Self {
        let way = match &self.way {
            Way::Mapped(register) => Way::Mapped(register.clone()),
            Way::Messages(write, connection) => Way::Messages(write.clone(), connection.clone()),
            Way::Descriptor(register) => Way::Descriptor(register.clone()),
        };
        Self { way, bar: self.bar, offset: self.offset }
    }
}

impl<T> From<Register<T>> for Posted<T> {
    /// A store to a mapped register.
    fn from(register: Register<T>) -> Self {
        let offset = register.offset();
        Self { way: Way::Mapped(register), bar: 0, offset }
    }
}

impl<T> fmt::Debug for Posted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Posted").field("mapped", &matches!(self.way, Way::Mapped(_))).finish()
    }
}

impl<T: Value> Posted<T> {
    /// Writes, after all that was stored to DMA memory before. Where the register is not mapped a message goes out soon; while
    /// one is under way, only the newest of the values written meanwhile follows it. While the device is not
    /// [live](super::Device::state) nothing is written, and nothing later; [`Posted::take_error`] tells.
    #[inline]
    pub fn write(&self, value: T) {
        match &self.way {
            Way::Mapped(register) => register.write_after_dma(value),
            Way::Messages(write, connection) => connection.post(write, value.into()),
            Way::Descriptor(register) => register.post(value.into()),
        }
    }

    /// Whether it is a store and not a message.
    pub fn is_mapped(&self) -> bool {
        matches!(self.way, Way::Mapped(_))
    }

    /// The error of the last message that the device refused, once; [`Error::MmioUnavailable`] when accesses to the register's
    /// mapping found no memory since this was asked last of any register of it, so that writes may be lost.
    pub fn take_error(&self) -> Option<Error> {
        match &self.way {
            Way::Mapped(register) => {
                register.take_faults().map(|_| Error::MmioUnavailable { bar: self.bar, offset: self.offset })
            }
            Way::Messages(write, _) => write.take_error(),
            Way::Descriptor(register) => register.take_error(),
        }
    }
}
