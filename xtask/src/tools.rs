//! What the guest needs besides our own programs: a shell and its commands, and those that make and check a file system.

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{initramfs::Archive, packages};

const TOOLS: [&str; 3] = ["busybox", "mke2fs", "e2fsck"];
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// Where the tools are, and the loader that finds their libraries.
#[derive(Debug)]
pub struct Tools {
    programs: Vec<PathBuf>,
    loader: PathBuf,
    libraries: Option<PathBuf>,
}

impl Tools {
    /// The host's if it has them all, otherwise those in `vm`, which are fetched if they aren't there.
    ///
    /// # Errors
    /// When there are none and none can be fetched.
    pub fn find(vm: &Path) -> Result<Self> {
        let host: Vec<PathBuf> = TOOLS.iter().filter_map(|tool| which(tool)).collect();
        if host.len() == TOOLS.len() {
            return Ok(Self { programs: host, loader: LOADER.into(), libraries: None });
        }
        let root = vm.join("tools");
        packages::unpack(vm, &["busybox-static", "e2fsprogs"], &root)?;
        let programs = TOOLS.iter().map(|tool| {
            let mut places = ["usr/bin", "usr/sbin"].iter().map(|folder| root.join(folder).join(tool));
            places.find(|path| path.exists()).with_context(|| format!("Debian's packages have no {tool}"))
        });
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        Ok(Self {
            programs: programs.collect::<Result<_>>()?,
            loader: libraries.join("ld-linux-x86-64.so.2"),
            libraries: Some(libraries),
        })
    }

    /// Puts them into the guest, with the libraries that they need.
    ///
    /// # Errors
    /// When one can't be read, or a library is missing.
    pub fn add<W: Write>(&self, archive: &mut Archive<W>) -> Result<()> {
        let mut libraries = Vec::new();
        for program in &self.programs {
            add(archive, &format!("bin/{}", name(program)), program)?;
            libraries.extend(self.libraries(program)?);
        }
        libraries.sort();
        libraries.dedup();
        if !libraries.is_empty() {
            add(archive, LOADER.trim_start_matches('/'), &self.loader)?;
        }
        for library in libraries {
            add(archive, &format!("lib/{}", name(&library)), &library)?;
        }
        Ok(())
    }

    /// The libraries of a program; none if it is linked statically.
    fn libraries(&self, program: &Path) -> Result<Vec<PathBuf>> {
        let mut command = Command::new(&self.loader);
        if let Some(libraries) = &self.libraries {
            command.arg("--library-path").arg(libraries);
        }
        match packages::run(command.arg("--list").arg(program)) {
            Ok(text) => parse(&text).with_context(|| format!("the libraries of {}", program.display())),
            Err(_) if is_static(program)? => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// Puts a program of the host into the guest.
///
/// # Errors
/// When it can't be read or written.
pub fn add<W: Write>(archive: &mut Archive<W>, path: &str, from: &Path) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
    Ok(archive.file(path, 0o755, &content)?)
}

fn name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

fn which(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(tool)).find(|path| path.is_file())
}

/// Whether an ELF file names no loader, by looking for the name of the one there is.
fn is_static(program: &Path) -> Result<bool> {
    let bytes = fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let head = &bytes[..bytes.len().min(4096)];
    Ok(!head.windows(LOADER.len()).any(|window| window == LOADER.as_bytes()))
}

/// Lines as `libc.so.6 => /lib/libc.so.6 (0x7f...)`; the loader itself and the kernel's own library have no path to copy.
fn parse(text: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines() {
        let Some((library, place)) = line.split_once(" => ") else { continue };
        if library.contains("ld-linux") {
            continue;
        }
        match place.split_once(" (0x") {
            Some((path, _)) => libraries.push(path.into()),
            None => bail!("{} is missing", library.trim()),
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_libraries() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibe2p.so.2 => /r/lib/libe2p.so.2 (0x00007f1)\n\
                    \tlibc.so.6 => /r/lib/libc.so.6 (0x00007f2)\n\t/lib64/ld-linux-x86-64.so.2 => /r/lib/ld.so (0x7f3)\n";
        assert_eq!(parse(text).unwrap(), [PathBuf::from("/r/lib/libe2p.so.2"), "/r/lib/libc.so.6".into()]);
        assert!(parse("\tstatically linked\n").unwrap().is_empty());
        let error = parse("\tlibx.so.1 => not found\n").unwrap_err().to_string();
        assert!(error.contains("libx.so.1 is missing"), "{error}");
    }
}
