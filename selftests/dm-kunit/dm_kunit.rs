// SPDX-License-Identifier: GPL-2.0

//! KUnit suites of what both targets share and what needs a kernel to run: the kernel's checksums and decompressors
//! behind their bindings, the parsing of table lines, and the formats and the index in the kernel's memory.
//!
//! The known vectors come from other programs: the reference lz4 and zstd, and RFC 3720 for the checksum.

// The suites are registered by statics that the macro makes.
#![allow(static_mut_refs, unsafe_op_in_unsafe_fn)]

use kernel::prelude::*;

#[path = "../../rust/bindings/mod.rs"]
mod bindings;
#[path = "../../rust/codec/mod.rs"]
mod codec;
#[path = "../../rust/device_mapper/mod.rs"]
mod device_mapper;
#[path = "../../rust/image/mod.rs"]
pub mod image;
#[path = "../../rust/lower_read/mod.rs"]
mod lower_read;

module! {
    type: Suites,
    name: "dm_kunit",
    authors: ["The dm-overlaybd developers"],
    description: "KUnit suites of dm-overlaybd and dm-zfile",
    license: "GPL",
}

struct Suites;

impl kernel::Module for Suites {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Self)
    }
}

#[kunit_tests(ovbd_codec)]
mod codec_tests {
    use super::{
        codec::{
            crc32c,
            Input,
            Lz4Decoder,
            ZstdDecompressor, //
        },
        lower_read::Destination, //
    };
    use kernel::prelude::*;

    const TEXT: &[u8] = b"device-mapper device-mapper device-mapper device-mapper\n";
    /// What `lz4 -9` makes of it, without the frame.
    const LZ4: &[u8] = &[
        0xef, 0x64, 0x65, 0x76, 0x69, 0x63, 0x65, 0x2d, 0x6d, 0x61, 0x70, 0x70, 0x65, 0x72, 0x20,
        0x0e, 0x00, 0x12, 0x50, 0x70, 0x70, 0x65, 0x72, 0x0a,
    ];
    /// 64 times "a": a literal, a match at distance 1, twelve literals.
    const LZ4_RUN: &[u8] = b"\x1f\x61\x01\x00\x20\xc0aaaaaaaaaaaa";
    /// What `zstd -19 --no-check` makes of it.
    const ZSTD: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x68, 0xad, 0x00, 0x00, 0x78, 0x64, 0x65, 0x76, 0x69, 0x63,
        0x65, 0x2d, 0x6d, 0x61, 0x70, 0x70, 0x65, 0x72, 0x20, 0x0a, 0x01, 0x00, 0x02, 0x9a, 0x4a,
    ];
    /// The same with `--check`.
    const ZSTD_CHECK: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x68, 0xad, 0x00, 0x00, 0x78, 0x64, 0x65, 0x76, 0x69, 0x63,
        0x65, 0x2d, 0x6d, 0x61, 0x70, 0x70, 0x65, 0x72, 0x20, 0x0a, 0x01, 0x00, 0x02, 0x9a, 0x4a,
        0x34, 0x1b, 0xa2, 0x6a,
    ];

    #[test]
    fn crc32c_is_castagnoli_without_inversion() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(0, &[0; 64]), 0);
        // The seed of the blocks of a ZFile, computed bit by bit.
        assert_eq!(crc32c(100_007, b"123456789"), 0x3c9b_d4e0);
        // In one piece or in two.
        assert_eq!(
            crc32c(crc32c(5, b"1234"), b"56789"),
            crc32c(5, b"123456789")
        );
    }

    fn lz4_with(decoder: Lz4Decoder, src: &[u8], len: usize) -> Result<KVec<u8>> {
        let mut out = KVec::from_elem(0xa5u8, len, GFP_KERNEL)?;
        let src = Input::new(src, src.len()).ok_or(EINVAL)?;
        decoder.decompress(src, &mut Destination::from(&mut out[..]))?;
        Ok(out)
    }

    /// What both decoders make of a block.
    fn lz4(src: &[u8], len: usize) -> Result<KVec<u8>> {
        let own = lz4_with(Lz4Decoder::Own, src, len);
        let kernel = lz4_with(Lz4Decoder::Kernel, src, len);
        assert_eq!(own.is_ok(), kernel.is_ok());
        if let (Ok(own), Ok(kernel)) = (&own, &kernel) {
            assert_eq!(own[..], kernel[..]);
        }
        own
    }

    #[test]
    fn lz4_known_vectors() -> Result {
        assert_eq!(&lz4(LZ4, TEXT.len())?[..], TEXT);
        assert_eq!(&lz4(LZ4_RUN, 64)?[..], &[b'a'; 64][..]);
        // A longer destination would not be filled.
        assert!(lz4(LZ4, 4096).is_err());
        Ok(())
    }

    #[test]
    fn lz4_damage_is_an_error() {
        // A destination that is too small, for every size below the right one.
        assert!((0..TEXT.len()).all(|len| lz4(LZ4, len).is_err()));
        // A match before the start of the output.
        assert!(lz4(b"\x1f\x61\x02\x00\x20\xc0aaaaaaaaaaaa", 64).is_err());
        // A literal that is longer than the input, and nothing at all.
        assert!(lz4(b"\xf0\xff\xff\xff", 4096).is_err());
        assert!(lz4(b"", 4096).is_err());
        // Cut off anywhere.
        assert!((0..LZ4.len()).all(|len| lz4(&LZ4[..len], TEXT.len()).is_err()));
    }

    #[test]
    fn zstd_known_vectors() -> Result {
        let mut zstd = ZstdDecompressor::new()?;
        for src in [ZSTD, ZSTD_CHECK] {
            let mut out = [0xa5; 128];
            let used = zstd.decompress(src, &mut Destination::from(&mut out[..]))?;
            assert_eq!(&out[..used], TEXT);
        }
        Ok(())
    }

    #[test]
    fn zstd_damage_is_an_error() -> Result {
        let mut zstd = ZstdDecompressor::new()?;
        let mut out = [0xa5; 128];
        for len in 1..ZSTD_CHECK.len() {
            assert!(zstd
                .decompress(&ZSTD_CHECK[..len], &mut Destination::from(&mut out[..]))
                .is_err());
        }
        for len in 0..TEXT.len() {
            assert!(zstd
                .decompress(ZSTD, &mut Destination::from(&mut out[..len]))
                .is_err());
        }
        let mut flipped = [0; 34];
        flipped.copy_from_slice(ZSTD_CHECK);
        flipped[31] ^= 1;
        assert!(zstd
            .decompress(&flipped, &mut Destination::from(&mut out[..]))
            .is_err());
        // It can still be used.
        let used = zstd.decompress(ZSTD, &mut Destination::from(&mut out[..]))?;
        assert_eq!(&out[..used], TEXT);
        Ok(())
    }
}

