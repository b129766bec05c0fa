//! The socket in the file system.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, fchmod},
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with},
};

/// Clients that may wait to be let in.
const BACKLOG: i32 = 128;

/// A listening Unix socket whose file goes when it does.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that only our own file is removed.
    file: (u64, u64),
}

impl Socket {
    /// Listens at `path`, for this user alone (mode 0600). The file of a server that is gone is replaced.
    ///
    /// # Errors
    /// A live server there, a file that is no socket, or a path that can't be used; the text names the path and the reason.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let named = |error: io::Error| io::Error::new(error.kind(), format!("can't listen at {}: {error}", path.display()));
        let listener = match listen_at(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                make_way(path).map_err(named)?;
                listen_at(path)
            }
            other => other,
        };
        let listener = listener.map_err(named)?;
        let metadata = fs::symlink_metadata(path).map_err(named)?;
        Ok(Self { listener, path: path.into(), file: (metadata.dev(), metadata.ino()) })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it listens with.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A listener whose file is for this user alone, from the start.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file takes the mode of the socket, less the umask.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Removes the socket of a server that is gone.
fn make_way(path: &Path) -> io::Result<()> {
    let exists = |what: &str| Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return exists("there is a file that is not a socket; remove it, or choose another path");
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path),
        Ok(()) | Err(Errno::AGAIN) => exists("another server listens there; stop it, or choose another path"),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path).unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(error.contains("another server"), "{error}");
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "text").unwrap();
        let error = Socket::bind(&path).unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert!(Socket::bind(dir.path().join("no/socket")).unwrap_err().to_string().contains("no/socket"));
        assert!(Socket::bind(dir.path().join("x".repeat(200))).is_err());
    }

    #[test]
    fn the_file_of_another_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "text").unwrap();
        drop(socket);
        assert!(path.exists());
    }
}
