//! `cargo xtask`: what a developer of this workspace runs besides cargo's own commands.
//!
//! `cargo xtask vm` runs the tests on the kernel's VFIO, in a virtual machine with an emulated IOMMU; see [`plan`] for what it
//! runs and how a test is added.

#![forbid(unsafe_code)]

mod binaries;
mod boot;
mod check;
mod initramfs;
mod kernel;
mod machine;
mod monitor;
mod packages;
mod plan;
mod qemu;
mod report;
mod script;
mod server;
mod tools;
mod vm;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::{machine::Accel, plan::Transport};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Tasks of this workspace", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Runs the tests on the kernel's VFIO in a virtual machine
    Vm(VmArguments),
    /// Looks at the machine it runs in; for the guest
    #[command(hide = true)]
    GuestCheck,
}

/// Arguments of `cargo xtask vm`.
#[derive(Args, Debug, Default)]
pub(crate) struct VmArguments {
    /// Run only the steps whose names contain this; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Leave out the steps of the other transport
    #[arg(long, value_enum, value_name = "TRANSPORT")]
    transport: Option<Transport>,
    /// How QEMU runs the guest
    #[arg(long, value_enum, value_name = "ACCEL", default_value_t)]
    accel: Accel,
    /// A prompt in the guest in place of the tests; Ctrl-A X ends it
    #[arg(long, conflicts_with_all = ["only", "transport"])]
    shell: bool,
    /// Keep the disk images and the initramfs
    #[arg(long)]
    keep: bool,
    /// Name the steps and run none
    #[arg(long, conflicts_with = "shell")]
    list: bool,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Vm(arguments) => vm::run(&arguments),
        Task::GuestCheck => Ok(check::run()),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
