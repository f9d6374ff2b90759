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
    /// Map a stack of layers to a block device
    Up(Up),
    /// Remove the block device of a stack
    Down(Down),
    /// List the stacks that are up
    Ls(Ls),
    /// Make a layer of what was written to a stack
    Commit(Commit),
}

/// Threads, for commands that use several.
#[derive(Debug, Args)]
pub struct Threads {
    /// Use N threads instead of one per CPU
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// What is the same for every new layer.
#[derive(Debug, Args)]
pub struct NewLayer {
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
    /// Put the result into the tar wrapper of a registry
    #[arg(long)]
    pub tar: bool,
    /// UUID of the layer instead of one derived from its content
    #[arg(long, value_parser = uuid)]
    pub uuid: Option<uuid::Uuid>,
    /// UUID of the layer below instead of that of the topmost layer below
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
    /// Compress RAW itself, without making a layer of it
    #[arg(long, conflicts_with_all = ["base", "uuid", "parent_uuid"])]
    pub raw: bool,
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
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

/// Map a stack of layers to a block device.
///
/// Attaches loop devices to the layers' files, read-only and with direct I/O where possible, puts dm-zfile over
/// those that are compressed and dm-overlaybd over all, and prints the name of the device. Layers may also be
/// block devices. Nothing is left behind on failure.
///
/// With --writable, dm-snapshot on top keeps what is written, for "ovbd commit". Without --cow it keeps it in a
/// file in /var/tmp that goes with the device.
#[derive(Debug, Args)]
pub struct Up {
    /// Make the device writable
    #[arg(long)]
    pub writable: bool,
    /// Keep what is written in this file, which is made if it is missing, or block device. Both can be used again
    /// with the same layers
    #[arg(long, value_name = "FILE|DEVICE", requires = "writable", value_hint = ValueHint::FilePath)]
    pub cow: Option<PathBuf>,
    /// Room for what is written, for instance 500M or 2G, instead of enough for everything. The file is sparse
    #[arg(long, value_name = "BYTES", requires = "writable", value_parser = bytes)]
    pub size: Option<u64>,
    /// Print the commands that make the device, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Allow layers whose parent is not the layer below, and overwrite what --cow holds if it is not a snapshot
    #[arg(short, long)]
    pub force: bool,
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Layers, bottom first
    #[arg(required = true, value_name = "LAYER", value_parser = layer, value_hint = ValueHint::FilePath)]
    pub layers: Vec<LayerPath>,
}

/// Remove the block device of a stack, and all below it that "ovbd up" made.
///
/// A device that is mounted or otherwise in use stays. What was written to it is kept if it was brought up with
/// --cow.
#[derive(Debug, Args)]
pub struct Down {
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
}

/// List the stacks that are up: their layers, sizes, and errors.
#[derive(Debug, Args)]
pub struct Ls {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Make a layer of what was written to a stack since "ovbd up --writable".
///
/// The device stays up and as it was, and is suspended while its changes are read: programs that use it wait.
/// Only what was written is read. The layer is one for the layers that the device was brought up with.
#[derive(Debug, Args)]
pub struct Commit {
    /// The layer.
    #[command(flatten)]
    pub layer: NewLayer,
    /// Name of the device below /dev/mapper
    #[arg(value_name = "NAME")]
    pub name: String,
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

/// A number of bytes, with K, M, G or T for powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.find(|c: char| !c.is_ascii_digit()) {
        None => (text, 0),
        Some(end) => {
            let (digits, unit) = text.split_at(end);
            let shift = match unit.to_ascii_uppercase().as_str() {
                "K" | "KIB" => 10,
                "M" | "MIB" => 20,
                "G" | "GIB" => 30,
                "T" | "TIB" => 40,
                _ => return Err(format!("unknown unit {unit}, there are K, M, G and T")),
            };
            (digits, shift)
        }
    };
    let number: u64 = digits.parse().map_err(|_| "not a number".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes() {
        assert_eq!(bytes("0"), Ok(0));
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("5k"), Ok(5 << 10));
        assert_eq!(bytes("3GiB"), Ok(3 << 30));
        for bad in [
            "",
            "M",
            "-1",
            "1.5G",
            "1X",
            "99999999999T",
            "99999999999999999999",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
