//! Registers and descriptors of the 82576 (datasheet 2.7, sections 7.1, 7.2 and 8), as far as the model has them.
//!
//! Offsets are in BAR0. Registers of queues are given for queue 0; queue `n` has them `n * QUEUE_STRIDE` further.

/// Bytes of BAR0.
pub const BAR_SIZE: u64 = 0x2_0000;
/// Bytes of BAR3, which has the MSI-X table and its pending bits.
pub const MSIX_BAR_SIZE: u64 = 0x4000;
/// Receive queues, and as many transmit queues.
pub const QUEUES: usize = 16;
/// MSI-X vectors without SR-IOV.
pub const VECTORS: u16 = 25;
/// Bytes of a frame at most, without its CRC: 9.5 KiB with it.
pub const MAX_FRAME: usize = 9728 - 4;
/// Bytes of a descriptor of any kind.
pub const DESCRIPTOR: u64 = 16;

/// Device Control.
pub const CTRL: u64 = 0x0000;
/// Device Status.
pub const STATUS: u64 = 0x0008;
/// EEPROM and Flash Control.
pub const EECD: u64 = 0x0010;
/// EEPROM Read.
pub const EERD: u64 = 0x0014;
/// Extended Device Control.
pub const CTRL_EXT: u64 = 0x0018;
/// MDI Control.
pub const MDIC: u64 = 0x0020;
/// VLAN Ether Type.
pub const VET: u64 = 0x0038;
/// Interrupt Cause Read; it clears.
pub const ICR: u64 = 0x1500;
/// Interrupt Cause Set.
pub const ICS: u64 = 0x1504;
/// Interrupt Mask Set and Read.
pub const IMS: u64 = 0x1508;
/// Interrupt Mask Clear.
pub const IMC: u64 = 0x150c;
/// Interrupt Acknowledge Auto Mask.
pub const IAM: u64 = 0x1510;
/// General Purpose Interrupt Enable.
pub const GPIE: u64 = 0x1514;
/// Extended Interrupt Cause Set.
pub const EICS: u64 = 0x1520;
/// Extended Interrupt Mask Set and Read.
pub const EIMS: u64 = 0x1524;
/// Extended Interrupt Mask Clear.
pub const EIMC: u64 = 0x1528;
/// Extended Interrupt Auto Clear.
pub const EIAC: u64 = 0x152c;
/// Extended Interrupt Auto Mask.
pub const EIAM: u64 = 0x1530;
/// Extended Interrupt Cause; a read clears.
pub const EICR: u64 = 0x1580;
/// Extended Interrupt Throttle, 25 of them.
pub const EITR: u64 = 0x1680;
/// Interrupt Vector Allocation, 8 of them.
pub const IVAR: u64 = 0x1700;
/// Interrupt Vector Allocation of other causes.
pub const IVAR_MISC: u64 = 0x1740;
/// Receive Control.
pub const RCTL: u64 = 0x0100;
/// Transmit Control.
pub const TCTL: u64 = 0x0400;
/// Management EEPROM Control: configuration done.
pub const EEMNGCTL: u64 = 0x1010;
/// Receive Packet Buffer Size.
pub const RXPBS: u64 = 0x2404;
/// Transmit Packet Buffer Size.
pub const TXPBS: u64 = 0x3404;
/// First of the statistics registers.
pub const STATISTICS: u64 = 0x4000;
/// Receive Checksum Control.
pub const RXCSUM: u64 = 0x5000;
/// Receive Long Packet Maximum Length.
pub const RLPML: u64 = 0x5004;
/// Multicast Table Array, 128 registers.
pub const MTA: u64 = 0x5200;
/// Receive Address Low of entry 0; entries 0 to 15 are 8 bytes apart.
pub const RAL: u64 = 0x5400;
/// Receive Address High of entry 0.
pub const RAH: u64 = 0x5404;
/// Receive Address Low of entry 16; entries 16 to 23 are 8 bytes apart.
pub const RAL16: u64 = 0x54e0;
/// VLAN Filter Table Array, 128 registers.
pub const VFTA: u64 = 0x5600;
/// Multiple Receive Queues Command.
pub const MRQC: u64 = 0x5818;
/// Management Control.
pub const MANC: u64 = 0x5820;
/// Software Semaphore.
pub const SWSM: u64 = 0x5b50;
/// Firmware Semaphore.
pub const FWSM: u64 = 0x5b54;
/// Software-Firmware Synchronization.
pub const SW_FW_SYNC: u64 = 0x5b5c;
/// Redirection Table, 128 bytes.
pub const RETA: u64 = 0x5c00;
/// RSS Random Key, 40 bytes.
pub const RSSRK: u64 = 0x5c80;

