//! The physical function under Linux, and a host behind a virtual function that answers it.

use std::{fs, io, path::PathBuf, process::Command, thread};

use futures::channel::oneshot;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink, recv, sendto, socket_with,
};
use vfio_uring_igb::{Error, Packet, Result, RxQueue, TxQueue};

/// Linux's address, and that of the host.
pub const LINUX: &str = "192.0.2.1";
pub const HOST: [u8; 4] = [192, 0, 2, 2];
/// Where the host listens, and sends UDP packets back.
pub const ECHO: u16 = 7;
/// Bytes of the headers of a UDP packet on Ethernet.
pub const HEADERS: usize = 14 + 20 + 8;

/// The interface of the physical function.
pub struct Interface {
    pub name: String,
    index: u32,
    /// Where its device is.
    device: PathBuf,
}

impl Interface {
    /// That of the virtual function at this address.
    pub fn of(vf: &str) -> Self {
        let folder = format!("/sys/bus/pci/devices/{vf}/physfn/net");
        let entry = fs::read_dir(&folder).unwrap().next().unwrap().unwrap();
        let name = entry.file_name().into_string().unwrap();
        let value = |what| fs::read_to_string(entry.path().join(what)).unwrap().trim().to_string();
        let index = value("ifindex").parse().unwrap();
        let device = fs::canonicalize(format!("/sys/bus/pci/devices/{vf}/physfn")).unwrap();
        Self { name, index, device }
    }

