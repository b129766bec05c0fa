//! Get Features and Set Features (sections 5.14 and 5.21).

use super::{
    Controller,
    spec::{Sqe, Status},
};

mod id {
    pub const ARBITRATION: u8 = 0x01;
    pub const POWER_MANAGEMENT: u8 = 0x02;
    pub const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub const ERROR_RECOVERY: u8 = 0x05;
    pub const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub const NUMBER_OF_QUEUES: u8 = 0x07;
    pub const INTERRUPT_COALESCING: u8 = 0x08;
    pub const INTERRUPT_VECTOR: u8 = 0x09;
    pub const WRITE_ATOMICITY: u8 = 0x0a;
    pub const ASYNC_EVENTS: u8 = 0x0b;
}

/// Over temperature, in Kelvin.
pub(super) const WARNING_TEMPERATURE: u16 = 343;

/// The values of the features. Nothing is saved over a reset.
#[derive(Debug)]
pub(super) struct Features {
    arbitration: u32,
    over_temperature: u16,
    under_temperature: u16,
    error_recovery: u32,
    pub write_cache: bool,
    /// I/O queues that were granted, submission and completion.
    pub queues: (u16, u16),
    coalescing: u32,
    coalescing_disabled: Vec<bool>,
    write_atomicity: u32,
    async_events: u32,
}

impl Features {
    pub fn new(max_queues: u16, vectors: u16) -> Self {
        Self {
            arbitration: 0,
            over_temperature: WARNING_TEMPERATURE,
            under_temperature: 0,
            error_recovery: 0,
            write_cache: true,
            queues: (max_queues, max_queues),
            coalescing: 0,
            coalescing_disabled: vec![false; vectors.into()],
            write_atomicity: 0,
            async_events: 0,
        }
    }
}

impl Controller {
    pub(super) fn get_features(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let (value, features) = (sqe.dword(11), &self.features);
        Ok(match sqe.dword(10) as u8 {
            id::ARBITRATION => features.arbitration,
            id::POWER_MANAGEMENT => 0,
            id::TEMPERATURE_THRESHOLD => match threshold(value)? {
                Threshold::Over => features.over_temperature.into(),
                Threshold::Under => features.under_temperature.into(),
            },
            id::ERROR_RECOVERY => features.error_recovery,
            id::VOLATILE_WRITE_CACHE if self.volatile_cache => features.write_cache.into(),
            id::NUMBER_OF_QUEUES => u32::from(features.queues.1 - 1) << 16 | u32::from(features.queues.0 - 1),
            id::INTERRUPT_COALESCING => features.coalescing,
            id::INTERRUPT_VECTOR => {
                let vector = value as u16;
                let disabled = features.coalescing_disabled.get(usize::from(vector)).ok_or(Status::INVALID_FIELD)?;
                u32::from(*disabled) << 16 | u32::from(vector)
            }
            id::WRITE_ATOMICITY => features.write_atomicity,
            id::ASYNC_EVENTS => features.async_events,
            _ => return Err(Status::INVALID_FIELD),
        })
    }

    pub(super) fn set_features(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let save = sqe.dword(10) >> 31 != 0;
        if save {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        let value = sqe.dword(11);
        match sqe.dword(10) as u8 {
            id::ARBITRATION => self.features.arbitration = value & 0xffff_ff07,
            // There is one power state.
            id::POWER_MANAGEMENT if value & 0x1f != 0 => return Err(Status::INVALID_FIELD),
            id::POWER_MANAGEMENT => {}
            id::TEMPERATURE_THRESHOLD => match threshold(value)? {
                Threshold::Over => self.features.over_temperature = value as u16,
                Threshold::Under => self.features.under_temperature = value as u16,
            },
            id::ERROR_RECOVERY => self.features.error_recovery = value & 0x1_ffff,
            id::VOLATILE_WRITE_CACHE if self.volatile_cache => {
                self.features.write_cache = value & 1 != 0;
                self.nvm.write_through = value & 1 == 0;
                if self.nvm.write_through {
                    self.nvm.flush(super::spec::NSID_ALL)?;
                }
            }
            id::NUMBER_OF_QUEUES => return self.set_queues(value),
            id::INTERRUPT_COALESCING => self.features.coalescing = value & 0xffff,
            id::INTERRUPT_VECTOR => {
                let vector = usize::from(value as u16);
                let disabled = self.features.coalescing_disabled.get_mut(vector).ok_or(Status::INVALID_FIELD)?;
                *disabled = value >> 16 & 1 != 0;
            }
            id::WRITE_ATOMICITY => self.features.write_atomicity = value & 1,
            id::ASYNC_EVENTS => self.features.async_events = value,
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    /// Grants what is asked for up to what there is; only before the first I/O queue (section 5.21.1.7).
    fn set_queues(&mut self, value: u32) -> Result<u32, Status> {
        let (submission, completion) = (value as u16, (value >> 16) as u16);
        if submission == u16::MAX || completion == u16::MAX {
            return Err(Status::INVALID_FIELD);
        }
        if self.sqs.len() > 1 || self.cqs.iter().skip(1).any(Option::is_some) {
            return Err(Status::COMMAND_SEQUENCE);
        }
        let most = self.config.max_queues;
        self.features.queues = ((submission + 1).min(most), (completion + 1).min(most));
        Ok(u32::from(self.features.queues.1 - 1) << 16 | u32::from(self.features.queues.0 - 1))
    }
}

enum Threshold {
    Over,
    Under,
}

/// The composite temperature (or all sensors) is the one that there is.
fn threshold(value: u32) -> Result<Threshold, Status> {
    match (value >> 16 & 0xf, value >> 20 & 3) {
        (0 | 0xf, 0) => Ok(Threshold::Over),
        (0 | 0xf, 1) => Ok(Threshold::Under),
        _ => Err(Status::INVALID_FIELD),
    }
}
