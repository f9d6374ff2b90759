// SPDX-License-Identifier: GPL-2.0

//! The self-test target: dm-linear again, with options that reach every corner of the
//! device-mapper abstractions.
//!
//! ```text
//! <start> <sectors> rust-linear <dev> <offset> [<#opts> <opts>]
//!
//! split <sectors>         accept only so many sectors of each bio
//! defer                   keep each bio and remap it later
//! queue                   pass each bio to a worker thread, which remaps it
//! zero                    reads are zeroes, the device is not read at all
//! fail <status>           end bios with an error: kill, ioerr, medium or drop
//! requeue <count>         have so many bios mapped again after they ended
//! io_opt <bytes>          set the optimal size of a request
//! max_io_len <sectors>    have bios split by device mapper
//! read <offset> <bytes>   read in the constructor; the checksum is in the status
//! readonly                refuse a table that is not read-only
//! dax                     claim the memory of the device and give direct access to it
//! ```
//!
//! The status is `<mapped> <ended> <per-bio total> <presuspend> <presuspend_undo> <postsuspend>
//! <preresume> <resume>`, then for each `read` its CRC-32C in hexadecimal or a negative error
//! number. Messages: `echo <words>`, `reset`, and `fail_resume`, which makes the next
//! resume fail.

#![deny(unsafe_code)]

#[allow(unsafe_code)]
#[path = "../../rust/bindings/mod.rs"]
mod bindings;
#[allow(unsafe_code)]
#[path = "../../rust/codec/mod.rs"]
mod codec;
#[allow(unsafe_code)]
#[path = "../../rust/device_mapper/mod.rs"]
mod device_mapper;
#[allow(unsafe_code)]
#[path = "../../rust/lower_read/mod.rs"]
mod lower_read;

use codec::crc32c;
use core::{
    fmt::{
        self,
        Write, //
    },
    ops::ControlFlow,
};
use device_mapper::{
    dm_err,
    module_dm,
    module_param,
    Args,
    Bio,
    BlkStatus,
    Constructor,
    CtrContext,
    CtrError,
    DaxDevice,
    DaxRange,
    DeferredBio,
    DeviceIterator,
    EndIo,
    EndedBio,
    Features,
    Mapped,
    Op,
    QueueLimits,
    StatusType,
    StatusWriter,
    Stop,
    Target,
    TargetDevice, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
};
use lower_read::{
    read_metadata_batch,
    ReadRequest, //
};

module_dm! {
    target: Linear,
    name: "dm_rust_linear",
    authors: ["dm-overlaybd maintainers"],
    description: "device-mapper self-test target",
    license: "GPL",
    params: {
        max_reads: u32 {
            default: 256,
            description: "Largest number of read options of a target",
        },
    },
}

/// How a bio is answered.
#[derive(Clone, Copy, PartialEq)]
enum Way {
    Remap,
    Defer,
    Queue,
    Zero,
    Kill,
    End(BlkStatus),
    Drop,
}

/// A range read by the constructor.
struct Read {
    offset: u64,
    len: usize,
    outcome: Result<u32>,
}

/// The options of a table line.
struct Options {
    split: Option<u32>,
    way: Way,
    requeue: u64,
    io_opt: Option<u32>,
    max_io_len: Option<u32>,
    reads: KVVec<Read>,
    read_only: bool,
    dax: bool,
}

#[derive(Default)]
struct Counters {
    mapped: Counter,
    ended: Counter,
    per_bio: Counter,
    presuspend: Counter,
    presuspend_undo: Counter,
    postsuspend: Counter,
    preresume: Counter,
    resume: Counter,
}

impl Counters {
    fn all(&self) -> [&Counter; 8] {
        [
            &self.mapped,
            &self.ended,
            &self.per_bio,
            &self.presuspend,
            &self.presuspend_undo,
            &self.postsuspend,
            &self.preresume,
            &self.resume,
        ]
    }
}

