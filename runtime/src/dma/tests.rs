mod foreign;
mod vacate;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    rc::Rc,
    sync::{Arc, Barrier, mpsc},
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use futures::{executor::block_on, task::noop_waker};
use proptest::prelude::*;

use super::*;
use crate::{Error, Result};

/// A backend that answers as it is told.
#[derive(Default)]
pub struct Script {
    log: RefCell<Vec<String>>,
    answers: RefCell<VecDeque<Answer>>,
    gone: Cell<bool>,
    kernel: Cell<bool>,
}

enum Answer {
    Fail(Error),
    /// An answer that comes at the second look.
    Late,
    Never,
}

impl Script {
    pub async fn map(&self, iova: u64) -> Result<()> {
        self.answer(format!("map {iova:#x}")).await
    }

    pub async fn unmap(&self, iova: u64) -> Result<()> {
        self.answer(format!("unmap {iova:#x}")).await
    }

    pub fn is_gone(&self) -> bool {
        self.gone.get()
    }

    pub fn is_kernel(&self) -> bool {
        self.kernel.get()
    }

    /// Takes effect on the next message; messages without an answer succeed.
    fn next(&self, answer: Answer) {
        self.answers.borrow_mut().push_back(answer);
    }

    async fn answer(&self, message: String) -> Result<()> {
        self.log.borrow_mut().push(message);
        let answer = self.answers.borrow_mut().pop_front();
        match answer {
            None => Ok(()),
            Some(Answer::Fail(error)) => {
                self.gone.set(self.gone.get() || matches!(error, Error::Gone { .. }));
                Err(error)
            }
            Some(Answer::Late) => {
                let mut looked = false;
                let second_look = poll_fn(|cx| match std::mem::replace(&mut looked, true) {
                    true => Poll::Ready(()),
                    false => {
                        cx.waker().wake_by_ref();
                        Poll::Pending
                    }
                });
                second_look.await;
                Ok(())
            }
            Some(Answer::Never) => std::future::pending().await,
        }
    }

    fn log(&self) -> Vec<String> {
        self.log.take()
    }
}

const PAGE: u64 = 4096;

fn null(pages: u64) -> AddressSpace {
    AddressSpace::new(Backend::Null, &[IovaRange { start: PAGE, last: (pages + 1) * PAGE - 1 }], PAGE, 16)
}

fn scripted(pages: u64) -> (AddressSpace, Rc<Script>) {
    let script = Rc::new(Script::default());
    let ranges = [IovaRange { start: PAGE, last: (pages + 1) * PAGE - 1 }];
    (AddressSpace::new(Backend::Script(script.clone()), &ranges, PAGE, 16), script)
}

fn map(space: &AddressSpace, pages: u64) -> Result<Arc<Mapping>> {
    block_on(space.map((pages * PAGE) as usize, HugePages::No))
}

fn timeout() -> Error {
    Error::Timeout { what: "test".into(), after: Duration::from_secs(1) }
}

fn refused(errno: i32) -> Error {
    let source = Arc::new(io::Error::from_raw_os_error(errno));
    Error::Refused { command: "test".into(), source }
}

fn gone() -> Error {
    Error::Gone { reason: "test".into() }
}

fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(&noop_waker()))
}

fn pool(pages: u64) -> Pool {
    block_on(Pool::new(&null(pages), (pages * PAGE) as usize, HugePages::No)).unwrap()
}

const fn send<T: Send>() {}
const fn sync<T: Sync>() {}
const _: () = {
    send::<Mapping>();
    sync::<Mapping>();
    send::<Pool>();
    sync::<Pool>();
    send::<DmaBuf>();
    sync::<DmaBuf>();
    send::<DmaShared>();
    send::<DmaRing<u64>>();
    send::<IovaAllocator>();
};

