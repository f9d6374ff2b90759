// SPDX-License-Identifier: GPL-2.0

//! What thin_delta and thin_dump of thin-provisioning-tools print: XML, which in 0.9 and 1.x differs in attributes that
//! do not matter here.
//!
//! It is read as it comes, nothing of it is kept, and checked: ranges are in order, do not overlap and stay below 2^48 chunks.

use std::io::BufRead;

use quick_xml::{
    events::{BytesStart, Event},
    Reader,
};

/// Chunks that a pool can address at most.
const MAX_CHUNKS: u64 = 1 << 48;

/// How a range of chunks differs between two volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Both have the same chunks of the pool.
    Same,
    /// Both have chunks, and other ones.
    Different,
    /// Only the first has chunks: they were discarded since.
    LeftOnly,
    /// Only the second has chunks.
    RightOnly,
}

/// A range of chunks of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// The first.
    pub begin: u64,
    /// How many.
    pub length: u64,
}

/// Reads what thin_delta prints of the volumes with the numbers `left` and `right`: `take` gets the bytes of a chunk, and
/// every range that at least one of the volumes has, in order. Returns the bytes of a chunk, which are known without any.
///
/// # Errors
///
/// What is wrong with it; what was taken before is of no use then.
pub fn delta(
    input: impl BufRead,
    left: u32,
    right: u32,
    mut take: impl FnMut(u64, Difference, Chunks),
) -> Result<u64, String> {
    let mut order = Order::default();
    let mut seen = false;
    let chunk_bytes = elements(input, "superblock", "diff", |element, inside, chunk| {
        let kind = match element.name().as_ref() {
            b"diff" if !inside => {
                if (number(element, "left")?, number(element, "right")?)
                    != (u64::from(left), u64::from(right))
                {
                    return Err("thin_delta: of other volumes".to_owned());
                }
                seen = true;
                return Ok(());
            }
            b"same" if inside => Difference::Same,
            b"different" if inside => Difference::Different,
            b"left_only" if inside => Difference::LeftOnly,
            b"right_only" if inside => Difference::RightOnly,
            other => return Err(unknown(other)),
        };
        let chunks = order.next(number(element, "begin")?, number(element, "length")?)?;
        take(chunk, kind, chunks);
        Ok(())
    })?;
    match seen {
        true => Ok(chunk_bytes),
        false => Err("thin_delta: says nothing of the volumes".to_owned()),
    }
}

/// Reads what thin_dump prints of the volume with the number `id`: `take` gets the bytes of a chunk, and every range that
/// the volume has, in order. Returns the bytes of a chunk too.
///
/// # Errors
///
/// As [`delta`].
pub fn dump(
    input: impl BufRead,
    id: u32,
    mut take: impl FnMut(u64, Chunks),
) -> Result<u64, String> {
    let mut order = Order::default();
    let mut seen = false;
    let chunk_bytes = elements(input, "superblock", "device", |element, inside, chunk| {
        let (begin, length) = match element.name().as_ref() {
            b"device" if !inside => {
                if number(element, "dev_id")? != u64::from(id) {
                    return Err("thin_dump: of another volume".to_owned());
                }
                seen = true;
                return Ok(());
            }
            b"range_mapping" if inside => {
                (number(element, "origin_begin")?, number(element, "length")?)
            }
            b"single_mapping" if inside => (number(element, "origin_block")?, 1),
            other => return Err(unknown(other)),
        };
        take(chunk, order.next(begin, length)?);
        Ok(())
    })?;
    match seen {
        true => Ok(chunk_bytes),
        false => Err("thin_dump: says nothing of the volume".to_owned()),
    }
}

/// Ranges that must be in order.
#[derive(Default)]
struct Order {
    end: u64,
}

