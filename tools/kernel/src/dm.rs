// SPDX-License-Identifier: GPL-2.0

//! Device-mapper's ioctls: linux/dm-ioctl.h.
//!
//! A device is made in three steps: [`Control::create`], [`Control::load`], [`Control::resume`]. Names are for people,
//! numbers are used again: who means one certain device says its UUID.

use std::{ffi::CString, fs::File, io, path::Path};

use zerocopy::{FromBytes, IntoBytes};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{call, udev::Event, Number};

/// The device that takes the ioctls.
pub const CONTROL: &str = "/dev/mapper/control";

/// Bytes of `struct dm_ioctl`.
pub(crate) const HEADER_BYTES: usize = 312;

/// Bytes of `struct dm_target_spec`.
const SPEC_BYTES: usize = 40;

const NAME_BYTES: usize = 128;
const UUID_BYTES: usize = 129;

// Commands.
const VERSION: u8 = 0;
const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_RENAME: u8 = 5;
const DEV_SUSPEND: u8 = 6;
const TABLE_LOAD: u8 = 9;
const TABLE_CLEAR: u8 = 10;
const TABLE_DEPS: u8 = 11;
const TABLE_STATUS: u8 = 12;
const TARGET_MSG: u8 = 14;

// Flags.
const READ_ONLY: u32 = 1 << 0;
const SUSPENDED: u32 = 1 << 1;
const STATUS_TABLE: u32 = 1 << 4;
const BUFFER_FULL: u32 = 1 << 8;
const SKIP_LOCKFS: u32 = 1 << 10;
const NO_FLUSH: u32 = 1 << 11;
const UEVENT_GENERATED: u32 = 1 << 13;
const WITH_UUID: u32 = 1 << 14;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// In the list of devices.
const HAS_UUID: u32 = 1;

/// Bytes for an answer at first: the kernel copies them to and fro. Most answers are a line or two; that about all devices
/// is longer, and never longer than the last one.
const ROOM: usize = 1 << 10;
const LIST_ROOM: usize = 16 << 10;
const MOST_ROOM: usize = 64 << 20;

/// `struct dm_ioctl`.
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    device: u64,
    name: [u8; NAME_BYTES],
    uuid: [u8; UUID_BYTES],
    data: [u8; 7],
}

/// `struct dm_target_spec`.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Spec {
    start: u64,
    sectors: u64,
    status: i32,
    /// Bytes to the next one: from this one in what the kernel gets, from the first in what it gives.
    next: u32,
    kind: [u8; 16],
}

/// Which device is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Id<'a> {
    /// The one with this UUID.
    Uuid(&'a str),
    /// The one with this number.
    Number(Number),
}

/// A line of a table or of a status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub sectors: u64,
    /// Name of the target.
    pub kind: String,
    /// Its parameters, or what it says.
    pub text: String,
}

/// A device in the list of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its number.
    pub number: Number,
    /// Its name, which may be any bytes; those that are not UTF-8 are replaced.
    pub name: String,
    /// Its UUID, may be empty.
    pub uuid: String,
}

/// How a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Number.
    pub number: Number,
    /// Name.
    pub name: String,
    /// UUID, may be empty.
    pub uuid: String,
    /// How often it is open; by mounts and by devices made of it too.
    pub opens: u32,
    /// Whether it is suspended.
    pub suspended: bool,
    /// Whether it refuses writes.
    pub read_only: bool,
}

/// How to suspend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Suspend {
    /// Leave what has not been written to the targets.
    pub no_flush: bool,
    /// Do not freeze the file system on it.
    pub skip_freeze: bool,
}

impl Suspend {
    fn flags(self) -> u32 {
        let mut flags = 0;
        if self.no_flush {
            flags |= NO_FLUSH;
        }
        if self.skip_freeze {
            flags |= SKIP_LOCKFS;
        }
        flags
    }
}

/// The open control device.
#[derive(Debug)]
pub struct Control(File);

