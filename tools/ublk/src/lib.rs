// SPDX-License-Identifier: GPL-2.0

//! Read-only block devices whose content this process gives: ublk (Documentation/block/ublk.rst), as far as a layer needs it
//! that is still being fetched.
//!
//! A [`Device`] outlives the process that serves it. Whoever reads from it then waits, and the next process goes on where
//! this one was: [`Device::recover`]. It is removed by [`Device::remove`] alone.
//!
//! There is one queue. The process copies what it gives (user copy), so that no memory is shared with the kernel but the
//! descriptors of requests. All that is not safe Rust in the tools besides their system calls is in this crate.

mod abi;
mod control;
mod queue;

use std::{
    fs,
    fs::File,
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use control::Control;
pub use control::MAX_IO_BYTES;
use queue::Queue;
pub use queue::Request;

/// How long a device node may take to appear, and a server that was killed to be gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked for.
const STEP: Duration = Duration::from_millis(5);

/// A device, by its number: `/dev/ublkb<number>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device(pub u32);

/// Whether somebody serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// This process does.
    Process(u32),
    /// Nobody does: who reads waits.
    Gone,
}

/// Whether the kernel can do what is needed.
///
/// # Errors
///
/// `NotFound` where there is no ublk (`modprobe ublk_drv`), `Unsupported` where it is too old, and the system's.
pub fn check() -> io::Result<()> {
    Control::open().map(drop)
}

impl Device {
    /// Makes a device of `bytes`, whole sectors of 512, and hands every read of it to `serve`, on a thread that lives as
    /// long as the device. `serve` must not wait. `ended` hears of its end. [`Device::of`] finds it by `owner`, whatever that
    /// stands for.
    ///
    /// # Errors
    ///
    /// Those of [`check`].
    pub fn serve(
        bytes: u64,
        owner: u64,
        serve: impl FnMut(Request) + Send + 'static,
        ended: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<Self> {
        let mut control = Control::open()?;
        let device = Self(control.add(bytes, owner)?);
        let started = device.start(&mut control, false, serve, ended);
        if let Err(error) = started {
            let _ = control.delete(device.0);
            return Err(error);
        }
        Ok(device)
    }

    /// The devices that were made for `owner`, served or not.
    ///
    /// # Errors
    ///
    /// Those of [`check`].
    pub fn of(owner: u64) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        let mut control = Control::open()?;
        for entry in fs::read_dir("/dev")? {
            let name = entry?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("ublkc"));
            let Some(number) = number.and_then(|number| number.parse().ok()) else {
                continue;
            };
            match control.info(number) {
                Ok(info) if info.server_flags == owner => found.push(Self(number)),
                Ok(_) => {}
                // Removed since.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Goes on with a device of `bytes` whose server has gone: whoever waits for it gets what `serve` gives.
    ///
    /// # Errors
    ///
    /// Those of [`check`], one that has another size, and `EBUSY` while it is served.
    pub fn recover(
        self,
        bytes: u64,
        serve: impl FnMut(Request) + Send + 'static,
        ended: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<()> {
        let mut control = Control::open()?;
        let found = control.bytes(self.0)?;
        if found != bytes {
            let what = format!("has {found} bytes, not {bytes}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        // A process that was killed a moment ago may not have let go of it.
        let end = Instant::now() + PATIENCE;
        loop {
            match control.begin_recovery(self.0) {
                Err(error) if is_busy(&error) && Instant::now() < end => {
                    if server_of(&control.info(self.0)?).is_some() {
                        return Err(error);
                    }
                    thread::sleep(STEP);
                }
                result => break result?,
            }
        }
        self.start(&mut control, true, serve, ended)
    }

    fn start(
        self,
        control: &mut Control,
        recovered: bool,
        serve: impl FnMut(Request) + Send + 'static,
        ended: impl FnOnce(io::Result<()>) + Send + 'static,
    ) -> io::Result<()> {
        let path = PathBuf::from(format!("/dev/ublkc{}", self.0));
        let device = wait_for(&path, |path| {
            File::options().read(true).write(true).open(path)
        })?;
        let queue = Queue::new(device)?;
        thread::Builder::new()
            .name(format!("ublk{}", self.0))
            .spawn(move || ended(queue.run(serve)))?;
        control.start(self.0, recovered)?;
        wait_for(&self.node(), |path| path.metadata()).map(drop)
    }

    /// Its node.
    pub fn node(self) -> PathBuf {
        PathBuf::from(format!("/dev/ublkb{}", self.0))
    }

    /// Who serves it.
    ///
    /// # Errors
    ///
    /// Those of [`check`], and `ENODEV` where there is no such device.
    pub fn server(self) -> io::Result<Server> {
        let mut control = Control::open()?;
        Ok(match server_of(&control.info(self.0)?) {
            Some(process) => Server::Process(process),
            None => Server::Gone,
        })
    }

    /// Removes it, unless somebody has it open.
    ///
    /// # Errors
    ///
    /// `EBUSY` for that, and those of [`check`].
    pub fn remove(self) -> io::Result<()> {
        let mut control = Control::open()?;
        // Whoever looks at new devices has it open for a moment.
        let end = Instant::now() + PATIENCE;
        loop {
            match control.try_stop(self.0) {
                Err(error) if is_busy(&error) && Instant::now() < end => thread::sleep(STEP),
                // It was never started, or was stopped.
                Err(error) if is_gone(&error) => break,
                result => break result?,
            }
        }
        match control.delete(self.0) {
            // By its server.
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        }
    }

    /// Ends it; whoever waits for it gets errors. It is to be removed then.
    ///
    /// # Errors
    ///
    /// Those of [`check`].
    pub fn stop(self) -> io::Result<()> {
        Control::open()?.stop(self.0)
    }
}

/// The process that serves a device, if it lives.
fn server_of(info: &abi::DeviceInfo) -> Option<u32> {
    let process = u32::try_from(info.server)
        .ok()
        .filter(|process| *process > 0)?;
    let lives = info.state == abi::STATE_LIVE && Path::new(&format!("/proc/{process}")).exists();
    lives.then_some(process)
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

fn is_busy(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY)
}

/// Tries until what the kernel has made is there for this process too.
fn wait_for<T>(path: &Path, get: impl Fn(&Path) -> io::Result<T>) -> io::Result<T> {
    let end = Instant::now() + PATIENCE;
    loop {
        match get(path) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) && Instant::now() < end =>
            {
                thread::sleep(STEP);
            }
            result => return result,
        }
    }
}
