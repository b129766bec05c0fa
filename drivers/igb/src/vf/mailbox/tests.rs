//! The mailbox against a physical function of a few lines.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::future::join;
use vfio_uring::reactor::Reactor;

use super::*;
use crate::spec::mailbox::{PFU, SET_LONGEST, SET_MAC, SET_VLAN};

const MAC: [u32; 2] = [0x0403_0202, 0x0605];

/// What the physical function does with a request.
#[derive(Debug, Clone)]
enum Act {
    /// Answers it as Linux does.
    Answer,
    /// Reads it, and writes these words.
    Say(Vec<u32>),
    /// Reads it, and no more.
    Read,
    /// Nothing.
    Nothing,
    /// Is reset.
    Reset,
    /// Takes the buffer, for ever.
    Keep,
}

#[derive(Default)]
struct State {
    control: u32,
    buffer: [u32; WORDS],
    acts: VecDeque<Act>,
    /// First words of what was asked.
    asked: Vec<Vec<u32>>,
    /// Messages of the physical function that were read.
    acknowledged: usize,
    gone: bool,
}

/// The registers; the physical function acts when they are written.
#[derive(Clone, Default)]
struct Fake(Rc<RefCell<State>>);

impl Fake {
    fn with(acts: impl IntoIterator<Item = Act>) -> Self {
        let state = State { acts: acts.into_iter().collect(), ..State::default() };
        Self(Rc::new(RefCell::new(state)))
    }

    /// The physical function says something by itself.
    fn say(&self, words: &[u32]) {
        let mut state = self.0.borrow_mut();
        state.buffer[..words.len()].copy_from_slice(words);
        state.control |= PFSTS;
    }

    fn set(&self, bits: u32) {
        self.0.borrow_mut().control |= bits;
    }

    fn asked(&self) -> Vec<Vec<u32>> {
        self.0.borrow().asked.clone()
    }

    fn act(&self) {
        let asked = self.0.borrow().buffer;
        self.0.borrow_mut().asked.push(asked[..ANSWER].to_vec());
        let act = self.0.borrow_mut().acts.pop_front().unwrap_or(Act::Answer);
        match act {
            Act::Answer if asked[0] == RESET => {
                self.set(PFACK);
                self.say(&[RESET | MESSAGE_ACK, MAC[0], MAC[1]]);
            }
            Act::Answer => {
                self.set(PFACK);
                self.say(&[asked[0] | CTS | MESSAGE_ACK]);
            }
            Act::Say(words) => {
                self.set(PFACK);
                self.say(&words);
            }
            Act::Read => self.set(PFACK),
            Act::Nothing => {}
            Act::Reset => self.set(RSTI),
            Act::Keep => self.set(PFU),
        }
    }
}

impl Registers for Fake {
    async fn read(&self, offset: u64) -> Result<u32> {
        let mut state = self.0.borrow_mut();
        if state.gone {
            return Ok(u32::MAX);
        }
        if offset == CONTROL {
            let value = state.control;
            state.control &= !CLEARED_BY_READ;
            return Ok(value);
        }
        assert!(state.control & VFU != 0, "the buffer is read by who has it");
        Ok(state.buffer[(offset - BUFFER) as usize / 4])
    }

    async fn write(&self, offset: u64, value: u32) -> Result<()> {
        let mut state = self.0.borrow_mut();
        if offset != CONTROL {
            assert!(state.control & VFU != 0, "the buffer is written by who has it");
            state.buffer[(offset - BUFFER) as usize / 4] = value;
            return Ok(());
        }
        match value {
            VFU if state.control & PFU == 0 => state.control |= VFU,
            VFU => {}
            _ => state.control &= !VFU,
        }
        state.acknowledged += usize::from(value & ACK != 0);
        drop(state);
        if value & REQ != 0 {
            self.act();
        }
        Ok(())
    }
}

const WITHIN: Duration = Duration::from_millis(100);

