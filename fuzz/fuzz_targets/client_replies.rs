//! Messages as a hostile vfio-user server sends them: headers, VERSION, replies and commands of its own.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_uring::transport::user::{
    protocol::{self, Expect},
    wire::{self, Header, RegionAccess},
};
use zerocopy::FromBytes;

fuzz_target!(|input: (u8, u16, u16, Vec<u8>)| {
    let (fds, min, max, message) = input;
    let _ = protocol::negotiate(&message, 64);
    let _ = protocol::parse_device_info(&message);
    let _ = protocol::parse_irq_info(&message, u32::from(min));
    let _ = protocol::parse_dma_unmap(&message, u64::from(min) << 12, u64::from(max) << 12);
    let Ok((header, payload)) = Header::read_from_prefix(&message) else { return };
    let expect = Expect::between(header.command.get(), min.into(), max.into(), usize::from(fds & 15));
    if let Ok(accepted) = protocol::accept_reply(&header, &expect, fds.into()) {
        // What is accepted stays within what was asked for.
        let _ = accepted;
        assert!(header.size.get() as usize <= wire::HEADER_SIZE + usize::from(max));
    }
    if protocol::accept_command(&header).is_ok() {
        let _ = protocol::parse_command(&header, payload, fds.into());
    }
    let asked = RegionAccess { offset: u64::from(min).into(), region: 0.into(), count: u32::from(max).into() };
    if let Ok(data) = protocol::parse_region_access(payload, &asked, wire::command::REGION_READ) {
        assert_eq!(data.len(), usize::from(max));
    }
});
