//! One run of the virtual machine.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    binaries::Built,
    initramfs::Archive,
    machine::{Accel, Boot, CHANNEL, DEVICES, DISK, DISKS, MONITOR},
    monitor,
    plan::{COMMAND, Step},
    qemu::Qemu,
    report::{Event, Outcome, Reader},
    script,
    server::Server,
    tools::{self, Tools},
};

/// The kernel's messages go to the first serial port; a panic ends the machine. The kernel does not try whether the timer works, which
/// fails when the host is so busy that the emulated timer is late.
const APPEND: &str = "console=ttyS0 panic=-1 oops=panic no_timer_check";
/// Before the first step begins.
const START: Duration = Duration::from_secs(120);
/// After a step should have been killed by the guest itself.
const GRACE: Duration = Duration::from_secs(30);
/// Between two looks at the clock and at Ctrl-C.
const LOOK: Duration = Duration::from_millis(100);
/// Lines of the kernel's messages that are shown when the guest ends too early.
const LAST_WORDS: usize = 30;

/// What all machines of a run have in common.
#[derive(Debug)]
pub struct Host<'a> {
    /// The folder for all files.
    pub vm: &'a Path,
    /// What runs them.
    pub qemu: &'a Qemu,
    /// How.
    pub accel: Accel,
    /// The guest's kernel.
    pub kernel: &'a Path,
    /// The guest's shell and commands.
    pub tools: &'a Tools,
    /// Our programs.
    pub built: &'a Built,
    /// Set when the run is to end.
    pub interrupted: Arc<AtomicBool>,
    /// When the run has to have ended.
    pub until: Instant,
}

