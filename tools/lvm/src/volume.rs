// SPDX-License-Identifier: GPL-2.0

//! What LVM says of logical volumes, by `lvs --reportformat json`.

use std::{
    collections::HashSet,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use ovbd_kernel::dm::{Control, Id, Info};
use ovbd_layers::error::{Error, Result};
use serde::Deserialize;

use crate::{program, tags::Tags};

/// What `lvs` is asked for. It prints what it does not know as an empty string.
const FIELDS: &str = "vg_name,vg_uuid,vg_extent_size,lv_name,lv_uuid,lv_attr,lv_size,segtype,pool_lv,origin,thin_id,lv_tags,\
     lv_permissions,lv_active,chunk_size,zero,discards,lv_dm_path,lv_device_open,lv_time,lv_snapshot_invalid,\
     origin_size";

/// The name of a logical volume, or of a pool: `VG/LV`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    /// Volume group.
    pub vg: String,
    /// Volume in it.
    pub lv: String,
}

impl Name {
    /// The volume `lv` in the same group.
    pub fn sibling(&self, lv: impl Into<String>) -> Self {
        Self {
            vg: self.vg.clone(),
            lv: lv.into(),
        }
    }

    /// For errors, which are about a path.
    pub fn path(&self) -> PathBuf {
        self.to_string().into()
    }

    /// An error about the volume.
    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::new(&self.path(), what)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.vg, self.lv)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let text = text.strip_prefix("/dev/").unwrap_or(text);
        let both = text.split_once('/');
        match both.filter(|(vg, lv)| is_name(vg) && is_name(lv)) {
            Some((vg, lv)) => Ok(Self {
                vg: vg.to_owned(),
                lv: lv.to_owned(),
            }),
            None => Err("not the name of a logical volume, VG/LV".to_owned()),
        }
    }
}

/// Whether LVM could have a group or volume of that name.
pub fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 127
        && !text.starts_with('-')
        && text != "."
        && text != ".."
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "+_.-".contains(c))
}

/// A logical volume, or a pool.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its name.
    pub name: Name,
    /// UUID, which stays when it is renamed.
    pub uuid: String,
    /// Bytes of its content: of a classic snapshot not those of the store with its exceptions.
    pub bytes: u64,
    /// Type of its segment, such as `thin`, `thin-pool` or `linear`.
    pub segtype: String,
    /// The pool that it is in.
    pub pool: Option<Name>,
    /// What it is a snapshot of, also an external origin.
    pub origin: Option<Name>,
    /// Its number in the pool.
    pub thin_id: Option<u32>,
    /// Our tags.
    pub tags: Tags,
    /// Whether it can be written to once it is active.
    pub writable: bool,
    /// Whether it is active on this machine.
    pub active: bool,
    /// Whether somebody has its device open: mounted or made into something else too.
    pub open: bool,
    /// Of a pool, or a classic snapshot: bytes of a chunk.
    pub chunk_bytes: u64,
    /// Of a pool: whether new chunks are zeroed before they are used.
    pub zeroes: bool,
    /// Of a pool: whether a discarded chunk becomes unmapped.
    pub discards: bool,
    /// Seconds since 1970 when it was made.
    pub time: u64,
    /// Of a classic snapshot: whether it lost writes.
    pub invalid: bool,
    /// Bytes of an extent of its group: sizes are multiples of that.
    pub extent_bytes: u64,
    /// UUID of its group.
    vg_uuid: String,
    attr_is_snapshot: bool,
    /// `/dev/mapper/...`, with dashes in names doubled.
    dm_path: PathBuf,
}

impl Volume {
    /// The node of its device while it is active.
    pub fn device(&self) -> &Path {
        &self.dm_path
    }

    /// Its device as device-mapper knows it, by UUID; `None` if it is not active. That takes no program of LVM.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn mapped(&self) -> Result<Option<Info>> {
        let uuid = format!(
            "LVM-{}",
            format!("{}{}", self.vg_uuid, self.uuid).replace('-', "")
        );
        let found = Control::open().and_then(|control| control.table(Id::Uuid(&uuid)));
        let found = found.map_err(|e| Error::io(&self.name.path(), "look at the device of", e))?;
        Ok(found.map(|(info, _)| info))
    }

    /// The name that device-mapper has for a part of it: of a pool, `tpool` or `tmeta`; of a classic snapshot, `cow`.
    pub fn part(&self, part: &str) -> String {
        let name = self.dm_path.file_name().unwrap_or_default();
        format!("{}{part}", name.to_string_lossy())
    }

    /// Whether it is a thin pool.
    pub fn is_pool(&self) -> bool {
        self.segtype == "thin-pool"
    }

    /// Whether it is a thin volume.
    pub fn is_thin(&self) -> bool {
        self.segtype == "thin"
    }

    /// Whether it is a classic snapshot.
    pub fn is_classic_snapshot(&self) -> bool {
        !self.is_thin() && self.segtype != "thin-pool" && self.attr_is_snapshot
    }
}

