//! The software devices that the host serves for the guest.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::machine::{NIC_SOCKETS, SOCKET};

const READY: Duration = Duration::from_secs(20);

/// A running `vfio-uring serve`, which ends with the value.
#[derive(Debug)]
pub struct Server {
    child: Child,
    sockets: Vec<PathBuf>,
}

impl Server {
    /// Starts an NVMe controller, in `folder`; returns once it can be connected to.
    ///
    /// # Errors
    /// When it does not start, or says nothing for 20 s.
    pub fn nvme(program: &Path, folder: &Path) -> Result<Self> {
        Self::start(program, folder, &["nvme", "--socket", SOCKET, "--size", "256m"], &[SOCKET])
    }

    /// Starts two igb network cards with a cable between them.
    ///
    /// # Errors
    /// As of [`Server::nvme`].
    pub fn igb(program: &Path, folder: &Path) -> Result<Self> {
        let [one, other] = NIC_SOCKETS;
        Self::start(program, folder, &["igb", "--socket", one, "--wire", &format!("peer:{other}")], &NIC_SOCKETS)
    }

    fn start(program: &Path, folder: &Path, arguments: &[&str], sockets: &[&str]) -> Result<Self> {
        let sockets: Vec<_> = sockets.iter().map(|socket| folder.join(socket)).collect();
        // Of a run that was killed.
        sockets.iter().for_each(|path| drop(fs::remove_file(path)));
        let mut child = Command::new(program)
            .arg("serve")
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let stdout = child.stdout.take();
        let server = Self { child, sockets };
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut lines = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines());
            let _ = tell.send(lines.next());
            // The rest is read and dropped, so that the pipe stays open.
            lines.for_each(drop);
        });
        match told.recv_timeout(READY) {
            Ok(Some(Ok(_))) => Ok(server),
            _ => bail!("vfio-uring serve {} does not come up", arguments.join(" ")),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.sockets.iter().for_each(|path| drop(fs::remove_file(path)));
    }
}
