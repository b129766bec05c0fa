//! The vfio-user devices that share an address space.
//!
//! What is mapped is mapped at each of them, or at none; it is unmapped when each has confirmed. A device whose connection ends
//! drops out, and the others go on: it knows the memory by descriptors of its own, whose pages nobody else is given.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use futures::future::{join_all, try_join_all};

use super::{
    AddressSpace, Backend, IovaRange,
    backend::NotMapped,
    conflict::{conflicts, intersection},
    gate::Gate,
    mapping::Region,
};
use crate::{Error, Result, transport::user::client::Connection};

/// The vfio-user devices that share an address space.
#[derive(Debug)]
pub struct Peers {
    members: RefCell<Vec<Member>>,
    next_id: Cell<u64>,
    pub(super) gate: Gate,
}

#[derive(Debug, Clone)]
struct Member {
    id: u64,
    connection: Rc<Connection>,
    /// Its device was dropped; it stays until another one joins, so that the memory of the space has somebody to see it.
    left: bool,
}

impl Member {
    fn is_gone(&self) -> bool {
        self.connection.is_gone()
    }

    async fn map(&self, region: &Arc<Region>) -> Result<()> {
        self.connection.dma_map(region.iova, region.len(), region.fd(), 0).await
    }
}

/// What all of them can do.
#[derive(Debug)]
struct Common {
    ranges: Vec<IovaRange>,
    granule: u64,
    max_mappings: usize,
}

impl Common {
    fn of<'a>(members: impl Iterator<Item = &'a Member>) -> Self {
        let mut common = Self { ranges: vec![IovaRange { start: 0, last: u64::MAX }], granule: 1, max_mappings: usize::MAX };
        for limits in members.map(|member| member.connection.limits()) {
            if let Some(ranges) = &limits.iova_ranges {
                common.ranges = intersection(&common.ranges, ranges);
            }
            common.granule = common.granule.max(limits.page_size);
            common.max_mappings = common.max_mappings.min(limits.max_dma_maps);
        }
        common
    }
}

impl Peers {
    /// One device: others join its address space.
    pub fn new(connection: Rc<Connection>) -> Self {
        let first = Member { id: 0, connection, left: false };
        Self { members: RefCell::new(vec![first]), next_id: Cell::new(1), gate: Gate::default() }
    }

    fn live(&self) -> Vec<Member> {
        self.members.borrow().iter().filter(|member| !member.is_gone()).cloned().collect()
    }

    pub(super) fn is_gone(&self) -> bool {
        self.members.borrow().iter().all(Member::is_gone)
    }

    /// What a request gets when nobody is left.
    fn gone(&self) -> Error {
        let cause = self.members.borrow().last().and_then(|member| member.connection.cause());
        match cause {
            Some(gone @ Error::Gone { .. }) => gone,
            Some(cause) => Error::Gone { reason: cause.to_string().into() },
            None => Error::Gone { reason: "all devices of the address space are gone".into() },
        }
    }

    pub(super) async fn map(&self, region: &Arc<Region>) -> Result<(), NotMapped> {
        let live = self.live();
        let results = join_all(live.iter().map(|member| member.map(region))).await;
        let (mut refused, mut ended) = (None, None);
        for (member, result) in live.iter().zip(results) {
            match result {
                Ok(()) => region.holders().push(member.id),
                Err(error) if member.is_gone() => ended = Some(error),
                Err(error) => refused = Some(refused.unwrap_or(error)),
            }
        }
        let Some(error) = refused else {
            return match (region.holders().is_empty(), ended) {
                (false, _) => Ok(()),
                (true, ended) => Err(NotMapped { error: ended.unwrap_or_else(|| self.gone()), absent: false }),
            };
        };
        let undone = self.unmap_at(live, region).await;
        Err(NotMapped { absent: undone.is_ok() && error.is_refusal(), error })
    }

    pub(super) async fn unmap(&self, region: &Arc<Region>) -> Result<()> {
        let live = self.live();
        if live.is_empty() {
            return Err(self.gone());
        }
        self.unmap_at(live, region).await?;
        if self.is_gone() { Err(self.gone()) } else { Ok(()) }
    }

    /// Unmaps it where it is mapped. Who has confirmed is not asked again when this is given up midway.
    async fn unmap_at(&self, live: Vec<Member>, region: &Arc<Region>) -> Result<()> {
        let holders = region.holders().clone();
        let holding = live.iter().filter(|member| holders.contains(&member.id));
        let results =
            join_all(holding.map(async |member| match member.connection.dma_unmap(region.iova, region.len()).await {
                Err(error) if !member.is_gone() => Err(error),
                _ => {
                    region.holders().retain(|&id| id != member.id);
                    Ok(())
                }
            }));
        results.await.into_iter().collect()
    }

