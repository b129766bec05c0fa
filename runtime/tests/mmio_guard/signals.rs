//! Handlers of others, before ours and after, and signals that end a process as they should.

use std::{
    mem::MaybeUninit,
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
    thread,
};

use libc::{SIG_DFL, SIG_IGN, SIGBUS, c_int, c_void, sigaction, siginfo_t};
use rustix::mm;

use crate::common::{End, File, PAGE, at_the_end, foreign, in_child, touch};

/// Calls of a handler below, the address it was last called for, and one of its locals.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static ADDRESS: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static LOCAL: AtomicUsize = AtomicUsize::new(0);
/// A page that a handler puts memory at.
static PLACE: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
static BEFORE: AtomicUsize = AtomicUsize::new(SIG_DFL);

fn repair() {
    let at = PLACE.load(Ordering::Relaxed);
    if !at.is_null() {
        let prot = mm::ProtFlags::READ | mm::ProtFlags::WRITE;
        let flags = mm::MapFlags::PRIVATE | mm::MapFlags::FIXED;
        // SAFETY: over a page that the test mapped for this.
        unsafe { mm::mmap_anonymous(at.cast(), PAGE as usize, prot, flags) }.unwrap();
    }
}

extern "C" fn with_info(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    assert!(signal == SIGBUS && !info.is_null() && !context.is_null());
    let local = 0u8;
    LOCAL.store(&raw const local as usize, Ordering::Relaxed);
    // SAFETY: of a signal that has an address, or is not looked at.
    ADDRESS.store(unsafe { (*info).si_addr() }, Ordering::Relaxed);
    CALLS.fetch_add(1, Ordering::Relaxed);
    repair();
}

extern "C" fn plain(signal: c_int) {
    assert_eq!(signal, SIGBUS);
    CALLS.fetch_add(1, Ordering::Relaxed);
    repair();
}

/// Handles its own page, and passes on all else.
extern "C" fn polite(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: of a fault.
    if unsafe { (*info).si_addr() }.cast() == PLACE.load(Ordering::Relaxed) {
        return with_info(signal, info, context);
    }
    // SAFETY: what was there before, which was installed with SA_SIGINFO.
    let before: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
        unsafe { std::mem::transmute(BEFORE.load(Ordering::Relaxed)) };
    before(signal, info, context);
}

fn install(handler: usize, flags: c_int) -> sigaction {
    // SAFETY: zeros are an action, as is what is put there.
    unsafe {
        let mut new: sigaction = MaybeUninit::zeroed().assume_init();
        let mut old: sigaction = MaybeUninit::zeroed().assume_init();
        (new.sa_sigaction, new.sa_flags) = (handler, flags);
        assert_eq!(libc::sigaction(SIGBUS, &new, &mut old), 0);
        old
    }
}

/// An access of ours that faults and is survived.
fn ours() {
    let file = File::new(1);
    let memory = file.map(1);
    file.set_len(0);
    assert!(memory.load_u64(16).is_err());
    assert!(memory.store_u32(16, 1).is_err());
    assert_eq!(memory.take_faults().unwrap().count, 2);
}

/// A fault of somebody else, whose handler puts memory there.
fn theirs() -> *mut c_void {
    let (_file, at) = foreign();
    PLACE.store(at, Ordering::Relaxed);
    assert_eq!(touch(at), 0);
    at.cast()
}

fn raise() {
    // SAFETY: sends a signal.
    assert_eq!(unsafe { libc::raise(SIGBUS) }, 0);
}

#[test]
fn a_handler_with_info_before_ours_gets_its_own() {
    let end = in_child("signals::a_handler_with_info_before_ours_gets_its_own", || {
        install(with_info as *const () as usize, libc::SA_SIGINFO | libc::SA_RESTART);
        ours();
        assert_eq!(CALLS.load(Ordering::Relaxed), 0);
        for calls in 1..4 {
            let at = theirs();
            assert_eq!((CALLS.load(Ordering::Relaxed), ADDRESS.load(Ordering::Relaxed)), (calls, at));
            ours();
        }
        raise();
        assert_eq!(CALLS.load(Ordering::Relaxed), 4);
    });
    assert_eq!(end, End::Good);
}

#[test]
fn a_plain_handler_before_ours_gets_its_own() {
    let end = in_child("signals::a_plain_handler_before_ours_gets_its_own", || {
        install(plain as *const () as usize, 0);
        ours();
        theirs();
        ours();
        raise();
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
    });
    assert_eq!(end, End::Good);
}

