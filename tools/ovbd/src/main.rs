// SPDX-License-Identifier: GPL-2.0

//! The `ovbd` command.

use std::{
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use ovbd::{
    build,
    cli::{self, Cli, Command, MapFormat},
    devices::{commit, cow, down, list::List, up, Interrupt},
    export,
    image::Image,
    info::Info,
    layer::LayerPath,
    map::Map,
    progress::Progress,
    stack::Stack,
    verify::{self, Finding},
};
use ovbd_image::zfile::{Algorithm, Options as ZfileOptions};

/// Exit status for wrong usage.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("ovbd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Build(args) => run_build(args),
        Command::Export(args) => run_export(args),
        Command::Verify(args) => run_verify(args),
        Command::Info(args) => run_info(args),
        Command::Up(args) => run_up(args),
        Command::Down(args) => run_down(&args),
        Command::Ls(args) => run_ls(&args),
        Command::Commit(args) => run_commit(args),
    }
}

/// Runs `work` on as many threads as the user wants.
fn on_threads<T: Send>(threads: Option<u16>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let threads = threads.map_or(0, usize::from);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .context("cannot start threads")?
        .install(work)
}

/// The options for a new layer; wrong usage is reported and its exit status returned.
fn new_layer(
    args: cli::NewLayer,
    base: Vec<LayerPath>,
    raw: bool,
) -> Result<std::result::Result<build::Options, ExitCode>> {
    let zfile = (args.format == cli::Format::Zfile).then_some(ZfileOptions {
        block_bytes: args.block_size,
        algorithm: match args.algo {
            cli::Algo::Lz4 => Algorithm::Lz4,
            cli::Algo::Zstd => Algorithm::Zstd,
        },
        block_crc: !args.no_crc,
    });
    let options = build::Options {
        base,
        raw,
        zfile,
        level: args.level,
        tar: args.tar,
        uuid: args.uuid.map(build::uuid_text),
        parent_uuid: args.parent_uuid.map(build::uuid_text),
        replace: args.force,
    };
    if let Err(what) = options.check() {
        Cli::command()
            .error(clap::error::ErrorKind::ValueValidation, what)
            .print()?;
        return Ok(Err(ExitCode::from(USAGE)));
    }
    Ok(Ok(options))
}

fn run_build(args: cli::Build) -> Result<ExitCode> {
    let (threads, output) = (args.layer.threads.threads, args.layer.output.clone());
    let options = match new_layer(args.layer, args.base, args.raw)? {
        Ok(options) => options,
        Err(code) => return Ok(code),
    };
    let progress = Progress::new("building", size(&args.source));
    on_threads(threads, || {
        Ok(build::build(&args.source, &output, &options, &progress)?)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn run_commit(args: cli::Commit) -> Result<ExitCode> {
    let (threads, output) = (args.layer.threads.threads, args.layer.output.clone());
    let options = match new_layer(args.layer, Vec::new(), false)? {
        Ok(options) => options,
        Err(code) => return Ok(code),
    };
    let interrupt = Interrupt::install()?;
    on_threads(threads, || {
        Ok(commit::commit(&args.name, &output, &options, &interrupt)?)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn run_up(args: cli::Up) -> Result<ExitCode> {
    let options = up::Options {
        name: args.name,
        layers: args.layers,
        writable: args.writable.then_some(cow::Options {
            path: args.cow,
            size: args.size,
        }),
        force: args.force,
    };
    if args.dry_run {
        return print(&up::dry_run(&options)?);
    }
    let device = up::up(&options, &Interrupt::install()?)?;
    print(&format!("{}\n", device.display()))
}

fn run_down(args: &cli::Down) -> Result<ExitCode> {
    down::down(&args.name)?;
    Ok(ExitCode::SUCCESS)
}

fn run_ls(args: &cli::Ls) -> Result<ExitCode> {
    let list = List::new()?;
    match args.json {
        true => print(&(serde_json::to_string_pretty(&list)? + "\n")),
        false => print(&list.to_string()),
    }
}

fn run_export(args: cli::Export) -> Result<ExitCode> {
    let image = Image::open(&args.layers)?;
    let progress = Progress::new("exporting", image.bytes());
    on_threads(args.threads.threads, || {
        if args.output == Path::new("-") {
            let name = Path::new("standard output");
            let mut out = io::stdout();
            export::to_writer(&image, &mut out, name, &progress)?;
            out.flush()?;
            return Ok(());
        }
        Ok(export::to_file(
            &image,
            &args.output,
            args.force,
            &progress,
        )?)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn run_verify(args: cli::Verify) -> Result<ExitCode> {
    let total = args.layers.iter().map(|path| size(path.data())).sum();
    let progress = Progress::new("verifying", total);
    let problems = on_threads(args.threads.threads, || {
        Ok(verify::verify(
            &args.layers,
            &progress,
            &mut |finding| match finding {
                Finding::Problem(error) => eprintln!("ovbd: {error}"),
                Finding::Warning(error) => eprintln!("ovbd: warning: {error}"),
            },
        ))
    })?;
    Ok(match problems {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn run_info(args: cli::Info) -> Result<ExitCode> {
    let image = Image::open(&args.layers)?;
    let text = match (args.map, &image) {
        (None, image) if args.json => {
            let mut json = serde_json::to_string_pretty(&Info::new(image))?;
            json.push('\n');
            json
        }
        (None, image) => Info::new(image).to_string(),
        (Some(format), Image::Stack(stack)) => map(stack, format),
        (Some(_), Image::Zfile(zfile)) => {
            let path = zfile.input().path();
            return Err(ovbd::Error::new(path, "holds no layer, there is nothing to map").into());
        }
    };
    print(&text)
}

fn print(text: &str) -> Result<ExitCode> {
    let name = Path::new("standard output");
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|e| ovbd::Error::io(name, "write", e))?;
    Ok(ExitCode::SUCCESS)
}

fn map(stack: &Stack, format: MapFormat) -> String {
    const COLUMNS: usize = 64;
    const TEXT_LINES: u64 = 16;
    const SVG_LINES: u64 = 64;
    let terminal = io::stdout().is_terminal();
    match format {
        MapFormat::Svg => Map::new(stack, COLUMNS as u64 * SVG_LINES).to_svg(COLUMNS),
        MapFormat::Auto if !terminal => map(stack, MapFormat::Svg),
        MapFormat::Auto | MapFormat::Term => {
            Map::new(stack, COLUMNS as u64 * TEXT_LINES).to_text(COLUMNS, terminal)
        }
    }
}

/// Bytes of a file, for the progress bar.
fn size(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |found| found.len())
}
