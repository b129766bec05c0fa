//! Virtual functions of an 82576 whose physical function Linux's driver has.
//!
//! `VFIO_URING_TEST_VFS` names two of them, with a comma; `VFIO_URING_TRANSPORT` says `group` or `cdev`. The physical function's
//! interface is up as 192.0.2.1/24, with an MTU of 9000. That is how the emulated machine of `cargo xtask vm` has it.

mod vf;

use std::{
    collections::HashMap,
    env, fs,
    future::Future,
    net::UdpSocket,
    process::Command,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use futures::{StreamExt, future::Either, future::join, future::select, pin_mut};
use vf::{ECHO, HEADERS, HOST, Host, Interface, LINUX, blocking, content};
use vfio_uring::{
    device::{Address, Device},
    dma::Pool,
    reactor::{Idle, Reactor, sleep, timeout},
};
use vfio_uring_igb::{Error, Vf, VfOptions};

/// One test at a time has the functions.
static FUNCTIONS: Mutex<()> = Mutex::new(());
/// What Linux gives the first.
const GIVEN: [u8; 6] = [0x02, 0x82, 0x57, 0x60, 0x00, 0x01];

struct Rig {
    vfs: [String; 2],
    pf: Interface,
}

impl Rig {
    fn address(&self, index: usize) -> Address {
        let transport = env::var("VFIO_URING_TRANSPORT").unwrap_or_else(|_| "group".into());
        format!("{transport}:{}", self.vfs[index]).parse().unwrap()
    }

    async fn device(&self, index: usize) -> Device {
        Device::open(&self.address(index)).await.unwrap()
    }
}

/// Runs a test, within a deadline, where there are such functions.
fn run<T: Future<Output = ()>>(idle: Idle, test: impl FnOnce(Rig) -> T) {
    let Ok(names) = env::var("VFIO_URING_TEST_VFS") else {
        println!("skipped: VFIO_URING_TEST_VFS does not name two virtual functions");
        return;
    };
    let _alone = FUNCTIONS.lock().unwrap_or_else(PoisonError::into_inner);
    let (first, second) = names.split_once(',').unwrap();
    let rig = Rig { vfs: [first.into(), second.into()], pf: Interface::of(first) };
    rig.pf.set_vf_mac(0, GIVEN);
    let reactor = Reactor::builder().idle(idle).build().unwrap();
    reactor.block_on(async { timeout(Duration::from_secs(120), test(rig)).await.expect("no hang") });
}

/// Lets the host answer for as long as `client` runs.
async fn serve<T>(host: &mut Host, client: impl Future<Output = T>) -> T {
    let served = host.serve();
    pin_mut!(served, client);
    match select(served, client).await {
        Either::Left((error, _)) => panic!("the queue ended: {error}"),
        Either::Right((result, _)) => result,
    }
}

async fn ping(host: &mut Host) {
    let before = host.pings;
    let name = HOST.map(|byte| byte.to_string()).join(".");
    let status = blocking(move || Command::new("ping").args(["-c", "5", "-A", "-W", "5", &name]).status());
    assert!(serve(host, status).await.success(), "all pings are answered");
    assert!(host.pings >= before + 5);
}

/// Linux sends packets of all sizes, and looks at what comes back. The host looks at what arrives.
async fn exchange(host: &mut Host, packets: u64, sizes: std::ops::RangeInclusive<usize>) {
    let before = host.echoes;
    let client = blocking(move || {
        let socket = UdpSocket::bind((LINUX, 0))?;
        socket.connect((std::net::Ipv4Addr::from(HOST), ECHO))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut random = fastrand::Rng::with_seed(82576);
        let mut under_way = HashMap::new();
        let mut buffer = vec![0; 16 << 10];
        for number in 0..packets {
            let bytes = content(number, random.usize(sizes.clone()));
            socket.send(&bytes)?;
            under_way.insert(number, bytes);
            while under_way.len() > 8 || number + 1 == packets && !under_way.is_empty() {
                let len = socket.recv(&mut buffer)?;
                let number = u64::from_le_bytes(buffer[..8].try_into().unwrap());
                assert_eq!(
                    under_way.remove(&number).as_deref(),
                    Some(&buffer[..len]),
                    "packet {number} comes back as it was"
                );
            }
        }
        Ok(())
    });
    serve(host, client).await;
    assert_eq!((host.echoes - before, host.wrong), (packets, 0));
}

/// How often this function has interrupted.
fn interrupts(vf: &str) -> u64 {
    let all = fs::read_to_string("/proc/interrupts").unwrap();
    let mine = all.lines().filter(|line| line.contains(vf));
    mine.flat_map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok())).sum()
}

async fn linked(vf: &Vf) {
    let mut changes = vf.link_changes();
    while !changes.next().await.unwrap().unwrap().up {}
}

/// Sees that all of its memory has come back.
async fn all_is_back(memory: &Pool) {
    sleep(Duration::from_millis(10)).await;
    let stats = memory.stats();
    assert_eq!((stats.free, stats.quarantined), (stats.bytes, 0), "everything comes back");
}