struct Counter(Atomic<u64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A linear mapping.
struct Linear {
    dev: TargetDevice,
    memory: Option<DaxDevice>,
    start: u64,
    options: Options,
    counters: Counters,
    requeue_left: Atomic<i64>,
    fail_resume: Atomic<bool>,
}

/// Set to one when a bio is mapped, and gone when it has ended.
#[derive(Default)]
struct PerBio {
    mapped: u64,
    owned: Option<KBox<u64>>,
}

impl Options {
    fn parse(mut args: Args<'_>) -> Result<Self, CtrError> {
        let mut options = Self {
            split: None,
            way: Way::Remap,
            requeue: 0,
            io_opt: None,
            max_io_len: None,
            reads: KVVec::new(),
            read_only: false,
            dax: false,
        };
        let max_reads = module_param(&module_parameters::max_reads) as usize;
        while let Some(opt) = args.next_opt() {
            match opt.to_bytes() {
                b"split" => options.split = Some(args.number(c"Invalid split size")?),
                b"defer" => options.way = Way::Defer,
                b"queue" => options.way = Way::Queue,
                b"zero" => options.way = Way::Zero,
                b"fail" => {
                    options.way = match args.next(c"Missing status")?.to_bytes() {
                        b"kill" => Way::Kill,
                        b"ioerr" => Way::End(BlkStatus::IOERR),
                        b"medium" => Way::End(BlkStatus::MEDIUM),
                        b"drop" => Way::Drop,
                        _ => return Err(CtrError::invalid(c"Invalid status")),
                    }
                }
                b"requeue" => options.requeue = args.number(c"Invalid requeue count")?,
                b"io_opt" => options.io_opt = Some(args.number(c"Invalid optimal I/O size")?),
                b"max_io_len" => {
                    options.max_io_len = Some(args.number(c"Invalid maximum I/O length")?)
                }
                b"read" => {
                    if options.reads.len() >= max_reads {
                        return Err(CtrError::invalid(c"Too many read options"));
                    }
                    let read = Read {
                        offset: args.number(c"Invalid read offset")?,
                        len: args.number::<u32>(c"Invalid read length")? as usize,
                        outcome: Ok(0),
                    };
                    options.reads.push(read, GFP_KERNEL)?;
                }
                b"readonly" => options.read_only = true,
                b"dax" => options.dax = true,
                _ => return Err(CtrError::invalid(c"Unrecognised optional argument")),
            }
        }
        Ok(options)
    }

    /// Returns the number of words that [`Options::write`] writes.
    fn words(&self) -> usize {
        let two = [
            self.split.is_some(),
            matches!(self.way, Way::Kill | Way::End(_) | Way::Drop),
            self.requeue != 0,
            self.io_opt.is_some(),
            self.max_io_len.is_some(),
        ];
        let one = [
            matches!(self.way, Way::Defer | Way::Queue | Way::Zero),
            self.read_only,
            self.dax,
        ];
        let count = |list: &[bool]| list.iter().filter(|set| **set).count();
        count(&one) + 2 * count(&two) + 3 * self.reads.len()
    }

    fn write(&self, out: &mut StatusWriter<'_>) -> fmt::Result {
        let words = self.words();
        if words != 0 {
            write!(out, " {words}")?;
        }
        if let Some(split) = self.split {
            write!(out, " split {split}")?;
        }
        match self.way {
            Way::Remap => {}
            Way::Defer => out.write_str(" defer")?,
            Way::Queue => out.write_str(" queue")?,
            Way::Zero => out.write_str(" zero")?,
            Way::Kill => out.write_str(" fail kill")?,
            Way::End(BlkStatus::MEDIUM) => out.write_str(" fail medium")?,
            Way::End(_) => out.write_str(" fail ioerr")?,
            Way::Drop => out.write_str(" fail drop")?,
        }
        if self.requeue != 0 {
            write!(out, " requeue {}", self.requeue)?;
        }
        if let Some(io_opt) = self.io_opt {
            write!(out, " io_opt {io_opt}")?;
        }
        if let Some(max_io_len) = self.max_io_len {
            write!(out, " max_io_len {max_io_len}")?;
        }
        for read in &self.reads {
            write!(out, " read {} {}", read.offset, read.len)?;
        }
        if self.read_only {
            out.write_str(" readonly")?;
        }
        if self.dax {
            out.write_str(" dax")?;
        }
        Ok(())
    }
}

impl Linear {
    fn parse(ctx: &mut Constructor<'_>, mut args: Args<'_>) -> Result<Self, CtrError> {
        let path = args.next(c"Missing device")?;
        let start = args.number(c"Invalid device sector")?;
        let mut options =
            Options::parse(args.group(1000, c"Invalid number of optional arguments")?)?;
        args.finish()?;

        if options.read_only {
            ctx.require_read_only()?;
        }
        let dev = match ctx.device(path) {
            Ok(dev) => dev,
            Err(err) => {
                dm_err!(Self, "{path}: cannot open: {err:?}");
                return Err(CtrError::new(err, c"Device lookup failed"));
            }
        };
        let memory = if options.dax {
            let memory = ctx.dax_device(&dev);
            Some(memory.context(c"Cannot have the memory of the device")?)
        } else {
            None
        };
        if let Some(max_io_len) = options.max_io_len {
            ctx.set_max_io_len(max_io_len.into())
                .context(c"Cannot set maximum I/O length")?;
        }
        if matches!(options.way, Way::Defer | Way::Queue) {
            ctx.set_accounts_remapped_io();
        }
        ctx.set_num_flush_bios(1);
        ctx.set_num_discard_bios(1);
        ctx.set_num_secure_erase_bios(1);
        ctx.set_num_write_zeroes_bios(1);

        Self::read(ctx, &dev, &mut options.reads)?;
        Ok(Self {
            dev,
            memory,
            start,
            requeue_left: Atomic::new(i64::try_from(options.requeue).unwrap_or(i64::MAX)),
            options,
            counters: Counters::default(),
            fail_resume: Atomic::new(false),
        })
    }

    fn read(
        ctx: &Constructor<'_>,
        dev: &TargetDevice,
        reads: &mut KVVec<Read>,
    ) -> Result<(), CtrError> {
        let mut bufs = KVVec::new();
        for read in &*reads {
            let buf = KVVec::from_elem(0xa5u8, read.len, GFP_KERNEL)?;
            bufs.push(buf, GFP_KERNEL)?;
        }
        let mut requests = KVVec::new();
        for (read, buf) in reads.iter().zip(&mut bufs) {
            requests.push(ReadRequest::new(dev, read.offset, buf), GFP_KERNEL)?;
        }
        read_metadata_batch(ctx, &mut requests).context(c"Cannot read")?;

        for (read, request) in reads.iter_mut().zip(&requests) {
            read.outcome = request.result().map(|()| 0);
        }
        drop(requests);
        for (read, buf) in reads.iter_mut().zip(&bufs) {
            read.outcome = read.outcome.map(|_| !crc32c(!0, buf));
        }
        Ok(())
    }

    fn sector(&self, bio_sector: u64) -> u64 {
        self.start.wrapping_add(bio_sector)
    }
}

#[vtable]
impl Target for Linear {
    const NAME: &'static CStr = c"rust-linear";
    const VERSION: [u32; 3] = [1, 2, 3];
    const FEATURES: Features = Features::NOWAIT;
    type PerBio = PerBio;

    fn new(ctx: &mut Constructor<'_>, args: Args<'_>) -> impl PinInit<Self, CtrError> {
        Self::parse(ctx, args)
    }

    fn map<'a>(&self, mut bio: Bio<'a, Self>) -> Mapped<'a> {
        self.counters.mapped.add(1);
        bio.per_bio().mapped += 1;
        if let Some(split) = self.options.split {
            let split = split.min(bio.sectors());
            if split != 0 && matches!(bio.op(), Op::Read | Op::Write) {
                if bio.accept_partial(split).is_err() {
                    return bio.kill();
                }
            }
        }
        let sector = self.sector(bio.sector());
        match self.options.way {
            Way::Remap => bio.remap(&self.dev, sector),
            Way::Defer => {
                let (mapped, deferred) = bio.defer();
                deferred.remap(&self.dev, sector);
                mapped
            }
            Way::Queue => bio.queue(),
            Way::Zero if bio.op() == Op::Read => bio.end_zeroed(),
            Way::Zero => bio.end(BlkStatus::OK),
            Way::Kill => bio.kill(),
            Way::End(status) => bio.end(status),
            Way::Drop => bio.defer().0,
        }
    }

    fn process(&self, mut bio: DeferredBio<Self>) {
        // Ownership of memory goes with the bio, and is given up when that ends.
        bio.per_bio().owned = KBox::new(1, GFP_NOWAIT).ok();
        let sector = self.sector(bio.sector());
        bio.remap(&self.dev, sector);
    }

    fn end_io(&self, bio: &mut EndedBio<'_, Self>) -> EndIo {
        self.counters.ended.add(1);
        self.counters.per_bio.add(bio.per_bio().mapped);
        if self.options.requeue != 0 && self.requeue_left.fetch_sub(1, Relaxed) > 0 {
            return EndIo::Requeue;
        }
        EndIo::Done
    }

    fn presuspend(&self) {
        self.counters.presuspend.add(1);
    }

    fn presuspend_undo(&self) {
        self.counters.presuspend_undo.add(1);
    }

    fn postsuspend(&self) {
        self.counters.postsuspend.add(1);
    }

    fn preresume(&self) -> Result {
        self.counters.preresume.add(1);
        if self.fail_resume.xchg(false, Relaxed) {
            return Err(EIO);
        }
        Ok(())
    }

    fn resume(&self) {
        self.counters.resume.add(1);
    }

    fn status(&self, kind: StatusType, out: &mut StatusWriter<'_>) -> fmt::Result {
        match kind {
            StatusType::Info => {
                for (i, counter) in self.counters.all().iter().enumerate() {
                    if i != 0 {
                        out.write_str(" ")?;
                    }
                    write!(out, "{}", counter.get())?;
                }
                for read in &self.options.reads {
                    match read.outcome {
                        Ok(crc) => write!(out, " {crc:08x}")?,
                        Err(err) => write!(out, " {}", err.to_errno())?,
                    }
                }
                Ok(())
            }
            StatusType::Table => {
                write!(out, "{} {}", self.dev.name(), self.start)?;
                self.options.write(out)
            }
            StatusType::Ima => write!(
                out,
                ",device_name={},start={};",
                self.dev.name(),
                self.start
            ),
        }
    }

    fn message(&self, mut args: Args<'_>, reply: &mut StatusWriter<'_>) -> Result {
        match args.next(c"Missing command")?.to_bytes() {
            b"echo" => {
                while let Some(word) = args.next_opt() {
                    if !reply.is_empty() {
                        reply.write_str(" ")?;
                    }
                    reply.write_fmt(fmt!("{}", word))?;
                }
            }
            b"reset" => {
                for counter in self.counters.all() {
                    counter.0.store(0, Relaxed);
                }
            }
            b"fail_resume" => self.fail_resume.store(true, Relaxed),
            _ => return Err(EINVAL),
        }
        args.finish()?;
        Ok(())
    }

    fn iterate_devices(&self, devices: &mut DeviceIterator<'_>) -> ControlFlow<Stop> {
        let len = devices.target_len();
        match self.memory {
            Some(_) => devices.visit(&self.dev, self.start, len),
            None => devices.visit_without_dax(&self.dev, self.start, len),
        }
    }

    fn direct_access(&self, sector: u64, sectors: u64) -> Result<DaxRange<'_>> {
        let memory = self.memory.as_ref().ok_or(ENXIO)?;
        Ok(DaxRange::new(memory, self.sector(sector), sectors))
    }

    fn io_hints(&self, limits: &mut QueueLimits) {
        if let Some(io_opt) = self.options.io_opt {
            limits.set_io_opt(io_opt);
        }
    }
}
