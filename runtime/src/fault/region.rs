//! The fault queue in regions of a device.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fmt,
    future::Future,
    mem,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{Stream, future::LocalBoxFuture};

use super::{
    Answer, FaultGroup, GroupId, Lost, Notify, Options, Stats,
    abi::{PLAIN_HEADER, VERSION_COUNTED, VERSION_NONE},
    assembly::{Assembly, GroupKey},
    find::{self, Found},
    next_queue,
    response::Responses,
    ring::{Batch, Geometry, Ring, Snapshot},
    steady::Steady,
};
use crate::{
    Error, Result,
    device::{Device, FaultClaim, Interrupt, Region},
    dma::SharedMemory,
    reactor::{self, Sleep},
};

/// Entries that are read between two looks at the header: a device that produces without end does not hold the reactor.
const BATCH: u32 = 64;
/// Answers that a queue gives when it ends may take so many deadlines in all.
const ENDING: u32 = 2;

/// The form of a fault queue in regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A region for the producer and one for the consumer, with a version that both agree on.
    TwoRegion,
    /// One region, and perhaps one for the answers to page requests.
    Single,
}

/// The mapped part of a region that holds all of a queue.
pub(super) struct Area {
    /// Where it starts in the region.
    pub(super) start: u64,
    pub(super) memory: Arc<SharedMemory>,
}

impl Area {
    /// Maps a region. `None` where it is read and written by messages.
    pub(super) fn find(region: &Region, queue: Geometry) -> Result<Option<Self>> {
        let (first, end) = (queue.at(0), queue.at(queue.entries));
        let holds = |start: u64, len: usize| start <= first && end - start <= len as u64;
        let areas = region.mapped()?;
        let found = areas.iter().find(|area| holds(area.offset, area.memory.len()));
        Ok(found.map(|area| Self { start: area.offset, memory: area.memory.clone() }))
    }
}

struct State {
    ring: Ring,
    assembly: Assembly,
    /// By [`GroupId::key`].
    waiting: BTreeMap<u64, GroupKey>,
    next_key: u64,
    /// Not given to the reader, and not answered yet.
    refused: Vec<GroupKey>,
}

struct Inner {
    id: u64,
    form: Form,
    version: u32,
    queue: Steady,
    area: Option<Area>,
    /// Where the reader's index goes to.
    index: (Steady, u64),
    responses: Option<Responses>,
    state: RefCell<State>,
    stats: Cell<Stats>,
    max_waiting: usize,
    deadline: Duration,
    _claim: FaultClaim,
}

enum Waiting {
    Interrupt(Box<Interrupt>),
    Poll(Duration, Option<Sleep>),
}

/// The faults of a device whose queue is in its regions. See [`FaultQueue`](super::FaultQueue).
pub struct RegionQueue {
    inner: Rc<Inner>,
    waiting: Waiting,
    ready: std::vec::IntoIter<FaultGroup>,
    /// The look that is under way.
    look: Option<LocalBoxFuture<'static, Looked>>,
    look_again: bool,
    /// To be given after what is ready; then the queue has ended.
    error: Option<Error>,
    ended: bool,
}

/// What a look has found.
struct Looked {
    groups: Vec<FaultGroup>,
    again: bool,
    error: Option<Error>,
}

impl fmt::Debug for RegionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { form, version, .. } = &*self.inner;
        f.debug_struct("RegionQueue").field("form", form).field("version", version).finish_non_exhaustive()
    }
}

