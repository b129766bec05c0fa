//! The example of that name: what it leaves on the device, and what it says when it can't.

use std::{fs, io::Write, sync::mpsc, thread, time::Duration};

use tempfile::NamedTempFile;
use vfio_uring::{
    device::Device,
    dma::{HugePages, Pool},
    reactor::Reactor,
};
use vfio_uring_models::{
    nvme::{self, Config, Faults, NamespaceConfig},
    server::Running,
};
use vfio_uring_nvme::{Controller, Options};

#[path = "../examples/file_to_nvme.rs"]
#[expect(dead_code, reason = "its main function")]
mod file_to_nvme;

/// A file of `len` bytes that don't repeat.
fn file(len: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let data: Vec<_> = (0..len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    file.write_all(&data).unwrap();
    file
}

fn serve(bytes: u64, lba_size: u32, faults: Faults) -> Running {
    let namespaces = vec![NamespaceConfig::memory(bytes).with_lba_size(lba_size)];
    nvme::spawn(Config { namespaces, faults, ..Config::default() }).unwrap()
}

fn run(arguments: &[&str]) -> Result<(), String> {
    let arguments: Vec<_> = ["file_to_nvme"].iter().chain(arguments).map(|argument| argument.to_string()).collect();
    let (sender, result) = mpsc::channel();
    let thread = thread::spawn(move || {
        let _ = sender.send(file_to_nvme::run(arguments).map_err(|error| error.to_string()));
    });
    match result.recv_timeout(Duration::from_secs(120)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("{:?}", thread.join()),
        Ok(result) => result,
    }
}

fn copy(file: &NamedTempFile, server: &Running) -> Result<(), String> {
    run(&[file.path().to_str().unwrap(), "--device", &server.address().to_string()])
}

/// The first bytes of the device, read without the example.
fn device(server: &Running, len: usize) -> Vec<u8> {
    Reactor::new().unwrap().block_on(async {
        let device = Device::open(&server.address().parse().unwrap()).await.unwrap();
        let controller = Controller::new(&device, Options::default()).await.unwrap();
        let ns = controller.create_queue(4).await.unwrap().namespace(1).unwrap();
        let pool = Pool::new(device.dma(), len, HugePages::No).await.unwrap();
        let (read, buf) = ns.read(0, pool.alloc(len).unwrap()).await;
        read.unwrap();
        controller.shutdown().await.unwrap();
        buf.to_vec()
    })
}

#[test]
fn a_file_on_the_embedded_controller() {
    run(&[file(100_000).path().to_str().unwrap()]).unwrap();
}

#[test]
fn the_device_holds_the_file() {
    // A block and less, whole chunks, many chunks with a part of a block; the last fills the namespace.
    for (len, lba_size) in [(1, 512), (512, 512), (3 << 17, 4096), ((4 << 20) - 700, 512), ((4 << 20) - 1, 65536)] {
        let (file, server) = (file(len), serve(4 << 20, lba_size, Faults::default()));
        copy(&file, &server).unwrap();
        let whole = len.next_multiple_of(lba_size as usize);
        let (mut held, data) = (device(&server, whole), fs::read(&file).unwrap());
        assert!(held.split_off(len).iter().all(|&byte| byte == 0), "{len}: the rest of the block is zero");
        assert!(held == data, "{len} bytes in blocks of {lba_size}");
    }
}

#[test]
fn a_file_that_does_not_fit_leaves_the_device_alone() {
    let server = serve(1 << 20, 512, Faults::default());
    let error = copy(&file((1 << 20) + 1), &server).unwrap_err();
    assert!(
        error.ends_with("has 1048577 bytes, namespace 1 of vfio-uring software NVMe has room for 1048576 only"),
        "{error}"
    );
    assert_eq!(device(&server, 4096), [0; 4096]);
}

#[test]
fn a_device_that_fails() {
    let server = serve(1 << 20, 512, Faults { error_lba: Some(700), ..Faults::default() });
    let error = copy(&file(1 << 20), &server).unwrap_err();
    assert!(
        error.starts_with("writing 131072 bytes to block 512: the controller failed") && error.lines().count() == 1,
        "{error}"
    );
}

#[test]
fn what_is_wrong_is_one_line() {
    let empty = NamedTempFile::new().unwrap();
    let empty = empty.path().to_str().unwrap();
    for (arguments, part) in [
        (&["/nonexistent"][..], "/nonexistent: No such file"),
        (&["/"], "is not a file with anything in it"),
        (&[empty], "is not a file with anything in it"),
        (&[empty, empty], "unexpected argument"),
        (&["--device", "nonsense"], "is not a device address"),
        (&["--devise"], "unexpected argument '--devise' found; see --help"),
    ] {
        let error = run(arguments).unwrap_err();
        assert!(error.contains(part) && error.lines().count() == 1, "{error}");
    }
}
