//! `vfio-uring serve`.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    path::Path,
    process::ExitCode,
    thread,
};

use vfio_uring_models::{
    device::Device,
    edu,
    faults::{self, Form},
    igb::{self, Nic, Wire},
    nvme::{Backing, Config, Controller, NamespaceConfig},
    server::{Server, Socket, Stop},
};

use crate::{
    args::{FaultsArg, Mac, Model, Serve, ServeEdu, ServeIgb, ServeNvme, WireArg},
    bench::bytes,
    failure::{Failure, Result, print},
    signals,
};

/// Bytes in memory when nothing is said.
const DEFAULT_SIZE: u64 = 1 << 30;
/// Frames on the cable between two adapters, in each direction.
const CABLE: usize = 1024;

/// Serves a device until it is told to stop.
pub fn run(args: &Serve) -> Result<ExitCode> {
    match &args.model {
        Model::Nvme(args) => nvme(args),
        Model::Igb(args) => igb(args),
        Model::Edu(args) => edu(args),
    }
}

fn plain(error: io::Error) -> Failure {
    Failure::Failed(error.to_string())
}

fn nvme(args: &ServeNvme) -> Result<ExitCode> {
    args.check()?;
    let namespace = namespace(args)?;
    let place = match &namespace.backing {
        Backing::Memory => "memory".into(),
        Backing::File(path) => path.display().to_string(),
    };
    let (size, block) = (bytes(namespace.bytes as f64), namespace.lba_size);
    let controller = Controller::new(Config { namespaces: vec![namespace], ..Config::default() }).map_err(plain)?;
    let path = args.socket.display();
    let ready = format!(
        "serving an NVMe controller at vfio-user:{path}, {size} in {place} in blocks of {block} B; Ctrl-C ends it\n"
    );
    serve(vec![Seat::new(controller, &args.socket)?], &ready)
}

fn igb(args: &ServeIgb) -> Result<ExitCode> {
    args.check()?;
    let mut config = igb::Config::default();
    if let Some(Mac(mac)) = args.mac {
        config.mac = mac;
    }
    let mac = config.mac;
    let shown = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    let (path, mut seats) = (args.socket.display(), Vec::new());
    let ready = if let [WireArg::Peer(other)] = &args.wire[..] {
        let (one, two) = Wire::peers(CABLE).map_err(plain)?;
        let mut second = igb::Config::default().with_wire(two);
        second.mac = mac;
        second.mac[5] = mac[5].wrapping_add(1);
        let ready = format!(
            "serving network adapters at vfio-user:{path} ({}) and vfio-user:{} ({}) with a cable between them; Ctrl-C ends it\n",
            shown(mac),
            other.display(),
            shown(second.mac)
        );
        seats.push(Seat::new(Nic::new(config.with_wire(one)).map_err(plain)?, &args.socket)?);
        seats.push(Seat::new(Nic::new(second).map_err(plain)?, other)?);
        ready
    } else {
        let (wire, what) = wire(&args.wire).map_err(|error| Failure::Failed(format!("--wire: {error}")))?;
        seats.push(Seat::new(Nic::new(config.with_wire(wire)).map_err(plain)?, &args.socket)?);
        format!("serving a network adapter at vfio-user:{path} ({}), {what}; Ctrl-C ends it\n", shown(mac))
    };
    serve(seats, &ready)
}

fn edu(args: &ServeEdu) -> Result<ExitCode> {
    let (form, what) = match args.faults {
        None => (None, "without a fault queue"),
        Some(FaultsArg::TwoRegion) => (Some(Form::TwoRegion), "with a fault queue in two regions"),
        Some(FaultsArg::SingleRegion) => (Some(Form::Single), "with a fault queue in one region"),
    };
    let faults = form.map(faults::Config::new).transpose().map_err(plain)?;
    let server = edu::server(edu::Config { faults, ..edu::Config::default() }).map_err(plain)?;
    let ready = format!("serving an edu device at vfio-user:{}, {what}; Ctrl-C ends it\n", args.socket.display());
    serve(vec![Seat { server, socket: Socket::bind(&args.socket).map_err(plain)? }], &ready)
}

/// A wire, and what to say of it.
fn wire(args: &[WireArg]) -> io::Result<(Wire, String)> {
    let (mut read, mut write) = (None, None);
    for arg in args {
        match arg {
            WireArg::None | WireArg::Peer(_) => return Ok((Wire::Unplugged, "no cable".into())),
            WireArg::Sink => {}
            WireArg::Tap(name) => return Ok((Wire::tap(name)?, format!("cable to {name}"))),
            WireArg::Generator { size, flows, count } => {
                let what = format!("packets of {size} bytes in {flows} flows");
                return Ok((Wire::generator(*size, *flows, *count)?, what));
            }
            WireArg::PcapIn(path) => read = Some(path.as_path()),
            WireArg::PcapOut(path) => write = Some(path.as_path()),
        }
    }
    let shown = |path: Option<&Path>| path.map_or("nothing".into(), |path| path.display().to_string());
    match (read, write) {
        (None, None) => Ok((Wire::Sink, "packets go nowhere".into())),
        _ => Ok((Wire::pcap(read, write)?, format!("packets from {} and to {}", shown(read), shown(write)))),
    }
}

/// A device with its socket.
struct Seat<D> {
    server: Server<D>,
    socket: Socket,
}

impl<D: Device + Send> Seat<D> {
    fn new(device: D, path: &Path) -> Result<Self> {
        Ok(Self { server: Server::new(device).map_err(plain)?, socket: Socket::bind(path).map_err(plain)? })
    }

    fn run(&mut self) -> Result<()> {
        let Self { server, socket } = self;
        server.run(socket).map_err(|error| Failure::Failed(format!("serving at {}: {error}", socket.path().display())))
    }
}

/// Serves devices until they are told to stop, each in a thread.
fn serve<D: Device + Send>(mut seats: Vec<Seat<D>>, ready: &str) -> Result<ExitCode> {
    let stops: Vec<Stop> = seats.iter().map(|seat| seat.server.stop_handle()).collect();
    let all = stops.clone();
    signals::on_interrupt(move || all.iter().for_each(Stop::stop))?;
    match print(ready) {
        // It serves whether anybody reads this or not.
        Ok(()) | Err(Failure::Unheard) => {}
        Err(failure) => return Err(failure),
    }
    let run = |seat: &mut Seat<D>| {
        let result = seat.run();
        // One that fails takes the others with it.
        stops.iter().for_each(Stop::stop);
        result
    };
    thread::scope(|scope| {
        let mut seats = seats.iter_mut();
        let first = seats.next();
        let others: Vec<_> = seats.map(|seat| scope.spawn(|| run(seat))).collect();
        let mut result = first.map_or(Ok(()), run);
        for other in others {
            let other = other.join().unwrap_or_else(|_| Err(Failure::Failed("a server's thread panicked".into())));
            result = result.and(other);
        }
        result
    })?;
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
