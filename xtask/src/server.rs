//! The software NVMe controller that the host serves for the guest.

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

const READY: Duration = Duration::from_secs(20);

/// A running `vfio-uring serve nvme`, which ends with the value.
#[derive(Debug)]
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts it, in `folder`; returns once it can be connected to.
    ///
    /// # Errors
    /// When it does not start, or says nothing for 20 s.
    pub fn start(program: &Path, folder: &Path, socket: &str) -> Result<Self> {
        let path = folder.join(socket);
        // Of a run that was killed.
        let _ = fs::remove_file(&path);
        let mut child = Command::new(program)
            .args(["serve", "nvme", "--socket", socket, "--size", "256m"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let stdout = child.stdout.take();
        let server = Self { child, socket: path };
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let mut lines = stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines());
            let _ = tell.send(lines.next());
            // The rest is read and dropped, so that the pipe stays open.
            lines.for_each(drop);
        });
        match told.recv_timeout(READY) {
            Ok(Some(Ok(_))) => Ok(server),
            _ => bail!("vfio-uring serve nvme does not come up"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.socket);
    }
}
