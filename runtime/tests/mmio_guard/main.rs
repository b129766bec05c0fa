//! Memory that vanishes under accesses of ours, and signals that are not ours. A program of its own, since it changes what SIGBUS
//! does; what ends a process or changes its handlers runs in a child.

mod common;
mod load;
mod signals;

use std::sync::Arc;

use vfio_uring::{
    dma::{AccessError, AddressSpace, Backend, HugePages, IovaRange, Pool, SharedMemory},
    mmio::{Faults, MmioUnavailable, Register, Value},
};

use common::{File, PAGE};

fn register<T: Value>(memory: &Arc<SharedMemory>, offset: u64) -> Register<T> {
    Register::new(memory, offset).unwrap()
}

#[test]
fn registers_of_every_width_vanish_and_heal() {
    fn check<T: Value>(file: &File, memory: &Arc<SharedMemory>, offset: u64) {
        let register = register::<T>(memory, offset);
        file.set_len(2);
        let small = T::truncate(0x5a);
        register.write(small);
        assert_eq!(register.try_read(), Ok(small));
        // All ones are a value like any other.
        register.write(T::truncate(u64::MAX));
        assert_eq!((register.try_read(), register.read()), (Ok(T::truncate(u64::MAX)), T::truncate(u64::MAX)));
        assert_eq!(register.try_write(small), Ok(()));
        assert_eq!(register.take_faults(), None);

        file.set_len(0);
        assert_eq!(register.try_read(), Err(MmioUnavailable { offset }));
        assert_eq!(register.try_write(small), Err(MmioUnavailable { offset }));
        assert_eq!((register.read(), register.read_before_dma()), (T::truncate(u64::MAX), T::truncate(u64::MAX)));
        register.write(small);
        register.write_after_dma(small);
        assert_eq!(register.take_faults(), Some(Faults { count: 6, last: offset }));
        assert_eq!(register.take_faults(), None);

        file.set_len(2);
        assert_eq!(register.try_read(), Ok(T::truncate(0)));
        assert_eq!(register.try_write(small), Ok(()));
        assert_eq!((register.read(), register.take_faults()), (small, None));
    }
    let file = File::new(2);
    let memory = Arc::new(file.map(2));
    for offset in [0, PAGE - 8, PAGE, 2 * PAGE - 8] {
        check::<u8>(&file, &memory, offset);
        check::<u16>(&file, &memory, offset);
        check::<u32>(&file, &memory, offset);
        check::<u64>(&file, &memory, offset);
    }
}

#[test]
fn copies_end_where_the_file_does() {
    let file = File::new(2);
    let memory = file.map(2);
    memory.fill(0, 2 * PAGE as usize, 0x11).unwrap();
    file.set_len(1);
    fn gone<T>(offset: u64, len: usize) -> Result<T, AccessError> {
        Err(AccessError::Vanished { offset, len })
    }
    let mut bytes = vec![0; 2 * PAGE as usize];
    assert_eq!(memory.read(0, &mut bytes), gone(0, 2 * PAGE as usize));
    assert_eq!(bytes.iter().filter(|&&byte| byte == 0x11).count(), PAGE as usize);
    assert_eq!(memory.take_faults(), Some(Faults { count: 1, last: PAGE }));
    assert_eq!(memory.write(PAGE - 3, b"abcdef"), gone(PAGE - 3, 6));
    assert_eq!(memory.read_obj(PAGE - 3), Ok(*b"abc"));
    assert_eq!(memory.fill(PAGE - 4, 8, 7), gone(PAGE - 4, 8));
    assert_eq!(memory.load_u32(PAGE - 4), Ok(0x0707_0707));
    // Values: in words, of which the last is gone, and in bytes.
    assert_eq!(memory.read_obj::<[u64; 8]>(PAGE - 56), gone(PAGE - 56, 64));
    assert_eq!(memory.write_obj(PAGE - 56, &[u64::MAX; 8]), gone(PAGE - 56, 64));
    assert_eq!(memory.read_obj::<[u64; 7]>(PAGE - 56), Ok([u64::MAX; 7]));
    assert_eq!(memory.read_obj::<[u8; 6]>(PAGE - 5), gone(PAGE - 5, 6));
    assert_eq!(memory.write_obj(PAGE - 5, &[1u8; 6]), gone(PAGE - 5, 6));
    assert_eq!(memory.load_u32(PAGE), gone(PAGE, 4));
    assert_eq!(memory.load_u64(PAGE), gone(PAGE, 8));
    assert_eq!(memory.store_u32(PAGE, 1), gone(PAGE, 4));
    assert_eq!(memory.store_u64(PAGE, 1), gone(PAGE, 8));
    assert!(memory.take_faults().is_some_and(|faults| faults.count >= 10 && faults.last == PAGE));
    let text = memory.load_u32(PAGE).unwrap_err().to_string();
    assert!(text.contains("0x1000+0x4") && text.contains("truncated"), "{text}");
    // Nothing of it outlives the file's shortness.
    file.set_len(2);
    assert_eq!(memory.store_u64(PAGE, u64::MAX), Ok(()));
    assert_eq!((memory.load_u64(PAGE), memory.load_u32(PAGE)), (Ok(u64::MAX), Ok(u32::MAX)));
    memory.read(0, &mut bytes).unwrap();
}

#[test]
fn faults_are_counted_for_the_mapping_they_are_in() {
    let (file, other) = (File::new(1), File::new(1));
    // More mappings than are looked up at once, some gone again.
    let mut memories: Vec<_> = (0..300).map(|i| if i % 3 == 0 { file.map(1) } else { other.map(1) }).collect();
    memories.retain({
        let mut i = 0;
        move |_| {
            i += 1;
            i % 7 != 0
        }
    });
    memories.extend((0..20).map(|_| file.map(1)));
    file.set_len(0);
    for (i, memory) in memories.iter().enumerate() {
        let gone = memory.load_u32(8).is_err();
        assert_eq!(memory.take_faults(), gone.then_some(Faults { count: 1, last: 8 }), "mapping {i}");
    }
    assert!(memories.iter().all(|memory| memory.take_faults().is_none()));
}

#[test]
fn memory_of_ours_stays_fast_and_alive() {
    futures::executor::block_on(async {
        let space = AddressSpace::new(Backend::Null, &[IovaRange { start: 0, last: u64::MAX }], PAGE, 64);
        let pool = Pool::new(&space, 1 << 16, HugePages::No).await.unwrap();
        let ring = vfio_uring::dma::DmaRing::<[u64; 8]>::new(pool.alloc(PAGE as usize).unwrap().into_shared()).unwrap();
        ring.set(3, &[7; 8]).unwrap();
        ring.set_words(3, [(0, 1), (7, u64::MAX)]).unwrap();
        assert_eq!(ring.get(3), Ok([1, 7, 7, 7, 7, 7, 7, u64::MAX]));
        assert_eq!((ring.load_u64(3, 56), ring.load_u32(3, 8)), (Ok(u64::MAX), Ok(7)));
        assert!(ring.set_words(3, [(8, 1)]).is_err());
        // An entry that is longer than what has its own instructions.
        let long = vfio_uring::dma::DmaRing::<[u64; 32]>::new(ring.into_shared()).unwrap();
        long.set_words(1, [(15, 15), (16, 16), (31, 31)]).unwrap();
        let entry = long.get(1).unwrap();
        assert_eq!((entry[15], entry[16], entry[31]), (15, 16, 31));
        long.shared().release();
    });
}
