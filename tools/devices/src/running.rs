// SPDX-License-Identifier: GPL-2.0

//! Running stacks, found by the UUIDs of their mapped devices.
//!
//! ```text
//! NAME          OVERLAYBD-<uuid>-NAME           the stack, without --writable
//! NAME          OVERLAYBD-TOP-<uuid>-NAME       dm-linear over the newest generation, with --writable
//! NAME-cow<k>   OVERLAYBD-GEN-<uuid>-<k>-NAME   dm-snapshot over NAME-lower<k>: generation k
//! NAME-lower<k> OVERLAYBD-LOWER-<uuid>-<k>-NAME the stack, or dm-linear over the generation before
//! NAME-turbo<n> OVERLAYBD-TURBO-<uuid>-<n>-NAME TurboOCI layer n: its blob, its target and an index for both
//! NAME-sealed   OVERLAYBD-SEALED-<uuid>-NAME    the stack with its hash tree, where dm-verity over it checks what is read
//! NAME-zfile<n> ZFILE-<uuid>-<n>-NAME           the content of layer n, if it is compressed
//! NAME-blob<n>  OVERLAYBD-BLOB-<uuid>-<n>-NAME  the blob of layer n, where one device does not give all of it
//! NAME-probe    OVERLAYBD-PROBE-<uuid>-NAME     a moment only: the table that NAME is about to get
//! ```
//!
//! The `<uuid>` is that of the layer, in 32 digits; of the topmost layer at the time where the device is that of no layer.
//!
//! Before there were generations a writable NAME was itself the dm-snapshot, `OVERLAYBD-COW-<uuid>-NAME`, over NAME-lower,
//! `OVERLAYBD-<uuid>-NAME`. Such a stack is known, listed and taken down.

use std::{
    cmp::Ordering,
    collections::BTreeMap,
    path::{Path, PathBuf},
    str::FromStr,
};

use ovbd_image::lsmt::UuidText;

use ovbd_kernel::{
    dm::{Control, Listed},
    udev::Rules,
    Number,
};

use crate::{
    fetched, loops,
    mapped::{self, node, Mapped, Target},
    users::device_name,
};
use ovbd_layers::{
    error::{Error, Result},
    file_id::FileId,
    sysfs::backing_file,
};

/// Longest name of a stack, so that every UUID fits into the 128 bytes that device-mapper has.
pub const MAX_NAME: usize = 64;

/// What a mapped device is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Tries a table.
    Probe,
    /// dm-linear over the newest generation.
    Top,
    /// dm-snapshot as the device on top, from before there were generations.
    Cow,
    /// A generation: dm-snapshot over its [`Role::Lower`].
    Generation(u32),
    /// What a generation is written over.
    Lower(u32),
    /// The stack, where it has no generations.
    Stack,
    /// A TurboOCI layer and its target, put together.
    Turbo(usize),
    /// The stack with its hash tree, below dm-verity, which then has the role that the stack has without.
    Sealed,
    /// Content of a compressed layer.
    Zfile(usize),
    /// The blob of a layer.
    Blob(usize),
}

/// In the order in which they can be removed.
impl Ord for Role {
    fn cmp(&self, other: &Self) -> Ordering {
        let place = |role: &Self| match *role {
            Role::Probe => (0, 0, 0),
            Role::Top => (1, 0, 0),
            Role::Cow => (2, 0, 0),
            // Each generation is over the one before it.
            Role::Generation(number) => (3, u32::MAX - number, 0),
            Role::Lower(number) => (3, u32::MAX - number, 1),
            Role::Stack => (4, 0, 0),
            Role::Turbo(layer) => (6, 0, layer),
            Role::Sealed => (5, 0, 0),
            Role::Zfile(layer) => (7, 0, layer),
            Role::Blob(layer) => (8, 0, layer),
        };
        place(self).cmp(&place(other))
    }
}

impl PartialOrd for Role {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Role {
    /// Name of the device with this role in the stack `name`.
    pub fn device_name(self, name: &str) -> String {
        match self {
            Role::Probe => format!("{name}-probe"),
            Role::Top | Role::Cow | Role::Stack => name.to_owned(),
            Role::Generation(number) => format!("{name}-cow{number}"),
            Role::Lower(number) => format!("{name}-lower{number}"),
            Role::Turbo(layer) => format!("{name}-turbo{layer}"),
            Role::Sealed => format!("{name}-sealed"),
            Role::Zfile(layer) => format!("{name}-zfile{layer}"),
            Role::Blob(layer) => format!("{name}-blob{layer}"),
        }
    }

