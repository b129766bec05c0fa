//! The mailbox between a virtual function and the driver of its physical function: one buffer that both write, and a register that
//! says whose it is. The protocol is that of Linux's drivers (`drivers/net/ethernet/intel/igbvf/` and `igb/igb_main.c`).

use std::{
    cell::Cell,
    future::Future,
    time::{Duration, Instant},
};

use futures::lock::Mutex;
use vfio_uring::reactor::sleep;

use crate::{
    Error, Result,
    regs::Regs,
    spec::mailbox::{ACK, REQ},
    spec::mailbox::{
        BUFFER, CONTROL, CTS, MESSAGE_ACK, MESSAGE_NACK, NOTICE, PFACK, PFSTS, RESET, RSTD, RSTI, TYPE, VFU, WORDS,
    },
};

/// First and longest time between two looks at the register.
const FIRST_LOOK: Duration = Duration::from_micros(50);
const LONGEST_LOOK: Duration = Duration::from_millis(5);
/// Bits that a read of the register clears.
const CLEARED_BY_READ: u32 = PFSTS | PFACK | RSTD;
/// Words of an answer that are read: the longest has a MAC address.
const ANSWER: usize = 3;

/// The registers of a virtual function, or of a test.
pub(super) trait Registers {
    fn read(&self, offset: u64) -> impl Future<Output = Result<u32>>;
    fn write(&self, offset: u64, value: u32) -> impl Future<Output = Result<()>>;
}

impl Registers for Regs {
    async fn read(&self, offset: u64) -> Result<u32> {
        Self::read(self, offset).await
    }

    async fn write(&self, offset: u64, value: u32) -> Result<()> {
        Self::write(self, offset, value).await
    }
}

/// What a message of the physical function is for who sent a request.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    Granted,
    Refused,
    /// Its driver wants this function to be reset before it does anything else for it.
    Lost,
    /// News of its own, which may have been written over the request.
    Notice,
    /// An answer to what was asked before, or nonsense.
    Other,
}

impl Message {
    /// `kind` is the request's type.
    fn of(first: u32, kind: u32) -> Self {
        let (granted, refused) = (first & MESSAGE_ACK != 0, first & MESSAGE_NACK != 0);
        let clear_to_send = first & CTS != 0;
        match first & TYPE {
            NOTICE if clear_to_send || kind == RESET => Self::Notice,
            NOTICE => Self::Lost,
            // A refusal of nothing.
            0 if refused && !clear_to_send && kind != RESET => Self::Lost,
            answered if answered == kind && granted != refused => match granted {
                // The answer to a reset has no such bit.
                _ if !clear_to_send && kind != RESET => Self::Lost,
                true => Self::Granted,
                false => Self::Refused,
            },
            _ => Self::Other,
        }
    }

    /// Whether a message that nobody waits for says that this function is to be reset.
    fn is_farewell(first: u32) -> bool {
        let refused = first & MESSAGE_NACK != 0;
        first & CTS == 0 && (first & TYPE == NOTICE || refused && first & TYPE != RESET)
    }
}

/// The mailbox.
pub(super) struct Mailbox<R> {
    regs: R,
    /// How long the physical function may take for an answer.
    within: Duration,
    /// Bits that a read has cleared, and nobody has looked at.
    seen: Cell<u32>,
    /// One exchange at a time.
    turn: Mutex<()>,
}

impl<R: Registers> Mailbox<R> {
    pub(super) fn new(regs: R, within: Duration) -> Self {
        Self { regs, within, seen: Cell::new(0), turn: Mutex::new(()) }
    }

    /// Waits until the physical function is not being reset.
    pub(super) async fn ready(&self) -> Result<()> {
        let until = Instant::now() + self.within;
        let mut pause = Pause::new();
        while self.status().await? & RSTI != 0 {
            if Instant::now() >= until {
                return Err(Error::pf("has not come up: bring it up first (under Linux: ip link set NAME up)"));
            }
            pause.sleep().await;
        }
        self.take(RSTD);
        Ok(())
    }

    /// Reports that this function was reset; the physical function now lets it send and receive. The MAC address that it gives, if
    /// it gives one.
    pub(super) async fn reset(&self) -> Result<Option<[u8; 6]>> {
        let (granted, answer) = self.exchange(&[RESET]).await?;
        let ([a, b, c, d], [e, f, ..]) = (answer[1].to_le_bytes(), answer[2].to_le_bytes());
        let mac = [a, b, c, d, e, f];
        match granted {
            true if mac[0] & 1 != 0 => Err(Error::pf(format!(
                "gave the MAC address {}, which is a group's: set another one (under Linux: ip link set NAME vf N mac ADDRESS)",
                super::show(mac)
            ))),
            true if mac != [0; 6] => Ok(Some(mac)),
            // None was set by who administers the machine.
            _ => Ok(None),
        }
    }

