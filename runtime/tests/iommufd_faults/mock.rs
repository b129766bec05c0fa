//! Mock devices (`drivers/iommu/iommufd/iommufd_test.h` of Linux 7.2; not a stable interface).

use std::{
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use iommufd_bindings as abi;
use rustix::io::Errno;
use vfio_uring::{
    Error, Result,
    fault::iommufd::Attach,
    transport::iommufd::{Hwpt, Ioas, IommufdFd, Viommu},
};

/// `IOMMU_TEST_CMD`.
const TEST: u8 = 0xa0;
const MOCK_DOMAIN: u32 = 2;
const MOCK_DOMAIN_REPLACE: u32 = 10;
const TRIGGER_IOPF: u32 = 15;
const TRIGGER_VEVENT: u32 = 17;

/// `IOMMU_VIOMMU_TYPE_SELFTEST`.
pub const VIOMMU: u32 = 0xdead_beef;
/// `IOMMU_VEVENTQ_TYPE_SELFTEST`: its data is the device's number, 4 bytes.
pub const EVENTS: u32 = 0xbeef_beef;
/// `IOMMU_HWPT_DATA_SELFTEST`.
const NESTED: u32 = 0xdead;

/// `struct iommu_test_cmd`: size, op, id, reserved, a union of 48 bytes, `last`, padding.
type Command = [u32; 18];

/// One test at a time, if there are mock devices here.
pub fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let probe = IommufdFd::open().map(|context| test(&context, 0, 0, &[]));
    match probe {
        Ok(Err(Errno::OPNOTSUPP)) => Some(turn),
        other => {
            eprintln!("skipped: no mock devices of iommufd here ({other:?})");
            None
        }
    }
}

/// Issues a command of the tests; the whole argument as the kernel leaves it.
fn test(context: &IommufdFd, op: u32, id: u32, arguments: &[u32]) -> Result<Command, Errno> {
    let mut command: Command = [0; 18];
    command[..3].copy_from_slice(&[size_of::<Command>() as u32, op, id]);
    command[4..4 + arguments.len()].copy_from_slice(arguments);
    ioctl(context, TEST, &mut command).map(|()| command)
}

fn ioctl<T>(context: &IommufdFd, nr: u8, argument: &mut T) -> Result<(), Errno> {
    let request = (b';' as u32) << 8 | u32::from(nr);
    // SAFETY: the commands issued here read and write as many bytes as the in-band size says, which are those of `T`; what
    // `nested` points to is alive in the call.
    let result = unsafe { libc::ioctl(context.as_fd().as_raw_fd(), request.into(), std::ptr::from_mut(argument)) };
    match result {
        0.. => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
    }
}

/// Destroys an object by its number.
pub fn destroy(context: &IommufdFd, id: u32) -> Result<(), Errno> {
    let size = size_of::<abi::iommu_destroy>() as u32;
    ioctl(context, abi::IOMMUFD_CMD_DESTROY as u8, &mut abi::iommu_destroy { size, id })
}

/// A mock device in an address space. A handle.
#[derive(Clone)]
pub struct Mock(Arc<Inner>);

struct Inner {
    ioas: Ioas,
    /// What it is destroyed and attached by.
    id: u32,
    /// What it is called in all other commands.
    device_id: u32,
}

impl Mock {
    pub fn new() -> Self {
        let context = IommufdFd::open().unwrap();
        let ioas = Ioas::alloc(&context).unwrap();
        let made = test(&context, MOCK_DOMAIN, ioas.id(), &[]).unwrap();
        Self(Arc::new(Inner { ioas, id: made[4], device_id: made[6] }))
    }

    pub fn context(&self) -> &IommufdFd {
        self.0.ioas.context()
    }

    /// It asks for a page to write to, as the only one of its group.
    pub fn ask(&self, address: u64, group_index: u32) {
        let (low, high) = (address as u32, (address >> 32) as u32);
        let [first, second] = if cfg!(target_endian = "little") { [low, high] } else { [high, low] };
        test(self.context(), TRIGGER_IOPF, 0, &[self.device_id(), 0, group_index, 2, first, second]).unwrap();
    }

    /// Its virtual IOMMU reports events of it.
    pub fn report(&self, events: usize) {
        for _ in 0..events {
            test(self.context(), TRIGGER_VEVENT, 0, &[self.device_id()]).unwrap();
        }
    }

    pub fn replace(&self, id: u32) -> Result<()> {
        let replaced = test(self.context(), MOCK_DOMAIN_REPLACE, self.0.id, &[id]);
        replaced.map(drop).map_err(|errno| Error::io("attaching a mock device", errno))
    }

    /// A nested table of the virtual IOMMU: its number.
    pub fn nested(&self, viommu: &Viommu) -> u32 {
        let data = 0u32;
        let mut arg = abi::iommu_hwpt_alloc {
            size: size_of::<abi::iommu_hwpt_alloc>() as u32,
            dev_id: self.device_id(),
            pt_id: viommu.id(),
            data_type: NESTED,
            data_len: size_of_val(&data) as u32,
            data_uptr: (&raw const data).expose_provenance() as u64,
            ..Default::default()
        };
        ioctl(self.context(), abi::IOMMUFD_CMD_HWPT_ALLOC as u8, &mut arg).unwrap();
        arg.out_hwpt_id
    }

    /// Destroys the device and then the address space: everything else of the context must have let go of them.
    pub fn end(self) {
        let inner = Arc::into_inner(self.0).expect("the last handle");
        destroy(inner.ioas.context(), inner.id).unwrap();
        inner.ioas.destroy().unwrap();
    }
}

impl Attach for Mock {
    fn name(&self) -> &str {
        "the mock device"
    }

    fn device_id(&self) -> u32 {
        self.0.device_id
    }

    fn ioas(&self) -> &Ioas {
        &self.0.ioas
    }

    fn attach(&self, table: &Hwpt) -> Result<()> {
        self.replace(table.id())
    }

    fn release(&self) -> Result<()> {
        self.replace(self.0.ioas.id())
    }
}

/// Answers what waits in the one fault queue of this process, by way of its descriptor, and says how many waited.
pub fn left_waiting() -> usize {
    let fds = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        let target = fs::read_link(entry.path()).ok()?;
        target.to_str()?.contains("iommufd-pgfault").then(|| entry.file_name().to_str()?.parse().ok())?
    });
    let fds: Vec<i32> = fds.collect();
    let [fd] = fds[..] else { panic!("{} fault queues are open", fds.len()) };
    // SAFETY: it is open, as was just seen, and the test that has the turn does not close it in here.
    left_in(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// The same for a queue whose descriptor is at hand.
pub fn left_in(fd: BorrowedFd<'_>) -> usize {
    // The kernel's cookies start at the lowest free number.
    let answers = (0..256u32).map(|cookie| rustix::io::write(fd, &[cookie.to_ne_bytes(), 1u32.to_ne_bytes()].concat()));
    answers.filter(|answer| *answer == Ok(8)).count()
}
