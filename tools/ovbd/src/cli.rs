// SPDX-License-Identifier: GPL-2.0

//! The command line: what all verbs share. Man pages and shell completions are made from it.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Write},
    path::Path,
    process::ExitCode,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc,
    },
};

use anyhow::Context;
use clap::{
    error::{ContextKind, ContextValue, ErrorKind},
    Args, ColorChoice, CommandFactory, FromArgMatches, Parser, ValueEnum,
};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};
use ovbd_layers::{build, content_hash, layer::LayerPath, output, parents, units};
use rustix::pipe::PipeFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::{
    commands::Command,
    report::{self, Report},
};

/// Exit statuses of the command. The texts of its help, for the verbs that have their own meaning of one, say so.
pub mod status {
    /// Something failed, and stderr says what; `ovbd verify` found damage.
    pub const FAILURE: u8 = 1;
    /// The command line is wrong; nothing was done.
    pub const USAGE: u8 = 2;
    /// `ovbd verify` could not read all of it, and found no damage in what it could.
    pub const CANNOT_TELL: u8 = 3;
    /// Nobody reads standard output any more: what a shell says of a program that SIGPIPE ended.
    pub const CLOSED_PIPE: u8 = 141;
}

/// Build, read, check and map OverlayBD images.
///
/// A stack of layers is given bottom first. A LAYER is an LSMT blob, a ZFile around one, either
/// of them in the tar wrapper of a registry, or the writable pair DATA:INDEX (only at the top). It may also be an
/// image: its name in the store, or oci:DIR[:NAME] for one in an OCI image layout.
///
/// Sizes are bytes, or have a unit: k, M, G and T (or KiB, MiB, ...) are powers of 1024, kB, MB, GB and TB of 1000.
///
/// Progress, warnings and errors go to stderr. With --json or --progress=json each is an object in a line of its
/// own: {"error": {"message": ..., "causes": [...], "path": ..., "offset": ..., "errno": ...}}, "warning" alike, and
/// {"progress": {"what": ..., "done": ..., "total": ...}} in bytes. Wrong usage is always text.
///
/// Exit status: 0 success, 1 failure, 2 wrong usage, 141 nobody reads standard output. Of verify: 0 sound, 1 damaged,
/// 3 not all of it could be read.
#[derive(Debug, Parser)]
#[command(name = "ovbd", version, max_term_width = 100)]
pub struct Cli {
    /// What is shown meanwhile.
    #[command(flatten)]
    pub output: report::Options,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// From now on a signal that ends the program removes first what has a temporary name. For verbs that undo nothing
/// else.
///
/// # Errors
///
/// The system's.
pub fn clean_up_on_signals() -> anyhow::Result<()> {
    watch_signals().context("cannot watch for signals")
}

fn watch_signals() -> io::Result<()> {
    // A pipe: signal-hook's own sockets are not in every kernel.
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let came = Arc::new(AtomicUsize::new(0));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register_usize(signal, came.clone(), signal as usize)?;
        signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
    }
    std::thread::spawn(move || {
        if File::from(reader).read_exact(&mut [0]).is_ok() {
            output::remove_temporaries();
            // Which ends the program as if nobody had watched.
            let signal = came.load(Ordering::Relaxed) as i32;
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// Threads, for verbs that use several.
#[derive(Debug, Args)]
pub struct Threads {
    /// Use N threads instead of one per CPU
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl Threads {
    /// Runs `work` on as many threads as the user wants.
    ///
    /// # Errors
    ///
    /// The threads cannot be started, and those of `work`.
    pub fn run<T: Send>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads.map_or(0, usize::from))
            .build()
            .context("cannot start threads")?
            .install(work)
    }
}

/// Whether a stack is checked, for verbs that take one.
#[derive(Debug, Args)]
pub struct Parents {
    /// Take layers whose parent is not the layer below
    #[arg(long)]
    pub ignore_parents: bool,
}

impl Parents {
    /// For a stack that becomes a device or an image.
    pub fn of_device(&self) -> parents::Parents {
        match self.ignore_parents {
            true => parents::Parents::Ignored,
            false => parents::Parents::All,
        }
    }

    /// For layers that are only looked at.
    pub fn unless_alone(&self) -> parents::Parents {
        match self.ignore_parents {
            true => parents::Parents::Ignored,
            false => parents::Parents::UnlessAlone,
        }
    }
}

/// What is assumed of storage.
#[derive(Debug, Args)]
pub struct UnknownStorage {
    /// Take storage that does not tell on which devices it is, as ZFS, for being on others
    #[arg(long)]
    pub assume_elsewhere: bool,
}

/// How a ZFile is compressed.
#[derive(Clone, Debug, Default, Args)]
pub struct Compression {
    /// Compression of a ZFile [default: lz4]
    #[arg(long, value_enum)]
    pub algo: Option<Algo>,
    /// Compression level: lz4 0 to 12, zstd 0 to 22; 0 is the default
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub level: Option<i32>,
    /// Block size of a ZFile, a power of two from 512 to 64k [default: 4k]
    #[arg(long, value_name = "BYTES", value_parser = units::parse)]
    pub block_size: Option<u64>,
}

impl Compression {
    /// The options that are given.
    pub fn given(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            (self.algo.is_some(), "--algo"),
            (self.level.is_some(), "--level"),
            (self.block_size.is_some(), "--block-size"),
        ];
        all.into_iter()
            .filter_map(|(given, option)| given.then_some(option))
    }

    /// What they say, for a ZFile with or without CRCs.
    pub fn zfile(&self, block_crc: bool) -> ZfileOptions {
        ZfileOptions {
            // What is too large is no valid block size either.
            block_bytes: self
                .block_size
                .map_or(4096, |bytes| u32::try_from(bytes).unwrap_or(u32::MAX)),
            algorithm: match self.algo.unwrap_or(Algo::Lz4) {
                Algo::Lz4 => Algorithm::Lz4,
                Algo::Zstd => Algorithm::Zstd,
            },
            block_crc,
        }
    }
}

/// What is the same for every new layer.
#[derive(Debug, Args)]
pub struct NewLayer {
    /// Format of the result [default: zfile]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// How it is compressed.
    #[command(flatten)]
    pub compression: Compression,
    /// Leave out the CRC after every block of a ZFile
    #[arg(long)]
    pub no_crc: bool,
    /// Write also what the original's readers cannot read: small or large blocks that do not compress
    #[arg(long)]
    pub own_reader_only: bool,
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
}

/// How a new layer is laid out, for verbs that can do so.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Layout {
    /// Lay the layer out for direct access to the memory that it is put in: not compressed, nothing left out, whole huge
    /// pages of 2 MiB. What is zero takes no space in OUT
    #[arg(long)]
    pub dax: bool,
}

impl NewLayer {
    /// The options for a layer over `base`, or for a ZFile around the `raw` bytes. Ends the program with the usage of
    /// `verb` where they cannot go together.
    pub fn options(&self, verb: &str, base: Vec<LayerPath>, raw: bool) -> build::Options {
        let format = self.format.unwrap_or(Format::Zfile);
        self.options_of(verb, base, raw, format, Layout::default())
    }

