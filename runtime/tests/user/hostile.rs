//! Servers that lie, stall, flood and vanish: an error for everybody who waits, within a deadline.

use std::{
    os::fd::AsFd,
    os::unix::net::{UnixDatagram, UnixListener},
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::join_all};
use vfio_uring::{
    Error,
    device::{Address, Device, Irq, Options},
    dma::HugePages,
    reactor::{Reactor, sleep},
    transport::user::wire::{self, Capabilities, DmaAccess, Header, RegionAccess, Version, command, flags},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    fake::{Fake, Message, Peer},
    impatient, open, patient, run,
};

/// A device whose answer to the first REGION_READ is spoilt, and the error of that read.
fn spoilt(spoil: impl Fn(&mut Peer, &Message) + Send + 'static) -> Error {
    let fake = Fake::run(move |mut peer| {
        while let Some(message) = peer.recv() {
            if message.command() == command::REGION_READ {
                spoil(&mut peer, &message);
                return peer.until_closed();
            }
            peer.answer(&message);
        }
    });
    run(async {
        let device = Device::open_with(&fake.address(), Options { max_outstanding: Some(2), ..patient() }).await.unwrap();
        let bar = device.bar(0).unwrap();
        let mut interrupts = device.interrupts(Irq::MsiX, 0, 1).await.unwrap();
        let mapping = device.dma().map(4096, HugePages::No).await.unwrap();
        let both = [bar.read::<u32>(8), bar.read::<u32>(16)];
        let errors: Vec<Error> = join_all(both).await.into_iter().map(Result::unwrap_err).collect();
        // The one beside it got the same, and all who come later learn the reason.
        assert_eq!(errors[0].to_string(), errors[1].to_string());
        let later = bar.read::<u32>(8).await.unwrap_err();
        assert!(matches!(&later, Error::Gone { reason } if errors[0].to_string().contains(&**reason)), "{later}");
        assert_eq!(device.gone().await.to_string(), errors[0].to_string());
        assert!(device.is_gone().is_some() && device.connection().unwrap().is_gone());
        assert!(interrupts[0].next().await.unwrap().is_err() && interrupts[0].next().await.is_none());
        assert!(interrupts[0].take_count().await.is_err());
        assert!(device.reset().await.is_err() && device.dma().map(4096, HugePages::No).await.is_err());
        drop(mapping);
        assert_eq!(device.dma().stats().retired, 0);
        errors.into_iter().next().unwrap()
    })
}

fn fault(spoil: impl Fn(&mut Peer, &Message) + Send + 'static, part: &str) {
    let error = spoilt(spoil);
    assert!(matches!(&error, Error::DeviceFault { what } if what.contains(part)), "{error} does not name {part:?}");
}

/// The right payload of a read of 4 bytes.
fn good(message: &Message) -> Vec<u8> {
    [&message.payload[..], &[0; 4]].concat()
}

