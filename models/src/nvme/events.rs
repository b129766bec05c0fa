//! Asynchronous events (section 5.2).

use std::collections::VecDeque;

use super::{
    Controller,
    spec::{Completion, Status},
};

/// Asynchronous Event Request commands that are kept at most (AERL + 1).
pub(super) const LIMIT: usize = 4;
/// Events that wait for a request at most.
const MAX_WAITING: usize = 8;
/// The log page that tells more about an error event, and whose reading unmasks the next.
const ERROR_LOG: u32 = 1;

/// Events of the type "error status", by their information code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ErrorEvent {
    /// Invalid Doorbell Write Value.
    InvalidDoorbell = 1,
}

/// Requests that wait for events, and events that wait for requests.
#[derive(Debug, Default)]
pub(super) struct Events {
    requests: VecDeque<u16>,
    waiting: VecDeque<ErrorEvent>,
    /// An error event was reported, and its log page was not read since.
    masked: bool,
}

impl Events {
    /// Keeps an event until a request takes it; too many are dropped.
    pub fn add(&mut self, event: ErrorEvent) {
        if self.waiting.len() < MAX_WAITING && !self.waiting.contains(&event) {
            self.waiting.push_back(event);
        }
    }

    /// Keeps a request.
    pub fn request(&mut self, cid: u16) -> Result<(), Status> {
        if self.requests.len() == LIMIT {
            return Err(Status::ASYNC_EVENT_LIMIT);
        }
        self.requests.push_back(cid);
        Ok(())
    }

    /// Takes a request back.
    pub fn abort(&mut self, cid: u16) -> bool {
        let at = self.requests.iter().position(|&request| request == cid);
        at.and_then(|at| self.requests.remove(at)).is_some()
    }

    /// The error log was read: the next error event may be reported.
    pub fn unmask(&mut self) {
        self.masked = false;
    }

    /// The next request to complete, with its result.
    fn next(&mut self) -> Option<(u16, u32)> {
        if self.masked || self.waiting.is_empty() {
            return None;
        }
        let cid = self.requests.pop_front()?;
        let event = self.waiting.pop_front()?;
        self.masked = true;
        Some((cid, ERROR_LOG << 16 | (event as u32) << 8))
    }
}

impl Controller {
    /// The completion of an event that has met a request.
    pub(super) fn event_completion(&mut self) -> Option<Completion> {
        let (cid, result) = self.events.next()?;
        Some(self.admin_completion(cid, result, Status::SUCCESS))
    }
}
