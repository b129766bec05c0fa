//! Identify (section 5.15): what the controller says of itself and its namespaces, copied once and checked.

use std::rc::Rc;

use vfio_uring::{
    device::{Bar, Device},
    dma::{DmaBuf, HugePages, Pool},
};
use zerocopy::{FromBytes, little_endian::U32};

use crate::{
    Error, Result,
    namespace::NamespaceInfo,
    prp::PAGE,
    queue::{MAX_TRANSFER, QueuePair},
    spec::{IdentifyController, IdentifyNamespace, Sqe, admin, register},
};

/// Most namespaces that are taken in; a controller with more is asked for no more.
const MAX_NAMESPACES: usize = 4096;

/// What Identify says of a controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ControllerInfo {
    /// PCI vendor.
    pub vendor: u16,
    /// Model number.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Firmware revision.
    pub firmware: String,
    /// Version of the specification: major, minor, tertiary.
    pub version: (u16, u8, u8),
    /// Bytes of the largest transfer of one command; larger ones are split.
    pub max_transfer: usize,
    /// Entries that a queue can have.
    pub max_queue_entries: u32,
    /// I/O queues that were granted.
    pub io_queues: u16,
    /// Whether there is a volatile write cache, which a flush makes durable.
    pub volatile_cache: bool,
    /// Microseconds that a shutdown may take; 0 = not told.
    pub shutdown_micros: u32,
}

impl ControllerInfo {
    /// Reads the data of Identify Controller.
    pub fn parse(data: &IdentifyController) -> Self {
        let max_transfer = match data.mdts {
            0 => MAX_TRANSFER,
            shift => 1usize.checked_shl(shift.into()).and_then(|pages| pages.checked_mul(PAGE)).unwrap_or(MAX_TRANSFER),
        };
        Self {
            vendor: data.vendor[0].get(),
            model: text(&data.model),
            serial: text(&data.serial),
            firmware: text(&data.firmware),
            max_transfer: max_transfer.min(MAX_TRANSFER),
            volatile_cache: data.vwc & 1 != 0,
            shutdown_micros: data.rtd3e.get(),
            ..Self::default()
        }
    }
}

/// Reads the data of Identify Namespace; `None` for a namespace that is not active.
///
/// # Errors
/// [`Error::Controller`] for a format that can't be.
pub fn parse_namespace(nsid: u32, data: &IdentifyNamespace) -> Result<Option<NamespaceInfo>> {
    if data.nsze.get() == 0 {
        return Ok(None);
    }
    let format = data.lbaf[usize::from(data.flbas & 0xf)].get();
    let shift = format >> 16 & 0xff;
    if !(9..=16).contains(&shift) || u64::MAX >> shift < data.nsze.get() {
        let what = format!("gives namespace {nsid} {} blocks of 2^{shift} bytes", data.nsze);
        return Err(Error::controller(what));
    }
    Ok(Some(NamespaceInfo { nsid, blocks: data.nsze.get(), block_size: 1 << shift, metadata: format as u16 }))
}

/// Reads a list of active namespaces: those above `after`, in ascending order, up to the first 0.
///
/// # Errors
/// [`Error::Controller`] for a list that does not ascend.
pub fn parse_list(after: u32, list: &[U32]) -> Result<Vec<u32>> {
    let mut last = after;
    let mut found = Vec::new();
    for nsid in list.iter().map(|nsid| nsid.get()).take_while(|&nsid| nsid != 0) {
        if nsid <= last {
            return Err(Error::controller(format!("lists namespace {nsid} after {last}")));
        }
        last = nsid;
        found.push(nsid);
    }
    Ok(found)
}

/// ASCII that is padded with spaces; other bytes become question marks.
fn text(bytes: &[u8]) -> String {
    let printable = |&byte: &u8| if (0x20..0x7f).contains(&byte) { byte as char } else { '?' };
    let text: String = bytes.iter().take_while(|&&byte| byte != 0).map(printable).collect();
    text.trim().into()
}

