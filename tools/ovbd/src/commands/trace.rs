// SPDX-License-Identifier: GPL-2.0

//! `ovbd trace`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use ovbd_oci::{Descriptor, Error, Kind, NoProgress, Platform, Reference, Registry};

use crate::{
    remote::Transfer,
    report::Report,
    trace::{Trace, TRACE_TYPE},
};

const EXAMPLES: &str = "Examples:

  ovbd pull --lazy --up web --trace 60 reg.example:5000/vm/web:mon
  mount -o ro /dev/mapper/web /mnt; chroot /mnt /usr/sbin/nginx -t
  ovbd trace --push reg.example:5000/vm/web:mon web
      whoever pulls this image lazily fetches first what that has read";

/// Print or publish what was read first of a stack that was pulled with --lazy.
///
/// What is read after a layer is complete and read from its file is not known: --trace of ovbd pull puts that off. A trace has
/// chunks of 256 KiB of the layers as they are stored, in the order in which they were read first.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Show {
    /// Have it refer to this image, which is in the registry and has these layers, so that the next pull with --lazy fetches in
    /// this order
    #[arg(long, value_name = "REF")]
    pub push: Option<Reference>,
    /// How to send.
    #[command(flatten)]
    pub transfer: Transfer,
    /// The stack
    #[arg(value_name = "NAME")]
    pub name: String,
}

impl Show {
    /// Prints or sends the trace.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let trace = Trace::read(&self.name)?;
        let text = serde_json::to_vec(&trace)?;
        let Some(reference) = &self.push else {
            return report.print(&format!("{}\n", String::from_utf8_lossy(&text)));
        };
        let registry = Registry::to_push(reference, self.transfer.options());
        let image = registry.image(&Platform::here())?;
        let has = |digest: &ovbd_oci::Digest| {
            image
                .manifest
                .layers
                .iter()
                .any(|layer| layer.digest == *digest)
        };
        if !trace.layers.iter().all(has) {
            let what = format!("{} has other layers", self.name);
            return Err(Error::new(Kind::Refused, reference, what).into());
        }
        let part = Descriptor::of(TRACE_TYPE, &text);
        registry.send_blob(&part, &text, &[], None, &NoProgress)?;
        let artifact = registry.attach(TRACE_TYPE, &image.descriptor, vec![part])?;
        report.print(&format!("{}\n", artifact.digest))
    }
}
