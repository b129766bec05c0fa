//! The README's example is the one in `examples/`, and it works.

use vfio_uring::reactor::Reactor;
use vfio_uring_models::nvme;

#[path = "../examples/nvme_read.rs"]
#[expect(dead_code, reason = "its main function")]
mod nvme_read;

#[test]
fn the_readme_quotes_the_example() {
    let (readme, example) = (include_str!("../README.md"), include_str!("../examples/nvme_read.rs"));
    let (_, quoted) = readme.split_once("```rust\n").unwrap();
    let (quoted, _) = quoted.split_once("```").unwrap();
    assert!(example.contains(quoted), "README.md and examples/nvme_read.rs differ");
}

#[test]
fn the_example_works() {
    let server = nvme::spawn(Default::default()).unwrap();
    let address = server.address().parse().unwrap();
    Reactor::new().unwrap().block_on(nvme_read::write_and_read(&address)).unwrap();
}
