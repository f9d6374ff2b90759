// SPDX-License-Identifier: GPL-2.0

//! Which stores make a device, from the files alone.
//!
//! A commit that was interrupted leaves several stores: FILE and FILE.gen<n>. Each says which store or layer it was written
//! over, and which layer was made of what is below it. The newest store is the one that no other was written over. From it
//! the way leads down to the stack that is given: over a layer that was made where that is its topmost one, else over the
//! store below. What is not on this way is in a layer. A new store that holds nothing is right whether the device was put
//! over it or not.

use std::path::{Path, PathBuf};

use crate::record::{Below, Record};
use ovbd_layers::error::{name, Error, Result};

/// A store and what it says of itself.
pub type Found = (PathBuf, Record);

/// The stores that make a device over a stack whose topmost layer is `stack`, newest first, as positions in `found`.
///
/// # Errors
///
/// They do not tell: none or several are the newest, one is missing, or they were written over another stack, which
/// `any_stack` allows.
pub fn order(found: &[Found], stack: Below, any_stack: bool) -> Result<Vec<usize>> {
    let named = |record: &Record| {
        let mut others = found.iter();
        others.any(|(_, other)| other.below == Below::Store(record.own))
    };
    let mut newest = (0..found.len()).filter(|at| !named(&found[*at].1));
    let (Some(first), None) = (newest.next(), newest.next()) else {
        let (path, _) = &found[0];
        let others: Vec<String> = (0..found.len())
            .filter(|at| !named(&found[*at].1))
            .map(|at| name(&found[at].0).to_string())
            .collect();
        let what = match others.as_slice() {
            [] => "each store was written over another one".to_owned(),
            others => format!(
                "there are several stores that none was written over: {}",
                others.join(", ")
            ),
        };
        return Err(Error::new(path, what));
    };
    let mut order = vec![first];
    let (mut path, mut record) = (found[first].0.as_path(), &found[first].1);
    loop {
        let is_over = |layer: Below| {
            let unknown = layer == Below::Unknown || stack == Below::Unknown;
            layer == stack || unknown
        };
        if record
            .layer
            .is_some_and(|layer| stack == Below::Layer(layer))
        {
            return Ok(order);
        }
        let below = match record.below {
            Below::Store(below) => below,
            layer if any_stack || is_over(layer) => return Ok(order),
            layer => return Err(elsewhere(path, layer, record)),
        };
        let Some(next) = found.iter().position(|(_, other)| other.own == below) else {
            if any_stack && record.layer.is_some() {
                return Ok(order);
            }
            return Err(elsewhere(path, Below::Store(below), record));
        };
        // Numbers grow, so this ends.
        if found[next].1.generation >= record.generation {
            let what = "says that it was written over a later generation";
            return Err(Error::new(path, what));
        }
        order.push(next);
        (path, record) = (found[next].0.as_path(), &found[next].1);
    }
}

fn elsewhere(path: &Path, below: Below, record: &Record) -> Error {
    let what = match (below, record.layer) {
        (_, Some(layer)) | (Below::Layer(layer), None) => format!("the layer {layer}"),
        (Below::Store(store), None) => format!("the store {store}, which is missing"),
        (Below::Unknown, None) => "a layer without a UUID".to_owned(),
    };
    let what = format!(
        "written over {what}, and not over the topmost layer that is given (--ignore-parents goes on)"
    );
    Error::new(path, what)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    /// A store of generation and UUID `own`.
    fn store(own: u32, below: Below, layer: Option<u128>) -> Found {
        let record = Record {
            own: Uuid::from_u128(own.into()),
            generation: own,
            sectors: 8,
            below,
            layer: layer.map(Uuid::from_u128),
            folding: false,
        };
        (format!("store{own}").into(), record)
    }

    fn over_store(own: u32) -> Below {
        Below::Store(Uuid::from_u128(own.into()))
    }

    fn over_layer(layer: u128) -> Below {
        Below::Layer(Uuid::from_u128(layer))
    }

    /// The generations that make the device over a stack with `layer` on top, or the error.
    fn made(found: &[Found], layer: u128) -> std::result::Result<Vec<u32>, String> {
        let order = order(found, over_layer(layer), false).map_err(|e| e.to_string())?;
        Ok(order.into_iter().map(|at| found[at].1.generation).collect())
    }

    #[test]
    fn every_moment_of_a_commit() {
        const BASE: u128 = 100;
        const NEXT: u128 = 101;
        let old = store(3, over_layer(BASE), None);
        // A new store was made, whether the device is over it or not.
        let begun = store(4, over_store(3), None);
        assert_eq!(made(&[old.clone(), begun.clone()], BASE), Ok(vec![4, 3]));
        assert_eq!(made(&[begun, old.clone()], BASE), Ok(vec![4, 3]));
        // The layer is noted, and has its name or not; the old store is there still.
        let noted = store(4, over_store(3), Some(NEXT));
        let both = [old.clone(), noted.clone()];
        assert_eq!(made(&both, NEXT), Ok(vec![4]));
        assert_eq!(made(&both, BASE), Ok(vec![4, 3]));
        // The old one is gone.
        assert_eq!(made(&[noted.clone()], NEXT), Ok(vec![4]));
        let error = made(&[noted.clone()], BASE).unwrap_err();
        assert!(
            error.contains(&format!("the layer {}", Uuid::from_u128(NEXT))),
            "{error}"
        );
        // The next commit began.
        let third = store(5, over_store(4), None);
        let all = [old.clone(), noted.clone(), third.clone()];
        assert_eq!(made(&all, NEXT), Ok(vec![5, 4]));
        assert_eq!(made(&all, BASE), Ok(vec![5, 4, 3]));
        assert_eq!(made(&[noted, third], NEXT), Ok(vec![5, 4]));
        assert_eq!(made(&[old], BASE), Ok(vec![3]));
    }

    #[test]
    fn what_does_not_tell_is_refused() {
        let one = store(1, over_layer(100), None);
        let two = store(2, over_layer(100), None);
        assert!(made(&[one.clone(), two], 100)
            .unwrap_err()
            .contains("several"));
        let circle = [store(1, over_store(2), None), store(2, over_store(1), None)];
        assert!(made(&circle, 100).unwrap_err().contains("each store"));
        let missing = [store(3, over_store(2), None)];
        assert!(made(&missing, 100).unwrap_err().contains("missing"));
        let later = [
            store(1, over_store(2), None),
            store(2, over_layer(100), None),
        ];
        assert!(made(&later, 100).unwrap_err().contains("later generation"));
        assert!(made(&[one.clone()], 101)
            .unwrap_err()
            .contains("--ignore-parents"));
        let any = order(&[one.clone()], over_layer(101), true).unwrap();
        assert_eq!(any, [0]);
        // Without UUIDs nothing is known, as before there were records.
        assert_eq!(order(&[one], Below::Unknown, false).unwrap(), [0]);
    }
}