    /// Whether a device of each role can be removed while the other exists.
    pub fn is_beside(self, other: Self) -> bool {
        matches!(
            (self, other),
            (Role::Turbo(_), Role::Turbo(_))
                | (Role::Zfile(_), Role::Zfile(_))
                | (Role::Blob(_), Role::Blob(_))
        )
    }

    /// What udev's rules do with the device of this UUID. Nobody looks into what is only part of another device; and the
    /// devices of layers are many, and nothing needs their nodes.
    pub fn rules(uuid: &str) -> Rules {
        match Self::parse(uuid).map(|(role, _)| role) {
            None | Some(Role::Top | Role::Cow | Role::Stack) => Rules::All,
            Some(Role::Turbo(_) | Role::Zfile(_) | Role::Blob(_)) => Rules::Unwaited,
            Some(Role::Probe | Role::Generation(_) | Role::Lower(_) | Role::Sealed) => {
                Rules::Hidden
            }
        }
    }

    /// UUID of the device with this role in the stack `name`, for a layer of UUID `uuid`.
    pub fn device_uuid(self, name: &str, uuid: Option<UuidText>) -> String {
        let digits = uuid.unwrap_or(UuidText::NIL).as_str().replace('-', "");
        match self {
            Role::Probe => format!("OVERLAYBD-PROBE-{digits}-{name}"),
            Role::Top => format!("OVERLAYBD-TOP-{digits}-{name}"),
            Role::Cow => format!("OVERLAYBD-COW-{digits}-{name}"),
            Role::Generation(number) => format!("OVERLAYBD-GEN-{digits}-{number}-{name}"),
            Role::Lower(number) => format!("OVERLAYBD-LOWER-{digits}-{number}-{name}"),
            Role::Stack => format!("OVERLAYBD-{digits}-{name}"),
            Role::Turbo(layer) => format!("OVERLAYBD-TURBO-{digits}-{layer}-{name}"),
            Role::Sealed => format!("OVERLAYBD-SEALED-{digits}-{name}"),
            Role::Zfile(layer) => format!("ZFILE-{digits}-{layer}-{name}"),
            Role::Blob(layer) => format!("OVERLAYBD-BLOB-{digits}-{layer}-{name}"),
        }
    }

    /// Role and name of the stack, from the UUID of a device.
    fn parse(uuid: &str) -> Option<(Self, &str)> {
        /// What is after `<uuid>-`.
        fn named(rest: &str) -> Option<&str> {
            let (uuid, name) = rest.split_once('-')?;
            let is_uuid = uuid.len() == 32 && uuid.bytes().all(|c| c.is_ascii_hexdigit());
            is_uuid.then_some(name)
        }
        /// What is after `<uuid>-<number>-`, and the number.
        fn numbered<N: FromStr>(rest: &str) -> Option<(N, &str)> {
            let (number, name) = named(rest)?.split_once('-')?;
            Some((number.parse().ok()?, name))
        }
        if let Some(rest) = uuid.strip_prefix("ZFILE-") {
            return numbered(rest).map(|(layer, name)| (Role::Zfile(layer), name));
        }
        let rest = uuid.strip_prefix("OVERLAYBD-")?;
        match rest.split_once('-')? {
            ("BLOB", rest) => numbered(rest).map(|(layer, name)| (Role::Blob(layer), name)),
            ("TURBO", rest) => numbered(rest).map(|(layer, name)| (Role::Turbo(layer), name)),
            ("GEN", rest) => numbered(rest).map(|(number, name)| (Role::Generation(number), name)),
            ("LOWER", rest) => numbered(rest).map(|(number, name)| (Role::Lower(number), name)),
            ("PROBE", rest) => named(rest).map(|name| (Role::Probe, name)),
            ("TOP", rest) => named(rest).map(|name| (Role::Top, name)),
            ("SEALED", rest) => named(rest).map(|name| (Role::Sealed, name)),
            ("COW", rest) => named(rest).map(|name| (Role::Cow, name)),
            _ => named(rest).map(|name| (Role::Stack, name)),
        }
    }
}

/// Refuses a name that device-mapper or a shell would have to quote.
///
/// # Errors
///
/// That one.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-._=:@".contains(c);
    let what = if name.is_empty() || name.starts_with(['-', '.']) || !name.chars().all(plain) {
        "not a name for a device: it consists of letters, digits and +-._=:@"
    } else if name.len() > MAX_NAME {
        "too long for the name of a device"
    } else if name == "control" {
        "reserved by device-mapper"
    } else {
        return Ok(());
    };
    Err(Error::new(Path::new(name), what))
}

/// The mapped devices of a stack.
#[derive(Debug)]
pub struct Running {
    /// Name of the stack.
    pub name: String,
    /// In the order in which they can be removed.
    pub devices: Vec<(Role, Mapped)>,
}

