// SPDX-License-Identifier: GPL-2.0

//! What the arguments of `export` name: a stack of layers, or a single ZFile around anything else.

use crate::{
    blob::{Blob, Content},
    error::Result,
    layer::{Layer, LayerPath},
    parents::Parents,
    pool::Pool,
    stack::{check_count, Stack, StackReader, WINDOW_BYTES},
    zfile::{Cursor, ReadAhead, Zfile},
};

/// Something with content to be read at random.
pub enum StackOrZfile {
    /// A stack of layers.
    Stack(Box<Stack>),
    /// A ZFile that holds no layer.
    Zfile(Box<Zfile>),
}

impl StackOrZfile {
    /// Opens layers, bottom first, or a single ZFile.
    ///
    /// # Errors
    ///
    /// Those of [`Stack::open`] and [`Blob::open`].
    pub fn open(paths: &[LayerPath], parents: Parents) -> Result<Self> {
        check_count(paths)?;
        if let [LayerPath::Sealed(path)] = paths {
            let opened = Blob::open(path)?;
            if let Content::Zfile(zfile) = &opened.content {
                if !opened.is_layer()? {
                    return Ok(StackOrZfile::Zfile(zfile.clone()));
                }
            }
            let stack = Stack::new(vec![Layer::sealed(opened, 0)?], parents)?;
            return Ok(StackOrZfile::Stack(Box::new(stack)));
        }
        Ok(StackOrZfile::Stack(Box::new(Stack::open(paths, parents)?)))
    }

    /// Bytes of the content.
    pub fn bytes(&self) -> u64 {
        match self {
            StackOrZfile::Stack(stack) => stack.virtual_bytes(),
            StackOrZfile::Zfile(zfile) => zfile.geometry().original_bytes(),
        }
    }

    /// The numbers of the windows that hold data, in order; all others are zeros.
    pub fn windows(&self) -> Box<dyn Iterator<Item = u64> + Send + '_> {
        match self {
            StackOrZfile::Zfile(_) => Box::new(0..self.bytes().div_ceil(WINDOW_BYTES)),
            StackOrZfile::Stack(stack) => Box::new(stack.data_windows(stack.sectors())),
        }
    }

    /// Reads compressed bytes of a window, for [`StackOrZfileReader::take_ahead`]. Takes memory from `pool`.
    pub fn read_ahead(&self, window: u64, pool: &Pool<Vec<u8>>) -> Vec<(usize, ReadAhead)> {
        let from = window * WINDOW_BYTES;
        let to = self.bytes().min(from + WINDOW_BYTES);
        match self {
            StackOrZfile::Stack(stack) => stack.read_ahead(from, to, pool),
            StackOrZfile::Zfile(zfile) => vec![(0, zfile.read_ahead(from, to, pool))],
        }
    }

    /// A reader for one thread.
    pub fn reader(&self) -> StackOrZfileReader<'_> {
        match self {
            StackOrZfile::Stack(stack) => StackOrZfileReader::Stack(stack.reader()),
            StackOrZfile::Zfile(zfile) => StackOrZfileReader::Zfile(zfile, Box::default()),
        }
    }
}

/// Reads from an image; every thread has its own.
pub enum StackOrZfileReader<'a> {
    /// From a stack of layers.
    Stack(StackReader<'a>),
    /// From a ZFile.
    Zfile(&'a Zfile, Box<Cursor>),
}

impl StackOrZfileReader<'_> {
    /// Takes what [`StackOrZfile::read_ahead`] has read; the memory that was used before goes to `pool`.
    pub fn take_ahead(&mut self, ahead: Vec<(usize, ReadAhead)>, pool: &Pool<Vec<u8>>) {
        for (layer, stored) in ahead {
            let cursor: &mut Cursor = match self {
                StackOrZfileReader::Stack(reader) => reader.cursor(layer),
                StackOrZfileReader::Zfile(_, cursor) => cursor,
            };
            cursor.take_ahead(stored, pool);
        }
    }

    /// Fills `buffer` from byte `offset`.
    ///
    /// # Errors
    ///
    /// Those of the layers that own what is read.
    pub fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match self {
            StackOrZfileReader::Stack(reader) => reader.read(buffer, offset),
            StackOrZfileReader::Zfile(zfile, cursor) => zfile.read(cursor, buffer, offset),
        }
    }
}
