//! The command `vfio-uring`.

fn main() {}