/// Stops it, and sees that all of its memory has come back.
async fn stop(vf: Vf, hosts: impl IntoIterator<Item = Host>) {
    let memory = vf.memory().clone();
    vf.stop().await.unwrap();
    for mut host in hosts {
        assert!(matches!(host.serve().await, Error::Stopped));
    }
    all_is_back(&memory).await;
}

async fn talks_to_linux(rig: Rig, options: VfOptions) {
    let device = rig.device(0).await;
    let (vf, mut seeds) = Vf::new(&device, options).await.unwrap();
    assert_eq!(vf.mac(), GIVEN);
    linked(&vf).await;
    let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
    ping(&mut host).await;
    exchange(&mut host, 3000, 18..=1472).await;
    let statistics = vf.statistics().await.unwrap();
    assert!(statistics.rx_packets >= 3005 && statistics.tx_packets >= 3005, "{statistics:?}");
    assert!(statistics.queues.rx_packets >= 3005 && statistics.queues.tx_packets >= 3005, "{statistics:?}");
    if vf.options().interrupt.is_some() {
        assert!(interrupts(&rig.vfs[0]) > 0, "a queue that waits has its interrupt");
    }
    stop(vf, [host]).await;
}

#[test]
fn pings_and_packets_polled() {
    run(Idle::Hybrid, |rig| talks_to_linux(rig, VfOptions::default()));
}

#[test]
fn pings_and_packets_by_interrupt() {
    let options = VfOptions { interrupt: Some(Duration::from_micros(20)), ..VfOptions::default() };
    run(Idle::Park, |rig| talks_to_linux(rig, options));
}

#[test]
fn jumbo_frames_in_several_buffers() {
    run(Idle::Hybrid, async |rig| {
        let device = rig.device(0).await;
        let (vf, mut seeds) = Vf::new(&device, VfOptions { max_frame: 9018, ..VfOptions::default() }).await.unwrap();
        linked(&vf).await;
        let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
        exchange(&mut host, 1000, 18..=9000 - (HEADERS - 14)).await;
        stop(vf, [host]).await;
    });
}

#[test]
fn what_the_physical_function_grants() {
    run(Idle::Hybrid, async |rig| {
        let (first, second) = (rig.device(0).await, rig.device(1).await);
        // Linux has set the first's address, and so does not let it take another.
        let (vf, _) = Vf::new(&first, VfOptions::default()).await.unwrap();
        assert_eq!(vf.mac(), GIVEN);
        assert!(matches!(vf.set_mac([2, 0, 0, 0, 0, 9]).await, Err(Error::Refused(_))));
        assert!(matches!(vf.set_mac([1, 0, 0, 0, 0, 9]).await, Err(Error::Runtime(_))));
        assert_eq!(vf.mac(), GIVEN);
        vf.stop().await.unwrap();
        let other = VfOptions { mac: Some([2, 0, 0, 0, 0, 9]), ..VfOptions::default() };
        assert!(matches!(Vf::new(&first, other).await, Err(Error::Refused(_))));
        // The second may be called what it likes: now something made up.
        let (vf, _) = Vf::new(&second, VfOptions::default()).await.unwrap();
        assert_eq!(vf.mac()[0] & 3, 2);
        vf.set_mac([2, 0, 0, 0, 0, 9]).await.unwrap();
        assert_eq!(vf.mac(), [2, 0, 0, 0, 0, 9]);
        vf.add_mac([2, 0, 0, 0, 0, 10]).await.unwrap();
        vf.clear_macs().await.unwrap();
        vf.add_vlan(5).await.unwrap();
        vf.remove_vlan(5).await.unwrap();
        vf.set_all_multicast(true).await.unwrap();
        vf.set_all_multicast(false).await.unwrap();
        assert!(vf.set_multicast(&[[1, 0, 0x5e, 0, 0, 1]; 31]).await.is_err());
        vf.stop().await.unwrap();
    });
}

#[test]
fn groups_are_received_when_asked_for() {
    run(Idle::Hybrid, async |rig| {
        let device = rig.device(0).await;
        let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await.unwrap();
        linked(&vf).await;
        let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
        // 239.1.2.3
        const GROUP: [u8; 6] = [0x01, 0x00, 0x5e, 0x01, 0x02, 0x03];
        let shout = || {
            blocking(|| {
                UdpSocket::bind((LINUX, 0))?.send_to(b"hello, everybody", (std::net::Ipv4Addr::new(239, 1, 2, 3), 9))
            })
        };
        vf.set_multicast(&[GROUP]).await.unwrap();
        for _ in 0..50 {
            serve(&mut host, shout()).await;
            serve(&mut host, sleep(Duration::from_millis(20))).await;
            if host.groups.contains(&GROUP) {
                break;
            }
        }
        assert!(host.groups.contains(&GROUP));
        vf.set_multicast(&[]).await.unwrap();
        serve(&mut host, sleep(Duration::from_millis(20))).await;
        host.groups.clear();
        serve(&mut host, shout()).await;
        ping(&mut host).await;
        assert!(!host.groups.contains(&GROUP), "{:x?}", host.groups);
        stop(vf, [host]).await;
    });
}

