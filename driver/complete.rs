// SPDX-License-Identifier: GPL-2.0

//! From finished bios to the used ring.

use super::{
    queue::Queue,
    request::Status,
    rest, //
};
use crate::bindings::vhost::{
    Request,
    VirtqueueGuard, //
};

/// Requests with more data than their bios that are resumed in one turn of the worker.
const MAX_RESUMED: usize = 64;

/// Completes the requests that are done, oldest first, and shows them to the guest together.
pub(super) fn completions(guard: &mut VirtqueueGuard<'_, Queue>) {
    let mut resumed = 0;

    loop {
        while let Some(request) = guard.next_completed() {
            if let Some(request) = done(guard, request) {
                // Resumed below.
                guard.defer(request);
            }
        }
        let Some(request) = guard.next_deferred() else {
            break;
        };
        if resumed == MAX_RESUMED {
            guard.defer(request);
            guard.requeue_completions();
            break;
        }
        resumed += 1;
        if !rest::resume(guard, request) {
            if !guard.wait_for_completion() {
                // Nothing leads back here but this.
                guard.requeue_completions();
            }
            break;
        }
    }
    guard.signal_used();
}

/// Completes a request whose bios are done. Returns it if it has data that was not submitted yet.
fn done<'a>(
    guard: &mut VirtqueueGuard<'_, Queue>,
    mut request: Request<'a, Queue>,
) -> Option<Request<'a, Queue>> {
    while let Some(bio) = request.take_bio() {
        if request.failed() {
            continue;
        }
        if let Some(rest) = request.data().rest.as_mut() {
            if rest.copy(&bio).is_err() {
                request.fail();
            }
        }
    }

    let failed = request.failed();
    let rest = request.data().rest.as_ref();
    if !failed && rest.is_some_and(|rest| !rest.is_submitted()) {
        return Some(request);
    }

    let in_flight = request.finish();
    if in_flight.bounces {
        guard.data_mut().bouncing -= 1;
    }
    let (status, written) = if failed {
        (Status::IoErr, 0)
    } else {
        (Status::Ok, in_flight.read_len)
    };
    guard.complete(in_flight.completion, status as u8, written);
    None
}
