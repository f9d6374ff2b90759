// SPDX-License-Identifier: GPL-2.0

//! Direct access to the layers' memory (the option `dax`).
//!
//! Where the memory of a sector is follows from the index as it does for a bio. But who has the memory
//! does not ask again, and no page may be in two places, so the constructor refuses a stack of which
//! that is not certain.

use super::{
    device_mapper::{
        dm_err,
        Args,
        Constructor,
        CtrContext,
        CtrError,
        DaxDevice,
        DaxRange,
        TargetDevice,
        PAGE_SECTORS, //
    },
    image::{
        direct::{
            self,
            Obstacle, //
        },
        index::{
            Mapping,
            Source, //
        },
        segment::PackedSegment,
    },
    stack::Layer,
    Overlaybd,
};
use kernel::prelude::*;

/// The optional arguments of a table line.
pub(super) struct Options {
    /// `dax`: file systems may access the memory of the layers.
    dax: bool,
    /// `zeros <dev>`: the device with memory for what no layer has data for.
    zeros: Option<TargetDevice>,
}

impl Options {
    /// Parses what follows the layers, and opens the device.
    pub(super) fn parse(ctx: &mut Constructor<'_>, mut args: Args<'_>) -> Result<Self, CtrError> {
        let mut options = Self {
            dax: false,
            zeros: None,
        };
        let mut words = args.group(3, c"Unrecognised optional argument")?;
        args.finish()?;
        while let Some(word) = words.next_opt() {
            match word.to_bytes() {
                b"dax" if !options.dax => options.dax = true,
                b"zeros" if options.zeros.is_none() => {
                    let path = words.next(c"Missing device after zeros")?;
                    let device = ctx.device(path).context(c"Cannot open device of zeros")?;
                    options.zeros = Some(device);
                }
                b"dax" | b"zeros" => {
                    return Err(CtrError::invalid(c"Optional argument is there twice"))
                }
                _ => return Err(CtrError::invalid(c"Unrecognised optional argument")),
            }
        }
        if options.zeros.is_some() && !options.dax {
            return Err(CtrError::invalid(c"Option zeros is for option dax only"));
        }
        Ok(options)
    }
}

/// The memory of a stack.
///
/// # Invariants
///
/// No page of it is behind two pages of the target.
pub(super) struct Memory {
    /// That of each layer.
    layers: KVec<DaxDevice>,
    /// That for what no layer has data for: sector by sector that of the target.
    zeros: Option<(TargetDevice, DaxDevice)>,
}

impl Memory {
    /// Claims the memory that the options ask for. None where they do not ask.
    pub(super) fn claim(
        ctx: &mut Constructor<'_>,
        options: Options,
        layers: &[Layer],
        segments: &[PackedSegment],
    ) -> Result<Option<Self>, CtrError> {
        if !options.dax {
            ctx.require_no_dax()?;
            return Ok(None);
        }
        if (ctx.begin() | ctx.target_len()) % PAGE_SECTORS != 0 {
            return Err(CtrError::invalid(
                c"Direct access needs a target of whole pages",
            ));
        }
        check_segments(ctx, layers, segments, options.zeros.is_some())?;
        let mut claimed = KVec::with_capacity(layers.len(), GFP_KERNEL)?;
        for (number, layer) in layers.iter().enumerate() {
            let device = ctx
                .dax_device(&layer.device)
                .map_err(|errno| layer.fail(number, why_not(errno), errno))?;
            claimed.push(device, GFP_KERNEL)?;
        }
        let zeros = match options.zeros {
            Some(device) => Some(claim_zeros(ctx, device)?),
            None => None,
        };
        // INVARIANT: Segments are in pages of their own, and those of different layers, and the zeros,
        // in different memory, or there would be no claims.
        Ok(Some(Self {
            layers: claimed,
            zeros,
        }))
    }

    /// The device with the memory for what no layer has data for.
    pub(super) fn zeros(&self) -> Option<&TargetDevice> {
        self.zeros.as_ref().map(|(device, _)| device)
    }

    /// Where the memory of a run is.
    #[inline]
    pub(super) fn range(&self, run: Mapping) -> Result<DaxRange<'_>> {
        let (memory, sector) = match run.source() {
            Source::Data { layer, stored } => (self.layers.get(usize::from(layer)), stored),
            Source::Zero { .. } | Source::Hole => {
                (self.zeros.as_ref().map(|(_, memory)| memory), run.start())
            }
        };
        Ok(DaxRange::new(memory.ok_or(EIO)?, sector, run.sectors()))
    }
}

/// Refuses segments that are not whole pages, or perhaps in one place, and holes without zeros.
fn check_segments(
    ctx: &Constructor<'_>,
    layers: &[Layer],
    segments: &[PackedSegment],
    zeros: bool,
) -> Result<(), CtrError> {
    let mut ends = KVec::from_elem(0u64, layers.len(), GFP_KERNEL)?;
    let (layer, sector, message) =
        match direct::check(segments, ctx.target_len(), PAGE_SECTORS, &mut ends) {
            Ok(Some(hole)) if !zeros => {
                dm_err!(
                    Overlaybd,
                    "no layer has data for sector {hole}: direct access needs the option zeros"
                );
                return Err(CtrError::invalid(c"Direct access needs data everywhere"));
            }
            Ok(_) => return Ok(()),
            Err(Obstacle::Unaligned { layer, sector }) => {
                (layer, sector, c"Segments are not whole pages")
            }
            Err(Obstacle::OutOfOrder { layer, sector }) => {
                (layer, sector, c"Segments are not stored in order")
            }
        };
    let number = usize::from(layer);
    dm_err!(
        Overlaybd,
        "direct access is not possible at sector {sector}"
    );
    Err(match layers.get(number) {
        Some(layer) => layer.fail(number, message, EINVAL),
        None => CtrError::invalid(message),
    })
}

/// Claims the memory of the device of zeros.
fn claim_zeros(
    ctx: &mut Constructor<'_>,
    device: TargetDevice,
) -> Result<(TargetDevice, DaxDevice), CtrError> {
    let fail = |message, errno: Error| {
        dm_err!(
            Overlaybd,
            "zeros ({}): {message} ({errno:?})",
            device.name()
        );
        CtrError::new(errno, message)
    };
    let memory = ctx
        .dax_device(&device)
        .map_err(|errno| fail(why_not(errno), errno))?;
    if memory.pages() < ctx.target_len() / PAGE_SECTORS {
        return Err(fail(c"Device is smaller than the target", EINVAL));
    }
    Ok((device, memory))
}

/// Why memory could not be claimed.
fn why_not(errno: Error) -> &'static CStr {
    match errno {
        ENXIO => c"Device has no direct access",
        EBUSY => c"Device is used for direct access by another mapped device",
        EEXIST => c"Device is used for direct access twice",
        _ => c"Cannot use device for direct access",
    }
}
