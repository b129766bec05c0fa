//! Debian packages, unpacked into a folder and not installed: apt with a state of its own, for which nobody has to be root.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

/// The release that packages are taken from; those of its backports are preferred.
const RELEASE: &str = "trixie";
/// Names under which an archive of Debian has its releases.
const RELEASES: [&str; 10] =
    ["bullseye", "bookworm", "trixie", "forky", "duke", "sid", "oldstable", "stable", "testing", "unstable"];
const KEYRINGS: [&str; 2] =
    ["/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"];
/// In an unpacked folder: which packages were asked for.
const LIST: &str = ".packages";

/// Unpacks `packages` and all that they depend on into `into`, unless it holds just these; `vm` is the folder for apt's state.
///
/// # Errors
/// When the machine has no apt, its configuration names no archive of Debian, or that can't be reached.
pub fn unpack(vm: &Path, packages: &[&str], into: &Path) -> Result<()> {
    let names = packages.join(" ");
    if fs::read_to_string(into.join(LIST)).is_ok_and(|list| list == names) {
        return Ok(());
    }
    eprintln!("xtask: fetching from Debian's archive: {names}");
    let apt = Apt::prepare(vm)?;
    let partial = |what: &str| into.with_extension(what);
    let (debs, root) = (partial("debs"), partial("partial"));
    for folder in [into, &debs, &root] {
        remove(folder)?;
    }
    fs::create_dir_all(debs.join("partial"))?;
    fs::create_dir_all(&root)?;
    apt.run(&["update"])?;
    let archives = format!("Dir::Cache::archives={}", debs.display());
    apt.run(&[&["-y", "-o", &archives, "--download-only", "install"], packages].concat())?;
    let mut unpacked = 0;
    for entry in fs::read_dir(&debs)? {
        let package = entry?.path();
        if package.extension() == Some(OsStr::new("deb")) {
            run(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&root))?;
            unpacked += 1;
        }
    }
    ensure!(unpacked > 0, "apt-get has fetched nothing for {names}");
    fs::write(root.join(LIST), names)?;
    fs::rename(&root, into).with_context(|| format!("renaming {} to {}", root.display(), into.display()))?;
    remove(&debs)
}

/// Removes a folder that may not be there.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

/// Runs a program to its end; what it says is shown if it fails.
pub fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {name}; is it installed?"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    if !output.status.success() {
        bail!("{name} failed ({}):\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr));
    }
    Ok(text(&output.stdout))
}

struct Apt {
    configuration: PathBuf,
}

impl Apt {
    fn prepare(vm: &Path) -> Result<Self> {
        let remedy = "install qemu-system-x86 (10.1 or newer), busybox-static and e2fsprogs, and set VFIO_URING_VM_KERNEL";
        let listing = run(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)",
            "Identifier: Packages",
        ]))
        .with_context(|| format!("packages are fetched by apt-get, which does not work here: {remedy}"))?;
        let Some(archive) = archive(&listing) else {
            bail!("the configuration of apt on this machine names no archive of Debian: add one, or {remedy}");
        };
        let Some(keyring) = KEYRINGS.iter().find(|keyring| Path::new(keyring).exists()) else {
            bail!("{} is missing, by which packages are checked: install debian-archive-keyring", KEYRINGS[0]);
        };
        let folder = vm.join("apt");
        let state = folder.join("state");
        fs::create_dir_all(state.join("lists/partial"))?;
        fs::create_dir_all(folder.join("cache"))?;
        fs::write(state.join("status"), "")?;
        fs::write(folder.join("sources.list"), sources(archive, keyring))?;
        let configuration = folder.join("apt.conf");
        fs::write(&configuration, settings(&folder))?;
        Ok(Self { configuration })
    }

    fn run(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new("apt-get");
        // Last of all, so that it wins over the machine's own settings; these stay, for a proxy's sake.
        command.arg("-c").arg(&self.configuration).arg("-q").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        run(&mut command).context("Debian's archive can't be used; is the network up?").map(drop)
    }
}

/// The archive's address, from lines of address, release and component.
fn archive(listing: &str) -> Option<&str> {
    listing.lines().find_map(|line| {
        let mut fields = line.split('\t');
        let (address, release, component) = (fields.next()?, fields.next()?, fields.next()?);
        (RELEASES.contains(&release) && component == "main" && !address.contains("security")).then_some(address)
    })
}

fn sources(archive: &str, keyring: &str) -> String {
    let suites = [RELEASE.to_string(), format!("{RELEASE}-backports")];
    suites.map(|suite| format!("deb [signed-by={keyring}] {archive} {suite} main\n")).concat()
}

fn settings(folder: &Path) -> String {
    let folder = folder.display();
    format!(
        r#"Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Debug::NoLocking "true";
#clear APT::Architectures;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Default-Release "{RELEASE}-backports";
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_found_among_others() {
        let line = |address: &str, release: &str, component: &str| format!("{address}\t{release}\t{component}\n");
        let other = line("https://deb.example.org/tool/", "stable-tool", "main");
        let security = line("http://mirror.example.org/debian-security/", "bookworm-security", "main");
        let rolling = line("http://mirror.example.org/debian-security/", "stable", "main");
        let free = line("http://a.example.org/debian/", "bookworm", "non-free-firmware");
        let main = line("http://b.example.org/debian/", "bookworm", "main");
        let listing = [other.clone(), security.clone(), rolling, free, main.clone(), main.replace("b.", "c.")].concat();
        assert_eq!(archive(&listing), Some("http://b.example.org/debian/"));
        let list = line("mirror+file:/etc/apt/mirrors/debian.list/", "trixie", "main");
        assert_eq!(archive(&[other.clone(), list].concat()), Some("mirror+file:/etc/apt/mirrors/debian.list/"));
        assert_eq!(archive(&[other, security, line("http://a.example.org/ubuntu", "noble", "main")].concat()), None);
        assert_eq!(archive("E: nonsense\n"), None);
    }

    #[test]
    fn sources_have_both_suites() {
        let text = sources("http://a.example.org/debian/", "/k.gpg");
        assert!(text.contains("deb [signed-by=/k.gpg] http://a.example.org/debian/ trixie main\n"));
        assert!(text.contains("trixie-backports main\n"));
    }
}
