//! How a controller is set up.

use std::{fs::OpenOptions, io, path::PathBuf};

use super::{
    backing::{Disk, Memory, Store},
    io::Namespace,
};

/// Bytes of a namespace at most: 1 PiB.
const MAX_BYTES: u64 = 1 << 50;
/// Bytes of a namespace in memory at most: 64 TiB, whose table of chunks is then 512 MiB of untouched address space.
const MAX_MEMORY: u64 = 1 << 46;

/// Where the blocks of a namespace are kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Backing {
    /// Memory of this process, taken when it is written first.
    #[default]
    Memory,
    /// A file; made, and made as long as the namespace, where it is not.
    File(PathBuf),
}

/// A namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceConfig {
    /// Size in bytes, a multiple of `lba_size`.
    pub bytes: u64,
    /// Bytes of a logical block: a power of two from 512 to 65536.
    pub lba_size: u32,
    /// Where the blocks are kept.
    pub backing: Backing,
}

impl NamespaceConfig {
    /// A disk in memory with blocks of 512 bytes.
    pub fn memory(bytes: u64) -> Self {
        Self { bytes, lba_size: 512, backing: Backing::Memory }
    }

    /// A disk in a file with blocks of 512 bytes.
    pub fn file(path: impl Into<PathBuf>, bytes: u64) -> Self {
        Self { bytes, lba_size: 512, backing: Backing::File(path.into()) }
    }

    /// With blocks of `lba_size` bytes.
    pub fn with_lba_size(self, lba_size: u32) -> Self {
        Self { lba_size, ..self }
    }

    pub(super) fn open(&self, uid: u64, bounce: usize) -> io::Result<Namespace> {
        let Self { bytes, lba_size, backing } = self;
        if !lba_size.is_power_of_two() || !(512..=65536).contains(lba_size) {
            return Err(invalid(format!("block size {lba_size} is not a power of two from 512 to 65536")));
        }
        if *bytes == 0 || bytes % u64::from(*lba_size) != 0 {
            return Err(invalid(format!("namespace size {bytes} is not a multiple of the block size {lba_size}, or 0")));
        }
        let limit = if *backing == Backing::Memory { MAX_MEMORY } else { MAX_BYTES };
        if *bytes > limit {
            return Err(invalid(format!("namespace size {bytes} is above the limit of {limit} bytes")));
        }
        let store = match backing {
            Backing::Memory => Store::Memory(Memory::new(*bytes)),
            Backing::File(path) => {
                let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                let file =
                    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(named)?;
                let metadata = file.metadata().map_err(named)?;
                if metadata.is_file() && metadata.len() < *bytes {
                    file.set_len(*bytes).map_err(named)?;
                }
                Store::File(Disk::new(file, bounce))
            }
        };
        let lba_shift = lba_size.trailing_zeros();
        Ok(Namespace { lba_shift, blocks: bytes >> lba_shift, store, uid })
    }
}

/// Faults to inject, for the tests of drivers: what happens to I/O commands whose range holds the block, in any namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// The command is never completed (until it is aborted).
    pub drop_completion_lba: Option<u64>,
    /// The command fails with a media error.
    pub error_lba: Option<u64>,
    /// The completion names a command that nobody sent.
    pub bad_cid_lba: Option<u64>,
}

/// A controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Namespaces 1, 2, ...; at most 1024.
    pub namespaces: Vec<NamespaceConfig>,
    /// I/O submission queues, and as many completion queues: 1 to 2047.
    pub max_queues: u16,
    /// Entries of a queue at most, 2 to 65536.
    pub max_queue_entries: u32,
    /// Largest transfer as a power of two of 4 KiB pages: 1 to 9 (8 KiB to 2 MiB).
    pub mdts: u8,
    /// Serial number, up to 20 ASCII characters.
    pub serial: String,
    /// Model, up to 40 ASCII characters.
    pub model: String,
    /// Faults to inject.
    pub faults: Faults,
}

impl Default for Config {
    /// One disk of 1 GiB in memory.
    fn default() -> Self {
        Self {
            namespaces: vec![NamespaceConfig::memory(1 << 30)],
            max_queues: 64,
            max_queue_entries: 4096,
            mdts: 6,
            serial: "VFIOURING1".into(),
            model: "vfio-uring software NVMe".into(),
            faults: Faults::default(),
        }
    }
}

impl Config {
    /// Checks what does not depend on a namespace.
    pub(super) fn check(&self) -> io::Result<()> {
        if !(1..=1024).contains(&self.namespaces.len()) {
            return Err(invalid(format!("{} namespaces where 1 to 1024 are possible", self.namespaces.len())));
        }
        if !(1..=2047).contains(&self.max_queues) {
            return Err(invalid(format!("{} I/O queues where 1 to 2047 are possible", self.max_queues)));
        }
        if !(2..=65536).contains(&self.max_queue_entries) {
            return Err(invalid(format!("{} queue entries where 2 to 65536 are possible", self.max_queue_entries)));
        }
        if !(1..=9).contains(&self.mdts) {
            return Err(invalid(format!("mdts {} where 1 to 9 are possible", self.mdts)));
        }
        for (what, text, len) in [("serial number", &self.serial, 20), ("model", &self.model, 40)] {
            if text.len() > len || !text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
                return Err(invalid(format!("{what} {text:?} is longer than {len} characters or not ASCII")));
            }
        }
        Ok(())
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}
