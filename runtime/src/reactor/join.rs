//! Spawned tasks and their handles.

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::Future,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll},
};

use super::{
    Local, current,
    task::{Header, TaskRef},
};

struct Join<T> {
    output: Cell<Option<T>>,
    ended: Cell<bool>,
    waiter: RefCell<TaskRef>,
}

/// Ends the join when the task's future goes, whether it finished, was aborted or was dropped with its reactor.
struct Completion<T>(Rc<Join<T>>);

impl<T> Drop for Completion<T> {
    fn drop(&mut self) {
        self.0.ended.set(true);
        self.0.waiter.borrow_mut().wake();
    }
}

/// A future whose output goes to its join.
struct Task<F: Future> {
    future: F,
    completion: Completion<F::Output>,
}

impl<F: Future> Future for Task<F> {
    type Output = ();

    #[inline(always)]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // SAFETY: `future` is pinned with the task: nothing moves it out, and there is no `Drop` that could.
        let (future, completion) = unsafe {
            let this = self.get_unchecked_mut();
            (Pin::new_unchecked(&mut this.future), &this.completion)
        };
        future.poll(cx).map(|output| completion.0.output.set(Some(output)))
    }
}

/// A spawned task: awaits its output. Dropping the handle lets the task run on.
pub struct JoinHandle<T> {
    join: Rc<Join<T>>,
    local: Weak<Local>,
    header: &'static Header,
    epoch: u64,
}

/// The task was aborted, or its reactor ended, before it gave an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the task was cancelled")]
pub struct Cancelled;

/// Starts a task on the reactor of this thread; it runs beside the others while [`super::Reactor::block_on`] runs.
///
/// # Panics
/// Outside of a reactor.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    let local = current("spawn");
    let join = Rc::new(Join { output: Cell::new(None), ended: Cell::new(false), waiter: RefCell::default() });
    let completion = Completion(join.clone());
    let header = local.ready.spawn(Box::pin(Task { future, completion }));
    JoinHandle { join, local: Rc::downgrade(&local), header, epoch: header.epoch() }
}

impl<T> JoinHandle<T> {
    /// Drops the task's future now (after its poll, if it calls this itself).
    pub fn abort(&self) {
        if let Some(local) = self.local.upgrade() {
            local.ready.abort(self.header, self.epoch);
        }
    }

    /// Whether the task has ended.
    pub fn is_finished(&self) -> bool {
        self.join.ended.get()
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, Cancelled>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if self.join.ended.get() {
            return Poll::Ready(self.join.output.take().ok_or(Cancelled));
        }
        *self.join.waiter.borrow_mut() = TaskRef::current(cx);
        Poll::Pending
    }
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinHandle").field("finished", &self.is_finished()).finish_non_exhaustive()
    }
}

/// Lets the other ready tasks and the pollers run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
