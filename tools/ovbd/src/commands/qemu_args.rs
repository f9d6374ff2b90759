// SPDX-License-Identifier: GPL-2.0

//! `ovbd qemu-args`.

use std::{fmt::Write, path::Path, process::ExitCode};

use anyhow::Result;
use clap::Args;
use ovbd_layers::{
    info::{Info as Facts, StackInfo},
    layer_writer::DAX_ALIGNMENT,
    stack_or_zfile::StackOrZfile,
    units, Error,
};

use crate::{
    cli::Parents,
    names::{Layers, Need},
    report::Report,
};

const EXAMPLES: &str = "Example:

  eval qemu-system-x86_64 -kernel vmlinuz ... $(ovbd qemu-args base.dax next.dax)
      a guest in which \"ovbd up --dax disk\" finds the stack

The host has the files once in its page cache, however many guests there are. In the guest 1.6 % of their size is taken for the
descriptions of the pages. A file must not become shorter while a guest runs.";

/// Print the options with which QEMU gives the layers of a stack to a guest as memory.
///
/// Each layer, made with "ovbd build --dax", becomes a virtio-pmem device that the guest cannot change, whatever it does:
/// others may have it too. A stack that has no data for all of the device gets a device of zeros besides, which takes the
/// host's memory only where the guest touches it; it is the last one. What a shell would not take as it is is quoted.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct QemuArgs {
    /// Memory of the guest itself
    #[arg(long, value_name = "BYTES", default_value = "1G", value_parser = units::parse)]
    pub memory: u64,
    /// Parents.
    #[command(flatten)]
    pub parents: Parents,
    /// Layers.
    #[command(flatten)]
    pub layers: Layers,
}

impl QemuArgs {
    /// Prints them.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let opened = StackOrZfile::open(
            &self.layers.resolve(Need::Parts, report)?,
            self.parents.of_device(),
        )?;
        let text = match Facts::new(&opened) {
            Facts::Stack(stack) => arguments(&stack, self.memory)?,
            Facts::Zfile { path, .. } => {
                return Err(Error::new(&path, "holds no layer").into());
            }
        };
        report.print(&text)
    }
}

/// The options, one device in a line.
fn arguments(stack: &StackInfo, memory: u64) -> Result<String> {
    for layer in &stack.layers {
        let fail = |what: String| Err(Error::new(&layer.path, what).into());
        if layer.dax_page_bytes.is_none() {
            return fail(
                "has no direct access: \"ovbd build --dax\" makes layers that have".to_owned(),
            );
        }
        if layer.file_bytes % DAX_ALIGNMENT != 0 {
            return fail(format!(
                "has {} bytes, and memory for a guest is whole pages of 2 MiB: \"ovbd build --dax\" makes such layers",
                layer.file_bytes
            ));
        }
    }
    let top = stack
        .layers
        .last()
        .map_or(Path::new("-"), |layer| &layer.path);
    let Some(dax) = &stack.dax else {
        let what = "the pages of the stack are not those of its layers, so it has no direct access";
        return Err(Error::new(top, what).into());
    };
    let zeros = dax
        .needs_zeros
        .then(|| stack.virtual_bytes.next_multiple_of(DAX_ALIGNMENT));
    let devices: u64 = stack.layers.iter().map(|layer| layer.file_bytes).sum();
    // Room for aligning each device is part of it.
    let count = stack.layers.len() as u64 + 1;
    let most = memory + devices + zeros.unwrap_or(0) + count * DAX_ALIGNMENT;
    let mut text = format!("-m {}k,maxmem={}k\n", memory / 1024, most.div_ceil(1024));
    for (number, layer) in stack.layers.iter().enumerate() {
        let path = std::path::absolute(&layer.path)
            .map_err(|error| Error::io(&layer.path, "find", error))?;
        let Some(path) = path.to_str().filter(|path| !path.contains('\n')) else {
            return Err(Error::new(&layer.path, "has a name that no option can hold").into());
        };
        // QEMU has a comma in a value as two.
        let object = format!(
            "memory-backend-file,id=ovbd{number},share=on,readonly=on,size={},mem-path={}",
            layer.file_bytes,
            path.replace(',', ",,")
        );
        device(&mut text, &number.to_string(), &object)?;
    }
    if let Some(bytes) = zeros {
        let object = format!("memory-backend-ram,id=ovbdzeros,reserve=off,size={bytes}");
        device(&mut text, "zeros", &object)?;
    }
    Ok(text)
}

/// A device over an object of memory.
fn device(text: &mut String, name: &str, object: &str) -> Result<()> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=".contains(c);
    let object = match object.chars().all(is_plain) {
        true => object.into(),
        false => shlex::try_quote(object)?,
    };
    writeln!(
        text,
        "-object {object} -device virtio-pmem-pci,id=pmem-ovbd{name},memdev=ovbd{name}"
    )?;
    Ok(())
}
