//! Admin commands (section 5): dispatch, queues, abort.

use super::{
    Controller,
    queue::{CompletionQueue, SubmissionQueue},
    spec::{Cc, Completion, Sqe, Status, admin},
};
use crate::device::Host;

impl Controller {
    /// Executes an admin command; `None` when it stays pending.
    pub(super) fn admin(&mut self, sqe: &Sqe, host: &mut impl Host) -> Option<Completion> {
        let result = if sqe.fuse() != 0 || sqe.psdt() != 0 {
            Err(Status::INVALID_FIELD)
        } else {
            match sqe.opcode() {
                admin::DELETE_SQ => self.delete_sq(sqe),
                admin::CREATE_SQ => self.create_sq(sqe),
                admin::GET_LOG_PAGE => self.get_log_page(sqe, host),
                admin::DELETE_CQ => self.delete_cq(sqe),
                admin::CREATE_CQ => self.create_cq(sqe),
                admin::IDENTIFY => self.identify(sqe, host),
                admin::ABORT => self.abort(sqe, host),
                admin::SET_FEATURES => self.set_features(sqe),
                admin::GET_FEATURES => self.get_features(sqe),
                admin::ASYNC_EVENT_REQUEST => match self.events.request(sqe.cid()) {
                    Ok(()) => return None,
                    Err(status) => Err(status),
                },
                _ => Err(Status::INVALID_OPCODE),
            }
        };
        let (result, status) = match result {
            Ok(result) => (result, Status::SUCCESS),
            Err(status) => {
                self.errors.add(0, sqe, status);
                (0, status)
            }
        };
        Some(self.admin_completion(sqe.cid(), result, status))
    }

    /// Copies the data of an admin command to the client.
    pub(super) fn give(&mut self, sqe: &Sqe, data: &[u8], host: &mut impl Host) -> Result<(), Status> {
        self.nvm.data.resolve(sqe, data.len() as u64, self.nvm.page_shift, host)?;
        let mut left = data;
        for segment in &self.nvm.data.segments {
            let (now, rest) = left.split_at(segment.len as usize);
            host.write(segment.iova, now).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            left = rest;
        }
        Ok(())
    }

    /// What both kinds of queues have in common: the size in entries.
    fn queue_size(&self, sqe: &Sqe) -> Result<u32, Status> {
        let size = (sqe.dword(10) >> 16) + 1;
        if size < 2 || size > self.config.max_queue_entries {
            return Err(Status::QUEUE_SIZE_INVALID);
        }
        let contiguous = sqe.dword(11) & 1 != 0;
        if !contiguous {
            return Err(Status::INVALID_FIELD);
        }
        if sqe.prp1() & ((1 << self.nvm.page_shift) - 1) != 0 {
            return Err(Status::PRP_OFFSET_INVALID);
        }
        // The last entry has an address, too.
        sqe.prp1().checked_add(u64::from(size) * 64).ok_or(Status::INVALID_FIELD)?;
        Ok(size)
    }

    /// Section 5.3.
    fn create_cq(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let (id, dword11) = (sqe.dword(10) as u16, sqe.dword(11));
        let size = self.queue_size(sqe);
        if id == 0 || id > self.features.queues.1 || self.cqs.get(usize::from(id)).is_none_or(Option::is_some) {
            return Err(Status::QUEUE_ID_INVALID);
        }
        let size = size?;
        if Cc(self.registers.cc).cq_entry_shift() != 4 {
            return Err(Status::QUEUE_SIZE_INVALID);
        }
        let vector = (dword11 >> 16) as u16;
        if vector >= self.vectors() {
            return Err(Status::VECTOR_INVALID);
        }
        let interrupts = dword11 & 2 != 0;
        self.clear_doorbells(SubmissionQueue::doorbell(id) + 4, 4);
        self.cqs[usize::from(id)] = Some(CompletionQueue::new(id, sqe.prp1(), size, interrupts.then_some(vector)));
        Ok(0)
    }

