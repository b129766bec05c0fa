//! What the guest says of its steps, and what is told of it.

use std::{
    collections::VecDeque,
    fmt::Write as _,
    time::{Duration, Instant},
};

/// Lines of a step's output that are kept: the last.
const LINES: usize = 2000;
/// The status of a program that was killed, as the shell has it.
const KILLED: u32 = 128 + 9;
/// What a test writes that does not find what it is for. In the guest it is to find it.
const SKIPPED: &str = "skipped:";

/// How a step ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Its name.
    pub name: String,
    /// Why it failed.
    pub failure: Option<String>,
    /// How long it took.
    pub took: Duration,
    /// What it wrote.
    pub output: String,
}

impl Outcome {
    /// Its line in the report, and its output if it failed.
    pub fn line(&self) -> String {
        let mut text = String::new();
        let verdict = if self.failure.is_some() { "FAILED" } else { "ok" };
        let _ = write!(text, "{:<32} {verdict:<6} {:6.1} s", self.name, self.took.as_secs_f64());
        if let Some(why) = &self.failure {
            let _ = write!(text, "  {why}");
            for line in self.relevant() {
                let _ = write!(text, "\n    | {line}");
            }
        }
        text
    }

    /// Without what tests wrote that passed, when others failed.
    fn relevant(&self) -> Vec<&str> {
        let mut lines: Vec<_> = self.output.lines().collect();
        let find = |heading| lines.iter().position(|line| *line == heading);
        if let (Some(passed), Some(failed)) = (find("successes:"), find("failures:"))
            && passed < failed
        {
            lines.drain(passed..failed);
        }
        lines
    }
}

/// What a line means.
#[derive(Debug)]
pub enum Event {
    /// Nothing by itself.
    Text,
    /// A step begins.
    Began(String),
    /// A step has ended.
    Ended(Outcome),
    /// All have.
    Done,
}

/// Reads the results as they come. Lines that begin with the mark are the guest's, all others are output of the step that runs.
#[derive(Debug)]
pub struct Reader {
    mark: String,
    running: Option<(String, Instant)>,
    limit: Option<Duration>,
    output: VecDeque<String>,
}

impl Reader {
    /// Of a guest that was told to use `mark`.
    pub fn new(mark: &str) -> Self {
        Self { mark: mark.into(), running: None, limit: None, output: VecDeque::new() }
    }

    /// The step that runs, and since when.
    pub fn running(&self) -> Option<(&str, Instant)> {
        self.running.as_ref().map(|(name, since)| (name.as_str(), *since))
    }

    /// How long the step that has just begun may take.
    pub fn limit(&mut self, limit: Duration) {
        self.limit = Some(limit);
    }

    /// Takes a line without its end.
    pub fn line(&mut self, line: &str, now: Instant) -> Event {
        let line = line.strip_suffix('\r').unwrap_or(line);
        let Some(said) = line.strip_prefix(&self.mark) else {
            if self.output.len() == LINES {
                self.output.pop_front();
            }
            self.output.push_back(line.into());
            return Event::Text;
        };
        match said.trim_start().split_once(' ') {
            Some(("begin", name)) => {
                self.output.clear();
                self.limit = None;
                self.running = Some((name.into(), now));
                Event::Began(name.into())
            }
            Some(("end", status)) => match self.ended(status, now) {
                Some(outcome) => Event::Ended(outcome),
                None => Event::Text,
            },
            None if said.trim() == "done" => Event::Done,
            _ => Event::Text,
        }
    }

    fn ended(&mut self, status: &str, now: Instant) -> Option<Outcome> {
        let took = now.saturating_duration_since(self.running()?.1);
        let failure = match status.parse::<u32>() {
            Ok(0) => self.output.iter().find(|line| line.starts_with(SKIPPED)).cloned(),
            Ok(KILLED) if self.limit.is_some_and(|limit| took >= limit) => {
                Some(format!("not done within {} s", self.limit.unwrap_or_default().as_secs()))
            }
            Ok(status @ 129..) => Some(format!("killed by signal {}", status - 128)),
            _ => Some(format!("exit status {status}")),
        };
        self.close(failure, now)
    }

    /// The step that was running when the guest ended or was given up.
    pub fn cut_off(&mut self, why: &str, now: Instant) -> Option<Outcome> {
        self.close(Some(why.into()), now)
    }

    fn close(&mut self, failure: Option<String>, now: Instant) -> Option<Outcome> {
        let (name, since) = self.running.take()?;
        // The mark has a line of its own, so the last line of the output is one that was not there.
        if self.output.back().is_some_and(String::is_empty) {
            self.output.pop_back();
        }
        let output = self.output.drain(..).collect::<Vec<_>>().join("\n");
        Some(Outcome { name, failure, took: now.saturating_duration_since(since), output })
    }
}

