// SPDX-License-Identifier: GPL-2.0

//! The layout for direct access: every page of the device is a page of a layer, huge ones where nothing changed; zeros are
//! there and take no space; and what reads layers reads these.

mod common;

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use common::{change, content, layers, make, problems, raw_image, Random};
use ovbd_image::lsmt::SECTOR_BYTES;
use ovbd_layers::{
    build::{build, Options},
    info::{Info, StackInfo},
    layer_writer::DAX_ALIGNMENT,
    parents::Parents,
    stack::Stack,
    stack_or_zfile::StackOrZfile,
};
use tempfile::tempdir;

const BYTES: u64 = 37 * 4096 + (9 << 20);

fn dax() -> Options {
    Options {
        zfile: None,
        dax: true,
        ..Options::default()
    }
}

fn info(paths: &[&Path]) -> StackInfo {
    let opened = StackOrZfile::open(&layers(paths), Parents::UnlessAlone).unwrap();
    match Info::new(&opened) {
        Info::Stack(stack) => stack,
        Info::Zfile { .. } => panic!("a stack was opened"),
    }
}

/// Page and whether there must be zeros.
fn direct(paths: &[&Path]) -> Option<(u64, bool)> {
    let dax = info(paths).dax;
    dax.map(|dax| (dax.page_bytes, dax.needs_zeros))
}

#[test]
fn all_of_a_device_is_in_huge_pages() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    // With a hole at the start, one that is longer than a window, and one at the end.
    let mut image = vec![0; BYTES as usize];
    let mut random = Random::new(1);
    image[1 << 20..][..70_000].copy_from_slice(&random.bytes(70_000));
    image[6 << 20..][..5_000].copy_from_slice(&random.bytes(5_000));
    fs::write(&raw, &image).unwrap();
    make(&raw, &out, &dax());

    let stack = Stack::open(&layers(&[&out]), Parents::All).unwrap();
    let mut end = 0;
    for segment in stack.segments() {
        assert!(!segment.zeroed() && segment.start() == end);
        assert_eq!(segment.stored() - end, DAX_ALIGNMENT / SECTOR_BYTES);
        assert_eq!(end % (DAX_ALIGNMENT / SECTOR_BYTES), 0);
        end = segment.end();
    }
    assert_eq!(end, BYTES / SECTOR_BYTES);
    assert_eq!(direct(&[&out]), Some((DAX_ALIGNMENT, false)));
    assert_eq!(info(&[&out]).layers[0].dax_page_bytes, Some(DAX_ALIGNMENT));

    let blob = fs::read(&out).unwrap();
    assert_eq!(blob.len() as u64 % DAX_ALIGNMENT, 0);
    // The kernel looks for superblocks of its own there.
    assert!(blob[4096..DAX_ALIGNMENT as usize].iter().all(|b| *b == 0));
    let used = fs::metadata(&out).unwrap().blocks() * 512;
    assert!(used < 400_000, "{used} bytes on the disk");
    assert!(content(&layers(&[&out])).unwrap() == image);
    assert_eq!(problems(&layers(&[&out])), [""; 0]);
}

#[test]
fn a_difference_hides_what_is_below() {
    let folder = tempdir().unwrap();
    let [raw, next, base, top] =
        ["raw", "next", "base", "top"].map(|name| folder.path().join(name));
    raw_image(&raw, BYTES, 2);
    fs::copy(&raw, &next).unwrap();
    change(&next, 3);
    let changed = fs::read(&next).unwrap();
    assert_eq!(changed.len() as u64 % 4096, 0);
    make(&raw, &base, &dax());
    for most in [dax().max_segments, 4] {
        let options = Options {
            base: layers(&[&base]),
            max_segments: most,
            replace: true,
            ..dax()
        };
        make(&next, &top, &options);
        let found = direct(&[&base, &top]).unwrap();
        assert!(found.0 >= 4096 && !found.1, "{found:?}");
        assert!(content(&layers(&[&base, &top])).unwrap() == changed);
        assert_eq!(problems(&layers(&[&base, &top])), [""; 0]);
        let about = info(&[&base, &top]);
        assert_eq!(about.layers[1].zeroed_bytes, 0);
        assert_eq!(fs::metadata(&top).unwrap().len() % DAX_ALIGNMENT, 0);
    }
}

#[test]
fn of_other_layers_it_is_said() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    raw_image(&raw, BYTES, 4);
    let plain = Options {
        zfile: None,
        replace: true,
        ..Options::default()
    };
    make(&raw, &out, &plain);
    assert_eq!(direct(&[&out]), Some((4096, true)));
    for other in [
        Options {
            tar: true,
            ..plain.clone()
        },
        Options {
            replace: true,
            ..Options::default()
        },
    ] {
        make(&raw, &out, &other);
        assert_eq!(direct(&[&out]), None);
        assert_eq!(info(&[&out]).layers[0].dax_page_bytes, None);
    }
    // A device that does not end with a page.
    raw_image(&raw, BYTES + 512, 5);
    make(&raw, &out, &plain);
    assert_eq!(direct(&[&out]), None);
}

#[test]
fn what_it_is_not_for_is_refused() {
    let folder = tempdir().unwrap();
    let [raw, out] = ["raw", "out"].map(|name| folder.path().join(name));
    fs::write(&raw, vec![1; 4096 + 512]).unwrap();
    let refused = |options: &Options| {
        let error = build(&raw, &out, options, &()).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    assert!(refused(&dax()).contains("4608 bytes are not whole pages of 4096"));
    for (what, options) in [
        ("tar", Options { tar: true, ..dax() }),
        ("raw", Options { raw: true, ..dax() }),
        (
            "zfile",
            Options {
                dax: true,
                ..Options::default()
            },
        ),
    ] {
        let error = refused(&options);
        assert!(
            error.contains("only an uncompressed layer"),
            "{what}: {error}"
        );
    }
}
