// SPDX-License-Identifier: GPL-2.0

//! Documents and names of images, as a registry or a layout of somebody else gives them, and damaged ones.

use ovbd_oci::{Config, Descriptor, Document, Image, MediaType, Platform, Reference};

use crate::random::Random;

/// Sound documents and names.
pub const SOUND: [&[u8]; 4] = [
    include_bytes!("../../fuzz/corpus/manifest/config.json"),
    include_bytes!("../../fuzz/corpus/manifest/index.json"),
    include_bytes!("../../fuzz/corpus/manifest/manifest.json"),
    include_bytes!("../../fuzz/corpus/manifest/reference"),
];

/// What programs that read JSON, digests and names stumble over.
const PIECES: [&str; 24] = [
    "null",
    "-1",
    "0",
    "1e400",
    "18446744073709551616",
    "9223372036854775808",
    "true",
    "\"\"",
    "{}",
    "[]",
    "[[[[[[[[",
    "\\u0000",
    "\\ud800",
    "\u{202e}",
    "\"layers\":",
    "\"manifests\":",
    "\"size\":",
    "sha256:",
    "sha512:",
    "../",
    "@",
    ":",
    "/",
    ",",
];

/// Reads `data` as everything that it may be.
///
/// # Panics
///
/// What was accepted is not what is written for it, or is not accepted again.
pub fn check(data: &[u8]) -> bool {
    let mut accepted = false;
    for media_type in MediaType::ALL {
        match Document::parse(data, media_type, &"fuzz") {
            Ok(Document::Index(index)) => {
                accepted = true;
                let _ = index.select(&Platform::here(), &"fuzz");
            }
            Ok(Document::Manifest(manifest)) => {
                accepted = true;
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
        accepted = true;
        assert!(Config::parse(&config.to_bytes(), &"fuzz").is_ok());
    }
    let reference = std::str::from_utf8(data)
        .ok()
        .and_then(|text| text.parse::<Reference>().ok());
    if let Some(reference) = reference {
        accepted = true;
        let text = reference.to_string();
        let again = text.parse::<Reference>().map(|again| again.to_string());
        assert_eq!(again.ok(), Some(text));
    }
    accepted
}

/// A sound document or name with some damage, always the same for the same number.
pub fn damaged(number: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let mut data = random.choose(&SOUND).to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len() + 1);
        let end = (at + random.below(40)).min(data.len());
        match random.below(6) {
            0 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            1 => drop(data.drain(at..end)),
            2 => drop(data.splice(at..at, data[at..end].to_vec())),
            3 => drop(data.splice(at..end, random.choose(&PIECES).bytes())),
            4 => {
                // A word of its own, so that what is around it stays JSON.
                let is_end = |byte: &u8| b",:[]{}".contains(byte);
                let end = data[at..]
                    .iter()
                    .position(is_end)
                    .map_or(data.len(), |end| at + end);
                let start = data[..at]
                    .iter()
                    .rposition(is_end)
                    .map_or(0, |start| start + 1);
                drop(data.splice(start..end, random.choose(&PIECES).bytes()));
            }
            _ => {
                let other = random.choose(&SOUND);
                let from = random.below(other.len());
                let to = (from + random.below(200)).min(other.len());
                drop(data.splice(at..end, other[from..to].iter().copied()));
            }
        }
    }
    data
}
