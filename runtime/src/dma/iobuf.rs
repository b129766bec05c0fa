//! DMA buffers as buffers of tokio-uring.

use tokio_uring::buf::{IoBuf, IoBufMut};

use super::DmaBuf;

/// Files and sockets of tokio-uring write straight from DMA memory, and read straight into it.
///
/// A buffer counts as initialised in all of its [length](DmaBuf::len), and its length is all there is of it: a read transfers
/// at most that many bytes, a write exactly those, and the capacity behind it isn't touched. A transfer does not change the
/// length. How much a short read brought is in the count that it returns; what follows in the buffer is as it was before.
///
/// `buf.slice(..n)` reads or writes the first `n` bytes alone, and its `into_inner` is the whole buffer again. As always with
/// `slice`, a range that goes beyond the buffer panics; so does any slice of a buffer of length 0.
///
/// tokio-uring's `readv_at` reads to behind what is initialised. Here that is the end, so it reads 0 bytes, whatever the file has:
/// use a `read_at` for each buffer. `writev_at` works.
///
/// ```
/// # let path = tempfile::NamedTempFile::new()?;
/// # std::fs::write(&path, b"twelve bytes")?;
/// use tokio_uring::{buf::BoundedBuf, fs::File};
/// # use vfio_uring::{dma::*, reactor::Guest};
///
/// # tokio_uring::start(async { Guest::new()?.run(async {
/// # let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
/// # let pool = Pool::new(&space, 65536, HugePages::No).await?;
/// let file = File::open(&path).await?;
/// let (count, buf) = file.read_at(pool.alloc(512)?, 0).await;
/// let count = count?;
/// assert_eq!(&buf[..count], b"twelve bytes");
/// assert_eq!(buf.len(), 512);
///
/// // From here on it is the first four bytes only.
/// let (done, part) = file.read_exact_at(buf.slice(..4), 7).await;
/// done?;
/// assert_eq!(part.into_inner()[..12], *b"byteve bytes");
/// # file.close().await?;
/// # Ok::<_, Box<dyn std::error::Error>>(()) }).await? })?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
// SAFETY: the memory is where it is until the buffer is dropped, however often the buffer moves, for the buffer keeps the pool's
// mapping. All of it was initialised from the start, and it is the buffer's alone.
unsafe impl IoBuf for DmaBuf {
    #[inline]
    fn stable_ptr(&self) -> *const u8 {
        self.ptr().as_ptr()
    }

    #[inline]
    fn bytes_init(&self) -> usize {
        self.len()
    }

    #[inline]
    fn bytes_total(&self) -> usize {
        self.len()
    }
}

