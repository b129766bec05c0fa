//! Features that only some devices and kernels have.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_PCI_VF_TOKEN,
    VFIO_DEVICE_FEATURE_PROBE, VFIO_DEVICE_FEATURE_SET,
};
use zerocopy::IntoBytes;

use super::{
    DeviceFd, VfToken,
    abi::{self, FeatureHeader, Wakeup},
    device::failed,
    ioctl,
};
use crate::{Error, Result};

/// Bytes of a feature's data at most.
const MAX_DATA: usize = ioctl::MAX_ANSWER;

const FEATURE: [(Errno, &str); 2] =
    [(Errno::NOTTY, "the device or the kernel does not have it"), (Errno::INVAL, "it can't be used so, or not now")];

const LOW_POWER: [(Errno, &str); 2] =
    [(Errno::NOTTY, "the device or the kernel can't let it sleep"), (Errno::INVAL, "the device is already there")];

/// Which way a feature's data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureOp {
    /// From the kernel.
    Get,
    /// To the kernel.
    Set,
}

impl FeatureOp {
    fn flag(self) -> u32 {
        match self {
            Self::Get => VFIO_DEVICE_FEATURE_GET,
            Self::Set => VFIO_DEVICE_FEATURE_SET,
        }
    }
}

impl DeviceFd {
    /// Whether the device has `feature` (`VFIO_DEVICE_FEATURE_*`), and it goes this way. Nothing changes.
    ///
    /// # Errors
    /// [`Error::Io`] for anything but a plain no.
    pub fn probe(&self, feature: u32, op: FeatureOp) -> Result<bool> {
        // SAFETY: a probe has no data; it only reads the header.
        match unsafe { self.feature_call(feature, VFIO_DEVICE_FEATURE_PROBE | op.flag(), &mut []) } {
            Ok(()) => Ok(true),
            Err(Errno::NOTTY | Errno::INVAL) => Ok(false),
            Err(errno) => Err(failed(format!("asking for device feature {feature}"), errno, &FEATURE)),
        }
    }

    /// Gets or sets `feature` (`VFIO_DEVICE_FEATURE_*`), whose structure is `data`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the device does not have it, [`Error::Invalid`] for more than 64 KiB of data, else
    /// [`Error::Io`].
    ///
    /// # Safety
    /// Addresses and descriptors in `data` are what the kernel takes for `feature`: it may write to the memory there, and take
    /// the descriptors.
    pub unsafe fn feature(&self, feature: u32, op: FeatureOp, data: &mut [u8]) -> Result<()> {
        if data.len() > MAX_DATA || feature > VFIO_DEVICE_FEATURE_MASK {
            return Err(Error::invalid(format!(
                "device feature {feature} with {} bytes: it is at most {VFIO_DEVICE_FEATURE_MASK} with {MAX_DATA} bytes",
                data.len()
            )));
        }
        // SAFETY: by the caller's promise.
        let result = unsafe { self.feature_call(feature, op.flag(), data) };
        let what = || format!("device feature {feature} ({op:?})");
        result.map_err(|errno| refused(what(), errno, &FEATURE))
    }

    /// Sets the token that the users of the device's virtual functions have to give.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device that has none, else [`Error::Io`].
    pub fn set_vf_token(&self, token: &VfToken) -> Result<()> {
        let mut data = *token.as_bytes();
        // SAFETY: the token has neither addresses nor descriptors.
        unsafe { self.feature(VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, FeatureOp::Set, &mut data) }
    }

    /// Lets the device sleep whenever nothing asks for it. Until [`DeviceFd::low_power_exit`] a load or store of a mapped BAR
    /// raises SIGBUS; reads and writes wake the device for as long as they last.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no such thing, [`Error::Io`]: EINVAL when it may sleep already.
    pub fn low_power_entry(&self) -> Result<()> {
        self.low_power(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, &mut [])
    }

    /// As [`DeviceFd::low_power_entry`], once: when the device is woken it stays awake, and `wakeup`, an eventfd, is signalled.
    ///
    /// # Errors
    /// As for [`DeviceFd::low_power_entry`].
    pub fn low_power_entry_with_wakeup(&self, wakeup: BorrowedFd<'_>) -> Result<()> {
        let mut data = Wakeup { eventfd: (wakeup.as_raw_fd() as u32).into(), reserved: 0.into() };
        self.low_power(VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, data.as_mut_bytes())
    }

    /// Wakes the device, and keeps it awake.
    ///
    /// # Errors
    /// As for [`DeviceFd::low_power_entry`].
    pub fn low_power_exit(&self) -> Result<()> {
        self.low_power(VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, &mut [])
    }

    fn low_power(&self, feature: u32, data: &mut [u8]) -> Result<()> {
        // SAFETY: the only descriptor in it is an eventfd that the kernel takes a reference of its own to.
        let result = unsafe { self.feature_call(feature, VFIO_DEVICE_FEATURE_SET, data) };
        result.map_err(|errno| refused("changing the power state of the device".into(), errno, &LOW_POWER))
    }

    /// # Safety
    /// As for [`DeviceFd::feature`]; `data` is not too long.
    unsafe fn feature_call(&self, feature: u32, flags: u32, data: &mut [u8]) -> Result<(), Errno> {
        let mut request = feature_request(feature | flags, data);
        // SAFETY: FEATURE takes a `vfio_device_feature` of `argsz` bytes, which is the buffer's size, and writes at most that; the
        // rest by the caller's promise.
        unsafe { ioctl::with_struct(self, abi::device::FEATURE, request.as_mut_slice()) }?;
        data.copy_from_slice(&request[size_of::<FeatureHeader>()..]);
        Ok(())
    }
}

fn feature_request(flags: u32, data: &[u8]) -> Vec<u8> {
    let size = size_of::<FeatureHeader>() + data.len();
    let mut request = FeatureHeader { argsz: (size as u32).into(), flags: flags.into() }.as_bytes().to_vec();
    request.extend_from_slice(data);
    request
}

fn refused(what: String, errno: Errno, meanings: &[(Errno, &'static str)]) -> Error {
    let error = failed(what, errno, meanings);
    match errno {
        Errno::NOTTY => Error::Unsupported { what: error.to_string() },
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn requests_hold_their_size_and_data() {
        let request = feature_request(VFIO_DEVICE_FEATURE_SET, &[1, 2, 3]);
        let (head, data) = FeatureHeader::read_from_prefix(&request).unwrap();
        assert_eq!((head.argsz.get(), head.flags.get(), data), (11, 0x2_0000, &[1, 2, 3][..]));
    }

    #[test]
    fn what_has_no_features_says_so() {
        let null = DeviceFd::new(std::fs::File::open("/dev/null").unwrap().into());
        assert!(!null.probe(0, FeatureOp::Set).unwrap());
        assert!(matches!(null.low_power_exit(), Err(Error::Unsupported { .. })));
        assert!(matches!(null.set_vf_token(&VfToken::new([0; 16])), Err(Error::Unsupported { .. })));
        // SAFETY: nothing of it reaches the kernel.
        let long = unsafe { null.feature(0, FeatureOp::Get, &mut vec![0; MAX_DATA + 1]) };
        assert!(matches!(long, Err(Error::Invalid { .. })));
    }
}
