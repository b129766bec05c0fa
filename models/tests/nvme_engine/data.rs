//! I/O commands: what they do to data, how they find it, and what they refuse.

use vfio_uring_models::nvme::{Config, NamespaceConfig, spec::Sqe};

use crate::support::*;

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const COMPARE: u8 = 5;
const ZEROES: u8 = 8;
const DSM: u8 = 9;

fn sgl(mut sqe: Sqe) -> Sqe {
    sqe.0[0] |= 1 << 14;
    sqe
}

fn list(client: &Client, iova: u64, entries: &[u64]) {
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    client.put(iova, &bytes);
}

#[test]
fn written_is_read() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let file = Config { namespaces: vec![NamespaceConfig::file(path.path(), 1 << 40)], ..Config::default() };
    for (config, direct) in [(disk(), true), (disk(), false), (file, true)] {
        let mut client = Client::with_memory(config, Memory::new(direct));
        client.enable();
        let mut pair = client.pair(1, 16);
        let out = client.fill(DATA, 8192, 3);
        assert_eq!(client.run(&mut pair, io(WRITE, 1, 100, 16, [DATA, DATA + 4096])).status, 0);
        assert_eq!(client.run(&mut pair, io(FLUSH, 1, 0, 1, [0, 0])).status, 0);
        assert_eq!(client.run(&mut pair, io(FLUSH, u32::MAX, 0, 1, [0, 0])).status, 0);
        // One block more at each end was never written.
        let (buffer, pages) = (DATA + 0x1_0000, DATA + 0x2_0000);
        client.fill(buffer, 12288, 9);
        list(&client, pages, &[buffer + 4096, buffer + 8192]);
        assert_eq!(client.run(&mut pair, io(READ, 1, 99, 18, [buffer, pages])).status, 0);
        let expected = [&[0; 512], &out[..], &[0; 512]].concat();
        assert!(client.bytes(buffer, 18 * 512) == expected);
    }
}

#[test]
fn offsets_in_the_first_page() {
    let mut client = Client::ready(disk());
    let mut pair = client.pair(1, 16);
    let out = client.fill(DATA + 4096 - 512, 1024, 3);
    assert_eq!(client.run(&mut pair, io(WRITE, 1, 7, 2, [DATA + 4096 - 512, DATA + 4096])).status, 0);
    assert_eq!(client.run(&mut pair, io(READ, 1, 7, 2, [DATA + 0x8000 - 4, DATA + 0x1_0000])).status, 0);
    assert_eq!(client.bytes(DATA + 0x8000 - 4, 4), out[..4]);
    assert_eq!(client.bytes(DATA + 0x1_0000, 1020), out[4..]);
    for (prps, status) in [
        ([DATA + 2, 0], 0x4013),
        ([DATA + 4096 - 512, DATA + 8], 0x4013),
        ([BASE + MEMORY, 0], 4),
        ([0, 0], 4),
        ([u64::MAX - 0xfff, 0], 4),
        ([DATA + 4096 - 512, u64::MAX - 0xfff], 4),
    ] {
        assert_eq!(client.run(&mut pair, io(READ, 1, 7, 2, prps)).status, status, "{prps:x?}");
    }
}

#[test]
fn prp_lists() {
    let mut client = Client::ready(Config { mdts: 9, ..disk() });
    let mut pair = client.pair(1, 16);
    let total = 2 << 20;
    let out = client.fill(DATA, total, 5);
    let lists = DATA + 0x40_0000;
    let pages = |base: u64| (1..512).map(move |page| base + page * 4096);
    // One list, in page order for the write; backwards for the read: 511 entries fit.
    list(&client, lists, &pages(DATA).collect::<Vec<_>>());
    assert_eq!(client.run(&mut pair, io(WRITE, 1, 0, 4096, [DATA, lists])).status, 0);
    let buffer = DATA + 0x60_0000;
    let mut back: Vec<u64> = pages(buffer).collect();
    back.reverse();
    // Chained: the first list starts three entries before the end of its page.
    let (first, second, third) = (lists + 4096 - 24, lists + 0x2000, lists + 0x5000);
    list(&client, first, &[back[0], back[1], second]);
    list(&client, second, &back[2..]);
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 4096, [buffer, first])).status, 0);
    let got = client.bytes(buffer, total);
    assert_eq!(got[..4096], out[..4096]);
    for page in 1..512 {
        let at = (512 - page) * 4096;
        assert_eq!(got[at..at + 4096], out[page * 4096..][..4096], "page {page}");
    }
    // A page and the chain end the first list.
    let start = lists + 0x1_0000 + 4096 - 16;
    let next = lists + 0x2_0000;
    list(&client, start, &[DATA + 4096, next]);
    list(&client, next, &(2..8).map(|page| DATA + page * 4096).collect::<Vec<_>>());
    assert_eq!(client.run(&mut pair, io(COMPARE, 1, 0, 64, [DATA, start])).status, 0);
    // Entries and chains with offsets, lists that are not there.
    list(&client, third, &[DATA, DATA + 8]);
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 24, [buffer, third])).status, 0x4013);
    list(&client, third + 4096 - 8, &[third + 16]);
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 24, [buffer, third + 4096 - 8])).status, 0x4013);
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 24, [buffer, third + 4])).status, 0x4013);
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 24, [buffer, 0x1000])).status, 4);
    // A list that chains to itself ends all the same.
    list(&client, third + 4096 - 8, &[third + 0x1000]);
    list(&client, third + 0x1000, &[third + 0x1000; 512]);
    assert_eq!(client.run(&mut pair, io(READ, 2, 0, 512, [buffer, third + 4096 - 8])).status, 0);
}

