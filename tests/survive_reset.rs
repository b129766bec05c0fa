//! The example, as it runs without arguments.

use std::{sync::mpsc, thread, time::Duration};

#[path = "../examples/survive_reset.rs"]
#[expect(dead_code, reason = "its main function")]
mod survive_reset;

#[test]
fn the_example_survives() {
    let (sender, result) = mpsc::channel();
    thread::spawn(move || sender.send(survive_reset::run().map_err(|error| error.to_string())));
    result.recv_timeout(Duration::from_secs(120)).expect("an end").unwrap();
}
