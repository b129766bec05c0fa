//! `vfio-uring info`.

use std::{fmt::Write, iter, process::ExitCode};

use serde::Serialize;
use vfio_uring::{
    device::{Area, Device, index},
    pci::capability,
    reactor::Reactor,
};
use vfio_uring_nvme::{Controller, Options};

use crate::{
    args::{Format, Info},
    bench::bytes,
    failure::{Failure, Result, print},
    open::open,
    reach::Reach,
};

/// Class, subclass and programming interface of an NVM Express controller.
const CLASS_NVME: u32 = 0x01_08_02;
/// Flags of regions (VFIO_REGION_INFO_FLAG_*), by bit.
const REGION_FLAGS: [&str; 3] = ["read", "write", "mmap"];
/// Flags of interrupts (VFIO_IRQ_INFO_*), by bit.
const IRQ_FLAGS: [&str; 4] = ["eventfd", "maskable", "automasked", "noresize"];

/// What a device is made of.
#[derive(Serialize)]
struct Description {
    device: String,
    reset: bool,
    pci: Option<Pci>,
    regions: Vec<RegionInfo>,
    irqs: Vec<IrqInfo>,
    dma: Reach,
    nvme: Option<Nvme>,
    #[serde(skip)]
    missing: Vec<String>,
}

#[derive(Serialize)]
struct Pci {
    vendor: u16,
    device: u16,
    subsystem_vendor: u16,
    subsystem: u16,
    class: u32,
    revision: u8,
    capabilities: Vec<Capability>,
}

#[derive(Serialize)]
struct Capability {
    id: u16,
    name: &'static str,
    offset: u16,
    extended: bool,
    version: u8,
}

#[derive(Serialize)]
struct RegionInfo {
    index: u32,
    name: String,
    size: u64,
    flags: Vec<&'static str>,
    areas: Vec<MappedArea>,
}

#[derive(Serialize)]
struct MappedArea {
    offset: u64,
    size: u64,
}

#[derive(Serialize)]
struct IrqInfo {
    name: &'static str,
    count: u32,
    flags: Vec<&'static str>,
}

#[derive(Serialize)]
struct Nvme {
    vendor: u16,
    model: String,
    serial: String,
    firmware: String,
    version: String,
    max_transfer: usize,
    max_queue_entries: u32,
    io_queues: u16,
    volatile_cache: bool,
    namespaces: Vec<Namespace>,
}

#[derive(Serialize)]
struct Namespace {
    nsid: u32,
    blocks: u64,
    block_size: u32,
    metadata: u16,
    bytes: u64,
}

/// Prints what the device says of itself.
pub fn run(args: &Info) -> Result<ExitCode> {
    let description = Reactor::new()?.block_on(describe(args))?;
    print(&match args.output_format {
        Format::Human => description.human(),
        Format::Json => serde_json::to_string(&description).map(|json| json + "\n").unwrap_or_default(),
    })?;
    match description.missing.is_empty() {
        true => Ok(ExitCode::SUCCESS),
        false => Err(Failure::Failed(description.missing.join("; "))),
    }
}

async fn describe(args: &Info) -> Result<Description> {
    let device = open(&args.device).await?;
    let mut missing = Vec::new();
    let mut note = |what: &str, error: String| missing.push(format!("{what}: {error}"));
    let pci = match pci(&device).await {
        Ok(pci) => pci,
        Err(error) => {
            note("its configuration space", error.to_string());
            None
        }
    };
    let mut nvme = None;
    if pci.as_ref().is_some_and(|pci| pci.class == CLASS_NVME) {
        match identify(&device).await {
            Ok(identified) => nvme = Some(identified),
            Err(error) => note("its NVMe controller", error.to_string()),
        }
    }
    Ok(Description {
        device: device.address().to_string(),
        reset: device.info().reset,
        pci,
        regions: regions(&device),
        irqs: irqs(&device),
        dma: Reach::of(&device),
        nvme,
        missing,
    })
}

fn regions(device: &Device) -> Vec<RegionInfo> {
    let there = (0..device.info().regions).filter_map(|index| device.region(index).ok());
    there
        .map(|region| RegionInfo {
            index: region.index(),
            name: region_name(region.index()),
            size: region.size(),
            flags: names(region.flags(), &REGION_FLAGS),
            areas: region.areas().iter().map(|&Area { offset, size }| MappedArea { offset, size }).collect(),
        })
        .collect()
}

fn irqs(device: &Device) -> Vec<IrqInfo> {
    let names_of = ["INTx", "MSI", "MSI-X", "error", "request"].into_iter().chain(iter::repeat("device-specific"));
    names_of
        .zip(device.irqs().iter().copied())
        .filter(|(_, info)| info.count != 0)
        .map(|(name, info)| IrqInfo { name, count: info.count, flags: names(info.flags, &IRQ_FLAGS) })
        .collect()
}

