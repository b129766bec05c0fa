//! Packets from and to files in the classic pcap format.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, ErrorKind, Read, Write},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use super::Frame;
use crate::igb::{Cause, spec::MAX_FRAME};

/// Magic number at the start, with microseconds and with nanoseconds; the byte order of the file is the one that gives it.
const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
/// Link type of Ethernet.
const ETHERNET: u32 = 1;
/// Bytes of a packet at most, as we write and as we believe.
const SNAP: u32 = 262_144;

#[derive(Debug)]
struct Reader {
    file: BufReader<File>,
    big_endian: bool,
}

impl Reader {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file = BufReader::new(File::open(path)?);
        let mut header = [0; 24];
        let other =
            || io::Error::new(ErrorKind::InvalidData, "not a pcap file (pcapng is another format: editcap converts)");
        file.read_exact(&mut header)
            .map_err(|error| if error.kind() == ErrorKind::UnexpectedEof { other() } else { error })?;
        let [a, b, c, d, ..] = header;
        let magic = [a, b, c, d];
        let is = |magic: u32| matches!(magic, MICROSECONDS | NANOSECONDS);
        let big_endian = is(u32::from_be_bytes(magic));
        if !big_endian && !is(u32::from_le_bytes(magic)) {
            return Err(other());
        }
        let reader = Self { file, big_endian };
        let link_type = reader.u32([header[20], header[21], header[22], header[23]]) & 0xffff;
        if link_type != ETHERNET {
            let what = format!("link type {link_type} where only Ethernet, {ETHERNET}, can be replayed");
            return Err(io::Error::new(ErrorKind::InvalidData, what));
        }
        Ok(reader)
    }

    fn u32(&self, bytes: [u8; 4]) -> u32 {
        if self.big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    }

    /// The next packet; too long ones are skipped. `None` at the end.
    fn next(&mut self, frame: &mut Frame) -> io::Result<Option<usize>> {
        loop {
            let mut header = [0; 16];
            match self.file.read_exact(&mut header) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
                other => other?,
            }
            let len = self.u32([header[8], header[9], header[10], header[11]]);
            if len > SNAP {
                let what = format!("a packet of {len} bytes where {SNAP} are the limit");
                return Err(io::Error::new(ErrorKind::InvalidData, what));
            }
            let len = len as usize;
            if len <= MAX_FRAME
                && let Some(room) = frame.extend(len)
            {
                self.file.read_exact(room)?;
                return Ok(Some(len));
            }
            tracing::warn!("a packet of {len} bytes is not sent: {MAX_FRAME} are the limit");
            io::copy(&mut self.file.by_ref().take(len as u64), &mut io::sink())?;
        }
    }
}

/// Files of packets; see [`Wire::pcap`](super::Wire::pcap).
#[derive(Debug)]
pub struct Pcap {
    reader: Option<Reader>,
    writer: Option<BufWriter<File>>,
    unflushed: bool,
}

impl Pcap {
    pub(super) fn open(read: Option<&Path>, write: Option<&Path>) -> io::Result<Self> {
        let named = |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let reader = read.map(|path| Reader::open(path).map_err(|error| named(path, error))).transpose()?;
        let create = |path: &Path| {
            let mut file = BufWriter::new(File::create(path)?);
            for value in [MICROSECONDS, 4 << 16 | 2, 0, 0, SNAP, ETHERNET] {
                file.write_all(&value.to_le_bytes())?;
            }
            file.flush()?;
            Ok(file)
        };
        let writer = write.map(|path| create(path).map_err(|error| named(path, error))).transpose()?;
        Ok(Self { reader, writer, unflushed: false })
    }

    pub(super) fn has_more(&self) -> bool {
        self.reader.is_some()
    }

    pub(super) fn read(&mut self, frame: &mut Frame) -> bool {
        let Some(reader) = &mut self.reader else { return false };
        match reader.next(frame) {
            Ok(Some(_)) => return true,
            Ok(None) => {}
            Err(error) => tracing::warn!("no more packets are read: {error}"),
        }
        self.reader = None;
        false
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Cause> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let len = bytes.len() as u32;
        let mut header = [0; 16];
        for (field, value) in header.chunks_exact_mut(4).zip([time.as_secs() as u32, time.subsec_micros(), len, len]) {
            field.copy_from_slice(&value.to_le_bytes());
        }
        self.unflushed = true;
        if let Err(error) = writer.write_all(&header).and_then(|()| writer.write_all(bytes)) {
            // What follows would not be packets any more.
            tracing::warn!("no more packets are written: {error}");
            self.writer = None;
            return Err(Cause::Io);
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) {
        if std::mem::take(&mut self.unflushed)
            && let Some(writer) = &mut self.writer
            && let Err(error) = writer.flush()
        {
            tracing::warn!("no more packets are written: {error}");
            self.writer = None;
        }
    }
}
