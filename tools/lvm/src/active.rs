// SPDX-License-Identifier: GPL-2.0

//! Volumes that are active for as long as they are read.

use ovbd_layers::error::Result;

use crate::{
    program,
    undo::{Action, Undo},
    Volume,
};

/// A volume that is active. One that was not before is not afterwards either.
#[derive(Debug)]
pub struct Active {
    name: String,
    /// Its note, if it was activated for this.
    noted: Option<(Undo, u64)>,
}

impl Active {
    /// Activates a volume, also one that is skipped otherwise, as thin snapshots are.
    ///
    /// # Errors
    ///
    /// LVM's.
    pub fn new(volume: &Volume, undo: &Undo) -> Result<Self> {
        let name = volume.name.to_string();
        if volume.active {
            return Ok(Self { name, noted: None });
        }
        let number = undo.note(Action::Activated {
            name: name.clone(),
            uuid: volume.uuid.clone(),
        })?;
        let active = Self {
            name,
            noted: Some((undo.clone(), number)),
        };
        let words = ["--activate", "y", "--ignoreactivationskip", &active.name];
        program::run(&volume.name.path(), "lvchange", words)?;
        Ok(active)
    }

    /// Lets it be active from now on.
    pub fn keep(mut self) {
        if let Some((undo, number)) = self.noted.take() {
            undo.forget(number);
        }
    }

    /// Makes it as it was before.
    ///
    /// # Errors
    ///
    /// LVM's: somebody uses it meanwhile. It is noted still, and tried again later.
    pub fn end(mut self) -> Result<()> {
        self.deactivate()
    }

    fn deactivate(&mut self) -> Result<()> {
        let Some((undo, number)) = self.noted.take() else {
            return Ok(());
        };
        let words = ["--activate", "n", &self.name];
        program::run(self.name.as_ref(), "lvchange", words)?;
        undo.forget(number);
        Ok(())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        // There is another error to report, and the note stays.
        let _ = self.deactivate();
    }
}
