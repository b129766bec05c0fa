//! Data that tells place and seed apart.

use vfio_uring::dma::DmaBuf;

fn word(seed: u64, i: usize) -> u64 {
    (seed << 20 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

pub fn fill(buf: &mut DmaBuf, seed: u64) {
    buf.as_typed_mut::<u64>().unwrap().iter_mut().enumerate().for_each(|(i, to)| *to = word(seed, i));
}

pub fn is_filled(buf: &DmaBuf, seed: u64) -> bool {
    buf.as_typed::<u64>().unwrap().iter().enumerate().all(|(i, &found)| found == word(seed, i))
}
