//! A guest's alarm clock: one timeout on the ring, which makes its descriptor ready.

use std::time::{Duration, Instant};

use io_uring::{opcode, types};

use super::{CANCEL, Ring};

/// User data of the timeout.
pub(super) const ALARM: u64 = u64::MAX - 2;

#[derive(Default)]
pub(super) struct Alarm {
    /// When it is set to ring, at the latest.
    set: Option<Instant>,
    /// What the kernel copies when the entry is submitted.
    time: Box<types::Timespec>,
}

impl Alarm {
    pub(super) fn rang(&mut self) {
        self.set = None;
    }
}

impl Ring {
    /// Whether the alarm is set and has not rung, as far as completions were taken.
    pub(crate) fn has_alarm(&self) -> bool {
        self.alarm.set.is_some()
    }

    /// Has the ring's descriptor become ready at `at`, or before. What it was set to ring at before, it may still ring at.
    pub(crate) fn set_alarm(&mut self, at: Instant) {
        if self.alarm.set.is_some_and(|set| set <= at) {
            return;
        }
        // 0 would be no time at all to the kernel, and is as good as the next nanosecond.
        let time = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        *self.alarm.time = time.into();
        let time: *const _ = &*self.alarm.time;
        let entry = match self.alarm.set.replace(at) {
            None => opcode::Timeout::new(time).build().user_data(ALARM),
            // If it rings meanwhile, this fails, and the ringing is still to be taken.
            Some(_) => opcode::TimeoutUpdate::new(ALARM, time).build().user_data(CANCEL),
        };
        // SAFETY: the box lives as long as the ring, and is read when the entry is submitted.
        unsafe { self.push(&entry) };
    }
}
