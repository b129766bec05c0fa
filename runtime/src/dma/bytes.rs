//! DMA buffers and the `bytes` crate.

use bytes::{Buf, Bytes};

use super::{DmaBuf, Pool};
use crate::{Error, Result};

/// The buffer's bytes, without a copy. The memory returns to its pool when the last clone or slice of them is dropped, on
/// whatever thread that is. One small allocation is made for the count of them. There is no way back from the bytes to the buffer.
///
/// ```
/// # futures::executor::block_on(async {
/// # use vfio_uring::dma::*;
/// # let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 64);
/// # let pool = Pool::new(&space, 65536, HugePages::No).await?;
/// use bytes::Bytes;
///
/// let buf = pool.alloc_from(&b"header, body"[..])?;
/// let body = Bytes::from(buf).slice(8..);
/// assert_eq!(body, "body");
/// assert_eq!(pool.stats().free, 65536 - 4096);
/// drop(body);
/// assert_eq!(pool.stats().free, 65536);
/// # Ok::<_, vfio_uring::Error>(()) }).unwrap();
/// ```
impl From<DmaBuf> for Bytes {
    fn from(buf: DmaBuf) -> Self {
        Self::from_owner(buf)
    }
}

impl DmaBuf {
    /// Copies all of `data` to the buffer's start and sets the length to that of the data: [`DmaBuf::resize`] fills it up to
    /// whole blocks. Of data that is longer, `(&mut data).take(buf.capacity())` is the next part.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the data is longer than the capacity. Nothing has changed then.
    pub fn copy_from(&mut self, mut data: impl Buf) -> Result<()> {
        let (len, capacity) = (data.remaining(), self.capacity());
        if len > capacity {
            return Err(Error::invalid(format!(
                "{len} bytes of data for a DMA buffer of {capacity}: allocate a longer one, or take the data in parts"
            )));
        }
        self.set_len(len)?;
        data.copy_to_slice(self);
        Ok(())
    }
}

impl Pool {
    /// A buffer as long as `data`, with a copy of it. What the buffer has room for behind it is zero: the pool's memory may have
    /// had somebody else's data.
    ///
    /// # Errors
    /// As of [`Pool::alloc`]; data of no bytes is [`Error::Invalid`], too.
    pub fn alloc_from(&self, data: impl Buf) -> Result<DmaBuf> {
        let len = data.remaining();
        let mut buf = self.alloc(len)?;
        buf.copy_from(data)?;
        buf.set_len(buf.capacity())?;
        buf[len..].fill(0);
        buf.set_len(len)?;
        Ok(buf)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use futures::executor::block_on;

    use super::*;
    use crate::dma::{AddressSpace, Backend, HugePages, IovaRange};

    fn pool() -> Pool {
        let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 4096, 8);
        block_on(Pool::new(&space, 65536, HugePages::No)).unwrap()
    }

    #[test]
    fn bytes_are_the_same_memory() {
        let pool = pool();
        let mut buf = pool.alloc(100).unwrap();
        buf.fill(3);
        let at = buf.as_ptr();
        let bytes = Bytes::from(buf);
        assert_eq!((bytes.as_ptr(), bytes.len()), (at, 100));
        assert_eq!(bytes, [3; 100][..]);
        // Of length 0, too.
        let mut empty = pool.alloc(1).unwrap();
        empty.set_len(0).unwrap();
        assert!(Bytes::from(empty).is_empty());
        assert_eq!(pool.stats().free, 65536 - 4096);
    }

    #[test]
    fn the_last_slice_gives_the_memory_back() {
        let pool = pool();
        let mut bytes = Bytes::from(pool.alloc_from(&b"one two three"[..]).unwrap());
        let (one, three) = (bytes.split_to(3), bytes.slice(5..));
        drop(bytes);
        drop(one);
        assert_eq!(pool.stats().free, 65536 - 4096);
        assert_eq!(three, "three");
        // The pool's own handle isn't needed for it.
        let stats = pool.stats();
        drop(pool.clone());
        drop(three);
        assert_eq!((pool.stats().free, stats.quarantined), (65536, 0));
    }

    #[test]
    fn dropped_on_other_threads() {
        let pool = pool();
        for round in 0..50 {
            let bytes: Vec<_> = (0..16u8).map(|i| Bytes::from(pool.alloc_from(&[i; 4096][..]).unwrap())).collect();
            assert_eq!((pool.stats().free, pool.alloc(1).is_err()), (0, true), "round {round}");
            let threads = (0..4).map(|_| {
                let bytes = bytes.clone();
                thread::spawn(move || bytes.iter().enumerate().all(|(i, bytes)| bytes.iter().all(|&byte| byte == i as u8)))
            });
            let threads: Vec<_> = threads.collect();
            drop(bytes);
            assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
            assert_eq!(
                pool.stats(),
                crate::dma::PoolStats { bytes: 65536, free: 65536, largest_free: 65536, quarantined: 0 }
            );
        }
    }

    #[test]
    fn bytes_outlive_the_pool() {
        let pool = pool();
        let bytes = Bytes::from(pool.alloc_from(&b"still here"[..]).unwrap());
        drop(pool);
        thread::spawn(move || assert_eq!(bytes, "still here")).join().unwrap();
    }

    #[test]
    fn copies_of_any_buf() {
        let pool = pool();
        let mut buf = pool.alloc(16).unwrap();
        // In pieces, and longer than the length was.
        buf.copy_from((&b"some "[..]).chain(Bytes::from(vec![b'x'; 4091]))).unwrap();
        assert_eq!((buf.len(), &buf[..6], buf[4095]), (4096, &b"some x"[..], b'x'));
        buf.copy_from(&b"short"[..]).unwrap();
        assert_eq!(*buf, *b"short");
        buf.resize(8, b'.').unwrap();
        assert_eq!(*buf, *b"short...");
        // Too long: refused, and as it was.
        let error = buf.copy_from(&[0; 4097][..]).unwrap_err().to_string();
        assert_eq!(error, "4097 bytes of data for a DMA buffer of 4096: allocate a longer one, or take the data in parts");
        assert_eq!(*buf, *b"short...");
        // In parts.
        let mut long = Bytes::from(vec![9; 5000]);
        buf.copy_from((&mut long).take(4096)).unwrap();
        assert_eq!((buf.len(), long.remaining()), (4096, 904));
        // Nothing, and to nothing.
        buf.copy_from(&[][..]).unwrap();
        assert!(buf.is_empty());
        assert!(buf.stand_in().copy_from(&b"x"[..]).is_err());
        assert!(matches!(pool.alloc_from(&[][..]), Err(Error::Invalid { .. })));
        assert!(matches!(pool.alloc_from(&[0; 70000][..]), Err(Error::Exhausted { .. })));
    }
}
