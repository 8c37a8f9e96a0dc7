//! Thin volumes of a guest, opened by the kernel's own thin target on the snapshots.
//!
//! All volumes of a pool share one pool device: two of them over the same metadata would destroy
//! it. So pools are found again by where their metadata lie.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::dm::{Control, DmDevice, Target, devno};
use super::{Ground, Namer, SECTOR, needs_dm};
use crate::disk::layout::{Segment, ThinPool};
use crate::snapshot::Device;
use crate::sys::loopdev::LoopDevice;
use crate::{Code, Error, Result};

/// A pool that is active, and all it stands on.
#[derive(Debug)]
pub(super) struct Pool {
    /// Above all others: the order of the fields is the order in which they are dropped.
    device: DmDevice,
    metadata: DmDevice,
    data: DmDevice,
    loops: Vec<LoopDevice>,
}

/// Where a pool's metadata start: file system and file, or device; and the byte.
type Key = (u64, u64, u64);

static POOLS: Mutex<BTreeMap<Key, Weak<Pool>>> = Mutex::new(BTreeMap::new());

fn pools() -> MutexGuard<'static, BTreeMap<Key, Weak<Pool>>> {
    // The map is valid after each single change, so a panic elsewhere did not break it.
    POOLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One volume's share in a pool; the last one to go deactivates the pool.
#[derive(Debug)]
pub(super) struct PoolUse(Option<Arc<Pool>>);

impl PoolUse {
    /// Gives the pool back.
    pub(super) fn close(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        // Nobody may activate the pool again before all of it is gone.
        let _guard = pools();
        let Some(pool) = self.0.take().and_then(Arc::into_inner) else {
            return Ok(());
        };
        let mut result = pool.device.close();
        for part in [pool.metadata, pool.data] {
            result = result.and(part.close());
        }
        drop(pool.loops);
        result
    }
}

impl Drop for PoolUse {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            log::error!("{}", error.report());
        }
    }
}

/// Activates a thin volume, and its pool if that is not active yet.
pub(super) fn map(
    pool: &ThinPool,
    device_id: u32,
    size: u64,
    devices: &[Device],
    names: &mut dyn Namer,
) -> Result<(PoolUse, DmDevice)> {
    let control = Control::open().ok_or_else(needs_dm)?;
    let active = share(pool, &control, devices, names)?;
    let text = format!("{} {device_id}", devno(active.device.number()));
    let target = Target::new(size / SECTOR, "thin", text);
    let share = PoolUse(Some(active));
    let device = DmDevice::create(&control, names, &[target])?;
    Ok((share, device))
}

/// The active pool, or a new one.
fn share(
    pool: &ThinPool,
    control: &Control,
    devices: &[Device],
    names: &mut dyn Namer,
) -> Result<Arc<Pool>> {
    let key = key(pool, devices)?;
    let mut pools = pools();
    if let Some(active) = pools.get(&key).and_then(Weak::upgrade) {
        return Ok(active);
    }
    let active = Arc::new(Pool::activate(pool, control, devices, names)?);
    pools.retain(|_, pool| pool.strong_count() > 0);
    pools.insert(key, Arc::downgrade(&active));
    Ok(active)
}

fn key(pool: &ThinPool, devices: &[Device]) -> Result<Key> {
    let extent = pool
        .metadata
        .first()
        .and_then(|segment| segment.extents().first())
        .ok_or_else(|| Error::new(Code::Internal, "a pool without metadata"))?;
    let device = devices.get(extent.disk).ok_or_else(|| {
        Error::new(
            Code::Internal,
            format!("no snapshot of disk {}", extent.disk),
        )
    })?;
    let metadata = std::fs::metadata(&device.path).map_err(|error| {
        Error::new(Code::MapFailed, device.path.display().to_string()).because(error)
    })?;
    // A device is the same by any node; a file is not a device.
    Ok(match metadata.rdev() {
        0 => (metadata.dev(), metadata.ino(), extent.start),
        number => (number, 0, extent.start),
    })
}

impl Pool {
    fn activate(
        pool: &ThinPool,
        control: &Control,
        devices: &[Device],
        names: &mut dyn Namer,
    ) -> Result<Self> {
        let mut ground = Ground::new(devices);
        let mut part = |segments: &[Segment]| -> Result<DmDevice> {
            DmDevice::create(control, names, &ground.targets(segments)?)
        };
        let metadata = part(&pool.metadata)?;
        let data = part(&pool.data)?;
        let text = format!(
            "{} {} {} 0 3 ignore_discard error_if_no_space skip_block_zeroing",
            devno(metadata.number()),
            devno(data.number()),
            pool.chunk_size / SECTOR,
        );
        let target = Target::new(data.size() / SECTOR, "thin-pool", text);
        let device = DmDevice::create(control, names, &[target])?;
        let loops = ground.into_loops();
        let active = Pool {
            device,
            metadata,
            data,
            loops,
        };
        active.check(pool)?;
        Ok(active)
    }

    /// What the kernel found in the pool's metadata must be what LVM2's metadata expect.
    fn check(&self, pool: &ThinPool) -> Result<()> {
        let status = self.device.status().map_err(|error| {
            Error::new(Code::MapFailed, format!("thin pool {}: status", pool.name)).because(error)
        })?;
        verdict(&status, pool.transaction_id)
            .map_err(|why| Error::new(Code::MapFailed, format!("thin pool {}: {why}", pool.name)))
    }
}

/// Judges the status line of a pool.
fn verdict(status: &str, transaction_id: u64) -> std::result::Result<(), String> {
    let words: Vec<&str> = status.split_whitespace().collect();
    if words.first().and_then(|w| w.parse::<u64>().ok()).is_none() {
        return Err(format!("the kernel cannot use it: {status}"));
    }
    if words.contains(&"needs_check") {
        return Err("it is marked as needing thin_check, to be run in the guest".into());
    }
    if words.first() != Some(&transaction_id.to_string().as_str()) {
        return Err(format!(
            "transaction {} in the pool, {transaction_id} in the volume group",
            words.first().unwrap_or(&"")
        ));
    }
    if words.contains(&"ro") {
        return Err("the kernel opened it read-only".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_verdict_on_pool_status() {
        let fine = "1 13/1024 3/640 - rw no_discard_passdown error_if_no_space - 1024";
        assert_eq!(verdict(fine, 1), Ok(()));
        assert!(verdict(fine, 2).unwrap_err().contains("transaction 1"));
        assert!(verdict("Fail", 1).unwrap_err().contains("Fail"));
        assert!(verdict("Error", 1).is_err());
        assert!(verdict(&fine.replace("- 1024", "needs_check 1024"), 1).is_err());
        assert!(verdict(&fine.replace("rw", "ro"), 1).is_err());
    }
}