    /// Section 5.4.
    fn create_sq(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let (id, cq) = (sqe.dword(10) as u16, (sqe.dword(11) >> 16) as u16);
        let size = self.queue_size(sqe);
        if id == 0 || id > self.features.queues.0 || self.sqs.iter().any(|sq| sq.id == id) {
            return Err(Status::QUEUE_ID_INVALID);
        }
        let size = size?;
        if Cc(self.registers.cc).sq_entry_shift() != 6 {
            return Err(Status::QUEUE_SIZE_INVALID);
        }
        if cq == 0 || cq > self.features.queues.1 {
            return Err(Status::QUEUE_ID_INVALID);
        }
        let Some(Some(queue)) = self.cqs.get_mut(usize::from(cq)) else { return Err(Status::CQ_INVALID) };
        queue.users += 1;
        self.clear_doorbells(SubmissionQueue::doorbell(id), 4);
        self.sqs.push(SubmissionQueue::new(id, cq, sqe.prp1(), size));
        Ok(0)
    }

    /// Section 5.6. What was not fetched is not executed any more.
    fn delete_sq(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let id = sqe.dword(10) as u16;
        let at = self.sqs.iter().position(|sq| sq.id == id && id != 0).ok_or(Status::QUEUE_ID_INVALID)?;
        let sq = self.sqs.remove(at);
        if let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cq)) {
            cq.users -= 1;
        }
        self.stalled.retain(|stalled| stalled.sq != id);
        Ok(0)
    }

    /// Section 5.5.
    fn delete_cq(&mut self, sqe: &Sqe) -> Result<u32, Status> {
        let id = sqe.dword(10) as u16;
        match self.cqs.get_mut(usize::from(id)) {
            Some(slot @ Some(_)) if id != 0 => match slot {
                Some(cq) if cq.users != 0 => Err(Status::QUEUE_DELETION_INVALID),
                _ => {
                    *slot = None;
                    Ok(0)
                }
            },
            _ => Err(Status::QUEUE_ID_INVALID),
        }
    }

    /// Section 5.1: event requests, and commands that fault injection holds back, can be aborted; bit 0 of the result says
    /// that nothing was. Others are complete before the abort is looked at.
    fn abort(&mut self, sqe: &Sqe, host: &mut impl Host) -> Result<u32, Status> {
        let (sq, cid) = (sqe.dword(10) as u16, (sqe.dword(10) >> 16) as u16);
        if sq == 0 {
            if self.events.abort(cid) {
                let aborted = self.admin_completion(cid, 0, Status::ABORT_REQUESTED);
                return match self.room_in(0) {
                    // The abort's own completion needs a place as well.
                    2.. => self.post_admin(&aborted, host).map(|()| 0).map_err(|_| Status::INTERNAL_ERROR),
                    _ => {
                        let _ = self.events.request(cid);
                        Ok(1)
                    }
                };
            }
            return Ok(1);
        }
        let found = self.stalled.iter().position(|stalled| stalled.sq == sq && stalled.cid == cid);
        let queue = self.sqs.iter().find(|queue| queue.id == sq).map(|queue| (queue.cq, queue.head as u16));
        let (Some(at), Some((cq_id, sq_head))) = (found, queue) else { return Ok(1) };
        if self.room_in(cq_id) == 0 {
            return Ok(1);
        }
        self.stalled.swap_remove(at);
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(cq_id)) else { return Ok(1) };
        let aborted = Completion { result: 0, sq_head, sq_id: sq, cid, status: Status::ABORT_REQUESTED.0 };
        cq.post(&[aborted], host).map_err(|_| Status::INTERNAL_ERROR)?;
        if let Some(vector) = cq.vector {
            host.signal(vector);
        }
        Ok(0)
    }

    /// Free entries of a completion queue, by its doorbell as it is now.
    fn room_in(&mut self, id: u16) -> u32 {
        let doorbells = &*self.bar.doorbells.memory;
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(id)) else { return 0 };
        cq.look(doorbells);
        cq.room()
    }
}