/// A layer of a running stack.
#[derive(Debug)]
pub struct RunningLayer {
    /// The device with the layer's uncompressed blob.
    pub device: Number,
    /// Bytes of the uncompressed blob.
    pub bytes: u64,
    /// Number of the dm-zfile device, if the layer is compressed.
    pub zfile: Option<Number>,
    /// Bytes of the blob as it is stored.
    pub stored_bytes: u64,
    /// The loop device on its file, or the block device that it is on.
    pub blob: Number,
    /// File or block device with the blob.
    pub path: PathBuf,
}

impl Running {
    /// The stacks that exist, by name; also those of which only parts exist.
    ///
    /// # Errors
    ///
    /// Those of the ioctls. A device that goes away meanwhile is none.
    pub fn all(control: &Control) -> Result<Vec<Self>> {
        Self::of(control, &mapped::list(control)?, |_| true)
    }

    /// The stack of a name.
    ///
    /// # Errors
    ///
    /// There is none, and those of the ioctls.
    pub fn find(control: &Control, name: &str) -> Result<Self> {
        check_name(name)?;
        Self::of(control, &mapped::list(control)?, |found| found == name)?
            .pop()
            .ok_or_else(|| Error::new(&node(name), "no such stack (ovbd ls lists them)"))
    }

    /// The stacks with a name that is `wanted`, of the devices in a list.
    ///
    /// # Errors
    ///
    /// Those of the ioctls.
    pub fn of(
        control: &Control,
        devices: &[Listed],
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for device in devices {
            if Role::parse(&device.uuid).is_some_and(|(_, name)| wanted(name)) {
                found.extend(Mapped::read(control, device)?);
            }
        }
        Ok(Self::among(found))
    }

    fn among(devices: Vec<Mapped>) -> Vec<Self> {
        let mut stacks: BTreeMap<String, Vec<(Role, Mapped)>> = BTreeMap::new();
        for device in devices {
            if let Some((role, name)) = Role::parse(&device.uuid) {
                stacks
                    .entry(name.to_owned())
                    .or_default()
                    .push((role, device));
            }
        }
        let stack = |(name, mut devices): (String, Vec<(Role, Mapped)>)| {
            devices.sort_by_key(|(role, _)| *role);
            Self { name, devices }
        };
        stacks.into_iter().map(stack).collect()
    }

