//! Groups that were read and wait for their answer.

use std::collections::{BTreeMap, HashMap};

/// A cookie is the kernel's, and comes again as soon as its group is answered, by us or by the kernel when its device is detached.
/// So a group has a key of its own here, which never comes again.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    next: u64,
    cookies: BTreeMap<u64, u32>,
    keys: HashMap<u32, u64>,
}

impl Waiting {
    /// A group was read. One that had this cookie before was answered by the kernel.
    pub(super) fn insert(&mut self, cookie: u32) -> u64 {
        let key = self.next;
        self.next += 1;
        if let Some(before) = self.keys.insert(cookie, key) {
            self.cookies.remove(&before);
        }
        self.cookies.insert(key, cookie);
        key
    }

    pub(super) fn cookie(&self, key: u64) -> Option<u32> {
        self.cookies.get(&key).copied()
    }

    /// The group is answered.
    pub(super) fn remove(&mut self, key: u64) {
        if let Some(cookie) = self.cookies.remove(&key) {
            self.keys.remove(&cookie);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.cookies.len()
    }

    /// All of them, which wait no more.
    pub(super) fn take(&mut self) -> Vec<u32> {
        self.keys.clear();
        std::mem::take(&mut self.cookies).into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_that_comes_again_is_another_group() {
        let mut waiting = Waiting::default();
        let (first, other) = (waiting.insert(1), waiting.insert(2));
        assert_eq!((waiting.cookie(first), waiting.cookie(other), waiting.len()), (Some(1), Some(2), 2));
        let again = waiting.insert(1);
        assert_eq!((waiting.cookie(first), waiting.cookie(again), waiting.len()), (None, Some(1), 2));
        waiting.remove(first);
        assert_eq!(waiting.cookie(again), Some(1), "the key of before takes nothing away");
        waiting.remove(again);
        assert_eq!((waiting.cookie(again), waiting.take()), (None, vec![2]));
        assert_eq!(waiting.len(), 0);
    }
}
