//! Opening a device.

use std::{
    io,
    time::{Duration, Instant},
};

use vfio_uring::{
    Error,
    device::{Address, Device, Options},
    reactor::sleep,
};

use crate::failure::{Failure, Result};

/// How long a server may take to see that the client before us is gone: the kernel closes the socket of a process that was
/// killed some time after its end.
const HANDOVER: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(20);

/// Opens the device at `address`.
pub async fn open(address: &Address) -> Result<Device> {
    open_with(address, Options::default()).await
}

/// [`open`], with options.
pub async fn open_with(address: &Address, options: Options) -> Result<Device> {
    let start = Instant::now();
    loop {
        match Device::open_with(address, options.clone()).await {
            Err(Error::Refused { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {
                if start.elapsed() > HANDOVER {
                    return Err(Failure::Failed(format!("{address} is busy: another client is using it")));
                }
                sleep(RETRY).await;
            }
            opened => return Ok(opened?),
        }
    }
}