/// Identifies the controller and its active namespaces.
pub(crate) async fn all(
    admin: &Rc<QueuePair>,
    device: &Device,
    bar: &Bar,
    namespaces: &mut Vec<NamespaceInfo>,
) -> Result<ControllerInfo> {
    let version = bar.read::<u32>(register::VS).await?;
    let pool = Pool::new(device.dma(), PAGE, HugePages::No).await?;
    let mut buf = pool.alloc(PAGE)?;
    let controller: IdentifyController = identify(admin, &mut buf, admin::CNS_CONTROLLER, 0).await?;
    let mut info = ControllerInfo::parse(&controller);
    info.version = ((version >> 16) as u16, (version >> 8) as u8, version as u8);
    let mut last = 0;
    'pages: loop {
        // Before 1.1 there is no list: every number up to the count is tried.
        let page = match version >= 0x0001_0100 {
            true => {
                let list: [U32; PAGE / 4] = identify(admin, &mut buf, admin::CNS_ACTIVE_LIST, last).await?;
                parse_list(last, &list)?
            }
            false => (last + 1..=controller.nn.get()).take(PAGE / 4).collect(),
        };
        for &nsid in &page {
            if namespaces.len() == MAX_NAMESPACES {
                tracing::warn!(nsid, "the controller has more than {MAX_NAMESPACES} namespaces: the rest is left out");
                break 'pages;
            }
            let data = identify(admin, &mut buf, admin::CNS_NAMESPACE, nsid).await?;
            namespaces.extend(parse_namespace(nsid, &data)?);
            last = nsid;
        }
        if page.len() < PAGE / 4 {
            break;
        }
    }
    Ok(info)
}

/// One Identify command; its data is copied out of the DMA buffer.
async fn identify<T: FromBytes>(admin: &Rc<QueuePair>, buf: &mut DmaBuf, cns: u32, nsid: u32) -> Result<T> {
    let sqe = Sqe::new(admin::IDENTIFY, nsid).dwords10(cns, 0);
    let stand_in = buf.stand_in();
    let (result, back) = crate::command::run(admin, sqe, Some(std::mem::replace(buf, stand_in))).await;
    if let Some(back) = back {
        *buf = back;
    }
    result?;
    T::read_from_bytes(buf).map_err(|_| Error::controller("ended during Identify"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn formats_are_checked() {
        let mut data = IdentifyNamespace::new_zeroed();
        assert_eq!(parse_namespace(1, &data).unwrap(), None);
        data.nsze = 1000.into();
        assert!(parse_namespace(1, &data).is_err(), "blocks of one byte");
        data.flbas = 1;
        data.lbaf[1] = (12 << 16 | 8).into();
        let info = NamespaceInfo { nsid: 1, blocks: 1000, block_size: 4096, metadata: 8 };
        assert_eq!(parse_namespace(1, &data).unwrap(), Some(info));
        data.nsze = u64::MAX.into();
        assert!(parse_namespace(1, &data).is_err(), "more bytes than 64 bits count");
    }

    #[test]
    fn lists_ascend() {
        let list = |numbers: &[u32]| numbers.iter().map(|&n| U32::new(n)).collect::<Vec<_>>();
        assert_eq!(parse_list(0, &list(&[1, 2, 9, 0, 7])).unwrap(), [1, 2, 9]);
        assert!(parse_list(0, &list(&[1, 1])).is_err());
        assert!(parse_list(5, &list(&[5])).is_err());
    }

    #[test]
    fn limits_are_clamped() {
        let mut data = IdentifyController::new_zeroed();
        assert_eq!(ControllerInfo::parse(&data).max_transfer, MAX_TRANSFER);
        data.mdts = 5;
        assert_eq!(ControllerInfo::parse(&data).max_transfer, 128 << 10);
        data.mdts = 255;
        data.model = [0xff; 40];
        assert_eq!(ControllerInfo::parse(&data).max_transfer, MAX_TRANSFER);
        assert_eq!(ControllerInfo::parse(&data).model, "?".repeat(40));
    }
}
