//! What runs in the guest.
//!
//! [`steps`] is the list. A test is added with one line there: [`Step::test`] for an integration test of a crate,
//! [`Step::program`] for a program, [`Step::script`] for lines of shell. What the methods add:
//!
//! - [`Step::devices`]: devices (see [`machine`](crate::machine)) that vfio-pci has while the step runs; the kernel's drivers get
//!   them back afterwards. The step finds the first in `VFIO_URING_DEVICE`, and all, with commas, in `VFIO_URING_DEVICES`.
//! - [`Step::each_transport`]: it runs twice, with `VFIO_URING_TRANSPORT` set to `group` and to `cdev`; [`Step::on`]: on one
//!   of them.
//! - [`Step::before`] and [`Step::after`]: lines of shell, for a module's parameter and the like.
//! - [`Step::boot`]: another machine.
//! - [`Step::within`]: how long it may take, 60 s otherwise.
//!
//! A test that finds nothing to do and writes a line that begins with `skipped:` makes its step fail: here it has all it needs.
//!
//! `host device_del plug` and others of its kind have the host do something to the machine: see [`monitor`](crate::monitor).
//!
//! Programs are linked statically and built with the profile `guest`. In the guest a program is at `/bin/NAME` and a test at
//! `/tests/PACKAGE.NAME`. `VFIO_URING_GUEST=1` is set, for tests that do nothing elsewhere.

use std::time::Duration;

use clap::ValueEnum;

use crate::machine::{Boot, EDU, IGB, IGB_VFS, IGB2, NVME, NVME2, PAIR, PAIR2, PLUG};

/// Which of the kernel's two ways to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// `/dev/vfio/GROUP`, with type1
    Group,
    /// `/dev/vfio/devices/vfioN`, with iommufd
    Cdev,
}

impl Transport {
    /// As `VFIO_URING_TRANSPORT` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Group => "group",
            Self::Cdev => "cdev",
        }
    }
}

/// A program of this workspace, linked statically.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Binary {
    /// An integration test.
    Test { package: &'static str, name: &'static str },
    /// A program.
    Program { package: &'static str, name: &'static str },
}

/// The command.
pub const COMMAND: Binary = Binary::Program { package: "vfio-uring-cli", name: "vfio-uring" };
/// The tests that run on the software controller as well.
const ON_DEVICE: Binary = Binary::Test { package: "vfio-uring-cli", name: "on_device" };
/// The igb driver against Linux's.
const IGB_ON_DEVICE: Binary = Binary::Test { package: "vfio-uring-cli", name: "igb_on_device" };
const XTASK: Binary = Binary::Program { package: "xtask", name: "xtask" };

impl Binary {
    /// Where it is in the guest.
    pub fn path(&self) -> String {
        match self {
            Self::Test { package, name } => format!("/tests/{package}.{name}"),
            Self::Program { name, .. } => format!("/bin/{name}"),
        }
    }
}

