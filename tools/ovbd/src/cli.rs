// SPDX-License-Identifier: GPL-2.0

//! The command line. Man pages and shell completions are made from it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::layer::LayerPath;

/// Build, read and check OverlayBD images.
///
/// An image is a stack of layers, given bottom first. A LAYER is an LSMT blob, a ZFile around one, either
/// of them in the tar wrapper of a registry, or the writable pair DATA:INDEX (only at the top).
///
/// Exit status: 0 success, 1 failure, 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "ovbd", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a layer from a raw disk image or block device
    Build(Build),
    /// Write the content of a stack to a raw image
    Export(Export),
    /// Check every checksum, bound and invariant, and list all that is wrong
    Verify(Verify),
    /// Show what layers are and what they own
    Info(Info),
}

/// Threads, for commands that use several.
#[derive(Debug, Args)]
pub struct Threads {
    /// Use N threads instead of one per CPU
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// Make a layer from a raw disk image or block device.
///
/// The result appears under its name only when it is complete and on the disk. The same input and options
/// give the same bytes, on any number of threads.
#[derive(Debug, Args)]
pub struct Build {
    /// Store only the difference to this stack of layers, bottom first
    #[arg(long, value_name = "LAYER", num_args = 1.., value_parser = layer, value_hint = ValueHint::FilePath)]
    pub base: Vec<LayerPath>,
    /// Format of the result
    #[arg(long, value_enum, default_value_t = Format::Zfile)]
    pub format: Format,
    /// Compression of a ZFile
    #[arg(long, value_enum, default_value_t = Algo::Lz4)]
    pub algo: Algo,
    /// Compression level: lz4 0 to 12, zstd 0 to 22; 0 is the default
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub level: Option<i32>,
    /// Block size of a ZFile in bytes, a power of two from 512 to 65536
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub block_size: u32,
    /// Leave out the CRC after every block of a ZFile
    #[arg(long)]
    pub no_crc: bool,
    /// Compress RAW itself, without making a layer of it
    #[arg(long, conflicts_with_all = ["base", "uuid", "parent_uuid"])]
    pub raw: bool,
    /// Put the result into the tar wrapper of a registry
    #[arg(long)]
    pub tar: bool,
    /// UUID of the layer instead of one derived from its content
    #[arg(long, value_parser = uuid)]
    pub uuid: Option<uuid::Uuid>,
    /// UUID of the layer below instead of that of the topmost base layer
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    pub parent_uuid: Option<uuid::Uuid>,
    /// Replace OUT if it exists
    #[arg(short, long)]
    pub force: bool,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
    /// The file to make
    #[arg(short, long = "output", value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Raw disk image or block device
    #[arg(value_name = "RAW", value_hint = ValueHint::FilePath)]
    pub source: PathBuf,
}

/// Write the content of a stack to a raw image.
///
/// The image is sparse where the stack is zero, and nothing is left behind on failure. A single ZFile that
/// holds no layer gives its own content. With --force, OUT can be a block device.
#[derive(Debug, Args)]
pub struct Export {
    /// Layers, bottom first
    #[arg(required = true, value_name = "LAYER", value_parser = layer, value_hint = ValueHint::FilePath)]
    pub layers: Vec<LayerPath>,
    /// The file to make, or - for standard output
    #[arg(short, long = "output", value_name = "OUT", value_hint = ValueHint::FilePath)]
    pub output: PathBuf,
    /// Replace OUT if it exists
    #[arg(short, long)]
    pub force: bool,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
}

/// Check every checksum, bound and invariant, and list all that is wrong.
#[derive(Debug, Args)]
pub struct Verify {
    /// Layers, bottom first
    #[arg(required = true, value_name = "LAYER", value_parser = layer, value_hint = ValueHint::FilePath)]
    pub layers: Vec<LayerPath>,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
}

/// Show what layers are and what they own.
#[derive(Debug, Args)]
pub struct Info {
    /// Print JSON
    #[arg(long, conflicts_with = "map")]
    pub json: bool,
    /// Draw which layer owns which part of the device
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    pub map: Option<MapFormat>,
    /// Layers, bottom first
    #[arg(required = true, value_name = "LAYER", value_parser = layer, value_hint = ValueHint::FilePath)]
    pub layers: Vec<LayerPath>,
}

/// Format of a new layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Uncompressed
    Lsmt,
    /// Compressed in blocks
    Zfile,
}

/// Compression of a ZFile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Algo {
    /// Fast
    Lz4,
    /// Smaller
    Zstd,
}

/// How a map is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MapFormat {
    /// Text on a terminal, else SVG
    Auto,
    /// Text
    Term,
    /// A picture
    Svg,
}

fn layer(name: &str) -> Result<LayerPath, std::convert::Infallible> {
    name.parse()
}

fn uuid(text: &str) -> Result<uuid::Uuid, uuid::Error> {
    text.parse()
}