    /// The same for a layer that may be for direct access.
    pub fn laid_out(
        &self,
        verb: &str,
        base: Vec<LayerPath>,
        raw: bool,
        layout: Layout,
    ) -> build::Options {
        let usual = match layout.dax {
            true => Format::Lsmt,
            false => Format::Zfile,
        };
        self.options_of(verb, base, raw, self.format.unwrap_or(usual), layout)
    }

    fn options_of(
        &self,
        verb: &str,
        base: Vec<LayerPath>,
        raw: bool,
        format: Format,
        layout: Layout,
    ) -> build::Options {
        let plain = format == Format::Lsmt;
        let no_crc = self.no_crc.then_some("--no-crc");
        if let Some(option) = self.compression.given().chain(no_crc).find(|_| plain) {
            wrong_usage(verb, format!("{option} is for --format zfile only"));
        }
        let zfile = (!plain).then(|| self.compression.zfile(!self.no_crc));
        let options = build::Options {
            base,
            raw,
            zfile,
            level: self.compression.level,
            dax: layout.dax,
            tar: self.tar,
            uuid: self.uuid.map(content_hash::uuid_text),
            parent_uuid: self.parent_uuid.map(content_hash::uuid_text),
            replace: self.force,
            parents: parents::Parents::All,
            allow_mounted: false,
            own_reader_only: self.own_reader_only,
            max_segments: ovbd_layers::layer_writer::MAX_SEGMENTS,
        };
        if let Err(what) = options.check() {
            wrong_usage(verb, what);
        }
        options
    }
}

/// Takes the command line; where that is wrong or asks for help, says so and returns the exit status.
///
/// # Errors
///
/// That status.
pub fn parse() -> Result<Cli, ExitCode> {
    let words = command().try_get_matches();
    let mut error = match words.and_then(|words| Cli::from_arg_matches(&words)) {
        Ok(cli) => return Ok(cli),
        Err(error) => error,
    };
    if error.use_stderr() && error.get(ContextKind::Usage).is_none() {
        // Values that are wrong have none by themselves.
        let usage = named_verb(std::env::args_os().skip(1)).render_usage();
        error.insert(ContextKind::Usage, ContextValue::StyledStr(usage));
    }
    let printed = error.print().and_then(|()| io::stdout().flush());
    Err(match printed {
        _ if error.use_stderr() => status::USAGE.into(),
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let error = ovbd_layers::Error::io(Path::new(report::STDOUT), "write", e);
            Report::new(&report::Options::default(), false).end_with(&error.into())
        }
    })
}

/// The command line's grammar, which colours its texts where this command colours its own.
fn command() -> clap::Command {
    Cli::command().color(match report::colours_are_unwanted() {
        true => ColorChoice::Never,
        false => ColorChoice::Auto,
    })
}

/// The verb among the words of a command line, or else all of the command.
fn named_verb(words: impl Iterator<Item = OsString>) -> clap::Command {
    let mut command = command();
    // Builds the names in the usage.
    command.build();
    for word in words {
        if let Some(verb) = word.to_str().and_then(|word| command.find_subcommand(word)) {
            return verb.clone();
        }
    }
    command
}

/// Ends the program: `what` is wrong with the options of `verb`, whose usage is shown.
pub fn wrong_usage(verb: &str, what: String) -> ! {
    named_verb([verb.into()].into_iter())
        .error(ErrorKind::ValueValidation, what)
        .exit()
}

/// Ends the program with the usage of `verb` where both JSON and the result would go to standard output.
pub fn one_stream(verb: &str, json: bool, output: &Path) {
    if json && output == Path::new("-") {
        wrong_usage(
            verb,
            "--json and OUT cannot both be standard output".to_owned(),
        );
    }
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

fn uuid(text: &str) -> Result<uuid::Uuid, uuid::Error> {
    text.parse()
}
