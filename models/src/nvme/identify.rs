//! Identify (section 5.15).

use super::{
    Controller, IDENTITY, VERSION,
    events::LIMIT,
    features::WARNING_TEMPERATURE,
    io::Namespace,
    log::{ERROR_ENTRIES, FIRMWARE},
    spec::{Sqe, Status},
};
use crate::device::Host;

const SIZE: usize = 4096;
type Page = Box<[u8; SIZE]>;

/// Values of CNS.
mod cns {
    pub const NAMESPACE: u8 = 0x00;
    pub const CONTROLLER: u8 = 0x01;
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
}

impl Controller {
    pub(super) fn identify(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<u32, Status> {
        let page = match sqe.dword(10) as u8 {
            cns::NAMESPACE => {
                let namespace = self.nvm.namespace(sqe.nsid())?;
                identify_namespace(namespace)
            }
            cns::CONTROLLER => self.identify_controller(),
            cns::ACTIVE_NAMESPACES => self.active_namespaces(sqe.nsid())?,
            cns::NAMESPACE_DESCRIPTORS => descriptors(self.nvm.namespace(sqe.nsid())?),
            _ => return Err(Status::INVALID_FIELD),
        };
        self.give(sqe, &page[..], host)?;
        Ok(0)
    }

    /// Figure 251 of NVMe 1.4.
    fn identify_controller(&self) -> Page {
        let mut page = Box::new([0; SIZE]);
        put(&mut page, 0, &IDENTITY.vendor.to_le_bytes());
        put(&mut page, 2, &IDENTITY.vendor.to_le_bytes());
        text(&mut page[4..24], &self.config.serial);
        text(&mut page[24..64], &self.config.model);
        put(&mut page, 64, FIRMWARE);
        page[77] = self.config.mdts;
        put(&mut page, 80, &VERSION.to_le_bytes());
        // An I/O controller.
        page[111] = 1;
        // Abort commands at once, less 1.
        page[258] = 3;
        page[259] = LIMIT as u8 - 1;
        // One firmware slot, read-only.
        page[260] = 1 << 1 | 1;
        // Log pages: commands supported and effects, offsets.
        page[261] = 1 << 1 | 1 << 2;
        page[262] = ERROR_ENTRIES as u8 - 1;
        put(&mut page, 266, &WARNING_TEMPERATURE.to_le_bytes());
        put(&mut page, 268, &(WARNING_TEMPERATURE + 10).to_le_bytes());
        // Queue entries of 64 and 16 bytes.
        page[512] = 0x66;
        page[513] = 0x44;
        put(&mut page, 516, &(self.nvm.namespaces.len() as u32).to_le_bytes());
        // Compare, dataset management, write zeroes.
        put(&mut page, 520, &(1u16 | 1 << 2 | 1 << 3).to_le_bytes());
        // Flush of all namespaces is supported; a volatile cache where a file is behind a namespace.
        page[525] = 3 << 1 | u8::from(self.volatile_cache);
        // SGLs of any alignment, longer than the data where they like.
        put(&mut page, 536, &(1u32 | 1 << 18).to_le_bytes());
        let name = format!("nqn.2014-08.org.nvmexpress:{:04x}{:04x}", IDENTITY.vendor, IDENTITY.vendor);
        let name = format!("{name}{:<20}{:<40}", self.config.serial, self.config.model);
        put(&mut page, 768, name.as_bytes());
        // Power state 0: 25 W.
        put(&mut page, 2048, &2500u16.to_le_bytes());
        page
    }

    fn active_namespaces(&self, after: u32) -> Result<Page, Status> {
        if after >= 0xffff_fffe {
            return Err(Status::INVALID_NAMESPACE);
        }
        let mut page = Box::new([0; SIZE]);
        let ids = after + 1..=self.nvm.namespaces.len() as u32;
        for (entry, nsid) in page.chunks_exact_mut(4).zip(ids) {
            entry.copy_from_slice(&nsid.to_le_bytes());
        }
        Ok(page)
    }
}

/// Figure 249 of NVMe 1.4.
fn identify_namespace(namespace: &Namespace) -> Page {
    let mut page = Box::new([0; SIZE]);
    for at in [0, 8, 16] {
        put(&mut page, at, &namespace.blocks.to_le_bytes());
    }
    // Thin provisioned; deallocated blocks read as zeroes.
    page[24] = 1;
    page[33] = 1 | 1 << 3;
    put(&mut page, 104, &guid(namespace));
    put(&mut page, 120, &eui(namespace));
    // LBA format 0, the only one.
    page[130] = namespace.lba_shift as u8;
    page
}

/// Figure 256 of NVMe 1.4: EUI-64 and NGUID.
fn descriptors(namespace: &Namespace) -> Page {
    let mut page = Box::new([0; SIZE]);
    put(&mut page, 0, &[1, 8, 0, 0]);
    put(&mut page, 4, &eui(namespace));
    put(&mut page, 12, &[2, 16, 0, 0]);
    put(&mut page, 16, &guid(namespace));
    page
}

/// A locally administered identifier, in big-endian order as EUI-64 is.
fn eui(namespace: &Namespace) -> [u8; 8] {
    (0x0200_0000_0000_0000 | u64::from(std::process::id()) << 24 | namespace.uid & 0xff_ffff).to_be_bytes()
}

fn guid(namespace: &Namespace) -> [u8; 16] {
    let mut guid = [0; 16];
    guid[0] = 0x02;
    guid[8..].copy_from_slice(&eui(namespace));
    guid
}

fn put(page: &mut [u8; SIZE], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

/// ASCII, padded with spaces.
fn text(to: &mut [u8], text: &str) {
    to.fill(b' ');
    for (to, byte) in to.iter_mut().zip(text.bytes()) {
        *to = byte;
    }
}
