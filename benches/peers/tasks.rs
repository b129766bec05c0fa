//! What a yield costs, and a task: time, and instructions where valgrind is installed. Tasks are spawned ones, and everybody yields
//! the same way, by a future that wakes itself; tokio's own `yield_now` is a contender of its own.
//!
//! `--rounds N` makes it shorter or longer, `--only WORD...` takes those contenders whose name has a word, `--time` leaves
//! valgrind out.

use std::{
    env,
    future::poll_fn,
    process::Command,
    task::Poll,
    time::{Duration, Instant},
};

use vfio_uring::reactor::{self, Guest, Reactor};
use vfio_uring_peers::{HEADS, Summary, arg, compare, cores, is_chosen, pin, verdict};

/// Tasks that take turns.
const TASKS: u64 = 100;
/// Yields or tasks of a block.
const UNITS: u64 = 5000;

#[derive(Clone, Copy)]
enum Case {
    YieldAlone,
    YieldInTurn,
    SpawnOne,
    SpawnMany,
}

/// The word on the command line, what it is, and whether ours is to be the cheapest.
const CASES: [(&str, &str, Case, bool); 4] = [
    ("yield-1", "yield, 1 task", Case::YieldAlone, true),
    ("yield-100", "yield, 100 tasks in turn", Case::YieldInTurn, true),
    ("spawn-1", "spawn and join, one at a time", Case::SpawnOne, false),
    ("spawn-100", "spawn and join, 100 at a time", Case::SpawnMany, false),
];

