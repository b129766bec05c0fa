//! Registers and descriptor bits of the 82576 (datasheet revision 2.87, chapters 7 and 8), as far as the driver uses them.
//!
//! Offsets are in BAR0. Registers of a queue are given as offsets from the queue's first one.

/// Device Control.
pub const CTRL: u64 = 0x0000;
/// Device Status.
pub const STATUS: u64 = 0x0008;
/// Extended Device Control.
pub const CTRL_EXT: u64 = 0x0018;
/// MDI Control: access to the PHY.
pub const MDIC: u64 = 0x0020;
/// Receive Control.
pub const RCTL: u64 = 0x0100;
/// Transmit Control.
pub const TCTL: u64 = 0x0400;
/// Management EEPROM Control: whether the configuration is done.
pub const EEMNGCTL: u64 = 0x1010;
/// Interrupt Cause Read, which clears.
pub const ICR: u64 = 0x1500;
/// Interrupt Mask Set.
pub const IMS: u64 = 0x1508;
/// Interrupt Mask Clear.
pub const IMC: u64 = 0x150c;
/// General Purpose Interrupt Enable.
pub const GPIE: u64 = 0x1514;
/// Extended Interrupt Mask Set.
pub const EIMS: u64 = 0x1524;
/// Extended Interrupt Mask Clear.
pub const EIMC: u64 = 0x1528;
/// Extended Interrupt Auto Clear.
pub const EIAC: u64 = 0x152c;
/// Extended Interrupt Auto Mask.
pub const EIAM: u64 = 0x1530;
/// Extended Interrupt Throttle of vector 0; 4 bytes each.
pub const EITR: u64 = 0x1680;
/// Interrupt Vector Allocation of queues 0 and 8; 4 bytes each.
pub const IVAR: u64 = 0x1700;
/// Interrupt Vector Allocation of other causes.
pub const IVAR_MISC: u64 = 0x1740;
/// Receive Checksum Control.
pub const RXCSUM: u64 = 0x5000;
/// Receive Long Packet Maximum Length.
pub const RLPML: u64 = 0x5004;
/// Multicast Table Array, 128 registers.
pub const MTA: u64 = 0x5200;
/// Receive Address Low of entry 0.
pub const RAL: u64 = 0x5400;
/// Receive Address Low of entry 16.
pub const RAL16: u64 = 0x54e0;
/// Multiple Receive Queues Command.
pub const MRQC: u64 = 0x5818;
/// Software Semaphore.
pub const SWSM: u64 = 0x5b50;
/// Software-Firmware Synchronization.
pub const SW_FW_SYNC: u64 = 0x5b5c;
/// Redirection Table, 128 bytes.
pub const RETA: u64 = 0x5c00;
/// RSS Random Key, 40 bytes.
pub const RSSRK: u64 = 0x5c80;
/// Registers of receive queue 0.
pub const RX_QUEUES: u64 = 0xc000;
/// Registers of transmit queue 0.
pub const TX_QUEUES: u64 = 0xe000;
/// Bytes between the registers of two queues.
pub const QUEUE_STRIDE: u64 = 0x40;

/// Of a virtual function: registers of receive queue 0.
pub const VF_RX_QUEUES: u64 = 0x2800;
/// Of a virtual function: registers of transmit queue 0.
pub const VF_TX_QUEUES: u64 = 0x3800;
/// Of a virtual function: bytes between the registers of two queues.
pub const VF_QUEUE_STRIDE: u64 = 0x100;
/// Queues of each direction that a virtual function has.
pub const VF_QUEUES: u16 = 2;

/// Queues of each direction.
pub const QUEUES: u16 = 16;
/// Receive addresses.
pub const ADDRESSES: usize = 24;
/// Bytes of a frame at most, with its CRC.
pub const MAX_FRAME: usize = 9728;

/// Registers of a queue.
pub mod queue {
    /// Descriptor Base Address Low.
    pub const BAL: u64 = 0x00;
    /// Descriptor Base Address High.
    pub const BAH: u64 = 0x04;
    /// Descriptor Ring Length, in bytes.
    pub const LEN: u64 = 0x08;
    /// Split and Replication Receive Control.
    pub const SRRCTL: u64 = 0x0c;
    /// Descriptor Head.
    pub const HEAD: u64 = 0x10;
    /// Descriptor Tail.
    pub const TAIL: u64 = 0x18;
    /// Descriptor Control.
    pub const DCTL: u64 = 0x28;
    /// Receive Queue Drop Packet Count.
    pub const DROPPED: u64 = 0x30;
}

/// Bits of CTRL.
pub mod ctrl {
    /// Full duplex.
    pub const FD: u32 = 1;
    /// Bus master disable.
    pub const GIO_MASTER_DISABLE: u32 = 1 << 2;
    /// Set link up.
    pub const SLU: u32 = 1 << 6;
    /// Force speed.
    pub const FRCSPD: u32 = 1 << 11;
    /// Force duplex.
    pub const FRCDPX: u32 = 1 << 12;
    /// Reset.
    pub const RST: u32 = 1 << 26;
    /// Receive flow control enable.
    pub const RFCE: u32 = 1 << 27;
    /// Transmit flow control enable.
    pub const TFCE: u32 = 1 << 28;
    /// VLAN mode enable.
    pub const VME: u32 = 1 << 30;
}

