//! Waiting for what becomes of a device.

use std::{
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures::Stream;

use super::{Gate, State, lock};
use crate::{Error, Result};

/// A place among those that a gate wakes.
#[derive(Debug)]
pub(super) struct Waiting {
    gate: Arc<Gate>,
    key: Option<usize>,
}

impl Waiting {
    pub(super) fn new(gate: &Arc<Gate>) -> Self {
        Self { gate: gate.clone(), key: None }
    }

    /// Has the task woken at the next change. To be done before looking.
    pub(super) fn register(&mut self, cx: &Context<'_>) {
        let mut waiting = lock(&self.gate.waiting);
        match self.key {
            Some(key) => waiting[key].clone_from(cx.waker()),
            None => self.key = Some(waiting.insert(cx.waker().clone())),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let waker = self.key.and_then(|key| lock(&self.gate.waiting).try_remove(key));
        // Not under the lock: with the waker a task may go that waits as well.
        drop(waker);
    }
}

/// A state that a device came into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateChange {
    /// What can be done with it now.
    pub state: State,
    /// How many resets it went through, see [`Device::generation`](crate::device::Device::generation).
    pub generation: u64,
}

impl StateChange {
    fn now(gate: &Gate) -> Self {
        let state = gate.state();
        Self { state, generation: gate.generation() }
    }
}

/// The changes of a device's state, as a stream: from [`Device::state_changes`](crate::device::Device::state_changes).
///
/// One that is followed by another before it is looked at is left out; a reset that is missed so is seen by its generation. After
/// [`State::Gone`] it ends. It does not keep the device open, and can be sent to another thread.
#[derive(Debug)]
pub struct StateChanges {
    waiting: Waiting,
    last: StateChange,
    ended: bool,
}

impl StateChanges {
    pub(crate) fn new(gate: &Arc<Gate>) -> Self {
        Self { waiting: Waiting::new(gate), last: StateChange::now(gate), ended: false }
    }
}

impl Stream for StateChanges {
    type Item = StateChange;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<StateChange>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        this.waiting.register(cx);
        let now = StateChange::now(&this.waiting.gate);
        this.ended = now.state == State::Gone;
        if now == this.last {
            return if this.ended { Poll::Ready(None) } else { Poll::Pending };
        }
        this.last = now;
        Poll::Ready(Some(now))
    }
}

/// Ends when the device is gone, with the cause.
#[derive(Debug)]
pub(crate) struct Ended(Waiting);

impl Ended {
    pub(crate) fn new(gate: &Arc<Gate>) -> Self {
        Self(Waiting::new(gate))
    }
}

impl Future for Ended {
    type Output = Error;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Error> {
        self.0.register(cx);
        self.0.gate.cause().map_or(Poll::Pending, Poll::Ready)
    }
}

pub(super) async fn live(gate: &Arc<Gate>) -> Result<()> {
    let mut waiting = Waiting::new(gate);
    poll_fn(|cx| {
        waiting.register(cx);
        match (gate.state(), gate.cause()) {
            (State::Live, _) => Poll::Ready(Ok(())),
            (_, Some(cause)) => Poll::Ready(Err(cause)),
            _ => Poll::Pending,
        }
    })
    .await
}
