// SPDX-License-Identifier: GPL-2.0

//! A misc device whose open files are vhost devices.
//!
//! The kernel crate's `MiscDevice` has no `poll`, which a device IOTLB needs; hence file operations
//! of our own. C headers: `include/linux/miscdevice.h`, `drivers/vhost/vhost.h`.

use crate::bindings::{
    raw,
    vhost::{
        self,
        Operations, //
    },
};
use core::{
    marker::PhantomData,
    pin::Pin, //
};
use kernel::{
    error::{
        to_result, //
    },
    ffi::{
        c_int,
        c_long,
        c_uint,
        c_ulong, //
    },
    prelude::*,
    types::{
        ForeignOwnable,
        Opaque, //
    },
};

/// What a driver does with its open files.
pub(crate) trait File: Sized + Send + Sync + 'static {
    /// What it does with its virtqueues.
    type Operations: Operations;

    /// Called for `open()`. Context: may sleep.
    ///
    /// # Errors
    ///
    /// Whatever `open()` is to return.
    fn open() -> Result<Pin<KBox<Self>>>;

    /// The vhost device in it, which a device IOTLB is read, written and polled of.
    fn device(&self) -> &vhost::Device<Self::Operations>;

    /// Called for `ioctl()`. Context: may sleep.
    ///
    /// # Errors
    ///
    /// Whatever `ioctl()` is to return; `ENOTTY` for an unknown `cmd`.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;
}

/// A node in `/dev`, whose open files are `T`s.
///
/// # Invariants
///
/// `misc` is registered, with `operations`, from its initialisation until it is dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T: File> {
    #[pin]
    operations: Opaque<raw::file_operations>,
    #[pin]
    misc: Opaque<raw::miscdevice>,
    _file: PhantomData<fn() -> T>,
}

// SAFETY: It may be registered and deregistered by different threads, and has no methods.
unsafe impl<T: File> Send for Registration<T> {}
// SAFETY: As above.
unsafe impl<T: File> Sync for Registration<T> {}

impl<T: File> Registration<T> {
    /// Registers `/dev/<name>`, which keeps `module` loaded while it is open.
    ///
    /// # Errors
    ///
    /// Those of `misc_register()`, such as `EBUSY`.
    pub(crate) fn new(
        name: &'static CStr,
        module: &'static ThisModule,
    ) -> impl PinInit<Self, Error> {
        try_pin_init!(&this in Self {
            operations: Opaque::new(raw::file_operations {
                owner: module.as_ptr(),
                open: Some(Self::open),
                release: Some(Self::release),
                unlocked_ioctl: Some(Self::ioctl),
                compat_ioctl: raw::compat_ptr_ioctl,
                poll: Some(Self::poll),
                read_iter: Some(Self::read_iter),
                write_iter: Some(Self::write_iter),
                llseek: Some(raw::noop_llseek),
                ..pin_init::zeroed()
            }),
            misc <- Opaque::try_ffi_init(|misc: *mut raw::miscdevice| {
                // SAFETY: `misc` is memory for a `struct miscdevice`; `this` is pinned, and its
                // file operations are initialised and live as long as the registration.
                unsafe {
                    misc.write(raw::miscdevice {
                        minor: raw::MISC_DYNAMIC_MINOR as c_int,
                        name: kernel::str::CStrExt::as_char_ptr(name),
                        fops: (*this.as_ptr()).operations.get(),
                        ..pin_init::zeroed()
                    });
                    to_result(raw::misc_register(misc))
                }
            }),
            _file: PhantomData,
        }? Error)
    }

    /// The `T` of an open file.
    ///
    /// # Safety
    ///
    /// `file` must be open on this registration, and stay so for `'a`.
    unsafe fn borrow<'a>(file: *mut raw::file) -> &'a T {
        // SAFETY: `open()` stored a `Pin<KBox<T>>`, which `release()` takes back when nobody uses
        // the file any more.
        Pin::get_ref(unsafe { <Pin<KBox<T>> as ForeignOwnable>::borrow((*file).private_data) })
    }

    /// # Safety
    ///
    /// Only for the core of character devices, with a file that is being opened on this registration.
    unsafe extern "C" fn open(_inode: *mut raw::inode, file: *mut raw::file) -> c_int {
        match T::open() {
            Ok(open) => {
                // SAFETY: A file that is being opened is the callee's.
                unsafe { (*file).private_data = open.into_foreign() };
                0
            }
            Err(error) => error.to_errno(),
        }
    }

    /// # Safety
    ///
    /// Only for the core of character devices, with a file that was opened by `open()` and is used no more.
    unsafe extern "C" fn release(_inode: *mut raw::inode, file: *mut raw::file) -> c_int {
        // SAFETY: `open()` stored it; nobody uses the file any more.
        drop(unsafe { <Pin<KBox<T>> as ForeignOwnable>::from_foreign((*file).private_data) });
        0
    }

    /// # Safety
    ///
    /// Only for the core of character devices, with a file that was opened by `open()`.
    unsafe extern "C" fn ioctl(file: *mut raw::file, cmd: c_uint, arg: c_ulong) -> c_long {
        // SAFETY: The file is open during the call.
        let open = unsafe { Self::borrow(file) };
        match open.ioctl(cmd, arg) {
            Ok(value) => value as c_long,
            Err(error) => error.to_errno() as c_long,
        }
    }

    /// # Safety
    ///
    /// Only for the core of character devices, with a file that was opened by `open()`.
    unsafe extern "C" fn poll(
        file: *mut raw::file,
        wait: *mut raw::poll_table_struct,
    ) -> raw::__poll_t {
        // SAFETY: The file is open during the call, and `wait` valid.
        unsafe { raw::vhost_chr_poll(file, Self::borrow(file).device().as_raw(), wait) }
    }

    /// # Safety
    ///
    /// Only for the core of character devices, with an I/O on a file that was opened by `open()`.
    unsafe extern "C" fn read_iter(iocb: *mut raw::kiocb, to: *mut raw::iov_iter) -> isize {
        // SAFETY: The file is open during the call, and both arguments valid.
        unsafe {
            let file = (*iocb).ki_filp;
            let noblock = (*file).f_flags & raw::O_NONBLOCK != 0;
            raw::vhost_chr_read_iter(
                Self::borrow(file).device().as_raw(),
                to,
                c_int::from(noblock),
            )
        }
    }

    /// # Safety
    ///
    /// Only for the core of character devices, with an I/O on a file that was opened by `open()`.
    unsafe extern "C" fn write_iter(iocb: *mut raw::kiocb, from: *mut raw::iov_iter) -> isize {
        // SAFETY: The file is open during the call, and both arguments valid.
        unsafe {
            let open = Self::borrow((*iocb).ki_filp);
            open.device().write_iotlb(from)
        }
    }
}

#[pinned_drop]
impl<T: File> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant it is registered.
        unsafe { raw::misc_deregister(self.misc.get()) };
    }
}