    /// Asks for something: whether it was granted.
    pub(super) async fn request(&self, message: &[u32]) -> Result<bool> {
        Ok(self.exchange(message).await?.0)
    }

    /// Looks at what has come from the physical function by itself.
    ///
    /// # Errors
    /// [`Error::PfReset`] when this function is of no use until it is brought up again.
    pub(super) async fn look(&self) -> Result<()> {
        // Who has the mailbox looks by itself.
        let Some(_turn) = self.turn.try_lock() else { return Ok(()) };
        let status = self.status().await?;
        if status & (RSTI | RSTD) != 0 {
            return Err(Error::PfReset);
        }
        if status & PFSTS != 0 {
            let [first, ..] = self.receive(Instant::now() + self.within).await?;
            if Message::is_farewell(first) {
                return Err(Error::PfReset);
            }
            tracing::trace!(first = format_args!("{first:#x}"), "a message of the physical function");
        }
        Ok(())
    }

    async fn exchange(&self, message: &[u32]) -> Result<(bool, [u32; ANSWER])> {
        let _turn = self.turn.lock().await;
        let until = Instant::now() + self.within;
        let kind = message.first().copied().unwrap_or_default() & TYPE;
        self.send(message, until).await?;
        let (mut pause, mut read) = (Pause::new(), false);
        loop {
            pause.sleep().await;
            let status = self.status().await?;
            read |= status & PFACK != 0;
            if status & RSTI != 0 {
                return Err(Error::PfReset);
            }
            if status & PFSTS != 0 {
                let answer = self.receive(until).await?;
                match Message::of(answer[0], kind) {
                    Message::Granted => return Ok((true, answer)),
                    Message::Refused => return Ok((false, answer)),
                    Message::Lost => return Err(Error::PfReset),
                    Message::Notice => self.send(message, until).await?,
                    Message::Other => {
                        tracing::debug!(kind, first = format_args!("{:#x}", answer[0]), "an answer to something else");
                    }
                }
            }
            if Instant::now() >= until {
                let what = if read { "has read a message but has not answered it" } else { "has not read a message" };
                let within = self.within;
                return Err(Error::pf(format!("{what} within {within:?}: is a driver bound to it, and its interface up?")));
            }
        }
    }

    /// Puts a message into the buffer, and says so.
    async fn send(&self, message: &[u32], until: Instant) -> Result<()> {
        self.own(until).await?;
        // What is in the buffer is written over.
        self.take(PFSTS | PFACK);
        for (at, word) in (BUFFER..).step_by(4).zip(message.iter().take(WORDS)) {
            self.regs.write(at, *word).await?;
        }
        // This gives the buffer up, too.
        self.regs.write(CONTROL, REQ).await
    }

    /// Reads the message that is in the buffer, once, and says so.
    async fn receive(&self, until: Instant) -> Result<[u32; ANSWER]> {
        self.own(until).await?;
        self.take(PFSTS);
        let mut words = [0; ANSWER];
        for (at, word) in (BUFFER..).step_by(4).zip(&mut words) {
            *word = self.regs.read(at).await?;
        }
        self.regs.write(CONTROL, ACK).await?;
        Ok(words)
    }

    /// Takes the buffer. It is held for as long as a few registers take: the physical function does not wait long for it.
    async fn own(&self, until: Instant) -> Result<()> {
        let mut pause = Pause::new();
        loop {
            self.regs.write(CONTROL, VFU).await?;
            let status = self.status().await?;
            if status & VFU != 0 {
                return Ok(());
            }
            if status & RSTI != 0 {
                return Err(Error::PfReset);
            }
            if Instant::now() >= until {
                let within = self.within;
                return Err(Error::pf(format!("has kept the mailbox for {within:?}: is its driver alive?")));
            }
            pause.sleep().await;
        }
    }

    /// The register, with the bits that earlier reads have cleared.
    async fn status(&self) -> Result<u32> {
        let value = self.regs.read(CONTROL).await?;
        if value == u32::MAX {
            return Err(Error::nic("reads as all ones: it is gone, or its memory space is disabled"));
        }
        let all = value | self.seen.get();
        self.seen.set(all & CLEARED_BY_READ);
        Ok(all)
    }

    /// These bits have been looked at.
    fn take(&self, bits: u32) {
        self.seen.set(self.seen.get() & !bits);
    }
}

/// The pauses between looks, longer and longer.
struct Pause(Duration);

impl Pause {
    fn new() -> Self {
        Self(FIRST_LOOK)
    }

    async fn sleep(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(LONGEST_LOOK);
    }
}

#[cfg(test)]
mod tests;
