// SPDX-License-Identifier: GPL-2.0

//! Reads a file or device in an order that is always the same, and prints for each pass how long the reads took.
//!
//! The benchmark's workload. In a guest whose clock counts instructions the result must not depend on when a
//! program looks at the clock or on how exactly it prints the time, so the loop is nothing but `pread` and the
//! times are in nanoseconds. All reads have one size; the last, incomplete one of a file is left out.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use rustix::fs::{fadvise, Advice, OFlags};

/// A sleep, of any length, ends with a tick of the kernel's clock where its timers are no finer. A pass that starts
/// there is interrupted at the same reads each time.
const UNTIL_TICK: Duration = Duration::from_millis(1);

/// What a buffer for direct reads is aligned to.
const ALIGNMENT: usize = 4096;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Order {
    Sequential,
    Random,
}

/// Read FILE in a fixed order and print one JSON object for each pass.
#[derive(Parser)]
struct Arguments {
    /// A file or block device
    file: PathBuf,
    /// Bytes of each read
    #[arg(long, default_value_t = 4096)]
    size: usize,
    /// Byte at which the reads start; they follow each other without gaps
    #[arg(long, default_value_t = 0)]
    offset: u64,
    /// Bytes from the offset on that are read, instead of all
    #[arg(long)]
    length: Option<u64>,
    /// Order of the reads
    #[arg(long, value_enum, default_value = "random")]
    order: Order,
    /// Reads in a pass, instead of one for each place; more than that go round again
    #[arg(long)]
    count: Option<usize>,
    /// Passes
    #[arg(long, default_value_t = 2)]
    passes: usize,
    /// Threads, each of which makes all the reads in an order of its own
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Do not use the page cache
    #[arg(long)]
    direct: bool,
    /// Drop FILE from the page cache before every read, outside of the time
    #[arg(long, conflicts_with = "direct")]
    cold: bool,
    /// Leave what the page cache has of FILE there, which is otherwise dropped before a pass
    #[arg(long, conflicts_with_all = ["direct", "cold"])]
    warm: bool,
}

/// Memory of which a part is aligned, without unsafe code.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let memory = vec![1u8; len + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// The numbers below `count` in a random order that depends only on `seed`.
fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut numbers: Vec<usize> = (0..count).collect();
    for i in (1..count).rev() {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        numbers.swap(i, (random as usize * (i + 1)) >> 32);
    }
    numbers
}

/// The offsets that one thread reads, in order.
fn offsets(arguments: &Arguments, length: u64, job: u64) -> io::Result<Vec<u64>> {
    let available = length.saturating_sub(arguments.offset);
    let places = arguments
        .length
        .unwrap_or(available)
        .min(available)
        .checked_div(arguments.size as u64)
        .unwrap_or(0);
    if places == 0 {
        return Err(io::Error::other("not a single read of that size fits"));
    }
    let order = match arguments.order {
        Order::Sequential => (0..places as usize).collect(),
        Order::Random => shuffled(places as usize, job + 1),
    };
    let count = arguments.count.unwrap_or(order.len());
    Ok(order
        .into_iter()
        .cycle()
        .take(count)
        .map(|place| arguments.offset + place as u64 * arguments.size as u64)
        .collect())
}

/// Makes the reads, and returns how long they took.
fn pass(arguments: &Arguments, file: &File, offsets: &[u64]) -> io::Result<Duration> {
    let mut buffer = Buffer::new(arguments.size);
    let buffer = buffer.bytes();
    let mut total = Duration::ZERO;
    if arguments.cold {
        for offset in offsets {
            evict(file)?;
            let start = Instant::now();
            file.read_exact_at(buffer, *offset)?;
            total += start.elapsed();
        }
    } else {
        if !arguments.warm {
            evict(file)?;
        }
        // The first touch of the buffer's pages is not part of a read.
        buffer.fill(0);
        let start = Instant::now();
        for offset in offsets {
            file.read_exact_at(buffer, *offset)?;
        }
        total = start.elapsed();
    }
    Ok(total)
}

fn evict(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, Advice::DontNeed)?)
}

fn open(path: &Path, arguments: &Arguments) -> io::Result<File> {
    let flags = if arguments.direct {
        OFlags::DIRECT
    } else {
        OFlags::empty()
    };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    let advice = match arguments.order {
        Order::Sequential => Advice::Sequential,
        Order::Random => Advice::Random,
    };
    fadvise(&file, 0, None, advice)?;
    Ok(file)
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let mut seekable = File::open(&arguments.file)?;
    let length = io::Seek::seek(&mut seekable, io::SeekFrom::End(0))?;
    let work: Vec<_> = (0..arguments.jobs)
        .map(|job| {
            Ok((
                open(&arguments.file, arguments)?,
                offsets(arguments, length, job)?,
            ))
        })
        .collect::<io::Result<_>>()?;
    let reads: usize = work.iter().map(|(_, offsets)| offsets.len()).sum();
    for _ in 0..arguments.passes {
        thread::sleep(UNTIL_TICK);
        let time = if let [(file, offsets)] = &work[..] {
            pass(arguments, file, offsets)?
        } else {
            let start = Instant::now();
            thread::scope(|scope| {
                let jobs: Vec<_> = work
                    .iter()
                    .map(|(file, offsets)| scope.spawn(move || pass(arguments, file, offsets)))
                    .collect();
                jobs.into_iter().try_for_each(|job| {
                    job.join()
                        .map_err(|_| io::Error::other("a thread panicked"))?
                        .map(|_| ())
                })
            })?;
            start.elapsed()
        };
        let bytes = reads as u64 * arguments.size as u64;
        println!(
            "{}",
            serde_json::json!({"reads": reads, "bytes": bytes, "nanoseconds": time.as_nanos() as u64})
        );
    }
    Ok(())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovbd-reads: {}: {error}", arguments.file.display());
            ExitCode::FAILURE
        }
    }
}
