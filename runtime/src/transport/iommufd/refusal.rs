//! Why the kernel did not map: its errnos, told apart.

use rustix::io::Errno;

use super::Ranges;
use crate::{
    Error, Result,
    dma::{IovaRange, MapRefused},
};

/// A mapping that is asked for.
pub(super) struct Request {
    /// Where the memory is: in this process, in a file, or in another address space.
    pub(super) source: u64,
    /// `None`: at the kernel's choice.
    pub(super) iova: Option<u64>,
    /// Bytes.
    pub(super) len: u64,
    /// Whether it comes from a file.
    pub(super) file: bool,
}

impl Request {
    /// What can be told before the kernel is asked. It wants multiples of the IOMMU's granule only once a device is attached,
    /// and then refuses the device; so whole pages are wanted here from the start.
    pub(super) fn check(&self) -> Result<()> {
        let granule = rustix::param::page_size() as u64;
        if self.len == 0 || (self.source | self.iova.unwrap_or(0) | self.len) & (granule - 1) != 0 {
            return Err(self.error(MapRefused::Misaligned { granule }));
        }
        if self.iova.is_some_and(|iova| iova.checked_add(self.len - 1).is_none()) {
            return Err(self.error(MapRefused::Aperture { allowed: None }));
        }
        Ok(())
    }

    fn error(&self, reason: MapRefused) -> Error {
        match self.iova {
            Some(iova) => Error::Map { iova, len: self.len, reason },
            None => Error::invalid(format!("mapping {:#x} bytes at an IOVA of the kernel's choice: {reason}", self.len)),
        }
    }
}

/// Whether `len` bytes at `iova` are whole pages inside of the address space.
pub(super) fn check_range(iova: u64, len: u64) -> Result<()> {
    Request { source: 0, iova: Some(iova), len, file: false }.check()
}

/// The error for `errno` of a map command. `ranges` are the allowed ones, where they could be read.
pub(super) fn refused(errno: Errno, request: &Request, ranges: Option<&Ranges>, memlock: Option<u64>) -> Error {
    let what = || match request.iova {
        Some(iova) => format!("mapping {:#x} bytes at IOVA {iova:#x}", request.len),
        None => format!("mapping {:#x} bytes at an IOVA of the kernel's choice", request.len),
    };
    match errno {
        Errno::EXIST => request.error(MapRefused::Overlap),
        Errno::FAULT => request.error(MapRefused::BadAddress),
        Errno::NOMEM => match memlock {
            Some(limit) => request.error(MapRefused::Memlock { limit, needed: request.len }),
            None => Error::Exhausted {
                what: format!(
                    "{}: the kernel is out of memory; in a user namespace CAP_IPC_LOCK does not lift `ulimit -l`",
                    what()
                ),
            },
        },
        Errno::NOSPC => {
            Error::Exhausted { what: format!("{}: no such range of addresses is free; unmap something", what()) }
        }
        Errno::INVAL | Errno::OVERFLOW => match outside(request, ranges) {
            Some(reason) => request.error(reason),
            None if request.file => Error::Unsupported {
                what: format!("{}: the kernel takes memfds and BARs as dma-buf; is the file one, and as long?", what()),
            },
            None => Error::io(what(), errno),
        },
        Errno::OPNOTSUPP | Errno::NOTTY if request.file => {
            Error::Unsupported { what: format!("{}: the kernel can't map this kind of file; map its memory", what()) }
        }
        Errno::NODEV if request.file => Error::Unsupported {
            what: format!("{}: the BAR behind this dma-buf is not there, as during a reset; try again after it", what()),
        },
        Errno::BADF if request.file => Error::invalid(format!("{}: the descriptor is not open", what())),
        Errno::PERM if request.file => Error::io(format!("{}: the file may not be written", what()), errno),
        errno => Error::io(what(), errno),
    }
}

