//! What an access to a register costs: the bars of `benches/mmio.rs`, which counts instructions, are held by the tests too.

use std::process::Command;

/// The program is built as users build theirs, with optimization, so that it is cargo that runs it. Without valgrind it says so, and
/// nothing is counted.
#[test]
fn a_register_costs_what_a_volatile_access_does() {
    let mut bench = Command::new(env!("CARGO"));
    bench.args(["bench", "--locked", "--package", "vfio-uring", "--bench", "mmio"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = bench.output().expect("cargo runs");
    let (table, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{errors}");
    println!("{table}");
}