/// What was asked at one moment.
#[derive(Clone, Debug, Default)]
pub struct Volumes(Vec<Volume>);

impl Volumes {
    /// All volumes of a group.
    ///
    /// # Errors
    ///
    /// There is no such group; what `lvs` says.
    pub fn of_group(vg: &str) -> Result<Self> {
        Self::ask(Path::new(vg), &[vg])
    }

    /// All volumes of all groups.
    ///
    /// # Errors
    ///
    /// What `lvs` says.
    pub fn all() -> Result<Self> {
        Self::ask(Path::new("lvs"), &[])
    }

    fn ask(subject: &Path, which: &[&str]) -> Result<Self> {
        let fixed = [
            "--reportformat",
            "json",
            "--units",
            "b",
            "--nosuffix",
            "--config",
            "report{time_format=\"%s\" mark_hidden_devices=0}",
            "--options",
            FIELDS,
        ];
        let output = program::run(subject, "lvs", fixed.iter().chain(which))?;
        Self::parse(&output).map_err(|what| Error::new(subject, what))
    }

    /// Reads what `lvs` prints.
    ///
    /// # Errors
    ///
    /// What in it is not as it should be.
    pub fn parse(json: &[u8]) -> std::result::Result<Self, String> {
        let output: Output =
            serde_json::from_slice(json).map_err(|e| format!("the answer of lvs: {e}"))?;
        let mut seen = HashSet::new();
        let mut found = Vec::new();
        for row in output.report.into_iter().flat_map(|report| report.lv) {
            // Of a volume of several segments there are several rows.
            if seen.insert(row.lv_uuid.clone()) {
                found.push(row.volume()?);
            }
        }
        Ok(Self(found))
    }

    /// The volume of that name.
    pub fn find(&self, name: &Name) -> Option<&Volume> {
        self.0.iter().find(|volume| volume.name == *name)
    }

    /// The volume with that UUID.
    pub fn by_uuid(&self, uuid: &str) -> Option<&Volume> {
        self.0.iter().find(|volume| volume.uuid == uuid)
    }

    /// The volume of that name, which must be there.
    ///
    /// # Errors
    ///
    /// It is not.
    pub fn get(&self, name: &Name) -> Result<&Volume> {
        self.find(name)
            .ok_or_else(|| name.error("no such logical volume"))
    }

    /// The pool of a thin volume.
    ///
    /// # Errors
    ///
    /// It is in none.
    pub fn pool_of(&self, volume: &Volume) -> Result<&Volume> {
        match &volume.pool {
            Some(pool) => self.get(pool),
            None => Err(volume.name.error("not a thin volume")),
        }
    }