#[test]
fn virtual_functions_talk_to_each_other() {
    run(Idle::Hybrid, async |rig| {
        let (first, second) = (rig.device(0).await, rig.device(1).await);
        let (a, mut seeds_a) = Vf::new(&first, VfOptions::default()).await.unwrap();
        // It sends by both of its queues.
        let two = VfOptions { queues: 2, interrupt: Some(Duration::ZERO), ..VfOptions::default() };
        let (b, mut seeds_b) = Vf::new(&second, two).await.unwrap();
        linked(&a).await;
        let (mut rx_a, _tx_a) = seeds_a.remove(0).start().unwrap();
        let mut pairs: Vec<_> = seeds_b.drain(..).map(|seed| seed.start().unwrap()).collect();
        for number in 0..200_usize {
            let (_, tx) = &mut pairs[number % 2];
            tx.ready().await.unwrap();
            let bytes = [&a.mac()[..], &b.mac(), &[0x88, 0xb5], &content(number as u64, 46 + number)].concat();
            let mut packet = tx.buffers().alloc().unwrap();
            packet.copy_from(&bytes).unwrap();
            tx.send(packet).unwrap();
            // Linux's host sends things to all, now and then.
            let got = loop {
                let got = rx_a.recv().await.unwrap();
                if got.data()[..6] == a.mac() {
                    break got;
                }
            };
            assert_eq!(got.data(), bytes);
        }
        b.stop().await.unwrap();
        a.stop().await.unwrap();
    });
}

#[test]
fn the_link_goes_and_comes() {
    run(Idle::Hybrid, async |rig| {
        let device = rig.device(0).await;
        let options = VfOptions { interrupt: Some(Duration::ZERO), ..VfOptions::default() };
        let (vf, _) = Vf::new(&device, options).await.unwrap();
        linked(&vf).await;
        let mut changes = vf.link_changes();
        assert!(changes.next().await.unwrap().unwrap().up);
        for (how, up) in [("off", false), ("on", true)] {
            assert!(blocking(move || Command::new("host").args(["set_link", "card0", how]).status()).await.success());
            while changes.next().await.unwrap().unwrap().up != up {}
        }
        vf.stop().await.unwrap();
    });
}

#[test]
fn a_reset_of_the_physical_function_is_seen() {
    run(Idle::Hybrid, async |rig| {
        let device = rig.device(0).await;
        let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await.unwrap();
        linked(&vf).await;
        let mut changes = vf.link_changes();
        let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
        ping(&mut host).await;
        rig.pf.set_up(false);
        assert!(matches!(host.serve().await, Error::PfReset));
        let end = loop {
            if let Err(error) = changes.next().await.unwrap() {
                break error;
            }
        };
        assert!(matches!(end, Error::PfReset), "{end}");
        let memory = vf.memory().clone();
        vf.stop().await.unwrap();
        drop(host);
        all_is_back(&memory).await;
        let error = Vf::new(&device, VfOptions::default()).await.map(drop).unwrap_err();
        assert!(matches!(error, Error::Pf(_)), "{error}");
        rig.pf.set_up(true);
        let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await.unwrap();
        linked(&vf).await;
        let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
        ping(&mut host).await;
        stop(vf, [host]).await;
    });
}

#[test]
fn a_reset_of_the_function_is_seen() {
    run(Idle::Hybrid, async |rig| {
        let device = rig.device(0).await;
        for _ in 0..2 {
            let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await.unwrap();
            linked(&vf).await;
            let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
            ping(&mut host).await;
            device.reset().await.unwrap();
            let error = host.serve().await;
            assert!(!matches!(error, Error::Stopped), "{error}");
            let memory = vf.memory().clone();
            vf.stop().await.unwrap();
            drop(host);
            all_is_back(&memory).await;
        }
    });
}

#[test]
fn virtual_functions_are_taken_away_in_use() {
    run(Idle::Hybrid, async |rig| {
        let device = rig.device(0).await;
        let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await.unwrap();
        linked(&vf).await;
        let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
        ping(&mut host).await;
        // The kernel waits until we let go of it, which the runtime does after a while.
        let removal = blocking(rig.pf.without_vfs());
        let (error, ()) = join(host.serve(), removal).await;
        assert!(matches!(error, Error::Runtime(_)), "{error}");
        let memory = vf.memory().clone();
        vf.stop().await.expect("a device that is taken away is stopped");
        drop((host, device));
        all_is_back(&memory).await;
        rig.pf.with_vfs(&rig.vfs);
        rig.pf.set_vf_mac(0, GIVEN);
        let device = rig.device(0).await;
        let (vf, mut seeds) = Vf::new(&device, VfOptions::default()).await.unwrap();
        linked(&vf).await;
        let mut host = Host::new(vf.mac(), seeds.remove(0).start().unwrap());
        ping(&mut host).await;
        stop(vf, [host]).await;
    });
}
