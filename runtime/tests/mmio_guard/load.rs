//! Truncation under load.

use std::{
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use vfio_uring::{
    dma::SharedMemory,
    mmio::{Register, Value},
};

use crate::common::{File, PAGE};

const ROUNDS: u32 = 1000;
const DEADLINE: Duration = Duration::from_secs(60);

/// What the threads have seen.
#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    good: AtomicU64,
    gone: AtomicU64,
}

impl Seen {
    fn note<T, E>(&self, result: Result<T, E>) -> Option<T> {
        let counter = if result.is_ok() { &self.good } else { &self.gone };
        counter.fetch_add(1, Ordering::Relaxed);
        result.ok()
    }
}

/// Accesses a register of its own until told to stop. What it reads is what it wrote, or zero of a new page.
fn hammer<T: Value>(memory: &Arc<SharedMemory>, offset: u64, seen: &Seen) {
    let register = Register::<T>::new(memory, offset).unwrap();
    let zero = T::truncate(0);
    let mut number = 0;
    while !seen.stop.load(Ordering::Relaxed) {
        number = (number + 1) % 100;
        let value = T::truncate(number * 0x0101_0101_0101_0101);
        let written = seen.note(register.try_write(value));
        if let Some(read) = seen.note(register.try_read()) {
            assert!(
                read == zero || read == value && written.is_some(),
                "{read:?} after {value:?}, which was written: {written:?}"
            );
        }
    }
}

/// The same by copies, on memory of its own.
fn copy(memory: &Arc<SharedMemory>, offset: u64, seen: &Seen) {
    let mut number = 0u8;
    while !seen.stop.load(Ordering::Relaxed) {
        number = (number + 1) % 100;
        seen.note(memory.write(offset, &[number; 200]));
        let mut bytes = [0xee; 200];
        if seen.note(memory.read(offset, &mut bytes)).is_some() {
            assert!(bytes.iter().all(|byte| *byte < 100), "{bytes:?}");
        }
        seen.note(memory.write_obj(offset, &[u64::from(number); 8]));
        if let Some(words) = seen.note(memory.read_obj::<[u64; 8]>(offset)) {
            assert!(words.iter().all(|word| *word < 100), "{words:?}");
        }
    }
}

#[test]
fn truncated_under_load_from_four_threads_and_restored() {
    let file = File::new(2);
    let (counted, other) = (Arc::new(file.map(2)), Arc::new(file.map(2)));
    let (registers, copies) = (Seen::default(), Seen::default());
    let until = Instant::now() + DEADLINE;
    let last = thread::scope(|scope| {
        scope.spawn(|| hammer::<u32>(&counted, 0x100, &registers));
        scope.spawn(|| hammer::<u64>(&counted, PAGE + 0x400, &registers));
        scope.spawn(|| copy(&other, PAGE - 64, &copies));
        scope.spawn(|| {
            // Without a check: nothing but survival and the values' being possible.
            let register = Register::<u16>::new(&other, 0x800).unwrap();
            while !copies.stop.load(Ordering::Relaxed) {
                register.write(5);
                assert!(matches!(black_box(register.read()), 0 | 5 | u16::MAX));
            }
        });
        let mut rounds = 0;
        while rounds < ROUNDS && Instant::now() < until {
            // Each way of being short has to be met by somebody, on a machine with few cores too.
            let before = registers.gone.load(Ordering::Relaxed) + copies.gone.load(Ordering::Relaxed);
            file.set_len(u64::from(rounds % 2));
            for _ in 0..1000 {
                if registers.gone.load(Ordering::Relaxed) + copies.gone.load(Ordering::Relaxed) != before {
                    break;
                }
                thread::yield_now();
            }
            file.set_len(2);
            rounds += 1;
        }
        registers.stop.store(true, Ordering::Relaxed);
        copies.stop.store(true, Ordering::Relaxed);
        rounds
    });
    let (good, gone) = (registers.good.into_inner(), registers.gone.into_inner());
    println!("{last} rounds; registers: {good} good, {gone} gone; copies: {:?} good, {:?} gone", copies.good, copies.gone);
    assert_eq!(last, ROUNDS, "in the time");
    assert!(good > 0 && gone > 0 && copies.good.into_inner() > 0 && copies.gone.into_inner() > 0);
    // Not one is lost, and not one is told of twice.
    assert_eq!(counted.take_faults().map(|faults| faults.count), Some(gone));
    assert!(other.take_faults().is_some());
    for memory in [counted, other] {
        memory.write(0, &[9; 8192]).unwrap();
        assert_eq!(memory.read_obj(8000), Ok([9u8; 100]));
        assert_eq!(memory.take_faults(), None);
    }
}

#[test]
fn mappings_come_and_go_while_others_fault() {
    let file = File::new(1);
    let memory = Arc::new(file.map(1));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let other = File::new(1);
                while !done.load(Ordering::Relaxed) {
                    let mappings: Vec<_> = (0..50).map(|_| other.map(1)).collect();
                    assert!(mappings.iter().all(|mapping| mapping.take_faults().is_none()));
                }
            });
        }
        file.set_len(0);
        for _ in 0..20_000 {
            assert!(memory.load_u64(0).is_err());
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(memory.take_faults().map(|faults| faults.count), Some(20_000));
}
