//! The wire format of vfio-user, for the client here and for servers (the `models` crate).
//!
//! Source: QEMU `docs/interop/vfio-user.rst`. Every structure is little-endian and packed; its size is pinned by a `const`
//! assertion. Parsing never allocates from a length the peer sent, and never reads past the bytes it was given.

use serde::{Deserialize, Serialize};
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U16, U32, U64},
};

/// Protocol major version.
pub const MAJOR: u16 = 0;
/// Protocol minor version that this implementation proposes and answers.
pub const MINOR: u16 = 0;
/// Size of [`Header`] in bytes.
pub const HEADER_SIZE: usize = 16;
/// Largest payload of a message besides transferred data: VERSION with its JSON, capability chains.
pub const MAX_CONTROL_PAYLOAD: usize = 4096;
/// `max_data_xfer_size` where the peer does not say: bytes of data in one region or DMA access.
pub const DEFAULT_MAX_DATA_XFER: u64 = 1 << 20;
/// File descriptors in one message where the peer does not say.
pub const DEFAULT_MAX_MSG_FDS: u64 = 1;

/// Commands, by number.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod command {
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const DEVICE_RESET: u16 = 13;
    pub const REGION_WRITE_MULTI: u16 = 15;

    /// The name of a command, for messages to people.
    pub fn name(command: u16) -> &'static str {
        match command {
            VERSION => "VERSION",
            DMA_MAP => "DMA_MAP",
            DMA_UNMAP => "DMA_UNMAP",
            DEVICE_GET_INFO => "DEVICE_GET_INFO",
            DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
            DEVICE_GET_REGION_IO_FDS => "DEVICE_GET_REGION_IO_FDS",
            DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
            DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
            REGION_READ => "REGION_READ",
            REGION_WRITE => "REGION_WRITE",
            DMA_READ => "DMA_READ",
            DMA_WRITE => "DMA_WRITE",
            DEVICE_RESET => "DEVICE_RESET",
            REGION_WRITE_MULTI => "REGION_WRITE_MULTI",
            _ => "an unknown command",
        }
    }
}

/// Header flags: bits 0-3 are the type, bit 4 asks for no reply, bit 5 marks an error reply.
#[expect(missing_docs, reason = "the names are those of the specification")]
pub mod flags {
    pub const TYPE_MASK: u32 = 0xf;
    pub const COMMAND: u32 = 0;
    pub const REPLY: u32 = 1;
    pub const NO_REPLY: u32 = 1 << 4;
    pub const ERROR: u32 = 1 << 5;

    /// DMA_MAP: the device may read / write the memory.
    pub const DMA_READ: u32 = 1;
    pub const DMA_WRITE: u32 = 2;
    /// DMA_UNMAP: all mappings (address and size 0).
    pub const UNMAP_ALL: u32 = 2;
}

/// The header of every message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Chosen by the sender of a command and echoed in the reply.
    pub msg_id: U16,
    /// A number of [`command`].
    pub command: U16,
    /// Bytes of the whole message, this header included.
    pub size: U32,
    /// See [`flags`].
    pub flags: U32,
    /// An errno, valid with [`flags::ERROR`].
    pub error: U32,
}

/// Why a header can't be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The size does not even cover the header.
    #[error("message size {0} is shorter than the header of 16 bytes")]
    Short(u32),
    /// The size is above what was negotiated.
    #[error("message size {0} is above the limit of {1} bytes")]
    Long(u32, usize),
    /// The type nibble is neither command nor reply.
    #[error("message type {0} is neither command (0) nor reply (1)")]
    Type(u32),
    /// A reply that may not carry a payload carries one.
    #[error("an error reply carries {0} bytes of payload")]
    ErrorPayload(usize),
}

impl Header {
    /// A command of `payload` bytes.
    pub fn command(msg_id: u16, command: u16, payload: usize) -> Self {
        Self {
            msg_id: msg_id.into(),
            command: command.into(),
            size: ((HEADER_SIZE + payload) as u32).into(),
            flags: flags::COMMAND.into(),
            error: 0.into(),
        }
    }

