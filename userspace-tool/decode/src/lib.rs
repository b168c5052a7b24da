// SPDX-License-Identifier: GPL-2.0

//! The module's pure code, compiled again in user space.
//!
//! The files under `driver/` and `bindings/` are what the kernel module is built from,
//! unchanged. This crate has nothing but tests of them, of every bound and with
//! random input.

// The kernel's build does not ask for this lint: its sources say why at each cast.
#![allow(clippy::cast_possible_truncation)]

#[cfg(test)]
#[path = "../../../driver/choice.rs"]
mod choice;
#[cfg(test)]
#[path = "../../../bindings/vhost/descriptors.rs"]
mod descriptors;
#[cfg(test)]
#[path = "../../../driver/request.rs"]
mod request;
#[cfg(test)]
#[path = "../../../driver/segment.rs"]
mod segment;
#[cfg(test)]
#[path = "../../../driver/streams.rs"]
mod streams;
#[cfg(test)]
#[path = "../../../driver/threshold.rs"]
mod threshold;
#[cfg(test)]
#[path = "../../../driver/transfer.rs"]
mod transfer;
#[cfg(test)]
#[path = "../../../driver/window.rs"]
mod window;
#[cfg(test)]
#[path = "../../../driver/zone_request.rs"]
mod zone_request;

#[cfg(test)]
mod choice_tests;
#[cfg(test)]
mod descriptors_tests;
#[cfg(test)]
mod request_tests;
#[cfg(test)]
mod segment_tests;
#[cfg(test)]
mod streams_tests;
#[cfg(test)]
mod threshold_tests;
#[cfg(test)]
mod transfer_tests;
#[cfg(test)]
mod window_tests;
#[cfg(test)]
mod zone_request_tests;
