//! Jobs: a queue and the work to do on it, in either form of the driver.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
    time::Instant,
};

use vfio_uring::{
    dma::DmaBuf,
    reactor::{self, Poller, PollerGuard, Standby, register_poller},
};
use vfio_uring_nvme::{CommandStream, Completion, Namespace, Result};

use super::work::{Io, Work};
use crate::args::Mode;

/// A clock that is read once a turn of the reactor at most: completions of a turn were found at the same time.
pub struct TurnClock {
    start: Instant,
    now: Cell<u64>,
    stale: Cell<bool>,
}

impl TurnClock {
    /// A clock that starts at 0, and what keeps it going.
    pub fn new() -> (Rc<Self>, PollerGuard) {
        let clock = Rc::new(Self { start: Instant::now(), now: Cell::new(0), stale: Cell::new(true) });
        (clock.clone(), register_poller(clock))
    }

    /// Nanoseconds.
    #[inline]
    pub fn now(&self) -> u64 {
        if self.stale.replace(false) {
            self.now.set(self.start.elapsed().as_nanos() as u64);
        }
        self.now.get()
    }
}

impl Poller for TurnClock {
    #[inline]
    fn poll(&self) -> bool {
        self.stale.set(true);
        false
    }

    fn standby(&self) -> Standby {
        // The next turn may be a sleep away.
        self.stale.set(true);
        Standby::Idle
    }
}

/// When to stop, for all jobs.
pub struct Stop {
    /// The time to stop at.
    pub end: Cell<u64>,
    /// Stop now.
    pub now: Cell<bool>,
}

impl Default for Stop {
    fn default() -> Self {
        Self { end: Cell::new(u64::MAX), now: Cell::new(false) }
    }
}

impl Stop {
    #[inline]
    fn at(&self, now: u64) -> bool {
        now >= self.end.get() || self.now.get()
    }
}

/// A queue with its work. The buffers are with the commands while it runs.
pub struct Job {
    ns: Namespace,
    stream: Option<CommandStream>,
    pub work: RefCell<Work>,
    buffers: RefCell<VecDeque<DmaBuf>>,
    clock: Rc<TurnClock>,
    stop: Rc<Stop>,
    /// When the last I/O ended.
    pub last_end: Cell<u64>,
    pub in_flight: Cell<u32>,
}

impl Job {
    pub fn new(
        ns: Namespace,
        mode: Mode,
        work: Work,
        buffers: Vec<DmaBuf>,
        clock: &Rc<TurnClock>,
        stop: &Rc<Stop>,
    ) -> Result<Rc<Self>> {
        let stream = match mode {
            Mode::Stream => Some(ns.stream()?),
            Mode::Future => None,
        };
        Ok(Rc::new(Self {
            ns,
            stream,
            work: RefCell::new(work),
            buffers: RefCell::new(buffers.into()),
            clock: clock.clone(),
            stop: stop.clone(),
            last_end: Cell::new(0),
            in_flight: Cell::new(0),
        }))
    }

    /// Does the work until its end or the time to stop, and waits for what is under way.
    ///
    /// # Errors
    /// What ended the queue.
    pub async fn run(self: Rc<Self>) -> Result<()> {
        let ended = match &self.stream {
            Some(stream) => self.run_stream(stream).await,
            None => self.run_futures().await,
        };
        if ended.is_err() {
            // The others stop, too.
            self.stop.now.set(true);
        }
        ended
    }

    async fn run_stream(&self, stream: &CommandStream) -> Result<()> {
        let mut table = vec![(Io::default(), 0); stream.capacity()];
        let buffers = std::mem::take(&mut *self.buffers.borrow_mut());
        for buf in buffers {
            self.submit(stream, &mut table, buf)?;
        }
        while self.in_flight.get() != 0 {
            let mut refused = Ok(());
            let took = |completion: Completion| {
                let (io, start) = table[completion.token.index()];
                self.finish(io, start, completion.result(), &completion.buf);
                if let Err(error) = self.submit(stream, &mut table, completion.buf) {
                    refused = Err(error);
                }
            };
            stream.next_batch(took).await?;
            refused?;
        }
        Ok(())
    }

    /// Starts the next I/O, if there is one.
    #[inline]
    fn submit(&self, stream: &CommandStream, table: &mut [(Io, u64)], mut buf: DmaBuf) -> Result<()> {
        let Some((io, now)) = self.start(&mut buf) else {
            self.buffers.borrow_mut().push_back(buf);
            return Ok(());
        };
        let submitted = if io.write { stream.submit_write(io.lba, buf) } else { stream.submit_read(io.lba, buf) };
        let token = submitted.map_err(|rejected| rejected.error)?;
        table[token.index()] = (io, now);
        Ok(())
    }

    #[inline]
    fn start(&self, buf: &mut DmaBuf) -> Option<(Io, u64)> {
        let now = self.clock.now();
        let mut work = self.work.borrow_mut();
        if self.stop.at(now) {
            work.stop();
        }
        let io = work.start(buf)?;
        self.in_flight.set(self.in_flight.get() + 1);
        Some((io, now))
    }

    #[inline]
    fn finish(&self, io: Io, start: u64, result: Result<()>, data: &[u8]) {
        let now = self.clock.now();
        self.last_end.set(now);
        self.in_flight.set(self.in_flight.get() - 1);
        self.work.borrow_mut().finish(io, now.saturating_sub(start), result, data);
    }

    /// A task for each buffer.
    async fn run_futures(self: &Rc<Self>) -> Result<()> {
        let buffers = std::mem::take(&mut *self.buffers.borrow_mut());
        let tasks: Vec<_> = buffers.into_iter().map(|buf| reactor::spawn(self.clone().run_future(buf))).collect();
        let mut ended = Ok(());
        for task in tasks {
            // None is cancelled before its end.
            if let Ok(Err(error)) = task.await {
                ended = Err(error);
            }
        }
        ended
    }

    async fn run_future(self: Rc<Self>, mut buf: DmaBuf) -> Result<()> {
        while let Some((io, start)) = self.start(&mut buf) {
            let (result, back) = if io.write { self.ns.write(io.lba, buf).await } else { self.ns.read(io.lba, buf).await };
            buf = back;
            if let Err(vfio_uring_nvme::Error::Ended(_)) = &result {
                return result;
            }
            self.finish(io, start, result, &buf);
        }
        self.buffers.borrow_mut().push_back(buf);
        Ok(())
    }
}
