// SPDX-License-Identifier: GPL-2.0

//! Starting, stopping, resetting, closing and dying, with requests in flight and without.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vhost_blk_ring::uapi::{self, feature};
use vhost_blk_ring::{
    Device, Guest, Kind, Options, Queue, Request, Ring, Shape, Status, Table, WorkerMode, Workers,
};

use crate::check::{self, UsedLen, works};
use crate::context::{Context, PATIENCE, Test, test};
use crate::{disk, memory, requests};

pub(crate) const TESTS: &[Test] = &[
    test!(
        "life.ring_resized",
        "rings of other sizes between stop and start",
        ring_resized
    ),
    test!(
        "life.start_and_stop",
        "many starts and stops",
        start_and_stop
    ),
    test!(
        "life.backend_is_released",
        "the disk is held while it runs, and not longer",
        backend_is_released
    ),
    test!(
        "life.stop_under_load",
        "stop drains, and what it left is done after the next start",
        180,
        |context| { stop_under_load(context, context.disk_path(), 40) }
    ),
    test!(
        "life.stop_under_load_slow",
        "the same on a slow disk",
        180,
        |context| { stop_under_load(context, context.slow_disk_path()?, 6) }
    ),
    test!(
        "life.stop_waits",
        "stop returns when the slow disk is done, not before",
        stop_waits
    ),
    test!(
        "life.stop_demanding",
        "stop with copied and long requests in flight, and the next start",
        180,
        stop_demanding
    ),
    test!(
        "life.read_only_in_write",
        "a disk that becomes read-only during a long write: the rest of it fails",
        60,
        read_only_in_write
    ),
    test!(
        "life.close_demanding",
        "close with copied and long requests in flight",
        180,
        close_demanding
    ),
    test!(
        "life.close_in_flight",
        "close with requests in flight",
        120,
        close_in_flight
    ),
    test!(
        "life.killed_in_flight",
        "the process is killed with requests in flight",
        180,
        |context| { killed(context, &["busy_task", "busy_kthread"]) }
    ),
    test!(
        "life.killed_while_held",
        "the same while another process holds the device",
        180,
        |context| { killed(context, &["busy_task_held", "busy_kthread_held"]) }
    ),
    test!(
        "life.reset_under_load",
        "RESET_OWNER with requests in flight",
        120,
        reset_under_load
    ),
    test!(
        "life.table_under_load",
        "SET_MEM_TABLE with a live backend",
        |context| {
            under_load(context, |device, guest_regions, _| {
                works("SET_MEM_TABLE", device.set_mem_table(guest_regions))
            })
        }
    ),
    test!(
        "life.call_under_load",
        "SET_VRING_CALL with a live backend",
        |context| {
            let other = vmm_sys_util::eventfd::EventFd::new(0)?;
            let fd = std::os::fd::AsRawFd::as_raw_fd(&other);
            OTHER_CALL.store(u64::from(fd.unsigned_abs()), Ordering::Relaxed);
            under_load(context, |device, _, round| {
                let fd = i32::try_from(OTHER_CALL.load(Ordering::Relaxed))?;
                let fd = if round % 3 == 0 { -1 } else { fd };
                works("SET_VRING_CALL", device.set_vring_call(0, fd))
            })
        }
    ),
    test!(
        "life.workers_under_load",
        "ATTACH_VRING_WORKER with a live backend",
        |context| {
            under_load(context, |device, _, _| {
                let first = works("GET_VRING_WORKER", device.get_vring_worker(0))?;
                let new = works("NEW_WORKER", device.new_worker())?;
                works("ATTACH_VRING_WORKER", device.attach_vring_worker(0, new))?;
                works(
                    "ATTACH_VRING_WORKER back",
                    device.attach_vring_worker(0, first),
                )?;
                works("FREE_WORKER", device.free_worker(new))
            })
        }
    ),
    test!(
        "life.settings_under_load",
        "everything else that is legal with a live backend",
        |context| {
            under_load(context, |device, _, round| {
                works("SET_FEATURES, the same", device.set_features(LOAD_FEATURES))?;
                works("SET_WRITEBACK", device.set_writeback(round % 2 == 0))?;
                works("SET_SERIAL", device.set_serial(&[b'a'; 20]))?;
                works("GET_INFO", device.info(None))?;
                works(
                    "SET_VRING_BUSYLOOP_TIMEOUT",
                    device.set_vring_busyloop_timeout(0, if round % 2 == 0 { 1000 } else { 0 }),
                )?;
                works("GET_VRING_BASE", device.get_vring_base(0)).map(drop)
            })
        }
    ),
    test!(
        "life.racing_ioctls",
        "ioctls of all kinds from several threads",
        120,
        |context| { racing(context, false) }
    ),
    test!(
        "life.racing_owners",
        "the same with SET_OWNER and RESET_OWNER among them",
        120,
        |context| { racing(context, true) }
    ),
    test!(
        "life.many_devices",
        "16 devices at once on one disk",
        120,
        many_devices
    ),
];

