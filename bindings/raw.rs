// SPDX-License-Identifier: GPL-2.0

//! bindgen's output, and nothing else.
//!
//! Types that the kernel crate has too are the kernel crate's own: see `Kbuild`.

#![allow(
    clippy::all,
    clippy::ptr_as_ptr,
    clippy::ref_as_ptr,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

include!(env!("VHOST_BLK_BINDINGS"));