/// See the buffer's [`IoBuf`].
// SAFETY: as for `IoBuf`: the address is the same, and the memory may be written through it, since the buffer owns it.
unsafe impl IoBufMut for DmaBuf {
    #[inline]
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.ptr().as_ptr()
    }

    /// Nothing to do: a transfer ends within the length, which is initialised. A mark beyond it, which the trait allows callers
    /// that know the capacity, becomes the length.
    #[inline]
    unsafe fn set_init(&mut self, pos: usize) {
        if pos > self.len() {
            // A mark beyond the capacity breaks the trait's contract; it is refused all the same, and the length stays.
            let _ = self.set_len(pos);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io};

    use futures::executor::block_on;
    use tokio_uring::{
        buf::{BoundedBuf, BoundedBufMut},
        fs::File,
    };

    use super::*;
    use crate::dma::{AddressSpace, Backend, HugePages, IovaRange, Pool};

    fn pool() -> Pool {
        let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 8);
        block_on(Pool::new(&space, 65536, HugePages::No)).unwrap()
    }

    #[test]
    fn reads_fill_dma_memory_and_keep_the_length() {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(&path, (0..5000).map(|i| i as u8).collect::<Vec<_>>()).unwrap();
        let pool = pool();
        tokio_uring::start(async {
            let file = File::open(&path).await.unwrap();
            let mut buf = pool.alloc(1000).unwrap();
            let at = buf.as_ptr();
            // The length bounds it, not the capacity of 4096.
            let (count, back) = file.read_at(buf, 0).await;
            assert_eq!((count.unwrap(), back.len(), back.as_ptr()), (1000, 1000, at));
            assert!(back.iter().enumerate().all(|(i, &byte)| byte == i as u8));
            // A short read.
            buf = back;
            buf.fill(0xee);
            let (count, back) = file.read_at(buf, 4900).await;
            assert_eq!((count.unwrap(), back.len()), (100, 1000));
            assert!(back[..100].iter().enumerate().all(|(i, &byte)| byte == (4900 + i) as u8));
            assert!(back[100..].iter().all(|&byte| byte == 0xee));
            // The end, and beyond.
            let (done, back) = file.read_exact_at(back, 4900).await;
            assert_eq!(done.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            let (count, back) = file.read_at(back, 9999).await;
            assert_eq!((count.unwrap(), back.len()), (0, 1000));
            drop(back);
            file.close().await.unwrap();
        });
        assert_eq!(pool.stats().free, pool.stats().bytes);
    }

    #[test]
    fn slices_read_and_write_their_part() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let pool = pool();
        tokio_uring::start(async {
            let file = File::from_std(fs::File::options().read(true).write(true).open(&path).unwrap());
            let mut buf = pool.alloc(4096).unwrap();
            buf.fill(7);
            let (done, part) = file.write_all_at(buf.slice(..600), 0).await;
            done.unwrap();
            assert_eq!(fs::read(&path).unwrap(), [7; 600]);
            let mut buf = part.into_inner();
            assert_eq!(buf.len(), 4096);
            buf.fill(0);
            let (done, part) = file.read_exact_at(buf.slice(100..300), 0).await;
            done.unwrap();
            assert_eq!(part[..], [7; 200]);
            let buf = part.into_inner();
            assert!(buf.iter().enumerate().all(|(i, &byte)| byte == if (100..300).contains(&i) { 7 } else { 0 }));
            // A write takes the length, not the capacity.
            let mut buf = buf;
            buf.set_len(10).unwrap();
            let (count, _) = file.write_at(buf, 600).submit().await;
            assert_eq!((count.unwrap(), fs::metadata(&path).unwrap().len()), (10, 610));
            file.close().await.unwrap();
        });
    }

    #[test]
    fn many_buffers_are_written_at_once_but_not_read() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let pool = pool();
        tokio_uring::start(async {
            let file = File::from_std(fs::File::options().read(true).write(true).open(&path).unwrap());
            let bufs = [&b"in "[..], b"three ", b"parts"].map(|part| pool.alloc_from(part).unwrap());
            let (count, bufs) = file.writev_at(bufs.into(), 2).await;
            assert_eq!((count.unwrap(), fs::read(&path).unwrap()), (14, b"\0\0in three parts".to_vec()));
            // The documentation says so; should tokio-uring change it, that has to change, too.
            let (count, bufs) = file.readv_at(bufs, 0).await;
            assert_eq!((count.unwrap(), &*bufs[2]), (0, &b"parts"[..]));
            file.close().await.unwrap();
        });
    }

    #[test]
    fn a_dropped_read_gives_its_memory_back() {
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let pool = pool();
        tokio_uring::start(async {
            let stream = tokio_uring::net::UnixStream::from_std(reader);
            let mut read = Box::pin(stream.read(pool.alloc(4096).unwrap()));
            assert!(futures::poll!(&mut read).is_pending());
            drop(read);
            // The kernel may still write it.
            assert_eq!(pool.stats().free, pool.stats().bytes - 4096);
            drop(writer);
            for _ in 0..1000 {
                if pool.stats().free == pool.stats().bytes {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            panic!("the memory does not come back");
        });
    }

    #[test]
    fn marks_and_stand_ins() {
        let pool = pool();
        let mut buf = pool.alloc(100).unwrap();
        // SAFETY: all of the capacity is initialised.
        unsafe { BoundedBufMut::set_init(&mut buf, 50) };
        assert_eq!(buf.len(), 100);
        // SAFETY: as above.
        unsafe { BoundedBufMut::set_init(&mut buf, 4096) };
        assert_eq!(buf.len(), 4096);
        let none = buf.stand_in();
        assert_eq!((IoBuf::bytes_init(&none), IoBuf::bytes_total(&none)), (0, 0));
    }
}
