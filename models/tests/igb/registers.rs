//! Registers, as Linux's driver finds and sets them.

use vfio_uring_models::{
    device::{Device, irq, region},
    igb::{Config, Wire, spec::*},
};

use crate::support::*;

fn driver() -> Driver {
    Driver::new(config(MAC_A, Wire::Sink))
}

fn eeprom(driver: &mut Driver, word: u32) -> u16 {
    driver.set(EERD, word << 2 | 1);
    let value = driver.get(EERD);
    assert_eq!(value & 2, 2, "done");
    (value >> 16) as u16
}

fn phy(driver: &mut Driver, register: u32) -> u16 {
    driver.set(MDIC, 2 << 26 | 1 << 21 | register << 16);
    let value = driver.get(MDIC);
    assert_eq!(value >> 28 & 5, 1, "ready, no error");
    value as u16
}

#[test]
fn pci_identity_regions_and_interrupts() {
    let mut driver = driver();
    let mut config = [0; 256];
    driver.nic.read(region::CONFIG, 0, &mut config, &mut driver.memory).unwrap();
    assert_eq!(config[..4], [0x86, 0x80, 0xc9, 0x10]);
    assert_eq!(config[9..12], [0, 0, 2]);
    let mut capabilities = Vec::new();
    let mut at = usize::from(config[0x34]);
    while at != 0 {
        capabilities.push(config[at]);
        if config[at] == 0x11 {
            assert_eq!(config[at + 2..at + 12], [24, 0, 3, 0, 0, 0, 3, 0x20, 0, 0], "25 vectors in BAR 3");
        }
        at = config[at + 1].into();
    }
    assert_eq!(capabilities, [0x01, 0x05, 0x11, 0x10]);
    for (bar, size) in [(0, 0x2_0000u32), (1, 0), (2, 0), (3, 0x4000)] {
        let offset = 0x10 + 4 * u64::from(bar as u8);
        driver.nic.write(region::CONFIG, offset, &[0xff; 4], &mut driver.memory).unwrap();
        let mut mask = [0; 4];
        driver.nic.read(region::CONFIG, offset, &mut mask, &mut driver.memory).unwrap();
        assert_eq!(u32::from_le_bytes(mask), if size == 0 { 0 } else { !(size - 1) });
        assert_eq!(driver.nic.region(bar).size, u64::from(size));
    }
    let area = driver.nic.region(0).mappable.unwrap();
    assert_eq!((area.offset, area.size), (0xc000, 0x4000));
    assert!(Driver::new(Config { mapped_queues: false, ..Config::default() }).nic.region(0).mappable.is_none());
    assert_eq!([irq::INTX, irq::MSI, irq::MSIX].map(|index| driver.nic.irq_vectors(index)), [0, 1, 25]);
}

#[test]
fn bring_up_as_linux_does_it() {
    let mut driver = driver();
    // The bus is left alone before the reset.
    driver.set(CTRL, ctrl::FD | ctrl::GIO_MASTER_DISABLE);
    assert_eq!(driver.get(STATUS) & status::GIO_MASTER_ENABLE, 0);
    driver.set(IMC, !0);
    let control = driver.get(CTRL);
    driver.set(CTRL, control | ctrl::RST);
    assert_eq!(driver.get(CTRL) & (ctrl::RST | ctrl::GIO_MASTER_DISABLE), 0);
    assert_ne!(driver.get(STATUS) & status::GIO_MASTER_ENABLE, 0);
    assert_ne!(driver.get(EECD) & 1 << 9, 0, "read automatically");
    assert_ne!(driver.get(EEMNGCTL) & 1 << 18, 0, "configuration done");
    assert!((driver.get(EECD) >> 11 & 15) + 6 < 15, "words are read by EERD");

    // The EEPROM, with its semaphores.
    driver.set(EECD, 1 << 6);
    assert_ne!(driver.get(EECD) & 1 << 7, 0, "granted");
    driver.set(EECD, 0);
    assert_eq!(driver.get(EECD) & 1 << 7, 0);
    assert_eq!(driver.get(SWSM) & 1, 0, "taken by reading it");
    assert_eq!(driver.get(SWSM) & 1, 1);
    driver.set(SWSM, 3);
    assert_eq!(driver.get(SWSM) & 2, 2);
    driver.set(SWSM, 0);
    assert_eq!(driver.get(SWSM) & 3, 0);
    driver.set(SW_FW_SYNC, 2);
    assert_eq!(driver.get(SW_FW_SYNC), 2);
    let sum = (0..0x40).fold(0u16, |sum, word| sum.wrapping_add(eeprom(&mut driver, word)));
    assert_eq!(sum, 0xbaba);
    let mac: Vec<u8> = (0..3).flat_map(|word| eeprom(&mut driver, word).to_le_bytes()).collect();
    assert_eq!(mac, MAC_A);
    assert_eq!(driver.get(RAL), u32::from_le_bytes([2, 0, 0, 0]));
    assert_eq!(driver.get(RAH), 1 << 31 | u32::from(u16::from_le_bytes([0, 0xa])));
    assert_eq!(eeprom(&mut driver, 0x1000), 0xffff, "beyond the end");

    // The PHY.
    assert_eq!((phy(&mut driver, 2), phy(&mut driver, 3) & 0xfff0), (0x02a8, 0x0390));
    driver.set(CTRL, ctrl::SLU | ctrl::PHY_RST);
    assert_eq!(driver.get(CTRL), ctrl::SLU);
    phy(&mut driver, 1);
    assert_eq!(phy(&mut driver, 1) & 0x24, 0x24, "link, negotiated");
    assert_eq!(driver.get(STATUS) & 0xc3, status::FD | status::LU | 0x80);
    assert_ne!(phy(&mut driver, 5) & 0x0c00, 0, "the other end can pause");
    assert_eq!(driver.get(RXPBS) & 0x7f, 64);

    // Tables and statistics.
    for (at, count) in [(MTA, 128), (VFTA, 128), (0xa000, 128), (RETA, 32), (RSSRK, 10)] {
        for i in 0..count {
            driver.set(at + 4 * i, 0x1234_5678 + i as u32);
        }
        for i in 0..count {
            assert_eq!(driver.get(at + 4 * i), 0x1234_5678 + i as u32);
        }
    }
    for at in (STATISTICS..STATISTICS + 0x140).step_by(4) {
        assert_eq!(driver.get(at), 0);
    }
    assert_eq!(driver.get(0x7000), 0, "nothing is there");
    driver.set(0x7000, 1);
    assert_eq!(driver.get(0x7000), 0);
}

