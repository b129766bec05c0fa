//! Copies a file to an NVMe device: tokio-uring reads it straight into DMA memory, from where the device takes it. Then all of it
//! is read back, and its hash is compared with the file's. Our reactor is a guest of tokio-uring's runtime.
//!
//! `cargo run --release --example file_to_nvme -- [FILE] [--device ADDRESS]`. Without a file it is random data, without a device a
//! software controller in this process. It OVERWRITES the first namespace of the device from block 0 on.

use std::{
    error::Error,
    ffi::OsString,
    fs::{self, File},
    io::{ErrorKind, Seek, Write},
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::Instant,
};

use clap::{Parser, error};
use futures::{StreamExt, TryStreamExt, stream};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use tokio_uring::buf::BoundedBuf;
use vfio_uring::{
    device::{Address, Device},
    dma::{DmaBuf, HugePages, Pool},
    reactor::Guest,
};
use vfio_uring_models::nvme::{self, Config, NamespaceConfig};
use vfio_uring_nvme::{Controller, Namespace, Options};

/// Bytes that are read and written at once, in whole blocks.
const CHUNK: usize = 128 << 10;
/// Reads of the file under way at once, and writes and reads of the device.
const DEPTH: usize = 8;
/// Random data for want of a file.
const RANDOM: u64 = 64 << 20;

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

#[derive(Parser)]
#[command(
    name = "file_to_nvme",
    about = "Copies a file to an NVMe device, reads it back and compares",
    override_usage = "file_to_nvme [FILE] [--device ADDRESS]   (OVERWRITES namespace 1 of the device from block 0 on)"
)]
struct Arguments {
    /// What to copy [default: 64 MiB of random data]
    file: Option<PathBuf>,
    /// The device that is OVERWRITTEN, such as vfio-user:/path/to/socket [default: a software controller in this process]
    #[arg(long, value_name = "ADDRESS")]
    device: Option<Address>,
}

/// A part of the file and its place on the device.
#[derive(Clone, Copy)]
struct Chunk {
    offset: u64,
    len: usize,
    lba: u64,
}

/// The file, open.
struct Source {
    name: String,
    file: File,
    len: u64,
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let named = |error: std::io::Error| format!("{name}: {error}");
        // Before it is opened, for to open a pipe is to wait.
        let metadata = fs::metadata(path).map_err(named)?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(format!("{name} is not a file with anything in it").into());
        }
        let file = File::open(path).map_err(named)?;
        let len = file.metadata().map_err(named)?.len();
        Ok(Self { name, file, len })
    }

    fn random() -> Result<Self> {
        let mut file = tempfile::tempfile()?;
        let mut data = vec![0; CHUNK];
        for _ in 0..RANDOM / CHUNK as u64 {
            fastrand::fill(&mut data);
            file.write_all(&data)?;
        }
        file.rewind()?;
        Ok(Self { name: "random data in a temporary file".into(), file, len: RANDOM })
    }
}

/// A phase: a bar while there is a terminal, a line at its end.
struct Phase {
    name: &'static str,
    start: Instant,
    bar: ProgressBar,
}

impl Phase {
    fn new(name: &'static str, len: u64) -> Self {
        let style = ProgressStyle::with_template("{prefix:9} [{bar:40}] {binary_bytes} of {binary_total_bytes}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
        Self { name, start: Instant::now(), bar: ProgressBar::new(len).with_style(style).with_prefix(name) }
    }

    fn end(self) {
        self.bar.finish_and_clear();
        let (bytes, time) = (self.bar.position(), self.start.elapsed().as_secs_f64());
        let rate = HumanBytes((bytes as f64 / time) as u64);
        println!("{:9}  {} in {time:.2} s, {rate}/s, {DEPTH} parts at a time", self.name, HumanBytes(bytes));
    }
}

impl Drop for Phase {
    /// Of a phase that failed, nothing stays on the screen.
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A chunk of the file in DMA memory; its last block is filled up with zeroes.
async fn load(file: &tokio_uring::fs::File, chunk: Chunk, pool: &Pool, block: usize) -> Result<(Chunk, DmaBuf)> {
    let buf = pool.alloc(chunk.len.next_multiple_of(block))?;
    let (done, part) = file.read_exact_at(buf.slice(..chunk.len), chunk.offset).await;
    done.map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof => {
            format!("the file became shorter than {} bytes meanwhile", chunk.offset + chunk.len as u64)
        }
        _ => format!("reading {} bytes of the file at {}: {error}", chunk.len, chunk.offset),
    })?;
    let mut buf = part.into_inner();
    buf[chunk.len..].fill(0);
    Ok((chunk, buf))
}

