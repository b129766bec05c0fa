//! An NVMe 1.4 controller.
//!
//! [`Controller`] is a [`Device`](crate::device::Device) for [`Server`]; [`spawn`] starts one in a thread of its own. Queues are
//! serviced by polling the doorbells, which a client maps as part of BAR0 (or writes by messages); nothing is allocated for a
//! command.

mod admin;
mod backing;
mod bar;
mod config;
mod device;
mod events;
mod features;
mod identify;
mod io;
mod log;
mod queue;
pub mod spec;
mod transfer;

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

pub use self::config::{Backing, Config, Faults, NamespaceConfig};
use self::{
    bar::Bar,
    events::{ErrorEvent, Events},
    features::Features,
    io::{Counters, Nvm, Outcome},
    log::ErrorLog,
    queue::{BATCH, CompletionQueue, Look, SubmissionQueue},
    spec::{Cc, Completion, Sqe, Status, csts, register},
    transfer::DataPointer,
};
use crate::{
    device::{Host, Unmapped},
    pci::{ConfigSpace, Identity},
    server::{Running, Server},
};

const IDENTITY: Identity = Identity { vendor: 0x1b36, device: 0x0010, class: 0x01_08_02, revision: 1 };
/// CAP.TO in units of 500 ms.
const TIMEOUT: u64 = 20;
/// CAP.MPSMAX: pages of up to 64 KiB.
const MAX_PAGE_SHIFT: u32 = 4;
const VERSION: u32 = 0x0001_0400;
const PAGE: u64 = 4096;
/// Admin commands that one call of `service` executes.
const ADMIN_BATCH: usize = 16;
/// Completions that are posted together; fewer would share cache lines with what the client reads already.
const POST_TOGETHER: usize = 8;
/// Commands without a completion (by fault injection) that are remembered for an abort.
const MAX_STALLED: usize = 1024;

/// Starts a controller behind a socket of its own, in a thread of its own.
///
/// # Errors
/// A configuration that is not possible, a file that can't be opened, or a system without memfds, sockets or threads to give.
pub fn spawn(config: Config) -> std::io::Result<Running> {
    Running::start(Server::new(Controller::new(config)?)?)
}

#[derive(Debug, Default)]
struct Registers {
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    interrupt_mask: u32,
}

#[derive(Debug)]
struct Stalled {
    sq: u16,
    cid: u16,
}

/// The controller.
#[derive(Debug)]
pub struct Controller {
    config: Config,
    pci: ConfigSpace,
    bar: Bar,
    registers: Registers,
    /// The admin queue first; empty while the controller is not ready.
    sqs: Vec<SubmissionQueue>,
    /// By queue identifier.
    cqs: Vec<Option<CompletionQueue>>,
    /// The commands that were fetched together.
    batch: Box<[Sqe; BATCH]>,
    /// Completion queues with completions that the client is to be told of.
    signals: Vec<u16>,
    nvm: Nvm,
    features: Features,
    events: Events,
    errors: ErrorLog,
    stalled: Vec<Stalled>,
    started: Instant,
    volatile_cache: bool,
}

impl Controller {
    /// A controller at its initial registers.
    ///
    /// # Errors
    /// A configuration that is not possible, a file that can't be opened, or no memfd to be had.
    pub fn new(config: Config) -> std::io::Result<Self> {
        static UID: AtomicU64 = AtomicU64::new(1);
        config.check()?;
        let max_transfer = PAGE << config.mdts;
        let mut namespaces = Vec::new();
        for namespace in &config.namespaces {
            namespaces.push(namespace.open(UID.fetch_add(1, Ordering::Relaxed), max_transfer as usize)?);
        }
        let vectors = config.max_queues + 1;
        let bar = Bar::new(vectors)?;
        let pci = ConfigSpace::new(IDENTITY)
            .memory_bar64(0, bar.size)
            .power_management()
            .msix(vectors, bar.table_at as u32, bar.pending_at(vectors) as u32)
            .express();
        let volatile_cache = config.namespaces.iter().any(|namespace| namespace.backing != Backing::Memory);
        let cqs = std::iter::repeat_with(|| None).take(usize::from(vectors)).collect();
        let nvm = Nvm {
            namespaces,
            faults: config.faults,
            has_faults: config.faults != Faults::default(),
            max_transfer,
            page_shift: 12,
            write_through: false,
            counters: Counters::default(),
            data: DataPointer::new(),
        };
        Ok(Self {
            features: Features::new(config.max_queues, vectors),
            config,
            pci,
            bar,
            registers: Registers::default(),
            sqs: Vec::new(),
            cqs,
            batch: Box::new([Sqe::default(); BATCH]),
            signals: Vec::new(),
            nvm,
            events: Events::default(),
            errors: ErrorLog::default(),
            stalled: Vec::new(),
            started: Instant::now(),
            volatile_cache,
        })
    }

    /// MSI-X vectors.
    fn vectors(&self) -> u16 {
        self.config.max_queues + 1
    }