#[test]
fn unmapped_before_it_is_used_again() {
    let (space, script) = scripted(2);
    let first = map(&space, 2).unwrap();
    let iova = first.iova();
    drop(first);
    assert_eq!(space.stats(), SpaceStats { mappings: 1, retired: 1, ..Default::default() });
    assert_eq!(script.log(), ["map 0x1000"], "nothing is unmapped behind one's back");
    // No addresses are left, so mapping reclaims first.
    let second = map(&space, 2).unwrap();
    assert_eq!(second.iova(), iova);
    assert_eq!(script.log(), ["unmap 0x1000", "map 0x1000"]);
    assert!(matches!(map(&space, 1), Err(Error::Exhausted { .. })));
}

#[test]
fn retired_in_order_and_from_any_thread() {
    let (space, script) = scripted(8);
    let mappings: Vec<_> = (0..4).map(|_| map(&space, 1).unwrap()).collect();
    script.log();
    thread::spawn(move || mappings.into_iter().rev().for_each(drop)).join().unwrap();
    assert_eq!(block_on(space.reclaim()), 4);
    assert_eq!(script.log(), ["unmap 0x4000", "unmap 0x3000", "unmap 0x2000", "unmap 0x1000"]);
    assert_eq!(space.stats(), SpaceStats::default());
    assert_eq!(map(&space, 8).unwrap().len() as u64, 8 * PAGE, "the pieces are joined");
}

#[test]
fn a_refused_map_frees_its_addresses() {
    let (space, script) = scripted(1);
    script.next(Answer::Fail(refused(22)));
    assert!(matches!(map(&space, 1), Err(Error::Refused { .. })));
    assert_eq!(space.stats(), SpaceStats::default());
    assert!(map(&space, 1).is_ok());
}

#[test]
fn an_unknown_map_keeps_its_addresses() {
    for answer in [Answer::Fail(timeout()), Answer::Fail(gone()), Answer::Fail(refused(17)), Answer::Never] {
        let (space, script) = scripted(2);
        let never = matches!(answer, Answer::Never);
        script.next(answer);
        let mut future = Box::pin(space.map(4096, HugePages::No));
        match poll_once(future.as_mut()) {
            Poll::Ready(result) => assert!(result.is_err()),
            Poll::Pending => assert!(never),
        }
        drop(future);
        let expected = SpaceStats { mappings: 1, quarantined: 1, quarantined_bytes: PAGE, ..Default::default() };
        assert_eq!(space.stats(), expected);
        assert!(space.mappings().is_empty() && space.read(PAGE, &mut [0]).is_err());
        assert_eq!(map(&space, 1).unwrap().iova(), 2 * PAGE);
        assert!(map(&space, 2).is_err());
    }
}

#[test]
fn a_failed_unmap_is_leaked_and_counted() {
    for error in [refused(22), timeout()] {
        let (space, script) = scripted(2);
        drop(map(&space, 1).unwrap());
        script.next(Answer::Fail(error));
        assert_eq!(block_on(space.reclaim()), 0);
        let leaked = SpaceStats { mappings: 1, leaked: 1, leaked_bytes: PAGE, ..Default::default() };
        assert_eq!(space.stats(), leaked);
        assert_eq!(map(&space, 1).unwrap().iova(), 2 * PAGE);
    }
}

#[test]
fn an_unmap_given_up_is_tried_again() {
    let (space, script) = scripted(1);
    drop(map(&space, 1).unwrap());
    script.next(Answer::Never);
    assert!(poll_once(Box::pin(space.reclaim()).as_mut()).is_pending());
    assert_eq!(space.stats().retired, 1);
    assert_eq!(block_on(space.reclaim()), 1);
    assert_eq!(script.log(), ["map 0x1000", "unmap 0x1000", "unmap 0x1000"]);
    assert_eq!(space.stats(), SpaceStats::default());
}