/// The descriptor that [`TESTS`] give the device to call instead of the ring's own.
static OTHER_CALL: AtomicU64 = AtomicU64::new(0);

/// How often the module is in use.
pub(crate) fn users() -> Option<u64> {
    let text = fs::read_to_string("/sys/module/vhost_blk/refcnt").ok()?;
    text.trim().parse().ok()
}

fn ring_resized(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queue_size = 64)?;
    for (round, size) in [64u16, 1024, 8, 256, 1, 2, 512, 1024, 16]
        .into_iter()
        .enumerate()
    {
        context.step(format_args!("ring of {size}"));
        guest.stop()?;
        let event_idx = guest.queue(0).ring.event_idx();
        let queue = Queue::new(&guest.memory().clone(), size, event_idx)?;
        *guest.queue(0) = queue;
        // Somewhere else each time, too.
        let base = u16::try_from(round * 9000 % 65536)?;
        guest.queue(0).reset(base)?;
        guest.resume(context.disk()?, &[base])?;
        let queue = guest.queue(0);
        let mut count = 0;
        while count < 2 * usize::from(size) {
            while queue.ring.free_descriptors() > 0 {
                let request = Request::read(8 * (count as u64 % 2048), 4096);
                queue.submit(request, &Shape::default().table(Table::Indirect))?;
                count += 1;
            }
            queue.kick()?;
            for done in queue.wait_all(PATIENCE)? {
                let what = format!("ring of {size}");
                check::outcome(&what, &done, Status::Ok, UsedLen::Full)?;
                check::same(&what, &done.data, &disk::pattern(done.request.sector, 8))?;
            }
        }
    }
    Ok(())
}

fn start_and_stop(context: &Context) -> Result<()> {
    let mut guest = context.started(|options| options.queues = 4)?;
    for round in 0..100u64 {
        context.step(format_args!("round {round}"));
        let bases = guest.stop()?;
        guest.resume(context.disk()?, &bases)?;
        let queue = usize::try_from(round % 4)?;
        check::read(round, guest.queue(queue), 8 * round, 8, &Shape::default())?;
    }
    // With nothing done in between, and starts of a device that was kicked while it was stopped.
    for round in 0..20 {
        let bases = guest.stop()?;
        guest
            .queue(0)
            .submit(Request::read(0, 4096), &Shape::default())?;
        guest.queue(0).ring.publish()?;
        if round % 2 == 0 {
            guest.queue(0).ring.kick()?;
        }
        guest.resume(context.disk()?, &bases)?;
        let done = guest
            .queue(0)
            .wait(PATIENCE)
            .with_context(|| format!("a request from before the start, round {round}"))?;
        check::outcome(round, &done, Status::Ok, UsedLen::Full)?;
    }
    Ok(())
}

fn open_exclusively(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
        .open(path)
}

