// SPDX-License-Identifier: GPL-2.0

//! A virtqueue's work: fetch and submit while there is something, complete what is done.

use super::{
    choice::{
        Choice,
        Handler, //
    },
    complete,
    device::Settings,
    poll,
    ranges::Refused,
    rest::{
        self,
        Rest, //
    },
    streams::Streams,
    submit::{
        self,
        Batch, //
    },
    threshold::{
        self,
        Threshold, //
    },
    window::Window,
    zone::InZone, //
};
use crate::bindings::{
    block,
    vhost::{
        busy_clock,
        jiffies,
        Completion,
        Idle,
        Operations,
        Reminded,
        Turn,
        Virtqueue,
        VirtqueueGuard, //
    },
};
use kernel::{
    prelude::*,
    sync::Arc,
    time::{
        msecs_to_jiffies,
        Delta,
        Jiffies, //
    }, //
};

/// Requests, and bytes of data, that one virtqueue submits before others get their turn.
pub(crate) const WEIGHT: i32 = 256;
pub(crate) const BYTE_WEIGHT: i32 = 16 << 20;

/// Most requests, and bytes of data, that the guest is not shown while the ring is looked at once more.
const MOST_WAITING: usize = 16;
const MOST_WAITING_BYTES: usize = 64 << 10;

/// Most bytes of a request, on average, for several to wait for one kick.
const COALESCED_BYTES: usize = MOST_WAITING_BYTES / threshold::MOST as usize;

/// Between two kicks, after which the guest may have begun something else.
const PAUSE_MS: u32 = 100;

/// What the driver keeps of a virtqueue.
pub(crate) struct Queue {
    pub(super) settings: Arc<Settings>,
    /// A chain waits in the ring for memory that a request in flight will free.
    pub(super) starved: bool,
    /// Requests that are being bounced.
    pub(super) bouncing: usize,
    /// How the disk turned out not to write zeroes by itself.
    pub(super) refused: Refused,
    /// Reports of zones that use more memory than others.
    pub(super) large_reports: usize,
    /// Where the guest's reads and writes go on.
    pub(super) streams: Streams,
    /// Who handles the next kick, if the guest waits for all that came before.
    pub(super) choice: Choice,
    /// When the last kick was handled.
    kicked_at: Jiffies,
    /// How many requests the guest adds before it kicks.
    threshold: Threshold,
    /// How long to poll when there is nothing to do.
    pub(super) window: Window,
    /// Since when there has been nothing to do, by `busy_clock()`, if user space wants polling.
    pub(super) idle_since: Option<u64>,
}

impl Queue {
    pub(super) fn new(settings: Arc<Settings>) -> Self {
        Self {
            settings,
            starved: false,
            bouncing: 0,
            refused: Refused::default(),
            large_reports: 0,
            streams: Streams::default(),
            choice: Choice::default(),
            kicked_at: jiffies(),
            threshold: Threshold::default(),
            window: Window::default(),
            idle_since: None,
        }
    }

    /// Forgets what a backend that was stopped left.
    pub(super) fn reset(&mut self) {
        self.starved = false;
        self.bouncing = 0;
        self.refused = Refused::default();
        self.large_reports = 0;
        self.streams = Streams::default();
        self.choice = Choice::default();
        self.threshold = Threshold::default();
        self.window = Window::default();
        self.idle_since = None;
    }
}

/// A request whose bios are in flight.
pub(crate) struct InFlight {
    pub(super) completion: Completion,
    /// Bytes that the guest's memory gets if all goes well, the status apart.
    pub(super) read_len: usize,
    /// Whether its data is copied: it counts in [`Queue::bouncing`].
    pub(super) bounces: bool,
    /// What does not fit the bios in flight.
    pub(super) rest: Option<KBox<Rest>>,
    /// What there is to it on a zoned disk.
    pub(super) zone: InZone,
}

impl Operations for Queue {
    type Request = InFlight;

    const GRACE: Delta = rest::GRACE;

    fn handle_kick(vq: &Virtqueue<Self>, turn: &Turn) {
        kicked(&mut vq.lock(), turn, Handler::Worker);
    }

    fn handle_direct_kick(guard: &mut VirtqueueGuard<'_, Self>) {
        kicked(guard, &Turn::NOT_LAST, Handler::Kicker);
    }

    fn handle_completions(guard: &mut VirtqueueGuard<'_, Self>) {
        complete::completions(guard);
    }

    fn handle_slow(request: &mut InFlight) {
        if let Some(Rest::Report(report)) = request.rest.as_deref_mut() {
            report.ask();
        }
    }

    fn handle_completion_work(vq: &Virtqueue<Self>, turn: &Turn) {
        let mut guard = vq.lock();
        poll::woken(&mut guard);
        complete::completions(&mut guard);
        let starved = core::mem::take(&mut guard.data_mut().starved);
        if starved || poll::window(&guard) != 0 {
            // Fetching asks for a kick for each.
            guard.take_reminder();
            run(&mut guard, turn);
        } else {
            poll::idle(&mut guard);
        }
    }
}

