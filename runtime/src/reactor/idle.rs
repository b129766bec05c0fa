//! Waiting: spin while it pays, then give the core away, then sleep in the kernel.

use std::{
    ops::Range,
    thread,
    time::{Duration, Instant},
};

use super::{Local, poller::Standby};

/// How a reactor waits when nothing is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Idle {
    /// Poll on: the shortest latency, and a whole core. On a machine with one core it yields between looks.
    Spin,
    /// Arm the interrupts and sleep at once. What has no interrupt is looked at between short naps.
    Park,
    /// Spin for as long as that has paid of late, then arm and sleep.
    #[default]
    Hybrid,
}

/// Looks that an adaptive spin starts with, and its bounds.
const SPIN_START: u32 = 1024;
const SPIN_MIN: u32 = 16;
const SPIN_MAX: u32 = 4096;
/// Looks between which the core is offered to others, after the spin, before napping.
const YIELDS: u32 = 64;
/// How long a peer on the same core keeps it: more than the call takes, and less than the scheduler's slice, which is what somebody
/// takes who does not wait for us.
const PEER_TURN: Range<Duration> = Duration::from_micros(3)..Duration::from_millis(1);
/// Naps while something is outstanding that no interrupt tells of.
const NAP_MIN: Duration = Duration::from_micros(20);
const NAP_MAX: Duration = Duration::from_millis(1);
/// A sleep that ends sooner than this was not worth its two system calls.
const SHORT_SLEEP: Duration = Duration::from_micros(30);
/// The longest spins that may find nothing in a row, each before a short sleep: who makes the events waits for our core then.
const VAIN_MAX: u32 = 4;
/// Short sleeps after that before longer spins are tried again.
const DISTRUST: u32 = 4096;

/// What a turn comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Work was found.
    Busy,
    /// Nothing was found, and the next turn should follow at once.
    Look,
    /// Nothing was found: sleep until an event, a wake, a timer, or for so long.
    Sleep(Option<Duration>),
}

/// The state of the waiting of one `block_on`.
pub(super) struct Waiting {
    mode: Idle,
    one_core: bool,
    pub(super) turns: u32,
    /// Looks since work was found last.
    looks: u32,
    /// Looks that a spin may take.
    budget: u32,
    nap: Duration,
    /// Somebody else had the core since work was found last, as long as a peer that waits the same way has it.
    shared: bool,
    /// Since when the reactor sleeps, when it is not a nap.
    asleep: Option<Instant>,
    /// Spins of the longest kind that found nothing, in a row.
    vain: u32,
    /// Short sleeps that are not to make the spin longer.
    distrust: u32,
}

impl Waiting {
    pub(super) fn new(mode: Idle) -> Self {
        let one_core = thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        Self {
            mode,
            one_core,
            turns: 0,
            looks: 0,
            budget: SPIN_START,
            nap: NAP_MIN,
            shared: false,
            asleep: None,
            vain: 0,
            distrust: 0,
        }
    }

    /// A turn that found work.
    #[inline(always)]
    pub(super) fn found_work(&mut self) {
        if self.looks != 0 {
            if std::mem::take(&mut self.shared) {
                // The peer shares the core: it is faster when it gets it.
                self.budget = (self.budget / 4).max(SPIN_MIN);
            } else if self.looks <= self.budget.saturating_add(YIELDS) {
                // The spin paid, or would have if it had been longer: allow some more than it took.
                self.budget = (self.budget + self.looks / 4 + 1).min(SPIN_MAX);
                self.vain = 0;
                self.distrust = 0;
            }
            self.looks = 0;
            self.nap = NAP_MIN;
        }
    }