    /// `ip link set NAME vf N mac MAC`, which BusyBox does not have: a request to rtnetlink.
    pub fn set_vf_mac(&self, vf: u32, mac: [u8; 6]) {
        const IFLA_VFINFO_LIST: u16 = 22;
        const IFLA_VF_INFO: u16 = 1;
        const IFLA_VF_MAC: u16 = 1;
        const RTM_SETLINK: u16 = 19;
        const REQUEST_ACK: u16 = 5;
        let mut value = vf.to_ne_bytes().to_vec();
        value.extend(mac);
        value.resize(36, 0);
        let list = attribute(IFLA_VFINFO_LIST, &attribute(IFLA_VF_INFO, &attribute(IFLA_VF_MAC, &value)));
        let mut message = ((32 + list.len()) as u32).to_ne_bytes().to_vec();
        message.extend([RTM_SETLINK.to_ne_bytes(), REQUEST_ACK.to_ne_bytes()].concat());
        // Sequence number, sender; then family and type, index, flags and their mask.
        message.extend([0; 12]);
        message.extend(self.index.to_ne_bytes());
        message.extend([0; 8]);
        message.extend(list);
        // Protocol 0 is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap();
        sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0)).unwrap();
        let mut answer = [0; 512];
        let (len, _) = recv(&socket, &mut answer, RecvFlags::empty()).unwrap();
        let error = answer.get(16..20).filter(|_| len >= 20).map(|bytes| i32::from_ne_bytes(bytes.try_into().unwrap()));
        assert_eq!(error, Some(0), "the kernel sets the MAC address of virtual function {vf}");
    }

    /// Has its virtual functions go; waits for who uses them.
    pub fn without_vfs(&self) -> impl FnOnce() -> io::Result<()> + Send + use<> {
        let count = self.device.join("sriov_numvfs");
        move || fs::write(count, "0")
    }

    /// Has them come again, for vfio-pci.
    pub fn with_vfs(&self, vfs: &[String]) {
        fs::write(self.device.join("sriov_numvfs"), vfs.len().to_string()).unwrap();
        for vf in vfs {
            fs::write(format!("/sys/bus/pci/devices/{vf}/driver_override"), "vfio-pci").unwrap();
            fs::write("/sys/bus/pci/drivers_probe", vf).unwrap();
        }
    }

    pub fn set_up(&self, up: bool) {
        let how = if up { "up" } else { "down" };
        assert!(Command::new("ip").args(["link", "set", &self.name, how]).status().unwrap().success());
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = [(len as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

/// Runs what blocks on a thread of its own.
pub async fn blocking<T: Send + 'static>(what: impl FnOnce() -> io::Result<T> + Send + 'static) -> T {
    let (done, result) = oneshot::channel();
    let thread = thread::spawn(move || done.send(what()).is_ok());
    let result = result.await.expect("the thread does not panic");
    thread.join().unwrap();
    result.unwrap()
}

/// A host at [`HOST`]: it answers ARP, ping and UDP.
pub struct Host {
    pub mac: [u8; 6],
    pub rx: RxQueue,
    pub tx: TxQueue,
    /// What it has answered.
    pub pings: u64,
    pub echoes: u64,
    /// Packets for groups, by their address.
    pub groups: Vec<[u8; 6]>,
    /// Echoed packets whose content was not as [`content`] has it.
    pub wrong: u64,
}

impl Host {
    pub fn new(mac: [u8; 6], (rx, tx): (RxQueue, TxQueue)) -> Self {
        Self { mac, rx, tx, pings: 0, echoes: 0, groups: Vec::new(), wrong: 0 }
    }

    /// Until it is dropped, or the queue ends.
    pub async fn serve(&mut self) -> Error {
        loop {
            if let Err(error) = self.serve_one().await {
                return error;
            }
        }
    }

    async fn serve_one(&mut self) -> Result<()> {
        let packet = self.rx.recv().await?;
        if packet.data()[0] & 1 != 0 && packet.data()[..6] != [0xff; 6] {
            self.groups.push(packet.data()[..6].try_into().unwrap());
        }
        let Some(answer) = self.answer(packet) else { return Ok(()) };
        self.tx.ready().await?;
        self.tx.send(answer).unwrap();
        Ok(())
    }

    /// The answer is in the buffers of the packet itself.
    fn answer(&mut self, mut packet: Packet) -> Option<Packet> {
        if packet.len() < HEADERS {
            return None;
        }
        let len = packet.len();
        let bytes: Vec<u8> = packet.segments().flatten().copied().collect();
        let mac = self.mac;
        let data = packet.data_mut();
        match (u16::from_be_bytes([bytes[12], bytes[13]]), bytes[23]) {
            // ARP: who has our address?
            (0x0806, _) if bytes[20..22] == [0, 1] && bytes[38..42] == HOST => {
                data[21] = 2;
                data[22..28].copy_from_slice(&mac);
                data[28..32].copy_from_slice(&HOST);
                data[32..42].copy_from_slice(&bytes[22..32]);
            }
            (0x0800, protocol) if bytes[30..34] == HOST && bytes[..6] == mac => {
                data[26..30].copy_from_slice(&HOST);
                data[30..34].copy_from_slice(&bytes[26..30]);
                match protocol {
                    1 if bytes[34] == 8 => {
                        // A reply is of type 0, not 8: the checksum is larger by that.
                        let sum = u32::from(u16::from_be_bytes([bytes[36], bytes[37]])) + 0x800;
                        data[34] = 0;
                        data[36..38].copy_from_slice(&((sum + (sum >> 16)) as u16).to_be_bytes());
                        self.pings += 1;
                    }
                    17 if bytes[36..38] == ECHO.to_be_bytes() => {
                        // The ports change places, which no checksum sees.
                        data[34..36].copy_from_slice(&bytes[36..38]);
                        data[36..38].copy_from_slice(&bytes[34..36]);
                        let end = 34 + usize::from(u16::from_be_bytes([bytes[38], bytes[39]]));
                        self.wrong += u64::from(end > len || !is_content(&bytes[HEADERS..end.min(len)]));
                        self.echoes += 1;
                    }
                    _ => return None,
                }
            }
            _ => return None,
        }
        data[..6].copy_from_slice(&bytes[6..12]);
        data[6..12].copy_from_slice(&mac);
        Some(packet)
    }
}

/// What the packet of this number has in it.
pub fn content(number: u64, len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(number);
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.extend(std::iter::repeat_with(|| random.u8(..)).take(len - 8));
    bytes
}

pub fn is_content(bytes: &[u8]) -> bool {
    let Some((number, _)) = bytes.split_first_chunk() else { return false };
    content(u64::from_le_bytes(*number), bytes.len()) == bytes
}
