//! Data that says what it is: where it was written, in which run, and how many times before.
//!
//! Each block of the namespace starts with its address, the run's seed and the generation of its write; the rest is made from
//! these three. A block that comes from another place, from an older write, or half of each, is found out.

use std::fmt;

/// Bytes of the words that data is made of.
const WORD: usize = size_of::<u64>();

/// What blocks are to hold.
#[derive(Debug, Clone, Copy)]
pub struct Pattern {
    pub seed: u64,
    /// Bytes of a block: a multiple of a word, 512 at least.
    pub block_size: usize,
}

/// The first block that holds something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    pub lba: u64,
    pub expected: u32,
    /// Lba, seed and generation as they are in the block.
    pub found: [u64; 3],
}

impl Pattern {
    /// Fills `data`, which goes to block `lba` and on.
    pub fn fill(&self, data: &mut [u8], lba: u64, generation: u32) {
        for (lba, block) in (lba..).zip(data.chunks_exact_mut(self.block_size)) {
            for (place, word) in block.chunks_exact_mut(WORD).zip(self.words(lba, generation)) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// Checks `data`, which was read from block `lba` and on; how many blocks hold something else, and the first of them.
    pub fn check(&self, data: &[u8], lba: u64, generation: u32) -> (u64, Option<Mismatch>) {
        let (mut count, mut first) = (0, None);
        for (lba, block) in (lba..).zip(data.chunks_exact(self.block_size)) {
            // No early end: this way the loop is a vector one, and blocks are good as a rule.
            let words = block.chunks_exact(WORD).map(word);
            let wrong = words.zip(self.words(lba, generation)).fold(0, |wrong, (a, b)| wrong | (a ^ b));
            if wrong != 0 {
                count += 1;
                let at = |index: usize| block.chunks_exact(WORD).nth(index).map_or(0, word);
                first.get_or_insert(Mismatch { lba, expected: generation, found: [at(0), at(1), at(2)] });
            }
        }
        (count, first)
    }

    /// The words of a block.
    fn words(&self, lba: u64, generation: u32) -> impl Iterator<Item = u64> {
        let seed = self.seed;
        let key = mix(mix(lba ^ seed.rotate_left(32)) ^ u64::from(generation));
        [lba, seed, generation.into()]
            .into_iter()
            .chain((0u64..).map(move |i| key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

/// The finalizer of SplitMix64: near keys give unlike ones.
fn mix(key: u64) -> u64 {
    let key = (key ^ key >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let key = (key ^ key >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    key ^ key >> 31
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [lba, seed, generation] = self.found;
        write!(f, "block {} does not hold write {} to it; ", self.lba, self.expected)?;
        match lba == self.lba && generation == u64::from(self.expected) {
            true => write!(f, "its first words are as written with seed {seed}, but not all of the rest"),
            false => write!(f, "it starts as write {generation} to block {lba} with seed {seed} would"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATTERN: Pattern = Pattern { seed: 7, block_size: 512 };

    #[test]
    fn what_was_written_is_good() {
        let mut data = vec![0; 4096];
        PATTERN.fill(&mut data, 100, 3);
        assert_eq!(PATTERN.check(&data, 100, 3), (0, None));
    }

    #[test]
    fn anything_else_is_found() {
        let mut data = vec![0; 1024];
        PATTERN.fill(&mut data, 100, 3);
        assert_eq!(PATTERN.check(&data, 101, 3).0, 2, "another place");
        assert_eq!(PATTERN.check(&data, 100, 4).0, 2, "an older write");
        assert_eq!(Pattern { seed: 8, ..PATTERN }.check(&data, 100, 3).0, 2, "another run");
        for bit in [0, 511 * 8, 512 * 8 + 100, 1024 * 8 - 1] {
            let mut data = data.clone();
            data[bit / 8] ^= 1 << (bit % 8);
            let (count, first) = PATTERN.check(&data, 100, 3);
            assert_eq!((count, first.unwrap().lba), (1, 100 + bit as u64 / 4096), "bit {bit}");
        }
        assert_eq!(PATTERN.check(&[0; 1024], 100, 3).0, 2, "zeroes");
    }

    #[test]
    fn a_half_written_block_is_found() {
        let (mut old, mut new) = (vec![0; 512], vec![0; 512]);
        PATTERN.fill(&mut old, 5, 1);
        PATTERN.fill(&mut new, 5, 2);
        new[256..].copy_from_slice(&old[256..]);
        assert_eq!(PATTERN.check(&new, 5, 2).0, 1);
    }
}