/// A process that ends with the value.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Host<'_> {
    /// Runs the steps of one machine; those that the guest did not come to are failures.
    ///
    /// # Errors
    /// When the machine can't be started, or the run was interrupted.
    pub fn run(&self, boot: Boot, steps: &[Step]) -> Result<Vec<Outcome>> {
        let mark = format!("@@{:016x}", fastrand::u64(..));
        self.prepare(boot, &format!("MARK={mark}\n"), steps)?;
        let _servers = self.servers(boot)?;
        let console = format!("console-{}.log", boot.name());
        let errors = format!("qemu-{}.log", boot.name());
        let results = File::create(self.vm.join(format!("results-{}.log", boot.name())))?;
        let mut command = self.command(boot, "quiet loglevel=4");
        command.args(["-serial", &format!("file:{console}"), "-serial", "stdio"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(self.vm.join(&errors))?);
        let mut child = Killed(command.spawn().context("starting QEMU")?);
        let stdout = child.0.stdout.take().context("QEMU's output")?;
        monitor::serve(self.vm)?;
        let (mut outcomes, end) = self.follow(&mark, stdout, results, steps)?;
        drop(child);
        if let Some(end) = &end {
            let said = fs::read_to_string(self.vm.join(&errors)).unwrap_or_default();
            eprintln!("xtask: {end}; the last of the kernel's messages ({}):", self.vm.join(&console).display());
            eprintln!("{}{}", last_lines(&self.vm.join(&console)), said.trim_end());
        }
        for step in steps {
            if outcomes.iter().all(|outcome| outcome.name != step.name) {
                let failure = Some(format!("no result: {}", end.as_deref().unwrap_or("the guest says nothing of it")));
                let outcome = Outcome { name: step.name.clone(), failure, took: Duration::ZERO, output: String::new() };
                println!("{}", outcome.line());
                outcomes.push(outcome);
            }
        }
        Ok(outcomes)
    }

    /// A prompt in the guest, until it ends.
    ///
    /// # Errors
    /// When the machine can't be started.
    pub fn shell(&self, boot: Boot) -> Result<()> {
        let devices = DEVICES.map(|(address, _, what)| format!("{address}  {what}\n")).concat();
        self.prepare(boot, &format!("PROMPT={}\n", script::quote(&devices)), &[])?;
        let mut command = self.command(boot, "quiet loglevel=3");
        let status = command.args(["-serial", "mon:stdio"]).status().context("starting QEMU")?;
        if !status.success() {
            bail!("QEMU failed: {status}");
        }
        Ok(())
    }

    /// Makes the disks and the initramfs; `settings` are for init.
    fn prepare(&self, boot: Boot, settings: &str, steps: &[Step]) -> Result<()> {
        if boot != Boot::VfioUser {
            for disk in DISKS {
                let path = self.vm.join(disk);
                File::create(&path).and_then(|file| file.set_len(DISK)).with_context(|| path.display().to_string())?;
            }
        }
        for socket in [MONITOR, CHANNEL] {
            // Of a run before: QEMU would replace it, and we would connect to nobody.
            let _ = fs::remove_file(self.vm.join(socket));
        }
        let path = self.vm.join(initramfs(boot));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let mut archive = Archive::new(std::io::BufWriter::new(file));
        archive.device("dev/console", 0o600, (5, 1))?;
        archive.file("init", 0o755, include_bytes!("../guest/init.sh"))?;
        archive.file("etc/profile", 0o644, include_bytes!("../guest/profile.sh"))?;
        archive.file("bin/host", 0o755, include_bytes!("../guest/host.sh"))?;
        archive.file("etc/passwd", 0o644, b"root:x:0:0::/tmp:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")?;
        archive.file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
        archive.file("mark", 0o644, settings.as_bytes())?;
        archive.file("plan", 0o644, script::plan(steps).as_bytes())?;
        for (path, text) in script::scripts(steps) {
            archive.file(path.trim_start_matches('/'), 0o644, text.as_bytes())?;
        }
        self.tools.add(&mut archive)?;
        for (binary, built) in self.built {
            let used = steps.is_empty() || steps.iter().any(|step| step.binaries().contains(binary));
            if used {
                tools::add(&mut archive, binary.path().trim_start_matches('/'), built)?;
            }
        }
        archive.finish()?;
        Ok(())
    }

    fn servers(&self, boot: Boot) -> Result<Vec<Server>> {
        if boot != Boot::VfioUser {
            return Ok(Vec::new());
        }
        let program = self.built.get(&COMMAND).context("the command was not built")?;
        Ok(vec![Server::nvme(program, self.vm)?, Server::igb(program, self.vm)?])
    }

    fn command(&self, boot: Boot, append: &str) -> Command {
        let mut command = self.qemu.command();
        let initramfs = PathBuf::from(initramfs(boot));
        command.args(boot.arguments(self.accel, self.kernel, &initramfs, &format!("{APPEND} {append}")));
        command.current_dir(self.vm);
        command
    }

    /// Reads results until the guest has ended, or is given up: then why.
    fn follow(&self, mark: &str, stdout: ChildStdout, log: File, steps: &[Step]) -> Result<(Vec<Outcome>, Option<String>)> {
        let lines = lines(stdout, log);
        let mut reader = Reader::new(mark);
        let mut outcomes = Vec::new();
        let mut done = false;
        let mut deadline = (Instant::now() + START).min(self.until);
        let end = loop {
            match lines.recv_timeout(LOOK) {
                Ok(line) => match reader.line(&line, Instant::now()) {
                    Event::Began(name) => {
                        let step = steps.iter().find(|step| step.name == name);
                        let limit = step.map_or(GRACE, |step| step.timeout);
                        reader.limit(limit);
                        deadline = (Instant::now() + limit + GRACE).min(self.until);
                    }
                    Event::Ended(outcome) => {
                        println!("{}", outcome.line());
                        outcomes.push(outcome);
                        deadline = (Instant::now() + GRACE).min(self.until);
                    }
                    Event::Done => {
                        done = true;
                        deadline = (Instant::now() + GRACE).min(self.until);
                    }
                    Event::Text => {}
                },
                Err(RecvTimeoutError::Disconnected) if done => break None,
                Err(RecvTimeoutError::Disconnected) => break Some("the guest has ended too early".to_string()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.interrupted.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let now = Instant::now();
            if now >= self.until {
                break Some("the whole run takes too long".into());
            }
            if now >= deadline {
                break Some(if done { "the guest does not turn itself off" } else { "the guest hangs" }.into());
            }
        };
        if let Some(outcome) = reader.cut_off(end.as_deref().unwrap_or("cut off"), Instant::now()) {
            println!("{}", outcome.line());
            outcomes.push(outcome);
        }
        Ok((outcomes, end))
    }
}

/// The name of a machine's initramfs.
pub fn initramfs(boot: Boot) -> String {
    format!("initramfs-{}.cpio", boot.name())
}

/// Lines as they come, which are logged too; the channel ends with the stream.
fn lines(stdout: ChildStdout, mut log: File) -> mpsc::Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut from = BufReader::new(stdout);
        let mut bytes = Vec::new();
        while from.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            // A full disk is no reason to lose the results.
            let _ = log.write_all(&bytes);
            let line = String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_string();
            if send.send(line).is_err() {
                break;
            }
            bytes.clear();
        }
    });
    receive
}

fn last_lines(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_WORDS)..].iter().map(|line| format!("    | {line}\n")).collect()
}
