//! Instructions of an access to a register, counted by callgrind, against a bare volatile access: the guard costs a store and a
//! plain load nothing, and a checked load a compare and a branch.
//!
//! The program runs itself under `valgrind --tool=callgrind`, which counts in one function at a time.

use std::{env, fs, hint::black_box, process::Command, ptr::NonNull, sync::Arc};

use vfio_uring::{
    dma::{HugePages, SharedMemory},
    mmio::Register,
};

const CALLS: u64 = 1000;

/// A register without anything.
struct Bare<T>(NonNull<T>);

macro_rules! widths {
    ($($width:ident $ty:ty;)*) => {$(mod $width {
        use super::*;

        type Store = fn(&Register<$ty>, $ty);
        type Load = fn(&Register<$ty>) -> $ty;

        #[inline(never)]
        pub fn bare_store(register: &Bare<$ty>, value: $ty) {
            // SAFETY: it points to a value that nobody else has.
            unsafe { register.0.as_ptr().write_volatile(value) }
        }

        #[inline(never)]
        pub fn write(register: &Register<$ty>, value: $ty) {
            register.write(value);
        }

        #[inline(never)]
        pub fn write_after_dma(register: &Register<$ty>, value: $ty) {
            register.write_after_dma(value);
        }

        #[inline(never)]
        pub fn bare_load(register: &Bare<$ty>) -> $ty {
            // SAFETY: as above.
            unsafe { register.0.as_ptr().read_volatile() }
        }

        #[inline(never)]
        pub fn read(register: &Register<$ty>) -> $ty {
            register.read()
        }

        #[inline(never)]
        pub fn try_read(register: &Register<$ty>) -> $ty {
            match register.try_read() {
                Ok(value) => value,
                Err(_) => unavailable(),
            }
        }

        pub fn run(memory: &Arc<SharedMemory>) {
            let mut value: $ty = 0;
            let bare = black_box(Bare(NonNull::from(&mut value)));
            let register = black_box(Register::<$ty>::new(memory, 8).expect("inside of the page"));
            // Called by address, so that the compiler changes no signature for the one caller there is.
            let (bare_store, bare_load) = black_box((bare_store as fn(&Bare<$ty>, $ty), bare_load as fn(&Bare<$ty>) -> $ty));
            let (write, write_after_dma) = black_box((write as Store, write_after_dma as Store));
            let (read, try_read) = black_box((read as Load, try_read as Load));
            for i in 0..CALLS {
                bare_store(&bare, i as $ty);
                write(&register, i as $ty);
                write_after_dma(&register, i as $ty);
                black_box((bare_load(&bare), read(&register), try_read(&register)));
            }
        }
    })*};
}

widths! {
    width_8 u8;
    width_16 u16;
    width_32 u32;
    width_64 u64;
}

#[cold]
#[inline(never)]
fn unavailable() -> ! {
    panic!("memory of ours is there");
}

/// What is counted, what it is compared with, and how much more it may be.
const CASES: [(&str, &str, u64); 4] = [
    ("write", "bare_store", 0),
    ("write_after_dma", "bare_store", 0),
    ("read", "bare_load", 0),
    ("try_read", "bare_load", 2),
];

fn main() {
    let memory = Arc::new(SharedMemory::create("registers", 4096, HugePages::No).expect("a memfd").1);
    if env::args().any(|arg| arg == "--run") {
        width_8::run(&memory);
        width_16::run(&memory);
        width_32::run(&memory);
        return width_64::run(&memory);
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("mmio: skipped, valgrind is not installed (Debian package valgrind)");
        return;
    }
    println!("instructions per access, by callgrind, with the call's return");
    println!("{:<10} {:<16} {:>6} {:>6} {:>6}", "width", "access", "bare", "ours", "held");
    let mut worse = Vec::new();
    for width in ["width_8", "width_16", "width_32", "width_64"] {
        for (ours, bare, more) in CASES {
            let [ours_count, bare_count] = [ours, bare].map(|name| count(&format!("mmio::{width}::{name}")));
            println!("{width:<10} {ours:<16} {bare_count:>6} {ours_count:>6} {:>6}", bare_count + more);
            if ours_count > bare_count + more {
                worse.push(format!("{width} {ours}: {ours_count}, {} is held", bare_count + more));
            }
        }
    }
    assert!(worse.is_empty(), "more instructions than a volatile access: {worse:?}");
}

/// Instructions of a call.
fn count(function: &str) -> u64 {
    let out = env::temp_dir().join(format!("vfio-uring-mmio-{}", std::process::id()));
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "--collect-atstart=no", "-q"])
        .arg(format!("--toggle-collect={function}"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(env::current_exe().expect("this program"))
        .arg("--run")
        .status()
        .expect("valgrind starts");
    assert!(status.success(), "{function} failed under valgrind");
    let text = fs::read_to_string(&out).expect("callgrind wrote its file");
    let _ = fs::remove_file(&out);
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a line with totals");
    let total: u64 = totals.trim().parse().expect("a number");
    assert!(total >= 2 * CALLS, "{function} was not found, or is not what is called");
    total / CALLS
}