    /// The successful reply to `self` with `payload` bytes.
    pub fn reply(&self, payload: usize) -> Self {
        Self { size: ((HEADER_SIZE + payload) as u32).into(), flags: flags::REPLY.into(), error: 0.into(), ..*self }
    }

    /// The error reply to `self`: header only.
    pub fn error_reply(&self, errno: u32) -> Self {
        Self { size: (HEADER_SIZE as u32).into(), flags: (flags::REPLY | flags::ERROR).into(), error: errno.into(), ..*self }
    }

    /// Whether this is a reply.
    pub fn is_reply(&self) -> bool {
        self.flags.get() & flags::TYPE_MASK == flags::REPLY
    }

    /// Whether the sender of this command wants no reply.
    pub fn no_reply(&self) -> bool {
        self.flags.get() & flags::NO_REPLY != 0
    }

    /// The errno of an error reply; an error without a number counts as `EIO`.
    pub fn error(&self) -> Option<i32> {
        let errno = self.error.get();
        (self.flags.get() & flags::ERROR != 0).then_some(match errno {
            1..=4095 => errno as i32,
            _ => 5,
        })
    }

    /// Checks the header against the rules and gives the number of payload bytes, at most `max_payload`.
    pub fn payload_len(&self, max_payload: usize) -> Result<usize, HeaderError> {
        let size = self.size.get();
        let Some(payload) = (size as usize).checked_sub(HEADER_SIZE) else { return Err(HeaderError::Short(size)) };
        if payload > max_payload {
            return Err(HeaderError::Long(size, HEADER_SIZE + max_payload));
        }
        match self.flags.get() & flags::TYPE_MASK {
            flags::COMMAND => {}
            flags::REPLY if self.error().is_some() && payload != 0 => return Err(HeaderError::ErrorPayload(payload)),
            flags::REPLY => {}
            other => return Err(HeaderError::Type(other)),
        }
        Ok(payload)
    }
}