/// Which rule of the ranges the request breaks: the granule, the aperture, or a hole inside of it.
fn outside(request: &Request, ranges: Option<&Ranges>) -> Option<MapRefused> {
    let (iova, Ranges { ranges, alignment }) = (request.iova?, ranges?);
    if (iova | request.len | request.source) & (alignment - 1) != 0 {
        return Some(MapRefused::Misaligned { granule: *alignment });
    }
    // What wraps around goes beyond any aperture.
    let last = iova.saturating_add(request.len - 1);
    MapRefused::outside(IovaRange { start: iova, last }, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vtd() -> Ranges {
        let range = |start, last| IovaRange { start, last };
        Ranges { ranges: vec![range(0, 0xfedf_ffff), range(0xfef0_0000, 0xffff_ffff_ffff)], alignment: 4096 }
    }

    fn request(iova: u64, len: u64) -> Request {
        Request { source: 0x7000_0000, iova: Some(iova), len, file: false }
    }

    fn reason(errno: Errno, iova: u64, len: u64) -> MapRefused {
        match refused(errno, &request(iova, len), Some(&vtd()), Some(65536)) {
            Error::Map { iova: at, len: its, reason } if (at, its) == (iova, len) => reason,
            error => panic!("{error}"),
        }
    }

    #[test]
    fn each_errno_has_its_meaning() {
        assert_eq!(reason(Errno::EXIST, 0x1000, 0x1000), MapRefused::Overlap);
        assert_eq!(reason(Errno::FAULT, 0x1000, 0x1000), MapRefused::BadAddress);
        assert_eq!(reason(Errno::NOMEM, 0x1000, 0x20000), MapRefused::Memlock { limit: 65536, needed: 0x20000 });
        let unlimited = refused(Errno::NOMEM, &request(0x1000, 0x1000), None, None);
        assert!(matches!(unlimited, Error::Exhausted { .. }), "{unlimited}");
        let full = refused(Errno::NOSPC, &Request { iova: None, ..request(0, 0x1000) }, None, None);
        assert!(matches!(full, Error::Exhausted { .. }), "{full}");
        assert!(matches!(refused(Errno::IO, &request(0, 0x1000), None, None), Error::Io { .. }));
    }

    #[test]
    fn einval_is_told_apart_by_the_ranges() {
        let msi = Some(IovaRange { start: 0xfee0_0000, last: 0xfeef_ffff });
        let all = Some(IovaRange { start: 0, last: 0xffff_ffff_ffff });
        assert_eq!(reason(Errno::INVAL, 0xfee0_0000, 0x1000), MapRefused::Reserved { region: msi });
        assert_eq!(reason(Errno::INVAL, 0xfedf_f000, 0x2000), MapRefused::Reserved { region: msi });
        assert_eq!(reason(Errno::INVAL, 0xffff_ffff_f000, 0x2000), MapRefused::Aperture { allowed: all });
        assert_eq!(reason(Errno::OVERFLOW, u64::MAX - 0xfff, 0x2000), MapRefused::Aperture { allowed: all });
        assert_eq!(reason(Errno::INVAL, 0x1800, 0x1000), MapRefused::Misaligned { granule: 4096 });
        // Nothing is wrong with the range: it is said as it is.
        assert!(matches!(refused(Errno::INVAL, &request(0x1000, 0x1000), Some(&vtd()), None), Error::Io { .. }));
    }

    #[test]
    fn files_have_errors_of_their_own() {
        let file = |errno| refused(errno, &Request { file: true, ..request(0x1000, 0x1000) }, Some(&vtd()), None);
        for errno in [Errno::OPNOTSUPP, Errno::NOTTY, Errno::NODEV, Errno::INVAL] {
            assert!(matches!(file(errno), Error::Unsupported { .. }), "{}", file(errno));
        }
        assert!(file(Errno::BADF).to_string().contains("not open"));
    }

    #[test]
    fn what_can_be_told_without_the_kernel() {
        let refused = |request: Request| match request.check() {
            Err(Error::Map { reason, .. }) => Some(reason),
            Err(error) => panic!("{error}"),
            Ok(()) => None,
        };
        let granule = rustix::param::page_size() as u64;
        assert_eq!(refused(request(granule, granule)), None);
        assert_eq!(refused(request(granule, 0)), Some(MapRefused::Misaligned { granule }));
        assert_eq!(refused(request(granule / 2, granule)), Some(MapRefused::Misaligned { granule }));
        assert_eq!(refused(Request { source: 1, ..request(granule, granule) }), Some(MapRefused::Misaligned { granule }));
        assert_eq!(refused(request(0u64.wrapping_sub(granule), granule)), None);
        assert_eq!(refused(request(0u64.wrapping_sub(granule), 2 * granule)), Some(MapRefused::Aperture { allowed: None }));
        assert!(Request { iova: None, ..request(0, 1) }.check().is_err());
    }
}
