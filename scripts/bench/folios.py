"""In which pieces the page cache holds files: `python3 scripts/bench/folios.py FILE...`, as root, since the kernel tells nobody else. Reads what is
not there. The fewer and larger the pieces (folios), the less a warm read of many of them costs (docs/adr/0024)."""

import collections
import mmap
import os
import struct
import sys

PAGE = mmap.PAGESIZE
# Documentation/admin-guide/mm/pagemap.rst
PRESENT, NUMBER = 1 << 63, (1 << 55) - 1
TAIL = 1 << 16


def folios(path):
    """How many folios there are of each length in bytes."""
    found, length = collections.Counter(), 0
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages,
        open("/proc/self/pagemap", "rb", buffering=0) as pagemap,
        open("/proc/kpageflags", "rb", buffering=0) as kpageflags,
    ):
        for offset in range(0, len(pages), PAGE):
            pages[offset]
        for page in pagemap_entries(pagemap, os.path.realpath(path), len(pages)):
            if not page & PRESENT:
                raise SystemExit(f"{path}: a page was taken away while it was looked at")
            (flags,) = struct.unpack("=Q", os.pread(kpageflags.fileno(), 8, 8 * (page & NUMBER)))
            if not flags & TAIL and length:
                found[length] += 1
                length = 0
            length += PAGE
    found[length] += 1
    return found


def pagemap_entries(pagemap, path, size):
    with open("/proc/self/maps") as maps:
        start = next(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(path))
    pagemap.seek(8 * (start // PAGE))
    entries = pagemap.read(8 * -(-size // PAGE))
    return struct.unpack(f"={len(entries) // 8}Q", entries)


if __name__ == "__main__":
    total = collections.Counter()
    for path in sys.argv[1:] or sys.exit(__doc__):
        total.update(folios(path))
    everything = sum(length * count for length, count in total.items())
    for length, count in sorted(total.items()):
        print(f"{length >> 10:>6} KiB {count:>8} {100 * length * count / everything:5.1f} %")