async fn pci(device: &Device) -> Result<Option<Pci>, vfio_uring::Error> {
    let config = device.config();
    if config.size() == 0 {
        return Ok(None);
    }
    let ids = config.ids().await?;
    let capabilities = config.capabilities().await?.into_iter().map(|found| Capability {
        id: found.id,
        name: capability::name(found.id, found.extended),
        offset: found.offset,
        extended: found.extended,
        version: found.version,
    });
    Ok(Some(Pci {
        vendor: ids.vendor,
        device: ids.device,
        subsystem_vendor: ids.subsystem_vendor,
        subsystem: ids.subsystem,
        class: ids.class,
        revision: ids.revision,
        capabilities: capabilities.collect(),
    }))
}

async fn identify(device: &Device) -> Result<Nvme, vfio_uring_nvme::Error> {
    let controller = Controller::new(device, Options::default()).await?;
    let info = controller.info().clone();
    let namespaces = controller.namespaces().iter().map(|ns| Namespace {
        nsid: ns.nsid,
        blocks: ns.blocks,
        block_size: ns.block_size,
        metadata: ns.metadata,
        bytes: ns.blocks.saturating_mul(ns.block_size.into()),
    });
    let namespaces = namespaces.collect();
    controller.shutdown().await?;
    let (major, minor, tertiary) = info.version;
    Ok(Nvme {
        vendor: info.vendor,
        model: info.model,
        serial: info.serial,
        firmware: info.firmware,
        version: format!("{major}.{minor}.{tertiary}"),
        max_transfer: info.max_transfer,
        max_queue_entries: info.max_queue_entries,
        io_queues: info.io_queues,
        volatile_cache: info.volatile_cache,
        namespaces,
    })
}

fn region_name(region: u32) -> String {
    match region {
        index::BAR0..=index::BAR5 => format!("BAR {region}"),
        index::ROM => "ROM".into(),
        index::CONFIG => "config".into(),
        index::VGA => "VGA".into(),
        _ => format!("region {region}"),
    }
}

fn names(flags: u32, known: &[&'static str]) -> Vec<&'static str> {
    known.iter().enumerate().filter(|(bit, _)| flags >> bit & 1 != 0).map(|(_, &name)| name).collect()
}

impl Description {
    fn human(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_human(&mut text);
        text
    }

    fn write_human(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "{}{}", self.device, if self.reset { ", can be reset" } else { "" })?;
        if let Some(pci) = &self.pci {
            let (class, interface) = (pci.class >> 8, pci.class & 0xff);
            let what = if pci.class == CLASS_NVME { " (NVM Express)" } else { "" };
            writeln!(
                text,
                "PCI {:04x}:{:04x}, subsystem {:04x}:{:04x}, class {class:04x} interface {interface:02x}{what}, revision {:02x}",
                pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem, pci.revision
            )?;
        }
        writeln!(text, "\nregions")?;
        for region in &self.regions {
            let (name, size, flags) = (&region.name, region.size, region.flags.join(" "));
            writeln!(text, "  {name:10} {size:#10x}  {flags}")?;
            for area in &region.areas {
                writeln!(text, "             mappable {:#x} to {:#x}", area.offset, area.offset.saturating_add(area.size))?;
            }
        }
        writeln!(text, "interrupts")?;
        for irq in &self.irqs {
            writeln!(text, "  {:10} {:>10}  {}", irq.name, irq.count, irq.flags.join(" "))?;
        }
        if let Some(pci) = &self.pci {
            writeln!(text, "capabilities")?;
            for found in &pci.capabilities {
                let extended = if found.extended { format!(", extended, version {}", found.version) } else { String::new() };
                writeln!(text, "  {:#06x}     {:#06x}  {}{extended}", found.offset, found.id, found.name)?;
            }
        }
        self.dma.write_human(text)?;
        if let Some(nvme) = &self.nvme {
            let cache = if nvme.volatile_cache { "a volatile write cache" } else { "no volatile write cache" };
            writeln!(text, "NVMe controller")?;
            writeln!(text, "  {} (serial {}, firmware {}), NVMe {}", nvme.model, nvme.serial, nvme.firmware, nvme.version)?;
            writeln!(
                text,
                "  {} I/O queues of up to {} entries, transfers of up to {}, {cache}",
                nvme.io_queues,
                nvme.max_queue_entries,
                bytes(nvme.max_transfer as f64)
            )?;
            for ns in &nvme.namespaces {
                let metadata = if ns.metadata == 0 { String::new() } else { format!(" + {} B of metadata", ns.metadata) };
                writeln!(
                    text,
                    "  namespace {}: {} = {} blocks of {} B{metadata}",
                    ns.nsid,
                    bytes(ns.bytes as f64),
                    ns.blocks,
                    ns.block_size
                )?;
            }
        }
        Ok(())
    }
}