macro_rules! wire_struct {
    ($(#[$meta:meta])* $name:ident [$size:literal] { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

const _: () = assert!(size_of::<Header>() == HEADER_SIZE);

wire_struct! {
    /// VERSION, before its optional JSON with a trailing NUL.
    Version [4] {
        /// Major version.
        major: U16,
        /// Minor version.
        minor: U16,
    }
}
wire_struct! {
    /// DMA_MAP, with at most one descriptor.
    DmaMap [32] {
        /// Size of this structure.
        argsz: U32,
        /// [`flags::DMA_READ`], [`flags::DMA_WRITE`].
        flags: U32,
        /// Where the memory starts in the descriptor.
        offset: U64,
        /// IOVA.
        address: U64,
        /// Bytes.
        size: U64,
    }
}
wire_struct! {
    /// DMA_UNMAP, echoed in the reply.
    DmaUnmap [24] {
        /// Size of this structure.
        argsz: U32,
        /// [`flags::UNMAP_ALL`].
        flags: U32,
        /// IOVA.
        address: U64,
        /// Bytes.
        size: U64,
    }
}
wire_struct! {
    /// DEVICE_GET_INFO, in the request and the reply.
    DeviceInfo [16] {
        /// Size of the reply that the sender takes / gives.
        argsz: U32,
        /// `VFIO_DEVICE_FLAGS_*`: RESET 1, PCI 2.
        flags: U32,
        /// Number of regions.
        num_regions: U32,
        /// Number of interrupt indices.
        num_irqs: U32,
    }
}
wire_struct! {
    /// DEVICE_GET_REGION_INFO, before the capabilities.
    RegionInfo [32] {
        /// Largest reply payload asked for; in the reply the size needed.
        argsz: U32,
        /// `VFIO_REGION_INFO_FLAG_*`: READ 1, WRITE 2, MMAP 4, CAPS 8.
        flags: U32,
        /// Region index.
        index: U32,
        /// Offset of the first capability from the start of this structure, 0 = none.
        cap_offset: U32,
        /// Bytes of the region.
        size: U64,
        /// Base offset of the region in its descriptor.
        offset: U64,
    }
}
wire_struct! {
    /// `struct vfio_info_cap_header`.
    CapHeader [8] {
        /// Capability id.
        id: U16,
        /// Capability version.
        version: U16,
        /// Offset of the next capability from the start of the info structure, 0 = end.
        next: U32,
    }
}
wire_struct! {
    /// `struct vfio_region_info_cap_sparse_mmap` after its header, before the areas.
    SparseMmap [8] {
        /// Number of areas.
        nr_areas: U32,
        /// Zero.
        reserved: U32,
    }
}
wire_struct! {
    /// `struct vfio_region_sparse_mmap_area`.
    SparseArea [16] {
        /// Offset in the region.
        offset: U64,
        /// Bytes.
        size: U64,
    }
}
wire_struct! {
    /// `struct vfio_region_info_cap_type` after its header.
    RegionType [8] {
        /// Type.
        kind: U32,
        /// Subtype.
        subtype: U32,
    }
}
wire_struct! {
    /// DEVICE_GET_IRQ_INFO, in the request and the reply.
    IrqInfo [16] {
        /// Size of this structure.
        argsz: U32,
        /// `VFIO_IRQ_INFO_*`: EVENTFD 1, MASKABLE 2, AUTOMASKED 4, NORESIZE 8.
        flags: U32,
        /// Interrupt index: INTX 0, MSI 1, MSIX 2, ERR 3, REQ 4.
        index: U32,
        /// Number of vectors.
        count: U32,
    }
}
wire_struct! {
    /// DEVICE_GET_IRQ_INFO of an index with capabilities, before these.
    ExtendedIrqInfo [20] {
        /// What all indices have.
        info: IrqInfo,
        /// Offset of the first capability from the start of this structure, 0 = none.
        cap_offset: U32,
    }
}
wire_struct! {
    /// DEVICE_SET_IRQS, before BOOL data; eventfds are descriptors of the message.
    SetIrqs [20] {
        /// Size of this structure and its data.
        argsz: U32,
        /// One of DATA NONE 1, BOOL 2, EVENTFD 4; one of ACTION MASK 8, UNMASK 0x10, TRIGGER 0x20.
        flags: U32,
        /// Interrupt index.
        index: U32,
        /// First vector.
        start: U32,
        /// Number of vectors.
        count: U32,
    }
}
wire_struct! {
    /// REGION_READ and REGION_WRITE, before the data.
    RegionAccess [16] {
        /// Offset in the region.
        offset: U64,
        /// Region index.
        region: U32,
        /// Bytes.
        count: U32,
    }
}
wire_struct! {
    /// DMA_READ and DMA_WRITE, before the data.
    DmaAccess [16] {
        /// IOVA.
        address: U64,
        /// Bytes.
        count: U64,
    }
}
wire_struct! {
    /// One write of REGION_WRITE_MULTI, which starts with a count of them as `u64`, at most 8.
    MultiWrite [24] {
        /// Offset in the region.
        offset: U64,
        /// Region index.
        region: U32,
        /// Bytes, at most 8.
        count: U32,
        /// The data, padded to 8 bytes.
        data: [u8; 8],
    }
}

/// Region capability: only the listed areas may be mapped.
pub const CAP_SPARSE_MMAP: u16 = 1;
/// Region capability: type and subtype of a region that only some devices have.
pub const CAP_TYPE: u16 = 2;
/// Region capability: the MSI-X table may be mapped with the rest.
pub const CAP_MSIX_MAPPABLE: u16 = 3;
/// Capability of an interrupt index: type and subtype of one that only some devices have (`VFIO_IRQ_INFO_CAP_TYPE` of the nested
/// series). Its body is a [`RegionType`].
pub const CAP_IRQ_TYPE: u16 = 3;
/// Region capability: a fault queue, with the highest version of its interface (`VFIO_REGION_INFO_CAP_PRODUCER_FAULT` and
/// `_DMA_FAULT` of the nested series).
pub const CAP_FAULT: u16 = 6;
/// Region capability: the queue of answers to page requests, with its version (`VFIO_REGION_INFO_CAP_DMA_FAULT_RESPONSE`).
pub const CAP_FAULT_RESPONSE: u16 = 7;

/// The JSON of VERSION.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionJson {
    /// The sender's capabilities.
    #[serde(default)]
    pub capabilities: Capabilities,
}

/// The capabilities of VERSION that this implementation knows; others are ignored, absent ones have the protocol's defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// File descriptors that the sender takes in one message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_msg_fds: Option<u64>,
    /// Bytes of data that the sender takes in one region or DMA access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_data_xfer_size: Option<u64>,
    /// DMA regions that the sender takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dma_maps: Option<u64>,
    /// Page sizes, as a bit mask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pgsizes: Option<u64>,
    /// Whether REGION_WRITE_MULTI is understood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub write_multiple: Option<bool>,
    /// Our own extension, offered by the client and confirmed by the server: commands that may be outstanding at once.
    /// A server that does not confirm it gets one command at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_outstanding: Option<u64>,
    /// Our own extension, of the server: the I/O virtual addresses that the device can use, as pairs of the first and the last.
    /// A server that says nothing can use all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iova_ranges: Option<Vec<[u64; 2]>>,
}

/// Why a VERSION payload can't be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// Fewer than the 4 bytes of the numbers.
    #[error("VERSION carries {0} bytes where 4 are needed")]
    Short(usize),
    /// The JSON does not end with a NUL.
    #[error("the JSON of VERSION does not end with a NUL")]
    NoNul,
    /// The JSON can't be read.
    #[error("the JSON of VERSION is not valid: {0}")]
    Json(String),
}

