//! What a device may do with memory.

/// What a device may do with mapped memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it.
    Write,
    /// Read and write it.
    #[default]
    ReadWrite,
}

impl Access {
    /// Whether it may read.
    pub fn reads(self) -> bool {
        self != Self::Write
    }

    /// Whether it may write.
    pub fn writes(self) -> bool {
        self != Self::Read
    }
}