#[kunit_tests(ovbd_args)]
mod args {
    use super::device_mapper::{
        parse_number,
        Args,
        RawArg, //
    };
    use kernel::prelude::*;

    const MESSAGE: &CStr = c"message";

    #[test]
    fn numbers_are_strict() {
        assert_eq!(parse_number::<u64>(b"0"), Some(0));
        assert_eq!(parse_number::<u64>(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse_number::<u8>(b"255"), Some(255));
        assert_eq!(parse_number::<u8>(b"256"), None);
        let wrong: [&[u8]; 8] = [
            b"",
            b"-1",
            b"+1",
            b" 1",
            b"1 ",
            b"0x10",
            b"18446744073709551616",
            b"1.0",
        ];
        assert!(wrong.iter().all(|word| parse_number::<u64>(word).is_none()));
    }

    #[test]
    fn words_in_order() {
        let words = [c"/dev/loop0".into(), c"4096".into(), c"x".into()];
        let mut args = Args::new(&words);
        assert_eq!(args.len(), 3);
        assert!(args.finish().is_err());
        assert!(args
            .next(MESSAGE)
            .is_ok_and(|word| word.to_bytes() == b"/dev/loop0"));
        assert!(args
            .number::<u64>(MESSAGE)
            .is_ok_and(|number| number == 4096));
        assert!(args
            .number::<u64>(MESSAGE)
            .is_err_and(|e| e.message().to_bytes() == b"message"));
        assert!(args.finish().is_ok());
        assert!(args.next(MESSAGE).is_err());
    }

    #[test]
    fn groups() {
        let words: [RawArg<'_>; 4] = [c"2".into(), c"a".into(), c"b".into(), c"c".into()];
        let mut args = Args::new(&words);
        let mut group = args.clone();
        assert!(group.group(1, MESSAGE).is_err());
        assert!(args.group(2, MESSAGE).is_ok_and(|group| group.len() == 2));
        assert_eq!(args.len(), 1);
        // Nothing at all is an empty group, too few words are an error.
        assert!(Args::new(&[])
            .group(0, MESSAGE)
            .is_ok_and(|group| group.is_empty()));
        assert!(Args::new(&words[..2]).group(9, MESSAGE).is_err());
    }
}

#[kunit_tests(ovbd_image)]
mod formats {
    use super::image::{
        direct::{
            check,
            largest_page,
            Obstacle, //
        },
        index::{
            directory_len,
            Index,
            Source, //
        },
        lsmt::{
            Trailer,
            HEADER_BYTES, //
        },
        merge::{
            lanes_needed,
            merge,
            Lane, //
        },
        segment::{
            PackedSegment,
            Segment, //
        },
        zfile::{
            Geometry,
            HEADER_BYTES as ZFILE_BYTES, //
        },
    };
    use kernel::prelude::*;

    fn layer(number: u8, segments: &[(u64, u32, u64)]) -> Result<KVVec<PackedSegment>> {
        let mut list = KVVec::new();
        for (start, sectors, stored) in segments {
            let segment = Segment::new(*start, *sectors, *stored, number, false).ok_or(EINVAL)?;
            list.push(segment.into(), GFP_KERNEL)?;
        }
        Ok(list)
    }

    #[test]
    fn merge_and_lookup_in_kernel_memory() -> Result {
        let layers = [
            layer(0, &[(0, 100, 8), (200, 10, 108)])?,
            layer(1, &[(40, 20, 8)])?,
        ];
        let mut lanes = KVVec::from_elem(Lane::default(), lanes_needed(layers.len()), GFP_KERNEL)?;
        let mut merged = KVVec::new();
        merge(&layers, &mut lanes, |segment| {
            merged.push(segment, GFP_KERNEL)
        })
        .map_err(|_| EINVAL)?;
        assert_eq!(merged.len(), 4);
        let directory = KVVec::from_elem(0, directory_len(&merged), GFP_KERNEL)?;
        let index = Index::build(merged, directory).map_err(|_| EINVAL)?;
        assert_eq!(
            index.lookup(39).source(),
            Source::Data {
                layer: 0,
                stored: 47
            }
        );
        assert_eq!(
            index.lookup(40).source(),
            Source::Data {
                layer: 1,
                stored: 8
            }
        );
        assert_eq!(
            index.lookup(60).source(),
            Source::Data {
                layer: 0,
                stored: 68
            }
        );
        assert_eq!(index.lookup(100).source(), Source::Hole);
        assert_eq!(index.lookup(100).sectors(), 100);
        assert_eq!(index.lookup(u64::MAX - 1).source(), Source::Hole);
        Ok(())
    }

    /// What is said of a sector by a walk through all segments: where that ends, and the data.
    fn walk(segments: &[PackedSegment], sector: u64) -> (u64, Source) {
        match segments.iter().find(|segment| segment.end() > sector) {
            None => (u64::MAX, Source::Hole),
            Some(next) if next.start() > sector => (next.start(), Source::Hole),
            Some(own) => {
                let (layer, stored) = (own.layer(), own.stored() + sector - own.start());
                (own.end(), Source::Data { layer, stored })
            }
        }
    }

    #[test]
    fn few_segments_and_the_last_of_many_are_found() -> Result {
        // In even density; and each nearer to the next than the one before, so that many end in the last
        // bucket.
        let lengths: [fn(u32) -> u32; 2] = [|_| 7, |number| 1 << (13 - number)];
        for length in lengths {
            let mut segments = KVVec::new();
            let mut start = 3;
            for number in 0..14u32 {
                let sectors = length(number).min(100);
                let segment = Segment::new(start, sectors, 8 + start * 2, number as u8, false);
                segments.push(segment.ok_or(EINVAL)?.into(), GFP_KERNEL)?;
                // Every third is followed by another without a hole.
                let hole = if number % 3 == 0 { 0 } else { length(number) };
                start += u64::from(sectors + hole);
                let directory = KVVec::from_elem(0, directory_len(&segments), GFP_KERNEL)?;
                let index = Index::build(&segments[..], directory).map_err(|_| EINVAL)?;
                for sector in 0..start + 2 {
                    let found = index.lookup(sector);
                    let wanted = walk(&segments, sector);
                    assert_eq!(found.start(), sector);
                    assert_eq!((found.end(), found.source()), wanted);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn runs_join_what_is_in_order() -> Result {
        let mut segments = layer(0, &[(0, 8, 8), (8, 8, 16), (16, 8, 32), (32, 8, 40)])?;
        let zeroed = Segment::new(48, 3, 0, 1, true).ok_or(EINVAL)?;
        segments.push(zeroed.into(), GFP_KERNEL)?;
        let directory = KVVec::from_elem(0, directory_len(&segments), GFP_KERNEL)?;
        let index = Index::build(segments, directory).map_err(|_| EINVAL)?;
        // Two that follow each other in the blob; the third is elsewhere.
        assert_eq!(index.run(3, 100).end(), 16);
        assert_eq!(index.run(3, 2).end(), 8);
        // A hole between two that would follow each other.
        assert_eq!(index.run(16, 100).end(), 24);
        assert_eq!(index.run(24, 100).end(), 32);
        // Zeros, whoever says so, up to the end of all.
        assert_eq!(index.run(40, 9).end(), 51);
        assert_eq!(index.run(40, 100).end(), u64::MAX);
        Ok(())
    }

    #[test]
    fn pages_are_in_one_place() -> Result {
        let mut ends = [0];
        let dense = layer(0, &[(0, 8, 8), (8, 16, 24)])?;
        assert_eq!(check(&dense, 24, 8, &mut ends), Ok(None));
        assert_eq!(check(&dense, 32, 8, &mut [0]), Ok(Some(24)));
        // Only what is before the end counts.
        assert_eq!(check(&dense, 16, 8, &mut [0]), Ok(None));
        assert_eq!(largest_page(&dense, 24, 4096), 8);
        assert_eq!(
            largest_page(&layer(0, &[(0, 16, 16), (16, 8, 32)])?, 24, 16),
            16
        );
        let holes = layer(0, &[(8, 8, 8)])?;
        assert_eq!(check(&holes, 16, 8, &mut [0]), Ok(Some(0)));
        for (first, second) in [((0, 8, 16), (8, 8, 16)), ((0, 16, 8), (16, 8, 16))] {
            let twice = layer(0, &[first, second])?;
            let sector = u64::from(first.1);
            let found = Obstacle::OutOfOrder { layer: 0, sector };
            assert_eq!(check(&twice, 24, 8, &mut [0]), Err(found));
        }
        for odd in [(4, 8, 8), (8, 4, 8), (8, 8, 12)] {
            let sector = odd.0;
            let found = Obstacle::Unaligned { layer: 0, sector };
            assert_eq!(check(&layer(0, &[odd])?, 24, 8, &mut [0]), Err(found));
        }
        // A layer that nobody has a word for.
        assert!(check(&layer(1, &[(0, 8, 8)])?, 8, 8, &mut [0]).is_err());
        Ok(())
    }

    fn crc(seed: u32, bytes: &[u8]) -> u32 {
        super::codec::crc32c(seed, bytes)
    }

    #[test]
    fn garbage_is_refused() {
        for fill in [0, 0xff, 0x5a] {
            assert!(Trailer::parse(&[fill; HEADER_BYTES], 1 << 20).is_err());
            assert!(Geometry::parse_trailer(&[fill; ZFILE_BYTES], 1 << 20, crc).is_err());
        }
        assert!(Trailer::position(HEADER_BYTES as u64).is_err());
    }

    #[test]
    fn memory_that_cannot_be_had_is_an_error() {
        // What a hostile count could ask for, were it not limited before.
        assert!(KVVec::<PackedSegment>::with_capacity(1 << 44, GFP_KERNEL | __GFP_NOWARN).is_err());
        assert!(KVVec::<u32>::with_capacity(usize::MAX, GFP_KERNEL | __GFP_NOWARN).is_err());
    }
}

#[kunit_tests(ovbd_claims)]
mod claims {
    use super::device_mapper::claims::{
        has_claims,
        Claim,
        Claimed, //
    };
    use kernel::prelude::*;

    /// Ten pages of one memory.
    fn pages(first: u64, table: usize, mapped: usize) -> Result<Claim> {
        Claim::take(Claimed {
            memory: 1,
            first,
            pages: 10,
            table,
            mapped,
        })
    }

    fn errno(result: Result<Claim>) -> i32 {
        result.map_or_else(|error| error.to_errno(), |_| 0)
    }

    #[test]
    fn a_page_has_one_owner() -> Result {
        let first = pages(0, 1, 1)?;
        assert!(has_claims(1) && !has_claims(2));
        // Another mapped device, the same table, and the table that is to follow.
        assert_eq!(errno(pages(0, 2, 2)), EBUSY.to_errno());
        assert_eq!(errno(pages(9, 2, 2)), EBUSY.to_errno());
        assert_eq!(errno(pages(9, 1, 1)), EEXIST.to_errno());
        let next = pages(0, 3, 1)?;
        // What is beside it, and other memory.
        assert_eq!(errno(pages(10, 2, 2)), 0);
        let other = Claimed {
            memory: 2,
            first: 0,
            pages: u64::MAX,
            table: 2,
            mapped: 2,
        };
        assert_eq!(errno(Claim::take(other)), 0);
        // The first table is gone, and then the second.
        drop(first);
        assert_eq!(errno(pages(0, 2, 2)), EBUSY.to_errno());
        drop(next);
        assert_eq!(errno(pages(0, 2, 2)), 0);
        Ok(())
    }
}
