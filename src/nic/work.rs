//! What the driver does with packets: a task for each queue pair.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use vfio_uring::reactor::yield_now;
use vfio_uring_igb::{Packet, Result, RxQueue, TxQueue};

/// Packets that were dealt with, by the one thread that does; whoever single-steps it reads it.
pub static PACKETS: AtomicU64 = AtomicU64::new(0);

#[inline]
fn done(packets: usize) {
    PACKETS.store(PACKETS.load(Relaxed).wrapping_add(packets as u64), Relaxed);
}

/// Takes packets and drops them.
pub async fn receive(mut rx: RxQueue, _tx: TxQueue, batch: usize) -> Result<()> {
    let mut packets = Vec::with_capacity(batch);
    loop {
        rx.ready().await?;
        done(rx.rx_batch(&mut packets, batch)?);
        packets.clear();
        yield_now().await;
    }
}

/// Sends what is received at one NIC by another, with other addresses.
pub async fn forward(mut rx: RxQueue, mut tx: TxQueue, addresses: [u8; 12], batch: usize) -> Result<()> {
    let mut packets: Vec<Packet> = Vec::with_capacity(batch);
    loop {
        rx.ready().await?;
        rx.rx_batch(&mut packets, batch)?;
        for packet in &mut packets {
            if let Some(header) = packet.data_mut().get_mut(..12) {
                header.copy_from_slice(&addresses);
            }
        }
        // What the ring has no room for waits, and with it what comes: nothing is dropped here.
        while !packets.is_empty() {
            let sent = tx.tx_batch(&mut packets)?;
            done(sent);
            if sent == 0 {
                tx.ready().await?;
            }
        }
        yield_now().await;
    }
}

/// Sends the same packet again and again.
pub async fn send(_rx: RxQueue, mut tx: TxQueue, frame: Vec<u8>, batch: usize) -> Result<()> {
    let (buffers, mut packets) = (tx.buffers(), Vec::new());
    // Each buffer has the packet in it from now on.
    while let Some(mut packet) = buffers.alloc() {
        packet.copy_from(&frame)?;
        packets.push(packet);
    }
    packets.clear();
    packets.shrink_to(batch);
    loop {
        while packets.len() < batch
            && let Some(mut packet) = buffers.alloc()
        {
            packet.set_len(frame.len())?;
            packets.push(packet);
        }
        let sent = tx.tx_batch(&mut packets)?;
        done(sent);
        if sent == 0 {
            tx.ready().await?;
        }
        yield_now().await;
    }
}

/// A broadcast of `size` bytes without CRC from `mac`, of the type for experiments (IEEE 802), which nobody answers.
pub fn frame(mac: [u8; 6], size: usize) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &mac, &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..size).map(|at| at as u8));
    frame
}
