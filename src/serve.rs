//! `vfio-uring serve`.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    path::Path,
    process::ExitCode,
};

use vfio_uring_models::{
    nvme::{Backing, Config, Controller, NamespaceConfig},
    server::{Server, Socket},
};

use crate::{
    args::{Model, Serve, ServeNvme},
    bench::bytes,
    failure::{Failure, Result, print},
    signals,
};

/// Bytes in memory when nothing is said.
const DEFAULT_SIZE: u64 = 1 << 30;

/// Serves a device until it is told to stop.
pub fn run(args: &Serve) -> Result<ExitCode> {
    let Model::Nvme(args) = &args.model;
    args.check()?;
    let namespace = namespace(args)?;
    let place = match &namespace.backing {
        Backing::Memory => "memory".into(),
        Backing::File(path) => path.display().to_string(),
    };
    let (size, block) = (bytes(namespace.bytes as f64), namespace.lba_size);
    let plain = |error: io::Error| Failure::Failed(error.to_string());
    let controller = Controller::new(Config { namespaces: vec![namespace], ..Config::default() }).map_err(plain)?;
    let mut server = Server::new(controller).map_err(plain)?;
    let socket = Socket::bind(&args.socket).map_err(plain)?;
    let stop = server.stop_handle();
    signals::on_interrupt(move || stop.stop())?;
    let path = args.socket.display();
    let ready = format!(
        "serving an NVMe controller at vfio-user:{path}, {size} in {place} in blocks of {block} B; Ctrl-C ends it\n"
    );
    match print(&ready) {
        // It serves whether anybody reads this or not.
        Ok(()) | Err(Failure::Unheard) => {}
        Err(failure) => return Err(failure),
    }
    server.run(&socket).map_err(|error| Failure::Failed(format!("serving at {path}: {error}")))?;
    Ok(ExitCode::SUCCESS)
}

fn namespace(args: &ServeNvme) -> Result<NamespaceConfig> {
    let namespace = match (&args.file, args.size) {
        (None, size) => NamespaceConfig::memory(size.unwrap_or(DEFAULT_SIZE)),
        (Some(file), Some(size)) => NamespaceConfig::file(file, size),
        (Some(file), None) => {
            let held = file_size(file).map_err(|error| {
                let remedy = if error.kind() == io::ErrorKind::NotFound { "; with --size it is made" } else { "" };
                Failure::Failed(format!("--file {}: {error}{remedy}", file.display()))
            })?;
            let whole = held - held % u64::from(args.lba_size);
            if whole == 0 {
                let file = file.display();
                return Err(Failure::Failed(format!("--file {file}: it has no whole block; give it a length with --size")));
            }
            NamespaceConfig::file(file, whole)
        }
    };
    Ok(namespace.with_lba_size(args.lba_size))
}

/// Of a block device, too.
fn file_size(path: &Path) -> io::Result<u64> {
    File::open(path)?.seek(SeekFrom::End(0))
}
