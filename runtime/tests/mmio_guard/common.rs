//! Files that shrink and grow, and children.

use std::{
    io::Read,
    os::{fd::OwnedFd, unix::process::ExitStatusExt},
    process::{Command, Stdio, exit},
    ptr,
    time::{Duration, Instant},
};

use rustix::{fs, mm, process};
use vfio_uring::dma::SharedMemory;

pub const PAGE: u64 = 4096;
const CASE: &str = "VFIO_URING_GUARD_CASE";
const DEADLINE: Duration = Duration::from_secs(30);

/// A memfd that is not sealed, in pages.
pub struct File(pub OwnedFd);

impl File {
    pub fn new(pages: u64) -> Self {
        let file = Self(fs::memfd_create("vanishing", fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages);
        file
    }

    pub fn set_len(&self, pages: u64) {
        fs::ftruncate(&self.0, pages * PAGE).unwrap();
    }

    pub fn map(&self, pages: u64) -> SharedMemory {
        SharedMemory::map(&self.0, 0, (pages * PAGE) as usize, true).unwrap()
    }

    /// A page of it that nobody guards.
    pub fn map_foreign(&self) -> *mut u8 {
        let prot = mm::ProtFlags::READ | mm::ProtFlags::WRITE;
        // SAFETY: a new mapping aliases nothing.
        unsafe { mm::mmap(ptr::null_mut(), PAGE as usize, prot, mm::MapFlags::SHARED, &self.0, 0) }.unwrap().cast()
    }
}

/// A page that is mapped, not there, and not guarded.
pub fn foreign() -> (File, *mut u8) {
    let file = File::new(1);
    let at = file.map_foreign();
    file.set_len(0);
    (file, at)
}

/// An access that is none of the library's.
pub fn touch(at: *mut u8) -> u8 {
    // SAFETY: it is mapped; whether it is there is what is tested.
    unsafe { at.read_volatile() }
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Good,
    Failed(i32),
    /// By this signal, and after [`at_the_end`] was called.
    Killed(i32),
    KilledEarly(i32),
}

const AT_THE_END: &str = "at the end";

/// What a child says before the access that is to end it.
pub fn at_the_end() {
    println!("{AT_THE_END}");
}

/// Runs `case` in a process of its own, which is this test run again. `test` is the path of the test.
pub fn in_child(test: &str, case: impl FnOnce()) -> End {
    if std::env::var(CASE).is_ok_and(|name| name == test) {
        let none = process::Rlimit { current: Some(0), maximum: Some(0) };
        process::setrlimit(process::Resource::Core, none).unwrap();
        case();
        exit(0);
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let child = child.args([test, "--exact", "--nocapture", "--test-threads=1"]).env(CASE, test);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > until {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("the child hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    match (status.code(), status.signal().unwrap_or(0)) {
        (Some(0), _) => End::Good,
        (Some(code), _) => End::Failed(code),
        (None, signal) if said.contains(AT_THE_END) => End::Killed(signal),
        (None, signal) => End::KilledEarly(signal),
    }
}
