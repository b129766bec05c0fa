//! Messages as a hostile vfio-user client sends them: any command with any payload and descriptors, before and after VERSION.

#![no_main]

use std::os::fd::OwnedFd;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vfio_uring::{
    dma::{HugePages, SharedMemory},
    transport::user::wire::{self, Header, command, flags},
};
use vfio_uring_models::{
    device::Device,
    nvme::{Config, Controller, NamespaceConfig},
    server::{NoChannel, Session},
};
use zerocopy::IntoBytes;

#[derive(Arbitrary, Debug)]
enum Step {
    Version { json: Option<Vec<u8>>, major: u16, minor: u16 },
    Raw { command: u16, no_reply: bool, payload: Vec<u8>, fds: u8 },
    Map { page: u8, pages: u8, flags: u8, fd: bool, offset: u8 },
    Unmap { page: u8, pages: u8, flags: u8 },
    RegionInfo { index: u8, argsz: u16 },
    SetIrqs { flags: u8, index: u8, start: u8, count: u8, data: Vec<u8>, fds: u8 },
    Access { write: bool, region: u8, offset: u16, count: u16, data: Vec<u8> },
    Service,
}

thread_local! {
    static MEMORY: OwnedFd = SharedMemory::create("client", 64 << 12, HugePages::No).expect("a memfd").0;
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (proper, steps) = input;
    let namespaces = vec![NamespaceConfig::memory(1 << 20)];
    let mut device = Controller::new(Config { namespaces, max_queues: 4, ..Config::default() }).expect("a controller");
    let mut session = Session::new();
    let send = |session: &mut Session, device: &mut Controller, number: u16, no_reply: bool, payload: &[u8], fds: u8| {
        let mut header = Header::command(0, number, payload.len());
        header.flags = (if no_reply { flags::NO_REPLY } else { 0 }).into();
        let fds = (0..fds % 18).map(|_| MEMORY.with(|fd| fd.try_clone().expect("a descriptor"))).collect();
        if let Some(reply) = session.handle(&header, payload, fds, device, &mut NoChannel) {
            assert!(!no_reply && reply.header.is_reply());
            assert_eq!(reply.header.size.get() as usize, wire::HEADER_SIZE + reply.payload.len());
            assert!(reply.header.error().is_none() || reply.payload.is_empty());
        }
    };
    if proper {
        let version = wire::Version { major: 0.into(), minor: 0.into() };
        send(&mut session, &mut device, command::VERSION, false, version.as_bytes(), 0);
    }
    for step in steps.iter().take(64) {
        let (number, no_reply, payload, fds) = match step {
            Step::Version { json, major, minor } => {
                let version = wire::Version { major: (*major).into(), minor: (*minor).into() };
                let json = json.as_deref().unwrap_or_default();
                (command::VERSION, false, [version.as_bytes(), json].concat(), 0)
            }
            Step::Raw { command, no_reply, payload, fds } => (command % 20, *no_reply, payload.clone(), *fds),
            Step::Map { page, pages, flags, fd, offset } => {
                let map = wire::DmaMap {
                    argsz: 32.into(),
                    flags: u32::from(*flags).into(),
                    offset: (u64::from(*offset) << 12).into(),
                    address: (u64::from(*page) << 12).into(),
                    size: (u64::from(*pages) << 12).into(),
                };
                (command::DMA_MAP, false, map.as_bytes().to_vec(), u8::from(*fd))
            }
            Step::Unmap { page, pages, flags } => {
                let unmap = wire::DmaUnmap {
                    argsz: 24.into(),
                    flags: u32::from(*flags).into(),
                    address: (u64::from(*page) << 12).into(),
                    size: (u64::from(*pages) << 12).into(),
                };
                (command::DMA_UNMAP, false, unmap.as_bytes().to_vec(), 0)
            }
            Step::RegionInfo { index, argsz } => {
                let info = wire::RegionInfo {
                    argsz: u32::from(*argsz).into(),
                    index: u32::from(*index).into(),
                    ..Default::default()
                };
                (command::DEVICE_GET_REGION_INFO, false, info.as_bytes().to_vec(), 0)
            }
            Step::SetIrqs { flags, index, start, count, data, fds } => {
                let irqs = wire::SetIrqs {
                    argsz: (20 + data.len() as u32).into(),
                    flags: u32::from(*flags).into(),
                    index: u32::from(*index).into(),
                    start: u32::from(*start).into(),
                    count: u32::from(*count).into(),
                };
                (command::DEVICE_SET_IRQS, false, [irqs.as_bytes(), data].concat(), *fds)
            }
            Step::Access { write, region, offset, count, data } => {
                let access = wire::RegionAccess {
                    offset: u64::from(*offset).into(),
                    region: u32::from(*region).into(),
                    count: u32::from(*count).into(),
                };
                let number = if *write { command::REGION_WRITE } else { command::REGION_READ };
                let data: &[u8] = if *write { data } else { &[] };
                (number, false, [access.as_bytes(), data].concat(), 0)
            }
            Step::Service => {
                device.service(&mut session.host(&mut NoChannel));
                continue;
            }
        };
        send(&mut session, &mut device, number, no_reply, &payload, fds);
    }
});