/// Reads the payload of VERSION; without JSON the capabilities are the defaults.
pub fn parse_version(payload: &[u8]) -> Result<(Version, Capabilities), VersionError> {
    let (version, json) = Version::read_from_prefix(payload).map_err(|_| VersionError::Short(payload.len()))?;
    let Some((nul, json)) = json.split_last() else { return Ok((version, Capabilities::default())) };
    if *nul != 0 {
        return Err(VersionError::NoNul);
    }
    // A C peer may send its buffer with more than one NUL.
    let json = json.split(|&byte| byte == 0).next().unwrap_or_default();
    if json.is_empty() {
        return Ok((version, Capabilities::default()));
    }
    let parsed: VersionJson = serde_json::from_slice(json).map_err(|error| VersionError::Json(error.to_string()))?;
    Ok((version, parsed.capabilities))
}

/// Writes the payload of VERSION.
pub fn version_payload(version: Version, capabilities: &Capabilities) -> Vec<u8> {
    let mut payload = version.as_bytes().to_vec();
    let json = VersionJson { capabilities: capabilities.clone() };
    serde_json::to_writer(&mut payload, &json).expect("plain numbers serialise");
    payload.push(0);
    payload
}

/// An entry of a capability chain: its header and what follows up to the end of the payload.
pub type Capability<'a> = (CapHeader, &'a [u8]);

/// Why a capability chain can't be accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CapError {
    /// A capability starts inside the fixed structure, beyond the payload, or before the one that points to it.
    #[error("capability offset {0} is outside of the reply or goes backwards")]
    Offset(u32),
    /// A sparse capability with more areas than bytes.
    #[error("{0} sparse areas do not fit in the reply")]
    Areas(u32),
}

