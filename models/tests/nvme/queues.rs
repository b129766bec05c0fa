//! Commands through queues in a client's memory, over the socket.

use std::{os::fd::AsFd, thread, time::Duration};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vfio_uring::transport::user::wire::{DmaAccess, Header, SetIrqs, command};
use vfio_uring_models::{
    nvme::{self, Config, Controller, Faults, NamespaceConfig},
    server::{Running, Server},
};
use zerocopy::{FromBytes, IntoBytes};

use crate::common::{Client, DATA, Driver, LIMIT};

fn spawn(config: Config) -> Running {
    nvme::spawn(config).unwrap()
}

fn driver(server: &Running) -> Driver {
    Driver::new(Client::connect(server.path()))
}

#[test]
fn identify_and_read_back() {
    let server = spawn(Config::default());
    let mut driver = driver(&server).with_io_queue();
    driver.admin(6, 0, driver.iova(DATA), [1, 0, 0]).ok();
    let mut model = [0; 40];
    driver.memory.memory.read(DATA + 24, &mut model).unwrap();
    assert!(model.starts_with(b"vfio-uring software NVMe  "));
    driver.memory.memory.fill(DATA, 8192, 0xa5).unwrap();
    driver.io(1, 100, 16).ok();
    driver.memory.memory.fill(DATA, 8192, 0).unwrap();
    driver.io(2, 100, 16).ok();
    let mut data = [0; 8192];
    driver.memory.memory.read(DATA, &mut data).unwrap();
    assert!(data.iter().all(|&byte| byte == 0xa5));
    driver.io(2, 99, 1).ok();
    assert_eq!(driver.memory.memory.load_u32(DATA), Ok(0));
    assert_eq!(driver.io(2, 1 << 21, 1).status, 0x80, "out of range");
    // Several rounds of the rings.
    for lba in 0..100 {
        driver.io(2, lba, 8).ok();
    }
    assert!(server.stats().commands() >= 100);
}

#[test]
fn interrupt_after_a_completion() {
    let server = spawn(Config::default());
    let mut driver = driver(&server);
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap();
    let set = SetIrqs { argsz: 20.into(), flags: 0x24.into(), index: 2.into(), start: 1.into(), count: 1.into() };
    let reply = driver.client.ask_with(command::DEVICE_SET_IRQS, set.as_bytes(), &[event.as_fd()]);
    assert_eq!(reply.header.error(), None);
    let mut driver = driver.with_io_queue();
    driver.submit(1, 2, 1, [driver.iova(DATA), 0], [0, 0, 7]);
    let limit = LIMIT.try_into().unwrap();
    assert_eq!(poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&limit)), Ok(1));
    assert!(driver.poll(1).is_some(), "the entry is there before the interrupt");
}

#[test]
fn a_disk_in_a_file_survives_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let config =
        Config { namespaces: vec![NamespaceConfig::file(&path, 64 << 20).with_lba_size(4096)], ..Config::default() };
    {
        let server = spawn(config.clone());
        let mut driver = driver(&server).with_io_queue();
        driver.memory.memory.fill(DATA, 8192, 0x77).unwrap();
        driver.io(1, 5, 2).ok();
        driver.submit(1, 0, 1, [0; 2], [0; 3]);
        assert_eq!(driver.complete(1).status, 0);
    }
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 << 20);
    let server = spawn(config);
    let mut driver = driver(&server).with_io_queue();
    driver.io(2, 6, 1).ok();
    assert_eq!(driver.memory.memory.load_u32(DATA), Ok(0x7777_7777));
    driver.io(2, 7, 1).ok();
    assert_eq!(driver.memory.memory.load_u32(DATA), Ok(0));
}

/// Answers DMA requests for a range of the client's memory, until the completion is there.
fn serve_dma(client: &mut Client, memory: &mut [u8], iova: u64) -> (u32, Vec<Header>) {
    let (mut served, mut others) = (0, Vec::new());
    client.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    while rustix::event::poll(
        &mut [PollFd::new(&client.stream, PollFlags::IN)],
        Some(&Duration::from_millis(300).try_into().unwrap()),
    ) == Ok(1)
    {
        let message = client.recv();
        if message.header.is_reply() {
            others.push(message.header);
            continue;
        }
        let (access, data) = DmaAccess::read_from_prefix(&message.payload).unwrap();
        let at = (access.address.get() - iova) as usize;
        let len = access.count.get() as usize;
        let payload = match message.header.command.get() {
            command::DMA_READ => [access.as_bytes(), &memory[at..at + len]].concat(),
            _ => {
                memory[at..at + len].copy_from_slice(data);
                access.as_bytes().to_vec()
            }
        };
        // A command of ours goes in between, and must not be lost.
        let in_between = Header::command(0x1234, command::DEVICE_RESET + 50, 0);
        if served == 0 {
            client.send_raw(in_between.as_bytes(), &[]);
        }
        client.send_raw(&[message.header.reply(payload.len()).as_bytes(), &payload].concat(), &[]);
        served += 1;
    }
    client.stream.set_read_timeout(Some(LIMIT)).unwrap();
    (served, others)
}

