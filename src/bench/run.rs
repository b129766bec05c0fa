//! The phases of a run: write the range, measure, compare all of it. With a progress bar, an eye on Ctrl-C, and a deadline.

use std::{
    collections::BTreeMap,
    pin::pin,
    rc::Rc,
    time::{Duration, Instant},
};

use futures::future::{Either, select};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vfio_uring::reactor;

use super::{
    job::{Job, Stop, TurnClock},
    report::{Recorder, Verified, count},
    work::Walk,
};
use crate::{
    args::{Bench, Rw},
    failure::{Failure, Result},
    signals::Interrupted,
};

/// Between looks at the progress and for Ctrl-C.
const TICK: Duration = Duration::from_millis(100);
/// How long what is under way may take to end after Ctrl-C, and a device that failed to shut down.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Steps of the progress bar.
const STEPS: u64 = 1000;

/// The jobs and what they are run by.
pub struct Run<'a> {
    pub args: &'a Bench,
    pub jobs: &'a [Rc<Job>],
    pub clock: &'a TurnClock,
    pub stop: &'a Stop,
    pub interrupted: &'a Interrupted,
}

/// What came out.
pub struct Measured {
    pub recorder: Recorder,
    pub elapsed: Duration,
    pub errors: BTreeMap<String, u64>,
    pub verified: Option<Verified>,
}

impl Run<'_> {
    /// All phases. After Ctrl-C the rest is left out.
    pub async fn all(&self) -> Result<Measured> {
        let args = self.args;
        if args.writes_before() {
            let writing = Walk { rw: Rw::Write, read_percent: 0, once: true };
            self.phase("writing", writing, None).await?;
            if let Some((kind, times)) = self.errors().into_iter().next() {
                return Err(Failure::Failed(format!("writing the range before the run: {kind} ({times} times)")));
            }
        }
        let walk = Walk { rw: args.rw, read_percent: args.read_percent(), once: false };
        let elapsed = self.phase(args.rw.name(), walk, Some(args.runtime)).await?;
        let mut recorder = Recorder::new();
        for job in self.jobs {
            recorder.add(&mut job.work.borrow_mut().recorder);
        }
        if args.verify && args.rw.writes() {
            let reading = Walk { rw: Rw::Read, read_percent: 100, once: true };
            self.phase("comparing", reading, None).await?;
        }
        Ok(Measured { recorder, elapsed, errors: self.errors(), verified: self.verified() })
    }

    /// Runs the jobs over a walk, to its end or for a time; how long they took.
    async fn phase(&self, name: &'static str, walk: Walk, time: Option<Duration>) -> Result<Duration> {
        if self.interrupted.is_set() {
            return Ok(Duration::ZERO);
        }
        let start = self.clock.now();
        self.stop.end.set(time.map_or(u64::MAX, |time| start.saturating_add(time.as_nanos() as u64)));
        let started = Instant::now();
        let tasks: Vec<_> = self
            .jobs
            .iter()
            .map(|job| {
                job.work.borrow_mut().begin(walk);
                job.last_end.set(start);
                reactor::spawn(job.clone().run())
            })
            .collect();
        let jobs = pin!(async {
            let mut ended = Ok(());
            for task in tasks {
                // None is cancelled before its end. The first error is the cause of the others.
                if let Ok(Err(error)) = task.await {
                    ended = ended.and(Err(error));
                }
            }
            ended
        });
        let watch = pin!(self.watch(name, started, walk, time));
        let ended = match select(jobs, watch).await {
            Either::Left((ended, _)) => ended.map_err(|error| error.to_string()),
            Either::Right((late, _)) => Err(late),
        };
        ended.map_err(|cause| {
            let (seconds, ios) = (started.elapsed().as_secs_f64(), self.ios());
            Failure::Failed(format!("{name} failed after {seconds:.1} s and {ios} I/Os: {cause}"))
        })?;
        let end = self.jobs.iter().map(|job| job.last_end.get()).max().unwrap_or(start);
        Ok(Duration::from_nanos(end - start))
    }

    /// Shows the progress, looks for Ctrl-C, and ends when the jobs do not end in time.
    async fn watch(&self, name: &'static str, started: Instant, walk: Walk, time: Option<Duration>) -> String {
        let bar = Progress::new(name);
        let units: u64 = self.jobs.iter().map(|job| job.work.borrow().units()).sum();
        // The driver ends a queue whose command takes too long; this is for what it does not see.
        let grace = self.args.io_timeout * 2 + PATIENCE;
        let mut limit = time.map(|time| started + time + grace);
        let (mut last_ios, mut last_time) = (0, started);
        loop {
            reactor::sleep(TICK).await;
            let now = Instant::now();
            let ios = self.ios();
            let rate = (ios - last_ios) as f64 / (now - last_time).as_secs_f64();
            (last_ios, last_time) = (ios, now);
            let done = match time {
                Some(time) => (now - started).as_secs_f64() / time.as_secs_f64(),
                None if walk.once => ios as f64 / units as f64,
                None => 0.0,
            };
            bar.show(done, rate);
            if self.interrupted.is_set() && !self.stop.now.replace(true) {
                limit = Some(now + PATIENCE);
            }
            if limit.is_some_and(|limit| now >= limit) {
                let left: u32 = self.jobs.iter().map(|job| job.in_flight.get()).sum();
                return format!("{left} I/Os did not end");
            }
        }
    }

    /// I/Os of this phase.
    fn ios(&self) -> u64 {
        self.jobs.iter().map(|job| job.work.borrow().recorder.count()).sum()
    }

    fn errors(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for job in self.jobs {
            for (kind, times) in job.work.borrow().errors() {
                *all.entry(kind.clone()).or_default() += times;
            }
        }
        all
    }

    fn verified(&self) -> Option<Verified> {
        let mut all: Option<Verified> = None;
        for job in self.jobs {
            let work = job.work.borrow();
            let Some(ledger) = &work.ledger else { continue };
            let all = all.get_or_insert_with(Verified::default);
            all.checked += ledger.checked;
            all.mismatches += ledger.mismatches;
            all.first = all.first.take().or_else(|| ledger.first_mismatch.map(|mismatch| mismatch.to_string()));
        }
        all
    }
}

/// A bar on stderr while that is a terminal.
struct Progress(ProgressBar);

impl Progress {
    fn new(name: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::stderr_with_hz(10));
        if let Ok(style) = ProgressStyle::with_template("{prefix:9} [{bar:40}] {percent:>3} %  {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(name);
        Self(bar)
    }

    fn show(&self, done: f64, rate: f64) {
        if !self.0.is_hidden() {
            self.0.set_message(format!("{} IOPS", count(rate)));
            self.0.set_position((done.clamp(0.0, 1.0) * STEPS as f64) as u64);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
