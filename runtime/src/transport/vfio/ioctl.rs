//! The one place that issues ioctls of VFIO and iommufd.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The request numbers of VFIO and iommufd: `_IO(';', nr)`, without a size; the size is in the argument.
pub(crate) const fn request(nr: u8) -> u32 {
    (b';' as u32) << 8 | nr as u32
}

/// Issues `request` with a pointer to `argument`. What the kernel returned, 0 or more.
///
/// # Safety
/// `argument` is what the kernel reads and writes for `request`, of at least the size that its in-band size field says; what it
/// points to is valid for the call.
pub(crate) unsafe fn with_struct<T: ?Sized>(fd: impl AsFd, request: u32, argument: &mut T) -> Result<i32, Errno> {
    // SAFETY: by the caller's promise.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request.into(), std::ptr::from_mut(argument).cast::<libc::c_void>()) };
    returned(result)
}

/// Issues `request` with a number as its argument. What the kernel returned, 0 or more.
///
/// # Safety
/// `request` takes a number, or nothing, and no pointer.
pub(crate) unsafe fn with_number(fd: impl AsFd, request: u32, argument: usize) -> Result<i32, Errno> {
    // SAFETY: by the caller's promise.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request.into(), argument) };
    returned(result)
}

fn returned(result: i32) -> Result<i32, Errno> {
    if result >= 0 {
        return Ok(result);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}

/// Bytes of an answer that are taken at most.
pub(crate) const MAX_ANSWER: usize = 64 << 10;
/// Bytes that are offered at first: more than the kernel has in nearly all cases.
const FIRST_ANSWER: usize = 4096;
/// An answer that grows each time it is asked for is not asked for for ever.
const ATTEMPTS: usize = 4;

/// Asks for a structure with a chain of capabilities behind it. `head` is the fixed structure as the kernel is to see it, except
/// for its first field `argsz`; that grows up to [`MAX_ANSWER`] until all fits. Where it does not, the answer's `argsz` is larger
/// than the answer.
///
/// # Safety
/// `request` is an info request whose argument starts as `head` does, and of which the kernel writes at most `argsz` bytes.
pub(crate) unsafe fn query(fd: impl AsFd, request: u32, head: &[u8]) -> Result<Vec<u8>, Errno> {
    let mut size = FIRST_ANSWER;
    let mut attempt = 1;
    loop {
        let mut answer = head.to_vec();
        answer.resize(size, 0);
        answer[..4].copy_from_slice(&(size as u32).to_ne_bytes());
        // SAFETY: by the caller's promise; `argsz` is the buffer's size.
        unsafe { with_struct(fd.as_fd(), request, answer.as_mut_slice()) }?;
        let needed = u32::from_ne_bytes([answer[0], answer[1], answer[2], answer[3]]) as usize;
        if needed <= size || needed > MAX_ANSWER || attempt == ATTEMPTS {
            return Ok(answer);
        }
        (size, attempt) = (needed, attempt + 1);
    }
}