/// The file's hash, once all of it is on the device.
async fn write(
    ns: &Namespace,
    pool: &Pool,
    file: &tokio_uring::fs::File,
    chunks: impl Iterator<Item = Chunk>,
    phase: Phase,
) -> Result<blake3::Hash> {
    let (mut hash, block) = (blake3::Hasher::new(), ns.block_size());
    // Both are pipelines that keep the order, which the hash needs.
    let loaded = stream::iter(chunks).map(|chunk| load(file, chunk, pool, block)).buffered(DEPTH);
    let hashed = loaded.inspect_ok(|(chunk, buf)| {
        hash.update(&buf[..chunk.len]);
    });
    let written = hashed.map(|loaded| async {
        let (chunk, buf) = loaded?;
        let (written, _) = ns.write(chunk.lba, buf).await;
        written.map_err(|error| format!("writing {} bytes to block {}: {error}", chunk.len, chunk.lba))?;
        Ok::<_, Box<dyn Error>>(chunk.len as u64)
    });
    written
        .buffered(DEPTH)
        .try_for_each(async |len| {
            phase.bar.inc(len);
            Ok(())
        })
        .await?;
    ns.flush().await?;
    phase.end();
    Ok(hash.finalize())
}

/// The hash of what the device has.
async fn read_back(ns: &Namespace, pool: &Pool, chunks: impl Iterator<Item = Chunk>, phase: Phase) -> Result<blake3::Hash> {
    let (mut hash, block) = (blake3::Hasher::new(), ns.block_size());
    let read = stream::iter(chunks).map(|chunk| async move {
        let mut buf = pool.alloc(chunk.len.next_multiple_of(block))?;
        // What was written may still be in this memory: it must not pass for what was read.
        buf.fill(0);
        let (read, buf) = ns.read(chunk.lba, buf).await;
        read.map_err(|error| format!("reading {} bytes from block {}: {error}", chunk.len, chunk.lba))?;
        Ok::<_, Box<dyn Error>>((chunk, buf))
    });
    let mut read = pin!(read.buffered(DEPTH));
    while let Some((chunk, buf)) = read.try_next().await? {
        hash.update(&buf[..chunk.len]);
        phase.bar.inc(chunk.len as u64);
    }
    phase.end();
    Ok(hash.finalize())
}

/// Writes the file to namespace 1, reads it back, compares.
async fn copy(controller: &Controller, source: Source) -> Result<()> {
    let ns = controller.create_interrupt_queue(2 * DEPTH).await?.namespace(1)?;
    let (block, len, model) = (ns.block_size() as u64, source.len, &controller.info().model);
    let blocks = len.div_ceil(block);
    if blocks > ns.blocks() {
        let room = ns.blocks() * block;
        return Err(format!("{} has {len} bytes, namespace 1 of {model} has room for {room} only", source.name).into());
    }
    let chunk_len = CHUNK.next_multiple_of(ns.block_size());
    let chunks = (0..len).step_by(chunk_len).map(move |offset| {
        let len = (len - offset).min(chunk_len as u64) as usize;
        Chunk { offset, len, lba: offset / block }
    });
    // As many as both pipelines of the writing hold.
    let pool = Pool::new(controller.device().dma(), 2 * DEPTH * chunk_len, HugePages::No).await?;

    println!("copying {}, {len} bytes, to namespace 1 of {model}: its first {blocks} blocks are overwritten", source.name);
    let file = tokio_uring::fs::File::from_std(source.file);
    let written = write(&ns, &pool, &file, chunks.clone(), Phase::new("written", len)).await?;
    file.close().await?;
    let read = read_back(&ns, &pool, chunks, Phase::new("read back", len)).await?;
    if written != read {
        return Err(format!("what was read back is not the file: its BLAKE3 is {read}, the file's {written}").into());
    }
    println!("both have the BLAKE3 {written}: the device holds the file");
    Ok(())
}

async fn on_device(address: &Address, source: Source) -> Result<()> {
    let device = Device::open(address).await?;
    let controller = Controller::new(&device, Options::default()).await?;
    let copied = copy(&controller, source).await;
    let ended = controller.shutdown().await;
    copied?;
    Ok(ended?)
}

/// All but the exit code.
pub fn run(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<()> {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(help) if help.kind() == error::ErrorKind::DisplayHelp => return Ok(help.print()?),
        Err(error) => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            return Err(format!("{}; see --help", line.strip_prefix("error: ").unwrap_or(line)).into());
        }
    };
    let source = match &arguments.file {
        Some(path) => Source::open(path)?,
        None => Source::random()?,
    };
    // Where io_uring can't be used, this says so; tokio-uring panics.
    let mut guest = Guest::new()?;
    let mut embedded = None;
    let address = match arguments.device {
        Some(address) => address,
        None => {
            println!("no --device: the software controller runs in a thread of this process, its blocks in memory");
            let namespaces = vec![NamespaceConfig::memory(source.len.next_multiple_of(1 << 20))];
            embedded.insert(nvme::spawn(Config { namespaces, ..Config::default() })?).address().parse()?
        }
    };
    tokio_uring::start(async { guest.run(on_device(&address, source)).await? })
}

fn main() -> ExitCode {
    match run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("file_to_nvme: {error}");
            ExitCode::FAILURE
        }
    }
}
