//! `vfio-uring list`.

use std::{fmt::Write, process::ExitCode};

use serde::Serialize;
use vfio_uring::pci::{
    Obstacle, Obstacles, class_name,
    sysfs::{Memlock, Pci, PciDevice},
};

use crate::{
    args::{Format, List},
    failure::{Failure, Result, print},
};

/// Base class of bridges, which nobody gives to a driver in userspace.
const BRIDGE: u32 = 0x06;

/// A device, for programs.
#[derive(Serialize)]
struct Listed<'a> {
    bdf: String,
    vendor: u16,
    device: u16,
    subsystem_vendor: u16,
    subsystem: u16,
    class: u32,
    class_name: Option<&'static str>,
    revision: u8,
    driver: Option<&'a str>,
    driver_override: Option<&'a str>,
    iommu: Option<&'a str>,
    group: Option<Group<'a>>,
    cdev: Option<String>,
    numa_node: Option<u32>,
    sriov: Option<Sriov>,
    physical_function: Option<String>,
    /// The ways that are ready: group, cdev.
    ready: Vec<&'static str>,
    missing: Missing,
}

#[derive(Serialize)]
struct Group<'a> {
    id: u32,
    node: String,
    others: Vec<Member<'a>>,
    reserved: Vec<Reserved<'a>>,
}

#[derive(Serialize)]
struct Member<'a> {
    name: &'a str,
    driver: Option<&'a str>,
    blocks: bool,
}

#[derive(Serialize)]
struct Reserved<'a> {
    start: u64,
    last: u64,
    kind: &'a str,
}

#[derive(Serialize)]
struct Sriov {
    enabled: u16,
    total: u16,
}

/// Sentences, for each way.
#[derive(Serialize)]
struct Missing {
    group: Vec<String>,
    cdev: Vec<String>,
}