fn backend_is_released(context: &Context) -> Result<()> {
    let mut guest = context.guest(|_| {})?;
    let open = || open_exclusively(context.disk_path());
    for round in 0..5 {
        let disk = open().with_context(|| format!("the disk is in use, round {round}"))?;
        guest.start(&disk)?;
        drop(disk);
        check::healthy("its descriptor is closed", &mut guest, 0)?;
        let held = open().map_err(|e| e.raw_os_error());
        ensure!(
            matches!(held, Err(Some(libc::EBUSY))),
            "the running device does not hold its disk: {held:?}"
        );
        if round == 4 {
            break;
        }
        let bases = guest.stop()?;
        let disk = open().context("the stopped device holds its disk")?;
        drop(disk);
        let (device, queues) = guest.split();
        queues[0].ring.set_up(device, 0, bases[0])?;
    }
    drop(guest);
    open().context("the closed device holds its disk")?;
    // A start that fails holds nothing either.
    let device = context.device()?;
    device.set_owner()?;
    let disk = open()?;
    ensure!(device.set_backend(&disk).is_err(), "a start without rings");
    drop(disk);
    open().context("the failed start holds the disk")?;
    Ok(())
}

/// Fills both queues of a guest with reads of the pattern and writes to the scratch area, and kicks.
fn load(guest: &mut Guest, seed: u64) -> Result<()> {
    for (number, queue) in (0u64..).zip(guest.queues()) {
        let mut n = 0;
        while queue.ring.free_descriptors() >= 3 {
            // Each place is written once, so that the order does not matter.
            let place = 8 * (64 * number + n);
            let request = if n % 2 == 0 {
                Request::read(place, 4096)
            } else {
                let sector = SCRATCH_START + place;
                Request::write(sector, disk::seeded(seed, sector, 8))
            };
            queue.submit(request, &Shape::default())?;
            n += 1;
        }
        queue.kick()?;
    }
    Ok(())
}

/// Where [`load`] writes, in sectors: within a slow disk, too.
const SCRATCH_START: u64 = 2048;

/// Checks what [`load`] has done. `known` says whether the disk holds the pattern.
fn loaded(what: &str, done: &vhost_blk_ring::Completion, known: bool) -> Result<()> {
    check::outcome(what, done, Status::Ok, UsedLen::Full)?;
    if known && done.request.kind == Kind::In {
        check::same(what, &done.data, &disk::pattern(done.request.sector, 8))?;
    }
    Ok(())
}

/// A disk that keeps the pattern in its first MiB, for the time of a test.
fn with_pattern(path: &Path) -> Result<()> {
    let direct = disk::Disk::open(path)?;
    direct.write(0, &disk::pattern(0, 2048))
}

fn stop_under_load(context: &Context, path: &Path, rounds: u64) -> Result<()> {
    with_pattern(path)?;
    let mut guest = context.guest(|options| {
        options.queues = 2;
        options.queue_size = 128;
    })?;
    let open = || disk::open(path, true, true);
    guest.start(open()?)?;
    let mut left_over = 0;
    for round in 0..rounds {
        context.step(format_args!("round {round}"));
        load(&mut guest, round)?;
        thread::sleep(Duration::from_micros(round * 97 % 4000));
        let bases = guest.stop()?;
        let running = guest.device().info(None)?.flags & uapi::VHOST_BLK_INFO_RUNNING;
        ensure!(running == 0, "round {round}: it says that it runs");
        for (number, queue) in guest.queues().iter_mut().enumerate() {
            let used = queue.ring.used_idx()?;
            ensure!(
                bases[number] == used,
                "round {round}, queue {number}: stopped at {}, but the used index is {used}",
                bases[number]
            );
            while let Some(done) = queue.poll()? {
                loaded(
                    &format!("round {round}, queue {number}, before the stop"),
                    &done,
                    true,
                )?;
            }
            left_over += queue.in_flight();
        }
        // Nothing is touched while it is stopped, kicked or not.
        for queue in guest.queues() {
            queue.ring.kick()?;
        }
        thread::sleep(Duration::from_millis(2));
        for (number, queue) in guest.queues().iter_mut().enumerate() {
            ensure!(
                queue.poll()?.is_none(),
                "queue {number} goes on after the stop"
            );
        }
        works("start", guest.resume(open()?, &bases))?;
        for (number, queue) in guest.queues().iter_mut().enumerate() {
            for done in queue.wait_all(PATIENCE)? {
                loaded(
                    &format!("round {round}, queue {number}, after the stop"),
                    &done,
                    true,
                )?;
            }
        }
    }
    // A device that always does everything before it stops was not tested, but is not wrong.
    context.step(format_args!(
        "{left_over} requests were left over by {rounds} stops"
    ));
    let direct = disk::Disk::open(path)?;
    for n in (1..42u64).step_by(2) {
        let sector = SCRATCH_START + 8 * n;
        check::same(
            format_args!("disk at sector {sector}"),
            &direct.read(sector, 8)?,
            &disk::seeded(rounds - 1, sector, 8),
        )?;
    }
    drop(guest);
    disk::prepare(context.disk_path())
}

