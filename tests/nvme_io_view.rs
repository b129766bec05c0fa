//! A namespace as a file, on the software controller, against a model of one.

use std::{
    future::Future,
    io::{self, ErrorKind, SeekFrom},
    time::Duration,
};

use futures::{
    AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, AsyncWriteExt,
    io::{Cursor, copy, copy_buf},
};
use proptest::prelude::*;
use vfio_uring::{
    device::{Address, Device},
    dma::{HugePages, Pool},
    reactor::{Reactor, timeout},
};
use vfio_uring_models::{
    nvme::{self, Config, Faults, NamespaceConfig},
    server::Running,
};
use vfio_uring_nvme::{Controller, Error, Namespace, NamespaceIo, Options};

const MIB: u64 = 1 << 20;

fn run<T>(future: impl Future<Output = T>) -> T {
    Reactor::new().unwrap().block_on(async { timeout(Duration::from_secs(60), future).await.expect("no hang") })
}

fn serve(bytes: u64, lba_size: u32, faults: Faults) -> Running {
    let namespaces = vec![NamespaceConfig::memory(bytes).with_lba_size(lba_size)];
    nvme::spawn(Config { namespaces, faults, ..Config::default() }).unwrap()
}

/// A controller that was brought up, with a namespace and a pool.
struct Rig {
    nvme: Controller,
    ns: Namespace,
    pool: Pool,
}

impl Rig {
    async fn new(server: &Running) -> Self {
        Self::with(server, Options::default()).await
    }

    async fn with(server: &Running, options: Options) -> Self {
        let device = Device::open(&server.address().parse::<Address>().unwrap()).await.unwrap();
        let nvme = Controller::new(&device, options).await.unwrap();
        let ns = nvme.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = Pool::new(device.dma(), 4 * MIB as usize, HugePages::No).await.unwrap();
        Self { nvme, ns, pool }
    }

    fn view(&self, blocks: usize) -> NamespaceIo {
        self.ns.io(&self.pool, blocks * self.ns.block_size()).unwrap()
    }

    /// All of the namespace, past any view.
    async fn contents(&self) -> Vec<u8> {
        let buf = self.pool.alloc(self.ns.blocks() as usize * self.ns.block_size()).unwrap();
        let (result, buf) = self.ns.read(0, buf).await;
        result.unwrap();
        buf.to_vec()
    }
}

/// Bytes that no shift by a block repeats.
fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.u8(..)).collect()
}

fn source(error: &io::Error) -> &Error {
    error.get_ref().and_then(|source| source.downcast_ref()).expect("the driver's error is the source")
}

#[derive(Debug, Clone)]
enum Op {
    Seek(SeekFrom),
    Read(usize),
    /// Takes up to so many of what is buffered.
    Consume(usize),
    Write(usize),
    Flush,
    /// Futures that are polled so often and then dropped.
    LeftRead(usize, usize),
    LeftWrite(usize, usize),
    LeftFlush(usize),
}

/// Blocks of the model's namespace.
const BLOCKS: usize = 12;

/// Operations on the namespace, with lengths and positions around the edges of blocks.
fn ops(block: usize) -> impl Strategy<Value = Vec<Op>> {
    let len = prop_oneof![0..3 * block, (0..4usize).prop_map(move |blocks| blocks * block), 0..20usize];
    let size = (BLOCKS * block) as i64;
    let near = prop_oneof![0..size + 600, (0..=BLOCKS as i64).prop_map(move |at| at * block as i64), size - 700..size + 1];
    let seek = prop_oneof![
        6 => near.prop_map(|at| SeekFrom::Start(at as u64)),
        2 => (-size..600).prop_map(SeekFrom::End),
        3 => (-1500..1500i64).prop_map(SeekFrom::Current),
        1 => Just(SeekFrom::Current(i64::MIN)),
    ];
    let polls = 1..40usize;
    let op = prop_oneof![
        5 => seek.prop_map(Op::Seek),
        5 => len.clone().prop_map(Op::Read),
        1 => len.clone().prop_map(Op::Consume),
        8 => len.clone().prop_map(Op::Write),
        1 => Just(Op::Flush),
        1 => (len.clone(), polls.clone()).prop_map(|(len, polls)| Op::LeftRead(len, polls)),
        1 => (len, polls.clone()).prop_map(|(len, polls)| Op::LeftWrite(len, polls)),
        1 => polls.prop_map(Op::LeftFlush),
    ];
    prop::collection::vec(op, 1..120)
}

