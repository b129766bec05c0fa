//! The command as its users see it: output, exit status, and what happens when the other side goes away.

mod bench;
mod serve;
mod support;
mod usage;