/// Requests in flight on the slow disk, for certain: fetched and not used.
fn slow_load(guest: &mut Guest) -> Result<()> {
    load(guest, 1)?;
    let deadline = Instant::now() + PATIENCE;
    while guest.device().get_vring_base(0)? == 0 {
        ensure!(Instant::now() < deadline, "no request is fetched");
        thread::sleep(Duration::from_millis(1));
    }
    ensure!(
        guest.queue(0).ring.used_idx()? == 0,
        "the slow disk is too fast for this test"
    );
    Ok(())
}

/// No request is in flight any more, and no page of one pinned.
fn drained(what: &str, pinned: Option<i64>) -> Result<()> {
    let now = memory::pinned_pages();
    ensure!(
        now == pinned,
        "{what} with requests in flight: {now:?} pages are pinned, {pinned:?} before"
    );
    Ok(())
}

/// A guest on the slow disk.
fn slow_guest(
    context: &Context,
    kthread: bool,
    change: impl FnOnce(&mut Options),
) -> Result<Guest> {
    let slow_disk = context.slow_disk()?;
    let worker_mode = context.worker_mode(kthread)?;
    let guest = context.guest(|options| {
        options.worker_mode = worker_mode;
        options.queues = 2;
        options.queue_size = 128;
        change(options);
    })?;
    guest.start(slow_disk)?;
    Ok(guest)
}

fn stop_waits(context: &Context) -> Result<()> {
    let pinned = memory::pinned_pages();
    let mut guest = slow_guest(context, false, |_| {})?;
    slow_load(&mut guest)?;
    let bases = guest.stop()?;
    drained("stopped", pinned)?;
    for (queue, base) in guest.queues().iter_mut().zip(bases) {
        let used = queue.ring.used_idx()?;
        ensure!(
            used == base,
            "stopped at {base}, but the used index is {used}"
        );
        while let Some(done) = queue.poll()? {
            loaded("before the stop", &done, false)?;
        }
    }
    Ok(())
}

