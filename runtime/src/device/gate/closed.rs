//! Closing gates, and opening them again.

use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use futures::lock::OwnedMutexGuard;

use super::{Gate, wait::Waiting, why};
use crate::{Error, Result, reactor::timeout};

/// How long those inside may take to leave. Then it goes on without waiting: they wait for the kernel or the server, which has them
/// wait for each other.
const DRAIN: Duration = Duration::from_secs(1);
/// How long another reset of the device may take: the kernel waits up to 60 s for a device to come back.
const TURN: Duration = Duration::from_secs(90);

/// What happened while the gates were closed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    pub(crate) reset: Option<Reset>,
    /// What holds from now on, of [`why`].
    pub(crate) set: u64,
    /// What does not hold any more.
    pub(crate) clear: u64,
}

/// A reset that took place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reset {
    /// Whoever did it said so.
    Confirmed,
    /// It was asked for, and nobody says whether it was done.
    Asked,
}

struct Held {
    gate: Arc<Gate>,
    _turn: OwnedMutexGuard<()>,
}

/// Gates that are closed, of one device or of several that are reset together. It goes along with what is done meanwhile, to another
/// thread as well: the gates open when that is over, whoever waits for it.
pub(crate) struct Closed {
    held: Vec<Held>,
    flag: u64,
}

impl Closed {
    /// Closes `asked` and all `others`, in an order that is the same for all who do so, and waits for those inside. `flag` is
    /// [`why::RESETTING`] or [`why::CHANGING`].
    pub(crate) async fn close(asked: &Arc<Gate>, others: Vec<Arc<Gate>>, flag: u64) -> Result<Self> {
        let mut gates = others;
        gates.push(asked.clone());
        gates.sort_by_key(|gate| (gate.bdf, gate.id));
        gates.dedup_by_key(|gate| gate.id);
        let mut closed = Self { held: Vec::new(), flag: 0 };
        for gate in gates {
            let turn = timeout(TURN, gate.turn.clone().lock_owned()).await;
            let turn = turn.map_err(|_| Error::Timeout { what: format!("another reset of {}", gate.name), after: TURN })?;
            if !gate.is_gone() {
                closed.held.push(Held { gate, _turn: turn });
            }
        }
        if asked.is_gone() {
            return Err(asked.refusal(why::GONE));
        }
        closed.flag = flag;
        for Held { gate, .. } in &closed.held {
            gate.word.fetch_or(flag, Ordering::SeqCst);
            gate.wake();
        }
        if timeout(DRAIN, closed.drained()).await.is_err() {
            tracing::warn!("accesses to a device that is to be reset do not end; it is reset all the same");
        }
        Ok(closed)
    }

    async fn drained(&self) {
        for Held { gate, .. } in &self.held {
            let mut waiting = Waiting::new(gate);
            poll_fn(|cx| {
                waiting.register(cx);
                match gate.word.load(Ordering::SeqCst) >> 32 {
                    0 => Poll::Ready(()),
                    _ => Poll::Pending,
                }
            })
            .await;
        }
    }

    /// Takes the mappings away. System calls that wait for page faults, which may wait for the device: not for the reactor's thread
    /// when the device is one of the kernel.
    pub(crate) fn withdraw(&self) {
        for Held { gate, .. } in &self.held {
            if let Err(error) = gate.settle(0) {
                tracing::warn!(device = &*gate.name, %error, "a mapping could not be taken away; accesses to it will wait");
            }
        }
    }

    /// Opens the gates again, after the mappings are back. Those that did not come back, by device; that device is not available
    /// then.
    pub(crate) fn finish(mut self, outcome: Outcome) -> Result<(), Vec<(Arc<str>, Error)>> {
        let failed = self.open(outcome);
        if failed.is_empty() { Ok(()) } else { Err(failed) }
    }

    fn open(&mut self, Outcome { reset, set, clear }: Outcome) -> Vec<(Arc<str>, Error)> {
        let mut failed = Vec::new();
        for Held { gate, .. } in self.held.drain(..) {
            if let Some(reset) = reset {
                let generation = gate.generation.fetch_add(1, Ordering::SeqCst) + 1;
                if reset == Reset::Confirmed {
                    gate.confirmed.store(generation, Ordering::SeqCst);
                }
            }
            gate.word.fetch_or(set, Ordering::SeqCst);
            gate.word.fetch_and(!clear, Ordering::SeqCst);
            match gate.settle(self.flag) {
                Ok(()) => gate.word.fetch_and(!why::UNMAPPED, Ordering::SeqCst),
                Err(error) => {
                    tracing::warn!(device = &*gate.name, %error, "the device's memory could not be mapped again");
                    failed.push((gate.name.clone(), error));
                    gate.word.fetch_or(why::UNMAPPED, Ordering::SeqCst)
                }
            };
            gate.word.fetch_and(!self.flag, Ordering::SeqCst);
            gate.wake();
        }
        failed
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.open(Outcome::default());
    }
}
