// SPDX-License-Identifier: GPL-2.0

//! From finished bios to the used ring.

use super::{
    queue::Queue,
    request::Status,
    rest::{
        self,
        Rest, //
    },
    zone, //
};
use crate::bindings::{
    block::{
        BioError,
        Ended, //
    },
    vhost::{
        FinishedRequest,
        Request,
        VirtqueueGuard, //
    },
};

/// Requests that are more than their bios, by their weight, that are resumed in one turn of the worker.
const MAX_RESUMED: usize = 64;

/// Completes the requests that are done, oldest first, and shows them to the guest together.
pub(super) fn completions(guard: &mut VirtqueueGuard<'_, Queue>) {
    collect(guard);
    guard.signal_used();
}

/// Completes the requests that are done, oldest first. Whoever calls it shows them to the guest soon.
pub(super) fn collect(guard: &mut VirtqueueGuard<'_, Queue>) {
    let mut resumed = 0;

    loop {
        while let Some(request) = guard.next_completed() {
            if let Some(request) = done(guard, request) {
                // Resumed below.
                guard.defer(request);
            }
        }
        let Some(mut request) = guard.next_deferred() else {
            break;
        };
        if resumed >= MAX_RESUMED || guard.must_not_wait() {
            guard.defer(request);
            guard.requeue_completions();
            break;
        }
        if resumed == 0 {
            // That may take its time.
            guard.signal_used();
        }
        let rest = request.data().rest.as_ref();
        resumed += rest.map_or(1, |rest| rest.weight());
        if !rest::resume(guard, request) {
            if !guard.wait_for_completion() {
                // Nothing leads back here but this.
                guard.requeue_completions();
            }
            break;
        }
    }
}

/// What to say of several bios: that the disk cannot do it only if all that failed say so.
fn worse(one: Option<BioError>, other: Option<BioError>) -> Option<BioError> {
    match (one, other) {
        (None, error) | (error, None) => error,
        (Some(one), Some(other)) if one == other => Some(one),
        _ => Some(BioError::Failed),
    }
}

/// Completes a request whose bios are done. Returns it if it goes on, or if they are to be submitted again.
fn done<'a>(
    guard: &mut VirtqueueGuard<'_, Queue>,
    mut request: FinishedRequest<'a, Queue>,
) -> Option<Request<'a, Queue>> {
    let ended = request.ended();
    if ended == Ended::WouldBlock {
        // The next ones may have to wait, too.
        guard.data_mut().choice.refused();
        return Some(request.rewind(guard));
    }
    let mut failed = ended == Ended::Failed;
    let mut error = None;
    while let Some(bio) = request.take_bio() {
        if failed {
            error = worse(error, bio.error());
            continue;
        }
        let in_flight = request.data();
        let rest = in_flight.rest.as_mut();
        let copied = rest.is_none_or(|rest| rest.copy(&bio).is_ok());
        failed = !copied || in_flight.zone.bio_done(&bio).is_err();
    }

    let in_flight = request.data();
    if let (false, Some(Rest::Report(report))) = (failed, in_flight.rest.as_deref_mut()) {
        match report.copy() {
            Ok(len) => in_flight.read_len = len,
            Err(_) => failed = true,
        }
    }
    let mut status = Status::Ok;
    if failed {
        let in_flight = request.data();
        let failure = in_flight.zone.status(error);
        let rest = in_flight.rest.as_mut();
        match rest.map_or(Err(failure), |rest| rest.failed(error, failure, guard)) {
            Ok(()) => request.clear_failure(),
            Err(failure) => status = failure,
        }
    }
    let rest = request.data().rest.as_mut();
    if status == Status::Ok && rest.is_some_and(|rest| !rest.is_submitted()) {
        return Some(request.go_on());
    }

    let in_flight = request.finish();
    zone::finished(guard, in_flight.rest.as_deref());
    if in_flight.bounces {
        guard.data_mut().bouncing -= 1;
    }
    let written = if status == Status::Ok {
        in_flight.read_len
    } else {
        0
    };
    guard.complete(in_flight.completion, status as u8, written);
    None
}
