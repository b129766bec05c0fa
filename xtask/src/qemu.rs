//! QEMU: the machine's own, or one from Debian's packages.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::packages::{self, run};

const PROGRAM: &str = "qemu-system-x86_64";
/// igb came with 8.0, vfio-user-pci with 10.1.
const NEEDED: (u32, u32) = (10, 1);
/// From here on it can end with the process that started it.
const ENDS_WITH_PARENT: (u32, u32) = (10, 2);

/// A QEMU that can be started.
#[derive(Debug)]
pub struct Qemu {
    program: PathBuf,
    /// In front of all others.
    arguments: Vec<OsString>,
    modules: Option<PathBuf>,
    version: (u32, u32),
}

impl Qemu {
    /// The one of the host if it is new enough, otherwise the one in `vm`, which is fetched if it isn't there.
    ///
    /// # Errors
    /// When there is none and none can be fetched.
    pub fn find(vm: &Path) -> Result<Self> {
        let mut host = Self { program: PROGRAM.into(), arguments: Vec::new(), modules: None, version: (0, 0) };
        if let Ok(version) = host.ask_version()
            && version >= NEEDED
        {
            host.version = version;
            return Ok(host);
        }
        let root = vm.join("qemu");
        packages::unpack(vm, &["qemu-system-x86"], &root)?;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        // Through the loader and the libraries of that folder, since those of the host are older perhaps.
        let mut arguments: Vec<OsString> =
            vec!["--library-path".into(), libraries.clone().into(), root.join("usr/bin").join(PROGRAM).into()];
        for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            arguments.extend(["-L".into(), root.join(firmware).into()]);
        }
        let program = root.join("usr/lib64/ld-linux-x86-64.so.2");
        let mut fetched = Self { program, arguments, modules: Some(libraries.join("qemu")), version: (0, 0) };
        fetched.version = fetched.ask_version().with_context(|| {
            format!("QEMU from Debian's packages does not start; removing {} makes it come again", root.display())
        })?;
        ensure!(fetched.version >= NEEDED, "Debian's QEMU is {:?}, needed is {NEEDED:?}", fetched.version);
        Ok(fetched)
    }

    fn ask_version(&self) -> Result<(u32, u32)> {
        let text = run(self.bare().arg("--version"))?;
        version(&text).with_context(|| format!("{PROGRAM} --version says {text:?}"))
    }

    fn bare(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        if let Some(modules) = &self.modules {
            command.env("QEMU_MODULE_DIR", modules);
        }
        command
    }

    /// Starts with nothing but what the arguments say, and ends when the guest reboots.
    pub fn command(&self) -> Command {
        let mut command = self.bare();
        command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        if self.version >= ENDS_WITH_PARENT {
            command.args(["-run-with", "exit-with-parent=on"]);
        }
        command
    }

    /// Which one it is.
    pub fn describe(&self) -> String {
        let (major, minor) = self.version;
        let whose = if self.modules.is_some() { "from Debian's packages" } else { "the host's" };
        format!("QEMU {major}.{minor}, {whose}")
    }
}

fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)\nCopyright 2003"), Some((11, 1)));
        assert_eq!(version("QEMU emulator version 7.2\n"), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.1-rc2"), Some((10, 1)));
        assert_eq!(version("something else"), None);
        assert!(version("version 10.0.13").unwrap() < NEEDED);
    }
}