    /// A turn that found nothing. After [`Turn::Sleep`], [`Waiting::woke`] is called.
    pub(super) fn idle_turn(&mut self, local: &Local) -> Turn {
        self.looks = self.looks.saturating_add(1);
        let spin = match self.mode {
            Idle::Spin => true,
            Idle::Park => false,
            Idle::Hybrid => self.looks <= self.budget && !self.one_core,
        };
        if spin {
            if self.one_core {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            return Turn::Look;
        }
        local.service_ring();
        if !local.ready.is_empty() {
            return Turn::Look;
        }
        let standby = local.pollers.standby();
        // What a poller found out while it looked once more may have woken tasks.
        if !local.ready.is_empty() {
            return Turn::Look;
        }
        let limit = match standby {
            Standby::Found => return Turn::Look,
            Standby::Polled if self.looks <= self.budget.saturating_add(YIELDS) => {
                let start = Instant::now();
                thread::yield_now();
                self.shared |= PEER_TURN.contains(&start.elapsed());
                local.fire_timers();
                return Turn::Look;
            }
            Standby::Polled => {
                if self.nap == NAP_MIN {
                    self.budget = (self.budget / 2).max(SPIN_MIN);
                }
                let nap = self.nap;
                self.nap = (nap * 2).min(NAP_MAX);
                return Turn::Sleep(Some(nap));
            }
            Standby::Armed(until) => until.map(|at| at.saturating_duration_since(Instant::now())),
            Standby::Idle => None,
        };
        self.looks = 0;
        // The clock costs something, and only a spin is adapted.
        self.asleep = (self.mode == Idle::Hybrid).then(Instant::now);
        Turn::Sleep(limit)
    }

    /// The sleep has ended: a short one would have been a spin that pays, a long one was right.
    pub(super) fn woke(&mut self) {
        if let Some(since) = self.asleep.take() {
            self.slept(since.elapsed());
        }
    }

    fn slept(&mut self, time: Duration) {
        if time >= SHORT_SLEEP {
            self.budget = (self.budget / 2).max(SPIN_MIN);
            self.vain = 0;
        } else if self.distrust > 0 {
            self.distrust -= 1;
        } else if self.budget < SPIN_MAX {
            self.budget = (self.budget * 2).min(SPIN_MAX);
        } else {
            self.vain += 1;
            if self.vain == VAIN_MAX {
                (self.budget, self.vain, self.distrust) = (SPIN_MIN, 0, DISTRUST);
            }
        }
    }
}

/// Sleeps in the kernel until a completion, a wake, a timer, or `limit`.
pub(super) fn park(local: &Local, limit: Option<Duration>) {
    let timer = local.timers.borrow().next().map(|at| at.saturating_duration_since(Instant::now()));
    let limit = match (limit, timer) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let inbox = &local.ready.core.inbox;
    if inbox.prepare_sleep() {
        let parked = local.ring.borrow_mut().park(limit);
        inbox.finish_sleep();
        if let Err(error) = parked {
            tracing::error!(%error, "the ring refuses to wait");
            thread::sleep(NAP_MAX);
        }
    }
    if !inbox.is_empty() {
        local.drain_inbox();
    }
    local.fire_timers();
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(3);

    /// The producer needs the core: however long the spin, the event comes as soon as the reactor sleeps.
    #[test]
    fn a_spin_that_keeps_its_producer_waiting_is_given_up() {
        let mut waiting = Waiting::new(Idle::Hybrid);
        let mut looks = 0u64;
        for _ in 0..100_000 {
            looks += u64::from(waiting.budget);
            waiting.slept(SOON);
        }
        assert!(looks / 100_000 < 32, "{} looks for each event", looks / 100_000);
    }

    #[test]
    fn the_spin_grows_to_what_short_sleeps_ask_for_and_shrinks_with_long_ones() {
        let mut waiting = Waiting::new(Idle::Hybrid);
        (0..20).for_each(|_| waiting.slept(Duration::from_millis(1)));
        assert_eq!(waiting.budget, SPIN_MIN);
        (0..8).for_each(|_| waiting.slept(SOON));
        assert_eq!(waiting.budget, SPIN_MAX);
        // One that is late now and then takes nothing away.
        for _ in 0..100 {
            waiting.slept(SOON);
            waiting.looks = 100;
            waiting.found_work();
        }
        assert_eq!(waiting.budget, SPIN_MAX);
    }

    #[test]
    fn a_spin_that_pays_is_trusted_again() {
        let mut waiting = Waiting::new(Idle::Hybrid);
        (0..20).for_each(|_| waiting.slept(SOON));
        assert!(waiting.distrust > 0);
        waiting.looks = 10;
        waiting.found_work();
        (0..8).for_each(|_| waiting.slept(SOON));
        assert_eq!(waiting.budget, SPIN_MAX);
    }
}