/// Handles a kick.
fn kicked(guard: &mut VirtqueueGuard<'_, Queue>, turn: &Turn, by: Handler) {
    poll::woken(guard);
    let queue = guard.data_mut();
    let now = jiffies();
    let ticks = now.wrapping_sub(queue.kicked_at);
    queue.kicked_at = now;
    // Mostly none: that spares the call.
    if ticks > 0 && ticks >= msecs_to_jiffies(PAUSE_MS) {
        queue.choice.paused();
        queue.threshold = Threshold::default();
    }
    let reminder = guard.take_reminder();
    let batch = run(guard, turn);
    coalesce(guard, &batch, reminder);
    if reminder == Reminded::Yes || !guard.takes_direct_kicks() {
        return;
    }
    let choice = &mut guard.data_mut().choice;
    let next = if batch.refused {
        choice.refused()
    } else {
        choice.handled(by, batch.requests)
    };
    guard.set_direct_kick(next == Handler::Kicker);
}

/// Learns what a kick was for, or that none came, and asks the guest to add several requests before the next, if that
/// is for the best: they are small, and nothing is in flight that it could wait for.
#[inline]
fn coalesce(guard: &mut VirtqueueGuard<'_, Queue>, batch: &Batch, reminder: Reminded) {
    let found = batch.requests;
    if !guard.data().settings.coalesces_kicks || (found == 0 && reminder == Reminded::No) {
        return;
    }
    let is_done = guard.is_all_complete();
    let threshold = &mut guard.data_mut().threshold;
    if !is_done {
        return threshold.failed(found);
    }
    match (reminder, threshold.next()) {
        (Reminded::Yes, Some((requests, _))) if found < requests as usize => {
            threshold.failed(found);
            if found == 0 {
                // It has nothing to do.
                return;
            }
        }
        // Or nothing came, and the ring was looked at for another reason.
        _ => threshold.kicked(found, busy_clock),
    }
    let Some((requests, ns)) = threshold.next() else {
        return;
    };
    let small = batch.bytes <= found * COALESCED_BYTES;
    let asked = if small && guard.busyloop_timeout() == 0 {
        // CAST: It is at most `threshold::MOST`, and at most `threshold::LONGEST`.
        guard.kick_after(requests as u16, Delta::from_nanos(ns as i64))
    } else {
        None
    };
    guard.data_mut().threshold.asked(asked.map(u32::from));
}

/// Fetches and submits until the ring is empty, the worker's turn is over, or nothing can be had. Returns what that
/// was.
///
/// What completes within its own submission, or in a softirq of this processor behind it, is completed here,
/// before the worker sleeps or the task goes on, and so is what comes while it polls.
fn run(guard: &mut VirtqueueGuard<'_, Queue>, turn: &Turn) -> Batch {
    let mut batch = Batch::default();
    fetch(guard, turn, &mut batch);
    batch
}

/// Whether the guest may wait to be shown what is complete until the ring was looked at once more: if it is adding
/// requests it is interrupted once for all of them. `shown` is what was submitted when it was last shown all.
///
/// Only while nothing is in flight, as the next submission might have to wait for that.
fn may_wait(guard: &VirtqueueGuard<'_, Queue>, batch: &Batch, shown: &Batch) -> bool {
    let requests = batch.requests - shown.requests;
    let bytes = batch.bytes - shown.bytes;
    let little = requests <= MOST_WAITING && bytes <= MOST_WAITING_BYTES;
    requests != 0 && little && guard.is_all_complete()
}

fn fetch(guard: &mut VirtqueueGuard<'_, Queue>, turn: &Turn, batch: &mut Batch) {
    let Some(mut ring) = guard.disable_notify() else {
        // What was complete may have waited for the device IOTLB.
        complete::completions(guard);
        return;
    };

    let mut shown = *batch;
    loop {
        let end = block::with_plug(|plug| submit::batch(&mut ring, batch, plug));
        block::run_softirqs();
        let vq = ring.guard();
        complete::collect(vq);
        let looks_again = matches!(end, submit::End::Empty) && poll::window(vq) == 0;
        if !looks_again || !may_wait(vq, batch, &shown) {
            vq.signal_used();
            shown = *batch;
        }

        match end {
            submit::End::Empty => {
                if poll::poll(&mut ring, turn) {
                    continue;
                }
                match ring.enable() {
                    Idle::Yes => return guard.signal_used(),
                    Idle::No(again) => ring = again,
                }
                poll::work_came(ring.guard());
            }
            submit::End::Weight | submit::End::ForWorker => return ring.requeue(),
            submit::End::Turn => (),
            submit::End::NoMemory => {
                let waits = ring.wait_for_completion();
                guard.data_mut().starved = waits;
                return;
            }
            submit::End::NoTranslation => return ring.wait_for_iotlb(),
            submit::End::Broken => return,
        }
    }
}
