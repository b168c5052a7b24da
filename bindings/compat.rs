// SPDX-License-Identifier: GPL-2.0

//! Where the kernel crate differs from one kernel series to the next.

use crate::bindings::raw;
use core::borrow::Borrow;
use kernel::prelude::*;

/// `EOPNOTSUPP`, which the crate has from 7.3 on.
pub(crate) fn eopnotsupp() -> Error {
    Error::from_errno(-(raw::EOPNOTSUPP as i32))
}

/// What `value()` of a module parameter returns: a reference up to 7.2, a copy from 7.3 on.
pub(crate) fn parameter(value: impl Borrow<u32>) -> u32 {
    *value.borrow()
}

/// A full barrier between processors: `barrier::smp_mb()` has a parameter from 7.3 on.
#[inline]
pub(super) fn smp_mb() {
    // SAFETY: A barrier may stand anywhere.
    unsafe { raw::smp_mb() };
}

/// A barrier between writes, for other processors.
#[inline]
pub(super) fn smp_wmb() {
    // SAFETY: A barrier may stand anywhere.
    unsafe { raw::smp_wmb() };
}
