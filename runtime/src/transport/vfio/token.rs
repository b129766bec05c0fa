//! The token that the driver of an SR-IOV physical function and the users of its virtual functions share.

use std::{fmt, str::FromStr};

use crate::Error;

/// A VF token: a UUID. A virtual function whose physical function is bound to vfio-pci opens only with the token that the
/// physical function's user has set, so that a driver knows whom it shares the hardware with.
///
/// ```
/// use vfio_uring::transport::vfio::VfToken;
///
/// let token: VfToken = "14d63f20-8445-11ea-8900-1f9ce7d5650d".parse()?;
/// assert_eq!(token.to_string(), "14d63f20-8445-11ea-8900-1f9ce7d5650d");
/// # Ok::<(), vfio_uring::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VfToken([u8; 16]);

impl VfToken {
    /// The token of these bytes, in the order in which the UUID is written.
    pub const fn new(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes, in the order in which the UUID is written.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl FromStr for VfToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let groups: Vec<&str> = text.split('-').collect();
        let lengths = groups.iter().map(|group| group.len());
        let digits: Vec<u8> =
            groups.concat().bytes().filter_map(|byte| (byte as char).to_digit(16)).map(|d| d as u8).collect();
        // As many digits as bytes: with the right lengths, nothing else was in it.
        if !lengths.eq([8, 4, 4, 4, 12]) || digits.len() != 32 {
            return Err(Error::invalid(
                "a VF token is a UUID, as 14d63f20-8445-11ea-8900-1f9ce7d5650d: 32 hexadecimal digits",
            ));
        }
        Ok(Self(std::array::from_fn(|i| digits[2 * i] << 4 | digits[2 * i + 1])))
    }
}

impl fmt::Display for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// The token is a secret of its users.
impl fmt::Debug for VfToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VfToken(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uuids_are_tokens() {
        for text in [
            "",
            "14d63f20",
            "14d63f20844511ea89001f9ce7d5650d",
            "14d63f20-8445-11ea-8900-1f9ce7d5650",
            "14d63f20-8445-11ea-8900-1f9ce7d5650g",
            "14d63f208-445-11ea-8900-1f9ce7d5650d",
            "{14d63f20-8445-11ea-8900-1f9ce7d5650d}",
            "14d63f20-8445-11ea-8900-1f9ce7d5é0d",
        ] {
            assert!(text.parse::<VfToken>().is_err(), "{text}");
        }
        let token: VfToken = "00010203-0405-0607-0809-0A0B0C0D0EFF".parse().unwrap();
        assert_eq!(token.as_bytes(), &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(format!("{token:?}"), "VfToken(..)");
    }
}
