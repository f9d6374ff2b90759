// SPDX-License-Identifier: GPL-2.0

//! Whether a block device holds what a stack gives.

use std::sync::Mutex;

use crate::{
    direct::{Aligned, DirectFile},
    error::Result,
    pipeline::{self, Pool},
    report::Report,
    stack::{Stack, StackReader},
};

/// Bytes that are read and compared as one.
const PIECE_BYTES: u64 = 1 << 20;

/// The first byte in which `device` differs from `stack`, of as much as the smaller of both has. `check` is asked now and then
/// whether to go on.
///
/// # Errors
///
/// Those of reading, and of `check`.
pub fn first_difference(
    stack: &Stack,
    device: &DirectFile,
    report: &dyn Report,
    check: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Option<u64>> {
    let bytes = stack.virtual_bytes().min(device.bytes());
    report.expect(bytes);
    let readers: Pool<StackReader<'_>> = Pool::default();
    let buffers: Pool<(Aligned, Vec<u8>)> = Pool::default();
    let found = Mutex::new(None);
    pipeline::run(
        (0..bytes).step_by(PIECE_BYTES as usize),
        Ok,
        |start| {
            check()?;
            let count = PIECE_BYTES.min(bytes - start) as usize;
            let differs = buffers.with(
                || Ok((Aligned::default(), vec![0; PIECE_BYTES as usize])),
                |(there, wanted)| {
                    let (there, wanted) = (there.bytes(count), &mut wanted[..count]);
                    device.read(there, start)?;
                    readers.with(|| Ok(stack.reader()), |reader| reader.read(wanted, start))?;
                    if there == wanted {
                        return Ok(None);
                    }
                    Ok(there.iter().zip(&*wanted).position(|(a, b)| a != b))
                },
            )?;
            Ok((count, differs.map(|at| start + at as u64)))
        },
        |(count, differs)| {
            report.add(count as u64);
            if let (Some(at), Ok(mut first)) = (differs, found.lock()) {
                // They come in order.
                first.get_or_insert(at);
            }
            Ok(())
        },
    )?;
    Ok(found.into_inner().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{
        build::Options,
        delta::{self, Known, Pair, Range},
        layer::LayerPath,
        parents::Parents,
    };

    #[test]
    fn one_byte_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("raw");
        let mut content: Vec<u8> = (0..(3 << 20) + 4096_u32).map(|n| (n >> 9) as u8).collect();
        content[1 << 20..2 << 20].fill(0);
        fs::write(&path, &content).unwrap();
        let file = DirectFile::open(&path).unwrap();
        let ranges = [Range {
            start: 0,
            bytes: file.bytes(),
            known: Known::WasZero,
        }];
        let pair = Pair {
            new: &file,
            old: None,
            ranges: &ranges.into_iter().collect(),
            always: true,
        };
        let written =
            delta::write(pair, folder.path(), &Options::default(), &(), &|| Ok(())).unwrap();
        let layers = [LayerPath::Sealed(written.layers[0].0.clone())];
        let stack = Stack::open(&layers, Parents::Ignored).unwrap();
        let other = folder.path().join("other");
        let find = |content: &[u8], at: &Path| {
            fs::write(at, content).unwrap();
            let file = DirectFile::open(at).unwrap();
            first_difference(&stack, &file, &(), &|| Ok(())).unwrap()
        };
        assert_eq!(find(&content, &other), None);
        for at in [0, (1 << 20) + 77, (3 << 20) + 4095] {
            content[at] ^= 1;
            content[(3 << 20) + 4095] ^= u8::from(at != (3 << 20) + 4095);
            assert_eq!(find(&content, &other), Some(at as u64));
            content[at] ^= 1;
            content[(3 << 20) + 4095] ^= u8::from(at != (3 << 20) + 4095);
        }
        // What is behind the end of the stack is not its business.
        content.extend([1; 4096]);
        assert_eq!(find(&content, &other), None);
    }
}
