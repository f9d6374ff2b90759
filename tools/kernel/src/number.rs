// SPDX-License-Identifier: GPL-2.0

//! Numbers of devices.

use std::{fmt, path::PathBuf, str::FromStr};

/// Major and minor number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Number(pub u32, pub u32);

impl Number {
    /// From the form in which system calls such as `stat` have it.
    pub fn new(device: u64) -> Self {
        Self(libc::major(device), libc::minor(device))
    }

    /// From the form in which ioctls have it: `huge_encode_dev` in linux/kdev_t.h.
    pub fn from_ioctl(device: u64) -> Self {
        let major = ((device >> 8) & 0xfff) as u32;
        let minor = ((device & 0xff) | ((device >> 12) & 0xf_ff00)) as u32;
        Self(major, minor)
    }

    /// The form in which ioctls have it.
    pub fn to_ioctl(self) -> u64 {
        let (major, minor) = (u64::from(self.0), u64::from(self.1));
        (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
    }

    /// The device's folder in sysfs.
    pub fn sysfs(self) -> PathBuf {
        format!("/sys/dev/block/{self}").into()
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0, self.1)
    }
}

impl FromStr for Number {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once(':').ok_or(())?;
        Ok(Self(
            major.parse().map_err(|_| ())?,
            minor.parse().map_err(|_| ())?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form() {
        // linux/kdev_t.h: the low 8 bits of the minor number, 12 of the major, the rest of the minor number.
        assert_eq!(Number(7, 3).to_ioctl(), 0x703);
        assert_eq!(Number(253, 0x12345).to_ioctl(), 0x1230_fd45);
        for number in [
            Number(0, 0),
            Number(7, 255),
            Number(253, 256),
            Number(4095, 0xf_ffff),
        ] {
            assert_eq!(Number::from_ioctl(number.to_ioctl()), number);
            assert_eq!(Number::new(libc::makedev(number.0, number.1)), number);
            assert_eq!(number.to_string().parse(), Ok(number));
        }
        for bad in ["", "1", "1:", ":1", "a:b", "1:2:3"] {
            assert_eq!(bad.parse::<Number>(), Err(()), "{bad}");
        }
    }
}
