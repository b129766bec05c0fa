//! Time per I/O of the floor and of both async forms, interleaved in one run; the device is serviced inline.

mod common;

use std::{hint::black_box, time::Instant};

use common::{Floor, Rig, reactor};

const ROUNDS: usize = 31;
const IOS: u64 = 128 * 1024;

fn main() {
    println!(
        "ns per I/O on this thread, device serviced inline: median of {ROUNDS} interleaved rounds (10th..90th percentile)"
    );
    println!(
        "{:>5}  {:<28} {:<28} {:<28} {:>13} {:>13}",
        "depth", "floor", "future", "stream", "future/floor", "stream/floor"
    );
    let reactor = reactor();
    for depth in [1, 32, 128] {
        let mut floor = Floor::new(depth);
        let mut rig = reactor.block_on(Rig::new(depth));
        let _device = reactor.block_on(async { vfio_uring::reactor::register_poller(rig.device.clone()) });
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            times[0].push(time(|| floor.run(black_box(IOS))));
            times[1].push(time(|| reactor.block_on(common::futures::<false>(&mut rig, black_box(IOS)))));
            times[2].push(time(|| reactor.block_on(common::stream::<false>(&mut rig, black_box(IOS)))));
        }
        let ratio = |form: usize| Spread::of(times[form].iter().zip(&times[0]).map(|(a, b)| a / b).collect());
        let columns = times.clone().map(|times| Spread::of(times).to_string());
        let [floor, future, stream] = columns;
        println!("{depth:>5}  {floor:<28} {future:<28} {stream:<28} {:>13} {:>13}", ratio(1).short(), ratio(2).short());
    }
}

fn time(body: impl FnOnce()) -> f64 {
    let start = Instant::now();
    body();
    start.elapsed().as_nanos() as f64 / IOS as f64
}

/// A median with its spread.
struct Spread([f64; 3]);

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self([10, 50, 90].map(|percent| values[(values.len() - 1) * percent / 100]))
    }

    fn short(&self) -> String {
        format!("{:.2}x", self.0[1])
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ({:.1}..{:.1})", self.0[1], self.0[0], self.0[2])
    }
}
