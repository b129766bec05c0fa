//! Page requests become groups.

use super::{Fault, PageRequest};
use crate::{Error, Result};

/// What tells groups of a device apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupKey {
    /// The process address space, if the requests have one.
    pub pasid: Option<u32>,
    /// The page request group index.
    pub index: u32,
}

/// A group that ended: its requests, or `None` when it was too long.
pub type Ended = (GroupKey, Option<Vec<Fault>>);

#[derive(Debug)]
struct Open {
    key: GroupKey,
    /// `None`: there were too many.
    faults: Option<Vec<Fault>>,
}

/// The groups whose last request did not come yet.
#[derive(Debug)]
pub struct Assembly {
    open: Vec<Open>,
    max_open: usize,
    max_requests: usize,
}

impl Assembly {
    /// At most `max_open` groups at a time, with at most `max_requests` requests each.
    pub fn new(max_open: usize, max_requests: usize) -> Self {
        Self { open: Vec::new(), max_open, max_requests }
    }

    /// Takes a request; the group when it is the last of it.
    ///
    /// # Errors
    /// [`Error::DeviceFault`] when too many groups are open: a device has its credits for page requests, and these are beyond any.
    pub fn add(&mut self, request: PageRequest, last: bool) -> Result<Option<Ended>> {
        let key = GroupKey { pasid: request.pasid, index: request.group_index };
        let at = self.open.iter().position(|open| open.key == key);
        let at = match at {
            Some(at) => at,
            None if last && self.max_requests != 0 => return Ok(Some((key, Some(vec![Fault::PageRequest(request)])))),
            None if self.open.len() >= self.max_open => {
                return Err(Error::fault(format!(
                    "the fault queue: more than {} groups of page requests are open; none of them has its last page",
                    self.max_open
                )));
            }
            None => {
                self.open.push(Open { key, faults: Some(Vec::new()) });
                self.open.len() - 1
            }
        };
        let open = &mut self.open[at];
        match &mut open.faults {
            Some(faults) if faults.len() < self.max_requests => faults.push(Fault::PageRequest(request)),
            faults => *faults = None,
        }
        if !last {
            return Ok(None);
        }
        let open = self.open.swap_remove(at);
        Ok(Some((open.key, open.faults)))
    }

    /// Takes all groups that have not ended.
    pub fn take_open(&mut self) -> Vec<GroupKey> {
        self.open.drain(..).map(|open| open.key).collect()
    }
}