/// Walks the capability chain of an info reply: `payload` from the start of the info structure, `fixed` its size, `first` the
/// `cap_offset` of it. Offsets must ascend, so a loop can't be built.
pub fn capabilities(payload: &[u8], fixed: usize, first: u32) -> Result<Vec<Capability<'_>>, CapError> {
    let mut found = Vec::new();
    let (mut offset, mut floor) = (first, fixed);
    while offset != 0 {
        let at = offset as usize;
        let bytes = payload.get(at..).filter(|_| at >= floor).ok_or(CapError::Offset(offset))?;
        let (header, rest) = CapHeader::read_from_prefix(bytes).map_err(|_| CapError::Offset(offset))?;
        found.push((header, rest));
        floor = at + size_of::<CapHeader>();
        offset = header.next.get();
    }
    Ok(found)
}

/// Reads the areas of a sparse-mmap capability, from what follows its header.
pub fn sparse_areas(body: &[u8]) -> Result<Vec<SparseArea>, CapError> {
    let (sparse, rest) = SparseMmap::read_from_prefix(body).map_err(|_| CapError::Areas(0))?;
    let count = sparse.nr_areas.get();
    let (areas, _) = <[SparseArea]>::ref_from_prefix_with_elems(rest, count as usize).map_err(|_| CapError::Areas(count))?;
    Ok(areas.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_rules() {
        let header = Header::command(7, command::REGION_READ, 16);
        assert_eq!(header.payload_len(16), Ok(16));
        assert_eq!(header.payload_len(15), Err(HeaderError::Long(32, 31)));
        assert_eq!(Header { size: 15.into(), ..header }.payload_len(99), Err(HeaderError::Short(15)));
        assert_eq!(Header { flags: 2.into(), ..header }.payload_len(99), Err(HeaderError::Type(2)));
        let error = header.error_reply(22);
        assert_eq!((error.payload_len(0), error.error()), (Ok(0), Some(22)));
        assert_eq!(Header { size: 20.into(), ..error }.payload_len(99), Err(HeaderError::ErrorPayload(4)));
        assert_eq!(Header { error: 0.into(), ..error }.error(), Some(5));
    }

    #[test]
    fn version_with_and_without_json() {
        let version = Version { major: 0.into(), minor: 1.into() };
        assert_eq!(parse_version(&[0, 0, 1, 0]), Ok((version, Capabilities::default())));
        let capabilities = Capabilities { max_msg_fds: Some(8), ..Default::default() };
        assert_eq!(parse_version(&version_payload(version, &capabilities)), Ok((version, capabilities)));
        assert_eq!(parse_version(&[0; 3]), Err(VersionError::Short(3)));
        assert_eq!(parse_version(b"\0\0\0\0{}"), Err(VersionError::NoNul));
        assert!(matches!(parse_version(b"\0\0\0\0{\0"), Err(VersionError::Json(_))));
        assert!(parse_version(b"\0\0\0\0{\"capabilities\":{\"migration\":{\"pgsize\":4096}}}\0").is_ok());
    }

    #[test]
    fn chains_ascend_and_stay_inside() {
        let mut payload = vec![0; 32];
        payload.extend(CapHeader { id: 1.into(), version: 1.into(), next: 0.into() }.as_bytes());
        payload.extend(SparseMmap { nr_areas: 1.into(), reserved: 0.into() }.as_bytes());
        payload.extend(SparseArea { offset: 4096.into(), size: 4096.into() }.as_bytes());
        let chain = capabilities(&payload, 32, 32).unwrap();
        assert_eq!(chain.len(), 1);
        assert_eq!(sparse_areas(chain[0].1).unwrap()[0].offset.get(), 4096);
        assert_eq!(capabilities(&payload, 32, 31), Err(CapError::Offset(31)));
        assert_eq!(capabilities(&payload, 32, 4000), Err(CapError::Offset(4000)));
        payload[36] = 32;
        assert_eq!(capabilities(&payload, 32, 32), Err(CapError::Offset(32)));
        assert_eq!(sparse_areas(&[255; 8]), Err(CapError::Areas(u32::MAX)));
    }
}
