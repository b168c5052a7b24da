// SPDX-License-Identifier: GPL-2.0

//! The driver: what a request is, and what becomes of it.
//!
//! A kick leads to `queue`, which fetches chains and has `submit` turn each into a request and bios (`rest`
//! has what does not fit one bio, `ranges` what is done to ranges of the disk without data);
//! `complete` takes finished bios to the used ring. `choice` says who handles a kick; `poll` looks for more
//! buffers and finished bios before the worker sleeps.
//! `zone` has the requests of zoned disks. `device` is what user space sees. `request`, `zone_request`,
//! `segment`, `transfer`, `window` and `choice` are pure code, which the user-space tests compile too.

#![deny(unsafe_code)]

mod choice;
mod complete;
mod device;
mod poll;
mod queue;
mod ranges;
mod request;
mod rest;
mod segment;
mod streams;
mod submit;
mod threshold;
mod transfer;
mod window;
mod zone;
mod zone_request;

pub(crate) use device::Device;
