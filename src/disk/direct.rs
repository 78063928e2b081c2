//! Reads what is on the disk, not what the page cache has of it.
//!
//! A page that is cached hides rot below it, and a scrubber that fills the cache with what nobody
//! asked for costs those who did. `O_DIRECT` does neither: the kernel first writes out what is
//! dirty, then reads from the disk into our buffer, and cached pages stay as they are. Where a file
//! system does not know it, clean pages of the stretch are dropped before it is read, and after.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::{Advice, OFlags};
use rustix::io::Errno;

use super::sums::ReadBlock;

/// What every disk's logical block divides.
const ALIGNMENT: usize = 4096;

/// A file to be read past the page cache.
pub(super) struct Direct {
    file: File,
    /// `false`: the file system has no `O_DIRECT`.
    past_cache: bool,
    buffer: Vec<u8>,
}

impl Direct {
    /// Opens it for reading.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECT.bits().cast_signed();
        let direct = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let (file, past_cache) = match direct {
            Err(error) if is_not_supported(&error) => (File::open(path)?, false),
            opened => (opened?, true),
        };
        Ok(Self {
            file,
            past_cache,
            buffer: Vec::new(),
        })
    }

    fn forget(&self, offset: u64, len: usize) {
        if !self.past_cache {
            // Advice: what does not heed it caches more.
            let _ = rustix::fs::fadvise(
                &self.file,
                offset,
                NonZeroU64::new(len as u64),
                Advice::DontNeed,
            );
        }
    }
}

fn is_not_supported(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::OPNOTSUPP].contains(&Errno::from_io_error(error).unwrap_or(Errno::IO))
}

impl ReadBlock for Direct {
    fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let start = offset - offset % ALIGNMENT as u64;
        let skip = usize::try_from(offset - start).map_err(io::Error::other)?;
        let wanted = skip + len;
        let whole = wanted.next_multiple_of(ALIGNMENT);
        self.buffer.resize(whole + ALIGNMENT, 0);
        // The buffer has to be aligned in memory too, and a Vec of bytes need not be.
        let aligned = self.buffer.as_ptr().align_offset(ALIGNMENT);
        self.forget(start, whole);
        let mut read = 0;
        while read < wanted {
            let to = &mut self.buffer[aligned + read..aligned + whole];
            match self.file.read_at(to, start + read as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                // Only at the end of the file is it odd.
                Ok(n) => read += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.forget(start, whole);
        Ok(&self.buffer[aligned + skip..aligned + wanted])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_stretch_is_read_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..20_011_u32).map(|n| n.to_le_bytes()[0] ^ 7).collect();
        std::fs::write(&path, &bytes).unwrap();
        for direct in [true, false] {
            let mut file = Direct::open(&path).unwrap();
            if !direct {
                file.file = File::open(&path).unwrap();
                file.past_cache = false;
            }
            for (offset, len) in [
                (0, 1),
                (0, 4096),
                (4096, 8192),
                (777, 10_000),
                (16_384, 3627),
            ] {
                let read = file.read(offset, len).unwrap();
                let start = usize::try_from(offset).unwrap();
                assert_eq!(read, &bytes[start..start + len], "{offset} {len}");
            }
            let beyond = file.read(16_384, 3628).unwrap_err();
            assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
