//! Giving a device to another driver: a plan that is printed or carried out.
//!
//! It goes by `driver_override`, which concerns this device only, and needs no list of ids. Nothing is kept for the way back:
//! without the override the kernel's own match decides, as at boot.

use std::{
    fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::{
    Bdf, Obstacle,
    obstacle::PCI_BRIDGE,
    sysfs::{Pci, PciDevice, link, optional},
};
use crate::{Error, Result};

/// Longest name of a driver.
const MAX_NAME: usize = 64;

/// What has to be done to give a device to another driver, in order.
///
/// [`Display`](fmt::Display) prints a line for each step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pci: Pci,
    bdf: Bdf,
    /// The driver that the device has now.
    former: Option<String>,
    former_override: Option<String>,
    steps: Vec<Step>,
}

/// A step of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Limits the device to a driver, or with `None` to none in particular.
    Override {
        /// The driver.
        driver: Option<String>,
        /// `driver_override` of the device.
        file: PathBuf,
    },
    /// Takes the device from its driver.
    Unbind {
        /// The device.
        bdf: Bdf,
        /// `unbind` of the driver.
        file: PathBuf,
    },
    /// Has the kernel look for a driver.
    Probe {
        /// The device.
        bdf: Bdf,
        /// `drivers_probe` of the bus.
        file: PathBuf,
    },
    /// Checks that the device has the driver now.
    Check {
        /// The driver.
        driver: String,
        /// The link to the device's driver.
        link: PathBuf,
    },
}

impl Step {
    /// What is written, and where.
    fn write(&self) -> Option<(String, &Path)> {
        match self {
            Self::Override { driver: Some(driver), file } => Some((driver.clone(), file)),
            // Nothing written would not reach the kernel.
            Self::Override { driver: None, file } => Some(("\n".into(), file)),
            Self::Unbind { bdf, file } | Self::Probe { bdf, file } => Some((bdf.to_string(), file)),
            Self::Check { .. } => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.write()) {
            (Self::Override { driver: None, file }, _) => write!(f, "write an empty line to {}", file.display()),
            (_, Some((text, file))) => write!(f, "write {text} to {}", file.display()),
            (Self::Check { driver, link }, _) => write!(f, "check that {} leads to {driver}", link.display()),
            (_, None) => Ok(()),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.steps.iter().try_for_each(|step| writeln!(f, "{step}"))
    }
}

/// What came of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The driver that the device had.
    pub former: Option<String>,
    /// The driver that it has.
    pub driver: Option<String>,
}

impl Pci {
    /// Plans how to give the device at `bdf` to `driver`: `vfio-pci`, or another that lends devices. Nothing is done yet. A device that has the driver
    /// already needs no step.
    ///
    /// # Errors
    /// [`Error::InUse`] when something uses the device (see [`Pci::check_idle`]) or its virtual functions; [`Error::NotReady`]
    /// when the driver is not loaded, or would not take the device: a bridge, or one without an IOMMU; [`Error::Invalid`] for a
    /// driver of another kind; those of [`Pci::device`].
    pub fn bind(&self, bdf: Bdf, driver: &str) -> Result<Plan> {
        let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if driver.is_empty() || driver.len() > MAX_NAME || driver.starts_with('.') || !driver.bytes().all(good) {
            return Err(Error::invalid(format!("{driver:?} is not the name of a driver: write vfio-pci")));
        }
        // An override makes any driver match: one of the kernel's own would be let loose on a device that it does not know.
        if !lends(driver) {
            let what = format!("{driver} is not a driver that lends devices to programs: write vfio-pci, or unbind {bdf}");
            return Err(Error::invalid(what));
        }
        let device = self.device(bdf)?;
        if device.driver.as_deref() == Some(driver) {
            return Ok(self.plan(&device, Vec::new()));
        }
        let not_ready = |what: String| Err(Error::NotReady { what });
        if !self.sys(&format!("bus/pci/drivers/{driver}")).exists() {
            return not_ready(format!("the driver {driver} is not loaded: modprobe {driver}"));
        }
        if driver == "vfio-pci" {
            if device.ids.class >> 8 == PCI_BRIDGE {
                return not_ready(Obstacle::Bridge { bdf }.to_string());
            }
            if device.group.is_none() && !self.no_iommu_mode() {
                return not_ready(Obstacle::NoIommu { bdf }.to_string());
            }
        }
        if let Some(sriov) = device.sriov.filter(|sriov| sriov.enabled > 0) {
            let (enabled, file) = (sriov.enabled, self.device_dir(bdf).join("sriov_numvfs"));
            let what = format!("{bdf} has virtual functions enabled ({enabled}): write 0 to {} first", file.display());
            return Err(Error::InUse { what });
        }
        self.check_idle(&device)?;
        let mut steps = vec![self.limit(bdf, Some(driver))];
        steps.extend(self.take(&device));
        steps.extend([self.probe(bdf), self.check(bdf, driver)]);
        Ok(self.plan(&device, steps))
    }

    /// Plans how to take the device at `bdf` from VFIO and give it to the driver that the kernel chooses. Nothing is done yet.
    ///
    /// A device that has another driver is left to it.
    ///
    /// # Errors
    /// [`Error::InUse`] when something uses the device, and those of [`Pci::device`].
    pub fn unbind(&self, bdf: Bdf) -> Result<Plan> {
        let device = self.device(bdf)?;
        let limited = device.driver_override.is_some();
        let lent = device.vfio.is_some() || device.driver.as_deref().is_some_and(lends);
        let mut steps = Vec::new();
        if limited {
            steps.push(self.limit(bdf, None));
        }
        if lent {
            self.check_idle(&device)?;
            steps.extend(self.take(&device));
        }
        if lent || device.driver.is_none() {
            steps.push(self.probe(bdf));
        }
        Ok(self.plan(&device, steps))
    }

