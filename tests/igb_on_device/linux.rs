//! The other end of the cable: a network interface of Linux, and raw packets on it.

use std::{
    fs,
    num::NonZeroU32,
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    sys::{
        socket::{LinkAddr, MsgFlags, bind, recv, send, setsockopt, sockopt},
        time::{TimeVal, TimeValLike},
    },
};
use rustix::net::{AddressFamily, Protocol, SocketType, socket};

/// An Ethernet type that is free for local experiments.
pub const ETHER_TYPE: u16 = 0x88b5;
/// Beyond this a receiver looks whether it is to end.
const PATIENCE_MS: i64 = 200;

/// A network interface.
#[derive(Debug, Clone)]
pub struct Interface {
    pub name: String,
    pub mac: [u8; 6],
    address: LinkAddr,
}

impl Interface {
    /// The interface of a PCI device. It is up afterwards, without IPv6, and takes long packets.
    pub fn of(bdf: &str) -> Self {
        let until = Instant::now() + Duration::from_secs(20);
        let name = loop {
            let entry = fs::read_dir(format!("/sys/bus/pci/devices/{bdf}/net")).ok().and_then(|mut all| all.next());
            match entry {
                Some(entry) => break entry.unwrap().file_name().into_string().unwrap(),
                None => assert!(Instant::now() < until, "{bdf} has no network interface: Linux's driver has to have it"),
            }
            thread::sleep(Duration::from_millis(100));
        };
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        // It goes down when the length changes.
        if read(&name, "mtu") != "9000" {
            command("ip", &["link", "set", &name, "mtu", "9000"]);
        }
        command("ip", &["link", "set", &name, "up"]);
        command("ip", &["addr", "flush", "dev", &name]);
        let of_packets = |address: &nix::ifaddrs::InterfaceAddress| {
            (address.interface_name == name).then(|| address.address.as_ref()?.as_link_addr().copied()).flatten()
        };
        let address = getifaddrs().unwrap().find_map(|address| of_packets(&address)).expect("a link address");
        Self { mac: address.addr().unwrap(), name, address }
    }

    /// Whether there is a link.
    pub fn has_link(&self) -> bool {
        read(&self.name, "carrier") == "1"
    }

    /// A socket for packets of our type.
    pub fn socket(&self) -> Socket {
        let protocol = NonZeroU32::new(ETHER_TYPE.to_be().into()).map(Protocol::from_raw);
        let fd = socket(AddressFamily::PACKET, SocketType::RAW, protocol).expect("raw packets need CAP_NET_RAW");
        setsockopt(&fd, sockopt::RcvBufForce, &(32 << 20)).unwrap();
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(PATIENCE_MS)).unwrap();
        bind(fd.as_raw_fd(), &self.address).unwrap();
        Socket(fd)
    }

    /// Gives it an address, or takes it away.
    pub fn ip(&self, verb: &str, address: &str) {
        command("ip", &["addr", verb, address, "dev", &self.name]);
    }

    /// What Linux has counted.
    pub fn counters(&self) -> String {
        let count = |name: &str| format!("{name} {}", read(&self.name, &format!("statistics/{name}")));
        ["rx_packets", "rx_dropped", "rx_errors", "rx_missed_errors", "tx_packets", "tx_dropped"].map(count).join(", ")
    }
}

fn read(interface: &str, file: &str) -> String {
    fs::read_to_string(format!("/sys/class/net/{interface}/{file}")).unwrap_or_default().trim().to_string()
}

/// Runs a program, which has to succeed; what it says.
pub fn command(program: &str, arguments: &[&str]) -> String {
    let (succeeded, said) = attempt(program, arguments);
    assert!(succeeded, "{program} {}: {said}", arguments.join(" "));
    said
}

/// Runs a program: whether it succeeds, and what it says.
pub fn attempt(program: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

/// A socket for raw packets.
pub struct Socket(OwnedFd);

impl Socket {
    /// Sends a packet; false: the queue or the link is not there at the moment.
    pub fn send(&self, packet: &[u8]) -> bool {
        match send(self.0.as_raw_fd(), packet, MsgFlags::empty()) {
            Ok(len) => len == packet.len(),
            Err(Errno::ENOBUFS | Errno::ENETDOWN | Errno::EAGAIN | Errno::EINTR) => false,
            Err(error) => panic!("sending: {error}"),
        }
    }

    /// Receives a packet's bytes, if one comes soon.
    pub fn recv<'a>(&self, room: &'a mut [u8]) -> Option<&'a [u8]> {
        match recv(self.0.as_raw_fd(), room, MsgFlags::empty()) {
            Ok(len) => room.get(..len),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENETDOWN) => None,
            Err(error) => panic!("receiving: {error}"),
        }
    }
}
