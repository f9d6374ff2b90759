// SPDX-License-Identifier: GPL-2.0

//! A picture of a device: which layer owns which part of it, as text or as SVG.

use std::fmt::Write;

use ovbd_image::{index::Source, lsmt::SECTOR_BYTES};

use crate::{error::name, stack::Stack, units::size};

/// Who owns most of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// No layer.
    Hole,
    /// A layer that made it zero.
    Zero,
    /// A layer that stores it.
    Layer(u8),
}

impl From<Source> for Owner {
    fn from(source: Source) -> Self {
        match source {
            Source::Hole => Owner::Hole,
            Source::Zero { .. } => Owner::Zero,
            Source::Data { layer, .. } => Owner::Layer(layer),
        }
    }
}

/// The owners of equal parts of a device.
pub struct Map<'a> {
    stack: &'a Stack,
    cells: Vec<Owner>,
    cell_sectors: u64,
}

impl<'a> Map<'a> {
    /// Divides the device into at most `cells` parts.
    pub fn new(stack: &'a Stack, cells: u64) -> Self {
        let sectors = stack.sectors();
        let cell_sectors = sectors.div_ceil(cells.max(1)).max(1);
        let cells = (0..sectors.div_ceil(cell_sectors))
            .map(|cell| {
                let from = cell * cell_sectors;
                majority(stack, from, sectors.min(from + cell_sectors))
            })
            .collect();
        Self {
            stack,
            cells,
            cell_sectors,
        }
    }

    /// Lines of `columns` characters and a legend; `colour` adds ANSI sequences.
    pub fn to_text(&self, columns: usize, colour: bool) -> String {
        let mut out = self.title();
        out.push('\n');
        for line in self.cells.chunks(columns.max(1)) {
            for cell in line {
                self.push_symbol(&mut out, *cell, colour);
            }
            out.push('\n');
        }
        out.push('\n');
        for (owner, text) in self.legend() {
            self.push_symbol(&mut out, owner, colour);
            let _ = writeln!(out, " {text}");
        }
        out
    }

    fn title(&self) -> String {
        format!(
            "{} in cells of {}",
            size(self.stack.virtual_bytes()),
            size(self.cell_sectors * SECTOR_BYTES)
        )
    }

    /// Who is in the picture, top first, and what to call them.
    fn legend(&self) -> Vec<(Owner, String)> {
        let layers = self.stack.layers().iter().zip(0..=u8::MAX).rev();
        let mut entries: Vec<(Owner, String)> = layers
            .map(|(layer, number)| {
                let text = format!("layer {number}: {}", name(layer.path()));
                (Owner::Layer(number), text)
            })
            .collect();
        entries.push((Owner::Zero, "zeroed".to_owned()));
        entries.push((Owner::Hole, "hole".to_owned()));
        entries.retain(|(owner, _)| self.cells.contains(owner));
        entries
    }

    fn push_symbol(&self, out: &mut String, owner: Owner, colour: bool) {
        const SYMBOLS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        let symbol = match owner {
            Owner::Hole => '.',
            Owner::Zero => '_',
            Owner::Layer(number) => char::from(SYMBOLS[usize::from(number) % SYMBOLS.len()]),
        };
        match (colour, owner) {
            (true, Owner::Layer(_)) => {
                let (r, g, b) = self.colour(owner);
                let _ = write!(out, "\x1b[30;48;2;{r};{g};{b}m{symbol}\x1b[0m");
            }
            _ => out.push(symbol),
        }
    }

    /// From blue at the bottom over green to red at the top.
    fn colour(&self, owner: Owner) -> (u8, u8, u8) {
        match owner {
            Owner::Hole => (255, 255, 255),
            Owner::Zero => (216, 216, 216),
            Owner::Layer(number) => {
                let top = self.stack.layers().len().saturating_sub(1).max(1);
                let place = f64::from(number) / top as f64;
                let hue = (1.0 - place) * 4.0;
                // Hue 0 to 4 of six: red, yellow, green, cyan, blue.
                let channel = |n: f64| {
                    let k = (n + hue) % 6.0;
                    let value = 0.9 - 0.65 * k.min(4.0 - k).clamp(0.0, 1.0);
                    (value * 255.0) as u8
                };
                (channel(5.0), channel(3.0), channel(1.0))
            }
        }
    }

    /// A picture with `columns` cells to a row and a legend.
    pub fn to_svg(&self, columns: usize) -> String {
        const CELL: usize = 8;
        const TOP: usize = 24;
        const LINE: usize = 18;
        let columns = columns.max(1);
        let rows = self.cells.len().div_ceil(columns);
        let legend = self.legend();
        let width = columns * CELL + 16;
        let below = TOP + rows * CELL + 12;
        let height = below + legend.len() * LINE + 8;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"8\" y=\"16\">{}</text>\n",
            escape(&self.title())
        );
        for (row, cells) in self.cells.chunks(columns).enumerate() {
            let mut column = 0;
            for run in cells.chunk_by(|a, b| a == b) {
                if let Some(owner) = run.first().filter(|owner| **owner != Owner::Hole) {
                    let (x, y) = (8 + column * CELL, TOP + row * CELL);
                    let _ = writeln!(
                        out,
                        "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{CELL}\" fill=\"{}\"/>",
                        run.len() * CELL,
                        self.fill(*owner)
                    );
                }
                column += run.len();
            }
        }
        let _ = writeln!(
            out,
            "<rect x=\"8\" y=\"{TOP}\" width=\"{}\" height=\"{}\" fill=\"none\" stroke=\"#888\"/>",
            columns * CELL,
            rows * CELL
        );
        for (line, (owner, text)) in legend.iter().enumerate() {
            let y = below + line * LINE;
            let _ = writeln!(
                out,
                "<rect x=\"8\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\" stroke=\"#888\"/>\
                 <text x=\"26\" y=\"{}\">{}</text>",
                self.fill(*owner),
                y + 11,
                escape(text)
            );
        }
        out.push_str("</svg>\n");
        out
    }

    fn fill(&self, owner: Owner) -> String {
        let (r, g, b) = self.colour(owner);
        format!("#{r:02x}{g:02x}{b:02x}")
    }
}

/// Who owns most of the sectors `from..to`.
fn majority(stack: &Stack, from: u64, to: u64) -> Owner {
    let mut shares: Vec<(Owner, u64)> = Vec::new();
    for mapping in stack.mappings(from, to) {
        let owner = Owner::from(mapping.source());
        let sectors = mapping.sectors();
        match shares.iter_mut().find(|(other, _)| *other == owner) {
            Some((_, share)) => *share += sectors,
            None => shares.push((owner, sectors)),
        }
    }
    // Something small on an empty device should be seen: layers go before holes.
    shares
        .into_iter()
        .max_by_key(|(owner, share)| (*owner != Owner::Hole, *share))
        .map_or(Owner::Hole, |(owner, _)| owner)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
