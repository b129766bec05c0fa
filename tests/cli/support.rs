//! Processes with a deadline.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// How long anything may take: much longer than it does.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What a process said and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// `None`: by a signal.
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// One line on stderr, and the exit status.
    #[track_caller]
    pub fn expect_failure(&self, status: i32, part: &str) {
        assert_eq!(self.status, Some(status), "{self:?}");
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "{self:?}");
        assert!(self.stderr.starts_with("vfio-uring: ") && self.stderr.contains(part), "{part} in {self:?}");
    }

    #[track_caller]
    pub fn expect_success(&self) -> &Self {
        assert_eq!(self.status, Some(0), "{self:?}");
        self
    }
}

/// A process that is killed when it is forgotten.
pub struct Process {
    child: Child,
    stdout: thread::JoinHandle<String>,
    stderr: thread::JoinHandle<String>,
    lines: mpsc::Receiver<String>,
}

impl Process {
    pub fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vfio-uring"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (lines_in, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stdout = thread::spawn(move || {
            let mut all = String::new();
            for line in stdout.lines().map_while(Result::ok) {
                all += &line;
                all.push('\n');
                let _ = lines_in.send(line);
            }
            all
        });
        let mut stderr = child.stderr.take().unwrap();
        let stderr = thread::spawn(move || {
            let mut all = String::new();
            let _ = stderr.read_to_string(&mut all);
            all
        });
        Self { child, stdout, stderr, lines }
    }

    /// Waits for a line on stdout.
    pub fn line(&self) -> String {
        self.lines.recv_timeout(DEADLINE).expect("a line on stdout")
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for the end.
    pub fn end(mut self) -> Ended {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break Some(status);
            }
            if start.elapsed() > DEADLINE {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                break None;
            }
            thread::sleep(Duration::from_millis(5));
        };
        let (stdout, stderr) = (self.stdout.join().unwrap(), self.stderr.join().unwrap());
        let status = status.unwrap_or_else(|| panic!("no end within {DEADLINE:?}: {stdout} {stderr}"));
        assert!(!stdout.contains("panicked") && !stderr.contains("panicked"), "{stdout} {stderr}");
        Ended { status: status.code(), stdout, stderr }
    }
}

/// Runs the command to its end.
pub fn run(line: &str) -> Ended {
    Process::start(&line.split_whitespace().collect::<Vec<_>>()).end()
}

/// A server on a socket of its own.
pub struct Server {
    pub process: Option<Process>,
    pub dir: TempDir,
}

impl Server {
    /// Starts it and waits until it is ready.
    pub fn start(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Self { process: None, dir };
        server.restart(options);
        server
    }

    pub fn restart(&mut self, options: &str) {
        let socket = self.socket();
        let mut args = vec!["serve", "nvme", "--socket", &socket];
        args.extend(options.split_whitespace());
        let process = Process::start(&args);
        let line = process.line();
        assert!(line.contains(&socket), "{line}");
        self.process = Some(process);
    }

    pub fn socket(&self) -> String {
        self.dir.path().join("nvme.sock").to_str().unwrap().into()
    }

    pub fn address(&self) -> String {
        format!("vfio-user:{}", self.socket())
    }

    pub fn running(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    /// Ends it in order.
    pub fn stop(mut self) -> Ended {
        let process = self.process.take().unwrap();
        process.signal(Signal::TERM);
        process.end()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}