impl Order {
    fn next(&mut self, begin: u64, length: u64) -> Result<Chunks, String> {
        let end = begin.checked_add(length).filter(|end| *end <= MAX_CHUNKS);
        match end {
            Some(end) if begin >= self.end && length > 0 => {
                self.end = end;
                Ok(Chunks { begin, length })
            }
            _ => Err(format!(
                "the metadata of the pool: a range of {length} chunks at {begin} is out of order or out of bounds"
            )),
        }
    }
}

fn unknown(name: &[u8]) -> String {
    let name: String = String::from_utf8_lossy(name).chars().take(40).collect();
    format!("the metadata of the pool: an unknown element \"{name}\"")
}

/// Calls `work` with every element below `outer`, whether it is inside of `inner`, and the bytes of a chunk, which are returned too.
fn elements(
    input: impl BufRead,
    outer: &str,
    inner: &str,
    mut work: impl FnMut(&BytesStart<'_>, bool, u64) -> Result<(), String>,
) -> Result<u64, String> {
    let bad = |e: &dyn std::fmt::Display| format!("the metadata of the pool: {e}");
    let missing = || bad(&"the size of a chunk is missing");
    let mut reader = Reader::from_reader(input);
    reader.config_mut().check_end_names = true;
    let mut buffer = Vec::new();
    let mut chunk_bytes = None;
    let (mut inside, mut ended) = (false, false);
    loop {
        buffer.clear();
        let event = reader.read_event_into(&mut buffer).map_err(|e| bad(&e))?;
        match event {
            Event::Start(element) | Event::Empty(element)
                if element.name().as_ref() == outer.as_bytes() && chunk_bytes.is_none() =>
            {
                let sectors = number(&element, "data_block_size")?;
                // 64 KiB to 1 GiB, in steps of 64 KiB, as dm-thin has it.
                if sectors == 0 || sectors % 128 != 0 || sectors > 1 << 21 {
                    return Err(bad(&format!("chunks of {sectors} sectors")));
                }
                chunk_bytes = Some(sectors * 512);
            }
            Event::Start(element) => {
                work(&element, inside, chunk_bytes.ok_or_else(missing)?)?;
                inside = inside || element.name().as_ref() == inner.as_bytes();
            }
            Event::Empty(element) => work(&element, inside, chunk_bytes.ok_or_else(missing)?)?,
            Event::End(element) => {
                if element.name().as_ref() == inner.as_bytes() {
                    inside = false;
                }
                ended = ended || element.name().as_ref() == outer.as_bytes();
            }
            Event::Eof if ended => break,
            Event::Eof => return Err(bad(&"it ends too early")),
            Event::Text(_) | Event::Decl(_) | Event::Comment(_) => {}
            _ => return Err(bad(&"not the XML that was expected")),
        }
    }
    chunk_bytes.ok_or_else(missing)
}

/// The number in an attribute.
fn number(element: &BytesStart<'_>, name: &str) -> Result<u64, String> {
    let value = element.try_get_attribute(name).ok().flatten();
    value
        .and_then(|value| std::str::from_utf8(&value.value).ok()?.parse().ok())
        .ok_or_else(|| {
            format!("the metadata of the pool: an element without a number as its \"{name}\"")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a version of the programs says of one metadata snapshot that a kernel made: of a volume (2) and a newer one (3), the
    /// newer one, and an empty one (4).
    struct Version {
        delta: &'static [u8],
        dump: &'static [u8],
        empty: &'static [u8],
    }

    macro_rules! recorded {
        ($version:literal) => {
            Version {
                delta: include_bytes!(concat!("../tests/recorded/", $version, "/thin_delta.xml")),
                dump: include_bytes!(concat!("../tests/recorded/", $version, "/thin_dump.xml")),
                empty: include_bytes!(concat!("../tests/recorded/", $version, "/empty.xml")),
            }
        };
    }

    /// The last one in C++, and one in Rust.
    const VERSIONS: [Version; 2] = [recorded!("0.9.0"), recorded!("1.1.0")];

    type Found<T> = Result<(u64, Vec<T>), String>;

    fn delta(text: &[u8], left: u32, right: u32) -> Found<(Difference, Chunks)> {
        let mut all = Vec::new();
        let bytes = super::delta(text, left, right, |_, kind, chunks| {
            all.push((kind, chunks))
        })?;
        Ok((bytes, all))
    }

    fn dump(text: &[u8], id: u32) -> Found<Chunks> {
        let mut all = Vec::new();
        let bytes = super::dump(text, id, |_, chunks| all.push(chunks))?;
        Ok((bytes, all))
    }

    #[test]
    fn recorded_deltas() {
        let chunks = |begin, length| Chunks { begin, length };
        for Version { delta: text, .. } in VERSIONS {
            let (bytes, ranges) = delta(text, 2, 3).unwrap();
            assert_eq!(bytes, 64 << 10);
            let wanted = [
                (Difference::Same, chunks(0, 10)),
                (Difference::Different, chunks(10, 1)),
                (Difference::Same, chunks(11, 29)),
                (Difference::LeftOnly, chunks(100, 10)),
                (Difference::Same, chunks(110, 10)),
                (Difference::RightOnly, chunks(130, 10)),
            ];
            assert_eq!(ranges, wanted);
            assert!(delta(text, 3, 2).is_err());
        }
    }

    #[test]
    fn recorded_dumps() {
        let chunks = |begin, length| Chunks { begin, length };
        let all = [(0, 10), (10, 1), (11, 29), (110, 10), (130, 10)];
        let all = all.map(|(begin, length)| chunks(begin, length));
        for version in VERSIONS {
            assert_eq!(dump(version.dump, 3), Ok((64 << 10, all.to_vec())));
            assert_eq!(dump(version.empty, 4), Ok((64 << 10, Vec::new())));
            assert!(dump(version.dump, 2).is_err());
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        for Version { delta: text, .. } in VERSIONS {
            for cut in 0..text.trim_ascii_end().len() {
                assert!(delta(&text[..cut], 2, 3).is_err(), "{cut}");
            }
        }
    }

    fn small(ranges: &str) -> Found<(Difference, Chunks)> {
        let text = format!(
            "<superblock data_block_size=\"128\">\n<diff left=\"1\" right=\"2\">\n{ranges}</diff></superblock>"
        );
        delta(text.as_bytes(), 1, 2)
    }

    #[test]
    fn hostile_ranges_are_refused() {
        assert!(small("<same begin=\"0\" length=\"1\"/><same begin=\"1\" length=\"2\"/>").is_ok());
        for bad in [
            "<same begin=\"5\" length=\"1\"/><different begin=\"4\" length=\"1\"/>",
            "<same begin=\"0\" length=\"2\"/><different begin=\"1\" length=\"1\"/>",
            "<same begin=\"0\" length=\"0\"/>",
            "<same begin=\"18446744073709551615\" length=\"1\"/>",
            "<same begin=\"0\" length=\"281474976710657\"/>",
            "<same begin=\"0\"/>",
            "<same begin=\"-1\" length=\"1\"/>",
            "<same begin=\"0x1\" length=\"1\"/>",
            "<other begin=\"0\" length=\"1\"/>",
            "<same begin=\"0\" length=\"1\">",
            "<!DOCTYPE x [<!ENTITY a \"b\">]>",
        ] {
            assert!(small(bad).is_err(), "{bad}");
        }
        let chunks = |sectors: u64| {
            let text = format!(
                "<superblock data_block_size=\"{sectors}\"><diff left=\"1\" right=\"2\"></diff></superblock>"
            );
            delta(text.as_bytes(), 1, 2).map(|(bytes, _)| bytes)
        };
        assert_eq!(chunks(128), Ok(64 << 10));
        assert_eq!(chunks(1 << 21), Ok(1 << 30));
        assert!(chunks(0).is_err() && chunks(1).is_err() && chunks(1 << 22).is_err());
    }
}
