// SPDX-License-Identifier: GPL-2.0

//! The block layer: devices, their zones, bios and plugs.

mod bio;
mod device;
mod plug;
mod submitter;
mod zone;

pub(crate) use bio::{
    Bio,
    BioError,
    BioRoom,
    BioSet,
    BuildError,
    Building,
    Finished,
    Op,
    PendingBios,
    MAX_BIO_PAGES, //
};
pub(crate) use device::BlockDevice;
pub(crate) use plug::{
    run_softirqs,
    with_plug, //
};
pub(crate) use submitter::Submitter;
pub(crate) use zone::Zone;
