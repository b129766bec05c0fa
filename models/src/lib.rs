//! Software PCI devices behind a vfio-user server.
#![forbid(unsafe_code)]