    /// Lets those go that `goes` names.
    fn remove(&self, goes: impl Fn(&Member) -> bool) {
        let gone: Vec<_> = self.members.borrow_mut().extract_if(.., |member| goes(member)).collect();
        // The last handle of a connection tells the space of its end.
        drop(gone);
    }
}

/// A device's place among those that share a space. Dropped, it is free of the others, and they of its limits.
#[derive(Debug)]
pub(crate) struct Membership {
    space: AddressSpace,
    id: u64,
}

impl Membership {
    /// Of the device that the space was made for.
    pub(crate) fn first(space: &AddressSpace) -> Self {
        Self { space: space.clone(), id: 0 }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let Backend::User(peers) = self.space.backend() else { return };
        let others = peers.members.borrow().iter().any(|member| member.id != self.id && !member.is_gone());
        if others {
            peers.remove(|member| member.id == self.id);
            self.space.relax(peers);
        } else if let Some(member) = peers.members.borrow_mut().iter_mut().find(|member| member.id == self.id) {
            member.left = true;
        }
    }
}

impl AddressSpace {
    /// Adds a vfio-user device: all that is mapped gets mapped there, or it does not join.
    pub(crate) async fn join(&self, device: &str, connection: &Rc<Connection>) -> Result<Membership> {
        let inner = self.inner();
        let Backend::User(peers) = &inner.backend else {
            return Err(Error::invalid(format!("{device}: only vfio-user devices can share an address space with it")));
        };
        let _turn = self.attaching().await;
        let _closed = peers.gate.close().await;
        // What nobody owns any more is in nobody's way.
        inner.reclaim_closed().await;
        if peers.is_gone() {
            return Err(peers.gone());
        }
        let new = Member { id: peers.next_id.replace(peers.next_id.get() + 1), connection: connection.clone(), left: false };
        self.check(device, &self.with(peers, &new))?;
        let regions: Vec<_> = inner.regions().into_iter().filter(|region| region.is_owned()).collect();
        try_join_all(regions.iter().map(|region| new.map(region))).await?;
        // No waiting from here on. Some may have left by now, which only widens what the others allow.
        connection.serve(self);
        if let Some(cause) = connection.cause() {
            return Err(cause);
        }
        if peers.is_gone() {
            return Err(peers.gone());
        }
        let common = self.with(peers, &new);
        inner.install(&common.ranges).map_err(|(mapping, hole)| conflict(device, mapping, hole))?;
        inner.set_limits(common.granule, common.max_mappings);
        regions.iter().for_each(|region| region.holders().push(new.id));
        let id = new.id;
        peers.members.borrow_mut().push(new);
        peers.remove(|member| member.left);
        Ok(Membership { space: self.clone(), id })
    }

    fn with(&self, peers: &Peers, new: &Member) -> Common {
        let members = peers.members.borrow();
        Common::of(members.iter().filter(|member| !member.left && !member.is_gone()).chain([new]))
    }

    /// Whether what is mapped suits the limits.
    fn check(&self, device: &str, common: &Common) -> Result<()> {
        let taken = self.taken();
        if let Some((mapping, hole)) = conflicts(taken.iter().copied(), &common.ranges) {
            return Err(conflict(device, mapping, hole));
        }
        let &Common { granule, max_mappings, .. } = common;
        let is_whole = |range: &&IovaRange| (range.start | range.last.wrapping_add(1)).is_multiple_of(granule);
        if let Some(IovaRange { start, last }) = taken.iter().find(|range| !is_whole(range)) {
            return Err(Error::invalid(format!(
                "{device} maps in units of {granule} bytes, which the mapping at IOVA {start:#x}..={last:#x} is not; open it before \
                 the devices with smaller units"
            )));
        }
        if taken.len() > max_mappings {
            return Err(Error::Exhausted {
                what: format!(
                    "{device} takes {max_mappings} DMA mappings, and the space that it is to share has {}; map fewer and larger pools",
                    taken.len()
                ),
            });
        }
        Ok(())
    }

    /// Takes over what those who are left can do, after one has gone.
    pub(super) fn relax(&self, peers: &Peers) {
        peers.remove(Member::is_gone);
        let common = Common::of(peers.members.borrow().iter());
        self.inner().set_limits(common.granule, common.max_mappings);
        if let Err((mapping, hole)) = self.inner().install(&common.ranges) {
            tracing::warn!(?mapping, ?hole, "the ranges shrank when a device left");
        }
    }
}

fn conflict(device: &str, mapping: IovaRange, hole: IovaRange) -> Error {
    Error::Conflict { device: device.into(), mapping: Some(mapping), reserved: Some(hole) }
}