impl RegionQueue {
    pub(super) async fn open(device: &Device, options: Options) -> Result<Self> {
        let found = find::regions(device)?;
        let claim = device.claim_faults()?;
        let steady = |region: Region| Steady::new(device, region);
        let (queue, index, form, responses) = match found {
            Found::TwoRegion { producer, consumer } => (producer, (steady(consumer), 4), Form::TwoRegion, None),
            Found::Single { queue, responses } => (queue.clone(), (steady(queue), 0), Form::Single, responses),
        };
        let queue = steady(queue);
        let version = choose(queue.region.fault_version().unwrap_or(0), options.version)?;
        let resumed = form == Form::TwoRegion && agree(&queue, &index.0, version).await?;
        let first = snapshot(&queue, form, version).await?;
        if let Some(says) = first.version
            && says != version
            && says != VERSION_NONE
        {
            return Err(Error::fault(format!("the fault queue: version {version} was agreed on, its header says {says}")));
        }
        let ring = Ring::new(&first, queue.region.size(), resumed)?;
        let area = Area::find(&queue.region, ring.geometry())?;
        let responses = match responses {
            Some(region) => Some(Responses::open(steady(region), options.deadline).await?),
            None => None,
        };
        let waiting = match options.notify {
            Notify::Poll(interval) => Waiting::Poll(interval, None),
            Notify::Interrupt => {
                let irq = find::interrupt(device.irqs(), form == Form::TwoRegion)?;
                let interrupt = device.specific_interrupts(irq, 0, 1).await?.pop();
                Waiting::Interrupt(Box::new(
                    interrupt.ok_or_else(|| Error::fault("the interrupt of the fault queue is gone"))?,
                ))
            }
        };
        let mut ready = Vec::new();
        if resumed {
            // How far the reader before has read is not known: what is there now is skipped.
            index.0.write_u32(index.1, first.produced).await?;
            ready.push(FaultGroup { lost: Some(Lost::Perhaps), device_id: 0, faults: Vec::new(), id: None });
        }
        let stats = Stats { perhaps: resumed.into(), ..Stats::default() };
        let assembly = Assembly::new(options.max_open_groups, options.max_requests);
        let inner = Inner {
            id: next_queue(),
            form,
            version,
            queue,
            area,
            index,
            responses,
            state: RefCell::new(State { ring, assembly, waiting: BTreeMap::new(), next_key: 0, refused: Vec::new() }),
            stats: Cell::new(stats),
            max_waiting: options.max_waiting,
            deadline: options.deadline,
            _claim: claim,
        };
        let inner = Rc::new(inner);
        let ready = ready.into_iter();
        Ok(Self { inner, waiting, ready, look: None, look_again: true, error: None, ended: false })
    }

    /// The form that the device has.
    pub fn form(&self) -> Form {
        self.inner.form
    }

    /// The version of its interface: see [`abi`](super::abi).
    pub fn version(&self) -> u32 {
        self.inner.version
    }

    /// Where the queue is in its region.
    pub fn geometry(&self) -> Geometry {
        self.inner.state.borrow().ring.geometry()
    }

    /// Whether its entries are read from mapped memory.
    pub fn is_mapped(&self) -> bool {
        self.inner.area.is_some()
    }

    pub(super) fn stats(&self) -> Stats {
        self.inner.stats.get()
    }

    pub(super) async fn respond(&self, group: GroupId, answer: Answer) -> Result<()> {
        let inner = &self.inner;
        let waits = match group.queue == inner.id {
            true => inner.state.borrow_mut().waiting.remove(&group.key),
            false => None,
        };
        let (Some(key), Some(responses)) = (waits, &inner.responses) else {
            return Err(Error::invalid(
                "nobody waits for this answer: its group was answered before, or is of another queue",
            ));
        };
        let mut owed = Owed { inner, group: Some((group.key, key)) };
        responses.give(key, answer).await?;
        owed.group = None;
        Ok(())
    }

    pub(super) async fn close(mut self) -> Result<()> {
        self.stop();
        self.inner.clone().finish().await
    }

    /// Nothing more is read.
    fn stop(&mut self) {
        self.look = None;
        self.ended = true;
    }

