//! The command `vfio-uring`: benchmarks, serves and inspects devices of userspace PCI drivers.

#![forbid(unsafe_code)]

mod args;
mod bench;
mod bind;
mod embedded;
mod failure;
mod info;
mod list;
mod nic;
mod open;
mod pin;
mod reach;
mod serve;
mod signals;

use std::process::ExitCode;

use args::{Arguments, Command};
use clap::{Parser, error::ErrorKind};
use failure::{Failure, print, print_aside};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    let result = match arguments.command {
        Command::Bench(bench) => bench::run(&bench),
        Command::Nic(nic) => nic::run(&nic),
        Command::Serve(serve) => serve::run(&serve),
        Command::Info(info) => info::run(&info),
        Command::List(list) => list::run(&list),
        Command::Bind(args) => bind::bind(&args),
        Command::Unbind(args) => bind::unbind(&args),
    };
    end(result)
}

fn end(result: failure::Result<ExitCode>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(Failure::Usage(text)) => {
            print_aside(&format!("vfio-uring: {text}"));
            ExitCode::from(2)
        }
        Err(Failure::Failed(text)) => {
            print_aside(&format!("vfio-uring: {text}"));
            ExitCode::FAILURE
        }
        Err(Failure::Unheard) => ExitCode::SUCCESS,
    }
}

/// Help, or what is wrong with the command line, in one line.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            end(print(&error.render().to_string()).map(|()| ExitCode::SUCCESS))
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => end(Err(Failure::Usage(
            "what to do? list, bind, unbind, info, bench, nic bench, nic info, serve nvme, serve igb or serve edu; see --help".into(),
        ))),
        _ => end(Err(Failure::Usage(one_line(&error.render().to_string())))),
    }
}

/// What clap says of an error, without its usage and advice.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let said: Vec<_> = lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more")).collect();
    let line = said.join(" ");
    format!("{}; see --help", line.strip_prefix("error: ").unwrap_or(&line))
}
