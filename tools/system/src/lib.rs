// SPDX-License-Identifier: GPL-2.0

//! Generations of a system that boots from images: which there are, which one the boot loader takes, which may go.
//!
//! A generation is an entry of the boot partition, as the Boot Loader Specification has it (type 1), and nothing else
//! records it: [`boot_folder`] writes and reads them, [`entry`] is one of them, [`choice`] has the rules. [`image_files`]
//! finds kernel and initrd in the file system of an image.

pub mod boot_folder;
pub mod choice;
pub mod entry;
pub mod image_files;
