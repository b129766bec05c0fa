//! What the tests on devices of the kernel have in common.

use std::{
    env, panic,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use rustix::{
    process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

/// A page of memory that may be mapped.
#[repr(C, align(4096))]
pub struct Page(pub [u8; PAGE as usize]);

pub const PAGE: u64 = 4096;
/// Interrupt messages of x86, which no memory is mapped over.
pub const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// An ordinary user.
pub const USER: u32 = 1000;

/// `pages` zeroed pages.
pub fn memory(pages: u64) -> Vec<Page> {
    (0..pages).map(|_| Page([0; PAGE as usize])).collect()
}

/// The device that the variable names, and the turn of the test that has it.
pub fn named(variable: &str) -> Option<(String, MutexGuard<'static, ()>)> {
    static TURN: Mutex<()> = Mutex::new(());
    let Ok(bdf) = env::var(variable) else {
        eprintln!("skipped: {variable} is not set");
        return None;
    };
    Some((bdf, TURN.lock().unwrap_or_else(PoisonError::into_inner)))
}

/// Runs on a thread that belongs to the user: ids and capabilities are a thread's own, limits the process's.
pub fn as_user<T: Send>(memlock: u64, body: impl FnOnce() -> T + Send) -> T {
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(memlock), maximum: before.maximum }).unwrap();
    let result = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // /dev/iommu is open to root's group.
            set_thread_groups(&[]).unwrap();
            set_thread_gid(Gid::from_raw(USER)).unwrap();
            set_thread_uid(Uid::from_raw(USER)).unwrap();
            body()
        });
        thread.join()
    });
    setrlimit(Resource::Memlock, before).unwrap();
    result.unwrap_or_else(|panic| panic::resume_unwind(panic))
}
