//! A volume of the guest as a block device, with its journal entry.

use std::fs::File;
use std::sync::Arc;

use crate::disk::{self, Mapped};
use crate::error::{Code, Error, Result};
use crate::snapshot::{Device, Direct, Journal, Object};

/// Device names for the maps of one volume, each journaled before use.
struct JournalNames<'a> {
    journal: &'a Journal,
    stop: &'a dyn Fn() -> bool,
    given: Vec<Object>,
}

impl disk::Namer for JournalNames<'_> {
    fn next(&mut self) -> Result<disk::DmName> {
        let name = disk::DmName::new(self.journal.new_name())
            .ok_or_else(|| Error::new(Code::Internal, "a device name that is not valid"))?;
        let object = Object::Dm {
            name: name.to_string(),
        };
        self.journal.intend(&object)?;
        self.given.push(object);
        Ok(name)
    }

    fn scratch(&self) -> Result<File> {
        self.journal.scratch()
    }

    fn cancelled(&self) -> bool {
        (self.stop)()
    }
}

/// A mapped volume with its journal entry.
#[derive(Debug)]
pub(in crate::job) struct MappedVolume {
    pub(in crate::job) mapped: Mapped,
    devices: Vec<Object>,
    journal: Arc<Journal>,
}

impl MappedVolume {
    /// Maps a volume. `stop`: whether the job is to end.
    pub(in crate::job) fn map(
        volume: &disk::Volume,
        devices: &[Device],
        journal: &Arc<Journal>,
        stop: &dyn Fn() -> bool,
    ) -> Result<MappedVolume> {
        let mut names = JournalNames {
            journal,
            stop,
            given: Vec::new(),
        };
        let mapped = disk::map(volume, devices, &mut names);
        MappedVolume::known(mapped, names, journal)
    }

    /// Keeps everything else from a whole device. `None`: there is no device-mapper.
    fn hold(
        device: &Device,
        journal: &Arc<Journal>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Option<MappedVolume>> {
        let mut names = JournalNames {
            journal,
            stop,
            given: Vec::new(),
        };
        let mapped = disk::hold(device, &mut names);
        let mapped = mapped.transpose();
        mapped
            .map(|mapped| MappedVolume::known(mapped, names, journal))
            .transpose()
    }

    /// Keeps everything else from a disk: a map of a block device stands in for it from here on. An image is
    /// held by its locks.
    pub(in crate::job) fn hold_alone(
        disk: &mut Direct,
        journal: &Arc<Journal>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(Device, Option<MappedVolume>)> {
        let device = disk.device();
        if !disk.is_device() {
            return Ok((device, None));
        }
        disk.let_go()?;
        let held = MappedVolume::hold(&device, journal, stop)?.ok_or_else(|| {
            let text = format!("{}: device-mapper is needed", device.path.display());
            Error::new(Code::TargetRefused, text)
        })?;
        disk.is_alone()?;
        let device = Device {
            path: held.mapped.path().to_owned(),
            size: held.mapped.size(),
            read_only: false,
        };
        Ok((device, Some(held)))
    }

    fn known(
        mapped: Result<Mapped>,
        names: JournalNames<'_>,
        journal: &Arc<Journal>,
    ) -> Result<MappedVolume> {
        // A failed map may not have undone itself. Devices that exist when the journal is closed stay
        // in it for the next sweep.
        Ok(MappedVolume {
            mapped: mapped?,
            devices: names.given,
            journal: journal.clone(),
        })
    }

    pub(in crate::job) fn close(self) -> Result<()> {
        self.mapped.close()?;
        self.devices.iter().for_each(|dm| self.journal.gone(dm));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Namer;

    #[test]
    fn test_devices_of_a_map_that_failed_stay_in_the_journal() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(folder.path(), 7).unwrap());
        let mut names = JournalNames {
            journal: &journal,
            stop: &|| false,
            given: Vec::new(),
        };
        let name = names.next().unwrap().to_string();
        let failed = Err(Error::new(Code::MapFailed, "p1"));
        let error = MappedVolume::known(failed, names, &journal).unwrap_err();
        assert_eq!(error.code(), Code::MapFailed);
        // Its undo may have failed; only the kernel knows which devices exist.
        let lines: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .filter_map(|entry| std::fs::read_to_string(entry.unwrap().path()).ok())
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .filter(|line| line.contains(&name))
            .collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
    }
}
