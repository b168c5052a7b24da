// SPDX-License-Identifier: GPL-2.0

//! Safe types over the vhost core and the block layer.
//!
//! This is the lowest layer of the module: the only one with `unsafe` and with names of C. What is
//! above sees types whose misuse does not compile. Nothing here imports `driver`; callbacks are
//! traits that it implements.

mod pages;
mod raw;

pub(crate) mod block;
pub(crate) mod chardev;
pub(crate) mod compat;
pub(crate) mod iov;
pub(crate) mod uapi;
pub(crate) mod vhost;
