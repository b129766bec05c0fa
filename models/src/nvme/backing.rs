//! What a namespace's blocks are kept in.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::spec::Status;
use crate::device::Host;

/// Bytes that are allocated at once, when the first of them is written.
const CHUNK: usize = 1 << 20;
/// Zeroes to answer reads of what was never written.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

type Chunk = Box<[u8; CHUNK]>;

/// The bytes of a namespace. Offsets and lengths were checked against its size.
#[derive(Debug)]
pub(super) enum Store {
    Memory(Memory),
    File(Disk),
}

impl Store {
    /// Copies to client memory.
    #[inline]
    pub fn read(&mut self, offset: u64, len: u64, iova: u64, host: &mut impl Host) -> Result<(), Status> {
        match self {
            Self::Memory(memory) => memory.read(offset, len, iova, host),
            Self::File(disk) => disk.read(offset, len, iova, host),
        }
    }

    /// Starts to bring the first bytes at `offset` into the cache: the misses of a batch of reads then overlap.
    #[inline]
    pub fn warm(&self, offset: u64) {
        let Self::Memory(memory) = self else { return };
        let (index, start, _) = Memory::place(offset, 1);
        if let Some(Some(chunk)) = memory.chunks.get(index) {
            std::hint::black_box(chunk[start]);
        }
    }

    /// Copies from client memory.
    #[inline]
    pub fn write(&mut self, offset: u64, len: u64, iova: u64, host: &mut impl Host) -> Result<(), Status> {
        match self {
            Self::Memory(memory) => memory.write(offset, len, iova, host),
            Self::File(disk) => disk.write(offset, len, iova, host),
        }
    }

    /// Copies out, for a comparison.
    pub fn get(&mut self, offset: u64, to: &mut [u8]) -> Result<(), Status> {
        match self {
            Self::Memory(memory) => {
                memory.get(offset, to);
                Ok(())
            }
            Self::File(disk) => disk.get(offset, to).map_err(|_| Status::READ_ERROR),
        }
    }

    /// Makes a range read as zeroes, and gives its memory back where that is easy.
    pub fn zero(&mut self, offset: u64, len: u64) -> Result<(), Status> {
        match self {
            Self::Memory(memory) => {
                memory.zero(offset, len);
                Ok(())
            }
            Self::File(disk) => disk.zero(offset, len).map_err(|_| Status::WRITE_FAULT),
        }
    }

    /// Makes durable what was written.
    pub fn flush(&mut self) -> Result<(), Status> {
        match self {
            Self::Memory(_) => Ok(()),
            Self::File(disk) => disk.file.sync_data().map_err(|_| Status::WRITE_FAULT),
        }
    }
}

/// Memory that is allocated in chunks when it is written.
#[derive(Debug)]
pub(super) struct Memory {
    chunks: Vec<Option<Chunk>>,
}

impl Memory {
    pub fn new(bytes: u64) -> Self {
        Self { chunks: vec![None; bytes.div_ceil(CHUNK as u64) as usize] }
    }

    /// The chunk, the offset in it, and how much of `len` it holds.
    #[inline]
    fn place(offset: u64, len: u64) -> (usize, usize, usize) {
        let start = (offset % CHUNK as u64) as usize;
        ((offset / CHUNK as u64) as usize, start, len.min((CHUNK - start) as u64) as usize)
    }

    #[inline]
    fn read(&self, mut offset: u64, mut len: u64, mut iova: u64, host: &mut impl Host) -> Result<(), Status> {
        while len != 0 {
            let (index, start, mut part) = Self::place(offset, len);
            let written = match self.chunks.get(index) {
                Some(Some(chunk)) => host.write(iova, &chunk[start..start + part]),
                _ => {
                    part = part.min(ZEROES.len());
                    host.write(iova, &ZEROES[..part])
                }
            };
            written.map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            (offset, len, iova) = (offset + part as u64, len - part as u64, iova.wrapping_add(part as u64));
        }
        Ok(())
    }

