//! The link: its state, and a stream of its changes.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use futures::{Stream, StreamExt};
use vfio_uring::{
    device::Interrupt,
    reactor::{sleep, timeout},
};

use crate::{
    Error, Result,
    regs::Regs,
    spec::{EIMS, ICR, LSC, STATUS, status},
};

/// Time between two looks at the link where there is no interrupt, and for safety where there is one.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const SAFETY_INTERVAL: Duration = Duration::from_secs(2);

/// The link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkState {
    /// Whether it is up. The rest is not known while it is not.
    pub up: bool,
    /// Mb/s: 10, 100 or 1000.
    pub speed: u32,
    /// Whether both ends can send at the same time.
    pub full_duplex: bool,
}

impl LinkState {
    pub(crate) fn of(value: u32) -> Self {
        // A device that is gone reads as all ones.
        if value & status::LU == 0 || value == u32::MAX {
            return Self::default();
        }
        let speed = match value >> status::SPEED_SHIFT & 3 {
            0 => 10,
            1 => 100,
            _ => 1000,
        };
        Self { up: true, speed, full_duplex: value & status::FD != 0 }
    }
}

impl std::fmt::Display for LinkState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.up {
            true => write!(f, "up, {} Mb/s, {} duplex", self.speed, if self.full_duplex { "full" } else { "half" }),
            false => f.write_str("down"),
        }
    }
}

/// The link's state, kept up to date by a task, and who waits for another one.
#[derive(Default)]
pub(crate) struct Watch {
    state: Cell<LinkState>,
    /// Counts the changes.
    changes: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
    ended: RefCell<Option<Error>>,
}

impl Watch {
    fn set(&self, state: LinkState) {
        if self.state.replace(state) != state {
            tracing::debug!(%state, "link");
            self.changes.set(self.changes.get() + 1);
            self.wake();
        }
    }

    pub(crate) fn end(&self, error: Error) {
        self.ended.borrow_mut().get_or_insert(error);
        self.wake();
    }

    fn wake(&self) {
        let waiting = self.waiting.take();
        waiting.into_iter().for_each(Waker::wake);
    }

    pub(crate) async fn look(&self, regs: &Regs) -> Result<()> {
        self.set(LinkState::of(regs.read(STATUS).await?));
        Ok(())
    }
}

/// Keeps the state up to date, by an interrupt and the bit that enables it, or by looking.
pub(crate) async fn keep(watch: Rc<Watch>, regs: Regs, interrupt: Option<(Interrupt, u32)>) -> Result<()> {
    match interrupt {
        Some((interrupt, bit)) => by_interrupt(&watch, &regs, interrupt, bit).await,
        None => by_looks(&watch, &regs).await,
    }
}

async fn by_interrupt(watch: &Watch, regs: &Regs, mut interrupt: Interrupt, bit: u32) -> Result<()> {
    loop {
        regs.write(EIMS, bit).await?;
        watch.look(regs).await?;
        match timeout(SAFETY_INTERVAL, interrupt.next()).await {
            Ok(Some(fired)) => fired?,
            Ok(None) => return Ok(()),
            Err(_) => {}
        }
        // Reading clears it.
        let causes = regs.read(ICR).await?;
        tracing::trace!(link = causes & LSC != 0, "the other interrupt");
    }
}

async fn by_looks(watch: &Watch, regs: &Regs) -> Result<()> {
    loop {
        watch.look(regs).await?;
        sleep(LOOK_INTERVAL).await;
    }
}

/// The link's states: the present one first, then each new one; of several changes between two looks, the newest. It ends with what
/// ended the NIC.
pub struct LinkChanges {
    watch: Rc<Watch>,
    /// Changes that were seen; `None`: not even the first state.
    seen: Option<u64>,
    ended: bool,
}

impl LinkChanges {
    pub(crate) fn new(watch: Rc<Watch>) -> Self {
        Self { watch, seen: None, ended: false }
    }
}

impl Stream for LinkChanges {
    type Item = Result<LinkState>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let watch = self.watch.clone();
        if let Some(error) = watch.ended.borrow().clone() {
            self.ended = true;
            return Poll::Ready(Some(Err(error)));
        }
        if self.seen != Some(watch.changes.get()) {
            self.seen = Some(watch.changes.get());
            return Poll::Ready(Some(Ok(watch.state.get())));
        }
        let mut waiting = watch.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl std::fmt::Debug for LinkChanges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkChanges").field("state", &self.watch.state.get()).finish_non_exhaustive()
    }
}