/// Prints the devices of the machine, or all of one.
pub fn run(args: &List) -> Result<ExitCode> {
    let pci = args.machine.pci();
    if let Some(bdf) = args.device {
        let device = pci.device(bdf)?;
        print(&match args.output_format {
            Format::Human => detail(&pci, &device),
            Format::Json => json(&pci, &[device]),
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let (mut devices, mut failed) = (Vec::new(), Vec::new());
    for bdf in pci.addresses()? {
        // One that can't be read hides no other.
        match pci.device(bdf) {
            Ok(device) => devices.push(device),
            Err(error) => failed.push(error.to_string()),
        }
    }
    devices.retain(|device| args.all || device.ids.class >> 16 != BRIDGE);
    print(&match args.output_format {
        Format::Human => table(&pci, &devices),
        Format::Json => json(&pci, &devices),
    })?;
    match failed.is_empty() {
        true => Ok(ExitCode::SUCCESS),
        false => Err(Failure::Failed(failed.join("; "))),
    }
}

fn table(pci: &Pci, devices: &[PciDevice]) -> String {
    if devices.is_empty() {
        return "no PCI devices besides bridges\n".into();
    }
    let heads = ["ADDRESS", "ID", "CLASS", "DRIVER", "GROUP", "CDEV", "IOMMU", "STATUS"].map(String::from);
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let rows = devices.iter().map(|device| {
        [
            device.bdf.to_string(),
            format!("{:04x}:{:04x}", device.ids.vendor, device.ids.device),
            class(device),
            dash(device.driver.clone()),
            dash(device.group.as_ref().map(|group| group.id.to_string())),
            dash(device.vfio.as_ref().filter(|vfio| vfio.dev.is_some()).map(|vfio| vfio.name.clone())),
            dash(device.iommu.clone()),
            pci.obstacles(device).to_string(),
        ]
    });
    let rows: Vec<_> = std::iter::once(heads).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &rows {
        let line: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn class(device: &PciDevice) -> String {
    class_name(device.ids.class).map_or_else(|| format!("class {:04x}", device.ids.class >> 8), String::from)
}

fn detail(pci: &Pci, device: &PciDevice) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = write_detail(&mut text, pci, device);
    text
}

fn write_detail(text: &mut String, pci: &Pci, device: &PciDevice) -> std::fmt::Result {
    let ids = &device.ids;
    writeln!(text, "{}: {}", device.bdf, class(device))?;
    writeln!(
        text,
        "  PCI       {:04x}:{:04x}, subsystem {:04x}:{:04x}, class {:06x}, revision {:02x}",
        ids.vendor, ids.device, ids.subsystem_vendor, ids.subsystem, ids.class, ids.revision
    )?;
    let limited = device.driver_override.as_ref().map(|only| format!(", limited to {only}")).unwrap_or_default();
    writeln!(text, "  driver    {}{limited}", device.driver.as_deref().unwrap_or("none"))?;
    writeln!(text, "  IOMMU     {}", device.iommu.as_deref().unwrap_or("none"))?;
    if let Some(group) = &device.group {
        let member = |driver: &Option<String>| driver.clone().unwrap_or_else(|| "no driver".into());
        let others: Vec<_> =
            group.others.iter().map(|other| format!("{} ({})", other.name, member(&other.driver))).collect();
        let others = if others.is_empty() { "of its own".into() } else { format!("with {}", others.join(", ")) };
        writeln!(text, "  group     {}, {others}", group.id)?;
        for region in &group.reserved {
            writeln!(text, "  reserved  {:#x} to {:#x}, {}", region.start, region.last, region.kind)?;
        }
    }
    if let Some(node) = device.numa_node {
        writeln!(text, "  NUMA node {node}")?;
    }
    if let Some(sriov) = device.sriov {
        writeln!(text, "  SR-IOV    {} of {} virtual functions enabled", sriov.enabled, sriov.total)?;
    }
    if let Some(physical) = device.physical_function {
        writeln!(text, "  SR-IOV    virtual function of {physical}")?;
    }
    let obstacles = pci.obstacles(device);
    // Else it is among what is missing.
    if !obstacles.common().any(|obstacle| matches!(obstacle, Obstacle::Memlock(_))) {
        writeln!(text, "  memory    {}", Memlock::current())?;
    }
    let Obstacles { group, cdev } = &obstacles;
    for obstacle in obstacles.common() {
        writeln!(text, "  missing   {obstacle}")?;
    }
    let group_node = device.group.as_ref().map(|group| pci.group_node(group).display().to_string());
    let cdev_node = pci.cdev_node(device).map(|node| node.display().to_string());
    for (way, own, other, node) in [("group", group, cdev, group_node), ("cdev", cdev, group, cdev_node)] {
        for obstacle in own.iter().filter(|obstacle| !other.contains(obstacle)) {
            writeln!(text, "  by {way:6} {obstacle}")?;
        }
        if own.is_empty() {
            writeln!(text, "  by {way:6} ready, {}", node.unwrap_or_default())?;
        }
    }
    Ok(())
}

fn json(pci: &Pci, devices: &[PciDevice]) -> String {
    let listed: Vec<_> = devices.iter().map(|device| listed(pci, device)).collect();
    serde_json::to_string(&listed).map(|json| json + "\n").unwrap_or_default()
}

fn listed<'a>(pci: &Pci, device: &'a PciDevice) -> Listed<'a> {
    let Obstacles { group: by_group, cdev: by_cdev } = pci.obstacles(device);
    let ready = [("group", by_group.is_empty()), ("cdev", by_cdev.is_empty())];
    let sentences = |list: &[Obstacle]| list.iter().map(Obstacle::to_string).collect();
    let group = device.group.as_ref().map(|group| Group {
        id: group.id,
        node: pci.group_node(group).display().to_string(),
        others: group
            .others
            .iter()
            .map(|other| Member { name: &other.name, driver: other.driver.as_deref(), blocks: other.blocks })
            .collect(),
        reserved: group
            .reserved
            .iter()
            .map(|region| Reserved { start: region.start, last: region.last, kind: &region.kind })
            .collect(),
    });
    Listed {
        bdf: device.bdf.to_string(),
        vendor: device.ids.vendor,
        device: device.ids.device,
        subsystem_vendor: device.ids.subsystem_vendor,
        subsystem: device.ids.subsystem,
        class: device.ids.class,
        class_name: class_name(device.ids.class),
        revision: device.ids.revision,
        driver: device.driver.as_deref(),
        driver_override: device.driver_override.as_deref(),
        iommu: device.iommu.as_deref(),
        group,
        cdev: pci.cdev_node(device).map(|node| node.display().to_string()),
        numa_node: device.numa_node,
        sriov: device.sriov.map(|sriov| Sriov { enabled: sriov.enabled, total: sriov.total }),
        physical_function: device.physical_function.map(|bdf| bdf.to_string()),
        ready: ready.into_iter().filter(|(_, ready)| *ready).map(|(way, _)| way).collect(),
        missing: Missing { group: sentences(&by_group), cdev: sentences(&by_cdev) },
    }
}
