//! What a write to configuration space does to the device as a whole.
//!
//! Sources: PCI Express Base 5.0 sections 7.5.1.1.3 (command), 7.5.2 (power management), 7.5.3 (PCI Express), 7.9.22 (advanced
//! features); what the kernel does for each of these writes: `drivers/vfio/pci/vfio_pci_config.c`.

use crate::pci::{COMMAND_MEMORY, CONFIG_SIZE, offset};

/// PM: control and status, from the capability on.
pub(super) const PM_CONTROL: u64 = 4;
/// PM_CONTROL: the power state.
pub(super) const PM_STATE: u8 = 3;
/// PM_CONTROL: the way from D3hot to D0 resets nothing.
pub(super) const PM_NO_SOFT_RESET: u8 = 1 << 3;
/// PCI Express: what the device can do.
pub(super) const EXPRESS_CAPABILITIES: u64 = 4;
/// EXPRESS_CAPABILITIES: a function-level reset.
pub(super) const EXPRESS_HAS_FLR: u32 = 1 << 28;
/// PCI Express: device control.
pub(super) const EXPRESS_CONTROL: u64 = 8;
/// EXPRESS_CONTROL: reset the function.
pub(super) const EXPRESS_FLR: u16 = 1 << 15;
/// Advanced features: their byte of capabilities.
pub(super) const AF_CAPABILITIES: u64 = 3;
/// AF_CAPABILITIES: a function-level reset.
pub(super) const AF_HAS_FLR: u8 = 1 << 1;
/// Advanced features: control.
pub(super) const AF_CONTROL: u64 = 4;
/// AF_CONTROL: reset the function.
pub(super) const AF_FLR: u8 = 1;

/// Where the registers are whose writes are of interest, from the start of configuration space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// PM_CONTROL.
    pub(super) power: Option<u64>,
    /// Waking from D3hot resets the device.
    pub(super) waking_resets: bool,
    /// EXPRESS_CONTROL of a device that has a function-level reset.
    pub(super) express: Option<u64>,
    /// AF_CONTROL of a device that has one.
    pub(super) features: Option<u64>,
}

/// What a write does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// Switches the decoding of memory.
    pub(super) memory: Option<bool>,
    /// Wakes it, or sends it to D3hot.
    pub(super) awake: Option<bool>,
    pub(super) resets: bool,
}

/// Whether a write is where such registers may be.
pub(super) fn may_matter(at: u64, len: usize) -> bool {
    let end = at.saturating_add(len as u64);
    (at <= offset::COMMAND && offset::COMMAND < end) || (at < CONFIG_SIZE && end > 0x40)
}

impl Places {
    /// What writing `bytes` at `at` does.
    pub(super) fn effects(&self, at: u64, bytes: &[u8]) -> Effects {
        let byte = |of: u64| bytes.get(usize::try_from(of.checked_sub(at)?).ok()?).copied();
        let express = self.express.and_then(|control| byte(control + 1));
        let features = self.features.and_then(byte);
        Effects {
            memory: byte(offset::COMMAND).map(|command| u16::from(command) & COMMAND_MEMORY != 0),
            awake: self.power.and_then(byte).map(|control| control & PM_STATE != PM_STATE),
            resets: express.is_some_and(|high| u16::from(high) << 8 & EXPRESS_FLR != 0)
                || features.is_some_and(|control| control & AF_FLR != 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: Places = Places { power: Some(0x44), waking_resets: true, express: Some(0x68), features: Some(0x94) };

    #[test]
    fn each_register_is_seen_at_any_width() {
        let effects = |at, bytes: &[u8]| PLACES.effects(at, bytes);
        let memory = |memory| Effects { memory: Some(memory), ..Effects::default() };
        assert_eq!(effects(4, &[2]), memory(true));
        assert_eq!(effects(4, &[0xfd, 0xff]), memory(false));
        assert_eq!(effects(0, &[0, 0, 0, 0, 7, 0, 0, 0]), memory(true));
        assert_eq!(effects(5, &[2]), Effects::default());
        let awake = |awake| Effects { awake: Some(awake), ..Effects::default() };
        assert_eq!(effects(0x44, &[3]), awake(false));
        assert_eq!(effects(0x44, &[8, 0]), awake(true));
        assert_eq!(effects(0x40, &[0, 0, 0, 0, 2]), awake(true));
        assert_eq!(effects(0x45, &[3]), Effects::default());
        let resets = Effects { resets: true, ..Effects::default() };
        assert_eq!(effects(0x68, &[0, 0x80]), resets);
        assert_eq!(effects(0x69, &[0xff]), resets);
        assert_eq!(effects(0x68, &[0xff, 0x7f, 0, 0]), Effects::default());
        assert_eq!(effects(0x94, &[1]), resets);
        assert_eq!(effects(0x90, &[0xff; 4]), Effects::default());
        let all = Effects { memory: Some(true), awake: Some(false), resets: true };
        assert_eq!(effects(0, &[0xff; 256]), all);
        assert_eq!(Places::default().effects(0x40, &[0xff; 192]), Effects::default());
        assert_eq!(effects(u64::MAX, &[0xff; 2]), Effects::default());
    }

    #[test]
    fn most_writes_are_of_no_interest() {
        for (at, len, matters) in [
            (0, 4, false),
            (0, 5, true),
            (4, 2, true),
            (5, 1, false),
            (0x10, 48, false),
            (0x3c, 8, true),
            (0x100, 64, false),
        ] {
            assert_eq!(may_matter(at, len), matters, "{at:#x}+{len}");
        }
    }
}
