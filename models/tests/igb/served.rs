//! NICs behind sockets, in threads of their own, with the runtime's client.
