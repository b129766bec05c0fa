//! Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
    iterator::Signals,
};

use crate::failure::{Failure, Result};

/// The exit status of a process that was interrupted.
pub const INTERRUPTED: u8 = 130;

/// Whether an end was asked for.
#[derive(Debug, Clone)]
pub struct Interrupted(Arc<AtomicBool>);

impl Interrupted {
    /// From now on signals are noted.
    pub fn watch() -> Result<Self> {
        let noted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the signal that sets the flag does not see it yet.
            flag::register_conditional_shutdown(signal, INTERRUPTED.into(), noted.clone())
                .and_then(|_| flag::register(signal, noted.clone()))
                .map_err(|error| Failure::new(format!("registering for Ctrl-C: {error}")))?;
        }
        Ok(Self(noted))
    }

    #[inline]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Calls `end`, from a thread of its own, when an end is asked for.
pub fn on_interrupt(end: impl Fn() + Send + 'static) -> Result<()> {
    let failed = |error| Failure::new(format!("waiting for Ctrl-C: {error}"));
    Interrupted::watch()?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let waiting = thread::Builder::new().name("signals".into()).spawn(move || signals.forever().for_each(|_| end()));
    waiting.map(drop).map_err(failed)
}
