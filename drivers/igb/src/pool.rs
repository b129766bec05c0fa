//! The buffers of a queue pair, and how they come home.
//!
//! The queue's thread has a stack of them, without locks. What is dropped on another thread goes through a lock-free queue.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crossbeam::queue::ArrayQueue;

use crate::packet::{Node, Packet};

/// Buffers that are taken over from other threads at once.
const BATCH: usize = 64;

/// Where buffers go that are dropped on other threads.
pub(crate) struct Home {
    returned: ArrayQueue<Box<Node>>,
    /// Nobody takes them any more.
    closed: AtomicBool,
}

impl Home {
    pub(crate) fn new(buffers: usize) -> Arc<Self> {
        Arc::new(Self { returned: ArrayQueue::new(buffers.max(1)), closed: AtomicBool::new(false) })
    }

    /// Tells it from all others that there are.
    pub(crate) fn address(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }

    fn give(&self, node: Box<Node>) {
        // It has room for all: what it does not take is freed, as what comes too late.
        drop(self.returned.push(node));
        if self.closed.load(Ordering::SeqCst) {
            self.drain();
        }
    }

    /// What comes back is freed from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.drain();
    }

    fn drain(&self) {
        while self.returned.pop().is_some() {}
    }
}

/// Free buffers. There is one in each place; in this form many of them move at once, from slots and to packets.
pub(crate) type Stack = Vec<Option<Box<Node>>>;

/// The buffers of a queue pair that nobody has, for its thread.
pub(crate) struct Local {
    home: Arc<Home>,
    home_at: usize,
    stack: RefCell<Stack>,
}

thread_local! {
    /// Of the queues that were started on this thread.
    static LOCALS: RefCell<Vec<Rc<Local>>> = const { RefCell::new(Vec::new()) };
}

impl Local {
    pub(crate) fn new(home: Arc<Home>, nodes: Vec<Box<Node>>) -> Rc<Self> {
        Rc::new(Self { home_at: home.address(), home, stack: RefCell::new(nodes.into_iter().map(Some).collect()) })
    }

    /// Buffers of the queue that are dropped on this thread come straight back.
    pub(crate) fn enter(self: &Rc<Self>) {
        let _ = LOCALS.try_with(|locals| locals.borrow_mut().push(self.clone()));
    }

    /// The queue has ended: buffers are freed from now on.
    pub(crate) fn close(self: &Rc<Self>) {
        let _ = LOCALS.try_with(|locals| locals.borrow_mut().retain(|local| !Rc::ptr_eq(local, self)));
        self.home.close();
        let nodes = self.stack.take();
        drop(nodes);
    }

    /// The stack, for a batch.
    #[inline]
    pub(crate) fn stack(&self) -> &RefCell<Stack> {
        &self.stack
    }

    /// Takes over what came back from other threads; false: nothing.
    #[cold]
    pub(crate) fn refill(&self, stack: &mut Stack) -> bool {
        let before = stack.len();
        while stack.len() - before < BATCH
            && let Some(node) = self.home.returned.pop()
        {
            stack.push(Some(node));
        }
        stack.len() != before
    }

    /// Whether there is a buffer.
    pub(crate) fn has_some(&self) -> bool {
        !self.stack.borrow().is_empty() || !self.home.returned.is_empty()
    }

    pub(crate) fn available(&self) -> usize {
        self.stack.borrow().len() + self.home.returned.len()
    }

    pub(crate) fn take(&self) -> Option<Box<Node>> {
        let mut stack = self.stack.borrow_mut();
        if stack.is_empty() {
            self.refill(&mut stack);
        }
        stack.pop().flatten()
    }

    #[inline(always)]
    pub(crate) fn is_home_of(&self, node: &Node) -> bool {
        node.home_at == self.home_at
    }
}

/// The buffers of a queue pair that are free: for packets to be sent. A handle.
#[derive(Clone)]
pub struct Buffers(pub(crate) Rc<Local>);

impl Buffers {
    /// A packet of one buffer, with what it was used for before in it and a length of 0; `None` when all are in use.
    pub fn alloc(&self) -> Option<Packet> {
        let mut node = self.0.take()?;
        (node.len, node.info, node.offload) = (0, [0; 2], None);
        Some(Packet(Some(node)))
    }

    /// Buffers that are free.
    pub fn available(&self) -> usize {
        self.0.available()
    }
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers").field("available", &self.available()).finish()
    }
}

/// Has the buffers of a packet go where they belong.
pub(crate) fn give_chain(mut next: Option<Box<Node>>) {
    while let Some(mut node) = next {
        next = node.next.take();
        give(node);
    }
}

/// Has a buffer go where it belongs.
pub(crate) fn give(node: Box<Node>) {
    let Some(home) = &node.home else { return };
    if let Some(local) = local_of(&node)
        && let Ok(mut stack) = local.stack.try_borrow_mut()
    {
        return stack.push(Some(node));
    }
    let home = home.clone();
    home.give(node);
}

/// The pool of this thread that a buffer belongs to.
pub(crate) fn local_of(node: &Node) -> Option<Rc<Local>> {
    LOCALS.try_with(|locals| locals.try_borrow().ok()?.iter().find(|local| local.is_home_of(node)).cloned()).ok()?
}
