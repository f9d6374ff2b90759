// SPDX-License-Identifier: GPL-2.0

//! `ovbd info`.

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, ValueEnum};
use ovbd_layers::{
    info::Info as Facts, map::Map, stack::Stack, stack_or_zfile::StackOrZfile, Error,
};

use crate::{
    cli::Parents,
    names::{Layers, Need},
    report::{self, Report},
};

/// Show what layers are and what they own.
#[derive(Debug, Args)]
pub struct Info {
    /// Print JSON
    #[arg(long, conflicts_with = "map")]
    pub json: bool,
    /// Draw which layer owns which part of the device
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    pub map: Option<MapFormat>,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
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

impl Info {
    /// Prints what is asked for.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let opened = StackOrZfile::open(
            &self.layers.resolve(Need::Parts, report)?,
            self.parents.unless_alone(),
        )?;
        let text = match (self.map, &opened) {
            (None, opened) if self.json => {
                serde_json::to_string_pretty(&Facts::new(opened))? + "\n"
            }
            (None, opened) => Facts::new(opened).to_string(),
            (Some(format), StackOrZfile::Stack(stack)) => draw(stack, format),
            (Some(_), StackOrZfile::Zfile(zfile)) => {
                let path = zfile.input().path();
                return Err(Error::new(path, "holds no layer, there is nothing to map").into());
            }
        };
        report.print(&text)
    }
}

fn draw(stack: &Stack, format: MapFormat) -> String {
    const COLUMNS: usize = 64;
    const TEXT_LINES: u64 = 16;
    const SVG_LINES: u64 = 64;
    let terminal = io::stdout().is_terminal();
    match format {
        MapFormat::Svg => Map::new(stack, COLUMNS as u64 * SVG_LINES).to_svg(COLUMNS),
        MapFormat::Auto if !terminal => draw(stack, MapFormat::Svg),
        MapFormat::Auto | MapFormat::Term => {
            Map::new(stack, COLUMNS as u64 * TEXT_LINES).to_text(COLUMNS, report::colours_stdout())
        }
    }
}
