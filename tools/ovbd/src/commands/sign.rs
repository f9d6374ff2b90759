// SPDX-License-Identifier: GPL-2.0

//! `ovbd sign`.

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Args, ValueHint};
use ovbd_devices::verity::{hex, Root};
use ovbd_layers::{parents::Parents, seal};
use ovbd_oci::{Descriptor, Error, Kind};

use crate::{
    cli::Threads, names::StoreOption, report::Report, seal_note::SealNote, signing::SignOption,
};

const EXAMPLES: &str = "Examples:

  ovbd sign --sign-key vm.key --certificate vm.pem reg.example:5000/vm/web:mon
  ovbd push reg.example:5000/vm/web:mon reg.example:5000/vm/web:mon
      signs an image of the store that was pushed with --seal, and sends what became of it";

/// Sign the root hash of a sealed image of the store.
///
/// All of the image is read first: what is signed is what it holds, whatever its manifest says. The signature is in the
/// manifest of the image, which has another digest then.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Sign {
    /// The store.
    #[command(flatten)]
    pub store: StoreOption,
    /// With what.
    #[command(flatten)]
    pub sign: SignOption,
    /// Threads.
    #[command(flatten)]
    pub threads: Threads,
    /// The image: a name in the store, or oci:DIR[:NAME]
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub name: OsString,
}

impl Sign {
    /// Signs the image.
    pub fn run(self, report: &Report) -> Result<ExitCode> {
        let shown = self.name.to_string_lossy();
        let refuse = |kind, what: &str| Error::new(kind, &shown, what);
        if self.sign.sign_key.is_none() {
            crate::cli::wrong_usage("sign", "--sign-key says with what".to_owned());
        }
        let found = self.store.find(&self.name)?;
        let found = found.ok_or_else(|| refuse(Kind::Missing, "no such image in the store"))?;
        let _guard = found.store.protect()?;
        let image = found.image()?;
        let Some(name) = &found.named.name else {
            let what =
                "has no name in its layout, which the signed image could get (ovbd tag gives one)";
            return Err(refuse(Kind::Refused, what).into());
        };
        if image.descriptor.digest != found.named.descriptor.digest {
            let what = "an index of images for several machines: sign the one of them that is meant, by its digest";
            return Err(refuse(Kind::Refused, what).into());
        }
        let layers = found.blobs()?;
        report.begin("hashing", 0);
        let sealed = self
            .threads
            .run(|| Ok(seal::check(&layers, Parents::All, report)?))?;
        let root = Root {
            digest: sealed.root.to_vec(),
            data_bytes: Some(sealed.data_bytes),
        };
        let mut manifest = image.manifest.clone();
        if let Some(said) = SealNote::read(&manifest, &shown)? {
            if said.root != root {
                let what = format!("says the root hash {}, and its own is {root}", said.root);
                return Err(refuse(Kind::Invalid, &what).into());
            }
        }
        let signature = self.sign.sign(&hex(&root.digest))?;
        SealNote { root, signature }.write(&mut manifest);
        let bytes = manifest.to_bytes();
        let descriptor = Descriptor::of(image.media_type().name(), &bytes);
        found.store.put(&descriptor, &bytes)?;
        if let Some(before) = found.store.set_name(name, &descriptor)? {
            report.note(format_args!("{name} was {before}"));
        }
        report.print(&format!("{name}  {}\n", descriptor.digest))
    }
}
