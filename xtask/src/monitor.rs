//! What the guest may have done to its own machine: it asks by a virtio-serial port, and QEMU's monitor does it.
//!
//! A request is a line, `NUMBER COMMAND ARGUMENT...`; its answer is `NUMBER ok`, or `NUMBER failed: REASON`. In the guest the command
//! `host COMMAND ARGUMENT...` asks and waits. The commands:
//!
//! - `device_del plug` asks the guest to let go of the device, and does not wait for that.
//! - `device_add plug` puts it back; it waits until the guest has let go of the one before.
//! - `set_link card0 on|off`, and `card1`: a network card's cable.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::machine::{CARDS, CHANNEL, MONITOR, PLUGGABLE, pluggable};

/// For QEMU to make its sockets.
const START: Duration = Duration::from_secs(20);
/// For QEMU's answer to one command.
const ANSWER: Duration = Duration::from_secs(10);
/// For the guest to let go of a device.
const LET_GO: Duration = Duration::from_secs(20);
/// Bytes of a line from QEMU or the guest.
const LINE: u64 = 1 << 16;
/// Messages of QEMU's between a command and its answer.
const EVENTS: usize = 1000;

/// What the guest asks for.
#[derive(Debug, PartialEq, Eq)]
enum Request<'a> {
    Unplug,
    Plug,
    Link(&'a str, bool),
}

impl<'a> Request<'a> {
    fn parse(words: &[&'a str]) -> Result<Self> {
        let card = |id: &str| CARDS.contains(&id);
        match *words {
            ["device_del", id] if id == PLUGGABLE => Ok(Self::Unplug),
            ["device_add", id] if id == PLUGGABLE => Ok(Self::Plug),
            ["set_link", id, "on"] if card(id) => Ok(Self::Link(id, true)),
            ["set_link", id, "off"] if card(id) => Ok(Self::Link(id, false)),
            _ => bail!("{:?} is none of the requests that are granted", words.join(" ")),
        }
    }
}

/// Begins to serve the guest of the QEMU that was just started in `folder`, until that ends.
///
/// # Errors
/// When QEMU does not make its sockets.
pub fn serve(folder: &Path) -> Result<()> {
    let (monitor, channel) = (connect(&folder.join(MONITOR))?, connect(&folder.join(CHANNEL))?);
    let mut monitor = Monitor::new(monitor)?;
    let mut answers = channel.try_clone()?;
    thread::spawn(move || -> io::Result<()> {
        let mut requests = BufReader::new(channel);
        while let Some(line) = read_line(&mut requests)? {
            let words: Vec<_> = line.split_whitespace().collect();
            let Some((number, words)) = words.split_first() else { continue };
            let answer = match Request::parse(words).and_then(|request| monitor.grant(&request)) {
                Ok(()) => format!("{number} ok\n"),
                Err(error) => format!("{number} failed: {error:#}\n"),
            };
            answers.write_all(answer.as_bytes())?;
        }
        Ok(())
    });
    Ok(())
}

fn connect(path: &Path) -> Result<UnixStream> {
    let until = Instant::now() + START;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error).with_context(|| format!("connecting to QEMU at {}", path.display())),
        }
    }
}

/// A line without its end, `None` at the end of all.
fn read_line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    from.take(LINE).read_until(b'\n', &mut bytes)?;
    match bytes.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Some(_) => Err(io::Error::other("a line without an end")),
    }
}

/// QEMU's monitor.
struct Monitor {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Monitor {
    fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut monitor = Self { to: stream.try_clone()?, from: BufReader::new(stream) };
        read_line(&mut monitor.from)?.context("QEMU's monitor says nothing")?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Events are passed over.
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.to.write_all(format!("{request}\n").as_bytes()).context("asking QEMU")?;
        for _ in 0..EVENTS {
            let line = read_line(&mut self.from).context("QEMU's answer")?.context("QEMU has ended")?;
            let answer: Value = serde_json::from_str(&line).context("QEMU's answer")?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU: {}", error["desc"].as_str().unwrap_or("no reason"));
            }
            if let Some(result) = answer.get("return") {
                return Ok(result.clone());
            }
        }
        bail!("QEMU does not answer {command}")
    }

    fn grant(&mut self, request: &Request<'_>) -> Result<()> {
        match request {
            Request::Unplug => self.execute("device_del", &json!({ "id": PLUGGABLE })).map(drop),
            Request::Plug => {
                let until = Instant::now() + LET_GO;
                loop {
                    match self.execute("device_add", &pluggable()) {
                        // The one before is there until the guest has let go of it.
                        Err(_) if Instant::now() < until => thread::sleep(Duration::from_millis(100)),
                        result => return result.map(drop),
                    }
                }
            }
            Request::Link(id, up) => self.execute("set_link", &json!({ "name": id, "up": up })).map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_requests_are_granted() {
        let parse = |line: &'static str| Request::parse(&line.split(' ').collect::<Vec<_>>()).ok();
        assert_eq!(parse("device_del plug"), Some(Request::Unplug));
        assert_eq!(parse("device_add plug"), Some(Request::Plug));
        assert_eq!(parse("set_link card1 off"), Some(Request::Link("card1", false)));
        for line in ["", "quit", "device_del nvme0", "device_del plug now", "set_link net0 on", "aer card0 DLP"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn the_monitor_is_asked_and_heard() {
        let (ours, qemu) = UnixStream::pair().unwrap();
        let theirs = thread::spawn(move || {
            let (mut to, mut from) = (qemu.try_clone().unwrap(), BufReader::new(qemu));
            to.write_all(b"{\"QMP\": {}}\n").unwrap();
            let mut heard = Vec::new();
            for answer in [
                "{\"return\": {}}\n",
                "{\"event\": \"RTC_CHANGE\"}\n{\"return\": {}}\n",
                "{\"error\": {\"desc\": \"no such device\"}}\n",
            ] {
                heard.push(read_line(&mut from).unwrap().unwrap());
                to.write_all(answer.as_bytes()).unwrap();
            }
            heard
        });
        let mut monitor = Monitor::new(ours).unwrap();
        monitor.grant(&Request::Link("card0", true)).unwrap();
        assert_eq!(monitor.grant(&Request::Unplug).unwrap_err().to_string(), "QEMU: no such device");
        let heard = theirs.join().unwrap();
        assert!(heard[1].contains("set_link") && heard[2].contains("device_del"), "{heard:?}");
    }
}
