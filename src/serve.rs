//! `vfio-uring serve`.

use std::process::ExitCode;

use crate::{
    args::{Model, Serve},
    failure::Result,
    signals::{INTERRUPTED, Interrupted},
};

/// Serves a device until it is told to stop.
pub fn run(args: &Serve) -> Result<ExitCode> {
    let Model::Nvme(args) = &args.model;
    let _ = (args, Interrupted::watch()?);
    Ok(ExitCode::from(INTERRUPTED))
}
