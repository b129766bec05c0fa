//! What the benchmarks of this package share: contenders are measured in short blocks, each beside a block of the reference, so
//! that what else the machine does hits both alike, and medians leave out what hits one of them.

use std::{env, fmt, time::Duration};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The processors that this process may use.
pub fn cores() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("the process's own affinity");
    (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect()
}

/// Binds the calling thread to a processor.
pub fn pin(core: usize) {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).expect("a core out of the process's own affinity");
}

/// The number behind `name` on the command line.
///
/// # Panics
/// When something else is there.
pub fn arg(name: &str, default: usize) -> usize {
    let mut args = env::args().skip_while(|arg| arg != name).skip(1);
    args.next().map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} takes a number")))
}

/// The words behind `--only`: parts of the names of contenders, all of them when there is none.
pub fn is_chosen(name: &str) -> bool {
    let args: Vec<String> = env::args().collect();
    let mut only = args.iter().skip_while(|arg| *arg != "--only").skip(1).peekable();
    only.peek().is_none() || only.any(|word| name.contains(word))
}

/// What the rounds found about a contender.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// Median of the time of a unit, in ns.
    pub ns: f64,
    /// Quartiles of the ratio to the reference's block beside it: the second is the paired median.
    pub ratio: [f64; 3],
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [low, median, high] = self.ratio;
        write!(f, "{:>9.1} {median:>8.3} {low:>8.3} {high:>7.3}", self.ns)
    }
}

/// Heads of the columns that a [`Summary`] prints.
pub const HEADS: &str = "       ns    ratio       q1      q3";

/// Measures `contenders` in `rounds`; `block` gives the time that a block of `units` took with one of them. The first contender is the
/// reference: each block of a contender has one of the reference beside it, in turn before and after. So has the reference itself,
/// which shows how much of the spread is the machine's.
pub fn compare(contenders: usize, rounds: usize, units: u64, mut block: impl FnMut(usize) -> Duration) -> Vec<Summary> {
    let mut random = fastrand::Rng::with_seed(1);
    let mut order: Vec<usize> = (0..contenders).collect();
    // The first blocks find cold caches and clocks.
    order.iter().for_each(|&which| _ = block(which));
    let mut time = |which| block(which).as_nanos() as f64 / units as f64;
    let mut pairs = vec![Vec::with_capacity(rounds); contenders];
    for round in 0..rounds {
        random.shuffle(&mut order);
        for &which in &order {
            pairs[which].push(match round % 2 {
                0 => (time(0), time(which)),
                _ => {
                    let own = time(which);
                    (time(0), own)
                }
            });
        }
    }
    let summary = |pairs: &Vec<(f64, f64)>| Summary {
        ns: quartiles(pairs.iter().map(|(_, own)| *own).collect())[1],
        ratio: quartiles(pairs.iter().map(|(reference, own)| own / reference).collect()),
    };
    pairs.iter().map(summary).collect()
}

fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
}

/// What a bar comes to.
pub fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_paired() {
        // The second contender is twice as slow as the first, on a machine that gets slower all the time.
        let mut blocks = 0;
        let summaries = compare(2, 8, 10, |which| {
            blocks += 1;
            Duration::from_micros([10, 20][which] * (100 + blocks))
        });
        assert_eq!(summaries.len(), 2);
        assert!((0.98..1.02).contains(&summaries[0].ratio[1]), "{:?}", summaries[0]);
        assert!((1.96..2.04).contains(&summaries[1].ratio[1]), "{:?}", summaries[1]);
    }

    #[test]
    fn quartiles_of_few() {
        assert_eq!(quartiles(vec![3.0, 1.0, 2.0, 5.0, 4.0]), [2.0, 3.0, 4.0]);
        assert_eq!(quartiles(vec![7.0]), [7.0; 3]);
    }
}
