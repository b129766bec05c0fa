//! An initramfs: a cpio archive of the format "newc", as the kernel's `Documentation/driver-api/early-userspace/buffer-format`
//! has it.

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
/// The entry that ends the archive.
const TRAILER: &str = "TRAILER!!!";

/// Writes an archive; what is above a file is made with it.
#[derive(Debug)]
pub struct Archive<W> {
    to: W,
    made: BTreeSet<String>,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub fn new(to: W) -> Self {
        Self { to, made: BTreeSet::new(), inode: 0 }
    }

    /// A folder; a path has no slash in front.
    ///
    /// # Errors
    /// When it can't be written; so for all others.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        if path.is_empty() || !self.made.insert(path.into()) {
            return Ok(());
        }
        self.above(path)?;
        self.entry(path, DIRECTORY | 0o755, &[], 0)
    }

    /// A file.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.above(path)?;
        self.entry(path, FILE | permissions, content, 0)
    }

    /// A character device: the kernel opens `dev/console` before anything can mount a `/dev`.
    pub fn device(&mut self, path: &str, permissions: u32, (major, minor): (u8, u8)) -> io::Result<()> {
        self.above(path)?;
        self.entry(path, CHARACTER | permissions, &[], u32::from(major) << 16 | u32::from(minor))
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = u32::MAX;
        self.entry(TRAILER, 0, &[], 0)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn above(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((folder, _)) => self.directory(folder),
            None => Ok(()),
        }
    }

    /// `device`: the major number in the upper half.
    fn entry(&mut self, path: &str, mode: u32, content: &[u8], device: u32) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{path} is larger than 4 GiB")))?;
        self.inode = self.inode.wrapping_add(1);
        // inode, mode, user, group, links, time, size, device of the file system, device, length of the name, checksum.
        let (major, minor) = (device >> 16, device & 0xffff);
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, path.len() as u32 + 1, 0];
        let mut head = String::from("070701");
        for field in fields {
            head += &format!("{field:08x}");
        }
        head += path;
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(content)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.to.write_all(&[0; 3][..bytes.len().wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode, content and device of each entry.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>, u32)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| u32::from_str_radix(str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap(), 16).unwrap();
            let (mode, size, name) = (field(1), field(6) as usize, field(11) as usize);
            let body = (110 + name).next_multiple_of(4);
            let path = str::from_utf8(&bytes[110..110 + name - 1]).unwrap().to_string();
            assert_eq!(bytes[110 + name - 1], 0);
            if path == TRAILER {
                assert_eq!(bytes.len(), body);
                return entries;
            }
            entries.push((path, mode, bytes[body..body + size].to_vec(), field(9) << 16 | field(10)));
            bytes = &bytes[(body + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn an_archive_reads_back() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/prog", 0o755, b"12345").unwrap();
        archive.file("a/empty", 0o644, b"").unwrap();
        archive.directory("a").unwrap();
        archive.device("dev/console", 0o600, (5, 1)).unwrap();
        let bytes = archive.finish().unwrap();
        let entry = |path: &str, mode, content: &[u8], device| (path.to_string(), mode, content.to_vec(), device);
        let expected = [
            entry("a", 0o040_755, b"", 0),
            entry("a/b", 0o040_755, b"", 0),
            entry("a/b/prog", 0o100_755, b"12345", 0),
            entry("a/empty", 0o100_644, b"", 0),
            entry("dev", 0o040_755, b"", 0),
            entry("dev/console", 0o020_600, b"", 0x5_0001),
        ];
        assert_eq!(entries(&bytes), expected);
    }
}
