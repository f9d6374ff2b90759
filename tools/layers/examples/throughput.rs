// SPDX-License-Identifier: GPL-2.0

//! How fast `build` and `export` are beside the compression library alone.
//!
//! The library compresses, or checks and decompresses, the same blocks on the same number of threads, once
//! from and to memory and once from and to files, which is what `ovbd` must do as well. Arguments: MiB,
//! threads, rounds. Every figure is the best of all rounds, which alternate: once by the clock, once by the time
//! that the processors spent, which other programs disturb less.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use ovbd_image::zfile::{Algorithm, BLOCK_SEED};
use ovbd_layers::{
    build::{build, Options},
    codec::{Compressor, Decompressor},
    crc::crc32c,
    export,
    layer::LayerPath,
    output::Rules,
    parents::Parents,
    stack_or_zfile::StackOrZfile,
};
use rayon::prelude::*;
use rustix::time::{clock_gettime, ClockId};

const BLOCK: usize = 4096;

/// Blocks that a thread takes at a time.
const TASK: usize = 64;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = env::args().skip(1).map(|arg| arg.parse::<usize>());
    let mib = args.next().transpose()?.unwrap_or(512);
    let threads = args.next().transpose()?.unwrap_or(1);
    let rounds = args.next().transpose()?.unwrap_or(5);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()?;
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let path = |name: &str| folder.path().join(name);
    let data = sample(mib << 20);
    fs::write(path("raw"), &data)?;

    let rules = Rules {
        replace: true,
        ..Rules::default()
    };
    let [mut alone, mut copied, mut built] = [Time::MAX; 3];
    let [mut decoded, mut liblz4, mut piped, mut unpacked, mut exported] = [Time::MAX; 5];
    for _ in 0..rounds {
        let start = Stopwatch::start();
        let blocks = compress(&data);
        alone.improve(start.stop());

        let start = Stopwatch::start();
        let (input, output) = (File::open(path("raw"))?, File::create(path("copy"))?);
        compress_file(&input, &output, data.len());
        copied.improve(start.stop());

        let options = Options {
            replace: true,
            ..Options::default()
        };
        let start = Stopwatch::start();
        build(&path("raw"), &path("layer"), &options, &())?;
        built.improve(start.stop());

        let mut out = vec![1; data.len()];
        let start = Stopwatch::start();
        decompress(&blocks, &mut out, decode);
        decoded.improve(start.stop());
        assert!(out == data);

        out.fill(1);
        let start = Stopwatch::start();
        decompress(&blocks, &mut out, decode_with_liblz4);
        liblz4.improve(start.stop());
        assert!(out == data);

        let start = Stopwatch::start();
        let output = File::create(path("unpacked"))?;
        decompress_file(&blocks, &output);
        unpacked.improve(start.stop());

        let layers = [LayerPath::from(path("layer").as_path())];
        let start = Stopwatch::start();
        let image = StackOrZfile::open(&layers, Parents::Ignored)?;
        export::to_file(&image, &path("out"), rules, &())?;
        exported.improve(start.stop());

        let start = Stopwatch::start();
        let image = StackOrZfile::open(&layers, Parents::Ignored)?;
        let name = Path::new("nowhere");
        export::to_writer(&image, &mut std::io::sink(), name, &())?;
        piped.improve(start.stop());
    }
    let line = |what: &str, time: Time, reference: Time| {
        let rate = |time: Duration| mib as f64 / time.as_secs_f64();
        let share = |time: Duration, reference: Duration| 100.0 * rate(time) / rate(reference);
        println!(
            "{what:28} {:8.0} {:8.1} {:8.0} {:8.1}",
            rate(time.clock),
            share(time.clock, reference.clock),
            rate(time.processor),
            share(time.processor, reference.processor),
        );
    };
    println!("{mib} MiB, lz4 {BLOCK}, {threads} threads, best of {rounds}");
    println!(
        "{:28} {:>8} {:>8} {:>8} {:>8}",
        "", "MiB/s", "%", "per CPU", "%"
    );
    line("lz4 compression alone", alone, alone);
    line("the same with files", copied, alone);
    line("build", built, alone);
    line("CRC and lz4 decompression", decoded, decoded);
    line("the same with liblz4", liblz4, decoded);
    line("export to a pipe", piped, decoded);
    line("decompression into a file", unpacked, decoded);
    line("export to a file", exported, decoded);
    Ok(())
}

/// What something took.
#[derive(Clone, Copy)]
struct Time {
    clock: Duration,
    processor: Duration,
}

