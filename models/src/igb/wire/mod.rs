//! What a NIC's cable leads to.

mod frame;
mod generator;
mod pcap;
mod peer;
mod tap;

use std::{io, path::Path, time::Duration};

pub(super) use self::frame::Frame;
pub use self::{generator::Generator, pcap::Pcap, peer::Peer, tap::Tap};
use super::{Cause, Handle, config::invalid, spec::MAX_FRAME};
use crate::device::Rest;

/// Frames that are kept for their memory.
const SPARE: usize = 64;
/// Bytes of the shortest frame, without CRC.
pub(super) const MIN_FRAME: usize = 60;

/// What a NIC's cable leads to.
#[derive(Debug)]
pub enum Wire {
    /// Nothing: there is no link.
    Unplugged,
    /// Something that takes and counts all packets and sends none.
    Sink,
    /// Something that sends packets as fast as they are taken, and takes all.
    Generator(Generator),
    /// Another software NIC of this process.
    Peer(Peer),
    /// Files: packets are read from one and written to another.
    Pcap(Pcap),
    /// A TAP interface of this system.
    Tap(Tap),
}

impl Wire {
    /// Two ends of a cable that has `frames` frames on it at most in each direction, 1 to 65536.
    ///
    /// # Errors
    /// Another number, or no eventfd to be had.
    pub fn peers(frames: usize) -> io::Result<(Self, Self)> {
        let (one, other) = Peer::pair(frames)?;
        Ok((Self::Peer(one), Self::Peer(other)))
    }

    /// `count` packets (0: without end) of `size` bytes without CRC, 60 to 9724: UDP over IPv4 to the NIC's address, in `flows`
    /// flows by their ports, 1 to 4096, one after the other.
    ///
    /// # Errors
    /// Other numbers.
    pub fn generator(size: usize, flows: usize, count: u64) -> io::Result<Self> {
        Generator::new(size, flows, count).map(Self::Generator)
    }

    /// Reads packets from a pcap file, and writes what is sent to another, which is made anew. Without a file to read nothing is
    /// received, without one to write what is sent is counted only.
    ///
    /// # Errors
    /// A file that can't be opened or made, or is not a pcap file of Ethernet frames.
    pub fn pcap(read: Option<&Path>, write: Option<&Path>) -> io::Result<Self> {
        Pcap::open(read, write).map(Self::Pcap)
    }

    /// A TAP interface, which is made if it does not exist.
    ///
    /// # Errors
    /// No such name possible, or no permission (`CAP_NET_ADMIN`, or an interface that belongs to the user).
    pub fn tap(name: &str) -> io::Result<Self> {
        Tap::open(name).map(Self::Tap)
    }
}

/// Where a frame that is to be sent goes.
#[derive(Debug)]
pub(super) enum Room {
    /// Into this memory, to be given to [`Port::send`] or [`Port::cancel`].
    Frame(Frame),
    /// There is none now; the sender waits.
    Wait,
    /// Nowhere.
    Drop(Cause),
}

/// A wire, and memory for the frames of those that have none of their own.
#[derive(Debug)]
pub(super) struct Port {
    wire: Wire,
    spare: Vec<Frame>,
}

impl Port {
    pub fn new(mut wire: Wire, mac: [u8; 6], cable: &Handle) -> Self {
        match &mut wire {
            Wire::Generator(generator) => generator.prepare(mac),
            Wire::Peer(peer) => peer.attach(cable.clone()),
            _ => {}
        }
        Self { wire, spare: Vec::with_capacity(SPARE) }
    }

    /// Tells the other end whether our side of the link is up; gives whether all of it is.
    pub fn link(&self, up: bool) -> bool {
        match &self.wire {
            Wire::Unplugged => false,
            Wire::Peer(peer) => peer.link(up),
            _ => up,
        }
    }

    /// Tells the other end whether we receive, and whether it is to pause while we can't.
    pub fn listen(&self, open: bool, pause: bool) {
        if let Wire::Peer(peer) = &self.wire {
            peer.listen(open, pause);
        }
    }

    /// Packets that the other end had to drop because we took none, since the last question.
    pub fn missed(&self) -> u64 {
        if let Wire::Peer(peer) = &self.wire { peer.missed() } else { 0 }
    }