fn run(fake: &Fake, test: impl AsyncFnOnce(&Mailbox<Fake>)) {
    let mailbox = Mailbox::new(fake.clone(), WITHIN);
    Reactor::new().unwrap().block_on(async { test(&mailbox).await });
}

fn is_pf(error: &Error, words: &str) -> bool {
    matches!(error, Error::Pf(why) if why.contains(words))
}

#[test]
fn a_reset_gives_the_address() {
    let fake = Fake::default();
    run(&fake, async |mailbox| {
        mailbox.ready().await.unwrap();
        assert_eq!(mailbox.reset().await.unwrap(), Some([2, 2, 3, 4, 5, 6]));
        mailbox.look().await.unwrap();
    });
    assert_eq!(fake.0.borrow().acknowledged, 1);
    assert_eq!(fake.0.borrow().control & VFU, 0);
}

#[test]
fn there_may_be_no_address_and_no_good_one() {
    let none = [vec![RESET | MESSAGE_NACK], vec![RESET | MESSAGE_ACK, 0, 0]].map(Act::Say);
    run(&Fake::with(none), async |mailbox| {
        assert_eq!(mailbox.reset().await.unwrap(), None);
        assert_eq!(mailbox.reset().await.unwrap(), None);
    });
    let group = Act::Say(vec![RESET | MESSAGE_ACK, 0xffff_ffff, 0xffff]);
    run(&Fake::with([group]), async |mailbox| {
        assert!(is_pf(&mailbox.reset().await.unwrap_err(), "ff:ff:ff:ff:ff:ff"));
    });
}

#[test]
fn requests_are_granted_and_refused() {
    let fake = Fake::with([Act::Answer, Act::Say(vec![SET_MAC | CTS | MESSAGE_NACK])]);
    run(&fake, async |mailbox| {
        assert!(mailbox.request(&[SET_LONGEST, 1522]).await.unwrap());
        assert!(!mailbox.request(&[SET_MAC, 1, 2]).await.unwrap());
        // Two at once take turns.
        let both = join(mailbox.request(&[SET_VLAN, 1]), mailbox.request(&[SET_VLAN, 2])).await;
        assert!(both.0.unwrap() && both.1.unwrap());
    });
    let asked = fake.asked();
    assert_eq!(asked[..2], [vec![SET_LONGEST, 1522, 0], vec![SET_MAC, 1, 2]]);
    assert_eq!((asked[2][1], asked[3][1]), (1, 2));
}

#[test]
fn nobody_answers() {
    for (act, words) in [(Act::Nothing, "has not read"), (Act::Read, "has not answered"), (Act::Keep, "has not read")] {
        run(&Fake::with([act]), async |mailbox| {
            let start = Instant::now();
            assert!(is_pf(&mailbox.request(&[SET_VLAN]).await.unwrap_err(), words));
            assert!(start.elapsed() >= WITHIN);
        });
    }
    let kept = Fake::default();
    kept.set(PFU);
    run(&kept, async |mailbox| assert!(is_pf(&mailbox.reset().await.unwrap_err(), "kept the mailbox")));
    let gone = Fake::default();
    gone.0.borrow_mut().gone = true;
    run(&gone, async |mailbox| {
        assert!(matches!(mailbox.ready().await, Err(Error::Nic(_))));
        assert!(matches!(mailbox.reset().await, Err(Error::Nic(_))));
        assert!(matches!(mailbox.look().await, Err(Error::Nic(_))));
    });
}

