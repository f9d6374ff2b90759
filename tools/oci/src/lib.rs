// SPDX-License-Identifier: GPL-2.0

//! Images in OCI registries and image layouts.
//!
//! A [`Reference`] names an image, a [`Registry`] fetches and sends it, a [`Store`] keeps it on this machine. What
//! comes from outside is parsed before it is used: a [`Digest`] before it becomes a path or a URL, a [`Manifest`] and
//! everything in it with limits, a blob against size and digest before it gets its name.
//!
//! This library knows that blobs have annotations, not what is inside of them: whether a blob is an OverlayBD layer is
//! for its caller to say.

pub mod annotations;
mod auth;
mod blob;
mod challenge;
mod chunk_list;
mod credentials;
mod digest;
mod direct_file;
mod document;
mod download;
mod error;
mod http;
mod image;
mod index;
mod ingest;
mod limiter;
mod manifest;
mod note;
mod progress;
mod reference;
mod referrers;
mod registry;
mod retry;
mod scattered;
mod squashed;
mod store;
mod sweep;
mod tls;
mod transfer;
mod unpack;
mod upload;
mod url;

pub use crate::{
    blob::{BlobSource, FilePart, Pieces},
    chunk_list::{ChunkList, ChunkLister, ListSource, CHUNK_LIST_TYPE},
    credentials::{Credentials, Keychain, Login},
    digest::{Algorithm, Digest, Hasher},
    document::{
        Bounded, Descriptor, Document, MediaType, Platform, MAX_DOCUMENT_BYTES, MAX_LAYERS,
    },
    error::{Error, Kind, Result},
    http::Options,
    image::{Image, ImageLayer, LayerKind},
    index::Index,
    ingest::{Ingest, Ingested},
    limiter::Limiter,
    manifest::{
        Config, History, Manifest, RootFs, DOCKER_CONFIG, DOCKER_LAYER, OCI_CONFIG, OCI_LAYER,
    },
    progress::{Event, NoProgress, Progress},
    reference::Reference,
    registry::Registry,
    retry::Retries,
    scattered::{chunk_range, Chunks, Found, Scattered, CHUNK_BYTES},
    squashed::Run,
    store::{Named, Store},
    sweep::{Damage, Swept},
    transfer::{fetch_blobs, send_blobs, Outgoing},
    unpack::Compression,
};