fn with_header(change: impl Fn(&mut Header) + Send + 'static) -> impl Fn(&mut Peer, &Message) + Send + 'static {
    move |peer, message| {
        let payload = good(message);
        let mut header = message.header.reply(payload.len());
        change(&mut header);
        peer.send(&[header.as_bytes(), &payload].concat(), &[]);
    }
}

#[test]
fn lies_in_the_header() {
    fault(with_header(|header| header.msg_id = 0x999.into()), "which waits for none");
    fault(with_header(|header| header.command = command::REGION_WRITE.into()), "names command 10");
    fault(with_header(|header| header.size = 0.into()), "shorter than the header");
    fault(with_header(|header| header.size = 15.into()), "shorter than the header");
    fault(with_header(|header| header.size = u32::MAX.into()), "above the limit");
    fault(with_header(|header| header.size = 37.into()), "above the limit");
    fault(with_header(|header| header.size = 35.into()), "carries 19 bytes, 20 are due");
    fault(with_header(|header| header.size = 16.into()), "carries 0 bytes");
    fault(with_header(|header| header.flags = 2.into()), "message type 2");
    fault(with_header(|header| header.flags = 0xf.into()), "message type 15");
    fault(with_header(|header| header.flags = (flags::REPLY | flags::ERROR).into()), "error reply carries 20 bytes");
}

#[test]
fn lies_in_the_payload() {
    fn echo(change: impl Fn(&mut RegionAccess) + Send + 'static) -> impl Fn(&mut Peer, &Message) + Send + 'static {
        move |peer, message| {
            let mut access = RegionAccess::read_from_bytes(&message.payload[..]).unwrap();
            change(&mut access);
            peer.reply(message, &[access.as_bytes(), &[0; 4]].concat());
        }
    }
    fault(echo(|access| access.count = 2.into()), "is for 2 bytes");
    fault(echo(|access| access.offset = 1.into()), "at 0x1 of region 0");
    fault(echo(|access| access.region = 1.into()), "of region 1");
}

#[test]
fn descriptors_that_nobody_asked_for() {
    fn with_fds(n: usize) -> impl Fn(&mut Peer, &Message) + Send + 'static {
        move |peer, message| {
            let file = tempfile::tempfile().unwrap();
            let payload = good(message);
            peer.send(&[message.header.reply(payload.len()).as_bytes(), &payload].concat(), &vec![file.as_fd(); n]);
        }
    }
    fault(with_fds(1), "brought 1 descriptors, 0 are allowed");
    fault(with_fds(40), "descriptors of a message were lost");
    // With the payload instead of the header.
    fault(
        |peer, message| {
            let file = tempfile::tempfile().unwrap();
            peer.send(message.header.reply(20).as_bytes(), &[]);
            peer.send(&good(message), &[file.as_fd()]);
        },
        "brought 1 descriptors",
    );
    fault(
        |peer, message| {
            let file = tempfile::tempfile().unwrap();
            peer.send(message.header.error_reply(5).as_bytes(), &[file.as_fd()]);
        },
        "brought 1 descriptors",
    );
    fn command_with_fd(peer: &mut Peer, _: &Message) {
        let file = tempfile::tempfile().unwrap();
        let payload = DmaAccess { address: 0x1000.into(), count: 4.into() };
        peer.send(&[Header::command(1, command::DMA_READ, 16).as_bytes(), payload.as_bytes()].concat(), &[file.as_fd()]);
        let reply = peer.recv().filter(|reply| reply.header.is_reply()).or_else(|| peer.recv()).unwrap();
        assert_eq!(reply.header.error(), Some(libc::EINVAL));
        peer.send(&[0; 16], &[]);
    }
    fault(command_with_fd, "shorter than the header");
}

#[test]
fn a_reply_that_comes_twice() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::REGION_READ {
            peer.answer(message);
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        assert!(device.bar(0).unwrap().read::<u32>(0).await.is_ok());
        let error = device.gone().await;
        assert!(matches!(&error, Error::DeviceFault { what } if what.contains("waits for none")), "{error}");
    });
}

#[test]
fn a_refusal_is_no_fault() {
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::REGION_READ {
            let mut header = message.header.error_reply(libc::EPERM as u32);
            if message.payload[0] == 4 {
                // Some servers don't say which error.
                header.error = 0.into();
            }
            peer.send(header.as_bytes(), &[]);
            return true;
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        let bar = device.bar(0).unwrap();
        for (offset, errno) in [(0, libc::EPERM), (4, libc::EIO)] {
            match bar.read::<u32>(offset).await {
                Err(Error::Refused { command, source }) => {
                    assert_eq!((&*command, source.raw_os_error()), ("REGION_READ", Some(errno)));
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(device.is_gone().is_none() && bar.write::<u32>(0, 1).await.is_ok());
        assert!(device.config().read::<u32>(0).await.is_err());
    });
}

#[test]
fn a_server_that_stalls() {
    for part in [0, 10, 16, 20] {
        let fake = Fake::hooked(move |peer, message| {
            if message.command() == command::REGION_READ {
                let payload = good(message);
                let reply = [message.header.reply(payload.len()).as_bytes(), &payload].concat();
                if part != 0 {
                    peer.send(&reply[..part], &[]);
                }
                return true;
            }
            false
        });
        run(async {
            let device = Device::open_with(&fake.address(), impatient()).await.unwrap();
            let bar = device.bar(0).unwrap();
            // Eight wait for a slot behind the first: none of them longer than that one's deadline.
            let results = join_all((0..9).map(|_| bar.read::<u32>(0))).await;
            for result in results {
                assert!(matches!(&result, Err(Error::Timeout { .. })), "{result:?}");
            }
            assert!(matches!(bar.read::<u32>(0).await, Err(Error::Gone { .. })));
        });
    }
}

#[test]
fn a_stall_ends_the_connection_though_nobody_waits() {
    let fake = Fake::hooked(|_, message| message.command() == command::REGION_READ);
    run(async {
        let device = Device::open_with(&fake.address(), impatient()).await.unwrap();
        let bar = device.bar(0).unwrap();
        let mut read = Box::pin(bar.read::<u32>(0));
        assert!(read.as_mut().now_or_never().is_none());
        sleep(Duration::from_millis(20)).await;
        drop(read);
        assert!(matches!(device.gone().await, Error::Timeout { .. }));
    });
    // And when it stalls in the middle of a command of its own.
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::REGION_WRITE {
            peer.answer(message);
            peer.send(Header::command(1, command::DMA_WRITE, 20).as_bytes(), &[]);
            return true;
        }
        false
    });
    run(async {
        let device = Device::open_with(&fake.address(), impatient()).await.unwrap();
        device.bar(0).unwrap().write::<u32>(0, 0).await.unwrap();
        assert!(matches!(device.gone().await, Error::Timeout { .. }));
    });
}

