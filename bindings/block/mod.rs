// SPDX-License-Identifier: GPL-2.0

//! The block layer: devices and image files, zones, bios and plugs.

mod backend;
mod bio;
mod image;
mod plug;
mod submitter;
mod zone;

pub(crate) use backend::Backend;
pub(crate) use bio::{
    Bio,
    BioError,
    BioRoom,
    BioSet,
    BuildError,
    Building,
    Ended,
    Finished,
    Op,
    PendingBios,
    MAX_BIO_PAGES, //
};
pub(crate) use plug::{
    run_softirqs,
    with_plug,
    Plug, //
};
pub(crate) use submitter::Submitter;
pub(crate) use zone::Zone;