#[test]
fn the_physical_function_is_reset() {
    let fake = Fake::with([Act::Reset]);
    run(&fake, async |mailbox| {
        assert!(matches!(mailbox.request(&[SET_VLAN]).await, Err(Error::PfReset)));
        assert!(matches!(mailbox.look().await, Err(Error::PfReset)));
        assert!(is_pf(&mailbox.ready().await.unwrap_err(), "has not come up"));
    });
    // It was, between two looks.
    let fake = Fake::default();
    run(&fake, async |mailbox| {
        fake.set(RSTD);
        mailbox.ready().await.unwrap();
        mailbox.look().await.unwrap();
        fake.set(RSTD);
        // What a read has cleared is not forgotten.
        assert!(mailbox.request(&[SET_VLAN]).await.unwrap());
        assert!(matches!(mailbox.look().await, Err(Error::PfReset)));
    });
}

#[test]
fn it_may_have_forgotten_this_function() {
    for answer in [SET_VLAN | MESSAGE_NACK, SET_VLAN | MESSAGE_ACK, MESSAGE_NACK, NOTICE] {
        run(&Fake::with([Act::Say(vec![answer])]), async |mailbox| {
            assert!(matches!(mailbox.request(&[SET_VLAN]).await, Err(Error::PfReset)), "{answer:#x}");
        });
    }
    for (message, good) in [
        (NOTICE, false),
        (MESSAGE_NACK, false),
        (SET_VLAN | MESSAGE_NACK, false),
        (NOTICE | CTS, true),
        (SET_VLAN | MESSAGE_ACK | CTS, true),
        (RESET | MESSAGE_NACK, true),
    ] {
        let fake = Fake::default();
        fake.say(&[message]);
        run(&fake, async |mailbox| assert_eq!(mailbox.look().await.is_ok(), good, "{message:#x}"));
        assert_eq!(fake.0.borrow().acknowledged, 1);
    }
}

#[test]
fn news_in_between_do_no_harm() {
    // Written over the request: it is sent again.
    let fake = Fake::with([Act::Say(vec![NOTICE | CTS]), Act::Say(vec![NOTICE | CTS]), Act::Answer]);
    run(&fake, async |mailbox| assert!(mailbox.request(&[SET_VLAN, 5]).await.unwrap()));
    assert_eq!(fake.asked(), vec![vec![SET_VLAN, 5, 0]; 3]);
    // A reset is not put off by what was before it.
    let fake = Fake::with([Act::Say(vec![NOTICE]), Act::Answer]);
    run(&fake, async |mailbox| assert!(mailbox.reset().await.unwrap().is_some()));
    // There is no end to them: but to our patience.
    let endless = Fake::with(vec![Act::Say(vec![NOTICE | CTS]); 100_000]);
    run(&endless, async |mailbox| assert!(is_pf(&mailbox.request(&[SET_VLAN]).await.unwrap_err(), "not answered")));
}

#[test]
fn answers_to_something_else_are_passed_over() {
    for nonsense in
        [SET_MAC | CTS | MESSAGE_ACK, SET_VLAN | CTS, SET_VLAN | CTS | MESSAGE_ACK | MESSAGE_NACK, 0xffff_fffe, 0]
    {
        let fake = Fake::with([Act::Say(vec![nonsense])]);
        run(&fake, async |mailbox| {
            assert!(is_pf(&mailbox.request(&[SET_VLAN]).await.unwrap_err(), "not answered"), "{nonsense:#x}");
            // The late answer to that is not taken for one to this.
            fake.say(&[SET_VLAN | CTS | MESSAGE_NACK]);
            assert!(mailbox.request(&[SET_VLAN]).await.unwrap());
        });
    }
}

#[test]
fn a_request_that_is_given_up_leaves_the_mailbox_in_order() {
    let fake = Fake::with([Act::Nothing]);
    run(&fake, async |mailbox| {
        let short = Duration::from_millis(5);
        assert!(vfio_uring::reactor::timeout(short, mailbox.request(&[SET_VLAN])).await.is_err());
        fake.say(&[SET_VLAN | CTS | MESSAGE_NACK]);
        mailbox.look().await.unwrap();
        assert!(mailbox.request(&[SET_LONGEST, 9]).await.unwrap());
    });
}