/// What a step runs.
#[derive(Debug, Clone)]
pub enum Action {
    /// A program with its arguments.
    Run(Binary, Vec<&'static str>),
    /// Lines for the guest's shell, and the programs that they name.
    Script(&'static str, Vec<Binary>),
}

/// One line of the report.
#[derive(Debug, Clone)]
pub struct Step {
    /// Its name, with the transport behind a slash where it runs on each.
    pub name: String,
    /// What it runs.
    pub action: Action,
    /// Variables of its environment.
    pub env: Vec<(&'static str, String)>,
    /// The machine it needs.
    pub boot: Boot,
    /// Devices for vfio-pci.
    pub devices: Vec<&'static str>,
    /// Set where it runs on one of them.
    pub transport: Option<Transport>,
    /// Shell that prepares it.
    pub before: &'static str,
    /// Shell that undoes that.
    pub after: &'static str,
    /// When it is given up.
    pub timeout: Duration,
    both: bool,
}

impl Step {
    fn new(name: &str, action: Action) -> Self {
        Self {
            name: name.into(),
            action,
            env: Vec::new(),
            boot: Boot::Devices,
            devices: Vec::new(),
            transport: None,
            before: "",
            after: "",
            timeout: Duration::from_secs(60),
            both: false,
        }
    }

    /// An integration test (`cargo test -p PACKAGE --test TEST`), as a whole.
    pub fn test(name: &str, package: &'static str, test: &'static str) -> Self {
        Self::new(name, Action::Run(Binary::Test { package, name: test }, vec!["--color=never", "--show-output"]))
    }

    /// A program of this workspace.
    pub fn program(name: &str, binary: Binary, arguments: &[&'static str]) -> Self {
        Self::new(name, Action::Run(binary, arguments.to_vec()))
    }

    /// Lines for the guest's shell, which stops at the first that fails; `binaries` are put into the guest for it.
    pub fn script(name: &str, lines: &'static str, binaries: &[Binary]) -> Self {
        Self::new(name, Action::Script(lines, binaries.to_vec()))
    }

    /// More arguments: a filter for a test, say.
    pub fn args(mut self, arguments: &[&'static str]) -> Self {
        match &mut self.action {
            Action::Run(_, all) => all.extend(arguments),
            Action::Script(..) => panic!("a script has no arguments"),
        }
        self
    }

    /// A variable of the environment.
    pub fn env(mut self, name: &'static str, value: &str) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// The devices that vfio-pci is to have.
    pub fn devices(mut self, devices: &[&'static str]) -> Self {
        self.devices.extend(devices);
        self
    }

    /// Once on group, once on cdev.
    pub fn each_transport(mut self) -> Self {
        self.both = true;
        self
    }

    /// On one of them.
    pub fn on(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    /// Shell to run first.
    pub fn before(mut self, lines: &'static str) -> Self {
        self.before = lines;
        self
    }

    /// Shell to run last, however the step ended.
    pub fn after(mut self, lines: &'static str) -> Self {
        self.after = lines;
        self
    }

    /// How long it may take.
    pub fn within(mut self, seconds: u64) -> Self {
        self.timeout = Duration::from_secs(seconds);
        self
    }

    /// In another machine than that of all devices behind an IOMMU.
    pub fn boot(mut self, boot: Boot) -> Self {
        self.boot = boot;
        self
    }

    /// The programs it needs.
    pub fn binaries(&self) -> &[Binary] {
        match &self.action {
            Action::Run(binary, _) => std::slice::from_ref(binary),
            Action::Script(_, binaries) => binaries,
        }
    }

    /// The step itself, or the one for each transport.
    fn each(self) -> Vec<Self> {
        if !self.both {
            return vec![self];
        }
        let on = |transport: Transport| {
            let name = format!("{}/{}", self.name, transport.name());
            Self { name, transport: Some(transport), both: false, ..self.clone() }
        };
        vec![on(Transport::Group), on(Transport::Cdev)]
    }
}

/// All steps, in the order in which they run.
pub fn steps() -> Vec<Step> {
    let steps = vec![
        Step::program("guest", XTASK, &["guest-check"]).within(30),
        Step::script("machine", include_str!("../guest/machine.sh"), &[]).within(120),
        Step::test("reactor", "vfio-uring", "reactor").within(120),
        Step::script("vfio-bind", include_str!("../guest/vfio-bind.sh"), &[]).devices(&[NVME, EDU]).each_transport(),
        kernel_vfio(Step::test("group", "vfio-uring", "vfio_group").on(Transport::Group))
            .args(&["--skip", "without_an_iommu"]),
        kernel_vfio(Step::test("cdev", "vfio-uring", "vfio_cdev").on(Transport::Cdev)),
        Step::test("events", "vfio-uring", "vfio_events")
            .devices(&[PLUG, IGB])
            .each_transport()
            .env("VFIO_URING_TEST_PLUG", PLUG)
            .env("VFIO_URING_TEST_AER", IGB)
            .within(240),
        Step::test("faults", "vfio-uring", "iommufd_faults")
            .on(Transport::Cdev)
            .devices(&[NVME])
            .env("VFIO_URING_TEST_BDF", NVME),
        Step::test("noiommu", "vfio-uring", "vfio_group")
            .on(Transport::Group)
            .args(&["without_an_iommu"])
            .boot(Boot::NoIommu)
            .devices(&[NVME])
            .env("VFIO_URING_TEST_NOIOMMU", NVME),
        Step::test("nvme", "vfio-uring-cli", "on_device").devices(&[NVME, NVME2]).each_transport().within(240),
        // The physical function stays with Linux.
        Step::test("igb-vf", "vfio-uring-cli", "igb_vf")
            .each_transport()
            .env("VFIO_URING_TEST_VFS", IGB_VFS)
            .before(include_str!("../guest/igb-vf.sh"))
            .after(include_str!("../guest/igb-vf-after.sh"))
            .within(240),
        Step::test("revoked", "vfio-uring-cli", "revoked")
            .devices(&[NVME, PLUG])
            .each_transport()
            .env("VFIO_URING_TEST_PLUG", PLUG)
            .within(240),
        Step::test("gate", "vfio-uring", "vfio_gate")
            .devices(&[IGB, NVME, PAIR, PAIR2])
            .env("VFIO_URING_TEST_GATE", &[NVME, PAIR, PAIR2].join(","))
            .env("VFIO_URING_TEST_IGB", IGB)
            .each_transport()
            .within(240),
        Step::script("exchange", include_str!("../guest/exchange.sh"), &[ON_DEVICE]).each_transport(),
        Step::script("igb", include_str!("../guest/igb.sh"), &[IGB_ON_DEVICE])
            .devices(&[IGB2])
            .env("VFIO_URING_TEST_PEER", IGB)
            .each_transport()
            .within(270),
        Step::script("command", include_str!("../guest/command.sh"), &[COMMAND]).within(120),
        Step::script("vfio-user", include_str!("../guest/vfio-user.sh"), &[]).boot(Boot::VfioUser).within(120),
        Step::script("vfio-user-igb", include_str!("../guest/vfio-user-igb.sh"), &[]).boot(Boot::VfioUser).within(180),
    ];
    steps.into_iter().flat_map(Step::each).collect()
}

/// A test of the kernel's VFIO, with all the devices.
fn kernel_vfio(step: Step) -> Step {
    step.devices(&[NVME, NVME2, EDU, IGB])
        .env("VFIO_URING_TEST_BDF", NVME)
        .env("VFIO_URING_TEST_BDF2", NVME2)
        .env("VFIO_URING_TEST_EDU", EDU)
        .env("VFIO_URING_TEST_PF", IGB)
        .before("echo Y >/sys/module/vfio_pci/parameters/enable_sriov")
        .after("echo N >/sys/module/vfio_pci/parameters/enable_sriov")
        .within(180)
}

/// Those that were asked for: by a part of the name (all, when none is given), and by transport.
pub fn choose(steps: Vec<Step>, only: &[String], transport: Option<Transport>) -> Vec<Step> {
    let named = |step: &Step| only.is_empty() || only.iter().any(|part| step.name.contains(part.as_str()));
    let wanted = |step: &Step| transport.is_none() || step.transport.is_none() || step.transport == transport;
    steps.into_iter().filter(|step| named(step) && wanted(step)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_apart_and_chosen() {
        let all = steps();
        let mut names: Vec<_> = all.iter().map(|step| step.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
        let both = Step::test("nvme", "p", "t").each_transport().each();
        assert_eq!(both.iter().map(|step| step.name.as_str()).collect::<Vec<_>>(), ["nvme/group", "nvme/cdev"]);
        let chosen = |only: &[&str], transport| {
            let only: Vec<_> = only.iter().map(|part| part.to_string()).collect();
            let steps = [both.clone(), vec![Step::program("guest", XTASK, &[])]].concat();
            choose(steps, &only, transport).into_iter().map(|step| step.name).collect::<Vec<_>>()
        };
        assert_eq!(chosen(&[], None), ["nvme/group", "nvme/cdev", "guest"]);
        assert_eq!(chosen(&["nvme"], Some(Transport::Cdev)), ["nvme/cdev"]);
        assert_eq!(chosen(&[], Some(Transport::Group)), ["nvme/group", "guest"]);
        assert_eq!(chosen(&["group", "gue"], None), ["nvme/group", "guest"]);
        assert!(chosen(&["none"], None).is_empty());
    }

    #[test]
    fn programs_have_places_of_their_own() {
        let test = Binary::Test { package: "vfio-uring", name: "reactor" };
        assert_eq!((test.path().as_str(), COMMAND.path().as_str()), ("/tests/vfio-uring.reactor", "/bin/vfio-uring"));
    }
}
