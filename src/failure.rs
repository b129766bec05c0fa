//! How the command fails: one line on stderr and an exit status.

use std::io::{self, Write};

/// Why the command ends early.
#[derive(Debug)]
pub enum Failure {
    /// The command line can't be carried out: exit status 2.
    Usage(String),
    /// Something went wrong: exit status 1.
    Failed(String),
    /// Nobody reads what is printed any more: nothing to say.
    Unheard,
}

pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    pub fn new(text: impl Into<String>) -> Self {
        Self::Failed(text.into())
    }
}

impl From<vfio_uring::Error> for Failure {
    fn from(error: vfio_uring::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<vfio_uring_nvme::Error> for Failure {
    fn from(error: vfio_uring_nvme::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<vfio_uring_igb::Error> for Failure {
    fn from(error: vfio_uring_igb::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Prints on stdout.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::Unheard),
        Err(error) => Err(Failure::Failed(format!("writing to the standard output: {error}"))),
    }
}

/// Prints a line on stderr; if nobody reads it, so be it.
pub fn print_aside(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
