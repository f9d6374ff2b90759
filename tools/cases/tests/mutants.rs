// SPDX-License-Identifier: GPL-2.0

//! What the guest tests and the fuzzers rely on: mutants can be made again, differ from their base, and are not
//! all stopped by a checksum.

use std::collections::HashSet;

use ovbd_cases::{base::built, mutate::mutant};
use ovbd_image::zfile::{trailer_position, Geometry, Header, HEADER_BYTES};

const COUNT: u64 = 200;

#[test]
fn the_same_again() {
    for base in built().expect("the bases can be built") {
        let again = built().expect("the bases can be built");
        let twin = again
            .iter()
            .find(|other| other.name == base.name)
            .expect("the same names");
        let mut different = HashSet::new();
        for number in 0..COUNT {
            let one = mutant(&base, number);
            let other = mutant(twin, number);
            assert!(one.layers == other.layers, "{}:{number} differs", base.name);
            different.insert(one.layers);
        }
        let unique = different.len() as u64;
        assert!(unique > COUNT * 3 / 4, "{}: {unique} of {COUNT}", base.name);
    }
}

/// Whether header and, where it counts, trailer are accepted.
fn opens(blob: &[u8]) -> bool {
    let bytes = blob.len() as u64;
    let crc = ovbd_layers::crc::crc32c;
    let Some(first) = blob.first_chunk::<HEADER_BYTES>() else {
        return false;
    };
    match Header::parse(first, bytes, crc) {
        Ok(Header::Final(_)) => true,
        Ok(Header::SeeTrailer) => trailer_position(bytes).is_ok_and(|at| {
            let last = blob[at as usize..].first_chunk().expect("a trailer");
            Geometry::parse_trailer(last, bytes, crc).is_ok()
        }),
        Err(_) => false,
    }
}

#[test]
fn checksums_do_not_stop_all() {
    let bases = built().expect("the bases can be built");
    let base = bases
        .iter()
        .find(|base| base.name == "built-raw-lz4-4k")
        .expect("this one");
    let sound = &base.layers[0].blob;
    let past = (0..COUNT)
        .map(|number| mutant(base, number).layers.remove(0))
        .filter(|blob| blob != sound && opens(blob))
        .count() as u64;
    assert!(
        (COUNT / 5..COUNT).contains(&past),
        "{past} of {COUNT} have right digests"
    );
}
