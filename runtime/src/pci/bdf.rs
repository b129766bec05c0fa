//! Where a function is on the PCI buses.

use std::{fmt, str::FromStr};

use crate::Error;

/// Domain, bus, device and function: the name that Linux gives a PCI device.
///
/// ```
/// use vfio_uring::pci::Bdf;
///
/// let bdf: Bdf = "01:00.1".parse()?;
/// assert_eq!((bdf.domain(), bdf.bus(), bdf.device(), bdf.function()), (0, 1, 0, 1));
/// assert_eq!(bdf.to_string(), "0000:01:00.1");
/// # Ok::<(), vfio_uring::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    /// Device and function, as in a requester id: 5 and 3 bits.
    slot: u8,
}

impl Bdf {
    /// Puts one together; `None` for a device above 31 or a function above 7.
    pub const fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self { domain, bus, slot: device << 3 | function })
    }

    /// The domain, also called segment. Linux counts those of VMD from 0x10000.
    pub const fn domain(self) -> u32 {
        self.domain
    }

    /// The bus, in its domain.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device, on its bus: 0 to 31.
    pub const fn device(self) -> u8 {
        self.slot >> 3
    }

    /// The function, of its device: 0 to 7.
    pub const fn function(self) -> u8 {
        self.slot & 7
    }

    /// Reads the text form, or says what is wrong with it.
    pub(crate) fn read(text: &str) -> Result<Self, &'static str> {
        let form = "a PCI address is DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, as 0000:01:00.0";
        // Digits are counted in bytes: what is not ASCII is no digit.
        let number = |text: &str, digits: std::ops::RangeInclusive<usize>| {
            let all_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
            if !all_hex || !digits.contains(&text.len()) {
                return Err(form);
            }
            u32::from_str_radix(text, 16).map_err(|_| form)
        };
        let (buses, slot) = text.rsplit_once(':').ok_or(form)?;
        let (domain, bus) = buses.split_once(':').unwrap_or(("0000", buses));
        let (device, function) = slot.split_once('.').ok_or(form)?;
        let (domain, bus) = (number(domain, 4..=8)?, number(bus, 2..=2)?);
        let (device, function) = (number(device, 2..=2)?, number(function, 1..=1)?);
        match (device, function) {
            (32.., _) => Err("the device of a PCI address is 00 to 1f"),
            (_, 8..) => Err("the function of a PCI address is 0 to 7"),
            _ => Self::new(domain, bus as u8, device as u8, function as u8).ok_or(form),
        }
    }
}

impl FromStr for Bdf {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::read(text).map_err(|reason| Error::Address { text: text.into(), reason })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, .. } = self;
        // Through `pad`, so that a table can give it a width.
        f.pad(&format!("{domain:04x}:{bus:02x}:{:02x}.{:x}", self.device(), self.function()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for (text, full) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("ff:1f.7", "0000:ff:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("FFFFFFFF:AB:0C.1", "ffffffff:ab:0c.1"),
        ] {
            let bdf: Bdf = text.parse().unwrap();
            assert_eq!(bdf.to_string(), full);
            assert_eq!(full.parse::<Bdf>().unwrap(), bdf);
        }
        assert_eq!(format!("[{:<13}]", Bdf::new(0, 1, 0, 0).unwrap()), "[0000:01:00.0 ]");
        assert_eq!((Bdf::new(0, 0, 32, 0), Bdf::new(0, 0, 0, 8)), (None, None));
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            ":",
            "01:00",
            "0000:01:00",
            "1:00.0",
            "01:0.0",
            "01:00.",
            "01:00.00",
            "001:00:00.0",
            "123456789:00:00.0",
            "0000:0000:01:00.0",
            "+1:00.0",
            "01:00.0 ",
            "0x01:00.0",
            "zz:00.0",
            "01:00.0\n",
            "٠١:00.0",
            "../../x",
            "0000::00.0",
        ] {
            let error = text.parse::<Bdf>().unwrap_err().to_string();
            assert!(error.contains("0000:01:00.0"), "{error}");
        }
        assert!("01:20.0".parse::<Bdf>().unwrap_err().to_string().contains("00 to 1f"));
        assert!("01:00.8".parse::<Bdf>().unwrap_err().to_string().contains("0 to 7"));
    }
}