/// Bytes between the registers of two queues.
pub const QUEUE_STRIDE: u64 = 0x40;
/// Registers of receive queues.
pub const RX_QUEUES: u64 = 0xc000;
/// Registers of transmit queues.
pub const TX_QUEUES: u64 = 0xe000;
/// Where queues 0 to 3 have their registers as well, a stride of 0x100 apart.
pub const RX_QUEUES_OLD: u64 = 0x2800;
/// As [`RX_QUEUES_OLD`], of transmit queues.
pub const TX_QUEUES_OLD: u64 = 0x3800;

/// Registers of a queue, from its first one on; receive and transmit queues have the same places for the same things.
pub mod queue {
    /// Descriptor Base Address Low.
    pub const BAL: u64 = 0x00;
    /// Descriptor Base Address High.
    pub const BAH: u64 = 0x04;
    /// Descriptor Ring Length in bytes.
    pub const LEN: u64 = 0x08;
    /// Split and Replication Receive Control.
    pub const SRRCTL: u64 = 0x0c;
    /// Descriptor Head, in descriptors.
    pub const HEAD: u64 = 0x10;
    /// Descriptor Tail, in descriptors.
    pub const TAIL: u64 = 0x18;
    /// Descriptor Control.
    pub const DCTL: u64 = 0x28;
    /// Transmit Descriptor Write-Back Address Low; bit 0 turns head write-back on.
    pub const WBAL: u64 = 0x38;
    /// Transmit Descriptor Write-Back Address High.
    pub const WBAH: u64 = 0x3c;
}

/// Bits of CTRL.
pub mod ctrl {
    /// Full duplex.
    pub const FD: u32 = 1;
    /// No new requests on the bus.
    pub const GIO_MASTER_DISABLE: u32 = 1 << 2;
    /// Set link up.
    pub const SLU: u32 = 1 << 6;
    /// 1000 Mb/s.
    pub const SPD_1000: u32 = 2 << 8;
    /// Reset.
    pub const RST: u32 = 1 << 26;
    /// Pauses when it is told to.
    pub const RFCE: u32 = 1 << 27;
    /// Tells the other side to pause.
    pub const TFCE: u32 = 1 << 28;
    /// VLAN mode: tags are stripped.
    pub const VME: u32 = 1 << 30;
    /// PHY reset.
    pub const PHY_RST: u32 = 1 << 31;
}

/// Bits of STATUS.
pub mod status {
    /// Full duplex.
    pub const FD: u32 = 1;
    /// Link up.
    pub const LU: u32 = 1 << 1;
    /// Transmission paused.
    pub const TXOFF: u32 = 1 << 4;
    /// 1000 Mb/s, as resolved and as detected.
    pub const SPEED_1000: u32 = 1 << 7 | 2 << 8;
    /// PHY reset asserted; cleared by a write of 0.
    pub const PHYRA: u32 = 1 << 10;
    /// Requests on the bus may be made.
    pub const GIO_MASTER_ENABLE: u32 = 1 << 19;
    /// Reset of the physical function done.
    pub const PF_RST_DONE: u32 = 1 << 21;
}

/// Bits of EECD.
pub mod eecd {
    /// Software asks for the EEPROM.
    pub const REQ: u32 = 1 << 6;
    /// It has it.
    pub const GNT: u32 = 1 << 7;
    /// Writes to the flash disabled, EEPROM present, read automatically, 2^(6 + 2) words.
    pub const STATE: u32 = 1 << 4 | 1 << 8 | 1 << 9 | 2 << 11;
}

