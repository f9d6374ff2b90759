// SPDX-License-Identifier: GPL-2.0

//! What a logical volume is pushed on top of: a snapshot of the same line that is an image on the same registry.

use anyhow::Result;
use ovbd_layers::report::Report as _;
use ovbd_lvm::{snapshot, tags, Name, Volume, Volumes};
use ovbd_oci::{Digest, Image};

use crate::{
    commands::{images::virtual_bytes, push::Push},
    documents::chain_of,
    place::Place,
    push_volume::VolumeOptions,
    report::Report,
};

/// What a volume is pushed on top of. The size of the volume is that of the image, where it is larger: what is behind the
/// end of the image nobody knows.
pub struct Base {
    /// The volume, of the size that is known to be in the image.
    pub volume: Volume,
    /// What it is.
    pub image: Image,
}

impl Base {
    fn new(volume: &Volume, image: Image) -> Self {
        let mut volume = volume.clone();
        if let Some(bytes) = virtual_bytes(&image.manifest).filter(|bytes| *bytes < volume.bytes) {
            // In whole blocks of what is compared.
            volume.bytes = bytes & !4095;
        }
        Self { volume, image }
    }
}

/// The snapshot below, whose image is on the registry; None if there is none.
///
/// # Errors
///
/// One that was asked for and is not fit, one that may have been written to, and those of the registry.
pub fn find_base(
    push: &Push,
    volumes: &Volumes,
    source: &Name,
    new: &Volume,
    place: &Place,
    report: &Report,
) -> Result<Option<Base>> {
    let options = &push.volume;
    let repo = &*place.repository();
    if let Some(name) = &options.base {
        let volume = volumes.get(name)?;
        check_comparable(volume, new)?;
        if volume.tags.is_partial() || volume.tags.get(tags::MANIFEST).is_none() {
            let what = format!("was not pushed to {repo}: it is no image (--full sends all)");
            return Err(volume.name.error(what).into());
        }
        if volume.tags.get(tags::REPO) != Some(repo) {
            let other = volume.tags.get(tags::REPO).unwrap_or("nowhere");
            let what = format!("was pushed to {other}, not to {repo} (--full sends all)");
            return Err(volume.name.error(what).into());
        }
        check_unchanged(volume, options)?;
        return match fetch_image(push, volume, place)? {
            Some(image) => Ok(Some(Base::new(volume, image))),
            None => {
                let what = format!("its image is not on {repo} any more (--full sends all)");
                Err(volume.name.error(what).into())
            }
        };
    }
    let is_pushed = |volume: &Volume| volume.tags.get(tags::REPO) == Some(repo);
    for volume in candidates(volumes, source, new, is_pushed) {
        match fetch_image(push, volume, place)? {
            Some(image) => {
                check_unchanged(volume, options)?;
                return Ok(Some(Base::new(volume, image)));
            }
            None => {
                let what = format!("is no base: its image is not on {repo} any more");
                report.warn(&volume.name.error(what));
            }
        }
    }
    if new.is_classic_snapshot() {
        report.note(format_args!(
            "no older snapshot of the same volume was pushed to {repo}"
        ));
    }
    Ok(None)
}

/// The volumes that may be the base of `new`, a snapshot of `source` or that itself, those first that are nearest, of them the
/// newest: images for which `which` holds, of the line of `source`.
pub fn candidates<'a>(
    volumes: &'a Volumes,
    source: &Name,
    new: &Volume,
    which: impl Fn(&Volume) -> bool,
) -> Vec<&'a Volume> {
    // What it was made of, the nearest first, and what that was made of.
    let mut line = vec![source.clone()];
    while let Some(origin) = line
        .last()
        .and_then(|name| volumes.find(name)?.origin.clone())
        .or_else(|| new.origin.clone().filter(|_| line.len() == 1))
        .filter(|origin| !line.contains(origin))
    {
        line.push(origin);
    }
    let place_in_line = |name: &Name| line.iter().position(|other| other == name);
    let mut candidates: Vec<(usize, &Volume)> = volumes
        .iter()
        .filter(|volume| {
            volume.tags.is_image() && which(volume) && check_comparable(volume, new).is_ok()
        })
        .filter_map(|volume| {
            // Itself, one that it was made of, or one that was made of such a one.
            let own = place_in_line(&volume.name).map(|n| 2 * n);
            let of = volume.origin.as_ref().and_then(place_in_line);
            let distance = match volume.name == new.name {
                true => Some(0),
                false => own.into_iter().chain(of.map(|n| 2 * n + 1)).min(),
            };
            distance.map(|distance| (distance, volume))
        })
        .collect();
    // Of the nearest the newest.
    candidates.sort_by_key(|(distance, volume)| {
        (*distance, std::cmp::Reverse((volume.time, volume.thin_id)))
    });
    candidates.into_iter().map(|(_, volume)| volume).collect()
}

/// Refuses two volumes of which LVM does not know the difference.
fn check_comparable(old: &Volume, new: &Volume) -> Result<()> {
    let why = match (old.is_thin(), new.is_thin()) {
        _ if old.name.vg != new.name.vg => Some("is in another volume group"),
        (true, true) if old.pool != new.pool => Some("is in another pool"),
        (true, true) => None,
        (false, false) if old.is_classic_snapshot() && new.is_classic_snapshot() => {
            (old.origin != new.origin).then_some("is a snapshot of another volume")
        }
        _ => Some("is no snapshot that LVM can compare with it"),
    };
    match why {
        None => Ok(()),
        Some(why) => {
            let what = format!(
                "{why} than {}: what differs is not known (--full sends all)",
                new.name
            );
            Err(old.name.error(what).into())
        }
    }
}

/// Refuses a base that may have been written to since it was pushed: metadata does not tell.
fn check_unchanged(volume: &Volume, options: &VolumeOptions) -> Result<()> {
    if snapshot::is_unchanged(volume) || options.trust_base {
        return Ok(());
    }
    let what = "is the base and can be written to: what differs from its image is not known (--trust-base goes on if \
                nobody wrote to it; --full sends all; --base names another)";
    Err(volume.name.error(what).into())
}

/// The image that a volume is, as its tags say, from the registry; None if it is not there.
fn fetch_image(push: &Push, volume: &Volume, place: &Place) -> Result<Option<Image>> {
    let digest: Option<Digest> = volume
        .tags
        .get(tags::MANIFEST)
        .and_then(|digest| digest.parse().ok());
    let Some(digest) = digest else {
        let what = "has a tag ovbd.manifest that is no digest (--full sends all)";
        return Err(volume.name.error(what).into());
    };
    let Some(image) = place.image(&digest, &push.transfer)? else {
        return Ok(None);
    };
    let chain = chain_of(&image)?.map(|chain| chain.to_string());
    if chain.as_deref() != volume.tags.get(tags::CHAIN) {
        let what = "its tag ovbd.chain is not of its image (--full sends all)";
        return Err(volume.name.error(what).into());
    }
    Ok(Some(image))
}