#[test]
fn a_server_that_reads_nothing() {
    let fake = Fake::run(|mut peer| {
        peer.device.bar0 = vec![0; 1 << 20];
        while let Some(message) = peer.recv() {
            if message.command() == command::REGION_READ {
                return peer.until_hung_up();
            }
            peer.answer(&message);
        }
    });
    run(async {
        let options = Options { max_outstanding: Some(4), ..impatient() };
        let device = Device::open_with(&fake.address(), options).await.unwrap();
        let region = device.region(0).unwrap();
        let (mut back, data) = ([0; 4], vec![7; 1 << 20]);
        let (read, write) = futures::join!(region.read(0, &mut back), region.write(0, &data));
        assert!(matches!(read, Err(Error::Timeout { .. })) && matches!(write, Err(Error::Timeout { .. })));
    });
}

#[test]
fn a_server_that_vanishes() {
    for part in [0, 5, 16, 30] {
        let error = spoilt(move |peer, message| {
            let payload = good(message);
            let reply = [message.header.reply(payload.len()).as_bytes(), &payload].concat();
            peer.send(&reply[..part], &[]);
            peer.hang_up();
        });
        assert!(matches!(&error, Error::Gone { reason } if reason.contains("closed the connection")), "{error}");
    }
    // While nobody waits for anything.
    let fake = Fake::run(|mut peer| {
        for _ in 0..16 {
            let message = peer.recv().unwrap();
            peer.answer(&message);
        }
    });
    run(async {
        let device = open(&fake).await;
        assert!(matches!(device.gone().await, Error::Gone { .. }));
        assert!(matches!(device.bar(0).unwrap().read::<u32>(0).await, Err(Error::Gone { .. })));
    });
}

#[test]
fn a_server_that_floods() {
    // Unasked replies, and requests without end that nobody may answer: they don't keep others from their deadline.
    let fake = Fake::hooked(|peer, message| {
        if message.command() != command::REGION_READ {
            return false;
        }
        let mut header = Header::command(0, command::DMA_READ, 16);
        header.flags = flags::NO_REPLY.into();
        let access = DmaAccess { address: 0x1000.into(), count: (1 << 20).into() };
        let flood = [header.as_bytes(), access.as_bytes()].concat().repeat(100);
        while peer.try_send(&flood) {}
        true
    });
    run(async {
        let device = Device::open_with(&fake.address(), impatient()).await.unwrap();
        assert!(matches!(device.bar(0).unwrap().read::<u32>(0).await, Err(Error::Timeout { .. })));
    });
    fault(
        |peer, _| {
            let access = DmaAccess { address: 0x1000.into(), count: (4 << 20).into() };
            let header = Header::command(0, command::DMA_WRITE, 16 + (4 << 20));
            peer.send(&[header.as_bytes(), access.as_bytes()].concat(), &[]);
        },
        "above the limit",
    );
    fault(|peer, _| peer.send(Header::command(0, 77, 5000).as_bytes(), &[]), "above the limit");
}