    /// CAP (section 3.1.1): queue size, contiguous queues, timeout, stride 4, NVM command set, pages.
    fn capabilities(&self) -> u64 {
        u64::from(self.config.max_queue_entries - 1) | 1 << 16 | TIMEOUT << 24 | 1 << 37 | u64::from(MAX_PAGE_SHIFT) << 52
    }

    fn is_ready(&self) -> bool {
        self.registers.csts & (csts::RDY | csts::CFS | csts::SHST) == csts::RDY
    }

    fn register(&self, offset: u64) -> u32 {
        let registers = &self.registers;
        match offset {
            register::CAP => self.capabilities() as u32,
            0x04 => (self.capabilities() >> 32) as u32,
            register::VS => VERSION,
            register::INTMS | register::INTMC => registers.interrupt_mask,
            register::CC => registers.cc,
            register::CSTS => registers.csts,
            register::AQA => registers.aqa,
            register::ASQ => registers.asq as u32,
            0x2c => (registers.asq >> 32) as u32,
            register::ACQ => registers.acq as u32,
            0x34 => (registers.acq >> 32) as u32,
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        let low = |old: u64, mask: u32| old & !0xffff_ffff | u64::from(value & mask);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let registers = &mut self.registers;
        match offset {
            register::INTMS => registers.interrupt_mask |= value,
            register::INTMC => registers.interrupt_mask &= !value,
            register::CC => self.configure(Cc(value)),
            register::AQA => registers.aqa = value & 0x0fff_0fff,
            register::ASQ => registers.asq = low(registers.asq, !0xfff),
            0x2c => registers.asq = high(registers.asq),
            register::ACQ => registers.acq = low(registers.acq, !0xfff),
            0x34 => registers.acq = high(registers.acq),
            _ => {}
        }
    }

    /// A write of CC (section 3.1.5).
    fn configure(&mut self, new: Cc) {
        let old = Cc(std::mem::replace(&mut self.registers.cc, new.0));
        if old.enabled() && !new.enabled() {
            return self.disable();
        }
        if !old.enabled() && new.enabled() {
            self.enable(new);
        }
        if new.shutdown() != 0 && old.shutdown() == 0 {
            // Nothing is in flight between two calls of `service`, so this is the whole of a shutdown.
            if self.nvm.flush(spec::NSID_ALL).is_err() {
                tracing::warn!("a namespace could not be flushed at shutdown");
            }
            self.registers.csts = self.registers.csts & !csts::SHST | csts::SHST_COMPLETE;
        } else if new.shutdown() == 0 && old.shutdown() != 0 {
            self.registers.csts &= !csts::SHST;
        }
    }

    fn enable(&mut self, cc: Cc) {
        let Registers { aqa, asq, acq, .. } = self.registers;
        let (sq_size, cq_size) = ((aqa & 0xfff) + 1, (aqa >> 16) + 1);
        let page = PAGE << cc.page_shift();
        let placed = |base: u64| base.is_multiple_of(page) && base.checked_add(4096 * 64).is_some();
        // Entry sizes may be set later, before the first I/O queue.
        let entries = [(cc.sq_entry_shift(), 6), (cc.cq_entry_shift(), 4)].iter().all(|&(is, must)| is == 0 || is == must);
        let possible = entries && cc.command_set() == 0 && cc.arbitration() == 0 && cc.page_shift() <= MAX_PAGE_SHIFT;
        if !possible || !placed(asq) || !placed(acq) || sq_size < 2 || cq_size < 2 {
            tracing::debug!(cc = cc.0, aqa, asq, acq, "the controller can't be enabled like this");
            self.registers.csts |= csts::CFS;
            return;
        }
        self.clear_doorbells(0, self.bar.doorbells.size);
        self.nvm.page_shift = 12 + cc.page_shift();
        self.sqs = vec![SubmissionQueue::new(0, 0, asq, sq_size)];
        let mut cq = CompletionQueue::new(0, acq, cq_size, Some(0));
        cq.users = 1;
        self.cqs[0] = Some(cq);
        self.registers.csts |= csts::RDY;
    }

    /// A controller reset (section 7.3.2): AQA, ASQ and ACQ stay.
    fn disable(&mut self) {
        self.sqs.clear();
        self.cqs.fill_with(|| None);
        self.events = Events::default();
        self.stalled.clear();
        self.features = Features::new(self.config.max_queues, self.vectors());
        self.nvm.write_through = false;
        self.registers.csts = 0;
        self.registers.interrupt_mask = 0;
        self.clear_doorbells(0, self.bar.doorbells.size);
    }

    fn clear_doorbells(&self, offset: u64, len: u64) {
        let cleared = self.bar.doorbells.memory.fill(offset, len as usize, 0);
        debug_assert!(cleared.is_ok(), "the doorbells of a queue are in the doorbell area");
    }

    /// CSTS.CFS: nothing is done any more until the controller is reset.
    #[cold]
    fn fail(&mut self, what: &str) {
        tracing::warn!("fatal for the controller: {what}");
        self.registers.csts |= csts::CFS;
    }

    /// Executes what waits in an I/O submission queue.
    #[inline]
    fn service_io(&mut self, index: usize, host: &mut impl Host) -> usize {
        let doorbells = &*self.bar.doorbells.memory;
        let Some(sq) = self.sqs.get_mut(index) else { return 0 };
        if sq.look(doorbells) == Look::Invalid {
            let id = sq.id;
            self.event(ErrorEvent::InvalidDoorbell, id);
            return 1;
        }
        let waiting = sq.waiting();
        if waiting == 0 {
            return 0;
        }
        let Some(cq) = self.cqs.get_mut(usize::from(sq.cq)).and_then(Option::as_mut) else { return 0 };
        if cq.room() < waiting.min(BATCH as u32) && cq.look(doorbells) == Look::Invalid {
            let id = sq.id;
            self.event(ErrorEvent::InvalidDoorbell, id);
            return 1;
        }
        let room = cq.room();
        if room == 0 {
            return 0;
        }
        let (mut head, sq_id, size) = (sq.head, sq.id, sq.size);
        let Ok(count) = sq.fetch(room, &mut self.batch[..], host) else {
            self.fail("a submission queue is not in mapped memory");
            return 0;
        };
        let mut posted = false;
        let mut completions = [Completion::default(); POST_TOGETHER];
        self.nvm.warm(&self.batch[..count]);
        for sqes in self.batch[..count].chunks(POST_TOGETHER) {
            let mut done = 0;
            for sqe in sqes {
                head = if head + 1 == size { 0 } else { head + 1 };
                let (status, cid) = match self.nvm.execute(sqe, host) {
                    Outcome::Done(status) => (status, sqe.cid()),
                    Outcome::WrongCid(status) => (status, !sqe.cid()),
                    Outcome::Dropped => {
                        if self.stalled.len() < MAX_STALLED {
                            self.stalled.push(Stalled { sq: sq_id, cid: sqe.cid() });
                        }
                        continue;
                    }
                };
                if !status.is_success() {
                    self.errors.add(sq_id, sqe, status);
                }
                completions[done] = Completion { result: 0, sq_head: head as u16, sq_id, cid, status: status.0 };
                done += 1;
            }
            if cq.post(&completions[..done], host).is_err() {
                self.fail("a completion queue is not in mapped memory");
                return count;
            }
            posted |= done != 0;
        }
        if posted && cq.vector.is_some() && !cq.signal {
            cq.signal = true;
            self.signals.push(cq.id);
        }
        count
    }

    fn service_admin(&mut self, host: &mut impl Host) -> usize {
        let mut work = 0;
        let mut signal = false;
        while self.is_ready() && work < ADMIN_BATCH {
            let (Some(sq), Some(Some(cq))) = (self.sqs.first_mut(), self.cqs.first_mut()) else { break };
            let doorbells = &*self.bar.doorbells.memory;
            let looks = [sq.look(doorbells), cq.look(doorbells)];
            if looks.contains(&Look::Invalid) {
                self.event(ErrorEvent::InvalidDoorbell, 0);
                work += 1;
                continue;
            }
            if cq.room() == 0 {
                break;
            }
            let next = match self.event_completion() {
                Some(completion) => Ok(Some(completion)),
                None => match self.next_admin(host) {
                    Ok(Some(sqe)) => Ok(self.admin(&sqe, host)),
                    Ok(None) => break,
                    Err(Unmapped) => Err("the admin submission queue is not in mapped memory"),
                },
            };
            work += 1;
            let posted = next.and_then(|completion| match completion {
                Some(completion) => self.post_admin(&completion, host).map(|()| true),
                None => Ok(false),
            });
            match posted {
                Ok(posted) => signal |= posted,
                Err(what) => self.fail(what),
            }
        }
        if signal {
            host.signal(0);
        }
        work
    }

    fn next_admin(&mut self, host: &mut impl Host) -> Result<Option<Sqe>, Unmapped> {
        let Some(sq) = self.sqs.first_mut() else { return Ok(None) };
        if sq.waiting() == 0 {
            return Ok(None);
        }
        let mut sqe = [Sqe::default()];
        sq.fetch(1, &mut sqe, host)?;
        Ok(Some(sqe[0]))
    }

    fn post_admin(&mut self, completion: &Completion, host: &mut impl Host) -> Result<(), &'static str> {
        let Some(Some(cq)) = self.cqs.first_mut() else { return Ok(()) };
        cq.post(std::slice::from_ref(completion), host)
            .map_err(|Unmapped| "the admin completion queue is not in mapped memory")
    }

    fn admin_completion(&self, cid: u16, result: u32, status: Status) -> Completion {
        let sq_head = self.sqs.first().map_or(0, |sq| sq.head as u16);
        Completion { result, sq_head, sq_id: 0, cid, status: status.0 }
    }

    fn event(&mut self, event: ErrorEvent, queue: u16) {
        tracing::debug!(queue, "asynchronous event: {event:?}");
        self.errors.add(queue, &Sqe::default(), Status::INVALID_FIELD);
        self.events.add(event);
    }
}