#[test]
fn memory_without_a_descriptor_is_served_by_messages() {
    const IOVA: u64 = 0x8000_0000;
    let server = spawn(Config::default());
    let mut driver = driver(&server).with_io_queue();
    driver.client.map(IOVA, 0x10_0000, None).unwrap();
    let mut memory: Vec<u8> = (0..0x10_0000).map(|i| (i % 251) as u8).collect();
    // A list of pages in that memory, too: 16 pages from 0x1000 to lba 0.
    for i in 0..15u64 {
        memory[i as usize * 8..][..8].copy_from_slice(&(IOVA + 0x2000 + i * 0x1000).to_le_bytes());
    }
    driver.submit(1, 1, 1, [IOVA + 0x1000, IOVA], [0, 0, 127]);
    let (served, others) = serve_dma(&mut driver.client, &mut memory, IOVA);
    assert!(served >= 2);
    assert_eq!(others.len(), 1, "the command in between is answered");
    assert_eq!(others[0].error(), Some(95));
    driver.complete(1).ok();
    let before = memory.clone();
    memory[0x1000..0x11000].fill(0);
    driver.submit(1, 2, 1, [IOVA + 0x1000, IOVA], [0, 0, 127]);
    serve_dma(&mut driver.client, &mut memory, IOVA);
    driver.complete(1).ok();
    assert!(memory == before);
}

#[test]
fn a_client_that_does_not_answer_dma_requests() {
    let controller = Controller::new(Config::default()).unwrap();
    let server = Running::start(Server::new(controller).unwrap().client_deadline(Duration::from_millis(100))).unwrap();
    let mut driver = driver(&server).with_io_queue();
    driver.client.map(0x8000_0000, 0x1000, None).unwrap();
    // The reply to the doorbell comes before the request.
    driver.submit(1, 2, 1, [0x8000_0000, 0], [0, 0, 7]);
    let request = driver.client.recv();
    assert_eq!(request.header.command.get(), command::DMA_WRITE);
    assert_eq!(driver.complete(1).status, 4, "data transfer error");
    driver.submit(1, 2, 1, [0x8000_0000, 0], [0, 0, 7]);
    assert_eq!(driver.complete(1).status, 4, "at once, and without another request");
    driver.io(2, 0, 8).ok();
}

#[test]
fn injected_faults() {
    let faults = Faults { drop_completion_lba: Some(10), error_lba: Some(20), bad_cid_lba: Some(30) };
    let server = spawn(Config { faults, ..Config::default() });
    let mut driver = driver(&server).with_io_queue();
    driver.io(2, 0, 8).ok();
    assert_eq!(driver.io(2, 16, 8).status, 0x281);
    assert_eq!(driver.io(1, 16, 8).status, 0x280);
    let cid = driver.submit(1, 2, 1, [driver.iova(DATA), 0], [30, 0, 0]);
    assert_eq!(driver.complete(1).cid, !cid);
    let lost = driver.submit(1, 2, 1, [driver.iova(DATA), 0], [10, 0, 0]);
    driver.io(2, 0, 8).ok();
    assert!(driver.poll(1).is_none());
    // The abort brings it back.
    assert_eq!(driver.admin(8, 0, 0, [u32::from(lost) << 16 | 1, 0, 0]).ok(), 0);
    let done = driver.complete(1);
    assert_eq!((done.cid, done.status), (lost, 7));
    assert_eq!(driver.admin(8, 0, 0, [u32::from(lost) << 16 | 1, 0, 0]).ok(), 1, "nothing to abort");
}

#[test]
fn an_idle_client_costs_little() {
    let server = spawn(Config::default());
    let mut driver = driver(&server).with_io_queue();
    driver.io(2, 0, 8).ok();
    thread::sleep(Duration::from_millis(300));
    let (spins, sleeps) = (server.stats().spins(), server.stats().sleeps());
    thread::sleep(Duration::from_millis(500));
    let (spins, sleeps) = (server.stats().spins() - spins, server.stats().sleeps() - sleeps);
    assert!(sleeps > 0, "it sleeps");
    assert!(spins <= 2 * sleeps + 64, "it sleeps after nearly every look: {spins} looks, {sleeps} sleeps");
    driver.io(2, 0, 8).ok();
}
