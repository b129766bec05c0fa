//! The SIGBUS handler.
//!
//! It takes no lock, allocates nothing and keeps errno. A fault is ours when an instruction of the fixup table found no memory at an
//! address of a guarded mapping; every other signal goes to who was there before.

use std::{
    ffi::{c_int, c_void},
    io,
    mem::MaybeUninit,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicPtr, Ordering},
    },
};

use libc::{sigaction, siginfo_t, ucontext_t};

use super::{fixup, guard};
use crate::{Error, Result};

/// What SIGBUS did before; null: the default action.
static BEFORE: AtomicPtr<sigaction> = AtomicPtr::new(ptr::null_mut());

/// Installs the handler, once in a process.
pub(super) fn install() -> Result<()> {
    static INSTALLED: OnceLock<Result<()>> = OnceLock::new();
    let install = || replace().map_err(|error| Error::io("installing a handler of SIGBUS", error));
    INSTALLED.get_or_init(install).clone()
}

fn replace() -> io::Result<()> {
    // Known before ours is there: a signal may come at once.
    let before = exchange(None)?;
    publish(before);
    let mut ours = before;
    ours.sa_sigaction = on_sigbus as *const () as usize;
    // The mask of the handler before, so that it finds the signals blocked that it asked for.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | before.sa_flags & (libc::SA_NODEFER | libc::SA_RESTART);
    let replaced = exchange(Some(&ours))?;
    if replaced.sa_sigaction != before.sa_sigaction {
        publish(replaced);
    }
    Ok(())
}

fn exchange(new: Option<&sigaction>) -> io::Result<sigaction> {
    let mut old = MaybeUninit::zeroed();
    // SAFETY: `new` is an action or null, `old` has room for one.
    match unsafe { sigaction_of(new, old.as_mut_ptr()) } {
        // SAFETY: zeros are an action, and so is what the call left.
        0 => Ok(unsafe { old.assume_init() }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// # Safety
/// As of `sigaction`.
unsafe fn sigaction_of(new: Option<&sigaction>, old: *mut sigaction) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { libc::sigaction(libc::SIGBUS, new.map_or(ptr::null(), ptr::from_ref), old) }
}

/// Never freed: a handler may be looking at it.
fn publish(before: sigaction) {
    BEFORE.store(Box::into_raw(Box::new(before)), Ordering::Release);
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: errno of this thread.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the kernel gives a handler with SA_SIGINFO both, and they are its own until it returns.
    let (info_ref, machine) = unsafe { (&*info, &mut *context.cast::<ucontext_t>()) };
    if !fix(info_ref, machine) {
        // SAFETY: what the kernel gave goes on.
        unsafe { pass_on(signal, info, context) };
    }
    // SAFETY: errno of this thread, which is the same.
    unsafe { *errno = saved };
}

/// Goes on after an access of ours.
fn fix(info: &siginfo_t, machine: &mut ucontext_t) -> bool {
    if info.si_code != libc::BUS_ADRERR {
        return false;
    }
    let registers = &mut machine.uc_mcontext.gregs;
    let Some(entry) = fixup::find(registers[libc::REG_RIP as usize] as usize) else { return false };
    // SAFETY: a fault has an address.
    if !guard::latch(unsafe { info.si_addr() } as usize) {
        return false;
    }
    if let Some(register) = registers.get_mut(usize::from(entry.ones)) {
        *register = -1;
    }
    if let Some(register) = registers.get_mut(usize::from(entry.mark)) {
        *register = 1;
    }
    registers[libc::REG_RIP as usize] = entry.next() as i64;
    true
}

/// Does what would be done without us.
///
/// # Safety
/// The arguments of a handler with SA_SIGINFO.
unsafe fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let published = BEFORE.load(Ordering::Acquire);
    // SAFETY: never freed, and not written any more.
    let Some(before) = (unsafe { published.as_ref() }) else {
        // SAFETY: the caller's promise.
        return unsafe { default_action(false, info) };
    };
    match before.sa_sigaction {
        // SAFETY: the caller's promise.
        libc::SIG_DFL | libc::SIG_IGN => unsafe { default_action(before.sa_sigaction == libc::SIG_IGN, info) },
        handler => {
            if before.sa_flags & libc::SA_RESETHAND != 0 {
                let _ = BEFORE.compare_exchange(published, ptr::null_mut(), Ordering::AcqRel, Ordering::Relaxed);
            }
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: it was installed as a function of this form.
                let handler =
                    unsafe { std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(handler) };
                handler(signal, info, context);
            } else {
                // SAFETY: as above.
                let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
                handler(signal);
            }
        }
    }
}

/// The default action, or none for a signal that is ignored. The kernel ignores no fault.
///
/// # Safety
/// `info` is what the kernel gave.
unsafe fn default_action(ignored: bool, info: *mut siginfo_t) {
    // SAFETY: the caller's promise.
    let code = unsafe { (*info).si_code };
    // After these the instruction runs again.
    let is_fault = matches!(code, libc::BUS_ADRALN | libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR);
    if ignored && !is_fault {
        return;
    }
    // SAFETY: zeros are the default action, with no flags and an empty mask.
    let default = unsafe { MaybeUninit::<sigaction>::zeroed().assume_init() };
    let _ = exchange(Some(&default));
    // The fault comes again, in the place where it belongs. Anything else has to be sent again; it waits until we return.
    if !is_fault {
        // SAFETY: sends a signal to this thread, with what came with it.
        unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), libc::gettid(), libc::SIGBUS, info) };
    }
}
