// SPDX-License-Identifier: GPL-2.0

//! Layers over original tars: the data section of such a layer begins with the tar, byte for byte, and the index says which
//! bytes of it the blocks of a file system are.
//!
//! The file system is made by its ordinary tool. What it stores of the files is then found in the tar by content
//! ([`pieces`]), so nothing here knows a file system: only what is not found, the metadata, is stored besides. Any reader
//! of layers reads it. Whoever has the layer can tell that it holds the original, by the digest that the image of it has
//! signed ([`original`]), and can have the original back.

pub mod filesystem;
pub mod join;
pub mod members;
pub mod original;
pub mod pieces;
pub mod plan;
pub mod source;
pub mod unpack;
pub mod verbatim;
