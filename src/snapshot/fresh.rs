//! A new volume of the host, for a guest's disk that is made again.
//!
//! It carries the tag of the job that makes it until it is complete. A sweep removes it as long as it does.

use std::sync::Arc;

use super::command::Program;
use super::journal::{Journal, Object};
use super::lvm::{self, lvm};
use crate::error::{Code, Error, Result};
use crate::hostdev::lvname::LvName;
use crate::point::{Point, pass, reach};

/// A volume that is not complete yet. Dropped before [`FreshVolume::keep`], it is removed.
#[derive(Debug)]
pub struct FreshVolume {
    name: LvName,
    tag: String,
    journal: Arc<Journal>,
    object: Object,
    done: bool,
}

impl FreshVolume {
    /// Creates a volume of at least `size` bytes, in a thin pool of its group or from free extents.
    pub fn create(
        name: &LvName,
        pool: Option<&str>,
        size: u64,
        journal: &Arc<Journal>,
    ) -> Result<FreshVolume> {
        let exists = lvm::list_in(&[name.vg()])?
            .iter()
            .any(|lv| lv.name == *name);
        if exists {
            return Err(Error::new(Code::BadTarget, format!("{name}: it exists")));
        }
        let tag = journal.tag().to_lvm_tag();
        let object = Object::Fresh {
            vg: name.vg().clone(),
            name: name.lv().to_owned(),
        };
        journal.intend(&object)?;
        let volume = FreshVolume {
            name: name.clone(),
            tag,
            journal: journal.clone(),
            object,
            done: false,
        };
        let call = lvm(Program::Lvcreate)
            .args(["--yes", "--wipesignatures", "y"])
            .args(["--name", name.lv(), "--addtag", &volume.tag]);
        let size = size.next_multiple_of(512);
        let call = match pool {
            Some(pool) => call
                .args(["--virtualsize", &format!("{size}b")])
                .args(["--thinpool", pool]),
            None => call.args(["--zero", "y", "--size", &format!("{size}b")]),
        };
        let injected = |errno| Error::new(Code::CommandFailed, "lvcreate").because(errno);
        let created = reach(Point::RebuildLvcreate)
            .map_err(injected)
            .and_then(|()| call.arg(name.vg().as_str()).run());
        created.map_err(|error| {
            Error::new(Code::RebuildFailed, format!("{name}: creating it")).because(error)
        })?;
        pass(Point::RebuildLvcreated);
        Ok(volume)
    }

    /// The volume is complete: it stays.
    pub fn keep(mut self) -> Result<()> {
        let call = lvm(Program::Lvchange).args(["--deltag", &self.tag, &self.name.to_string()]);
        call.run().map_err(|error| {
            let text = format!("{}: taking its tag off", self.name);
            Error::new(Code::RebuildFailed, text).because(error)
        })?;
        self.done = true;
        pass(Point::RebuildKept);
        self.journal.gone(&self.object);
        Ok(())
    }

    /// Removes the volume.
    pub fn remove(mut self) -> Result<()> {
        self.take_away()
    }

    fn take_away(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(());
        }
        remove(&self.name, &self.tag).map(drop)?;
        self.journal.gone(&self.object);
        Ok(())
    }
}

impl Drop for FreshVolume {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            log::error!("{}", error.report());
        }
    }
}

/// Removes the volume of this name if it carries the tag of the job that was making it. Returns whether there
/// was one.
pub(super) fn remove(name: &LvName, tag: &str) -> Result<bool> {
    let of_job = |lv: &lvm::LvInfo| lv.name == *name && lv.tags.iter().any(|one| one == tag);
    if !lvm::list_in(&[name.vg()])?.iter().any(of_job) {
        return Ok(false);
    }
    // The selection again: the volume may be another one by now.
    let select = format!("lv_name=\"{}\" && lv_tags={{\"{tag}\"}}", name.lv());
    lvm(Program::Lvremove)
        .args(["--yes", "--select", &select, name.vg().as_str()])
        .run()
        .map_err(|error| Error::new(Code::ReleaseFailed, name.to_string()).because(error))?;
    Ok(true)
}
