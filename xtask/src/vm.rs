//! `cargo xtask vm`, from the arguments to the summary.

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::{
    VmArguments, binaries,
    boot::{self, Host},
    kernel,
    machine::{Accel, Boot, CHANNEL, DISKS, MONITOR},
    plan::{self, Binary, COMMAND},
    qemu::Qemu,
    report,
    tools::Tools,
};

/// All machines together, without the builds before.
const WHOLE: Duration = Duration::from_secs(25 * 60);

/// Runs the steps; whether all went well.
///
/// # Errors
/// When something is missing without which none can run, or the run was interrupted.
pub fn run(arguments: &VmArguments) -> Result<bool> {
    let steps = plan::choose(plan::steps(), &arguments.only, arguments.transport);
    if arguments.list {
        steps.iter().for_each(|step| println!("{}", step.name));
        return Ok(true);
    }
    ensure!(!steps.is_empty(), "no step has such a name; --list names them");
    ensure!(cfg!(target_arch = "x86_64"), "the machine is emulated for x86-64 hosts only");
    if arguments.accel == Accel::Kvm {
        File::options().read(true).write(true).open("/dev/kvm").context("--accel kvm needs access to /dev/kvm")?;
    }
    let root = root()?;
    let vm = root.join("target/vm");
    fs::create_dir_all(&vm).with_context(|| format!("making {}", vm.display()))?;
    // Held until the end.
    let _lock = lock(&vm)?;

    let qemu = Qemu::find(&vm)?;
    let kernel = kernel::find(&root, &vm)?;
    let tools = Tools::find(&vm)?;
    eprintln!("xtask: {}; kernel {}", qemu.describe(), kernel.display());
    let built = binaries::build(&root, &vm, &needed(arguments, &steps))?;

    let start = Instant::now();
    let interrupted = Arc::new(AtomicBool::new(false));
    let host = Host {
        vm: &vm,
        qemu: &qemu,
        accel: arguments.accel,
        kernel: &kernel,
        tools: &tools,
        built: &built,
        interrupted: interrupted.clone(),
        until: start + WHOLE,
    };
    if arguments.shell {
        host.shell(Boot::Devices)?;
        clean(&vm, arguments.keep);
        return Ok(true);
    }
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone()).context("registering for Ctrl-C")?;
    }
    let mut outcomes = Vec::new();
    let mut ended = Ok(());
    for boot in Boot::ALL {
        let of_boot: Vec<_> = steps.iter().filter(|step| step.boot == boot).cloned().collect();
        if of_boot.is_empty() || interrupted.load(Ordering::Relaxed) {
            continue;
        }
        match host.run(boot, &of_boot) {
            Ok(all) => outcomes.extend(all),
            Err(error) => {
                ended = Err(error);
                break;
            }
        }
    }
    clean(&vm, arguments.keep);
    ended?;
    ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
    let (text, well) = report::summary(&outcomes, start.elapsed());
    println!("{text}");
    Ok(well)
}

/// The programs of all steps; the command for a person and for the server.
fn needed(arguments: &VmArguments, steps: &[plan::Step]) -> BTreeSet<Binary> {
    if arguments.shell {
        return BTreeSet::from([COMMAND]);
    }
    let mut binaries: BTreeSet<_> = steps.iter().flat_map(|step| step.binaries()).copied().collect();
    if steps.iter().any(|step| step.boot == Boot::VfioUser) {
        binaries.insert(COMMAND);
    }
    binaries
}

/// The workspace's folder.
fn root() -> Result<PathBuf> {
    let package = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    match package.as_deref().and_then(Path::parent) {
        Some(root) => Ok(root.into()),
        None => bail!("start it as `cargo xtask`, so that it knows where the workspace is"),
    }
}

/// One run at a time: they share their files.
fn lock(vm: &Path) -> Result<File> {
    let path = vm.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("another `cargo xtask vm` runs in {}", vm.display()),
        Err(TryLockError::Error(error)) => Err(error).context("locking target/vm"),
    }
}

/// Removes what a run leaves, but for its logs.
fn clean(vm: &Path, keep: bool) {
    if keep {
        eprintln!("xtask: kept in {}", vm.display());
        return;
    }
    let made = Boot::ALL.map(boot::initramfs);
    for file in made.iter().map(String::as_str).chain(DISKS).chain([MONITOR, CHANNEL]) {
        // It may not have been made.
        let _ = fs::remove_file(vm.join(file));
    }
}
