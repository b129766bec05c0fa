//! A server in a thread of its own.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, JoinHandle},
};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::{Server, Socket, Stats, Stop};
use crate::device::Device;

/// A server in a thread of its own, on a socket in a private directory. Dropping it stops the server and removes both.
#[derive(Debug)]
pub struct Running {
    path: PathBuf,
    stop: Stop,
    stats: Arc<Stats>,
    thread: Option<JoinHandle<io::Result<()>>>,
    _dir: tempfile::TempDir,
}

impl Running {
    /// Starts a server.
    ///
    /// # Errors
    /// When no directory, socket or thread is to be had.
    pub fn start<D: Device + Send + 'static>(server: Server<D>) -> io::Result<Self> {
        Self::start_on(server, None)
    }

    /// Starts a server whose thread stays on a core, where the kernel permits it.
    ///
    /// # Errors
    /// As of [`Running::start`].
    pub fn start_on<D: Device + Send + 'static>(mut server: Server<D>, core: Option<usize>) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("vfio-uring-").tempdir()?;
        let socket = Socket::bind(dir.path().join("socket"))?;
        let (path, stop, stats) = (socket.path().to_path_buf(), server.stop_handle(), server.stats());
        let thread = thread::Builder::new().name("vfio-user-server".into()).spawn(move || {
            if let Some(core) = core.filter(|&core| core < CpuSet::MAX_CPU) {
                let mut set = CpuSet::new();
                set.set(core);
                if let Err(error) = sched_setaffinity(None, &set) {
                    tracing::debug!("the server stays on no core: {error}");
                }
            }
            server.run(&socket)
        })?;
        Ok(Self { path, stop, stats, thread: Some(thread), _dir: dir })
    }

    /// Where clients connect.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The address for a client: `vfio-user:` and the path.
    pub fn address(&self) -> String {
        format!("vfio-user:{}", self.path.display())
    }

    /// What it has done so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Stops the server and waits for its end; its client sees the connection close.
    ///
    /// # Errors
    /// What ended the server before.
    pub fn stop(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        self.stop.stop();
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the server's thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!("the server ended with an error: {error}");
        }
    }
}