    /// A volume that cannot be without `volume`: LVM removes both, or neither.
    pub fn dependent(&self, volume: &Volume) -> Option<&Volume> {
        self.0.iter().find(|other| {
            let is_in_the_pool = other.is_thin() && other.pool == volume.pool;
            other.origin.as_ref() == Some(&volume.name) && !is_in_the_pool
        })
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Volume> {
        self.0.iter()
    }
}

#[derive(Deserialize)]
struct Output {
    report: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    lv: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    vg_name: String,
    vg_uuid: String,
    vg_extent_size: String,
    lv_name: String,
    lv_uuid: String,
    lv_attr: String,
    lv_size: String,
    segtype: String,
    pool_lv: String,
    origin: String,
    thin_id: String,
    lv_tags: String,
    lv_permissions: String,
    lv_active: String,
    chunk_size: String,
    zero: String,
    discards: String,
    lv_dm_path: String,
    lv_device_open: String,
    lv_time: String,
    lv_snapshot_invalid: String,
    origin_size: String,
}

impl Row {
    fn volume(self) -> std::result::Result<Volume, String> {
        let name = Name {
            vg: self.vg_name,
            lv: self.lv_name,
        };
        let bad = |field: &str, text: &str| format!("lvs: {name} has the {field} \"{text}\"");
        let number = |field: &str, text: &str| text.parse::<u64>().map_err(|_| bad(field, text));
        let sibling = |lv: String| (!lv.is_empty()).then(|| name.sibling(lv));
        let thin_id = match self.thin_id.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| bad("thin_id", text))?),
        };
        let is_snapshot = matches!(self.lv_attr.chars().next(), Some('s' | 'S'));
        let bytes = match is_snapshot && self.segtype != "thin" {
            true => number("origin_size", &self.origin_size)?,
            false => number("lv_size", &self.lv_size)?,
        };
        let says = |text: &str, word: &str| !text.is_empty() && text != "unknown" && text == word;
        Ok(Volume {
            bytes,
            thin_id,
            pool: sibling(self.pool_lv),
            origin: sibling(self.origin),
            extent_bytes: number("vg_extent_size", &self.vg_extent_size)?,
            vg_uuid: self.vg_uuid,
            uuid: self.lv_uuid,
            tags: Tags::parse(&self.lv_tags),
            // Of one that is not active LVM says "unknown" where it could be written to.
            writable: self.lv_permissions != "read-only",
            active: says(&self.lv_active, "active"),
            open: says(&self.lv_device_open, "open"),
            chunk_bytes: match self.chunk_size.as_str() {
                "" => 0,
                text => number("chunk_size", text)?,
            },
            zeroes: says(&self.zero, "zero"),
            discards: matches!(self.discards.as_str(), "passdown" | "nopassdown"),
            time: self.lv_time.parse().unwrap_or(0),
            invalid: !self.lv_snapshot_invalid.is_empty() && self.lv_snapshot_invalid != "unknown",
            attr_is_snapshot: is_snapshot,
            dm_path: self.lv_dm_path.into(),
            segtype: self.segtype,
            name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool, a read-only snapshot and a writable one that is not active, as `lvs` prints them; a volume of two segments.
    #[test]
    fn what_lvs_prints() {
        let row = |name: &str, kind: &str, permissions: &str, more: &str| {
            let other = "\"vg_name\":\"my-vg\",\"vg_uuid\":\"u\",\"vg_extent_size\":\"4194304\",\
                 \"lv_attr\":\"Vri---tz-k\",\"lv_size\":\"67108864\",\"lv_active\":\"\",\
                 \"chunk_size\":\"65536\",\"zero\":\"zero\",\"discards\":\"passdown\",\"lv_device_open\":\"unknown\",\
                 \"lv_time\":\"1795680000\",\"lv_snapshot_invalid\":\"unknown\",\"origin_size\":\"\"";
            format!(
                "{{{other},\"lv_name\":\"{name}\",\"lv_uuid\":\"u-{name}\",\"segtype\":\"{kind}\",\
                 \"lv_permissions\":\"{permissions}\",\"lv_dm_path\":\"/dev/mapper/my--vg-{name}\",{more}}}"
            )
        };
        let none = "\"pool_lv\":\"\",\"origin\":\"\",\"thin_id\":\"\",\"lv_tags\":\"\"";
        let thin = "\"pool_lv\":\"pool\",\"origin\":\"web\",\"thin_id\":\"7\",\"lv_tags\":\"a,ovbd.manifest=sha256:1\"";
        let rows = [
            row("pool", "thin-pool", "unknown", none),
            row("mon", "thin", "read-only", thin),
            row("tue", "thin", "unknown", thin),
            row("wed", "thin", "read-only-override", thin),
            row("plain", "linear", "writeable", none),
            row("plain", "linear", "writeable", none),
        ];
        let text = format!("{{\"report\":[{{\"lv\":[{}]}}]}}", rows.join(","));
        let volumes = Volumes::parse(text.as_bytes()).unwrap();
        assert_eq!(volumes.iter().count(), 5);
        let get = |lv: &str| {
            volumes
                .get(&format!("my-vg/{lv}").parse().unwrap())
                .unwrap()
        };
        let pool = get("pool");
        assert!(pool.is_pool() && pool.zeroes && pool.discards && pool.chunk_bytes == 65536);
        assert_eq!(pool.part("-tpool"), "my--vg-pool-tpool");
        let mon = get("mon");
        assert!(mon.is_thin() && !mon.writable && !mon.active && mon.tags.is_image());
        assert_eq!((mon.thin_id, mon.bytes), (Some(7), 64 << 20));
        assert_eq!(volumes.pool_of(mon).unwrap().name, pool.name);
        assert_eq!(mon.origin.as_ref().unwrap().to_string(), "my-vg/web");
        // Whatever LVM does not call read-only may be written to.
        assert!(get("tue").writable && get("wed").writable && get("plain").writable);
        assert!(volumes.pool_of(get("plain")).is_err());
        assert!(Volumes::parse(b"{}").is_err());
        assert!(Volumes::parse(text.replace("67108864", "64m").as_bytes()).is_err());
    }

    #[test]
    fn names() {
        for good in ["vg/lv", "my-vg/a.b-c+d_1", "/dev/vg/lv"] {
            let name: Name = good.parse().unwrap();
            assert_eq!(name.to_string(), good.trim_start_matches("/dev/"));
        }
        for bad in [
            "vg", "vg/", "/lv", "vg/../x", "vg/..", "-vg/lv", "vg/l v", "vg/a/b",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
