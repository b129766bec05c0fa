//! Pollers: what is looked at once a turn, because it tells of news in plain memory.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    time::Instant,
};

use super::{Local, current};

/// What a poller waits for, when it has found nothing for a while and the reactor would like to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standby {
    /// Nothing is outstanding: sleep as long as you like.
    Idle,
    /// An interrupt is armed and will wake the reactor; look again at the instant at the latest. The poller has looked once
    /// more after arming.
    Armed(Option<Instant>),
    /// Something is outstanding that no interrupt will tell of: look again soon.
    Polled,
    /// The look after arming found something: don't sleep.
    Found,
}

/// A queue, or something else in memory, that the reactor looks at once a turn.
pub trait Poller {
    /// Publishes what was submitted in this turn (one doorbell for all of it) and takes what has completed. True: something
    /// was found.
    fn poll(&self) -> bool;

    /// The reactor is about to sleep: arm the interrupt if there is one, look again, and say how long sleeping is fine.
    fn standby(&self) -> Standby;
}

#[derive(Default)]
pub(crate) struct Pollers {
    list: RefCell<Vec<(u64, Rc<dyn Poller>)>>,
    next_id: Cell<u64>,
    /// Whether there are changes that came in while the list was being walked.
    changed: Cell<bool>,
    removed: RefCell<Vec<u64>>,
    added: RefCell<Vec<(u64, Rc<dyn Poller>)>>,
}

impl Pollers {
    /// Polls each once.
    #[inline]
    pub(crate) fn poll(&self) -> bool {
        let Ok(list) = self.list.try_borrow() else { return false };
        let mut found = false;
        for (_, poller) in list.iter() {
            found |= poller.poll();
        }
        drop(list);
        if self.changed.get() {
            self.apply_changes();
        }
        found
    }

    /// What all of them together say about sleeping.
    pub(crate) fn standby(&self) -> Standby {
        let list = self.list.borrow();
        let mut all = Standby::Idle;
        for (_, poller) in list.iter() {
            all = match (all, poller.standby()) {
                (Standby::Found, _) | (_, Standby::Found) => Standby::Found,
                (Standby::Polled, _) | (_, Standby::Polled) => Standby::Polled,
                (Standby::Idle, other) | (other, Standby::Idle) => other,
                (Standby::Armed(a), Standby::Armed(b)) => Standby::Armed(match (a, b) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                }),
            };
        }
        drop(list);
        if self.changed.get() {
            self.apply_changes();
        }
        all
    }

    fn apply_changes(&self) {
        let mut dropped = Vec::new();
        if let Ok(mut list) = self.list.try_borrow_mut() {
            self.changed.set(false);
            list.append(&mut self.added.borrow_mut());
            for id in self.removed.borrow_mut().drain(..) {
                if let Some(at) = list.iter().position(|(other, _)| *other == id) {
                    dropped.push(list.remove(at));
                }
            }
        }
        // Outside of the borrows: a poller's drop may unregister others.
        drop(dropped);
    }

    pub(crate) fn clear(&self) {
        let list = self.list.take();
        let added = self.added.take();
        drop((list, added));
    }
}

/// Unregisters its poller when it is dropped.
#[must_use = "dropping it unregisters the poller"]
pub struct PollerGuard {
    local: Weak<Local>,
    id: u64,
}

/// Has `poller` looked at once a turn by the reactor of this thread, until the guard is dropped.
///
/// # Panics
/// Outside of a reactor.
pub fn register_poller(poller: Rc<dyn Poller>) -> PollerGuard {
    let local = current("a poller");
    let id = local.pollers.next_id.get();
    local.pollers.next_id.set(id + 1);
    local.pollers.added.borrow_mut().push((id, poller));
    local.pollers.changed.set(true);
    local.pollers.apply_changes();
    PollerGuard { local: Rc::downgrade(&local), id }
}

impl Drop for PollerGuard {
    fn drop(&mut self) {
        if let Some(local) = self.local.upgrade() {
            local.pollers.removed.borrow_mut().push(self.id);
            local.pollers.changed.set(true);
            local.pollers.apply_changes();
        }
    }
}