/// Polls a future so often, and then drops it if it is not done.
async fn leave<T>(future: impl Future<Output = T>, polls: usize) -> Option<T> {
    let mut future = std::pin::pin!(future);
    for _ in 0..polls {
        if let std::task::Poll::Ready(done) = futures::poll!(future.as_mut()) {
            return Some(done);
        }
        vfio_uring::reactor::yield_now().await;
    }
    None
}

/// The file that the view has to be like.
struct Model {
    data: Vec<u8>,
    position: u64,
}

impl Model {
    fn rest(&self) -> &[u8] {
        self.data.get(self.position as usize..).unwrap_or(&[])
    }

    /// Checks what a read of at most `len` bytes gave.
    fn check_read(&mut self, got: &[u8], len: usize) {
        assert!(self.rest().starts_with(got), "{} bytes at {}", got.len(), self.position);
        assert!(!got.is_empty() || len == 0 || self.rest().is_empty(), "0 bytes in the middle");
        self.position += got.len() as u64;
    }

    fn check_write(&mut self, data: &[u8], result: io::Result<usize>) {
        match result {
            Ok(len) => {
                assert!(len <= data.len().min(self.rest().len()) && (len > 0 || data.is_empty()));
                let at = self.position as usize;
                if len > 0 {
                    self.data[at..at + len].copy_from_slice(&data[..len]);
                }
                self.position += len as u64;
            }
            Err(error) => assert!(error.kind() == ErrorKind::StorageFull && self.rest().is_empty(), "{error}"),
        }
    }

    fn seek(&mut self, to: SeekFrom) -> Option<u64> {
        self.position = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => self.position.checked_add_signed(by)?,
            SeekFrom::End(by) => (self.data.len() as u64).checked_add_signed(by)?,
        };
        Some(self.position)
    }
}

async fn like_the_model(server: &Running, ops: Vec<Op>, buffer_blocks: usize) {
    let rig = Rig::new(server).await;
    let mut view = rig.view(buffer_blocks);
    let mut model = Model { data: rig.contents().await, position: 0 };
    assert_eq!(view.size(), model.data.len() as u64);
    for (seed, op) in (0..).zip(ops) {
        match op {
            Op::Seek(to) => match (model.seek(to), view.seek(to).await) {
                (Some(expected), Ok(position)) => assert_eq!(position, expected),
                (None, Err(error)) => assert_eq!(error.kind(), ErrorKind::InvalidInput),
                other => panic!("{to:?}: {other:?}"),
            },
            Op::Read(len) => {
                let mut got = vec![0; len];
                let read = view.read(&mut got).await.unwrap();
                model.check_read(&got[..read], len);
            }
            Op::Consume(most) => {
                let got = view.fill_buf().await.unwrap();
                let got = got[..got.len().min(most)].to_vec();
                view.consume_unpin(got.len());
                model.check_read(&got, most);
            }
            Op::Write(len) => {
                let data = bytes(len, seed);
                model.check_write(&data, view.write(&data).await);
            }
            Op::Flush => {
                view.flush().await.unwrap();
                assert_eq!(rig.contents().await, model.data);
            }
            Op::LeftRead(len, polls) => {
                let mut got = vec![0; len];
                if let Some(read) = leave(view.read(&mut got), polls).await {
                    model.check_read(&got[..read.unwrap()], len);
                }
            }
            Op::LeftWrite(len, polls) => {
                let data = bytes(len, seed);
                if let Some(result) = leave(view.write(&data), polls).await {
                    model.check_write(&data, result);
                }
            }
            Op::LeftFlush(polls) => {
                if let Some(result) = leave(view.flush(), polls).await {
                    result.unwrap();
                    assert_eq!(rig.contents().await, model.data);
                }
            }
        }
        assert_eq!(view.position(), model.position);
    }
    view.close().await.unwrap();
    assert!(!view.is_dirty());
    assert_eq!(rig.contents().await, model.data);
    rig.nvme.shutdown().await.unwrap();
}

fn random_sequences(block: usize) {
    let server = serve((BLOCKS * block) as u64, block as u32, Faults::default());
    let config = ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() };
    let cases = (ops(block), 1..5usize);
    proptest::test_runner::TestRunner::new(config)
        .run(&cases, |(ops, buffer_blocks)| {
            run(like_the_model(&server, ops, buffer_blocks));
            Ok(())
        })
        .unwrap();
}

#[test]
fn random_sequences_in_blocks_of_512() {
    random_sequences(512);
}

#[test]
fn random_sequences_in_blocks_of_4096() {
    random_sequences(4096);
}

