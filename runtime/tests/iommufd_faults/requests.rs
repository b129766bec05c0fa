//! Page requests and their answers.

use std::time::Duration;

use futures::{StreamExt, future::join};
use vfio_uring::{
    Error,
    fault::{
        Answer, Fault, PageRequest, Permissions,
        iommufd::{Attach, Faults, Limits},
    },
    reactor::sleep,
};

use crate::{
    by_hand,
    mock::{Mock, left_waiting},
    next, nothing, on_reactor,
};

fn invalid(result: vfio_uring::Result<()>, part: &str) {
    match result {
        Err(Error::Invalid { what }) if what.contains(part) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_is_read_and_answered() {
    on_reactor(|| async {
        let mock = Mock::new();
        let mut faults = Faults::attach(mock.clone(), Limits::default()).await.unwrap();
        for answer in [Answer::Success, Answer::Invalid] {
            let later = async {
                sleep(Duration::from_millis(20)).await;
                mock.ask(0x1_2345_6000, 7);
            };
            // It is waited for before there is one: the ring tells.
            let (group, ()) = join(faults.next(), later).await;
            let group = group.unwrap().unwrap();
            let request = PageRequest {
                pasid: None,
                group_index: 7,
                permissions: Permissions::WRITE,
                address: 0x1_2345_6000,
                length: 0,
                private_data: None,
            };
            assert_eq!((group.lost, group.device_id), (None, mock.device_id()));
            assert_eq!(group.faults, [Fault::PageRequest(request)]);
            let id = group.id.unwrap();
            faults.respond(id, answer).unwrap();
            invalid(faults.respond(id, answer), "answered before");
        }
        assert_eq!(left_waiting(), 0, "the kernel has let go of the device");
        faults.close().await.unwrap();
        mock.end();
    });
}

#[test]
fn many_groups_come_in_order_and_are_answered_in_any() {
    on_reactor(|| async {
        let mock = Mock::new();
        let mut faults = Faults::attach(mock.clone(), Limits::default()).await.unwrap();
        let responder = faults.responder().unwrap();
        // More than one read takes, two times.
        for _ in 0..2 {
            (0..150).for_each(|number| mock.ask(u64::from(number) << 12, number));
            let mut ids = Vec::new();
            for number in 0..150 {
                let (group, address, index) = next(&mut faults).await;
                assert_eq!((address, index), (u64::from(number) << 12, number));
                ids.push(group.id.unwrap());
            }
            nothing(&mut faults).await;
            let odd = |at: usize| if at % 2 == 1 { Answer::Invalid } else { Answer::Success };
            let answers: Vec<_> = ids.iter().enumerate().rev().map(|(at, id)| (*id, odd(at))).collect();
            responder.respond_all(&answers[..100]).unwrap();
            answers[100..].iter().for_each(|(id, answer)| responder.respond(*id, *answer).unwrap());
            assert_eq!(left_waiting(), 0);
        }
        faults.close().await.unwrap();
        invalid(responder.respond_all(&[]), "closed");
        mock.end();
    });
}

#[test]
fn wrong_answers_are_refused_and_the_group_waits_on() {
    on_reactor(|| async {
        let (mock, other) = (Mock::new(), Mock::new());
        let mut faults = Faults::attach(mock.clone(), Limits::default()).await.unwrap();
        let mut others = Faults::attach(other.clone(), Limits::default()).await.unwrap();
        mock.ask(0x1000, 1);
        other.ask(0x2000, 2);
        let id = next(&mut faults).await.0.id.unwrap();
        let foreign = next(&mut others).await.0.id.unwrap();
        let failure = faults.respond(id, Answer::Failure).unwrap_err();
        assert!(matches!(&failure, Error::Unsupported { what } if what.contains("answer Invalid")), "{failure}");
        invalid(faults.respond(foreign, Answer::Success), "another fault queue");
        let responder = faults.responder().unwrap();
        invalid(responder.respond_all(&[(id, Answer::Success), (id, Answer::Success)]), "each group once");
        invalid(responder.respond_all(&[(id, Answer::Success), (foreign, Answer::Success)]), "another fault queue");
        responder.respond(id, Answer::Success).unwrap();
        others.respond(foreign, Answer::Invalid).unwrap();
        faults.close().await.unwrap();
        others.close().await.unwrap();
        mock.end();
        other.end();
    });
}

#[test]
fn what_is_too_much_is_answered_and_counted() {
    on_reactor(|| async {
        let mock = Mock::new();
        let limits = Limits { max_waiting: 2, ..Limits::default() };
        let mut faults = Faults::attach(mock.clone(), limits).await.unwrap();
        let responder = faults.responder().unwrap();
        (0..200).for_each(|number| mock.ask(0x1000, number));
        let first = next(&mut faults).await.0.id.unwrap();
        let second = next(&mut faults).await.0.id.unwrap();
        nothing(&mut faults).await;
        assert_eq!(responder.refused(), 198);
        responder.respond(first, Answer::Success).unwrap();
        mock.ask(0x3000, 9);
        assert_eq!(next(&mut faults).await.2, 9);
        responder.respond(second, Answer::Success).unwrap();
        assert_eq!(left_waiting(), 1, "the last one");
        faults.close().await.unwrap();
        mock.end();
    });
}

#[test]
fn the_answer_of_a_detached_device_does_not_go_to_another_group() {
    on_reactor(|| async {
        let mock = Mock::new();
        let (mut queue, table) = by_hand(&mock);
        mock.ask(0x1000, 1);
        mock.ask(0x2000, 2);
        let first = next(&mut queue).await.0.id.unwrap();
        let second = next(&mut queue).await.0.id.unwrap();
        // The kernel answers, and forgets its cookies.
        mock.release().unwrap();
        invalid(queue.respond(second, Answer::Success), "the kernel has answered");
        mock.attach(&table).unwrap();
        mock.ask(0x3000, 3);
        let (group, address, _) = next(&mut queue).await;
        assert_eq!((address, queue.waiting()), (0x3000, 1), "it has the cookie of the first");
        invalid(queue.respond(first, Answer::Invalid), "answered before");
        queue.respond(group.id.unwrap(), Answer::Success).unwrap();
        mock.release().unwrap();
        table.destroy().unwrap();
        queue.close().await.unwrap();
        mock.end();
    });
}