#[test]
fn a_handler_after_ours_passes_on() {
    let end = in_child("signals::a_handler_after_ours_passes_on", || {
        ours();
        let before = install(polite as *const () as usize, libc::SA_SIGINFO | libc::SA_ONSTACK);
        assert!(before.sa_flags & libc::SA_SIGINFO != 0);
        BEFORE.store(before.sa_sigaction, Ordering::Relaxed);
        for calls in 1..4 {
            ours();
            let at = theirs();
            assert_eq!((CALLS.load(Ordering::Relaxed), ADDRESS.load(Ordering::Relaxed)), (calls, at));
        }
        ours();
        // One that is nobody's.
        at_the_end();
        touch(foreign().1);
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn handlers_on_both_sides_of_ours() {
    let end = in_child("signals::handlers_on_both_sides_of_ours", || {
        install(plain as *const () as usize, libc::SA_NODEFER);
        ours();
        let before = install(polite as *const () as usize, libc::SA_SIGINFO);
        BEFORE.store(before.sa_sigaction, Ordering::Relaxed);
        ours();
        theirs();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        ours();
        // To the last of the three.
        raise();
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
    });
    assert_eq!(end, End::Good);
}

#[test]
fn a_handler_for_one_signal_is_called_once() {
    let end = in_child("signals::a_handler_for_one_signal_is_called_once", || {
        install(with_info as *const () as usize, libc::SA_SIGINFO | libc::SA_RESETHAND);
        ours();
        theirs();
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        ours();
        at_the_end();
        theirs();
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn a_foreign_fault_kills_under_the_standard_librarys_handler() {
    let end = in_child("signals::a_foreign_fault_kills_under_the_standard_librarys_handler", || {
        ours();
        at_the_end();
        touch(foreign().1);
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn a_foreign_fault_kills_by_default() {
    let end = in_child("signals::a_foreign_fault_kills_by_default", || {
        install(SIG_DFL, 0);
        ours();
        at_the_end();
        touch(foreign().1);
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn a_signal_that_is_sent_kills_by_default() {
    let end = in_child("signals::a_signal_that_is_sent_kills_by_default", || {
        install(SIG_DFL, 0);
        ours();
        at_the_end();
        raise();
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn a_signal_that_is_ignored_stays_so_and_a_fault_does_not() {
    let end = in_child("signals::a_signal_that_is_ignored_stays_so_and_a_fault_does_not", || {
        install(SIG_IGN, 0);
        ours();
        raise();
        ours();
        at_the_end();
        touch(foreign().1);
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn a_copy_whose_other_side_is_not_guarded_is_not_ours() {
    let end = in_child("signals::a_copy_whose_other_side_is_not_guarded_is_not_ours", || {
        let memory = File::new(1).map(1);
        // SAFETY: mapped; that it is not there is what is tested.
        let bytes = unsafe { std::slice::from_raw_parts(foreign().1, 64) };
        at_the_end();
        let _ = memory.write(0, bytes);
    });
    assert_eq!(end, End::Killed(SIGBUS));
}

#[test]
fn a_blocked_signal_kills() {
    let end = in_child("signals::a_blocked_signal_kills", || {
        let file = File::new(1);
        let memory = file.map(1);
        file.set_len(0);
        // SAFETY: a set of signals, of which one is blocked in this thread.
        unsafe {
            let mut set = MaybeUninit::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), SIGBUS);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
        }
        at_the_end();
        let _ = memory.load_u32(0);
    });
    assert_eq!(end, End::Killed(SIGBUS), "as the documentation of mmio says");
}

#[test]
fn errno_is_kept() {
    let file = File::new(1);
    let memory = file.map(1);
    file.set_len(0);
    // SAFETY: errno of this thread.
    let errno = unsafe { &mut *libc::__errno_location() };
    for value in [0, 1234] {
        *errno = value;
        let gone = memory.load_u32(0).is_err();
        assert!(gone && *errno == value);
    }
}

#[test]
fn alternate_stacks() {
    let end = in_child("signals::alternate_stacks", || {
        install(with_info as *const () as usize, libc::SA_SIGINFO);
        ours();
        let stack = vec![0u8; 64 << 10];
        let range = stack.as_ptr_range();
        let range = range.start as usize..range.end as usize;
        thread::scope(|scope| {
            scope.spawn(move || {
                let new = libc::stack_t { ss_sp: range.start as *mut c_void, ss_flags: 0, ss_size: range.len() };
                let mut old: MaybeUninit<libc::stack_t> = MaybeUninit::zeroed();
                // SAFETY: the stack outlives its use.
                assert_eq!(unsafe { libc::sigaltstack(&new, old.as_mut_ptr()) }, 0);
                ours();
                theirs();
                assert!(range.contains(&LOCAL.load(Ordering::Relaxed)), "the handler is on the stack it was given");
                // Without one.
                let none = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
                // SAFETY: no signal is being handled.
                assert_eq!(unsafe { libc::sigaltstack(&none, ptr::null_mut()) }, 0);
                ours();
                theirs();
                assert!(!range.contains(&LOCAL.load(Ordering::Relaxed)));
                // SAFETY: what was there before, which the thread's end takes away.
                assert_eq!(unsafe { libc::sigaltstack(old.as_ptr(), ptr::null_mut()) }, 0);
            });
        });
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
    });
    assert_eq!(end, End::Good);
}