    fn poll_notify(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        match &mut self.waiting {
            Waiting::Interrupt(interrupt) => match ready!(Pin::new(&mut **interrupt).poll_next(cx)) {
                Some(result) => Poll::Ready(result),
                None => Poll::Ready(Err(Error::Gone { reason: "its interrupt has ended".into() })),
            },
            Waiting::Poll(interval, sleep) => {
                let timer = sleep.get_or_insert_with(|| reactor::sleep(*interval));
                ready!(Pin::new(timer).poll(cx));
                *sleep = None;
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl Stream for RegionQueue {
    type Item = Result<FaultGroup>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(group) = this.ready.next() {
                return Poll::Ready(Some(Ok(group)));
            }
            if let Some(error) = this.error.take() {
                this.stop();
                return Poll::Ready(Some(Err(error)));
            }
            if this.ended {
                return Poll::Ready(None);
            }
            if mem::take(&mut this.look_again) {
                this.look = Some(Box::pin(this.inner.clone().look()));
            }
            if let Some(look) = &mut this.look {
                let looked = ready!(look.as_mut().poll(cx));
                this.look = None;
                this.ready = looked.groups.into_iter();
                (this.look_again, this.error) = (looked.again, looked.error);
                continue;
            }
            match ready!(this.poll_notify(cx)) {
                Ok(()) => this.look_again = true,
                Err(error) => this.error = Some(error),
            }
        }
    }
}

impl Drop for RegionQueue {
    fn drop(&mut self) {
        self.stop();
        let owes = {
            let mut state = self.inner.state.borrow_mut();
            let open = state.assembly.take_open();
            let first = state.next_key;
            state.waiting.extend((first..).zip(open));
            !state.waiting.is_empty() || !state.refused.is_empty()
        };
        if !owes || self.inner.responses.is_none() {
            return;
        }
        if !reactor::is_running() {
            tracing::warn!("a fault queue is dropped outside of its reactor: page requests stay without an answer");
            return;
        }
        let (inner, limit) = (self.inner.clone(), self.inner.deadline.saturating_mul(ENDING));
        reactor::spawn(async move {
            match reactor::timeout(limit, inner.finish()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "page requests stay without an answer"),
                Err(_) => tracing::warn!("the device takes no answers: page requests stay without one"),
            }
        });
    }
}

/// A group whose answer is under way: it waits on if that fails, or is given up.
struct Owed<'a> {
    inner: &'a Inner,
    group: Option<(u64, GroupKey)>,
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        self.inner.state.borrow_mut().waiting.extend(self.group.take());
    }
}

impl Inner {
    /// Takes what is there, as far as a batch goes.
    async fn look(self: Rc<Self>) -> Looked {
        let mut batch = Batch::default();
        let again = match self.fill(&mut batch).await {
            Ok(again) => again,
            Err(error) => {
                batch.error.get_or_insert(error);
                false
            }
        };
        let groups = self.keep(&mut batch);
        if let Err(error) = self.refuse().await {
            batch.error.get_or_insert(error);
        }
        Looked { groups, again, error: batch.error }
    }

    async fn fill(&self, batch: &mut Batch) -> Result<bool> {
        let header = snapshot(&self.queue, self.form, self.version).await?;
        self.state.borrow_mut().ring.look(&header)?;
        let mut left = BATCH;
        loop {
            let run = self.state.borrow().ring.run(left);
            let Some((first, count)) = run else { break };
            let entries = self.read(first, count).await?;
            let State { ring, assembly, .. } = &mut *self.state.borrow_mut();
            batch.take(ring, assembly, &entries);
            if batch.error.is_some() {
                return Ok(false);
            }
            left -= count;
        }
        let publish = {
            let ring = &mut self.state.borrow_mut().ring;
            if let Some(lost) = ring.lost_at_end() {
                batch.lose(lost);
            }
            ring.publish()
        };
        let Some(cons) = publish else { return Ok(false) };
        self.index.0.write_u32(self.index.1, cons).await?;
        if header.lost.is_none() {
            // Whether it was full up to now shows at once, or never.
            let header = snapshot(&self.queue, self.form, self.version).await?;
            let ring = &mut self.state.borrow_mut().ring;
            ring.look(&header)?;
            if let Some(lost) = ring.lost_at_end() {
                batch.lose(lost);
            }
        }
        Ok(self.state.borrow().ring.has_more())
    }

    /// Copies entries, once: the device may go on writing to them.
    async fn read(&self, first: u32, count: u32) -> Result<Vec<u8>> {
        let geometry = self.state.borrow().ring.geometry();
        let at = geometry.at(first);
        let mut entries = vec![0; count as usize * geometry.entry_size as usize];
        self.queue.copy_out(self.area.as_ref(), at, &mut entries).await?;
        Ok(entries)
    }