/// The last line of all; whether everything is well.
pub fn summary(outcomes: &[Outcome], took: Duration) -> (String, bool) {
    let failed: Vec<_> =
        outcomes.iter().filter(|outcome| outcome.failure.is_some()).map(|outcome| outcome.name.as_str()).collect();
    let ok = outcomes.len() - failed.len();
    let mut text = format!("\n{} steps: {ok} ok, {} failed, in {:.0} s", outcomes.len(), failed.len(), took.as_secs_f64());
    if !failed.is_empty() {
        let _ = write!(text, "; failed: {}", failed.join(", "));
    }
    (text, failed.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &str, limit: u64) -> (Vec<Outcome>, bool, Reader) {
        let mut reader = Reader::new("@@7");
        let start = Instant::now();
        let (mut outcomes, mut done) = (Vec::new(), false);
        for (second, line) in lines.lines().enumerate() {
            match reader.line(line, start + Duration::from_secs(second as u64)) {
                Event::Began(_) => reader.limit(Duration::from_secs(limit)),
                Event::Ended(outcome) => outcomes.push(outcome),
                Event::Done => done = true,
                Event::Text => {}
            }
        }
        (outcomes, done, reader)
    }

    #[test]
    fn results_are_read() {
        let text = "noise\n\n@@7 begin one\nhello\r\n@@8 end 0\nworld\n\n@@7 end 0\n\n@@7 begin two/cdev\n\n@@7 end 101\n\n@@7 done\n";
        let (outcomes, done, reader) = read(text, 60);
        assert!(done && reader.running().is_none());
        let [one, two] = &outcomes[..] else { panic!("{outcomes:?}") };
        assert_eq!((one.name.as_str(), one.failure.as_deref(), one.took.as_secs()), ("one", None, 5));
        assert_eq!(one.output, "hello\n@@8 end 0\nworld");
        assert_eq!((two.name.as_str(), two.failure.as_deref()), ("two/cdev", Some("exit status 101")));
        assert_eq!(two.output, "");
        assert!(one.line().contains(" ok ") && !one.line().contains("hello"));
        let (text, well) = summary(&outcomes, Duration::from_secs(9));
        assert!(!well && text.contains("2 steps: 1 ok, 1 failed, in 9 s; failed: two/cdev"), "{text}");
        assert!(summary(&outcomes[..1], Duration::ZERO).1);
    }

    #[test]
    fn ends_of_all_kinds() {
        let killed = "@@7 begin a\nx\n@@7 end 137\n";
        assert_eq!(read(killed, 60).0[0].failure.as_deref(), Some("killed by signal 9"));
        assert_eq!(read(killed, 2).0[0].failure.as_deref(), Some("not done within 2 s"));
        assert_eq!(read("@@7 begin a\n@@7 end 134\n", 60).0[0].failure.as_deref(), Some("killed by signal 6"));
        assert_eq!(read("@@7 begin a\n@@7 end what\n", 60).0[0].failure.as_deref(), Some("exit status what"));
        let skipped = read("@@7 begin a\nok\nskipped: X is not set\nskipped: Y\n@@7 end 0\n", 60);
        assert_eq!(skipped.0[0].failure.as_deref(), Some("skipped: X is not set"));
        let (outcomes, done, mut reader) = read("@@7 end 0\n@@7 nonsense\n@@7 begin a\nlast words", 60);
        assert!(outcomes.is_empty() && !done);
        let outcome = reader.cut_off("the guest has ended", Instant::now()).unwrap();
        assert_eq!((outcome.name.as_str(), outcome.output.as_str()), ("a", "last words"));
        assert!(outcome.line().contains("FAILED") && outcome.line().contains("\n    | last words"));
        assert!(reader.cut_off("", Instant::now()).is_none());
    }

    #[test]
    fn what_passed_is_left_out_of_a_failure() {
        let output = "test a ... ok\ntest b ... FAILED\n\nsuccesses:\nnoise of a\n\nsuccesses:\n    a\n\nfailures:\nb panicked\n\nfailures:\n    b";
        let failure = Some("exit status 101".into());
        let line = Outcome { name: "t".into(), failure, took: Duration::ZERO, output: output.into() }.line();
        assert!(!line.contains("noise") && line.contains("| test b ... FAILED") && line.contains("| b panicked"), "{line}");
        assert!(line.ends_with("|     b"));
    }

    #[test]
    fn a_flood_of_output_is_cut() {
        let mut reader = Reader::new("@@");
        let now = Instant::now();
        reader.line("@@ begin a", now);
        for line in 0..LINES + 5 {
            reader.line(&line.to_string(), now);
        }
        let outcome = reader.cut_off("", now).unwrap();
        assert_eq!((outcome.output.lines().count(), outcome.output.lines().next()), (LINES, Some("5")));
    }
}
