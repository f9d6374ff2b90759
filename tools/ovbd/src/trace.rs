// SPDX-License-Identifier: GPL-2.0

//! What is read of an image first: noted while a lazily pulled stack is used, published as an artifact that refers to the image,
//! and fetched first by who pulls it next.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use ovbd_devices::{lock::FOLDER, mapped::node};
use ovbd_oci::{Descriptor, Digest, Error, Image, Kind, Registry, CHUNK_BYTES};
use serde::{Deserialize, Serialize};

/// Media type of a trace, and of the artifact that has one.
pub const TRACE_TYPE: &str = "application/vnd.dm-overlaybd.trace.v1+json";

/// Chunks of layers in the order in which they were read first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Bytes of a chunk.
    pub chunk_bytes: u64,
    /// Digests of the layers.
    pub layers: Vec<Digest>,
    /// Chunks that follow each other: number of the layer in `layers`, first chunk, how many.
    pub reads: Vec<(usize, u64, u64)>,
}

impl Trace {
    /// Of chunks of `layers`, each with the number of its layer.
    pub fn new(layers: &[Descriptor], chunks: &[(usize, u64)]) -> Self {
        let mut reads: Vec<(usize, u64, u64)> = Vec::new();
        for (layer, chunk) in chunks {
            match reads.last_mut() {
                Some((last, first, count)) if last == layer && *first + *count == *chunk => {
                    *count += 1;
                }
                _ => reads.push((*layer, *chunk, 1)),
            }
        }
        Self {
            chunk_bytes: CHUNK_BYTES,
            layers: layers.iter().map(|layer| layer.digest.clone()).collect(),
            reads,
        }
    }

    /// The chunks of `layers` in their order. What is about other layers, or beyond their ends, is left out.
    pub fn chunks(&self, layers: &[Descriptor]) -> Vec<(usize, u64)> {
        let mut chunks = Vec::new();
        if self.chunk_bytes != CHUNK_BYTES {
            return chunks;
        }
        // Each chunk is fetched once, so that the trace cannot be longer than the image.
        let most: u64 = layers
            .iter()
            .map(|layer| layer.size / CHUNK_BYTES + 1)
            .sum();
        for (number, first, count) in &self.reads {
            let layer = self.layers.get(*number).and_then(|digest| {
                let mut numbered = layers.iter().enumerate();
                numbered.find(|(_, layer)| layer.digest == *digest)
            });
            let Some((number, layer)) = layer else {
                continue;
            };
            let end = layer.size.div_ceil(CHUNK_BYTES);
            for chunk in *first..first.saturating_add(*count).min(end) {
                if chunks.len() as u64 >= most {
                    return chunks;
                }
                chunks.push((number, chunk));
            }
        }
        chunks
    }

    /// The file in which the trace of a stack is.
    pub fn path(name: &str) -> PathBuf {
        Path::new(FOLDER).join(format!("{name}.trace"))
    }

    /// The trace of the stack `name`.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn read(name: &str) -> Result<Self> {
        let path = Self::path(name);
        let text = fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let what = "has no trace: what was not pulled with --lazy since this machine was started has none";
                anyhow::Error::new(Error::new(Kind::Missing, node(name).display(), what))
            }
            _ => anyhow::Error::new(error).context(format!("{}: cannot read", path.display())),
        })?;
        serde_json::from_slice(&text).with_context(|| format!("{}: not a trace", path.display()))
    }

    /// Writes the trace of the stack `name`.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn write(&self, name: &str) -> Result<()> {
        let path = Self::path(name);
        ovbd_devices::lock::make_folder(Path::new(FOLDER))?;
        let new = path.with_extension("trace.new");
        fs::write(&new, serde_json::to_vec(self)?)
            .with_context(|| format!("{}: cannot write", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("{}: cannot write", path.display()))
    }
}

/// The trace that was published last for an image. Without one the image is pulled, too.
pub fn published(registry: &Registry, image: &Image) -> Option<Trace> {
    let find = || -> ovbd_oci::Result<Option<Trace>> {
        let artifacts = registry.referrers(&image.descriptor, TRACE_TYPE)?;
        let part = artifacts.last().and_then(|found| found.layers.first());
        let Some(part) = part.filter(|part| part.media_type == TRACE_TYPE) else {
            return Ok(None);
        };
        let text = registry.small_blob(part)?;
        let trace = serde_json::from_slice(&text);
        trace.map(Some).map_err(|_| {
            Error::new(
                Kind::Invalid,
                &part.digest,
                "a trace that cannot be understood",
            )
        })
    };
    find().unwrap_or_else(|error| {
        tracing::warn!(%error, "pulling without a trace");
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(text: &str, chunks: u64) -> Descriptor {
        let digest = Digest::of(text.as_bytes());
        Descriptor::new("application/x", digest, chunks * CHUNK_BYTES - 5)
    }

    #[test]
    fn a_trace_is_of_layers_whatever_their_numbers() {
        let (a, b, c) = (layer("a", 10), layer("b", 4), layer("c", 1));
        let read = [(0, 5), (0, 6), (1, 0), (0, 7), (1, 1), (1, 2)];
        let trace = Trace::new(&[a.clone(), b.clone()], &read);
        assert_eq!(trace.reads, [(0, 5, 2), (1, 0, 1), (0, 7, 1), (1, 1, 2)]);
        assert_eq!(trace.chunks(&[a.clone(), b.clone()]), read);
        let other = [(2, 5), (2, 6), (1, 0), (2, 7), (1, 1), (1, 2)];
        assert_eq!(trace.chunks(&[c.clone(), b, a]), other);
        assert_eq!(trace.chunks(&[c]), []);
    }

    #[test]
    fn a_trace_that_somebody_made_up_is_no_longer_than_the_image() {
        let layers = [layer("a", 3)];
        let trace = |reads| Trace {
            reads,
            ..Trace::new(&layers, &[])
        };
        assert_eq!(
            trace(vec![(0, 1, u64::MAX)]).chunks(&layers),
            [(0, 1), (0, 2)]
        );
        assert_eq!(trace(vec![(0, u64::MAX, 5), (7, 0, 1)]).chunks(&layers), []);
        assert!(trace(vec![(0, 0, 3); 1000]).chunks(&layers).len() <= 4);
        let other = Trace {
            chunk_bytes: 4096,
            ..trace(vec![(0, 0, 1)])
        };
        assert_eq!(other.chunks(&layers), []);
    }
}
