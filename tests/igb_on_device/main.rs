//! The igb driver against Linux's: `VFIO_URING_DEVICE` names our card, `VFIO_URING_TEST_PEER` that of Linux on the same network, by its
//! PCI address; `VFIO_URING_TRANSPORT` says `group` or `cdev`. Without them, what does not need Linux runs on two software NICs; the
//! rest has its likes in `tests/igb`.

mod exchange;
mod link;
mod linux;
mod ping;
mod queues;
mod revoked;
mod rig;
#[path = "../igb/support.rs"]
mod support;
