//! Errors of PCI Express.

use std::fs;

use vfio_uring::pci::Bdf;

use super::*;

/// Completion timeout: not corrected, not fatal.
const COMPLETION_TIMEOUT: u32 = 1 << 14;

/// Has the kernel believe that the device reported an error: `struct aer_error_inj` of `drivers/pci/pcie/aer_inject.c`. QEMU's
/// `pcie_aer_inject_error` does not get through: its 82576 can't be told to report.
fn inject(bdf: &str) {
    let bdf: Bdf = bdf.parse().unwrap();
    let mut request = [0; 32];
    request[..3].copy_from_slice(&[bdf.bus(), bdf.device(), bdf.function()]);
    request[4..8].copy_from_slice(&COMPLETION_TIMEOUT.to_ne_bytes());
    request[28..].copy_from_slice(&bdf.domain().to_ne_bytes());
    fs::write("/dev/aer_inject", request).expect("an error that is injected");
}

/// Injects errors until one is told: the kernel drops what comes while it recovers from the one before.
async fn told(bdf: &str, events: &mut Events) {
    for _ in 0..10 {
        inject(bdf);
        if let Ok(event) = timeout(LIMIT / 10, events.next()).await {
            return assert_eq!(event, Some(Event::Error));
        }
    }
    panic!("no error is told");
}

#[test]
fn errors_are_told() {
    let Some(named) = named("VFIO_URING_TEST_AER") else { return };
    run(async {
        let device = named.open(LIMIT).await;
        let (mut one, mut two) = (device.events(), device.events());
        for _ in 0..2 {
            told(&named.bdf, &mut one).await;
            assert_eq!(next(&mut two).await, Some(Event::Error));
        }
        // It works on: the kernel asks whether it can, and the answer is yes.
        assert_eq!(device.config().ids().await.unwrap().vendor, 0x8086);
        drop(device);
        let rest: Vec<_> = timeout(LIMIT, one.collect()).await.expect("the end");
        assert!(rest.iter().filter(|event| **event != Event::Error).eq(&[Event::Gone]), "{rest:?}");
    });
}