#[test]
fn transfers_above_the_limit_are_refused() {
    let mut client = Client::ready(disk());
    let mut pair = client.pair(1, 16);
    list(&client, DATA, &(1..64).map(|page| DATA + page * 4096).collect::<Vec<_>>());
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 256, [DATA + 4096, DATA])).status, 0);
    assert_eq!(client.run(&mut pair, io(READ, 1, 0, 257, [DATA + 4096, DATA])).status, 0x4002);
}

#[test]
fn sgls() {
    let mut client = Client::ready(disk());
    let mut pair = client.pair(1, 16);
    let out = client.fill(DATA + 3, 4096, 8);
    let data = |len: u64| len;
    assert_eq!(client.run(&mut pair, sgl(io(WRITE, 1, 0, 8, [DATA + 3, data(4096)]))).status, 0);
    // A segment with a data block and the next segment; a last segment with the rest, and more than is needed.
    let (one, two, to) = (DATA + 0x2_0000, DATA + 0x3_0000, DATA + 0x4_0000);
    list(&client, one, &[to, data(1001), two, 0x30 << 56 | 48]);
    list(&client, two, &[to + 1001, data(0), to + 0x2000, data(3000), to + 0x4000, data(5000)]);
    assert_eq!(client.run(&mut pair, sgl(io(READ, 1, 0, 8, [one, 0x20 << 56 | 32]))).status, 0);
    assert_eq!(client.bytes(to, 1001), out[..1001]);
    assert_eq!(client.bytes(to + 0x2000, 3000), out[1001..4001]);
    assert_eq!(client.bytes(to + 0x4000, 96), [&out[4001..], &[0]].concat());
    for (prps, status) in [
        ([DATA, data(4095)], 0x400f),
        ([DATA, 0x10 << 56 | 4096], 0x4011),
        ([DATA, 0x01 << 56 | 4096], 0x4011),
        ([one, 0x20 << 56 | 24], 0x400d),
        ([one, 0x20 << 56], 0x400d),
        // The descriptor of a segment in a last segment.
        ([one, 0x30 << 56 | 32], 0x400d),
        ([0x1000, 0x30 << 56 | 32], 4),
    ] {
        assert_eq!(client.run(&mut pair, sgl(io(READ, 1, 0, 8, prps))).status, status, "{prps:x?}");
    }
    // A segment of segments without end.
    list(&client, one, &[one, 0x20 << 56 | 16]);
    assert_eq!(client.run(&mut pair, sgl(io(READ, 1, 0, 8, [one, 0x20 << 56 | 16]))).status, 0x400e);
    let mut both = io(READ, 1, 0, 8, [DATA, data(4096)]);
    both.0[0] |= 3 << 14;
    assert_eq!(client.run(&mut pair, both).status, 0x4002);
}

