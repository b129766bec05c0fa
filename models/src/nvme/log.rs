//! Get Log Page (section 5.14).

use std::collections::VecDeque;

use super::{
    Controller,
    features::WARNING_TEMPERATURE,
    spec::{NSID_ALL, Sqe, Status, admin, nvm},
};
use crate::device::Host;

/// Entries of the error log (ELPE + 1).
pub(super) const ERROR_ENTRIES: usize = 16;
const ENTRY: usize = 64;
/// Firmware revision, 8 characters.
pub(super) const FIRMWARE: &[u8; 8] = b"1.0     ";
/// Composite temperature, in Kelvin.
const TEMPERATURE: u16 = 313;

/// The error log, newest entry first.
#[derive(Debug, Default)]
pub(super) struct ErrorLog {
    count: u64,
    entries: VecDeque<[u8; ENTRY]>,
}

impl ErrorLog {
    #[cold]
    pub fn add(&mut self, sq: u16, sqe: &Sqe, status: Status) {
        self.count += 1;
        let mut entry = [0; ENTRY];
        entry[0..8].copy_from_slice(&self.count.to_le_bytes());
        entry[8..10].copy_from_slice(&sq.to_le_bytes());
        entry[10..12].copy_from_slice(&sqe.cid().to_le_bytes());
        entry[12..14].copy_from_slice(&(status.0 << 1).to_le_bytes());
        entry[14..16].copy_from_slice(&u16::MAX.to_le_bytes());
        entry[16..24].copy_from_slice(&sqe.lba().to_le_bytes());
        entry[24..28].copy_from_slice(&sqe.nsid().to_le_bytes());
        self.entries.truncate(ERROR_ENTRIES - 1);
        self.entries.push_front(entry);
    }

    fn page(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.entries.iter().flatten().copied().collect();
        page.resize(ERROR_ENTRIES * ENTRY, 0);
        page
    }
}

impl Controller {
    pub(super) fn get_log_page(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<u32, Status> {
        let (dword10, dword11) = (sqe.dword(10), sqe.dword(11));
        let len = ((u64::from(dword11 & 0xffff) << 16 | u64::from(dword10 >> 16)) + 1) * 4;
        let offset = u64::from(sqe.dword(13)) << 32 | u64::from(sqe.dword(12));
        let retain = dword10 >> 15 & 1 != 0;
        let mut page = match dword10 as u8 {
            0x01 => self.errors.page(),
            0x02 if matches!(sqe.nsid(), 0 | NSID_ALL) => self.smart().to_vec(),
            0x02 => return Err(Status::INVALID_FIELD),
            0x03 => firmware_slots().to_vec(),
            // No namespace ever changes.
            0x04 => vec![0; 4096],
            0x05 => effects().to_vec(),
            _ => return Err(Status::LOG_PAGE_INVALID),
        };
        if len > self.nvm.max_transfer || offset & 3 != 0 || offset > page.len() as u64 {
            return Err(Status::INVALID_FIELD);
        }
        page.drain(..offset as usize);
        page.resize(len as usize, 0);
        self.give(sqe, &page, host)?;
        if dword10 as u8 == 0x01 && !retain {
            self.events.unmask();
        }
        Ok(0)
    }

    /// SMART / health information (section 5.14.1.2).
    fn smart(&self) -> [u8; 512] {
        let mut page = [0; 512];
        let counters = &self.nvm.counters;
        let mut put = |at: usize, value: u64| page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        // In thousands of 512 bytes, rounded up.
        put(32, counters.bytes_read.div_ceil(512_000));
        put(48, counters.bytes_written.div_ceil(512_000));
        put(64, counters.reads);
        put(80, counters.writes);
        put(112, 1);
        put(128, self.started.elapsed().as_secs() / 3600);
        put(176, self.errors.count);
        page[1..3].copy_from_slice(&TEMPERATURE.to_le_bytes());
        page[3] = 100;
        page[4] = 10;
        const { assert!(TEMPERATURE < WARNING_TEMPERATURE) };
        page
    }
}

/// Firmware slot information (section 5.14.1.3): slot 1 is active.
fn firmware_slots() -> [u8; 512] {
    let mut page = [0; 512];
    page[0] = 1;
    page[8..16].copy_from_slice(FIRMWARE);
    page
}

/// Commands supported and effects (section 5.14.1.5).
fn effects() -> [u8; 4096] {
    let mut page = [0; 4096];
    for opcode in admin::ALL {
        page[usize::from(opcode) * 4] = 1;
    }
    for opcode in nvm::ALL {
        let changes_content = matches!(opcode, nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT);
        page[1024 + usize::from(opcode) * 4] = 1 | u8::from(changes_content) << 1;
    }
    page
}