#[test]
fn queues_have_their_registers_at_two_places() {
    let mut driver = driver();
    for (old, new, register) in
        [(0x2800, RX_QUEUES, queue::TAIL), (0x2b00, RX_QUEUES + 0xc0, queue::BAL), (0x3900, TX_QUEUES + 0x40, queue::WBAL)]
    {
        driver.set(old + register, 0x1280);
        assert_eq!(driver.get(new + register), 0x1280);
    }
    driver.set(RX_QUEUES + queue::BAL, 0x1234_567f);
    assert_eq!(driver.get(0x2800), 0x1234_5600, "128 bytes");
    driver.set(RX_QUEUES + queue::DCTL, dctl::ENABLE | dctl::SWFLSH);
    assert_eq!(driver.get(0x2828), dctl::ENABLE);
    let area = driver.nic.region(0).mappable.unwrap();
    area.memory.store_u32(TX_QUEUES - RX_QUEUES + 15 * QUEUE_STRIDE + queue::TAIL, 7).unwrap();
    assert_eq!(driver.get(0xe3d8), 7);
}

#[test]
fn resets() {
    let mut driver = driver();
    let control_reset = |driver: &mut Driver| driver.set(CTRL, ctrl::RST);
    let device_reset = |driver: &mut Driver| driver.nic.reset(&mut driver.memory);
    let function_reset = |driver: &mut Driver| {
        let mut config = [0; 256];
        driver.nic.read(region::CONFIG, 0, &mut config, &mut driver.memory).unwrap();
        let express = (0x40..0xf0).step_by(4).find(|&at| config[at] == 0x10 && config[at + 1] == 0).unwrap();
        driver.nic.write(region::CONFIG, express as u64 + 8, &[0, 0x80], &mut driver.memory).unwrap();
    };
    for reset in [control_reset as fn(&mut Driver), device_reset, function_reset] {
        driver.up();
        driver.rx_queue(3, 64);
        driver.set(RAL, 0);
        driver.set(MTA, 5);
        driver.set(EIMS, !0);
        driver.set(IMS, !0);
        reset(&mut driver);
        for register in [RCTL, MTA, EIMS, IMS, RXCSUM, RX_QUEUES + 3 * QUEUE_STRIDE + queue::LEN] {
            assert_eq!(driver.get(register), 0, "{register:#x}");
        }
        assert_eq!(driver.get(RAL), 2);
        assert_eq!(driver.get(RX_QUEUES + queue::DCTL) & dctl::ENABLE, dctl::ENABLE, "queue 0 is on initially");
        assert_eq!(driver.get(TX_QUEUES + QUEUE_STRIDE + queue::DCTL) & dctl::ENABLE, 0);
        assert!(!driver.nic.is_active());
    }
}

#[test]
fn odd_accesses() {
    let mut driver = driver();
    let mut two = [0; 2];
    driver.nic.read(0, RAL, &mut two, &mut driver.memory).unwrap();
    assert_eq!(two, [2, 0]);
    assert!(driver.nic.read(0, 3, &mut two, &mut driver.memory).is_err());
    assert!(driver.nic.write(0, 2, &[0; 4], &mut driver.memory).is_err());
    assert!(driver.nic.write(0, 0, &[0; 2], &mut driver.memory).is_err());
    assert!(driver.nic.read(1, 0, &mut two, &mut driver.memory).is_err());
    driver.nic.write(0, RAL, &[1, 2, 3, 4, 5, 6, 7, 8], &mut driver.memory).unwrap();
    assert_eq!((driver.get(RAL), driver.get(RAH)), (0x0403_0201, 0x0807_0605));
    // The MSI-X table keeps what is written, the rest of its BAR is empty.
    driver.nic.write(3, 0x10, &[9; 8], &mut driver.memory).unwrap();
    driver.nic.write(3, 0x2000, &[9; 8], &mut driver.memory).unwrap();
    let mut eight = [0; 8];
    driver.nic.read(3, 0x10, &mut eight, &mut driver.memory).unwrap();
    assert_eq!(eight, [9; 8]);
    driver.nic.read(3, 0x2000, &mut eight, &mut driver.memory).unwrap();
    assert_eq!(eight, [0; 8]);
}

#[test]
fn addresses_of_groups_are_refused() {
    for mac in [[1, 0, 0, 0, 0, 1], [0; 6], [0xff; 6]] {
        let error = vfio_uring_models::igb::Nic::new(config(mac, Wire::Sink)).unwrap_err();
        assert!(error.to_string().contains("MAC"), "{error}");
    }
    assert_ne!(Config::default().mac, Config::default().mac);
}
