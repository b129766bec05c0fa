//! Which regions of a device are a fault queue, and in which form.

use super::abi::{IRQ_INDEX, IRQ_TYPE, REGION_TYPE, REGION_TYPE_LATER, SUBTYPE_CONSUMER, SUBTYPE_QUEUE, SUBTYPE_RESPONSE};
use crate::{
    Error, Result,
    device::{Device, IrqInfo, Region},
};

/// `VFIO_REGION_INFO_FLAG_READ` and `_WRITE`.
const READ: u32 = 1;
const WRITE: u32 = 2;

/// The regions of a fault queue.
pub(super) enum Found {
    TwoRegion { producer: Region, consumer: Region },
    Single { queue: Region, responses: Option<Region> },
}

/// Looks for the regions. The numbers of their types belong to others too (2 is a channel I/O region of s390), so that only a region
/// with the capability of its queue is taken. The two forms share a subtype: the queue of the first can't be written.
pub(super) fn regions(device: &Device) -> Result<Found> {
    let all: Vec<Region> = device.regions().filter(|region| region.kind().is_some()).collect();
    for queue in all.iter().filter(|region| region.fault_version().is_some()) {
        let Some((type_ @ (REGION_TYPE | REGION_TYPE_LATER), SUBTYPE_QUEUE)) = queue.kind() else { continue };
        let sibling = |subtype, response: bool, flag| {
            let is = |region: &&Region| {
                region.kind() == Some((type_, subtype))
                    && region.response_version().is_some() == response
                    && region.flags() & flag != 0
            };
            all.iter().find(is).cloned()
        };
        match queue.flags() & (READ | WRITE) {
            READ => {
                let consumer = sibling(SUBTYPE_CONSUMER, false, WRITE).ok_or_else(|| {
                    Error::fault(format!("region {} is a fault queue whose consumer's region is missing", queue.index()))
                })?;
                return Ok(Found::TwoRegion { producer: queue.clone(), consumer });
            }
            flags if flags == READ | WRITE => {
                let responses = sibling(SUBTYPE_RESPONSE, true, WRITE);
                return Ok(Found::Single { queue: queue.clone(), responses });
            }
            flags => {
                let index = queue.index();
                return Err(Error::fault(format!(
                    "region {index} is a fault queue that can't be read: its flags are {flags}"
                )));
            }
        }
    }
    Err(Error::Unsupported { what: "a fault queue: none of its regions is one".into() })
}

/// The interrupt of a queue: the one with its type, or the fixed index that the two-region form has.
pub(super) fn interrupt(irqs: &[IrqInfo], two_region: bool) -> Result<u32> {
    let later = || (0..).zip(irqs).skip(IRQ_INDEX as usize).filter(|(_, info)| info.count != 0);
    let typed = later().find(|(_, info)| info.type_ == Some(IRQ_TYPE));
    let fixed = || later().find(|&(index, info)| two_region && index == IRQ_INDEX && info.type_.is_none());
    typed.or_else(fixed).map(|(index, _)| index).ok_or_else(|| Error::Unsupported {
        what: "an interrupt for its fault queue; look at it from time to time instead (Notify::Poll)".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interrupt_is_found_by_its_type_or_its_index() {
        let info = |count, type_| IrqInfo { flags: 1, count, type_ };
        let five = vec![info(1, None); 5];
        let with = |more: &[IrqInfo]| [&five[..], more].concat();
        assert!(interrupt(&five, true).is_err());
        assert_eq!(interrupt(&with(&[info(1, None)]), true).unwrap(), 5);
        assert!(interrupt(&with(&[info(0, None)]), true).is_err());
        assert!(interrupt(&with(&[info(1, Some((9, 9)))]), true).is_err());
        assert!(interrupt(&with(&[info(1, None)]), false).is_err());
        assert_eq!(interrupt(&with(&[info(1, None), info(1, Some((1, 1)))]), false).unwrap(), 6);
        // The type of an index below is something else.
        assert!(interrupt(&[info(1, Some((1, 1)))], false).is_err());
    }
}
