//! How a server waits for doorbells, which nobody announces: spinning pays while work comes fast, sleeping when it does not.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

/// Looks without work before the clock is asked.
const FREE_LOOKS: u32 = 64;
const MIN_SPIN: Duration = Duration::from_micros(5);
const MAX_SPIN: Duration = Duration::from_micros(100);
/// After spinning, the core is offered to others for this long.
const YIELD: Duration = Duration::from_micros(100);
/// How long a client on the same core keeps it: more than the call takes, and less than the scheduler's slice, which is what
/// somebody takes who does not wait for us.
const PEER_TURN: Range<Duration> = Duration::from_micros(3)..Duration::from_millis(1);
const MIN_SLEEP: Duration = Duration::from_micros(20);
const MAX_SLEEP: Duration = Duration::from_millis(1);
/// A client that did nothing for this long is looked at less often.
const LONG: Duration = Duration::from_secs(1);
const LONG_SLEEP: Duration = Duration::from_millis(5);

/// What to do after a look that found nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Spin,
    Yield,
    Sleep(Duration),
}

#[derive(Debug)]
pub(super) struct Idle {
    may_spin: bool,
    spin: Duration,
    looks: u32,
    since: Option<Instant>,
    /// No work since; messages do not count.
    workless: Option<Instant>,
    sleep: Duration,
    slept: bool,
    /// Somebody else had the core since work was found, as long as a client that waits the same way has it.
    shared: bool,
}

impl Idle {
    /// With one core only, spinning would take it from the other side.
    pub fn new(may_spin: bool) -> Self {
        Self {
            may_spin,
            spin: MAX_SPIN,
            looks: 0,
            since: None,
            workless: None,
            sleep: MIN_SLEEP,
            slept: false,
            shared: false,
        }
    }

    /// Work was found.
    #[inline]
    pub fn busy(&mut self) {
        self.workless = None;
        self.heard();
    }

    /// A message came, and others may follow. By itself it says nothing of doorbells: a driver that now and then asks for statistics
    /// is not looked at more often for that.
    #[inline]
    pub fn heard(&mut self) {
        if std::mem::take(&mut self.shared) {
            // The client shares the core: it is faster when it gets it.
            self.spin = MIN_SPIN;
        } else if self.looks > FREE_LOOKS {
            // Spin longer where that would have caught it, less where it was in vain.
            self.spin = if self.slept { self.spin / 2 } else { self.spin * 2 }.clamp(MIN_SPIN, MAX_SPIN);
        }
        self.looks = 0;
        self.since = None;
        self.slept = false;
        self.sleep = MIN_SLEEP;
    }

    /// The core was offered to others, and back after `time`.
    pub fn yielded(&mut self, time: Duration) {
        self.shared |= PEER_TURN.contains(&time);
    }

    /// Nothing was found.
    #[inline]
    pub fn next(&mut self) -> Step {
        self.looks = self.looks.saturating_add(1);
        if self.looks < FREE_LOOKS && self.may_spin {
            return Step::Spin;
        }
        self.late()
    }

    fn late(&mut self) -> Step {
        // The clock costs more than a look.
        if self.may_spin && !self.slept && !self.looks.is_multiple_of(16) {
            return Step::Spin;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let idle = since.elapsed();
        let spin = if self.may_spin { self.spin } else { Duration::ZERO };
        if idle < spin {
            return Step::Spin;
        }
        if idle < spin + YIELD {
            return Step::Yield;
        }
        self.slept = true;
        let now = self.sleep;
        let workless = self.workless.get_or_insert(since).elapsed();
        self.sleep = (now * 2).min(if workless < LONG { MAX_SLEEP } else { LONG_SLEEP });
        Step::Sleep(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_core_never_spins() {
        let mut idle = Idle::new(false);
        for _ in 0..10_000 {
            assert_ne!(idle.next(), Step::Spin);
        }
    }

    #[test]
    fn ends_in_sleep_and_starts_afresh() {
        let mut idle = Idle::new(true);
        let end = Instant::now() + Duration::from_secs(10);
        while !matches!(idle.next(), Step::Sleep(_)) {
            assert!(Instant::now() < end);
        }
        for _ in 0..10 {
            assert!(matches!(idle.next(), Step::Sleep(time) if time <= LONG_SLEEP));
        }
        idle.busy();
        assert_eq!(idle.next(), Step::Spin);
    }

    #[test]
    fn messages_keep_it_awake_for_a_moment_only() {
        let mut idle = Idle::new(true);
        // As if it had done nothing for long.
        let workless = Instant::now().checked_sub(LONG).unwrap();
        idle.workless = Some(workless);
        idle.heard();
        assert_eq!(idle.next(), Step::Spin);
        let end = Instant::now() + Duration::from_secs(10);
        while idle.next() != Step::Sleep(LONG_SLEEP) {
            assert!(Instant::now() < end);
        }
        assert_eq!(idle.workless, Some(workless));
        idle.busy();
        assert_eq!(idle.workless, None);
    }
}