/// A header for a device, or for none.
fn header(id: Option<Id<'_>>, flags: u32) -> io::Result<Header> {
    let mut header = Header {
        version: [4, 0, 0],
        data_size: 0,
        data_start: HEADER_BYTES as u32,
        target_count: 0,
        open_count: 0,
        flags,
        event_nr: 0,
        padding: 0,
        device: 0,
        name: [0; NAME_BYTES],
        uuid: [0; UUID_BYTES],
        data: [0; 7],
    };
    match id {
        Some(Id::Uuid("")) => return Err(io::ErrorKind::InvalidInput.into()),
        Some(Id::Uuid(uuid)) => put_text(&mut header.uuid, uuid)?,
        Some(Id::Number(number)) => header.device = number.to_ioctl(),
        None => {}
    }
    Ok(header)
}

impl Control {
    /// Opens the control device.
    ///
    /// # Errors
    ///
    /// The system's; `NotFound` where there is no device-mapper.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(CONTROL)?;
        Ok(Self(file))
    }

    /// Version of the interface.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn version(&self) -> io::Result<[u32; 3]> {
        let header = header(None, 0)?;
        Ok(self.call(VERSION, header, &[])?.0.version)
    }

    /// All devices.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn devices(&self) -> io::Result<Vec<Listed>> {
        let header = header(None, WITH_UUID)?;
        let (_, data) = self.call_for(LIST_DEVICES, header, &[], LIST_ROOM)?;
        parse_list(&data)
    }

    /// Makes a device without a table.
    ///
    /// # Errors
    ///
    /// The system's: `EBUSY` where the name or the UUID is taken.
    pub fn create(&self, name: &str, uuid: &str) -> io::Result<Number> {
        let mut header = header(Some(Id::Uuid(uuid)), 0)?;
        put_text(&mut header.name, name)?;
        let (header, _) = self.call(DEV_CREATE, header, &[])?;
        Ok(Number::from_ioctl(header.device))
    }

    /// Gives a device a table, which becomes live when the device is resumed.
    ///
    /// # Errors
    ///
    /// The system's: what the targets say of their parameters, whose reason is in the kernel's log.
    pub fn load(&self, id: Id<'_>, table: &[Line], read_only: bool) -> io::Result<()> {
        let flags = if read_only { READ_ONLY } else { 0 };
        let mut header = header(Some(id), flags)?;
        header.target_count = table.len() as u32;
        let mut data = Vec::new();
        for line in table {
            let mut kind = [0; 16];
            put_text(&mut kind, &line.kind)?;
            let parameters = CString::new(line.text.as_bytes())?;
            let parameters = parameters.as_bytes_with_nul();
            let next = (SPEC_BYTES + parameters.len()).next_multiple_of(8);
            let end = data.len() + next;
            let spec = Spec {
                start: line.start,
                sectors: line.sectors,
                status: 0,
                next: u32::try_from(next).map_err(|_| io::ErrorKind::InvalidInput)?,
                kind,
            };
            data.extend_from_slice(spec.as_bytes());
            data.extend_from_slice(parameters);
            data.resize(end, 0);
        }
        self.call(TABLE_LOAD, header, &data).map(drop)
    }

    /// Forgets a table that was loaded and is not live.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn clear(&self, id: Id<'_>) -> io::Result<()> {
        let header = header(Some(id), 0)?;
        self.call(TABLE_CLEAR, header, &[]).map(drop)
    }

    /// Makes a loaded table live, and a suspended device go on. One that is not suspended is for as long as it takes to
    /// replace its table; `how` says how.
    ///
    /// # Errors
    ///
    /// The system's. Where a table did not fit, the device stays suspended with the one that it had.
    pub fn resume(&self, id: Id<'_>, how: Suspend, event: Event<'_>) -> io::Result<()> {
        let header = header(Some(id), how.flags())?;
        self.call_with_event(DEV_SUSPEND, header, &[], event)
    }

    /// Suspends a device; one that is suspended already stays so.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn suspend(&self, id: Id<'_>, how: Suspend) -> io::Result<()> {
        let header = header(Some(id), SUSPENDED | how.flags())?;
        self.call(DEV_SUSPEND, header, &[]).map(drop)
    }

    /// How a device is, and its live table; `None` if there is no such device.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn table(&self, id: Id<'_>) -> io::Result<Option<(Info, Vec<Line>)>> {
        self.lines(id, STATUS_TABLE)
    }

    /// What the targets of a device say of themselves, without flushing anything; `None` if there is no such device.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn status(&self, id: Id<'_>) -> io::Result<Option<Vec<Line>>> {
        let found = self.lines(id, NO_FLUSH)?;
        Ok(found.map(|(_, lines)| lines))
    }

    fn lines(&self, id: Id<'_>, flags: u32) -> io::Result<Option<(Info, Vec<Line>)>> {
        let header = header(Some(id), flags)?;
        let Some((header, data)) = existing(self.call(TABLE_STATUS, header, &[]))? else {
            return Ok(None);
        };
        let info = Info {
            number: Number::from_ioctl(header.device),
            name: text(&header.name),
            uuid: text(&header.uuid),
            opens: header.open_count.try_into().unwrap_or(0),
            suspended: header.flags & SUSPENDED != 0,
            read_only: header.flags & READ_ONLY != 0,
        };
        Ok(Some((info, parse_lines(&data, header.target_count)?)))
    }

    /// The devices that the live table of a device uses; `None` if there is no such device.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn dependencies(&self, id: Id<'_>) -> io::Result<Option<Vec<Number>>> {
        let header = header(Some(id), 0)?;
        match existing(self.call(TABLE_DEPS, header, &[]))? {
            Some((_, data)) => parse_dependencies(&data).map(Some),
            None => Ok(None),
        }
    }

    /// Removes a device; with `deferred` one that is in use goes with its last user.
    ///
    /// # Errors
    ///
    /// The system's: `EBUSY` for one in use, `ENXIO` where there is none.
    pub fn remove(&self, id: Id<'_>, deferred: bool, event: Event<'_>) -> io::Result<()> {
        let flags = if deferred { DEFERRED_REMOVE } else { 0 };
        let header = header(Some(id), flags)?;
        self.call_with_event(DEV_REMOVE, header, &[], event)
    }

    /// Gives a device another name.
    ///
    /// # Errors
    ///
    /// The system's: `EBUSY` where the name is taken.
    pub fn rename(&self, id: Id<'_>, name: &str, event: Event<'_>) -> io::Result<()> {
        let header = header(Some(id), 0)?;
        let name = CString::new(name)?;
        self.call_with_event(DEV_RENAME, header, name.as_bytes_with_nul(), event)
    }

    /// Sends a message to the target at the start of a device.
    ///
    /// # Errors
    ///
    /// The system's, and the target's.
    pub fn message(&self, id: Id<'_>, message: &str) -> io::Result<()> {
        let header = header(Some(id), 0)?;
        let message = CString::new(message)?;
        // `struct dm_target_msg`: the sector, then the text.
        let mut data = 0_u64.to_ne_bytes().to_vec();
        data.extend_from_slice(message.as_bytes_with_nul());
        self.call(TARGET_MSG, header, &data).map(drop)
    }

    /// A call of which udev is to hear.
    fn call_with_event(
        &self,
        command: u8,
        mut header: Header,
        data: &[u8],
        event: Event<'_>,
    ) -> io::Result<()> {
        let expected = event.expect()?;
        header.event_nr = expected.number();
        let (header, _) = self.call(command, header, data)?;
        if header.flags & UEVENT_GENERATED != 0 {
            expected.happened();
        }
        Ok(())
    }

    /// Makes a call, with more room as long as the answer does not fit; returns what came back.
    fn call(&self, command: u8, header: Header, data: &[u8]) -> io::Result<(Header, Vec<u8>)> {
        self.call_for(command, header, data, ROOM)
    }

    /// Like [`Control::call`], with so much room at first.
    fn call_for(
        &self,
        command: u8,
        header: Header,
        data: &[u8],
        mut room: usize,
    ) -> io::Result<(Header, Vec<u8>)> {
        loop {
            let size = (HEADER_BYTES + data.len() + room).next_multiple_of(8);
            let mut sent = header.clone();
            sent.data_size = u32::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut buffer = Vec::with_capacity(size);
            buffer.extend_from_slice(sent.as_bytes());
            buffer.extend_from_slice(data);
            buffer.resize(size, 0);
            call::dm(&self.0, command, &mut buffer)?;
            let (answer, _) = Header::read_from_prefix(&buffer).map_err(|_| invalid())?;
            if answer.flags & BUFFER_FULL != 0 {
                if room >= MOST_ROOM {
                    return Err(io::ErrorKind::OutOfMemory.into());
                }
                room *= 4;
                continue;
            }
            let start = (answer.data_start as usize).min(buffer.len());
            // A command without an answer leaves the size as it was or makes it 0.
            let end = (answer.data_size as usize).clamp(start, buffer.len());
            buffer.truncate(end);
            buffer.drain(..start);
            return Ok((answer, buffer));
        }
    }
}