#[test]
fn the_end_of_the_namespace() {
    let server = serve(8 * 512, 512, Faults::default());
    run(async {
        let rig = Rig::new(&server).await;
        let mut view = rig.view(4);
        assert_eq!((view.size(), view.position()), (4096, 0));
        // Partial counts.
        assert_eq!(view.seek(SeekFrom::End(-100)).await.unwrap(), 3996);
        assert_eq!(view.write(&[7; 300]).await.unwrap(), 100);
        let error = view.write(&[7]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        assert!(error.to_string().contains("the namespace has 4096"), "{error}");
        assert_eq!(view.write(&[]).await.unwrap(), 0);
        let mut got = [0; 300];
        assert_eq!(view.read(&mut got).await.unwrap(), 0);
        view.seek(SeekFrom::Current(-50)).await.unwrap();
        assert_eq!(view.read(&mut got).await.unwrap(), 50);
        assert_eq!(got[..51], [[7; 50].as_slice(), &[0]].concat());
        // Far beyond it.
        for to in [4097, 1 << 40, u64::MAX] {
            assert_eq!(view.seek(SeekFrom::Start(to)).await.unwrap(), to);
            assert_eq!(view.read(&mut got).await.unwrap(), 0);
            assert_eq!(view.write(&got).await.unwrap_err().kind(), ErrorKind::StorageFull);
        }
        assert_eq!(view.seek(SeekFrom::Current(1)).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(view.seek(SeekFrom::End(-4097)).await.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(view.position(), u64::MAX, "a refused seek moves nothing");
        // What never fits fails after what does.
        view.seek(SeekFrom::Start(1)).await.unwrap();
        assert_eq!(view.write_all(&[9; 4096]).await.unwrap_err().kind(), ErrorKind::StorageFull);
        view.flush().await.unwrap();
        assert_eq!(rig.contents().await, [&[0], [9; 4095].as_slice()].concat());
        rig.nvme.shutdown().await.unwrap();
    });
}

#[test]
fn wrong_buffers_are_refused() {
    let servers = [serve(MIB, 4096, Faults::default()), serve(MIB, 4096, Faults::default())];
    run(async {
        let (rig, other) = (Rig::new(&servers[0]).await, Rig::new(&servers[1]).await);
        let refused = |result: Result<NamespaceIo, Error>, word: &str| {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(word), "{text}");
        };
        refused(NamespaceIo::new(rig.ns.clone(), rig.pool.alloc(4095).unwrap()), "at least a block, 4096");
        refused(NamespaceIo::new(rig.ns.clone(), other.pool.alloc(4096).unwrap()), "another device");
        refused(rig.ns.io(&rig.pool, 0), "0 bytes");
        refused(rig.ns.io(&rig.pool, usize::MAX), "bytes");
        // Of an odd length, its whole blocks are used.
        let mut view = NamespaceIo::new(rig.ns.clone(), rig.pool.alloc(2 * 4096 + 100).unwrap()).unwrap();
        assert_eq!(view.fill_buf().await.unwrap().len(), 2 * 4096);
        rig.nvme.shutdown().await.unwrap();
        other.nvme.shutdown().await.unwrap();
    });
}

#[test]
fn a_bad_block_fails_alone() {
    let server = serve(16 * 512, 512, Faults { error_lba: Some(5), ..Faults::default() });
    run(async {
        let rig = Rig::new(&server).await;
        let mut view = rig.view(8);
        // What can be read before it is, though a whole buffer can't.
        let mut got = [1; 512];
        for _ in 0..5 {
            view.read_exact(&mut got).await.unwrap();
        }
        for _ in 0..2 {
            let error = view.read(&mut got).await.unwrap_err();
            assert!(matches!(source(&error), Error::Status(status) if status.code_type() == 2), "{error}");
            assert_eq!(view.position(), 5 * 512);
        }
        // A write of a part of it needs the rest; nothing is changed.
        view.seek(SeekFrom::Start(5 * 512 + 1)).await.unwrap();
        assert!(matches!(source(&view.write(&[1]).await.unwrap_err()), Error::Status(_)));
        view.flush().await.unwrap();
        view.seek(SeekFrom::Start(6 * 512)).await.unwrap();
        let mut rest = Vec::new();
        assert_eq!(view.read_to_end(&mut rest).await.unwrap(), 10 * 512);

        // Written back, it fails as often as it is tried, and what is in the buffer stays.
        view.seek(SeekFrom::Start(4 * 512)).await.unwrap();
        view.write_all(&[4; 512 + 30]).await.unwrap();
        for _ in 0..2 {
            assert!(matches!(source(&view.flush().await.unwrap_err()), Error::Status(_)));
            assert!(view.is_dirty());
        }
        view.seek(SeekFrom::Start(4 * 512 + 512)).await.unwrap();
        assert_eq!(view.read(&mut got).await.unwrap(), 30);
        assert_eq!(got[..30], [4; 30]);
        view.seek(SeekFrom::Start(0)).await.unwrap();
        assert!(view.read(&mut got).await.is_err(), "another range needs the buffer");
        // Given up, it does not hold the view up.
        view.discard().await;
        view.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [0; 512]);
        view.seek(SeekFrom::Start(4 * 512 + 10)).await.unwrap();
        assert_eq!(view.read(&mut got).await.unwrap(), 502);
        assert_eq!(got[..502], [4; 502], "the block before was written");
        view.close().await.unwrap();
        rig.nvme.shutdown().await.unwrap();
    });
}

#[test]
fn discarded_writes_are_lost_and_flushed_ones_not() {
    let server = serve(MIB, 512, Faults::default());
    run(async {
        let rig = Rig::new(&server).await;
        let mut view = rig.view(8);
        view.write_all(&[1; 100]).await.unwrap();
        view.flush().await.unwrap();
        view.write_all(&[2; 100]).await.unwrap();
        assert!(view.is_dirty());
        view.discard().await;
        assert!(!view.is_dirty());
        view.write_all(&[3; 100]).await.unwrap();
        drop(view);
        let mut view = rig.view(8);
        let mut got = [0; 300];
        view.read_exact(&mut got).await.unwrap();
        assert_eq!(got, *[[1; 100], [0; 100], [0; 100]].concat());
        rig.nvme.shutdown().await.unwrap();
    });
}

#[test]
fn a_queue_that_ends_ends_the_view() {
    let server = serve(MIB, 512, Faults { drop_completion_lba: Some(64), ..Faults::default() });
    run(async {
        let rig = Rig::with(&server, Options { timeout: Duration::from_millis(400), ..Options::default() }).await;
        let (mut stuck, mut other) = (rig.view(4), rig.view(4));
        other.write_all(&[5; 10]).await.unwrap();
        stuck.seek(SeekFrom::Start(64 * 512)).await.unwrap();
        let mut got = [0; 10];
        // Its buffer stays with the command; that of the other does not.
        for _ in 0..2 {
            let error = stuck.read(&mut got).await.unwrap_err();
            assert!(matches!(source(&error), Error::Ended(_)), "{error}");
            assert!(stuck.write(&got).await.is_err() && stuck.flush().await.is_err() && stuck.fill_buf().await.is_err());
            stuck.discard().await;
        }
        assert!(matches!(source(&other.flush().await.unwrap_err()), Error::Ended(_)));
        other.seek(SeekFrom::Start(0)).await.unwrap();
        assert_eq!(other.read(&mut got).await.unwrap(), 10);
        assert_eq!(got, [5; 10]);
        drop((stuck, other));
        rig.nvme.shutdown().await.unwrap();
        assert_eq!(rig.pool.stats().free, rig.pool.stats().bytes);
    });
}

/// What a dropped read had under way is there for the next one, and its buffer is not lost.
#[test]
fn a_dropped_read() {
    let server = serve(MIB, 4096, Faults::default());
    run(async {
        let rig = Rig::new(&server).await;
        let data = bytes(MIB as usize, 1);
        let mut view = rig.view(4);
        view.write_all(&data).await.unwrap();
        view.close().await.unwrap();
        let mut random = fastrand::Rng::with_seed(2);
        let mut got = vec![0; 30_000];
        let mut left = 0;
        for _ in 0..200 {
            let at = random.usize(..data.len());
            view.seek(SeekFrom::Start(at as u64)).await.unwrap();
            left += usize::from(leave(view.read(&mut got), random.usize(1..4)).await.is_none());
            let position = view.position() as usize;
            let len = view.read(&mut got).await.unwrap();
            assert_eq!(got[..len], data[position..position + len]);
        }
        assert!(left > 50, "{left} were dropped under way");
        // The view itself may go, too: its buffer returns when the command is done.
        drop(view);
        let free = rig.pool.stats().free;
        let mut view = rig.view(4);
        assert!(leave(view.read(&mut got), 1).await.is_none());
        drop(view);
        while rig.pool.stats().free != free {
            vfio_uring::reactor::yield_now().await;
        }
        rig.nvme.shutdown().await.unwrap();
    });
}

#[test]
fn copies_of_futures() {
    for block in [512, 4096] {
        let server = serve(2 * MIB, block, Faults::default());
        run(async {
            let rig = Rig::new(&server).await;
            let data = bytes(MIB as usize + 12345, 3);
            let mut view = rig.view(64);
            view.seek(SeekFrom::Start(77)).await.unwrap();
            assert_eq!(copy(Cursor::new(&data), &mut view).await.unwrap(), data.len() as u64);
            assert!(!view.is_dirty(), "a copy ends with a flush");
            assert_eq!(rig.contents().await[77..77 + data.len()], data);
            for buffered in [false, true] {
                let mut back = Cursor::new(Vec::new());
                view.seek(SeekFrom::Start(77)).await.unwrap();
                let part = (&mut view).take(data.len() as u64);
                let copied = if buffered { copy_buf(part, &mut back).await } else { copy(part, &mut back).await };
                assert_eq!(copied.unwrap(), data.len() as u64);
                assert_eq!(back.into_inner(), data);
            }
            // More than there is room for.
            view.seek(SeekFrom::End(-1000)).await.unwrap();
            assert_eq!(copy(Cursor::new(&data), &mut view).await.unwrap_err().kind(), ErrorKind::StorageFull);
            view.close().await.unwrap();
            assert_eq!(rig.contents().await[2 * MIB as usize - 1000..], data[..1000]);
            rig.nvme.shutdown().await.unwrap();
        });
    }
}

mod with_tokio {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, AsyncWriteExt, copy};

    use super::{ErrorKind, Faults, MIB, Rig, SeekFrom, bytes, run, serve};

    #[test]
    fn copies_of_tokio() {
        let server = serve(2 * MIB, 512, Faults::default());
        run(async {
            let rig = Rig::new(&server).await;
            let data = bytes(MIB as usize + 12345, 4);
            let mut view = rig.view(64);
            assert_eq!(view.seek(SeekFrom::Start(77)).await.unwrap(), 77);
            assert_eq!(copy(&mut &*data, &mut view).await.unwrap(), data.len() as u64);
            view.shutdown().await.unwrap();
            assert_eq!(rig.contents().await[77..77 + data.len()], data);
            assert_eq!(view.seek(SeekFrom::Current(-(data.len() as i64))).await.unwrap(), 77);
            let mut back = Vec::new();
            assert_eq!(copy(&mut (&mut view).take(data.len() as u64), &mut back).await.unwrap(), data.len() as u64);
            assert_eq!(back, data);
            // The end, lines, and errors.
            assert_eq!(view.seek(SeekFrom::End(-8)).await.unwrap(), 2 * MIB - 8);
            let mut text: &[u8] = b"one\ntwo\nthree";
            assert_eq!(copy(&mut text, &mut view).await.unwrap_err().kind(), ErrorKind::StorageFull);
            assert_eq!(view.seek(SeekFrom::Current(i64::MIN)).await.unwrap_err().kind(), ErrorKind::InvalidInput);
            view.seek(SeekFrom::End(-8)).await.unwrap();
            let (mut first, mut second) = (String::new(), String::new());
            assert_eq!(view.read_line(&mut first).await.unwrap(), 4);
            assert_eq!(view.read_line(&mut second).await.unwrap(), 4);
            assert_eq!((first.as_str(), second.as_str()), ("one\n", "two\n"));
            assert_eq!(view.read_u8().await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
            view.flush().await.unwrap();
            rig.nvme.shutdown().await.unwrap();
        });
    }

    /// The same as a guest of a tokio runtime, beside its own tasks.
    #[test]
    fn as_a_guest() {
        let server = serve(MIB, 4096, Faults::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let body = async {
            let mut guest = vfio_uring::reactor::Guest::new().unwrap();
            let done = guest.run(async {
                let rig = Rig::new(&server).await;
                let (mut view, data) = (rig.view(4), bytes(100_000, 5));
                let (mut sender, mut receiver) = tokio::io::duplex(1000);
                let sent = data.clone();
                let task = tokio::spawn(async move { sender.write_all(&sent).await });
                assert_eq!(copy(&mut receiver, &mut view).await.unwrap(), data.len() as u64);
                task.await.unwrap().unwrap();
                view.flush().await.unwrap();
                assert_eq!(rig.contents().await[..data.len()], data);
                rig.nvme.shutdown().await.unwrap();
            });
            done.await.unwrap();
        };
        runtime.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(60), body).await.expect("no hang") });
    }
}
