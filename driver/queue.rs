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
    threshold::Threshold,
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
        NotifyDisabled,
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
const COALESCED_BYTES: usize = 8 << 10;

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
    /// How many it was asked for, if it has not kicked since.
    asked: Option<u16>,
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
            asked: None,
            window: Window::default(),
            idle_since: None,
        }
    }

    /// Forgets what a backend that was stopped left.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.settings.clone());
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
            let in_time = wanted(&mut guard).in_time;
            run(&mut guard, turn, in_time);
        } else {
            poll::idle(&mut guard);
        }
    }
}

/// Handles a kick.
fn kicked(guard: &mut VirtqueueGuard<'_, Queue>, turn: &Turn, by: Handler) {
    poll::woken(guard);
    let queue = guard.data_mut();
    let settled = queue.threshold.settled();
    let now = jiffies();
    let ticks = now.wrapping_sub(queue.kicked_at);
    queue.kicked_at = now;
    // Mostly none: that spares the call.
    if ticks > 0 && ticks >= msecs_to_jiffies(PAUSE_MS) {
        queue.choice.paused();
        queue.threshold.paused();
    }
    let wanted = wanted(guard);
    let batch = run(guard, turn, wanted.in_time);
    learn(guard, batch.requests, &wanted);
    let queue = guard.data_mut();
    if queue.threshold.settled() != settled {
        queue.choice.kicks_changed();
    }
    // Who came because it was time, though it is not its turn, says nothing of kicks.
    let is_kick = wanted.reminder != Reminded::Yes
        || (batch.requests >= wanted.in_time && by == queue.choice.next());
    if !is_kick || !guard.takes_direct_kicks() {
        return;
    }
    let queue = guard.data_mut();
    let next = if batch.refused {
        queue.choice.refused()
    } else if queue.threshold.is_trying() {
        // One is tried at a time.
        queue.choice.next()
    } else {
        queue.choice.handled(by, batch.requests)
    };
    guard.set_direct_kick(next == Handler::Kicker);
}

/// What is wanted of the guest when the ring is looked at.
struct Wanted {
    /// Requests that it was asked for, if it was.
    asked: Option<u16>,
    /// Whether it had time to add them.
    reminder: Reminded,
    /// The fewest that it has to have added by now.
    in_time: usize,
}

/// Says what is wanted of the guest, and stops the timer that waits for it.
#[inline]
fn wanted(guard: &mut VirtqueueGuard<'_, Queue>) -> Wanted {
    let asked = guard.data_mut().asked.take();
    let reminder = guard.take_reminder();
    let in_time = match (reminder, asked) {
        (Reminded::Yes, Some(asked)) => asked.into(),
        _ => 0,
    };
    Wanted {
        asked,
        reminder,
        in_time,
    }
}

/// Lets the guest kick again after `batch`. Returns what the ring has, and for how many requests the guest is to kick,
/// if for several.
///
/// It is asked for several only if requests are small, and not right after it was late.
#[inline]
fn enable<'g, 'a>(
    mut ring: NotifyDisabled<'g, 'a, Queue>,
    batch: &Batch,
    in_time: usize,
) -> (Idle<NotifyDisabled<'g, 'a, Queue>>, Option<u16>) {
    let guard = ring.guard();
    let next = guard.data().threshold.next();
    let Some((requests, ns)) = next.filter(|_| batch.requests >= in_time) else {
        return (ring.enable(), None);
    };
    let small = batch.bytes <= batch.requests * COALESCED_BYTES;
    if small && guard.busyloop_timeout() == 0 {
        // CAST: It is at most `threshold::LONGEST`.
        match ring.enable_after(requests, Delta::from_nanos(ns as i64)) {
            Ok(idle) => return (idle, Some(requests)),
            Err(again) => ring = again,
        }
    }
    ring.guard().data_mut().threshold.cannot_ask();
    (ring.enable(), None)
}

/// Learns that `found` requests were there when the ring was looked at.
#[inline]
fn learn(guard: &mut VirtqueueGuard<'_, Queue>, found: usize, wanted: &Wanted) {
    if !guard.data().settings.coalesces_kicks || (found == 0 && wanted.in_time == 0) {
        return;
    }
    if found < wanted.in_time {
        let is_idle = guard.is_all_complete();
        let queue = guard.data_mut();
        queue.threshold.failed(found, is_idle, busy_clock);
    } else {
        let queue = guard.data_mut();
        let by = queue.choice.next();
        queue.threshold.kicked(found, wanted.asked, by, busy_clock);
    }
}

/// Fetches and submits until the ring is empty, the worker's turn is over, or nothing can be had. Returns what that
/// was.
///
/// What completes within its own submission, or in a softirq of this processor behind it, is completed here,
/// before the worker sleeps or the task goes on, and so is what comes while it polls.
fn run(guard: &mut VirtqueueGuard<'_, Queue>, turn: &Turn, in_time: usize) -> Batch {
    let mut batch = Batch::default();
    fetch(guard, turn, in_time, &mut batch);
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

fn fetch(guard: &mut VirtqueueGuard<'_, Queue>, turn: &Turn, in_time: usize, batch: &mut Batch) {
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
                match enable(ring, batch, in_time) {
                    (Idle::Yes, asked) => {
                        guard.data_mut().asked = asked;
                        return guard.signal_used();
                    }
                    (Idle::No(again), _) => ring = again,
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