/// Takes `ENXIO`, which says that there is no such device, for none.
fn existing<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        result => result.map(Some),
    }
}

/// The node of a device below /dev/mapper.
pub fn node(name: &str) -> std::path::PathBuf {
    Path::new("/dev/mapper").join(name)
}

fn invalid() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "device-mapper gave an answer that is not understood",
    )
}

/// Puts a text with a NUL byte after it into a field.
fn put_text(field: &mut [u8], text: &str) -> io::Result<()> {
    if text.len() >= field.len() || text.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    field[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

/// The text before the first NUL byte.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&field[..end.unwrap_or(field.len())]).into_owned()
}

/// The bytes before the first NUL byte from `at` on; an error where there is none.
fn terminated(data: &[u8], at: usize) -> io::Result<&[u8]> {
    let rest = data.get(at..).ok_or_else(invalid)?;
    let end = rest.iter().position(|byte| *byte == 0);
    Ok(&rest[..end.ok_or_else(invalid)?])
}

fn array<const N: usize>(data: &[u8], at: usize) -> io::Result<[u8; N]> {
    let bytes = at.checked_add(N).and_then(|end| data.get(at..end));
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(invalid)
}

fn parse_list(data: &[u8]) -> io::Result<Vec<Listed>> {
    let mut devices = Vec::new();
    // With room the kernel says 0 for the number, at last it leaves the room out.
    if data.is_empty() {
        return Ok(devices);
    }
    let mut at = 0;
    loop {
        let number = u64::from_ne_bytes(array(data, at)?);
        if number == 0 {
            return Ok(devices);
        }
        let next = u32::from_ne_bytes(array(data, at + 8)?) as usize;
        let name = terminated(data, at + 12)?;
        // The event number, the flags and the UUID follow at the next multiple of 8.
        let behind = (at + 12 + name.len() + 1).next_multiple_of(8);
        let flags = u32::from_ne_bytes(array(data, behind + 4)?);
        let uuid = match flags & HAS_UUID {
            0 => &[][..],
            _ => terminated(data, behind + 8)?,
        };
        devices.push(Listed {
            number: Number::from_ioctl(number),
            name: text(name),
            uuid: text(uuid),
        });
        if next == 0 {
            return Ok(devices);
        }
        at = at.checked_add(next).ok_or_else(invalid)?;
    }
}

fn parse_lines(data: &[u8], count: u32) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let rest = data.get(at..).ok_or_else(invalid)?;
        let (spec, _) = Spec::read_from_prefix(rest).map_err(|_| invalid())?;
        lines.push(Line {
            start: spec.start,
            sectors: spec.sectors,
            kind: text(&spec.kind),
            text: text(terminated(data, at + SPEC_BYTES)?),
        });
        // From the first one on, so it only grows.
        let next = spec.next as usize;
        if next <= at && lines.len() < count as usize {
            return Err(invalid());
        }
        at = next;
    }
    Ok(lines)
}