#[test]
fn the_memory_goes_with_the_connection() {
    let (space, script) = scripted(4);
    let (one, two, three) = (map(&space, 1).unwrap(), map(&space, 1).unwrap(), map(&space, 1).unwrap());
    drop((one, two));
    assert_eq!(space.mappings().len(), 3);
    script.next(Answer::Fail(gone()));
    assert_eq!(block_on(space.reclaim()), 0);
    assert_eq!(space.mappings().len(), 1);
    drop(three);
    let stats = space.stats();
    assert_eq!((space.mappings().len(), stats.retired, stats.leaked), (0, 0, 0));
    assert_eq!(stats.mappings, 3, "their addresses are not used again");
}

#[test]
fn limits_are_named() {
    let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], PAGE, 2);
    let _mappings = [map(&space, 1).unwrap(), map(&space, 1).unwrap()];
    let error = map(&space, 1).unwrap_err().to_string();
    assert!(error.contains("all 2 that the device allows"), "{error}");
    let error = map(&null(3), 4).unwrap_err().to_string();
    assert!(error.contains("16384 bytes") && error.contains("the largest piece is 12288"), "{error}");
    assert!(matches!(map(&null(3), 0), Err(Error::Invalid { .. })));
    assert!(matches!(block_on(null(3).map(usize::MAX, HugePages::No)), Err(Error::Invalid { .. })));
    let coarse = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], 1 << 16, 2);
    let mapping = map(&coarse, 1).unwrap();
    assert_eq!((mapping.iova(), mapping.len()), (1 << 16, 1 << 16));
}

#[test]
fn the_reclaimer_runs_and_ends() {
    // Woken by a drop on another thread, ended by the drop of the space.
    let (space, script) = scripted(4);
    let mut reclaimer = Box::pin(space.reclaimer());
    let mapping = map(&space, 1).unwrap();
    let (sender, wakes) = mpsc::channel();
    let waker: Waker = Arc::new(Wake(sender)).into();
    let mut cx = Context::from_waker(&waker);
    assert!(reclaimer.as_mut().poll(&mut cx).is_pending());
    thread::spawn(move || drop(mapping)).join().unwrap();
    wakes.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(reclaimer.as_mut().poll(&mut cx).is_pending());
    assert_eq!((space.stats(), script.log().len()), (SpaceStats::default(), 2));
    drop(space);
    wakes.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(reclaimer.as_mut().poll(&mut cx).is_ready());

    // Ended by a connection that an unmap finds gone, and by one that is said to be gone.
    let (space, script) = scripted(4);
    let mut reclaimer = Box::pin(space.reclaimer());
    drop(map(&space, 1).unwrap());
    script.next(Answer::Fail(gone()));
    assert!(poll_once(reclaimer.as_mut()).is_ready());
    let (space, _script) = scripted(4);
    let mut reclaimer = Box::pin(space.reclaimer());
    assert!(poll_once(reclaimer.as_mut()).is_pending());
    space.disconnected();
    assert!(poll_once(reclaimer.as_mut()).is_ready());

    // The space outlives the unmap that is under way, but not for long.
    let (space, script) = scripted(4);
    let weak = space.downgrade();
    let mut reclaimer = Box::pin(space.reclaimer());
    drop(map(&space, 1).unwrap());
    script.next(Answer::Never);
    assert!(poll_once(reclaimer.as_mut()).is_pending());
    drop(space);
    assert!(weak.upgrade().is_some());
    drop(reclaimer);
    assert!(weak.upgrade().is_none());
}

struct Wake(mpsc::Sender<()>);

impl std::task::Wake for Wake {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(());
    }
}

