// SPDX-License-Identifier: GPL-2.0

//! The lists of the chunks of an image's layers: sent with it, and found again by who reads it before all of it is there.

use anyhow::Result;
use ovbd_oci::{
    annotations::{CHUNK_LIST, OF_LAYER},
    ChunkList, Descriptor, Digest, Error, Image, ListSource, Outgoing, Platform, Reference,
    Registry, Store, CHUNK_LIST_TYPE,
};

use crate::{commands::push::ToSend, place::Place, report::Report};

/// Most layers of other images whose lists are looked at.
const MAX_OTHERS: usize = 32;

/// The list that a layer names, described, with the layer in its annotations.
fn named_list(layer: &Descriptor) -> Option<Descriptor> {
    let digest: Digest = layer.annotations.get(CHUNK_LIST)?.parse().ok()?;
    let mut list = ChunkList::descriptor(layer, digest)?;
    let of = layer.digest.to_string();
    list.annotations.insert(OF_LAYER.to_owned(), of);
    Some(list)
}

/// Sends the lists that the layers of an image name, and returns those that are there then. Where neither the registry has
/// one nor the layer is here, there is none.
///
/// # Errors
///
/// As [`Place::send`].
pub fn send(image: &ToSend, place: &Place, jobs: usize) -> Result<Vec<Descriptor>> {
    let (mut lists, mut outgoing) = (Vec::new(), Vec::new());
    for layer in image.manifest.layers.iter() {
        let Some(list) = named_list(layer) else {
            continue;
        };
        if lists.contains(&list) {
            continue;
        }
        let here = image
            .blobs
            .iter()
            .find(|out| out.blob.digest == layer.digest);
        match (here, place.registry()) {
            (Some(out), _) => outgoing.push(Outgoing {
                blob: list.clone(),
                source: Box::new(ListSource::new(&*out.source)),
                from: Vec::new(),
            }),
            (None, Some((_, registry))) if registry.has_blob(&list)? => {}
            (None, _) => continue,
        }
        lists.push(list);
    }
    if !outgoing.is_empty() {
        place.send_quietly(&outgoing, jobs)?;
    }
    Ok(lists)
}

/// Makes lists that the registry has refer to the image, so that it keeps them. Without that the image is complete, too.
pub fn attach(registry: &Registry, image: &Descriptor, lists: Vec<Descriptor>, report: &Report) {
    if lists.is_empty() {
        return;
    }
    if let Err(error) = registry.attach(CHUNK_LIST_TYPE, image, lists) {
        let what = format!(
            "is complete, but nothing refers to its chunk lists, and the registry may remove them ({error})"
        );
        let name = registry.reference();
        report.warning(&Error::new(error.kind(), name, what).into());
    }
}

/// By what the parts of an image can be checked before all of it is there: that of its weakest layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trust {
    /// By nothing.
    Nothing,
    /// By a list that somebody has published for the image: it finds damage, not what they have made.
    Published,
    /// By a list that the image names.
    Image,
}

/// The list of a layer and its digest.
pub type Named = (Digest, ChunkList);

/// The lists of the layers of an image that `store` does not have, as far as there are any. They are in the store then.
///
/// # Errors
///
/// A list that is not what the image says it is; what keeps it from being asked for; the system's.
pub fn fetch(
    registry: &Registry,
    store: &Store,
    image: &Image,
    layers: &[Descriptor],
) -> Result<(Vec<Option<Named>>, Trust)> {
    let (mut lists, mut trust) = (Vec::new(), Trust::Image);
    let mut published: Option<Vec<Descriptor>> = None;
    for layer in layers {
        if store.has_blob(layer)? {
            lists.push(None);
            continue;
        }
        if let Some(named) = named_list(layer) {
            if let Some(list) = get(registry, store, layer, &named.digest)? {
                lists.push(Some((named.digest, list)));
                continue;
            }
        }
        let published = published.get_or_insert_with(|| find_published(registry, image));
        let of = layer.digest.to_string();
        let mut found = published.iter();
        let found = found.find_map(|part| {
            let is_of = part.annotations.get(OF_LAYER) == Some(&of);
            let list = is_of.then(|| get(registry, store, layer, &part.digest))?;
            let list = list.unwrap_or_else(|error| {
                tracing::warn!(%error, "a published chunk list is none");
                None
            })?;
            Some((part.digest.clone(), list))
        });
        trust = trust.min(match &found {
            Some(_) => Trust::Published,
            None => Trust::Nothing,
        });
        lists.push(found);
    }
    Ok((lists, trust))
}

/// The list of a layer that has this digest, from the store or else from the registry.
///
/// # Errors
///
/// As [`Registry::chunk_list`].
pub fn get(
    registry: &Registry,
    store: &Store,
    layer: &Descriptor,
    digest: &Digest,
) -> Result<Option<ChunkList>> {
    if let Some(list) = store.chunk_list(layer, digest)? {
        return Ok(Some(list));
    }
    let Some(list) = registry.chunk_list(layer, digest)? else {
        return Ok(None);
    };
    let descriptor = Descriptor::new(
        CHUNK_LIST_TYPE,
        digest.clone(),
        list.as_bytes().len() as u64,
    );
    store.put(&descriptor, list.as_bytes())?;
    Ok(Some(list))
}

/// Layers of other images of the same repository that the store has, with their lists: chunks that are the same need not be
/// fetched. What cannot be read of them helps nobody.
pub fn of_other_images(
    registry: &Registry,
    store: &Store,
    reference: &Reference,
    layers: &[Descriptor],
) -> Vec<(Descriptor, ChunkList)> {
    let mut found: Vec<(Descriptor, ChunkList)> = Vec::new();
    for named in store.names().unwrap_or_default().into_iter().rev() {
        let is_other = |name: &String| {
            name.parse()
                .is_ok_and(|name: Reference| name.name() == reference.name())
        };
        if !named.name.as_ref().is_some_and(is_other) {
            continue;
        }
        let Ok(image) = store.image(&named.descriptor, &Platform::here()) else {
            continue;
        };
        for layer in image.manifest.layers.iter() {
            let is_known = layers.iter().any(|known| known.digest == layer.digest)
                || found.iter().any(|(known, _)| known.digest == layer.digest);
            let Some(list) = named_list(layer).filter(|_| !is_known) else {
                continue;
            };
            if !store.has_blob(layer).unwrap_or(false) {
                continue;
            }
            if found.len() == MAX_OTHERS {
                return found;
            }
            match get(registry, store, layer, &list.digest) {
                Ok(Some(list)) => found.push((layer.clone(), list)),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "no chunk list of a layer that is here");
                    return found;
                }
            }
        }
    }
    found
}

/// All lists in artifacts that refer to an image. A registry that cannot say has none.
fn find_published(registry: &Registry, image: &Image) -> Vec<Descriptor> {
    match registry.referrers(&image.descriptor, CHUNK_LIST_TYPE) {
        Ok(artifacts) => {
            let parts = artifacts.into_iter().flat_map(|found| found.layers.0);
            parts.collect()
        }
        Err(error) => {
            tracing::warn!(%error, "what refers to the image is not known");
            Vec::new()
        }
    }
}