impl Time {
    const MAX: Self = Self {
        clock: Duration::MAX,
        processor: Duration::MAX,
    };

    fn improve(&mut self, other: Self) {
        self.clock = self.clock.min(other.clock);
        self.processor = self.processor.min(other.processor);
    }
}

/// Measures [`Time`].
struct Stopwatch(Time);

impl Stopwatch {
    fn now() -> Time {
        let read = |id| Duration::try_from(clock_gettime(id)).unwrap_or_default();
        Time {
            clock: read(ClockId::Monotonic),
            processor: read(ClockId::ProcessCPUTime),
        }
    }

    fn start() -> Self {
        Self(Self::now())
    }

    fn stop(self) -> Time {
        let now = Self::now();
        Time {
            clock: now.clock - self.0.clock,
            processor: now.processor - self.0.processor,
        }
    }
}

/// Half text, half noise: it compresses by about a third, as a root filesystem does.
fn sample(bytes: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let words: Vec<[u8; 8]> = (0..4096).map(|_| next().to_le_bytes()).collect();
    let mut data = Vec::with_capacity(bytes + 8);
    while data.len() < bytes {
        let random = next();
        match random & 3 {
            0 => data.extend_from_slice(&next().to_le_bytes()),
            _ => data.extend_from_slice(&words[(random >> 8) as usize % words.len()]),
        }
        // Words come in runs, as they do in code and text.
        if random & 12 == 0 && data.len() > 256 {
            let from = data.len() - 16 - (random >> 20) as usize % 200;
            data.extend_from_within(from..from + 12);
        }
    }
    data.truncate(bytes);
    data
}

/// Compressed blocks of one task, one after the other, and their lengths.
type Blocks = (Vec<u8>, Vec<usize>);

fn compress_task(task: &[u8]) -> Blocks {
    let mut lz4 = Compressor::new(Algorithm::Lz4, None).expect("lz4 needs nothing");
    let mut out = vec![0; task.len() + TASK * 64];
    let mut at = 0;
    let mut lengths = Vec::with_capacity(TASK);
    for block in task.chunks(BLOCK) {
        let n = lz4.compress(block, &mut out[at..]).expect("there is room");
        lengths.push(n);
        at += n;
    }
    out.truncate(at);
    (out, lengths)
}

fn compress(data: &[u8]) -> Vec<Blocks> {
    data.par_chunks(TASK * BLOCK).map(compress_task).collect()
}

fn compress_file(input: &File, output: &File, bytes: usize) {
    (0..bytes.div_ceil(TASK * BLOCK))
        .into_par_iter()
        .for_each(|task| {
            let at = task * TASK * BLOCK;
            let mut data = vec![0; (bytes - at).min(TASK * BLOCK)];
            input
                .read_exact_at(&mut data, at as u64)
                .expect("it is there");
            let (out, _) = compress_task(&data);
            output.write_all_at(&out, at as u64).expect("there is room");
        });
}

/// Decompresses the first so many bytes of some into a block.
type Decode = fn(&[u8], usize, &mut [u8]);

fn decode(readable: &[u8], len: usize, block: &mut [u8]) {
    Decompressor::default()
        .decompress(Algorithm::Lz4, readable, len, block)
        .expect("it was compressed just now");
}

fn decode_with_liblz4(readable: &[u8], len: usize, block: &mut [u8]) {
    let size = i32::try_from(block.len()).expect("a block is small");
    let decoded = lz4::block::decompress_to_buffer(&readable[..len], Some(size), block);
    assert_eq!(
        decoded.expect("it was compressed just now"),
        size.unsigned_abs() as usize
    );
}

fn decompress_task((data, lengths): &Blocks, out: &mut [u8], decode: Decode) {
    let mut at = 0;
    for (n, block) in lengths.iter().zip(out.chunks_mut(BLOCK)) {
        std::hint::black_box(crc32c(BLOCK_SEED, &data[at..at + n]));
        decode(&data[at..], *n, block);
        at += n;
    }
}

fn decompress(tasks: &[Blocks], out: &mut [u8], decode: Decode) {
    tasks
        .par_iter()
        .zip(out.par_chunks_mut(TASK * BLOCK))
        .for_each(|(task, out)| decompress_task(task, out, decode));
}

fn decompress_file(tasks: &[Blocks], output: &File) {
    tasks.par_iter().enumerate().for_each(|(number, task)| {
        let mut out = vec![0; task.1.len() * BLOCK];
        decompress_task(task, &mut out, decode);
        let at = (number * TASK * BLOCK) as u64;
        output.write_all_at(&out, at).expect("there is room");
    });
}
