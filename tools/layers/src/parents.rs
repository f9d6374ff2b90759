// SPDX-License-Identifier: GPL-2.0

//! Which layer lies on which: the check that a stack is in the order in which its layers were made.
//!
//! Every layer that was made on another one records its UUID. A layer on another than that one reads as a mixture of
//! two images, which no checksum shows. Layers that record nothing, as many of the original do, are not checked.

use std::path::Path;

use ovbd_image::lsmt::UuidText;

use crate::{
    error::{name, Error, Result},
    layer::Layer,
};

/// What one layer says of itself and of the one below.
#[derive(Clone, Copy, Debug)]
pub struct Ancestry<'a> {
    /// The layer's file.
    pub path: &'a Path,
    /// UUID of the layer; nil is none.
    pub uuid: Option<UuidText>,
    /// UUID of the layer below; nil is none.
    pub parent: Option<UuidText>,
}

impl<'a> Ancestry<'a> {
    /// That of an open layer.
    pub fn of(layer: &'a Layer) -> Self {
        Self {
            path: layer.path(),
            uuid: layer.uuid(),
            parent: layer.parent_uuid(),
        }
    }

    fn is(&self, wanted: UuidText) -> bool {
        known(self.uuid).is_some_and(|uuid| is_same(uuid, wanted))
    }
}

/// What is demanded of the parents of a stack's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parents {
    /// The layers become a device or an image: each lies on its parent, and nothing is missing below.
    All,
    /// As [`Parents::All`], but one layer alone is only looked at, whatever its parent.
    UnlessAlone,
    /// The layers are part of a stack: each lies on its parent, and that of the lowest may be missing.
    Neighbours,
    /// Nothing: the user knows better.
    Ignored,
}

/// Refuses a stack, bottom first, in which the parent of a layer is not the layer below.
///
/// # Errors
///
/// That one, with the name of the layer on which it belongs if that is in the stack, and of the option that goes on.
pub fn check(layers: &[Ancestry<'_>], parents: Parents) -> Result<()> {
    let alone = layers.len() == 1 && parents == Parents::UnlessAlone;
    if alone || parents == Parents::Ignored {
        return Ok(());
    }
    for (number, layer) in layers.iter().enumerate() {
        let Some(wanted) = known(layer.parent) else {
            continue;
        };
        let below = number.checked_sub(1).and_then(|below| layers.get(below));
        if below.is_none() && parents == Parents::Neighbours {
            continue;
        }
        let what = match below {
            None => "not a base layer".to_owned(),
            // Without a UUID below there is nothing to compare.
            Some(below) if known(below.uuid).is_none() || below.is(wanted) => continue,
            Some(below) => format!("not the one for {}", name(below.path)),
        };
        let belongs = match layers.iter().find(|other| other.is(wanted)) {
            Some(other) => format!("it belongs on {}", name(other.path)),
            None => format!("its parent is {}", wanted.as_str()),
        };
        let what = format!("{what}: {belongs} (--ignore-parents goes on)");
        return Err(Error::new(layer.path, what));
    }
    Ok(())
}

/// Whether two UUIDs are the same, whatever their case.
pub fn is_same(one: UuidText, other: UuidText) -> bool {
    one.as_str().eq_ignore_ascii_case(other.as_str())
}

fn known(uuid: Option<UuidText>) -> Option<UuidText> {
    uuid.filter(|uuid| !uuid.is_nil())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stack of layers given as UUID and parent; each is named by its number.
    fn checked(layers: &[(u8, u8)], parents: Parents) -> Option<String> {
        let uuid =
            |n: u8| UuidText::new(format!("{n:08x}-0000-0000-0000-00000000000{n:x}").as_bytes());
        let names: Vec<String> = (0..layers.len()).map(|n| format!("layer{n}")).collect();
        let layers: Vec<_> = layers
            .iter()
            .zip(&names)
            .map(|((own, parent), name)| Ancestry {
                path: Path::new(name),
                uuid: uuid(*own),
                parent: uuid(*parent),
            })
            .collect();
        check(&layers, parents).err().map(|e| e.to_string())
    }

    #[test]
    fn orders() {
        // 0 is the nil UUID.
        for right in [
            &[][..],
            &[(1, 0)],
            &[(0, 0), (0, 0)],
            &[(1, 0), (2, 1), (3, 2)],
            &[(0, 0), (2, 1)],
            &[(1, 0), (0, 0), (3, 1)],
        ] {
            assert_eq!(checked(right, Parents::All), None, "{right:?}");
        }
        for (wrong, error) in [
            (
                &[(1, 0), (3, 2)][..],
                "layer1: not the one for layer0: its parent is 00000002-",
            ),
            (
                &[(1, 0), (3, 2), (2, 1)],
                "layer1: not the one for layer0: it belongs on layer2 ",
            ),
            (
                &[(2, 1), (1, 0)],
                "layer0: not a base layer: it belongs on layer1 ",
            ),
            (
                &[(2, 1)],
                "layer0: not a base layer: its parent is 00000001-",
            ),
        ] {
            let found = checked(wrong, Parents::All).unwrap();
            assert!(found.starts_with(error), "{found}");
            assert!(found.ends_with("(--ignore-parents goes on)"), "{found}");
        }
        assert_eq!(checked(&[(2, 1)], Parents::UnlessAlone), None);
        assert!(checked(&[(2, 1), (3, 2)], Parents::UnlessAlone).is_some());
        assert_eq!(checked(&[(3, 2), (2, 1)], Parents::Ignored), None);
    }

    #[test]
    fn the_case_of_a_uuid_does_not_matter() {
        let upper = UuidText::new(b"ABCDEF00-0000-0000-0000-000000000001").unwrap();
        let lower = UuidText::new(b"abcdef00-0000-0000-0000-000000000001").unwrap();
        assert!(is_same(upper, lower));
    }
}
