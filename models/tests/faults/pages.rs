//! Page requests and their answers.

use std::time::Duration;

use vfio_uring::{
    Error,
    dma::{HugePages, Pool},
    fault::{Answer, Fault, FaultGroup, Options, PageRequest, Permissions, abi::Record},
    reactor::sleep,
};
use vfio_uring_models::faults::{Config, Form, GivenAnswer};

use crate::common::{Rig, config, failure, next, run, unrecoverable};

fn request(pasid: Option<u32>, group_index: u32, address: u64, last: bool) -> Record {
    let permissions = Permissions::READ;
    let private_data = pasid.map(|pasid| [pasid.into(), 7]);
    let request = PageRequest { pasid, group_index, permissions, address, length: 0, private_data };
    Record { lost: 0, fault: Fault::PageRequest(request), last }
}

fn addresses(group: &FaultGroup) -> Vec<u64> {
    let address = |fault: &Fault| match fault {
        Fault::PageRequest(request) => request.address,
        Fault::Unrecoverable(_) => panic!("{fault:?}"),
    };
    group.faults.iter().map(address).collect()
}

async fn answers(rig: &Rig, count: usize) -> Vec<GivenAnswer> {
    loop {
        let answers = rig.handle.answers();
        if answers.len() >= count {
            return answers;
        }
        sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn a_page_that_is_asked_for_is_given() {
    run(async {
        for mapped in [true, false] {
            let rig = Rig::new(Config { mapped, ..config(Form::Single) }).await;
            rig.handle.ask_for_pages(true);
            let mut queue = rig.open(Options::default()).await.unwrap();
            let pool = Pool::new(rig.device.dma(), 1 << 16, HugePages::No).await.unwrap();
            let buf = pool.alloc(8192).unwrap();
            rig.handle.fault_on(buf.iova()..=buf.iova() + 8191);
            // The end of one page and the start of the next.
            rig.start(buf.iova() + 4000, 200).await;
            let group = next(&mut queue).await;
            assert_eq!(addresses(&group), [buf.iova(), buf.iova() + 4096]);
            rig.handle.fault_on_none();
            queue.respond(group.id.unwrap(), Answer::Success).await.unwrap();
            rig.ended().await;
            assert_eq!((rig.handle.counters().stored, rig.handle.counters().answers), (2, 1));
            // One that can't be had, and one that has no answer.
            rig.start(0x700_0000, 8).await;
            let group = next(&mut queue).await;
            queue.respond(group.id.unwrap(), Answer::Invalid).await.unwrap();
            rig.ended().await;
            let again = queue.respond(group.id.unwrap(), Answer::Success).await;
            assert!(matches!(again, Err(Error::Invalid { .. })), "{again:?}");
            rig.start(0x700_0000, 8).await;
            let unanswered = next(&mut queue).await;
            queue.close().await.unwrap();
            rig.ended().await;
            let codes: Vec<u32> = rig.handle.answers().iter().map(|answer| answer.code).collect();
            assert_eq!(codes, [0, 1, 1]);
            let mut queue = rig.open(Options::default()).await.unwrap();
            let other = queue.respond(unanswered.id.unwrap(), Answer::Success).await;
            assert!(matches!(other, Err(Error::Invalid { .. })), "of another queue: {other:?}");
            rig.handle.ask_for_pages(false);
            rig.dma_to(0x700_0000, 8).await;
            unrecoverable(&next(&mut queue).await);
        }
    });
}

#[test]
fn groups_are_put_together_though_they_are_mixed() {
    run(async {
        let rig = Rig::new(config(Form::Single)).await;
        let mut queue = rig.open(Options::default()).await.unwrap();
        rig.handle.raise([
            request(None, 1, 0x1000, false),
            request(Some(5), 1, 0x2000, false),
            request(None, 1, 0x3000, false),
            request(Some(5), 1, 0x4000, true),
            request(None, 9, 0x5000, true),
            request(None, 1, 0x6000, true),
        ]);
        let groups = [next(&mut queue).await, next(&mut queue).await, next(&mut queue).await];
        assert_eq!(groups.each_ref().map(addresses), [vec![0x2000, 0x4000], vec![0x5000], vec![0x1000, 0x3000, 0x6000]]);
        for (group, answer) in groups.iter().zip([Answer::Failure, Answer::Success, Answer::Invalid]) {
            queue.respond(group.id.unwrap(), answer).await.unwrap();
        }
        let given = |pasid, group, code| GivenAnswer { pasid, group, code };
        assert_eq!(answers(&rig, 3).await, [given(Some(5), 1, 2), given(None, 9, 0), given(None, 1, 1)]);
    });
}

#[test]
fn what_is_too_much_is_answered_and_counted() {
    run(async {
        let rig = Rig::new(config(Form::Single)).await;
        let options = Options { max_requests: 3, max_waiting: 2, max_open_groups: 4, ..Options::default() };
        let mut queue = rig.open(options).await.unwrap();
        // Four requests are one too many, three are not.
        rig.handle.raise((0..4).map(|page| request(None, 1, page << 12, page == 3)));
        rig.handle.raise((0..3).map(|page| request(None, 2, page << 12, page == 2)));
        let group = next(&mut queue).await;
        assert_eq!((addresses(&group).len(), queue.stats().refused), (3, 1));
        assert_eq!(answers(&rig, 1).await, [GivenAnswer { pasid: None, group: 1, code: 1 }]);
        // One more may wait, a third may not.
        rig.handle.raise((3..6).map(|group| request(None, group, 0, true)));
        assert_eq!(next(&mut queue).await.faults.len(), 1);
        let given: Vec<u32> = answers(&rig, 3).await.iter().map(|answer| answer.group).collect();
        assert_eq!((&given[1..], queue.stats().refused), (&[5, 4][..], 3));
        // More groups than the device can have.
        rig.handle.raise((10..15).map(|group| request(None, group, 0, false)));
        let error = failure(&mut queue).await.to_string();
        assert!(error.contains("more than 4 groups"), "{error}");
        drop(queue);
        let mut last: Vec<u32> = answers(&rig, 9).await[3..].iter().map(|answer| answer.group).collect();
        last.sort_unstable();
        assert_eq!(last, [2, 3, 10, 11, 12, 13], "all that was open is answered when the queue is dropped");
    });
}

#[test]
fn a_device_that_takes_no_answers_is_not_waited_for_for_ever() {
    run(async {
        let rig = Rig::new(Config { entries: 256, ..config(Form::Single) }).await;
        let options = Options { deadline: Duration::from_millis(200), ..Options::default() };
        let mut queue = rig.open(options).await.unwrap();
        rig.handle.stall_answers(true);
        rig.handle.raise((0..64).map(|group| request(None, group, 0, true)));
        // It looks at the handle when it is woken.
        let mut groups = Vec::new();
        for _ in 0..64 {
            groups.push(next(&mut queue).await.id.unwrap());
        }
        let mut results = Vec::new();
        for &id in &groups {
            results.push(queue.respond(id, Answer::Success).await);
        }
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 63, "one slot stays free");
        assert!(matches!(results[63], Err(Error::Timeout { .. })), "{:?}", results[63]);
        rig.handle.stall_answers(false);
        queue.respond(groups[63], Answer::Success).await.unwrap();
        assert_eq!(answers(&rig, 64).await.len(), 64);
    });
}

#[test]
fn without_a_queue_of_answers_nobody_waits() {
    run(async {
        let rig = Rig::new(Config { answers: false, ..config(Form::Single) }).await;
        rig.handle.ask_for_pages(true);
        let mut queue = rig.open(Options::default()).await.unwrap();
        rig.dma_to(0x7000, 8).await;
        unrecoverable(&next(&mut queue).await);
        rig.handle.raise([request(None, 3, 0x8000, true)]);
        let group = next(&mut queue).await;
        assert_eq!((addresses(&group), group.id), (vec![0x8000], None));
    });
}