    #[inline]
    fn write(&mut self, mut offset: u64, mut len: u64, mut iova: u64, host: &mut impl Host) -> Result<(), Status> {
        while len != 0 {
            let (index, start, part) = Self::place(offset, len);
            let Some(slot) = self.chunks.get_mut(index) else { return Err(Status::LBA_OUT_OF_RANGE) };
            let chunk = slot.get_or_insert_with(chunk);
            host.read(iova, &mut chunk[start..start + part]).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            (offset, len, iova) = (offset + part as u64, len - part as u64, iova.wrapping_add(part as u64));
        }
        Ok(())
    }

    fn get(&self, mut offset: u64, mut to: &mut [u8]) {
        while !to.is_empty() {
            let (index, start, part) = Self::place(offset, to.len() as u64);
            let (now, rest) = to.split_at_mut(part);
            match self.chunks.get(index) {
                Some(Some(chunk)) => now.copy_from_slice(&chunk[start..start + part]),
                _ => now.fill(0),
            }
            (offset, to) = (offset + part as u64, rest);
        }
    }

    fn zero(&mut self, mut offset: u64, mut len: u64) {
        while len != 0 {
            let (index, start, part) = Self::place(offset, len);
            match self.chunks.get_mut(index) {
                Some(slot) if part == CHUNK => *slot = None,
                Some(Some(chunk)) => chunk[start..start + part].fill(0),
                _ => {}
            }
            (offset, len) = (offset + part as u64, len - part as u64);
        }
    }
}

/// Zeroed by the system, so that pages of it that are never written cost nothing.
fn chunk() -> Chunk {
    vec![0; CHUNK].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!("the slice has the size of a chunk"))
}

/// A file.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    bounce: Vec<u8>,
}

impl Disk {
    /// `bounce` is the largest part that is copied at once.
    pub fn new(file: File, bounce: usize) -> Self {
        Self { file, bounce: vec![0; bounce.max(4096)] }
    }

    fn read(&mut self, mut offset: u64, mut len: u64, mut iova: u64, host: &mut impl Host) -> Result<(), Status> {
        while len != 0 {
            let part = len.min(self.bounce.len() as u64) as usize;
            let buffer = &mut self.bounce[..part];
            read_at(&self.file, offset, buffer).map_err(|_| Status::READ_ERROR)?;
            host.write(iova, buffer).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            (offset, len, iova) = (offset + part as u64, len - part as u64, iova.wrapping_add(part as u64));
        }
        Ok(())
    }

    fn write(&mut self, mut offset: u64, mut len: u64, mut iova: u64, host: &mut impl Host) -> Result<(), Status> {
        while len != 0 {
            let part = len.min(self.bounce.len() as u64) as usize;
            let buffer = &mut self.bounce[..part];
            host.read(iova, buffer).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            self.file.write_all_at(buffer, offset).map_err(|_| Status::WRITE_FAULT)?;
            (offset, len, iova) = (offset + part as u64, len - part as u64, iova.wrapping_add(part as u64));
        }
        Ok(())
    }

    fn get(&mut self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        read_at(&self.file, offset, to)
    }

    fn zero(&mut self, mut offset: u64, mut len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        if fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len).is_ok() {
            return Ok(());
        }
        while len != 0 {
            let part = len.min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..part as usize], offset)?;
            (offset, len) = (offset + part, len - part);
        }
        Ok(())
    }
}

/// Reads; what is beyond the end of the file is zero.
fn read_at(file: &File, mut offset: u64, mut to: &mut [u8]) -> io::Result<()> {
    while !to.is_empty() {
        match file.read_at(to, offset) {
            Ok(0) => {
                to.fill(0);
                return Ok(());
            }
            Ok(n) => {
                offset += n as u64;
                to = &mut to[n..];
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
