// SPDX-License-Identifier: GPL-2.0

//! What the arguments of `export` name: a stack of layers, or a single ZFile around anything else.

use std::sync::Arc;

use crate::{
    blob::{Blob, Content},
    error::Result,
    layer::{Layer, LayerPath},
    parents::Parents,
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

    /// Bytes of the content that are stored somewhere: no more of it is not zero.
    pub fn data_bytes(&self) -> u64 {
        match self {
            StackOrZfile::Stack(stack) => stack.data_bytes(),
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

    /// Reads compressed bytes of a window into `ahead`, for [`StackOrZfileReader::take_ahead`].
    pub fn read_ahead(&self, window: u64, ahead: &mut ReadAhead) {
        let from = window * WINDOW_BYTES;
        let to = self.bytes().min(from + WINDOW_BYTES);
        match self {
            StackOrZfile::Stack(stack) => stack.read_ahead(from, to, ahead),
            StackOrZfile::Zfile(zfile) => zfile.read_ahead(from, to, 0, ahead),
        }
    }

    /// A reader for one thread.
    pub fn reader(&self) -> StackOrZfileReader<'_> {
        match self {
            StackOrZfile::Stack(stack) => StackOrZfileReader::Stack(stack.reader()),
            StackOrZfile::Zfile(zfile) => {
                StackOrZfileReader::Zfile(zfile, Box::default(), Arc::default())
            }
        }
    }
}

/// Reads from an image; every thread has its own.
pub enum StackOrZfileReader<'a> {
    /// From a stack of layers.
    Stack(StackReader<'a>),
    /// From a ZFile.
    Zfile(&'a Zfile, Box<Cursor>, Arc<ReadAhead>),
}

impl StackOrZfileReader<'_> {
    /// Uses what [`StackOrZfile::read_ahead`] has read.
    pub fn take_ahead(&mut self, ahead: ReadAhead) {
        match self {
            StackOrZfileReader::Stack(reader) => reader.take_ahead(ahead),
            StackOrZfileReader::Zfile(_, cursor, own) => {
                *own = Arc::new(ahead);
                cursor.take_ahead(own, 0);
            }
        }
    }

    /// Gives the memory of what was read ahead back.
    pub fn give_ahead(&mut self) -> Option<ReadAhead> {
        match self {
            StackOrZfileReader::Stack(reader) => reader.give_ahead(),
            StackOrZfileReader::Zfile(_, cursor, own) => {
                cursor.drop_ahead();
                Arc::into_inner(std::mem::take(own))
            }
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
            StackOrZfileReader::Zfile(zfile, cursor, _) => zfile.read(cursor, buffer, offset),
        }
    }
}
