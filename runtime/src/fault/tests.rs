//! The reader's side of a region queue against a device in memory, without regions and messages.