#[test]
fn the_peer_reads_and_writes_across_mappings() {
    let space = null(8);
    let (one, two) = (map(&space, 1).unwrap(), map(&space, 2).unwrap());
    assert_eq!(two.iova(), one.iova() + PAGE);
    let end = two.iova() + 2 * PAGE;
    let bytes: Vec<u8> = (0..3 * PAGE).map(|i| (i % 251) as u8).collect();
    space.write(one.iova(), &bytes).unwrap();
    let mut got = vec![0; 300];
    space.read(one.iova() + PAGE - 100, &mut got).unwrap();
    assert_eq!(got, bytes[PAGE as usize - 100..][..300]);
    two.memory().read(0, &mut got).unwrap();
    assert_eq!(got, bytes[PAGE as usize..][..300]);
    // A write that is mapped in part changes nothing.
    assert!(space.write(end - 1, &[0, 0]).is_err());
    space.read(end - 1, &mut got[..1]).unwrap();
    assert_eq!(got[0], bytes[3 * PAGE as usize - 1]);
    for (iova, len) in [(0, 1), (PAGE - 1, 2), (end, 1), (u64::MAX, 2), (u64::MAX - 1, 2)] {
        assert!(space.read(iova, &mut vec![0; len]).is_err(), "{iova:#x}");
    }
    // Until its unmap is confirmed the device may still use a mapping.
    drop(one);
    assert!(space.read(PAGE, &mut got).is_ok());
    block_on(space.reclaim());
    assert!(space.read(PAGE, &mut got).is_err());
    assert!(space.read(two.iova(), &mut got).is_ok());
}

#[test]
fn the_top_of_the_space_is_usable() {
    let range = IovaRange { start: 0u64.wrapping_sub(2 * PAGE), last: u64::MAX };
    let space = AddressSpace::new(Backend::Null, &[range], PAGE, 4);
    let pool = block_on(Pool::new(&space, 2 * PAGE as usize, HugePages::No)).unwrap();
    let buf = pool.alloc(2 * PAGE as usize).unwrap();
    assert_eq!(buf.iova(), range.start);
    space.write(u64::MAX, &[7]).unwrap();
    assert_eq!(buf[2 * PAGE as usize - 1], 7, "the view that serves the peer is the same memory");
    assert!(space.write(u64::MAX, &[7, 7]).is_err());
}

#[test]
fn a_device_of_the_same_process_sees_the_buffers() {
    let space = null(4);
    let pool = block_on(Pool::new(&space, 4 * PAGE as usize, HugePages::No)).unwrap();
    let mut buf = pool.alloc(100).unwrap();
    let [info] = &space.mappings()[..] else { panic!("one mapping") };
    let device = SharedMemory::map(info.fd.as_ref().unwrap(), 0, info.len, true).unwrap();
    buf[..5].copy_from_slice(b"hello");
    assert_eq!(device.read_obj(buf.iova() - info.iova), Ok(*b"hello"));
    let ring = DmaRing::<[u64; 2]>::new(pool.alloc(64).unwrap().into_shared()).unwrap();
    device.write_obj(ring.iova() - info.iova + 16, &[1u64, 0xdead_beef_0000_0000]).unwrap();
    assert_eq!(ring.get(1), Ok([1, 0xdead_beef_0000_0000]));
    assert_eq!(ring.load_u32(1, 12), Ok(0xdead_beef));
    ring.set(3, &[5, 7]).unwrap();
    ring.set_words(3, [(1, 6)]).unwrap();
    assert!(ring.set_words(3, [(2, 6)]).is_err() && ring.set_words(4, [(0, 6)]).is_err());
    assert_eq!(device.read_obj(ring.iova() - info.iova + 48), Ok([5u64, 6]));
    assert_eq!((buf.space_id(), ring.shared().space_id()), (space.id(), space.id()));
    assert_ne!(space.id(), null(1).id());
}

#[test]
fn views_and_lengths() {
    let pool = pool(2);
    let mut buf = pool.alloc(100).unwrap();
    assert_eq!((buf.len(), buf.capacity()), (100, PAGE as usize));
    assert!(buf.iter().all(|&byte| byte == 0));
    assert!(buf.as_typed::<u64>().is_err());
    buf.set_len(96).unwrap();
    buf.as_typed_mut::<u64>().unwrap()[11] = u64::MAX;
    assert_eq!(buf[88..], [0xff; 8]);
    assert!(buf.set_len(PAGE as usize + 1).is_err());
    buf.set_len(PAGE as usize).unwrap();
    assert_eq!(buf.as_typed::<[u8; 64]>().unwrap().len(), 64);
    buf.set_len(0).unwrap();
    assert!(buf.is_empty() && buf.as_typed::<u32>().unwrap().is_empty());
    let shared = buf.into_shared();
    shared.release();
    assert!(DmaRing::<u64>::new(shared).is_err());
    assert_eq!(pool.stats().free, 2 * PAGE, "the whole capacity is released");
}

