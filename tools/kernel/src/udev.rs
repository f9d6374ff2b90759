// SPDX-License-Identifier: GPL-2.0

//! Waiting for udev, as libdevmapper does.
//!
//! device-mapper passes a number on with the event for a device: its lower half names a System V semaphore, its upper
//! half says which of udev's rules are to leave the device alone. Before the event the semaphore goes up by one; the
//! last rule runs `dmsetup udevcomplete`, which takes it down again. At 0 udev is done with all devices that share the
//! number. A number without a semaphore is that of an event for which nothing waits: our own rules, `09-ovbd.rules`, take the
//! flags from it, and no program has to run.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::call;

/// Key of the semaphores of device-mapper, without the lower half.
const MAGIC: i32 = 0x0d4d << 16;

/// Says that the event is from whoever changed the device, and not one that udev was asked for later.
const PRIMARY_SOURCE: u16 = 0x0040;

/// udev's daemon has it while it runs.
const DAEMON: &str = "/run/udev/control";

/// What libdevmapper's programs look at too: nothing waits for udev where it is set.
const DISABLE: &str = "DM_DISABLE_UDEV";

/// Time after which udev's rules are taken to know nothing of device-mapper.
const LIMIT: Duration = Duration::from_secs(30);

/// Our own rules, which know events for which nothing waits, and where udev looks for rules.
const OWN_RULES: &str = "09-ovbd.rules";
const RULES_FOLDERS: [&str; 4] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
];

/// What udev's rules do with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// All that they do with disks.
    All,
    /// A node and nothing else: the device is part of another one. Nobody looks for file systems, physical volumes or
    /// the like on it, and it gets no names below /dev/disk.
    Hidden,
    /// The same, and nothing waits for the event, where udev has our own rules. For one of many devices that are found by
    /// their numbers: each event that something waits for is two programs that run.
    Unwaited,
}

impl Rules {
    /// The flags of linux/dm-ioctl.h and libdevmapper.h: no rules of subsystems, for disks, and of others.
    fn flags(self) -> u16 {
        match self {
            Rules::All => PRIMARY_SOURCE,
            Rules::Hidden | Rules::Unwaited => PRIMARY_SOURCE | 0x0002 | 0x0004 | 0x0008,
        }
    }
}

/// Whether udev makes the nodes of devices here.
pub fn is_running() -> bool {
    std::env::var_os(DISABLE).is_none() && Path::new(DAEMON).exists()
}

/// One wait for the events of any number of devices.
#[derive(Debug)]
pub struct Cookie {
    /// None where udev does not run.
    semaphore: Option<Semaphore>,
    /// Whether udev has our own rules.
    own_rules: bool,
}

#[derive(Debug)]
struct Semaphore {
    id: libc::c_int,
    low: u16,
}

/// What udev is to do about one event.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    cookie: &'a Cookie,
    rules: Rules,
}

/// An event for which the semaphore went up; it goes down again if this is dropped before the event happened.
#[derive(Debug)]
pub(crate) struct Expected<'a> {
    event: Event<'a>,
    happened: bool,
}

impl Cookie {
    /// A new one.
    ///
    /// # Errors
    ///
    /// The system's: no semaphore can be made.
    pub fn new() -> io::Result<Self> {
        if !is_running() {
            return Ok(Self {
                semaphore: None,
                own_rules: false,
            });
        }
        let own_rules = RULES_FOLDERS
            .iter()
            .any(|folder| Path::new(folder).join(OWN_RULES).exists());
        let mut random = File::open("/dev/urandom")?;
        loop {
            let mut low = [0; 2];
            random.read_exact(&mut low)?;
            let low = u16::from_ne_bytes(low);
            if low == 0 {
                continue;
            }
            match call::semaphore_create(MAGIC | i32::from(low)) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                result => {
                    let id = result?;
                    return Ok(Self {
                        semaphore: Some(Semaphore { id, low }),
                        own_rules,
                    });
                }
            }
        }
    }

    /// An event that belongs to it.
    pub fn event(&self, rules: Rules) -> Event<'_> {
        Event {
            cookie: self,
            rules,
        }
    }

    /// Waits until udev has dealt with all events so far. Returns `false` where it did not within half a minute.
    pub fn wait(&self) -> bool {
        let Some(semaphore) = &self.semaphore else {
            return true;
        };
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        // Not one system call that waits: udev without rules for device-mapper would let it wait forever.
        while start.elapsed() < LIMIT {
            match call::semaphore_change(semaphore.id, 0) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // Somebody removed it: "dmsetup udevcomplete_all" lets everybody go on.
                Ok(()) | Err(_) => return true,
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Cookie {
    fn drop(&mut self) {
        if let Some(semaphore) = &self.semaphore {
            // It may have been removed by "dmsetup udevcomplete_all".
            let _ = call::semaphore_remove(semaphore.id);
        }
    }
}

impl<'a> Event<'a> {
    /// The semaphore of the event; none where udev does not run, and where nothing waits.
    fn semaphore(&self) -> Option<&'a Semaphore> {
        let waits = self.rules != Rules::Unwaited || !self.cookie.own_rules;
        self.cookie.semaphore.as_ref().filter(|_| waits)
    }

    /// The semaphore goes up.
    pub(crate) fn expect(self) -> io::Result<Expected<'a>> {
        if let Some(semaphore) = self.semaphore() {
            call::semaphore_change(semaphore.id, 1)?;
        }
        Ok(Expected {
            event: self,
            happened: false,
        })
    }
}

