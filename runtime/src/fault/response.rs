//! The queue of answers to page requests.

use std::time::{Duration, Instant};

use futures::lock::Mutex;
use zerocopy::{FromBytes, IntoBytes};

use super::{
    Answer,
    abi::{PageResponse, ResponseHeader},
    assembly::GroupKey,
    region::Area,
    ring::{self, Geometry},
    steady::Steady,
};
use crate::{Error, Result, reactor};

/// Between two looks for room.
const PAUSE: Duration = Duration::from_millis(1);

/// The region of the answers.
pub(super) struct Responses {
    region: Steady,
    geometry: Geometry,
    /// What of it is mapped.
    area: Option<Area>,
    /// One answer at a time.
    turn: Mutex<()>,
    deadline: Duration,
}

impl Responses {
    pub(super) async fn open(region: Steady, deadline: Duration) -> Result<Self> {
        let (geometry, ..) = look(&region).await?;
        let area = Area::find(&region.region, geometry)?;
        Ok(Self { region, geometry, area, turn: Mutex::new(()), deadline })
    }

    /// Writes an answer where the device takes it.
    pub(super) async fn give(&self, group: GroupKey, answer: Answer) -> Result<()> {
        let _turn = self.turn.lock().await;
        let start = Instant::now();
        let slot = loop {
            let (geometry, head, has_room) = look(&self.region).await?;
            if geometry != self.geometry {
                return Err(Error::fault("the fault queue: that of answers changed while it was used"));
            }
            if has_room {
                break head;
            }
            if start.elapsed() >= self.deadline {
                return Err(Error::Timeout { what: "an answer to page requests".into(), after: self.deadline });
            }
            reactor::sleep(PAUSE).await;
        };
        let response = PageResponse::new(group.pasid, group.index, answer);
        let at = self.geometry.at(slot);
        self.region.copy_in(self.area.as_ref(), at, response.as_bytes()).await?;
        let next = if slot + 1 == self.geometry.entries { 0 } else { slot + 1 };
        self.region.write_u32(0, next).await
    }
}

async fn look(region: &Steady) -> Result<(Geometry, u32, bool)> {
    let mut bytes = [0; size_of::<ResponseHeader>()];
    region.read(0, &mut bytes).await?;
    let header = ResponseHeader::read_from_bytes(&bytes).map_err(|_| Error::fault("a header of answers that is cut off"))?;
    ring::response_slot(&header, region.region.size())
}
