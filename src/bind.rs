//! `vfio-uring bind` and `vfio-uring unbind`.

use std::process::ExitCode;

use vfio_uring::pci::{Outcome, Plan, sysfs::Pci};

use crate::{
    args::{Bind, Unbind},
    failure::{Result, print},
};

/// Gives a device to VFIO.
pub fn bind(args: &Bind) -> Result<ExitCode> {
    let pci = args.machine.pci();
    let plan = pci.bind(args.device, &args.driver)?;
    let (bdf, driver) = (args.device, &args.driver);
    if plan.steps().is_empty() {
        return said(format!("{bdf} has the driver {driver} already: nothing to do\n"));
    }
    if args.dry_run {
        return dry_run(&plan);
    }
    let outcome = plan.execute()?;
    let mut text = format!("{bdf} has {} now, before it had {}\n", name(&outcome.driver), name(&outcome.former));
    if driver == "vfio-pci" {
        text += &missing(&pci, &plan)?;
    }
    said(text)
}

/// Gives a device back.
pub fn unbind(args: &Unbind) -> Result<ExitCode> {
    let pci = args.machine.pci();
    let plan = pci.unbind(args.device)?;
    let bdf = args.device;
    if plan.steps().is_empty() {
        let driver = plan.former().unwrap_or_default();
        return said(format!("{bdf} has the driver {driver}, which is not of VFIO: nothing to do\n"));
    }
    if args.dry_run {
        return dry_run(&plan);
    }
    let Outcome { former, driver } = plan.execute()?;
    let mut text = format!("{bdf} has {} now, before it had {}\n", name(&driver), name(&former));
    if driver.is_none() {
        let remedy = pci.modprobe(bdf).map(|line| format!("; if there is one, this loads it: {line}")).unwrap_or_default();
        text += &format!("no driver that is loaded wants it{remedy}\n");
    }
    said(text)
}

fn dry_run(plan: &Plan) -> Result<ExitCode> {
    said(plan.steps().iter().map(|step| format!("would {step}\n")).collect())
}

/// What is still missing to use the device, when no way is ready.
fn missing(pci: &Pci, plan: &Plan) -> Result<String> {
    let obstacles = pci.obstacles(&pci.device(plan.bdf())?);
    Ok(match obstacles.ready() {
        true => format!("{obstacles}\n"),
        false => obstacles.all().map(|obstacle| format!("missing: {obstacle}\n")).collect(),
    })
}

fn name(driver: &Option<String>) -> String {
    driver.as_ref().map_or_else(|| "no driver".into(), |driver| format!("the driver {driver}"))
}

fn said(text: String) -> Result<ExitCode> {
    print(&text).map(|()| ExitCode::SUCCESS)
}