impl Expected<'_> {
    /// What device-mapper passes on.
    pub(crate) fn number(&self) -> u32 {
        let low = self.event.semaphore().map_or(0, |s| s.low);
        (u32::from(self.event.rules.flags()) << 16) | u32::from(low)
    }

    /// udev will take the semaphore down.
    pub(crate) fn happened(mut self) {
        self.happened = true;
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        if let (false, Some(semaphore)) = (self.happened, self.event.semaphore()) {
            // Who removed it waits for nothing.
            let _ = call::semaphore_change(semaphore.id, -1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cookie as if udev ran; `None` where this machine has no semaphores.
    fn cookie(low: u16, own_rules: bool) -> Option<Cookie> {
        match call::semaphore_create(MAGIC | i32::from(low)) {
            Ok(id) => Some(Cookie {
                semaphore: Some(Semaphore { id, low }),
                own_rules,
            }),
            Err(e) => {
                println!("skipped: no semaphore: {e}");
                None
            }
        }
    }

    #[test]
    fn the_number_has_flags_and_key() {
        let none = Cookie {
            semaphore: None,
            own_rules: false,
        };
        let hidden = none.event(Rules::Hidden).expect().unwrap();
        assert_eq!(hidden.number(), 0x004e_0000);
        drop(hidden);
        assert!(none.wait());
        let Some(cookie) = cookie(0x1234, false) else {
            return;
        };
        let event = cookie.event(Rules::All).expect().unwrap();
        assert_eq!(event.number(), 0x0040_1234);
    }

    #[test]
    fn waits_for_every_event_that_happened() {
        let Some(cookie) = cookie(0x2345, false) else {
            return;
        };
        let id = cookie.semaphore.as_ref().unwrap().id;
        let event = cookie.event(Rules::Hidden);
        event.expect().unwrap().happened();
        event.expect().unwrap().happened();
        // This one did not, so nobody will take it down.
        drop(event.expect().unwrap());
        let busy = call::semaphore_change(id, 0).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        let start = Instant::now();
        let udev = thread::spawn(move || {
            for _ in 0..2 {
                thread::sleep(Duration::from_millis(20));
                call::semaphore_change(id, -1).unwrap();
            }
        });
        assert!(cookie.wait());
        assert!(start.elapsed() >= Duration::from_millis(40));
        udev.join().unwrap();
        drop(cookie);
        assert!(call::semaphore_remove(id).is_err(), "the cookie removed it");
    }

    #[test]
    fn nothing_waits_where_our_rules_are() {
        let number = |cookie: &Cookie| {
            let event = cookie.event(Rules::Unwaited).expect().unwrap();
            let number = event.number();
            event.happened();
            number
        };
        let Some(own) = cookie(0x3456, true) else {
            return;
        };
        assert_eq!(number(&own), 0x004e_0000);
        assert!(own.wait());
        let rules = include_str!("../../boot/09-ovbd.rules");
        let known = format!("ENV{{DM_COOKIE}}==\"{}\"", number(&own));
        assert!(rules.contains(&known), "{known}");

        let Some(foreign) = cookie(0x4567, false) else {
            return;
        };
        assert_eq!(number(&foreign), 0x004e_4567);
        let id = foreign.semaphore.as_ref().unwrap().id;
        let busy = call::semaphore_change(id, 0).unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
    }
}
