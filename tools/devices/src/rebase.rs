// SPDX-License-Identifier: GPL-2.0

//! Putting a generation over a longer stack: the layer that was made of the generations below takes their place.
//!
//! The device that a generation is written over gets the table of the longer stack, which reads the same. Nobody but the
//! generation uses it, and what is above is not suspended.

use std::path::Path;

use ovbd_image::lsmt::UuidText;
use ovbd_kernel::dm::Control;

use crate::{
    generations::{Chain, Generation},
    layer_place::{line, lone_layer_steps, LayerPlace},
    plan::{self, Step, Word},
    storage::Storage,
    up::{check_target, targets},
    Interrupt,
};
use ovbd_layers::{
    error::{Error, Result},
    layer::LayerPath,
    parents::is_same,
    report::Report,
};

/// Puts `generation` over the stack of `chain` with the layer `path` on top, whose UUID is known.
///
/// # Errors
///
/// The layer is not the one that was written, and the system's. All is then as it was.
pub fn rebase(
    control: &Control,
    name: &str,
    chain: &Chain,
    generation: &Generation,
    path: &Path,
    uuid: UuidText,
    report: &dyn Report,
) -> Result<()> {
    let place = LayerPlace::open(&LayerPath::Sealed(path.to_owned()))?;
    if !place.trailer.uuid.is_some_and(|found| is_same(found, uuid)) {
        return Err(Error::new(path, "another layer has that name by now"));
    }
    place.check_not_written(&Storage::look()?)?;
    let steps = steps(name, chain, generation, &place)?;
    for target in targets(&steps) {
        check_target(target)?;
    }
    // What was begun is completed.
    plan::run(control, &steps, &Interrupt::default(), report, || Ok(()))
}

fn steps(
    name: &str,
    chain: &Chain,
    generation: &Generation,
    place: &LayerPlace,
) -> Result<Vec<Step>> {
    let strange = || Error::new(&chain.stack.node(), "an unknown table");
    let table = chain.stack.target().ok_or_else(strange)?;
    let count = table.number(0).ok_or_else(strange)?;
    let pairs = 2 * usize::try_from(count).map_err(|_| strange())?;
    let (below, options) = table.words[1..]
        .split_at_checked(pairs)
        .ok_or_else(strange)?;
    let text = |word: &String| Word::from(word.as_str());
    let mut steps = Vec::new();
    let device = lone_layer_steps(name, count as usize, place, &mut steps);
    let mut words = vec!["overlaybd".into(), (count + 1).into()];
    words.extend(below.iter().map(text));
    words.push(device.into());
    words.push(place.original_bytes.unwrap_or(place.bytes).into());
    words.extend(options.iter().map(text));
    steps.push(Step::Reload {
        name: generation.lower.name.clone(),
        uuid: generation.lower.uuid.clone(),
        table: vec![line(chain.top.sectors(), words)],
    });
    Ok(steps)
}