    /// Counts what is given to the reader, and makes out which groups it may answer.
    fn keep(&self, batch: &mut Batch) -> Vec<FaultGroup> {
        let (mut stats, state) = (self.stats.get(), &mut *self.state.borrow_mut());
        let mut kept = Vec::with_capacity(batch.groups.len());
        for (mut group, key) in batch.groups.drain(..) {
            if let Some(key) = key.filter(|_| self.responses.is_some()) {
                if state.waiting.len() >= self.max_waiting {
                    batch.refused.push(key);
                    continue;
                }
                group.id = Some(GroupId { queue: self.id, key: state.next_key });
                state.waiting.insert(state.next_key, key);
                state.next_key += 1;
            }
            match group.lost {
                Some(Lost::Count(lost)) => stats.lost += lost,
                Some(Lost::Perhaps) => stats.perhaps += 1,
                None => {}
            }
            stats.faults += group.faults.len() as u64;
            kept.push(group);
        }
        stats.refused += batch.refused.len() as u64;
        state.refused.append(&mut batch.refused);
        self.stats.set(stats);
        kept
    }

    async fn refuse(&self) -> Result<()> {
        loop {
            let Some(key) = self.state.borrow_mut().refused.pop() else { return Ok(()) };
            tracing::warn!(?key, "a group of page requests is too long, or one too many, and is answered as invalid");
            if let Some(responses) = &self.responses {
                responses.give(key, Answer::Invalid).await?;
            }
        }
    }

    /// Answers all that waits.
    async fn finish(self: Rc<Self>) -> Result<()> {
        let Some(responses) = &self.responses else { return Ok(()) };
        self.refuse().await?;
        let open = self.state.borrow_mut().assembly.take_open();
        for key in open {
            responses.give(key, Answer::Invalid).await?;
        }
        loop {
            let Some((_, key)) = self.state.borrow_mut().waiting.pop_first() else { return Ok(()) };
            responses.give(key, Answer::Invalid).await?;
        }
    }
}

/// The version that is used, of those up to `highest`.
fn choose(highest: u32, asked: Option<u32>) -> Result<u32> {
    if highest == 0 || highest == VERSION_NONE {
        return Err(Error::fault(format!("its fault queue offers version {highest}; versions start at 1")));
    }
    let common = highest.min(VERSION_COUNTED);
    match asked {
        None => Ok(common),
        Some(version) if (1..=common).contains(&version) => Ok(version),
        Some(version) if (1..=VERSION_COUNTED).contains(&version) => {
            Err(Error::Unsupported { what: format!("version {version} of its fault queue; it has up to {highest}") })
        }
        Some(version) => {
            Err(Error::invalid(format!("version {version} of a fault queue: 1 to {VERSION_COUNTED} are known")))
        }
    }
}

/// Agrees on a version with the two-region form. Whether others had agreed on one before.
async fn agree(producer: &Steady, consumer: &Steady, version: u32) -> Result<bool> {
    if consumer.region.size() < 8 {
        let size = consumer.region.size();
        return Err(Error::fault(format!("the fault queue: its consumer's region has {size} bytes, 8 are needed")));
    }
    // The series refuse to be read before there is a version.
    let resumed = match snapshot(producer, Form::TwoRegion, 1).await {
        Ok(header) => header.geometry.entry_size != 0 && header.geometry.entries != 0,
        Err(Error::Refused { .. } | Error::Invalid { .. }) => false,
        Err(error) => return Err(error),
    };
    consumer.write_u32(0, version).await?;
    Ok(resumed)
}

/// Reads a queue's header.
async fn snapshot(queue: &Steady, form: Form, version: u32) -> Result<Snapshot> {
    let mut bytes = [0; PLAIN_HEADER + 4];
    let size = if version >= VERSION_COUNTED { PLAIN_HEADER + 4 } else { PLAIN_HEADER };
    if queue.region.size() < size as u64 {
        let has = queue.region.size();
        return Err(Error::fault(format!("the fault queue: its region has {has} bytes, its header {size}")));
    }
    let bytes = &mut bytes[..size];
    queue.read(0, bytes).await?;
    let header = match form {
        Form::TwoRegion => Snapshot::of_producer(bytes),
        Form::Single => Snapshot::of_single(bytes),
    };
    header.ok_or_else(|| Error::fault("the fault queue: its header is cut off"))
}