/// Bits of STATUS.
pub mod status {
    /// Full duplex.
    pub const FD: u32 = 1;
    /// Link up.
    pub const LU: u32 = 1 << 1;
    /// Port number, 2 bits.
    pub const LAN_ID_SHIFT: u32 = 2;
    /// Speed, 2 bits.
    pub const SPEED_SHIFT: u32 = 6;
    /// Requests on the bus may be under way.
    pub const GIO_MASTER_ENABLE: u32 = 1 << 19;
}

/// Bits of MDIC.
pub mod mdic {
    /// Register number.
    pub const REGISTER_SHIFT: u32 = 16;
    /// Address 1: the PHY inside.
    pub const INTERNAL_PHY: u32 = 1 << 21;
    /// Write.
    pub const WRITE: u32 = 1 << 26;
    /// Read.
    pub const READ: u32 = 2 << 26;
    /// Done.
    pub const READY: u32 = 1 << 28;
    /// Failed.
    pub const ERROR: u32 = 1 << 30;
}

/// PHY control register (IEEE 802.3, clause 22.2.4.1): negotiate, start over, full duplex, 1000 Mb/s; powered.
pub const PHY_NEGOTIATE: u32 = 0x1340;

/// Bits of RCTL.
pub mod rctl {
    /// Receiver enable.
    pub const EN: u32 = 1 << 1;
    /// Unicast promiscuous.
    pub const UPE: u32 = 1 << 3;
    /// Multicast promiscuous.
    pub const MPE: u32 = 1 << 4;
    /// Long packets.
    pub const LPE: u32 = 1 << 5;
    /// Broadcast accept.
    pub const BAM: u32 = 1 << 15;
    /// Strip the CRC.
    pub const SECRC: u32 = 1 << 26;
}

/// Bits of TCTL.
pub mod tctl {
    /// Transmitter enable.
    pub const EN: u32 = 1 << 1;
    /// Pad short packets.
    pub const PSP: u32 = 1 << 3;
    /// Collision threshold and distance, as the datasheet has them initially.
    pub const COLLISIONS: u32 = 0xf << 4 | 0x40 << 12;
    /// Retransmit on late collision.
    pub const RTLC: u32 = 1 << 24;
}

/// Bits of RXDCTL and TXDCTL.
pub mod dctl {
    /// Queue enable.
    pub const ENABLE: u32 = 1 << 25;
    /// Prefetch below 8, of 8 at once, write back one at a time.
    pub const RX_THRESHOLDS: u32 = 8 | 8 << 8 | 1 << 16;
    /// As [`RX_THRESHOLDS`], for transmit queues.
    pub const TX_THRESHOLDS: u32 = 8 | 1 << 8 | 1 << 16;
}

/// Bits of SRRCTL.
pub mod srrctl {
    /// Advanced descriptors, one buffer.
    pub const ADVANCED: u32 = 1 << 25;
    /// Drop packets when there are no descriptors.
    pub const DROP_EN: u32 = 1 << 31;
}

/// Bits of RXCSUM.
pub mod rxcsum {
    /// IP checksum.
    pub const IPOFL: u32 = 1 << 8;
    /// TCP and UDP checksum.
    pub const TUOFL: u32 = 1 << 9;
    /// The RSS hash in the place of the packet checksum.
    pub const PCSD: u32 = 1 << 13;
}

/// MRQC: queues by RSS.
pub const MRQC_RSS: u32 = 2;
/// RAH: the address is valid.
pub const ADDRESS_VALID: u32 = 1 << 31;
/// A byte of IVAR is valid.
pub const IVAR_VALID: u32 = 0x80;
/// EITR: interval in microseconds from this bit on, 13 bits.
pub const EITR_SHIFT: u32 = 2;
/// GPIE: several vectors, automatic masks, a read of ICR clears it.
pub const GPIE_MSIX: u32 = 1 | 1 << 4 | 1 << 30 | 1 << 31;
/// ICR, IMS: link status change.
pub const LSC: u32 = 1 << 2;
/// SWSM: software has the semaphore; software has that with firmware.
pub const SMBI: u32 = 1;
/// See [`SMBI`].
pub const SWESMBI: u32 = 2;