fn parse_dependencies(data: &[u8]) -> io::Result<Vec<Number>> {
    let count = u32::from_ne_bytes(array(data, 0)?) as usize;
    (0..count)
        .map(|i| {
            let at = i.checked_mul(8).and_then(|at| at.checked_add(8));
            let device = array(data, at.ok_or_else(invalid)?)?;
            Ok(Number::from_ioctl(u64::from_ne_bytes(device)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn structures_have_the_size_that_the_kernel_wants() {
        assert_eq!(size_of::<Header>(), HEADER_BYTES);
        assert_eq!(offset_of!(Header, data_size), 12);
        assert_eq!(offset_of!(Header, device), 40);
        assert_eq!(offset_of!(Header, uuid), 176);
        assert_eq!(size_of::<Spec>(), SPEC_BYTES);
    }

    /// A list as the kernel writes it.
    fn list(devices: &[(Number, &[u8], Option<&str>)]) -> Vec<u8> {
        let mut data = Vec::new();
        for (i, (number, name, uuid)) in devices.iter().enumerate() {
            let start = data.len();
            data.extend(number.to_ioctl().to_ne_bytes());
            data.extend([0; 4]);
            data.extend(*name);
            data.push(0);
            data.resize(data.len().next_multiple_of(8), 0);
            data.extend(9_u32.to_ne_bytes());
            data.extend(if uuid.is_some() { 1_u32 } else { 2 }.to_ne_bytes());
            if let Some(uuid) = uuid {
                data.extend(uuid.as_bytes());
                data.push(0);
                data.resize(data.len().next_multiple_of(8), 0);
            }
            if i + 1 < devices.len() {
                let next = (data.len() - start) as u32;
                data[start + 8..start + 12].copy_from_slice(&next.to_ne_bytes());
            }
        }
        data
    }

    #[test]
    fn lists_of_every_shape() {
        assert_eq!(parse_list(&[]).unwrap(), []);
        assert_eq!(parse_list(&[0; 16]).unwrap(), []);
        let long = "n".repeat(127);
        let devices: [(Number, &[u8], Option<&str>); 4] = [
            (Number(253, 0), b"a", Some("OVERLAYBD-x")),
            (Number(253, 300), b"s: 0 8 overlaybd 1", None),
            (Number(253, 2), long.as_bytes(), Some("1234567")),
            (Number(253, 3), b"not \xff UTF-8\n", None),
        ];
        let found = parse_list(&list(&devices)).unwrap();
        assert_eq!(found.len(), 4);
        for (found, (number, name, uuid)) in found.iter().zip(devices) {
            assert_eq!(found.number, number);
            assert_eq!(found.name, String::from_utf8_lossy(name));
            assert_eq!(found.uuid, uuid.unwrap_or(""));
        }
    }

    #[test]
    fn answers_that_lie_are_errors() {
        let good = list(&[
            (Number(253, 0), b"a", Some("u")),
            (Number(253, 1), b"b", None),
        ]);
        for length in 1..good.len() {
            // Cut off anywhere it is refused, and nothing panics.
            assert!(parse_list(&good[..length]).is_err(), "{length}");
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = parse_list(&bad);
                let _ = parse_lines(&bad, 3);
                let _ = parse_dependencies(&bad);
            }
        }
        let spec = Spec {
            start: 0,
            sectors: 8,
            status: 0,
            next: 0,
            kind: *b"linear\0\0\0\0\0\0\0\0\0\0",
        };
        let mut data = spec.as_bytes().to_vec();
        data.extend(b"7:0 0\0\0\0");
        let [line] = parse_lines(&data, 1).unwrap().try_into().unwrap();
        assert_eq!(
            (line.sectors, line.kind.as_str(), line.text.as_str()),
            (8, "linear", "7:0 0")
        );
        assert!(
            parse_lines(&data, 2).is_err(),
            "the second is the first again"
        );
        assert!(
            parse_lines(&data[..42], 1).is_err(),
            "no end of the parameters"
        );
        assert!(parse_dependencies(&[255; 8]).is_err());
    }

    #[test]
    fn the_devices_of_this_machine() {
        let control = match Control::open() {
            Ok(control) => control,
            Err(e) => {
                println!("skipped: {CONTROL}: {e}");
                return;
            }
        };
        assert_eq!(control.version().unwrap()[0], 4);
        for device in control.devices().unwrap() {
            // Others may remove it meanwhile.
            if let Some((info, _)) = control.table(Id::Number(device.number)).unwrap() {
                assert_eq!((info.name, info.uuid), (device.name, device.uuid));
            }
        }
        assert_eq!(control.table(Id::Uuid("OVERLAYBD-no-such")).unwrap(), None);
    }
}
