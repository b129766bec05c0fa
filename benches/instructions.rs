//! Instructions per I/O of the client side, counted by callgrind; the device is serviced inline and not counted.
//!
//! The form "guest" is that of a future per command, as one task of a tokio runtime.
//!
//! The program runs itself under `valgrind --tool=callgrind` for each case, with two numbers of I/Os: their difference leaves
//! the set-up out. Counts are steady, so that what is reached is asserted.

mod common;

use std::{env, fs, process::Command};

use common::{
    Floor, Rig,
    forward::{ForwardFloor, ForwardRig},
    reactor,
};
use vfio_uring::reactor::Guest;

const FEW: u64 = 12_800;
const MANY: u64 = 51_200;

/// Form, queue depth, the bar that is aimed at, and what is held: a change that needs more fails.
const CASES: [(&str, usize, Option<f64>, f64); 11] = [
    ("floor", 1, None, 120.0),
    ("floor", 32, None, 90.0),
    ("floor", 128, None, 90.0),
    ("future", 1, Some(300.0), 660.0),
    ("future", 32, None, 350.0),
    ("future", 128, Some(200.0), 330.0),
    ("stream", 1, Some(300.0), 600.0),
    ("stream", 32, None, 155.0),
    ("stream", 128, Some(140.0), 150.0),
    ("guest", 1, None, 900.0),
    ("guest", 128, None, 350.0),
];
/// Bars for the instructions over the floor at depth 128.
const TAX: [(&str, f64); 2] = [("future", 110.0), ("stream", 45.0)];

/// A packet that is forwarded, in batches of so many: instructions, and their ratio to those of the loop written by hand; for each, the
/// bar that is aimed at and what is held.
const FORWARD_BATCH: usize = 32;
const FORWARD: (f64, f64) = (130.0, 120.0);
const FORWARD_RATIO: (f64, f64) = (1.25, 1.25);

fn main() {
    let args: Vec<String> = env::args().collect();
    // `cargo bench --bench instructions -- forward`: only that.
    if args.iter().any(|arg| arg == "forward") && !args.iter().any(|arg| arg == "--case") {
        let mut worse = Vec::new();
        forward(&mut worse);
        assert!(worse.is_empty(), "more instructions than before: {worse:?}");
        return;
    }
    if let Some(at) = args.iter().position(|arg| arg == "--case") {
        return run_case(&args[at + 1], args[at + 2].parse().expect("a depth"), args[at + 3].parse().expect("a count"));
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("instructions: skipped, valgrind is not installed (Debian package valgrind)");
        return;
    }
    println!("instructions per I/O, client side, by callgrind (device not counted)");
    println!("{:<8} {:>5} {:>10} {:>10} {:>10} {:>8} {:>8}", "form", "depth", "submit", "complete", "total", "bar", "held");
    let mut totals = Vec::new();
    let mut worse = Vec::new();
    for (case, depth, bar, held) in CASES {
        let total = per_io(case, depth, "*measured*");
        let submit = if matches!(case, "floor" | "guest") {
            None
        } else {
            Some(per_io(&format!("{case}-split"), depth, "*first_poll*"))
        };
        let column = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1}"));
        let (complete, bar) = (column(submit.map(|submit| total - submit)), column(bar));
        println!("{case:<8} {depth:>5} {:>10} {complete:>10} {total:>10.1} {bar:>8} {held:>8.1}", column(submit));
        totals.push((case, depth, total));
        if total > held {
            worse.push(format!("{case} at depth {depth}: {total:.1}, {held} is held"));
        }
    }
    let at_128 =
        |form: &str| totals.iter().find(|(case, depth, _)| *case == form && *depth == 128).map_or(0.0, |total| total.2);
    for (form, bar) in TAX {
        println!("{form} over the floor at depth 128: {:.1} (bar {bar})", at_128(form) - at_128("floor"));
    }
    forward(&mut worse);
    assert!(worse.is_empty(), "more instructions than before: {worse:?}");
}

/// The forward path of the NIC driver.
fn forward(worse: &mut Vec<String>) {
    let (batch, (bar, held), (ratio_bar, ratio_held)) = (FORWARD_BATCH, FORWARD, FORWARD_RATIO);
    println!("\ninstructions per forwarded packet at batch {batch}, driver's side (device not counted)");
    let (floor, total) = (per_io("forward-floor", batch, "*measured*"), per_io("forward", batch, "*measured*"));
    let ratio = total / floor;
    println!(
        "by hand {floor:.1}, driver {total:.1} (bar {bar}, held {held}), ratio {ratio:.2} (bar {ratio_bar}, held {ratio_held})"
    );
    // Set-up differs a little from run to run, by less than one in many packets.
    let allocating = per_io("forward", batch, "malloc") + per_io("forward", batch, "free");
    println!("in the allocator: {allocating:.2}");
    if total > held || ratio > ratio_held || allocating.abs() > 0.5 {
        worse.push(format!("forward: {total:.1}, ratio {ratio:.2}, {allocating:.1} in the allocator"));
    }
}

/// Instructions of one I/O in functions that match `toggle`.
fn per_io(case: &str, depth: usize, toggle: &str) -> f64 {
    let (few, many) = (count(case, depth, toggle, FEW), count(case, depth, toggle, MANY));
    (many as f64 - few as f64) / (MANY - FEW) as f64
}

fn count(case: &str, depth: usize, toggle: &str, ios: u64) -> u64 {
    let out = env::temp_dir().join(format!("vfio-uring-callgrind-{}", std::process::id()));
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "-q"])
        .arg(format!("--toggle-collect={toggle}"))
        .args((toggle == "*measured*").then_some("--toggle-collect=*device_service*"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(env::current_exe().expect("this program"))
        .args(["--case", case, &depth.to_string(), &ios.to_string()])
        .status()
        .expect("valgrind starts");
    assert!(status.success(), "{case} at depth {depth} failed under valgrind");
    let text = fs::read_to_string(&out).expect("callgrind wrote its file");
    let _ = fs::remove_file(&out);
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a line with totals");
    totals.trim().parse().expect("a number")
}

fn run_case(case: &str, depth: usize, ios: u64) {
    match case {
        "floor" => measured(|| Floor::new(depth).run(ios)),
        "forward-floor" => {
            let mut floor = ForwardFloor::new(depth);
            measured(|| floor.run(ios));
        }
        "forward" => {
            let reactor = reactor();
            let mut rig = reactor.block_on(ForwardRig::new(depth));
            measured(|| reactor.block_on(rig.run(ios)));
        }
        "guest" => {
            let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("tokio");
            let mut guest = Guest::new().expect("a guest");
            let run = guest.run(async {
                let mut rig = Rig::new(depth).await;
                let _device = vfio_uring::reactor::register_poller(rig.device.clone());
                common::futures::<false>(&mut rig, ios).await;
            });
            measured(|| tokio.block_on(run)).expect("in tokio");
        }
        _ => {
            let reactor = reactor();
            let mut rig = reactor.block_on(Rig::new(depth));
            let _device = reactor.block_on(async { vfio_uring::reactor::register_poller(rig.device.clone()) });
            measured(|| match case {
                "stream" => reactor.block_on(common::stream::<false>(&mut rig, ios)),
                "stream-split" => reactor.block_on(common::stream::<true>(&mut rig, ios)),
                "future" => reactor.block_on(common::futures::<false>(&mut rig, ios)),
                _ => reactor.block_on(common::futures::<true>(&mut rig, ios)),
            });
        }
    }
}

/// What is counted.
#[inline(never)]
fn measured<T>(body: impl FnOnce() -> T) -> T {
    body()
}
