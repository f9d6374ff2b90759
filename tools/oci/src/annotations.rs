// SPDX-License-Identifier: GPL-2.0

//! Names of annotations: those of containerd's OverlayBD snapshotter, of OCI, and our own.

/// Digest of a layer, on the layer.
pub const BLOB_DIGEST: &str = "containerd.io/snapshot/overlaybd/blob-digest";
/// Size of a layer in bytes, on the layer.
pub const BLOB_SIZE: &str = "containerd.io/snapshot/overlaybd/blob-size";
/// Type of the file system, on the layer: `ext4`, or type, mount options and mkfs options separated by semicolons.
pub const FS_TYPE: &str = "containerd.io/snapshot/overlaybd/blob-fs-type";
/// Version of the format, on the layer.
pub const VERSION: &str = "containerd.io/snapshot/overlaybd/version";
/// The only [`VERSION`] that is written.
pub const VERSION_VALUE: &str = "0.1.0";
/// `yes` on a layer that holds no data but a record of which data is read first.
pub const ACCELERATION: &str = "containerd.io/snapshot/overlaybd/acceleration-layer";
/// On a layer that points into an ordinary layer, a blob of the same repository: its digest.
pub const TURBO_TARGET: &str = "containerd.io/snapshot/overlaybd/turbo-oci/target-digest";
/// As [`TURBO_TARGET`], written by older versions.
pub const FAST_TARGET: &str = "containerd.io/snapshot/overlaybd/fastoci/target-digest";

/// Type of the artifact with a subject.
pub const ARTIFACT_TYPE: &str = "application/vnd.containerd.overlaybd.native.v1+json";

/// Name of an image in an image layout.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The same for containerd.
pub const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// When an image was made.
pub const CREATED: &str = "org.opencontainers.image.created";
/// Digest of the image below.
pub const BASE_DIGEST: &str = "org.opencontainers.image.base.digest";
/// Name of the image below.
pub const BASE_NAME: &str = "org.opencontainers.image.base.name";
/// Size of the block device in bytes, on the manifest.
pub const VIRTUAL_SIZE: &str = "vnd.dm-overlaybd.virtual-size";
/// On a layer over an original tar: the digest of that tar, which is the diff ID of the original image.
pub const DIFF_ID: &str = "vnd.dm-overlaybd.tar-diff-id";
/// On such a layer: the bytes of the tar.
pub const TAR_BYTES: &str = "vnd.dm-overlaybd.tar-bytes";
/// Digest of the list of the chunks of a layer, on the layer.
pub const CHUNK_LIST: &str = "vnd.dm-overlaybd.chunk-list";
/// In an artifact with lists of chunks or traces: the digest of the layer that a part is about.
pub const OF_LAYER: &str = "vnd.dm-overlaybd.layer";
/// What the image was made of, on the manifest: `file`, `thin`, `thick` or `tar`.
pub const SOURCE: &str = "vnd.dm-overlaybd.source";
/// Root hash of dm-verity of a sealed image, in hexadecimal digits, on the manifest.
pub const VERITY_ROOT: &str = "vnd.dm-overlaybd.verity.root";
/// Bytes of the image that is sealed, behind which the tree is, on the manifest.
pub const VERITY_OFFSET: &str = "vnd.dm-overlaybd.verity.offset";
/// Signature of the digits of the root hash, PKCS#7 in DER, in base64, on the manifest.
pub const VERITY_SIGNATURE: &str = "vnd.dm-overlaybd.verity.signature";
/// On the manifest of an image whose layers were compressed by a copying tool: the digest of the manifest it came with.
pub const RESTORED_FROM: &str = "vnd.dm-overlaybd.restored-from";
