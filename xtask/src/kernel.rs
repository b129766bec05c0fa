//! The guest's kernel: one that is there, or one that is built from Debian's sources.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::{self, run};

const VARIABLE: &str = "VFIO_URING_VM_KERNEL";
/// What the tests need of a kernel.
const FRAGMENT: &str = include_str!("../kernel.config.fragment");

/// Finds the kernel: the variable, the folder of prebuilt ones beside the workspace, or a build.
///
/// # Errors
/// When the variable names no file, or a kernel can't be built.
pub fn find(root: &Path, vm: &Path) -> Result<PathBuf> {
    if let Some(path) = env::var_os(VARIABLE) {
        let path = PathBuf::from(path);
        return path.canonicalize().with_context(|| format!("{VARIABLE} is {}", path.display()));
    }
    if let Some(path) = prebuilt(&root.join("../shared/vm")) {
        return path.canonicalize().with_context(|| format!("the kernel {}", path.display()));
    }
    let folder = vm.join("kernel");
    let (kernel, used) = (folder.join("vmlinux"), folder.join("fragment"));
    if kernel.exists() && fs::read_to_string(&used).is_ok_and(|used| used == FRAGMENT) {
        return Ok(kernel);
    }
    build(vm, &folder, &kernel).with_context(|| format!("no kernel for the guest: {VARIABLE} may name one"))?;
    fs::write(used, FRAGMENT)?;
    Ok(kernel)
}

/// The last by name of the kernels in a folder.
fn prebuilt(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("vmlinux")).map(|entry| entry.path()).max()
}

fn build(vm: &Path, folder: &Path, kernel: &Path) -> Result<()> {
    for (tool, package) in [("make", "make"), ("gcc", "gcc"), ("flex", "flex"), ("bison", "bison"), ("bc", "bc")] {
        let there = Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        ensure!(there.is_ok(), "building it needs {tool}: install {package}, libelf-dev and libssl-dev too");
    }
    let (package, source) = (folder.join("package"), folder.join("source"));
    packages::unpack(vm, &["linux-source"], &package)?;
    if !source.join("Makefile").exists() {
        fs::create_dir_all(&source)?;
        let archive = archive(&package.join("usr/src"))?;
        eprintln!("xtask: unpacking {}", archive.display());
        run(Command::new("tar").arg("-xf").arg(archive).args(["--strip-components=1", "-C"]).arg(&source))?;
    }
    let fragment = source.join("vfio-uring.config");
    fs::write(&fragment, FRAGMENT)?;
    make(&source, &["tinyconfig"])?;
    run(Command::new("scripts/kconfig/merge_config.sh").args(["-m", ".config"]).arg(&fragment).current_dir(&source))?;
    make(&source, &["olddefconfig"])?;
    let missing = missing(&fs::read_to_string(source.join(".config"))?);
    if !missing.is_empty() {
        // Names change between versions. The step "guest" sees whether it matters.
        eprintln!("xtask: these sources do not know {}", missing.join(", "));
    }
    let jobs = format!("-j{}", thread::available_parallelism().map_or(1, usize::from));
    eprintln!("xtask: building the guest's kernel; on two cores that takes ten minutes");
    make(&source, &[&jobs, "vmlinux"])?;
    run(Command::new("strip").arg("-o").arg(kernel).arg(source.join("vmlinux"))).map(drop)
}

fn make(source: &Path, arguments: &[&str]) -> Result<()> {
    run(Command::new("make").args(arguments).current_dir(source)).map(drop)
}

/// The archive with the sources.
fn archive(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let named = |path: &PathBuf| path.to_string_lossy().contains(".tar.");
    let found = entries.filter_map(Result::ok).map(|entry| entry.path()).filter(named).max();
    match found {
        Some(path) => Ok(path),
        None => bail!("Debian's linux-source has no archive in {}", folder.display()),
    }
}

/// Settings of the fragment that a configuration does not have.
fn missing(configuration: &str) -> Vec<&'static str> {
    let wanted = FRAGMENT.lines().map(str::trim).filter(|line| line.starts_with("CONFIG_"));
    wanted.filter(|want| !configuration.lines().any(|line| line == *want)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_configuration_lacks() {
        assert!(missing(FRAGMENT).is_empty());
        let without = FRAGMENT.replace("CONFIG_IOMMUFD=y", "# CONFIG_IOMMUFD is not set");
        assert_eq!(missing(&without), ["CONFIG_IOMMUFD=y"]);
    }

    #[test]
    fn the_last_prebuilt_kernel() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(prebuilt(folder.path()), None);
        for name in ["vmlinux-7.2.13", "vmlinux-7.2.2", "kernel.config"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        assert_eq!(prebuilt(folder.path()), Some(folder.path().join("vmlinux-7.2.2")));
        assert_eq!(prebuilt(&folder.path().join("none")), None);
    }
}