#[test]
fn shared_accesses_are_checked() {
    let pool = pool(1);
    let shared = pool.alloc(100).unwrap().into_shared();
    shared.fill(0xaa);
    shared.write_obj(84, &[1u64, 2]).unwrap();
    assert_eq!(shared.read_obj(84), Ok([1u64, 2]));
    assert!(shared.write_obj(85, &[1u64, 2]).is_err() && shared.read_obj::<[u64; 2]>(usize::MAX).is_err());
    shared.store_u32(96, 0x0102_0304).unwrap();
    assert_eq!((shared.load_u32(96), shared.read_obj(96)), (Ok(0x0102_0304), Ok([4u8, 3, 2, 1])));
    assert!(shared.load_u32(97).is_err() && shared.load_u32(98).is_err() && shared.store_u32(100, 0).is_err());
    let mut bytes = [0; 4];
    shared.write(1, b"abc").unwrap();
    shared.read(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"\xaaabc");
    assert!(shared.read(97, &mut bytes).is_err() && shared.write(98, b"abc").is_err());
    let ring = DmaRing::<[u8; 16]>::new(shared).unwrap();
    assert_eq!(ring.len(), 6);
    assert!(ring.get(6).is_err() && ring.get(usize::MAX).is_err() && ring.set(6, &[0; 16]).is_err());
    assert!(ring.load_u32(6, 0).is_err() && ring.load_u32(0, 13).is_err() && ring.load_u32(0, 16).is_err());
    assert!(ring.load_u32(0, usize::MAX).is_err() && ring.load_u32(5, 12).is_ok());
    ring.clear();
    assert_eq!(ring.into_shared().into_buf()[..], [0; 100]);
}

#[test]
fn a_quarantined_buffer_is_never_handed_out() {
    let space = null(4);
    let pool = block_on(Pool::new(&space, 4 * PAGE as usize, HugePages::No)).unwrap();
    let mut bufs: Vec<_> = (0..4).map(|_| pool.alloc(1).unwrap()).collect();
    let lost = bufs.remove(1);
    let iova = lost.iova();
    lost.quarantine();
    drop(bufs.remove(2).into_shared());
    drop(bufs);
    let expected = PoolStats { bytes: 4 * PAGE, free: 2 * PAGE, largest_free: PAGE, quarantined: 2 * PAGE };
    assert_eq!(pool.stats(), expected);
    let held: Vec<_> = std::iter::from_fn(|| pool.alloc(1).ok()).collect();
    assert!(held.len() == 2 && held.iter().all(|buf| buf.iova() != iova));
    // The mapping is not kept by what was given up.
    let mapping = Arc::downgrade(pool.mapping());
    drop((held, pool));
    assert!(mapping.upgrade().is_none());
    assert_eq!(block_on(space.reclaim()), 1);
}

#[test]
fn a_pool_runs_out_with_words() {
    let pool = pool(4);
    let bufs: Vec<_> = (0..4).map(|_| pool.alloc(PAGE as usize).unwrap()).collect();
    drop(bufs.into_iter().step_by(2).collect::<Vec<_>>());
    let _held = pool.alloc(1).unwrap();
    let error = pool.alloc(4 * PAGE as usize).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Exhausted { .. }));
    assert!(text.contains("has 12288 free, 12288 at most in one piece"), "{text}");
    for len in [0, usize::MAX, u32::MAX as usize] {
        assert!(matches!(pool.alloc(len), Err(Error::Invalid { .. })));
    }
    assert!(matches!(pool.alloc_aligned(1, u64::MAX), Err(Error::Exhausted { .. })));
    assert!(pool.alloc_aligned(1, 2 * PAGE).unwrap().iova().is_multiple_of(2 * PAGE));
}