/// Bits of CTRL_EXT.
pub mod ctrl_ext {
    /// Reloads what comes from the EEPROM.
    pub const EE_RST: u32 = 1 << 13;
    /// A read of ICR masks by IAM.
    pub const IAME: u32 = 1 << 27;
}

/// Bits of ICR, ICS, IMS and IMC.
pub mod icr {
    /// Transmit descriptor written back.
    pub const TXDW: u32 = 1;
    /// Link status change.
    pub const LSC: u32 = 1 << 2;
    /// Receiver overrun: a packet was missed.
    pub const RXO: u32 = 1 << 6;
    /// Receive descriptor written back.
    pub const RXDW: u32 = 1 << 7;
    /// MDI access complete.
    pub const MDAC: u32 = 1 << 9;
    /// Device reset asserted.
    pub const DRSTA: u32 = 1 << 30;
    /// An interrupt was asserted.
    pub const INTA: u32 = 1 << 31;
}

/// Bits of GPIE.
pub mod gpie {
    /// Every read of ICR clears it.
    pub const NSICR: u32 = 1;
    /// More than one MSI-X vector: causes go by IVAR.
    pub const MULTIPLE_MSIX: u32 = 1 << 4;
    /// Automatic masking by EIAM.
    pub const EIAME: u32 = 1 << 30;
}

/// A byte of IVAR names a vector.
pub const IVAR_VALID: u8 = 0x80;

/// Bits of RCTL.
pub mod rctl {
    /// Receiver enable.
    pub const EN: u32 = 1 << 1;
    /// Unicast promiscuous.
    pub const UPE: u32 = 1 << 3;
    /// Multicast promiscuous.
    pub const MPE: u32 = 1 << 4;
    /// Long packets, up to RLPML.
    pub const LPE: u32 = 1 << 5;
    /// Multicast offset: which bits of the address index MTA.
    pub const MO_SHIFT: u32 = 12;
    /// Broadcast accept.
    pub const BAM: u32 = 1 << 15;
    /// Buffer size of queues that give none: 2048 >> value.
    pub const BSIZE_SHIFT: u32 = 16;
    /// VLAN filter enable.
    pub const VFE: u32 = 1 << 18;
    /// Strip the CRC.
    pub const SECRC: u32 = 1 << 26;
}

/// Bits of TCTL.
pub mod tctl {
    /// Transmitter enable.
    pub const EN: u32 = 1 << 1;
    /// Pad short packets.
    pub const PSP: u32 = 1 << 3;
}

/// Bits of RXDCTL and TXDCTL.
pub mod dctl {
    /// Queue enable.
    pub const ENABLE: u32 = 1 << 25;
    /// Flush of written-back descriptors; it clears itself.
    pub const SWFLSH: u32 = 1 << 26;
}

/// Bits of SRRCTL.
pub mod srrctl {
    /// Packet buffers in KiB.
    pub const BSIZE_MASK: u32 = 0x7f;
    /// Kind of descriptors.
    pub const DESCTYPE_SHIFT: u32 = 25;
    /// Drop packets when there are no descriptors, instead of waiting for some.
    pub const DROP_EN: u32 = 1 << 31;
}

/// Bits of RXCSUM.
pub mod rxcsum {
    /// IP checksum offload.
    pub const IPOFL: u32 = 1 << 8;
    /// TCP and UDP checksum offload.
    pub const TUOFL: u32 = 1 << 9;
    /// No packet checksum: the RSS hash has its place.
    pub const PCSD: u32 = 1 << 13;
}

