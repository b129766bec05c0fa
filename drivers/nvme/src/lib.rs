//! An async NVMe driver on the vfio-uring runtime.
#![forbid(unsafe_code)]
