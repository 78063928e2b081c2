//! The steps after which a crash would leave something else on disk than before them.
//!
//! The tier says at each that it was [`reached`]. In the program that does nothing and costs nothing; in this crate's
//! tests a directory can be watched, and `tests/crash.rs` takes an image of what a crash would leave at every one.

/// One step that changed, or is about to change, what a crash would leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Step {
    /// A schema migration was committed.
    Migrated,
    /// The number of this run was committed.
    RunBegun,
    /// A catalog that cannot be used was marked so.
    Marked,
    /// It, or its log, was renamed out of the way.
    SetAside,
    /// The mark is gone.
    Unmarked,
    /// A revision was committed.
    Admitted,
    /// A segment file was made; nothing names it yet.
    FileCreated,
    /// Bytes of a block are in the page cache.
    BytesWritten,
    /// A file's data was synced.
    DataSynced,
    /// The directory of a new file was synced.
    DirectorySynced,
    /// A batch with coverage was committed.
    Recorded,
    /// A commit, and with it all before it, was synced.
    LogSynced,
    /// The log's pages are about to be moved into the database.
    Checkpointing,
    /// They were, or this failed.
    Checkpointed,
    /// The rows of evicted segments are gone, their files are not.
    Evicted,
    /// The rows of purged revisions are gone durably, their files are not.
    Purged,
    /// The row of a segment that cannot be trusted is gone, its file is not.
    Quarantined,
    /// A row whose file is gone was taken out.
    RowSwept,
    /// A segment file was unlinked.
    Unlinked,
    /// The orderly end was committed.
    Closed,
}

/// Nothing, outside of tests.
#[cfg(not(test))]
#[inline]
pub(super) fn reached(_dir: &std::path::Path, _step: Step) {}

#[cfg(test)]
pub(super) use watched::{Watch, reached};

#[cfg(test)]
mod watched {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, LazyLock};

    use parking_lot::Mutex;

    use super::Step;

    type Hook = Arc<dyn Fn(Step) + Send + Sync>;

    static HOOKS: LazyLock<Mutex<HashMap<PathBuf, Hook>>> = LazyLock::new(Mutex::default);

    /// Tells who watches `dir`, in the thread that took the step.
    pub(in crate::disk) fn reached(dir: &Path, step: Step) {
        let hook = HOOKS.lock().get(dir).cloned();
        if let Some(hook) = hook {
            hook(step);
        }
    }

    /// Watches a directory for as long as it lives.
    pub(in crate::disk) struct Watch(PathBuf);

    impl Watch {
        pub(in crate::disk) fn new(
            dir: &Path,
            hook: impl Fn(Step) + Send + Sync + 'static,
        ) -> Self {
            let others = HOOKS.lock().insert(dir.to_owned(), Arc::new(hook));
            assert!(others.is_none(), "{} is watched already", dir.display());
            Self(dir.to_owned())
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            HOOKS.lock().remove(&self.0);
        }
    }
}