#[test]
fn compare_zeroes_and_deallocate() {
    let path = tempfile::NamedTempFile::new().unwrap();
    let file = Config { namespaces: vec![NamespaceConfig::file(path.path(), 64 << 20)], ..Config::default() };
    for config in [disk(), file] {
        let mut client = Client::ready(config);
        let mut pair = client.pair(1, 16);
        client.fill(DATA, 8192, 3);
        let both = [DATA, DATA + 4096];
        assert_eq!(client.run(&mut pair, io(WRITE, 1, 2040, 16, both)).status, 0);
        assert_eq!(client.run(&mut pair, io(COMPARE, 1, 2040, 16, both)).status, 0);
        client.put(DATA + 8191, &[client.bytes(DATA + 8191, 1)[0] ^ 1]);
        assert_eq!(client.run(&mut pair, io(COMPARE, 1, 2040, 16, both)).status, 0x4285);
        assert_eq!(client.run(&mut pair, io(ZEROES, 1, 2041, 2, [0, 0])).status, 0);
        let back = [DATA + 0x1_0000, DATA + 0x1_1000];
        assert_eq!(client.run(&mut pair, io(READ, 1, 2040, 16, back)).status, 0);
        let mut expected = client.bytes(DATA, 8191);
        expected[512..1536].fill(0);
        assert_eq!(client.bytes(back[0], 8191), expected);
        // Two ranges of which one goes across what is allocated at once, and one is empty.
        list(&client, DATA, &[3 << 32, 2047, 0, 0, 1 << 32, 2055]);
        assert_eq!(client.run(&mut pair, sqe(DSM, 1, [DATA, 0], [2, 4, 0, 0, 0, 0])).status, 0);
        assert_eq!(client.run(&mut pair, io(READ, 1, 2040, 16, back)).status, 0);
        expected[7 * 512..10 * 512].fill(0);
        expected[15 * 512..].fill(0);
        assert_eq!(client.bytes(back[0], 8191), expected);
        list(&client, DATA, &[2 << 32, (64 << 11) - 1]);
        assert_eq!(client.run(&mut pair, sqe(DSM, 1, [DATA, 0], [0, 4, 0, 0, 0, 0])).status, 0x4080);
        assert_eq!(client.run(&mut pair, sqe(DSM, 1, [DATA + 2, 0], [0, 4, 0, 0, 0, 0])).status, 0x4013);
        // The whole disk.
        list(&client, DATA, &[64 << 11 << 32, 0]);
        assert_eq!(client.run(&mut pair, sqe(DSM, 1, [DATA, 0], [0, 4, 0, 0, 0, 0])).status, 0);
        assert_eq!(client.run(&mut pair, io(READ, 1, 2040, 16, back)).status, 0);
        assert_eq!(client.bytes(back[0], 8192), [0; 8192]);
    }
}

#[test]
fn what_is_refused() {
    let mut client = Client::ready(disk());
    let mut pair = client.pair(1, 16);
    let blocks = 64 << 11;
    let prps = [DATA, DATA + 4096];
    for (command, status) in [
        (io(READ, 1, blocks - 1, 1, prps), 0),
        (io(READ, 1, blocks, 1, prps), 0x4080),
        (io(READ, 1, blocks - 1, 2, prps), 0x4080),
        (io(READ, 1, u64::MAX, 16, prps), 0x4080),
        (io(ZEROES, 1, u64::MAX - 3, 16, prps), 0x4080),
        (io(READ, 2, (1 << 28) - 1, 1, prps), 0),
        (io(READ, 2, 1 << 28, 1, prps), 0x4080),
        (io(READ, 0, 0, 1, prps), 0x400b),
        (io(READ, 3, 0, 1, prps), 0x400b),
        (io(WRITE, u32::MAX, 0, 1, prps), 0x400b),
        (io(FLUSH, 3, 0, 1, prps), 0x400b),
        (io(0x7f, 1, 0, 1, prps), 0x4001),
        (io(4, 1, 0, 1, prps), 0x4001),
    ] {
        assert_eq!(client.run(&mut pair, command).status, status, "{command:x?}");
    }
    let mut fused = io(READ, 1, 0, 1, prps);
    fused.0[0] |= 1 << 8;
    assert_eq!(client.run(&mut pair, fused).status, 0x4002);
}

#[test]
fn faults() {
    let faults =
        vfio_uring_models::nvme::Faults { drop_completion_lba: Some(10), error_lba: Some(20), bad_cid_lba: Some(30) };
    let mut client = Client::ready(Config { faults, ..disk() });
    let mut pair = client.pair(1, 16);
    let prps = [DATA, DATA + 4096];
    assert_eq!(client.run(&mut pair, io(READ, 1, 20, 1, prps)).status, 0x4281);
    assert_eq!(client.run(&mut pair, io(WRITE, 1, 15, 8, prps)).status, 0x280);
    assert_eq!(client.run(&mut pair, io(READ, 1, 21, 8, prps)).status, 0);
    let cid = client.push(&mut pair, io(READ, 1, 30, 1, prps));
    client.ring(&pair);
    client.service();
    assert_eq!(client.poll(&mut pair).map(|cqe| cqe.cid), Some(!cid));
    client.consumed(&pair);
    let cid = client.push(&mut pair, io(READ, 1, 10, 1, prps));
    client.ring(&pair);
    client.service();
    assert_eq!(client.poll(&mut pair), None);
    // An abort is what ends it.
    let abort = sqe(8, 0, [0, 0], [u32::from(cid) << 16 | 1, 0, 0, 0, 0, 0]);
    assert_eq!(client.admin(abort).result, 0);
    assert_eq!(client.poll(&mut pair).map(|cqe| (cqe.cid, cqe.status)), Some((cid, 7)));
    client.consumed(&pair);
    assert_eq!(client.admin(abort).result, 1);
}
