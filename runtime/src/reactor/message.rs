//! `sendmsg` and `recvmsg` with descriptors: the message header and all that it points to, in one heap object.

use std::{
    io, mem,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::Arc,
};

/// Most descriptors in one message (the kernel's SCM_MAX_FD).
pub const MAX_FDS: usize = 253;

/// A message that the kernel reads or writes while its op is under way.
#[derive(Debug)]
pub(crate) struct Message {
    header: libc::msghdr,
    iov: libc::iovec,
    bytes: Vec<u8>,
    /// `u64` for the alignment of `cmsghdr`.
    control: Vec<u64>,
    /// Sent descriptors stay open until the kernel has taken them.
    _fds: Vec<Arc<OwnedFd>>,
    incoming: bool,
}

/// What `recv` got.
#[derive(Debug)]
pub struct Received {
    /// Bytes of data; 0 at the end of the stream.
    pub bytes: usize,
    /// Descriptors that came with them.
    pub fds: Vec<OwnedFd>,
    /// The peer sent more descriptors than were asked for; the kernel closed the surplus.
    pub fds_truncated: bool,
}

fn control_space(fds: usize) -> usize {
    // SAFETY: a computation on numbers.
    unsafe { libc::CMSG_SPACE((fds * size_of::<RawFd>()) as u32) as usize }
}

impl Message {
    /// A message to send.
    pub(crate) fn outgoing(bytes: Vec<u8>, fds: Vec<Arc<OwnedFd>>) -> Box<Self> {
        let mut this = Self::new(bytes, fds.len());
        if !fds.is_empty() {
            // SAFETY: `new` made the control buffer large enough for one header with these descriptors, aligned and zeroed.
            unsafe {
                let cmsg = libc::CMSG_FIRSTHDR(&this.header);
                (*cmsg).cmsg_level = libc::SOL_SOCKET;
                (*cmsg).cmsg_type = libc::SCM_RIGHTS;
                (*cmsg).cmsg_len = libc::CMSG_LEN((fds.len() * size_of::<RawFd>()) as u32) as _;
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                for (i, fd) in fds.iter().enumerate() {
                    data.add(i).write_unaligned(fd.as_raw_fd());
                }
            }
        }
        this._fds = fds;
        this
    }

    /// Room for a message of at most `bytes.len()` bytes and `max_fds` descriptors.
    pub(crate) fn incoming(bytes: Vec<u8>, max_fds: usize) -> Box<Self> {
        let mut this = Self::new(bytes, max_fds);
        this.incoming = true;
        this
    }

    fn new(bytes: Vec<u8>, fds: usize) -> Box<Self> {
        let space = if fds == 0 { 0 } else { control_space(fds.min(MAX_FDS)) };
        // SAFETY: a zeroed `msghdr` is an empty message.
        let header = unsafe { mem::zeroed::<libc::msghdr>() };
        let iov = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
        let control = vec![0u64; space.div_ceil(8)];
        let mut this = Box::new(Self { header, iov, bytes, control, _fds: Vec::new(), incoming: false });
        this.iov = libc::iovec { iov_base: this.bytes.as_mut_ptr().cast(), iov_len: this.bytes.len() };
        this.header.msg_iov = ptr::from_mut(&mut this.iov);
        this.header.msg_iovlen = 1;
        if space != 0 {
            this.header.msg_control = this.control.as_mut_ptr().cast();
            this.header.msg_controllen = space as _;
        }
        this
    }

    /// The header for the SQE.
    pub(crate) fn header(&mut self) -> *mut libc::msghdr {
        &mut self.header
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// What came in, after a successful `recvmsg` that gave `result`. Once: it gives the descriptors away.
    pub(crate) fn received(&mut self, result: usize) -> Received {
        let mut fds = Vec::new();
        if !mem::take(&mut self.incoming) {
            return Received { bytes: result, fds, fds_truncated: false };
        }
        // SAFETY: the kernel filled in the control buffer and set its length; the macros stay inside of it. Every descriptor
        // in it is new in this process and nobody else's.
        unsafe {
            let mut cmsg = libc::CMSG_FIRSTHDR(&self.header);
            while let Some(header) = cmsg.as_ref() {
                if header.cmsg_level == libc::SOL_SOCKET && header.cmsg_type == libc::SCM_RIGHTS {
                    let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                    let bytes = header.cmsg_len - libc::CMSG_LEN(0) as usize;
                    fds.extend((0..bytes / size_of::<RawFd>()).map(|i| OwnedFd::from_raw_fd(data.add(i).read_unaligned())));
                }
                cmsg = libc::CMSG_NXTHDR(&self.header, cmsg);
            }
        }
        Received { bytes: result, fds, fds_truncated: self.header.msg_flags & libc::MSG_CTRUNC != 0 }
    }
}

/// The result of an op as `io::Result`.
pub(crate) fn to_io(result: i32) -> io::Result<usize> {
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) }
}
