//! Static builds of our own programs and tests.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::plan::Binary;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Where each program is.
pub type Built = BTreeMap<Binary, PathBuf>;

/// Builds programs, in a target folder of their own.
///
/// # Errors
/// When one does not build, or cargo does not say where it is.
pub fn build(root: &Path, vm: &Path, binaries: &BTreeSet<Binary>) -> Result<Built> {
    let mut runs: BTreeMap<(&str, bool), Vec<&str>> = BTreeMap::new();
    for binary in binaries {
        let (key, name) = match binary {
            Binary::Test { package, name } => ((*package, true), name),
            Binary::Program { package, name } => ((*package, false), name),
        };
        runs.entry(key).or_default().push(name);
    }
    let mut built = Built::new();
    for ((package, tests), names) in runs {
        let messages = cargo(root, vm, package, tests, &names)?;
        for name in names {
            let path = executable(&messages, name, tests)
                .with_context(|| format!("cargo does not say where it put {name} of {package}"))?;
            let binary = built_as(binaries, package, name, tests);
            built.insert(binary, path);
        }
    }
    Ok(built)
}

fn built_as(binaries: &BTreeSet<Binary>, package: &str, name: &str, test: bool) -> Binary {
    let is = |binary: &&Binary| match binary {
        Binary::Test { package: of, name: called } => test && *of == package && *called == name,
        Binary::Program { package: of, name: called } => !test && *of == package && *called == name,
    };
    *binaries.iter().find(is).expect("it is one of those that were asked for")
}

fn cargo(root: &Path, vm: &Path, package: &str, tests: bool, names: &[&str]) -> Result<String> {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.args(if tests { &["test", "--no-run"][..] } else { &["build"] });
    command.args(["--profile", "guest", "--target", TARGET, "--message-format=json-render-diagnostics", "-p", package]);
    for name in names {
        command.args([if tests { "--test" } else { "--bin" }, name]);
    }
    command.arg("--target-dir").arg(vm.join("build")).current_dir(root);
    command.env("RUSTFLAGS", "-C target-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("starting cargo")?;
    if !output.status.success() {
        bail!("{package} can't be built for the guest; static linking needs the C library's static archive (libc6-dev)");
    }
    String::from_utf8(output.stdout).context("cargo's messages")
}

/// A message of cargo's, as far as it matters.
#[derive(Deserialize)]
struct Message {
    reason: String,
    target: Option<Target>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

fn executable(messages: &str, name: &str, test: bool) -> Option<PathBuf> {
    let kind = if test { "test" } else { "bin" };
    let is = |target: &Target| target.name == name && target.kind.iter().any(|have| have == kind);
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter(|message| message.reason == "compiler-artifact" && message.target.as_ref().is_some_and(is))
        .find_map(|message| message.executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_in_cargos_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"nvme"},"executable":null}
            {"reason":"compiler-artifact","target":{"kind":["bin"],"name":"nvme"},"executable":"/t/nvme"}
            {"reason":"compiler-artifact","target":{"kind":["test"],"name":"nvme"},"executable":"/t/deps/nvme-1"}
            {"reason":"build-script-executed","package_id":"x"}
            not json
            {"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "nvme", true), Some("/t/deps/nvme-1".into()));
        assert_eq!(executable(messages, "nvme", false), Some("/t/nvme".into()));
        assert_eq!(executable(messages, "other", false), None);
    }
}
