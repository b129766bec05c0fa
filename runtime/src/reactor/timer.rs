//! Timers: a sorted map of deadlines on the reactor; it looks at the clock when it parks and now and then while it is busy.

use std::{
    collections::BTreeMap,
    future::Future,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use super::{Local, current, task::TaskRef};

/// The deadlines of a reactor, each with who waits for it.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<(Instant, u64), TaskRef>,
    next_id: u64,
}

impl Timers {
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The earliest deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|(key, _)| key.0)
    }

    /// Wakes who has waited long enough.
    pub(crate) fn fire(&mut self, now: Instant) -> usize {
        let mut fired = 0;
        while let Some(entry) = self.waiting.first_entry().filter(|entry| entry.key().0 <= now) {
            entry.remove().wake();
            fired += 1;
        }
        fired
    }
}

/// The future of [`sleep`] and [`sleep_until`].
#[derive(Debug)]
pub struct Sleep {
    deadline: Instant,
    local: Option<(Rc<Local>, u64)>,
}

/// Ends after `duration`.
pub fn sleep(duration: Duration) -> Sleep {
    // A time that the clock can't represent is as good as never.
    let now = Instant::now();
    sleep_until(now.checked_add(duration).unwrap_or_else(|| now + Duration::from_secs(u32::MAX.into())))
}

/// Ends at `deadline`.
pub fn sleep_until(deadline: Instant) -> Sleep {
    Sleep { deadline, local: None }
}

impl Sleep {
    /// When it ends.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let deadline = self.deadline;
        let (local, id) = self.local.get_or_insert_with(|| {
            let local = current("a timer");
            let mut timers = local.timers.borrow_mut();
            timers.next_id += 1;
            let id = timers.next_id;
            drop(timers);
            (local, id)
        });
        local.timers.borrow_mut().waiting.insert((deadline, *id), TaskRef::current(cx));
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((local, id)) = &self.local {
            local.timers.borrow_mut().waiting.remove(&(self.deadline, *id));
        }
    }
}

/// A deadline passed before the future was ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the deadline passed")]
pub struct Elapsed;

/// Runs `future` for at most `limit`.
///
/// # Errors
/// [`Elapsed`]; the future is dropped then.
pub async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    let mut limit = pin!(sleep(limit));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Ok(output));
        }
        limit.as_mut().poll(cx).map(|()| Err(Elapsed))
    })
    .await
}