    /// The command that loads the kernel's own driver of a device.
    pub fn modprobe(&self, bdf: Bdf) -> Option<String> {
        let alias = optional(&self.device_dir(bdf).join("modalias")).ok().flatten()?;
        let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b':';
        (!alias.is_empty() && alias.bytes().all(good)).then(|| format!("modprobe {alias}"))
    }

    fn no_iommu_mode(&self) -> bool {
        let file = self.sys("module/vfio/parameters/enable_unsafe_noiommu_mode");
        optional(&file).ok().flatten().as_deref() == Some("Y")
    }

    fn plan(&self, device: &PciDevice, steps: Vec<Step>) -> Plan {
        let (former, former_override) = (device.driver.clone(), device.driver_override.clone());
        Plan { pci: self.clone(), bdf: device.bdf, former, former_override, steps }
    }

    fn limit(&self, bdf: Bdf, driver: Option<&str>) -> Step {
        let file = self.device_dir(bdf).join("driver_override");
        Step::Override { driver: driver.map(str::to_owned), file }
    }

    fn take(&self, device: &PciDevice) -> Option<Step> {
        let driver = device.driver.as_deref()?;
        Some(Step::Unbind { bdf: device.bdf, file: self.sys(&format!("bus/pci/drivers/{driver}/unbind")) })
    }

    fn probe(&self, bdf: Bdf) -> Step {
        Step::Probe { bdf, file: self.sys("bus/pci/drivers_probe") }
    }

    fn check(&self, bdf: Bdf, driver: &str) -> Step {
        Step::Check { driver: driver.into(), link: self.device_dir(bdf).join("driver") }
    }
}

impl Plan {
    /// The device.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The driver that the device had when the plan was made.
    pub fn former(&self) -> Option<&str> {
        self.former.as_deref()
    }

    /// What is to be done; nothing, when all is as it should be.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Carries it out. It blocks, for as long as the drivers take to let go and to start.
    ///
    /// # Errors
    /// [`Error::Io`] when the kernel refuses a step and [`Error::NotReady`] when the driver does not take the device. What was
    /// done is undone then, and the error says which driver the device has.
    pub fn execute(&self) -> Result<Outcome> {
        self.execute_with(write)
    }

    /// [`Plan::execute`] with another way to write.
    pub(super) fn execute_with(&self, mut write: impl FnMut(&Path, &str) -> io::Result<()>) -> Result<Outcome> {
        for (done, step) in self.steps.iter().enumerate() {
            let Err(failed) = self.step(step, &mut write) else { continue };
            let after = self.undo(&self.steps[..done], &mut write);
            return Err(match failed {
                Failed::Write(error) => Error::io(format!("it is not possible to {step}{}{after}", remedy(&error)), error),
                Failed::NotTaken(driver) => {
                    let bdf = self.bdf;
                    Error::NotReady { what: format!("{driver} did not take {bdf}: see dmesg for the reason{after}") }
                }
            });
        }
        let driver = self.driver()?;
        Ok(Outcome { former: self.former.clone(), driver })
    }

    fn step(&self, step: &Step, write: &mut impl FnMut(&Path, &str) -> io::Result<()>) -> Result<(), Failed> {
        match step {
            Step::Check { driver, .. } => match self.driver() {
                Ok(Some(now)) if now == *driver => Ok(()),
                _ => Err(Failed::NotTaken(driver.clone())),
            },
            step => match step.write() {
                Some((text, file)) => write(file, &text).map_err(Failed::Write),
                None => Ok(()),
            },
        }
    }

    /// Undoes what was done, as far as the kernel lets us, and says what is now.
    fn undo(&self, done: &[Step], write: &mut impl FnMut(&Path, &str) -> io::Result<()>) -> String {
        if done.is_empty() {
            return "; nothing was changed".into();
        }
        let mut steps = vec![self.pci.limit(self.bdf, self.former_override.as_deref())];
        let now = self.driver().ok().flatten();
        if now != self.former {
            steps.extend(now.map(|driver| Step::Unbind {
                bdf: self.bdf,
                file: self.pci.sys(&format!("bus/pci/drivers/{driver}/unbind")),
            }));
            steps.push(self.pci.probe(self.bdf));
        }
        let failed = steps.iter().find(|step| self.step(step, write).is_err());
        let now = self.driver().ok().flatten();
        let state = match now.as_deref() {
            Some(driver) => format!("it has the driver {driver}"),
            None => "it has no driver".into(),
        };
        match failed {
            None if now == self.former => format!("; undone, {state} as before"),
            None => format!("; undone, but {state}"),
            Some(step) => format!("; undoing failed (to {step}), {state}"),
        }
    }

    fn driver(&self) -> Result<Option<String>> {
        link(&self.pci.device_dir(self.bdf).join("driver"))
    }
}

/// Whether the driver does nothing with a device but to lend it to programs: `vfio-pci`, those made from it, and two that are
/// older.
fn lends(driver: &str) -> bool {
    driver.contains("vfio") || matches!(driver, "pci-stub" | "uio_pci_generic")
}

enum Failed {
    Write(io::Error),
    NotTaken(String),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run this as root, as with sudo",
        io::ErrorKind::ReadOnlyFilesystem => "; /sys can't be written here, as in a container: run this on the host",
        _ => "",
    }
}

/// One write to a file that is there: the kernel takes each as a whole.
fn write(file: &Path, text: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(file)?.write_all(text.as_bytes())
}