/// Second half of an advanced receive descriptor, written back (section 7.1.5.2).
pub mod rx {
    /// Descriptor done.
    pub const DD: u64 = 1;
    /// End of packet.
    pub const EOP: u64 = 1 << 1;
    /// A VLAN tag was taken out.
    pub const VP: u64 = 1 << 3;
    /// TCP or UDP checksum was looked at.
    pub const L4I: u64 = 1 << 5;
    /// IP checksum was looked at.
    pub const IPCS: u64 = 1 << 6;
    /// TCP or UDP checksum is wrong.
    pub const L4E: u64 = 1 << 29;
    /// IP checksum is wrong.
    pub const IPE: u64 = 1 << 30;
    /// Receive error.
    pub const RXE: u64 = 1 << 31;
    /// Bytes in the buffer, 16 bits.
    pub const LEN_SHIFT: u32 = 32;
    /// VLAN tag.
    pub const VLAN_SHIFT: u32 = 48;
}

/// Second half of a transmit descriptor (section 7.2.2).
pub mod tx {
    /// End of packet.
    pub const EOP: u64 = 1 << 24;
    /// Insert the CRC.
    pub const IFCS: u64 = 1 << 25;
    /// Report status.
    pub const RS: u64 = 1 << 27;
    /// Advanced descriptor.
    pub const DEXT: u64 = 1 << 29;
    /// Insert a VLAN tag.
    pub const VLE: u64 = 1 << 30;
    /// Segment.
    pub const TSE: u64 = 1 << 31;
    /// Kind: context.
    pub const CONTEXT: u64 = 2 << 20;
    /// Kind: data.
    pub const DATA: u64 = 3 << 20;
    /// Descriptor done.
    pub const DD: u64 = 1 << 32;
    /// Insert the IP checksum.
    pub const IXSM: u64 = 1 << 40;
    /// Insert the TCP or UDP checksum.
    pub const TXSM: u64 = 1 << 41;
    /// Bytes of the packet.
    pub const PAYLEN_SHIFT: u32 = 46;
    /// Of a context: IPv4.
    pub const IPV4: u64 = 1 << 10;
    /// Of a context: TCP.
    pub const TCP: u64 = 1 << 11;
    /// Of a context: SCTP.
    pub const SCTP: u64 = 2 << 11;
    /// Of a context: length of the TCP header.
    pub const L4LEN_SHIFT: u32 = 40;
    /// Of a context: maximum segment size.
    pub const MSS_SHIFT: u32 = 48;
    /// Of a context, first half: length of the MAC header.
    pub const MACLEN_SHIFT: u32 = 9;
    /// Of a context, first half: VLAN tag.
    pub const VLAN_SHIFT: u32 = 16;
}

/// The mailbox of a virtual function (Linux's `drivers/net/ethernet/intel/igbvf/mbx.h`).
pub mod mailbox {
    /// VFMailbox: who has the buffer, and what happened.
    pub const CONTROL: u64 = 0x0c40;
    /// VMBMEM: the buffer.
    pub const BUFFER: u64 = 0x0800;
    /// Words of the buffer.
    pub const WORDS: usize = 16;

    /// A message of ours is in the buffer.
    pub const REQ: u32 = 1;
    /// We have read a message of the physical function's.
    pub const ACK: u32 = 1 << 1;
    /// We have the buffer.
    pub const VFU: u32 = 1 << 2;
    /// The physical function has the buffer.
    pub const PFU: u32 = 1 << 3;
    /// A message of the physical function's is in the buffer; reading clears it.
    pub const PFSTS: u32 = 1 << 4;
    /// The physical function has read our message; reading clears it.
    pub const PFACK: u32 = 1 << 5;
    /// The physical function is being reset.
    pub const RSTI: u32 = 1 << 6;
    /// The physical function has been reset; reading clears it.
    pub const RSTD: u32 = 1 << 7;

    /// Of a message's first word: what it is.
    pub const TYPE: u32 = 0xffff;
    /// Of a message's first word: more on what it asks for.
    pub const INFO_SHIFT: u32 = 16;
    /// Of a message's first word: still clear to send.
    pub const CTS: u32 = 1 << 29;
    /// Of a message's first word: it was refused.
    pub const MESSAGE_NACK: u32 = 1 << 30;
    /// Of a message's first word: it was granted.
    pub const MESSAGE_ACK: u32 = 1 << 31;

    /// This function was reset; the answer has its MAC address.
    pub const RESET: u32 = 1;
    /// Sets the MAC address; with [`FILTER_CLEAR`] and [`FILTER_ADD`], more of them.
    pub const SET_MAC: u32 = 2;
    /// Info of [`SET_MAC`]: takes all more addresses off.
    pub const FILTER_CLEAR: u32 = 1;
    /// Info of [`SET_MAC`]: adds one more.
    pub const FILTER_ADD: u32 = 2;
    /// Sets the multicast hashes; info: how many.
    pub const SET_MULTICAST: u32 = 3;
    /// Adds a VLAN (info 1) or takes it off (info 0).
    pub const SET_VLAN: u32 = 4;
    /// Sets the longest frame.
    pub const SET_LONGEST: u32 = 5;
    /// Receives all multicasts (info 2), or the hashes only (info 0).
    pub const SET_PROMISCUOUS: u32 = 6;
    /// From the physical function: something has happened.
    pub const NOTICE: u32 = 0x100;
}
