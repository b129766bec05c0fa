//! `vfio-uring nic`.

mod bench;
mod cost;
mod info;
mod ports;
mod report;
mod steps;
mod work;

use std::process::ExitCode;

use crate::{
    args::{Nic, NicCommand},
    failure::Result,
};

/// Does what the command says.
pub fn run(args: &Nic) -> Result<ExitCode> {
    match &args.command {
        NicCommand::Bench(args) => bench::run(args),
        NicCommand::Info(args) => info::run(args),
        NicCommand::Count(args) => steps::count(args),
    }
}

/// As people write it.
fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}