    fn spare(&mut self) -> Frame {
        let mut frame = self.spare.pop().unwrap_or_else(|| Frame::new(MAX_FRAME));
        frame.clear();
        frame
    }

    fn keep(&mut self, frame: Frame) {
        if self.spare.len() < SPARE {
            self.spare.push(frame);
        }
    }

    /// The next frame that has arrived; it is to be given back by [`Port::done`].
    #[inline]
    pub fn receive(&mut self) -> Option<Frame> {
        match &mut self.wire {
            Wire::Unplugged | Wire::Sink => None,
            Wire::Generator(generator) => generator.receive(),
            Wire::Peer(peer) => peer.receive(),
            Wire::Pcap(pcap) if !pcap.has_more() => None,
            Wire::Pcap(_) | Wire::Tap(_) => self.read(),
        }
    }

    fn read(&mut self) -> Option<Frame> {
        let mut frame = self.spare();
        let read = match &mut self.wire {
            Wire::Pcap(pcap) => pcap.read(&mut frame),
            Wire::Tap(tap) => tap.read(&mut frame),
            _ => false,
        };
        if !read {
            self.keep(frame);
            return None;
        }
        // What others sent has been padded on its way.
        frame.pad(MIN_FRAME);
        Some(frame)
    }

    /// A frame that has arrived and that nobody will take any more.
    pub fn stale(&mut self) -> Option<Frame> {
        if let Wire::Peer(peer) = &mut self.wire { peer.receive() } else { None }
    }

    /// A frame from [`Port::receive`] is no longer needed.
    #[inline]
    pub fn done(&mut self, frame: Frame) {
        match &mut self.wire {
            Wire::Peer(peer) => peer.done(frame),
            Wire::Generator(generator) => generator.done(frame),
            _ => self.keep(frame),
        }
    }

    /// Memory for a frame that is to be sent. `pause`: wait for a receiver that asks for it.
    #[inline]
    pub fn room(&mut self, pause: bool) -> Room {
        match &mut self.wire {
            Wire::Unplugged => Room::Drop(Cause::NoReceiver),
            Wire::Peer(peer) => peer.room(pause),
            _ => Room::Frame(self.spare()),
        }
    }

    /// Sends a frame whose memory came from [`Port::room`].
    #[inline]
    pub fn send(&mut self, frame: Frame) -> Result<(), Cause> {
        let sent = match &mut self.wire {
            Wire::Peer(peer) => return peer.send(frame),
            Wire::Pcap(pcap) => pcap.write(frame.bytes()),
            Wire::Tap(tap) => tap.write(frame.bytes()),
            Wire::Unplugged => Err(Cause::NoReceiver),
            Wire::Sink | Wire::Generator(_) => Ok(()),
        };
        self.keep(frame);
        sent
    }

    /// Gives back memory from [`Port::room`] that is not sent.
    pub fn cancel(&mut self, frame: Frame) {
        match &mut self.wire {
            Wire::Peer(peer) => peer.cancel(frame),
            _ => self.keep(frame),
        }
    }

    /// Packets were sent or taken: the other end may want to know.
    #[inline]
    pub fn flush(&mut self) {
        if let Wire::Peer(peer) = &mut self.wire {
            peer.flush();
        }
    }

    /// What a server that has nothing to do is to wait for. `receiving`: packets that arrive can be taken.
    pub fn rest(&mut self, receiving: bool) -> Rest<'_> {
        match &mut self.wire {
            Wire::Peer(peer) => peer.rest(receiving),
            Wire::Tap(tap) if receiving => Rest { fd: Some(tap.fd()), ..Rest::default() },
            Wire::Pcap(pcap) => {
                pcap.flush();
                Rest::default()
            }
            Wire::Generator(generator) if receiving && generator.has_more() => {
                Rest { at_most: Some(Duration::ZERO), ..Rest::default() }
            }
            _ => Rest::default(),
        }
    }
}

/// Whether a number is in a range, or what to say.
fn within(what: &str, value: u64, range: std::ops::RangeInclusive<u64>) -> io::Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(invalid(format!("{what} {value} where {} to {} are possible", range.start(), range.end())))
}