type Contender = (&'static str, fn() -> Box<dyn Contest>);

/// The first one is the reference.
const CONTENDERS: [Contender; 8] = [
    ("vfio-uring", || Box::new(Native(Reactor::new().expect("a reactor")))),
    ("tokio current-thread", || Box::new(Tokio(current_thread()))),
    ("tokio current-thread, its yield_now", || Box::new(TokioYield(current_thread()))),
    ("tokio LocalSet", || Box::new(TokioLocal(current_thread(), Default::default()))),
    ("tokio-uring", || Box::new(Uring(tokio_uring::Runtime::new(&tokio_uring::builder()).expect("a runtime")))),
    ("monoio", || Box::new(Monoio(monoio::RuntimeBuilder::<monoio::IoUringDriver>::new().build().expect("a runtime")))),
    ("compio", || Box::new(Compio(compio::runtime::Runtime::new().expect("a runtime")))),
    ("vfio-uring in tokio", || Box::new(InTokio(current_thread(), Guest::new().expect("a guest")))),
];
/// How many of them ours is to be cheaper than: the last one is ours, too.
const OTHERS: usize = CONTENDERS.len() - 1;

fn main() {
    let args: Vec<String> = env::args().collect();
    if let Some(at) = args.iter().position(|arg| arg == "--count") {
        let number = |at: usize| args[at].parse::<usize>().expect("a number");
        return run_counted(number(at + 1), CASES[number(at + 2)].2, number(at + 3) as u64);
    }
    let rounds = arg("--rounds", 128);
    let valgrind = !args.iter().any(|arg| arg == "--time") && Command::new("valgrind").arg("--version").output().is_ok();
    let chosen: Vec<usize> = (0..CONTENDERS.len()).filter(|&index| index == 0 || is_chosen(CONTENDERS[index].0)).collect();
    let mut contenders: Vec<_> = chosen.iter().map(|&index| CONTENDERS[index].1()).collect();
    pin(cores()[0]);
    println!(
        "yields and tasks: ns of each, ratio to {} (paired median and quartiles), instructions of each",
        CONTENDERS[0].0
    );
    println!("{rounds} rounds of {UNITS} each{}\n", if valgrind { "" } else { ", without valgrind no instructions" });
    for (case_index, &(_, title, case, barred)) in CASES.iter().enumerate() {
        let summaries = compare(chosen.len(), rounds, UNITS, |which| time(|| contenders[which].run(case, UNITS)));
        println!("{title:<42}{HEADS}   instr.");
        let counts: Vec<_> =
            chosen.iter().map(|&index| valgrind.then(|| instructions(index, case_index)).flatten()).collect();
        for ((&index, summary), count) in chosen.iter().zip(&summaries).zip(&counts) {
            let count = count.map_or("-".into(), |count| format!("{count:.0}"));
            println!("{:<42}{summary} {count:>8}", CONTENDERS[index].0);
        }
        if barred {
            let cheapest = |(&index, summary): (&usize, &Summary)| index == 0 || index >= OTHERS || summary.ratio[1] > 1.0;
            println!("\nours is cheaper than each of theirs: {}", verdict(chosen.iter().zip(&summaries).all(cheapest)));
        }
        println!();
    }
}

fn time(body: impl FnOnce()) -> Duration {
    let start = Instant::now();
    body();
    start.elapsed()
}

/// Instructions of one yield or task, set-up left out. `None`: the runtime does not run under valgrind.
fn instructions(contender: usize, case: usize) -> Option<f64> {
    let count = |units: u64| {
        let out = env::temp_dir().join(format!("vfio-uring-callgrind-{}", std::process::id()));
        let status = Command::new("valgrind")
            .args(["--tool=callgrind", "--collect-atstart=no", "-q", "--toggle-collect=*measured*"])
            .arg(format!("--callgrind-out-file={}", out.display()))
            .arg(env::current_exe().expect("this program"))
            .args(["--count", &contender.to_string(), &case.to_string(), &units.to_string()])
            .output()
            .ok()?;
        let text = std::fs::read_to_string(&out).ok()?;
        let _ = std::fs::remove_file(&out);
        let totals = text.lines().find_map(|line| line.strip_prefix("totals: "))?;
        status.status.success().then(|| totals.trim().parse::<f64>().ok()).flatten()
    };
    let (few, many) = (UNITS, 3 * UNITS);
    Some((count(many)? - count(few)?) / (many - few) as f64)
}

fn run_counted(contender: usize, case: Case, units: u64) {
    let mut contender = CONTENDERS[contender].1();
    measured(|| contender.run(case, units));
}

/// What is counted.
#[inline(never)]
fn measured(body: impl FnOnce()) {
    body();
}

/// An executor.
trait Executor {
    type Join: Future;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output;

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join;

    fn yield_now() -> impl Future<Output = ()> + Send {
        let mut yielded = false;
        poll_fn(move |cx| {
            if std::mem::replace(&mut yielded, true) {
                return Poll::Ready(());
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
    }
}

/// An executor that is put to the test.
trait Contest {
    fn run(&mut self, case: Case, units: u64);
}

impl<E: Executor> Contest for E {
    fn run(&mut self, case: Case, units: u64) {
        let yields = async |tasks: u64| {
            let each = units / tasks;
            let task = move || async move {
                for _ in 0..each {
                    E::yield_now().await;
                }
            };
            let tasks: Vec<E::Join> = (0..tasks).map(|_| E::spawn(task())).collect();
            for task in tasks {
                task.await;
            }
        };
        let spawns = async |at_once: u64| {
            let mut tasks = Vec::with_capacity(at_once as usize);
            for _ in 0..units / at_once {
                tasks.extend((0..at_once).map(|_| E::spawn(async {})));
                for task in tasks.drain(..) {
                    task.await;
                }
            }
        };
        self.block_on(async {
            match case {
                Case::YieldAlone => yields(1).await,
                Case::YieldInTurn => yields(TASKS).await,
                Case::SpawnOne => spawns(1).await,
                Case::SpawnMany => spawns(TASKS).await,
            }
        });
    }
}

struct Native(Reactor);

impl Executor for Native {
    type Join = reactor::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        reactor::spawn(future)
    }
}

struct InTokio(tokio::runtime::Runtime, Guest);

impl Executor for InTokio {
    type Join = reactor::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(self.1.run(future)).expect("a tokio runtime")
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        reactor::spawn(future)
    }
}

fn current_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

struct Tokio(tokio::runtime::Runtime);

impl Executor for Tokio {
    type Join = tokio::task::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        tokio::spawn(future)
    }
}

struct TokioYield(tokio::runtime::Runtime);

impl Executor for TokioYield {
    type Join = tokio::task::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        tokio::spawn(future)
    }

    fn yield_now() -> impl Future<Output = ()> + Send {
        tokio::task::yield_now()
    }
}

struct TokioLocal(tokio::runtime::Runtime, tokio::task::LocalSet);

impl Executor for TokioLocal {
    type Join = tokio::task::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(self.1.run_until(future))
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        tokio::task::spawn_local(future)
    }
}

struct Uring(tokio_uring::Runtime);

impl Executor for Uring {
    type Join = tokio::task::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        tokio_uring::spawn(future)
    }
}

struct Monoio(monoio::Runtime<monoio::IoUringDriver>);

impl Executor for Monoio {
    type Join = monoio::task::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        monoio::spawn(future)
    }
}

struct Compio(compio::runtime::Runtime);

impl Executor for Compio {
    type Join = compio::runtime::JoinHandle<()>;

    fn block_on<F: Future>(&mut self, future: F) -> F::Output {
        self.0.block_on(future)
    }

    fn spawn<F: Future<Output = ()> + Send + 'static>(future: F) -> Self::Join {
        compio::runtime::spawn(future)
    }
}
