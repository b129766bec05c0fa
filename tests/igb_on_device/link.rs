//! The cable is taken out and put back.

use std::{thread, time::Duration};

use futures::StreamExt;
use vfio_uring::reactor::{Idle, sleep};
use vfio_uring_igb::{LinkState, Options};

use crate::{
    linux::command,
    rig::{Rig, names},
    support::run,
};

/// Has the host do it, which takes its time; the reactor runs on.
async fn set_link(card: &'static str, state: &'static str) {
    let asked = thread::spawn(move || command("/bin/host", &["set_link", card, state]));
    while !asked.is_finished() {
        sleep(Duration::from_millis(5)).await;
    }
    asked.join().unwrap();
}

async fn down_and_up(interrupt: Option<Duration>) {
    let Some(rig) = Rig::open().await else { return };
    let card = if names().is_some_and(|(ours, _)| ours.ends_with("03:00.0")) { "card0" } else { "card1" };
    let port = rig.port(Options { interrupt, ..Options::default() }).await;
    let mut changes = port.nic.link_changes();
    assert!(changes.next().await.unwrap().unwrap().up);
    for _ in 0..2 {
        set_link(card, "off").await;
        assert_eq!(changes.next().await.unwrap().unwrap(), LinkState::default());
        assert!(!port.nic.link().await.unwrap().up);
        set_link(card, "on").await;
        assert_eq!(changes.next().await.unwrap().unwrap().to_string(), "up, 1000 Mb/s, full duplex");
    }
    port.nic.stop().await.unwrap();
}

#[test]
fn link_down_and_up_polled() {
    run(Idle::Hybrid, down_and_up(None));
}

#[test]
fn link_down_and_up_by_interrupt() {
    run(Idle::Park, down_and_up(Some(Duration::from_micros(20))));
}
