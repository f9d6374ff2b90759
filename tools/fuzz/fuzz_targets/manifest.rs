// SPDX-License-Identifier: GPL-2.0

//! Documents and names of images, as a registry or a layout of somebody else gives them. Errors are fine, panics are bugs.

#![no_main]

use libfuzzer_sys::fuzz_target;
use ovbd_oci::{Config, Descriptor, Document, Image, MediaType, Platform, Reference};

fuzz_target!(|data: &[u8]| {
    for media_type in MediaType::ALL {
        match Document::parse(data, media_type, &"fuzz") {
            Ok(Document::Index(index)) => {
                let _ = index.select(&Platform::here(), &"fuzz");
            }
            Ok(Document::Manifest(manifest)) => {
                // What is written for it is the same document again.
                let bytes = manifest.to_bytes();
                let again = Document::parse(&bytes, media_type, &"fuzz");
                assert!(matches!(again, Ok(Document::Manifest(again)) if again == manifest));
                let descriptor = Descriptor::of(media_type.name(), &bytes);
                let config = data.to_vec();
                if let Ok(image) = Image::new(&"fuzz", descriptor, bytes, *manifest, config) {
                    assert!(image.layers().count() > 0);
                }
            }
            Err(_) => {}
        }
    }
    if let Ok(config) = Config::parse(data, &"fuzz") {
        assert!(Config::parse(&config.to_bytes(), &"fuzz").is_ok());
    }
    if let Some(reference) = std::str::from_utf8(data).ok().and_then(|text| text.parse::<Reference>().ok()) {
        assert_eq!(reference.to_string().parse::<Reference>().map(|again| again.to_string()).ok(), Some(reference.to_string()));
    }
});