/// What opening a device gives when VERSION, or the command `number`, is answered with `payload`.
fn open_with_reply(number: u16, payload: Vec<u8>) -> Error {
    let fake = Fake::hooked(move |peer, message| {
        let spoil = message.command() == number;
        if spoil {
            peer.reply(message, &payload);
        }
        spoil
    });
    run(Device::open_with(&fake.address(), patient())).unwrap_err()
}

#[test]
fn versions_and_limits_that_make_no_sense() {
    let json = |capabilities: Capabilities| wire::version_payload(Version::default(), &capabilities);
    let ranges = |ranges: &[[u64; 2]]| json(Capabilities { iova_ranges: Some(ranges.into()), ..Default::default() });
    let raw = |text: &str| [&[0; 4], text.as_bytes(), &[0]].concat();
    for (payload, part) in [
        (vec![1, 0, 0, 0], "version 1.0"),
        (vec![0, 0, 1, 0], "version 0.1"),
        (vec![0, 0], "carries 2 bytes"),
        (vec![0; 5000], "above the limit"),
        (b"\0\0\0\0{}".to_vec(), "NUL"),
        (raw("{"), "not valid"),
        (raw(&"[".repeat(4000)), "not valid"),
        (raw(r#"{"capabilities":{"max_msg_fds":-1}}"#), "not valid"),
        (json(Capabilities { max_data_xfer_size: Some(0), ..Default::default() }), "max_data_xfer_size 0"),
        (json(Capabilities { pgsizes: Some(0), ..Default::default() }), "pgsizes"),
        (json(Capabilities { pgsizes: Some(1 << 63), ..Default::default() }), "pgsizes"),
        (ranges(&[]), "0 iova_ranges"),
        (ranges(&[[0, 0xffff]; 65]), "65 iova_ranges"),
        (ranges(&[[0, 0xffff], [2, 1]]), "0x2..=0x1"),
        (ranges(&[[1, 0x1ffe]]), "no page"),
        (ranges(&[[u64::MAX, u64::MAX]]), "no page"),
        (raw(r#"{"capabilities":{"iova_ranges":[[1]]}}"#), "not valid"),
    ] {
        let error = open_with_reply(command::VERSION, payload);
        assert!(matches!(&error, Error::DeviceFault { what } if what.contains(part)), "{error} does not name {part:?}");
    }
    let error = open_with_reply(command::DEVICE_GET_INFO, [16u32, 3, 1 << 30, 5].as_bytes().to_vec());
    assert!(matches!(&error, Error::DeviceFault { what } if what.contains("1073741824 regions")), "{error}");
    let error = open_with_reply(command::DEVICE_GET_IRQ_INFO, [16u32, 1, 77, 5].as_bytes().to_vec());
    assert!(matches!(&error, Error::DeviceFault { what } if what.contains("describes 77")), "{error}");
    let error = open_with_reply(command::DEVICE_GET_REGION_INFO, [32u32, 15, 5, 0, 0, 0, 0, 0].as_bytes().to_vec());
    assert!(matches!(&error, Error::DeviceFault { what } if what.contains("describes region 5")), "{error}");
    let error = open_with_reply(command::DEVICE_GET_REGION_INFO, [99999u32, 15, 0, 0, 0, 0, 0, 0].as_bytes().to_vec());
    assert!(matches!(&error, Error::DeviceFault { what } if what.contains("need 99999 bytes")), "{error}");
    // One that is never content.
    let fake = Fake::hooked(|peer, message| {
        let again = message.command() == command::DEVICE_GET_REGION_INFO;
        if again {
            let mut info = wire::RegionInfo::read_from_bytes(&message.payload[..]).unwrap();
            (info.argsz, info.flags) = ((info.argsz.get() + 1).into(), 15.into());
            peer.reply(message, info.as_bytes());
        }
        again
    });
    let error = run(Device::open_with(&fake.address(), patient())).unwrap_err();
    assert!(matches!(&error, Error::DeviceFault { what } if what.contains("asks for more room")), "{error}");
}

#[test]
fn limits_of_any_size_are_clamped() {
    let all = |n| Capabilities {
        max_msg_fds: Some(n),
        max_data_xfer_size: Some(n),
        max_dma_maps: Some(n),
        max_outstanding: Some(n),
        pgsizes: None,
        write_multiple: None,
        iova_ranges: None,
    };
    let fake = Fake::hooked(move |peer, _| {
        peer.device.version = wire::version_payload(Version::default(), &all(u64::MAX));
        false
    });
    run(async {
        let device = open(&fake).await;
        let limits = device.connection().unwrap().limits();
        assert_eq!((limits.max_msg_fds, limits.max_data_xfer, limits.max_outstanding), (64, 1 << 20, 64));
        assert_eq!((limits.max_dma_maps, limits.page_size), (65535, 4096));
    });
}

#[test]
fn what_can_not_be_mapped_is_refused() {
    // The descriptor is shorter than the areas.
    let fake = Fake::hooked(|peer, message| {
        if message.command() == command::DEVICE_GET_REGION_INFO && message.payload[8] == 0 {
            let info = wire::RegionInfo { argsz: 32.into(), flags: 7.into(), size: 0x2000.into(), ..Default::default() };
            let file = tempfile::tempfile().unwrap();
            peer.send(&[message.header.reply(32).as_bytes(), info.as_bytes()].concat(), &[file.as_fd()]);
            return true;
        }
        if message.command() == command::DEVICE_GET_REGION_INFO && message.payload[8] == 1 {
            // To be mapped, but nothing to map: messages will do.
            let info = wire::RegionInfo {
                argsz: 32.into(),
                flags: 7.into(),
                index: 1.into(),
                size: 64.into(),
                ..Default::default()
            };
            peer.reply(message, info.as_bytes());
            return true;
        }
        false
    });
    run(async {
        let device = open(&fake).await;
        assert!(matches!(device.bar(0), Err(Error::DeviceFault { .. })));
        assert!(device.is_gone().is_none() && device.bar(2).is_ok());
        assert!(device.bar(1).unwrap().mapped().is_empty());
    });
}

#[test]
fn nobody_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let error = |name: &str| run(Device::open(&Address::User(path(name)))).unwrap_err().to_string();
    assert!(error("missing").contains("no such socket"));
    std::fs::write(path("file"), "").unwrap();
    assert!(error("file").contains("not a socket"));
    drop(UnixListener::bind(path("left")).unwrap());
    assert!(error("left").contains("nobody listens"));
    let _datagram = UnixDatagram::bind(path("datagram")).unwrap();
    assert!(error("datagram").contains("not a stream socket"));
    assert!(error(&"x".repeat(200)).contains("107 bytes"));
    // One that never accepts: the connection waits for VERSION, and one that can't even do that.
    let listener = UnixListener::bind(path("deaf")).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let open = || run(Device::open_with(&Address::User(path("deaf")), impatient()));
    assert!(matches!(open(), Err(Error::Timeout { .. })));
    assert!(matches!(open(), Err(Error::Timeout { .. })));
    assert!(matches!(open(), Err(Error::Timeout { .. })));
    let address = Address::User(path("deaf"));
    let open = Device::open_with(&address, patient());
    assert!(matches!(open.now_or_never(), Some(Err(Error::NoReactor { .. }))));
}

#[test]
fn a_device_outlives_its_reactor() {
    let fake = Fake::hooked(|_, _| false);
    let first = Reactor::new().unwrap();
    let device = first.block_on(open(&fake));
    drop(first);
    let error = run(async { device.reset().await.unwrap_err() });
    assert!(matches!(&error, Error::Gone { reason } if reason.contains("reactor")), "{error}");
    drop(device);
}

#[test]
fn any_byte_may_be_wrong() {
    // One spoilt byte somewhere in all that a server sends: whatever it hits, nothing hangs and nothing panics.
    let mut random = 1u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % below
    };
    let fakes: Vec<Fake> = (0..96)
        .map(|_| {
            let spoil = (next(900) as usize, 1 << next(8));
            Fake::run(move |mut peer| {
                peer.spoil = Some(spoil);
                while let Some(message) = peer.recv() {
                    peer.answer(&message);
                }
            })
        })
        .collect();
    run(async {
        join_all(fakes.iter().map(|fake| async move {
            let device = Device::open_with(&fake.address(), impatient()).await?;
            let _ = device.config().capabilities().await;
            let _ = device.bar(2).map(|bar| bar.mapped());
            device.bar(0)?.write::<u32>(0, 1).await?;
            let _interrupts = device.interrupts(Irq::MsiX, 0, 2).await?;
            drop(device.dma().map(4096, HugePages::No).await?);
            device.dma().reclaim().await;
            device.reset().await
        }))
        .await
    });
}