    /// The numbers of all its devices.
    pub fn numbers(&self) -> impl Iterator<Item = Number> + '_ {
        self.devices.iter().map(|(_, device)| device.number)
    }

    /// The device of a role.
    pub fn device(&self, role: Role) -> Option<&Mapped> {
        self.devices
            .iter()
            .find_map(|(found, device)| (*found == role).then_some(device))
    }

    /// The device that users of the stack see, if it was made, under whatever name it has by now.
    pub fn top(&self) -> Option<&Mapped> {
        if let Some(device) = self.device(Role::Top).or_else(|| self.device(Role::Cow)) {
            return Some(device).filter(|device| !device.table.is_empty());
        }
        let device = self.device(Role::Stack)?;
        // That one was to get a snapshot on top.
        let lower = format!("{}-lower", self.name);
        (device.name != lower && !device.table.is_empty()).then_some(device)
    }

    /// dm-verity over the stack, where what is read is checked.
    pub fn verity(&self) -> Option<&Mapped> {
        let sealed = self.device(Role::Sealed)?.number;
        let mut devices = self.devices.iter();
        devices.find_map(|(_, device)| {
            let table = device.target().filter(|table| table.kind == "verity")?;
            (table.device(1) == Some(sealed)).then_some(device)
        })
    }

    /// The root hash that what is read is checked against, in hexadecimal digits.
    pub fn root_hash(&self) -> Option<&str> {
        self.verity()?.target()?.words.get(8).map(String::as_str)
    }

    /// The device of the stack itself, below all generations and dm-verity.
    pub fn stack(&self) -> Option<&Mapped> {
        let mut devices = self.devices.iter();
        // Of two, which are there for a moment, the one of the newer generation has more layers.
        devices.find_map(|(role, device)| {
            let is_lower = matches!(role, Role::Stack | Role::Lower(_) | Role::Sealed);
            let is_stack = device
                .target()
                .is_some_and(|table| table.kind == "overlaybd");
            (is_lower && is_stack).then_some(device)
        })
    }

    /// Its table.
    fn stack_table(&self) -> Option<&Target> {
        self.stack()?.target()
    }

    /// The snapshot that has what is written now, where the stack is writable.
    pub fn snapshot(&self) -> Option<&Mapped> {
        if let Some(device) = self.device(Role::Cow) {
            return Some(device);
        }
        let below = self.device(Role::Top)?.target()?.device(0)?;
        let mut devices = self.devices.iter();
        let found = devices.find(|(_, device)| device.number == below);
        found.map(|(_, device)| device)
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> Vec<RunningLayer> {
        let words = self.stack_table().map_or(&[][..], |stack| &stack.words);
        let count = words.first().and_then(|word| word.parse().ok());
        words
            .get(1..)
            .unwrap_or_default()
            .chunks_exact(2)
            .take(count.unwrap_or(0))
            .filter_map(|pair| Some(self.layer(pair[0].parse().ok()?, pair[1].parse().ok()?)))
            .collect()
    }

    /// The files or block devices of the layers, bottom first, by names under which they are still there.
    ///
    /// # Errors
    ///
    /// A file that was replaced or renamed, and those of asking loop devices.
    pub fn layer_files(&self) -> Result<Vec<PathBuf>> {
        fetched::check_none(self)?;
        let loops = loops::all()?;
        let mut paths = Vec::new();
        for layer in self.layers() {
            let user = loops.iter().find(|user| user.number == layer.blob);
            let is_there = match user {
                Some(user) => FileId::at(&layer.path)?.is_some_and(|found| user.is_on(found)),
                None => layer.path.exists(),
            };
            if !is_there {
                let what = format!(
                    "not the file any more that \"{}\" has as a layer",
                    self.name
                );
                return Err(Error::new(&layer.path, what));
            }
            paths.push(layer.path);
        }
        Ok(paths)
    }

    fn layer(&self, device: Number, bytes: u64) -> RunningLayer {
        let by_number = |number| {
            self.devices
                .iter()
                .find(|(_, device)| device.number == number)
        };
        let mut layer = RunningLayer {
            device,
            bytes,
            zfile: None,
            stored_bytes: bytes,
            blob: device,
            path: PathBuf::new(),
        };
        let mut blob = device;
        if let Some((Role::Turbo(_), mapped)) = by_number(blob) {
            blob = mapped
                .target()
                .and_then(|target| target.device(0))
                .unwrap_or(blob);
        }
        if let Some((Role::Zfile(_), mapped)) = by_number(blob) {
            layer.zfile = Some(mapped.number);
            if let Some(target) = mapped.target() {
                blob = target.device(0).unwrap_or(blob);
                layer.stored_bytes = target.number(1).unwrap_or(bytes);
            }
        }
        if let Some((Role::Blob(_), mapped)) = by_number(blob) {
            blob = mapped
                .target()
                .and_then(|target| target.device(0))
                .unwrap_or(blob);
        }
        layer.blob = blob;
        layer.path = backing_file(blob).unwrap_or_else(|| device_name(blob).into());
        layer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn udev_looks_into_the_device_on_top_alone() {
        for (role, wanted) in [
            (Role::Probe, Rules::Hidden),
            (Role::Top, Rules::All),
            (Role::Cow, Rules::All),
            (Role::Generation(0), Rules::Hidden),
            (Role::Lower(0), Rules::Hidden),
            (Role::Stack, Rules::All),
            (Role::Turbo(7), Rules::Unwaited),
            (Role::Sealed, Rules::Hidden),
            (Role::Zfile(0), Rules::Unwaited),
            (Role::Blob(254), Rules::Unwaited),
        ] {
            assert_eq!(
                Role::rules(&role.device_uuid("a", None)),
                wanted,
                "{role:?}"
            );
        }
    }

    #[test]
    fn uuids_tell_role_and_name() {
        let uuid = UuidText::new(b"01234567-89ab-cdef-0123-456789ABCDEF");
        for role in [
            Role::Probe,
            Role::Top,
            Role::Cow,
            Role::Generation(0),
            Role::Generation(u32::MAX),
            Role::Lower(u32::MAX),
            Role::Stack,
            Role::Turbo(7),
            Role::Sealed,
            Role::Zfile(0),
            Role::Blob(254),
        ] {
            for name in ["a", "a-0", "0-a-b", "COW-x"] {
                let text = role.device_uuid(name, uuid);
                assert_eq!(Role::parse(&text), Some((role, name)), "{text}");
                assert!(role.device_uuid(&"n".repeat(MAX_NAME), None).len() <= 128);
            }
        }
        for other in [
            "",
            "LVM-abc",
            "OVERLAYBD-",
            "OVERLAYBD-0123-a",
            "ZFILE-x-y-z",
        ] {
            assert_eq!(Role::parse(other), None, "{other}");
        }
    }

    #[test]
    fn names() {
        for good in ["a", "root-1", "x_y.z", "a:b@c"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", ".", "a/b", "a b", "ü", "control", &"n".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