/// After a process died, nothing of its device is left some time later.
fn nothing_left(what: &str, users_before: Option<u64>, pinned_before: Option<i64>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (users, pinned) = (users(), memory::pinned_pages());
        if users == users_before && pinned == pinned_before {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{what}: the module is used {users:?} times, {users_before:?} before; {pinned:?} pages \
             are pinned, {pinned_before:?} before"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn close_in_flight(context: &Context) -> Result<()> {
    let (users, pinned) = (users(), memory::pinned_pages());
    for round in 0..5 {
        context.step(format_args!("round {round}"));
        let mut guest = slow_guest(context, round % 2 == 1, |_| {})?;
        slow_load(&mut guest)?;
        drop(guest);
        drained("closed", pinned)?;
        nothing_left("closed", users, pinned)?;
    }
    Ok(())
}

fn killed(context: &Context, parts: &[&str]) -> Result<()> {
    context.slow_disk_path()?;
    let (users, pinned) = (users(), memory::pinned_pages());
    for round in 0..3 {
        for part in parts {
            context.step(format_args!("{part}, round {round}"));
            let mut child = context
                .again()?
                .arg("--child")
                .arg(part)
                .stdout(Stdio::piped())
                .spawn()?;
            let mut said = String::new();
            let stdout = child.stdout.take().context("no pipe")?;
            BufReader::new(stdout).read_line(&mut said)?;
            if said.trim() != "busy" {
                // It has ended, or will.
                child.kill()?;
                child.wait()?;
                bail!("the other process ({part}) said: {said}");
            }
            thread::sleep(Duration::from_millis(7 * round));
            child.kill()?;
            child.wait()?;
            nothing_left(part, users, pinned)?;
        }
    }
    Ok(())
}

/// The part of [`killed`] that the other process plays.
pub(crate) fn busy_until_killed(context: &Context, part: &str) -> Result<()> {
    let mode = if part.contains("kthread") {
        WorkerMode::Kthread
    } else {
        WorkerMode::Task
    };
    let mut guest = context.guest(|options| {
        options.queues = 2;
        options.queue_size = 128;
        options.worker_mode = Some(mode);
    })?;
    guest.start(context.slow_disk()?)?;
    if part.ends_with("held") {
        // It outlives us, and nobody waits for it but the test, by the module's count of users.
        context
            .again()?
            .arg("--child")
            .arg("hold")
            .stdin(guest.device().file().try_clone()?)
            .stdout(Stdio::null())
            .spawn()?;
    }
    slow_load(&mut guest)?;
    println!("busy");
    std::io::stdout().flush()?;
    loop {
        for queue in guest.queues() {
            while queue.poll()?.is_some() {}
        }
        load(&mut guest, 2)?;
        thread::sleep(Duration::from_millis(1));
    }
}

/// Holds a device whose owner dies meanwhile, and tries what it may not do.
pub(crate) fn hold(device: File) -> Result<()> {
    let device = Device::from_file(device);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(800) {
        ensure!(
            device.stop().is_err(),
            "another process may stop the device"
        );
        thread::sleep(Duration::from_millis(50));
        // What needs no owner still answers.
        device.info(None)?;
        device.get_features()?;
    }
    Ok(())
}

fn reset_under_load(context: &Context) -> Result<()> {
    let slow = context.slow_disk_path().ok().map(Path::to_path_buf);
    with_pattern(context.disk_path())?;
    let pinned = memory::pinned_pages();
    for round in 0..20u64 {
        context.step(format_args!("round {round}"));
        let path = match &slow {
            Some(slow) if round % 5 == 0 => slow.as_path(),
            _ => context.disk_path(),
        };
        let worker_mode = context.worker_mode(round % 2 == 1)?;
        let mut guest = context.guest(|options| {
            options.worker_mode = worker_mode;
            options.queues = 2;
            options.queue_size = 128;
        })?;
        guest.start(disk::open(path, true, true)?)?;
        load(&mut guest, round)?;
        thread::sleep(Duration::from_micros(round * 131 % 3000));
        works("RESET_OWNER", guest.device().reset_owner())?;
        drained("reset", pinned)?;
        // What was used is complete.
        let mut used = Vec::new();
        for queue in guest.queues() {
            while let Some(done) = queue.poll()? {
                loaded("before the reset", &done, false)?;
            }
            used.push(queue.ring.used_idx()?);
            queue.ring.kick()?;
        }
        thread::sleep(Duration::from_millis(2));
        for (queue, used) in guest.queues().iter().zip(used) {
            ensure!(queue.ring.used_idx()? == used, "it goes on after the reset");
        }
        // And all over again, on the same open file.
        let memory = guest.memory().clone();
        let regions = memory.regions();
        let features = guest.features();
        let (device, queues) = guest.split();
        device.set_owner()?;
        device.set_features(features)?;
        device.set_mem_table(&regions)?;
        queues[0].reset(0)?;
        let kept = Device::from_file(device.file().try_clone()?);
        set_up_anywhere(&kept, &queues[0].ring)?;
        device.set_backend(context.disk()?)?;
        check::answers("after the reset", &mut guest, 0)?;
    }
    disk::prepare(context.disk_path())
}

/// Sets ring 0 up by its addresses in this process.
fn set_up_anywhere(device: &Device, ring: &Ring) -> Result<()> {
    use std::os::fd::AsRawFd;
    device.set_vring_num(0, ring.size().into())?;
    device.set_vring_base(0, 0)?;
    device.set_vring_user_addr(&ring.user_addresses(0)?)?;
    device.set_vring_call(0, ring.call_event().as_raw_fd())?;
    device.set_vring_err(0, ring.err_event().as_raw_fd())?;
    Ok(device.set_vring_kick(0, ring.kick_event().as_raw_fd())?)
}

/// The features of guests under load.
const LOAD_FEATURES: u64 =
    feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::FLUSH;

/// Does `what` again and again, while two queues are busy, and all their requests complete with the
/// right data.
fn under_load(
    context: &Context,
    what: fn(&Device, &[vhost_blk_ring::Region], u32) -> Result<()>,
) -> Result<()> {
    let mut guest = context.started(|options| {
        options.queues = 2;
        options.queue_size = 64;
        options.features = LOAD_FEATURES;
    })?;
    let regions = guest.memory().regions();
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let (device, queues) = guest.split();
    let rounds = thread::scope(|scope| -> Result<u32> {
        let threads: Vec<_> = queues
            .iter_mut()
            .map(|queue| scope.spawn(|| busy(queue, &stop, &done)))
            .collect();
        let begin = Instant::now();
        let mut rounds = 0;
        let mut result = Ok(());
        while result.is_ok() && begin.elapsed() < Duration::from_secs(4) {
            result = what(device, &regions, rounds);
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            match thread.join() {
                Ok(outcome) => outcome?,
                Err(_) => bail!("a thread panicked"),
            }
        }
        result.map(|()| rounds)
    })?;
    let done = done.load(Ordering::Relaxed);
    ensure!(
        rounds > 10 && done > 100,
        "{rounds} rounds and {done} requests are not enough to tell"
    );
    // Calls go to the ring's own eventfd again.
    let (device, queues) = guest.split();
    for (number, queue) in (0..).zip(queues.iter()) {
        use std::os::fd::AsRawFd;
        device.set_vring_call(number, queue.ring.call_event().as_raw_fd())?;
    }
    for queue in 0..2 {
        check::healthy("afterwards", &mut guest, queue)?;
    }
    Ok(())
}

/// Reads until it is told to stop. It looks at the used ring and does without calls.
pub(crate) fn busy(queue: &mut Queue, stop: &AtomicBool, done: &AtomicU64) -> Result<()> {
    let mut n = 0;
    while !stop.load(Ordering::Relaxed) {
        while queue.ring.free_descriptors() >= 8 {
            queue.submit(Request::read(8 * (n % 2048), 4096), &Shape::default())?;
            n += 1;
        }
        queue.kick()?;
        let deadline = Instant::now() + PATIENCE;
        while queue.in_flight() > 0 {
            match queue.poll()? {
                Some(completion) => {
                    loaded("under load", &completion, true)?;
                    done.fetch_add(1, Ordering::Relaxed);
                }
                None => {
                    ensure!(
                        Instant::now() < deadline,
                        "{} requests do not complete",
                        queue.in_flight()
                    );
                    thread::sleep(Duration::from_micros(100));
                }
            }
        }
    }
    Ok(())
}

/// One of the ioctls that race, by number; what it answers does not matter.
fn any_ioctl(device: &Device, disk: &File, ring: &Ring, number: u64, owners: bool) {
    use std::os::fd::AsRawFd;
    let value = u32::try_from(number >> 32).unwrap_or(0);
    let small = value % 4;
    let kick = ring.kick_event().as_raw_fd();
    let result = match number % 26 {
        0..=3 => device.set_backend(disk),
        4..=5 => device.stop(),
        6 => device.set_vring_num(small, 1 << (value % 11)),
        7 => device.set_vring_base(small, value % 65536),
        8..=9 => device.set_vring_addr(small, &ring.addresses()),
        10 => device.set_vring_kick(small, if value % 8 == 0 { -1 } else { kick }),
        11 => device.set_vring_call(
            small,
            if value % 8 == 0 {
                -1
            } else {
                ring.call_event().as_raw_fd()
            },
        ),
        12 => device.set_vring_err(
            small,
            if value % 8 == 0 {
                -1
            } else {
                ring.err_event().as_raw_fd()
            },
        ),
        13 => device.set_features(if value % 2 == 0 {
            LOAD_FEATURES
        } else {
            feature::VERSION_1
        }),
        14 => device.set_mem_table(&ring.memory().regions()),
        15 => device.info(None).map(drop),
        16 => device.set_serial(&[b'r'; 20]),
        17 => device.set_writeback(value % 2 == 0),
        18 => device.new_worker().and_then(|worker| {
            let attached = device.attach_vring_worker(small, worker);
            device.free_worker(worker).or(attached)
        }),
        19 => device.attach_vring_worker(small, value % 8),
        20 => device.free_worker(value % 8),
        21 => device.get_vring_base(small).map(drop),
        22 => device.set_vring_busyloop_timeout(small, value % 2),
        23 if owners => device.reset_owner(),
        24 if owners => device.set_owner(),
        25 if owners => device.set_fork_from_owner(u8::from(value % 2 == 0)),
        _ => ring.kick(),
    };
    drop(result);
}

fn racing(context: &Context, owners: bool) -> Result<()> {
    const ENOUGH: u64 = 500;
    let mut guest = context.guest(|options| {
        options.queues = 4;
        options.queue_size = 1024;
    })?;
    let disk = context.disk()?;
    guest.start(&disk)?;
    let stop = AtomicBool::new(false);
    let calls = AtomicU64::new(0);
    let memory = guest.memory().clone();
    let (device, queues) = guest.split();
    // A ring of its own for the racers, so that the ioctls do not need the requests' lock.
    let spare = Ring::new(&memory, 1024, true)?;
    thread::scope(|scope| {
        for seed in 1..=4u64 {
            let (stop, calls, disk, spare) = (&stop, &calls, &disk, &spare);
            scope.spawn(move || {
                let mut number = seed * 0x9e37_79b9_7f4a_7c15;
                while !stop.load(Ordering::Relaxed) {
                    number ^= number << 13;
                    number ^= number >> 7;
                    number ^= number << 17;
                    any_ioctl(device, disk, spare, number, owners);
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let stop = &stop;
        scope.spawn(move || {
            // Requests to read, in rings that the device may see at any index.
            while !stop.load(Ordering::Relaxed) {
                for queue in queues.iter_mut() {
                    // A full ring, or used entries that make no sense: it starts afresh, although
                    // the device runs. That is the guest's right.
                    if queue
                        .submit(Request::read(0, 4096), &Shape::default())
                        .is_err()
                        || queue.kick().is_err()
                        || queue.poll().is_err()
                    {
                        queue.ring.abandon();
                    }
                }
                thread::sleep(Duration::from_micros(300));
            }
        });
        // Longer on a machine that has other work.
        let begin = Instant::now();
        let is_over = || begin.elapsed() > 2 * PATIENCE || calls.load(Ordering::Relaxed) > ENOUGH;
        thread::sleep(Duration::from_secs(6));
        while !is_over() {
            thread::sleep(Duration::from_millis(100));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let calls = calls.load(Ordering::Relaxed);
    ensure!(
        calls > ENOUGH,
        "{calls} ioctls in {:?} are not enough to tell",
        2 * PATIENCE
    );
    context.step("the device after the race");
    // From whatever it is in, back to the start.
    match guest.device().set_owner() {
        Ok(()) => {}
        Err(e) if e.errno() == Some(libc::EBUSY) => {}
        Err(e) => return Err(e.into()),
    }
    works("RESET_OWNER", guest.device().reset_owner())?;
    works("SET_OWNER", guest.device().set_owner())?;
    let regions = memory.regions();
    let features = guest.features();
    let (device, queues) = guest.split();
    device.set_features(features)?;
    device.set_mem_table(&regions)?;
    queues[0].reset(0)?;
    queues[0].ring.wait_err(Duration::ZERO)?;
    set_up_anywhere(device, &queues[0].ring)?;
    device.set_backend(&disk)?;
    check::healthy("after the race", &mut guest, 0)
}

fn many_devices(context: &Context) -> Result<()> {
    let mut guests = Vec::new();
    for number in 0..16 {
        guests.push(context.started(|options| {
            options.queues = 2;
            options.queue_size = 64;
            options.memory = 4 << 20;
            options.workers = if number % 2 == 0 {
                Workers::Shared
            } else {
                Workers::PerQueue
            };
        })?);
    }
    for round in 0..10 {
        for guest in &mut guests {
            for queue in guest.queues() {
                for n in 0..8 {
                    queue.submit(Request::read(8 * (n + round), 4096), &Shape::default())?;
                }
                queue.kick()?;
            }
        }
        for (number, guest) in guests.iter_mut().enumerate() {
            for queue in guest.queues() {
                for done in queue.wait_all(PATIENCE)? {
                    loaded(&format!("device {number}"), &done, true)?;
                }
            }
        }
        // One goes, another comes.
        let mut guest = context.started(|options| options.memory = 4 << 20)?;
        check::healthy("a new one among many", &mut guest, 0)?;
        let place = usize::try_from(round)?;
        guests[place] = guest;
    }
    Ok(())
}

/// Fills the ring with requests that are copied, or take several bios, or both, all on a slow disk.
fn demanding_load(guest: &mut Guest) -> Result<()> {
    for queue in guest.queues() {
        for n in 0..40 {
            let (mut request, shape) = requests::demanding(n);
            // The slow disk may be small.
            request.sector %= 8192;
            queue.submit(request, &shape)?;
        }
        queue.kick()?;
    }
    wait_fetched(guest)
}

/// Waits until a request of the first queue is fetched.
fn wait_fetched(guest: &mut Guest) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while guest.device().get_vring_base(0)? == 0 {
        ensure!(Instant::now() < deadline, "no request is fetched");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Memory for requests that hold much of it.
fn demanding(options: &mut Options) {
    options.memory = 128 << 20;
}

fn stop_demanding(context: &Context) -> Result<()> {
    let pinned = memory::pinned_pages();
    let mut guest = slow_guest(context, false, demanding)?;
    for round in 0..4u64 {
        context.step(format_args!("round {round}"));
        demanding_load(&mut guest)?;
        thread::sleep(Duration::from_millis(round * 73));
        let bases = guest.stop()?;
        drained("stopped", pinned)?;
        for (queue, base) in guest.queues().iter_mut().zip(&bases) {
            let used = queue.ring.used_idx()?;
            ensure!(
                used == *base,
                "round {round}: stopped at {base}, but the used index is {used}"
            );
        }
        guest.resume(context.slow_disk()?, &bases)?;
        for queue in guest.queues() {
            for done in queue.wait_all(PATIENCE * 2)? {
                check::outcome(
                    format_args!(
                        "round {round}: {:?} at {}",
                        done.request.kind, done.request.sector
                    ),
                    &done,
                    Status::Ok,
                    UsedLen::Full,
                )?;
            }
        }
    }
    Ok(())
}

fn read_only_in_write(context: &Context) -> Result<()> {
    let mut guest = slow_guest(context, false, demanding)?;
    let path = context.slow_disk_path()?;
    // More than is in flight at once: that is done in three times the disk's time.
    let write = Request::write(0, disk::seeded(1, 0, 24 << 10));
    guest.queue(0).submit(write, &Shape::default())?;
    guest.queue(0).kick()?;
    wait_fetched(&mut guest)?;
    let begin = Instant::now();
    disk::set_read_only(path, true)?;
    let took = begin.elapsed();
    let done = guest.queue(0).wait_all(PATIENCE);
    disk::set_read_only(path, false)?;
    for done in done? {
        check::outcome(
            format_args!("the long write, read-only after {took:?}"),
            &done,
            Status::IoErr,
            UsedLen::Failed,
        )?;
    }
    let data = disk::seeded(2, 0, 8);
    check::write("afterwards", guest.queue(0), 0, data, &Shape::default())
}

fn close_demanding(context: &Context) -> Result<()> {
    let (users, pinned) = (users(), memory::pinned_pages());
    for round in 0..4u64 {
        context.step(format_args!("round {round}"));
        let mut guest = slow_guest(context, round > 1, demanding)?;
        demanding_load(&mut guest)?;
        thread::sleep(Duration::from_millis(round * 73));
        if round % 2 == 0 {
            drop(guest);
        } else {
            guest.device().reset_owner()?;
        }
        drained("closed", pinned)?;
    }
    nothing_left("closed", users, pinned)
}