#[test]
fn buffers_come_home_from_many_threads() {
    const THREADS: usize = 4;
    let pool = pool(64);
    let start = Barrier::new(THREADS);
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel::<DmaBuf>();
        for mark in 0..THREADS as u8 {
            let (pool, start, sender) = (pool.clone(), &start, sender.clone());
            scope.spawn(move || {
                start.wait();
                for i in 0..200 {
                    let Ok(mut buf) = pool.alloc(1 + i % 9000) else { continue };
                    buf.fill(mark);
                    thread::yield_now();
                    assert!(buf.iter().all(|&byte| byte == mark), "two buffers overlap");
                    if i % 2 == 0 {
                        let _ = sender.send(buf);
                    }
                }
            });
        }
        drop(sender);
        scope.spawn(move || receiver.into_iter().for_each(drop));
    });
    let all = 64 * PAGE;
    assert_eq!(pool.stats(), PoolStats { bytes: all, free: all, largest_free: all, quarantined: 0 });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn live_buffers_never_overlap(steps in prop::collection::vec((any::<prop::sample::Index>(), 0..6u8, 1..20_000usize), 1..80)) {
        let pool = pool(16);
        let (mut live, mut quarantined): (Vec<DmaBuf>, Vec<(u64, u64)>) = (Vec::new(), Vec::new());
        for (which, action, len) in steps {
            match action {
                0..3 => {
                    let largest = pool.stats().largest_free;
                    match pool.alloc(len) {
                        Ok(buf) => live.push(buf),
                        Err(_) => prop_assert!(largest < len as u64),
                    }
                }
                _ if live.is_empty() => {}
                3 => {
                    let buf = live.swap_remove(which.index(live.len()));
                    quarantined.push((buf.iova(), buf.capacity() as u64));
                    buf.quarantine();
                }
                _ => drop(live.swap_remove(which.index(live.len()))),
            }
            let mut spans: Vec<_> = live.iter().map(|buf| (buf.iova(), buf.capacity() as u64)).collect();
            let used: u64 = spans.iter().map(|span| span.1).sum();
            spans.extend(&quarantined);
            spans.sort_unstable();
            prop_assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
            let stats = pool.stats();
            prop_assert_eq!(stats.quarantined, quarantined.iter().map(|span| span.1).sum::<u64>());
            prop_assert_eq!(stats.free + used + stats.quarantined, stats.bytes);
        }
    }
}

#[test]
fn a_future_that_was_never_polled_costs_nothing() {
    let (space, script) = scripted(1);
    drop(space.map(4096, HugePages::No));
    let reclaim = pin!(space.reclaim());
    assert_eq!(block_on(reclaim), 0);
    assert_eq!((space.stats(), script.log().len()), (SpaceStats::default(), 0));
}

#[test]
fn mapping_waits_for_an_unmap_under_way() {
    let (space, script) = scripted(1);
    drop(map(&space, 1).unwrap());
    script.next(Answer::Late);
    let mut reclaim = Box::pin(space.reclaim());
    assert!(poll_once(reclaim.as_mut()).is_pending());
    let mut second = Box::pin(space.map(4096, HugePages::No));
    assert!(poll_once(second.as_mut()).is_pending(), "the only address is not free yet");
    assert_eq!(poll_once(reclaim.as_mut()), Poll::Ready(1));
    assert_eq!(block_on(second).unwrap().iova(), PAGE);
}

#[test]
fn hugepages_or_a_remedy() {
    let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], PAGE, 2);
    match block_on(Pool::new(&space, 1, HugePages::Size2M)) {
        Ok(pool) => assert_eq!((pool.stats().bytes, pool.mapping().iova() % (2 << 20)), (2 << 20, 0)),
        Err(error) => assert!(matches!(error, Error::Exhausted { .. } | Error::Io { .. }), "{error}"),
    }
    block_on(space.reclaim());
    assert_eq!(space.stats(), SpaceStats::default());
}