/// Bits of MRQC.
pub mod mrqc {
    /// Which of several queues a packet is for.
    pub const ENABLE_MASK: u32 = 7;
    /// By RSS.
    pub const ENABLE_RSS: u32 = 2;
    /// Hash of IPv4 with TCP.
    pub const TCP_IPV4: u32 = 1 << 16;
    /// Hash of IPv4.
    pub const IPV4: u32 = 1 << 17;
    /// Hash of IPv6 with TCP behind extension headers.
    pub const TCP_IPV6_EX: u32 = 1 << 18;
    /// Hash of IPv6 with extension headers.
    pub const IPV6_EX: u32 = 1 << 19;
    /// Hash of IPv6.
    pub const IPV6: u32 = 1 << 20;
    /// Hash of IPv6 with TCP.
    pub const TCP_IPV6: u32 = 1 << 21;
    /// Hash of IPv4 with UDP.
    pub const UDP_IPV4: u32 = 1 << 22;
    /// Hash of IPv6 with UDP.
    pub const UDP_IPV6: u32 = 1 << 23;
    /// Hash of IPv6 with UDP behind extension headers.
    pub const UDP_IPV6_EX: u32 = 1 << 24;
}

/// Extended status and error of an advanced receive descriptor as it is written back; the low byte is the status of a legacy one.
pub mod rx_status {
    /// Descriptor done.
    pub const DD: u32 = 1;
    /// End of packet.
    pub const EOP: u32 = 1 << 1;
    /// Checksum indication is to be ignored (legacy).
    pub const IXSM: u32 = 1 << 2;
    /// The packet had a VLAN tag.
    pub const VP: u32 = 1 << 3;
    /// UDP checksum was looked at.
    pub const UDPCS: u32 = 1 << 4;
    /// TCP or UDP checksum was looked at.
    pub const L4CS: u32 = 1 << 5;
    /// IP checksum was looked at.
    pub const IPCS: u32 = 1 << 6;
    /// Passed an inexact filter.
    pub const PIF: u32 = 1 << 7;
    /// TCP or UDP checksum is wrong.
    pub const L4E: u32 = 1 << 29;
    /// IP checksum is wrong.
    pub const IPE: u32 = 1 << 30;
    /// Received with an error.
    pub const RXE: u32 = 1 << 31;
}

/// Packet types in an advanced receive descriptor, from bit 4 of its first dword.
pub mod packet_type {
    /// IPv4 header.
    pub const IPV4: u32 = 1 << 4;
    /// IPv4 header with options.
    pub const IPV4E: u32 = 1 << 5;
    /// IPv6 header.
    pub const IPV6: u32 = 1 << 6;
    /// IPv6 header with extension headers.
    pub const IPV6E: u32 = 1 << 7;
    /// TCP header.
    pub const TCP: u32 = 1 << 8;
    /// UDP header.
    pub const UDP: u32 = 1 << 9;
    /// SCTP header.
    pub const SCTP: u32 = 1 << 10;
}

/// Command and type of a transmit descriptor: its third dword. Legacy descriptors have the same bits from 24 on.
pub mod tx {
    /// End of packet.
    pub const EOP: u32 = 1 << 24;
    /// Insert a checksum (legacy).
    pub const IC: u32 = 1 << 26;
    /// Report status.
    pub const RS: u32 = 1 << 27;
    /// Not a legacy descriptor.
    pub const DEXT: u32 = 1 << 29;
    /// Insert a VLAN tag.
    pub const VLE: u32 = 1 << 30;
    /// Segment (TSO).
    pub const TSE: u32 = 1 << 31;
    /// Kind of advanced descriptor, 4 bits.
    pub const DTYP_SHIFT: u32 = 20;
    /// Context.
    pub const DTYP_CONTEXT: u32 = 2;
    /// Data.
    pub const DTYP_DATA: u32 = 3;
    /// In the last dword: descriptor done.
    pub const DD: u32 = 1;
    /// In the last dword: insert the IP checksum.
    pub const IXSM: u32 = 1 << 8;
    /// In the last dword: insert the TCP, UDP or SCTP checksum.
    pub const TXSM: u32 = 1 << 9;
    /// Of a context: the packet is IPv4.
    pub const TUCMD_IPV4: u32 = 1 << 10;
    /// Of a context: what is on top of IP, 2 bits: UDP, TCP, SCTP.
    pub const TUCMD_L4T_SHIFT: u32 = 11;
}
